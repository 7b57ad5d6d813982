"""Questions that a passage does not answer, for rows that refuse: with another passage, or with another name in them.

A model that sees only answerable questions learns to answer all. Near misses teach most: the nearest other passage of
the search, and a question of which one name or number was changed.
"""

import random
import re
from collections.abc import Sequence

from langchain_core.documents import Document

from qlora.metrics import token_f1
from qlora.words import normalize, pad_words
from qlora.writing.checks import NAME, is_grounded, names_known
from qlora.writing.drafts import Unanswerable, Wanted, Written

SURPLUS = 1.5  # attempts per row that is wanted
DEPTH = 10  # passages of the search that are looked at
OTHER = 0.5  # token F1 of the reader's answer with the right one, below which it read something else


class Refusals:
    """Makes one unanswerable question of some of the passages."""

    def __init__(self, tools, passages: Sequence[Document], wanted: Wanted):
        self.tools, self.wanted = tools, wanted
        names = {name for passage in passages for name in NAME.findall(passage.page_content)}
        self.names = sorted(names)

    def make(self, written: Written, passage: Document) -> Unanswerable | None:
        """A question near those about the passage that has no answer; None for most passages, or where it may have."""
        passed = [one for one in written.drafts if not one.dropped]
        chance = random.Random(f"{self.wanted.seed} {written.id}")
        share = self.wanted.refusal_share
        attempts = SURPLUS * share / (1 - share) * min(len(passed), self.wanted.per_passage)
        if not passed or chance.random() >= attempts:
            return None
        one = passed[0]
        ways = [self.leave_out, self.change]
        chance.shuffle(ways)
        return next((made for way in ways if (made := way(one, passage, chance))), None)

    def leave_out(self, one, passage: Document, chance) -> Unanswerable | None:
        """The question with the nearest passage that does not hold the answer."""
        for other in self.tools.find(one.question, DEPTH):
            text = other.page_content
            if text == passage.page_content or is_grounded(one.answer, text) or shares_text(text, passage.page_content):
                continue
            if self.reads(text, one.question, one.answer):
                return None
            return Unanswerable(one.question, text, passage.metadata["source"], "passage left out")
        return None

    def change(self, one, passage: Document, chance) -> Unanswerable | None:
        """The question with another number or name, which no passage has together with the rest."""
        found = [match for match in NAME.finditer(one.question)]
        if not found:
            return None
        match = chance.choice(found)
        if not (new := self.another(match[0], passage.page_content, chance)):
            return None
        question = one.question[: match.start()] + new + one.question[match.end() :]
        if any(names_known(question, near.page_content) for near in self.tools.find(question, DEPTH)):
            return None
        return Unanswerable(question, passage.page_content, passage.metadata["source"], "name or number changed")

    def another(self, name: str, text: str, chance) -> str | None:
        """A name or number of the documents like this one, which the passage does not have."""
        shape = re.sub(r"\d", "0", name) if name[0].isdigit() else "name"
        alike = [
            other
            for other in self.names
            if other != name and (re.sub(r"\d", "0", other) if other[0].isdigit() else "name") == shape
        ]
        alike = [other for other in alike if pad_words(other) not in pad_words(text)]
        return chance.choice(alike) if alike else None

    def reads(self, text: str, question: str, answer: str) -> bool:
        """Whether the reader finds the right answer in a passage where it should not be."""
        if not self.tools.read:
            return False
        (read,) = self.tools.read([(text, question)])
        return token_f1(read, [answer]) >= OTHER


def shares_text(one: str, other: str) -> bool:
    """Whether two passages overlap, as neighbours do: eight words in a row are in both."""
    words = normalize(one).split()
    inside = pad_words(other)
    return any(f" {' '.join(words[n : n + 8])} " in inside for n in range(max(1, len(words) - 7)))
