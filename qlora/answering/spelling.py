"""Words spelled as the passages spell them: a small model misspells rare names that it copies.

    spell_as("Cosiima Hollingberry signs it [1]", ["Cosima Hollingberry signs form B7."])  # "Cosima Hollingberry ..."

A word that is nowhere in the passages becomes the one of theirs that is nearest, where one is near enough. Numbers
stay as they are: another number would be another answer.
"""

import difflib
import re
from collections.abc import Sequence

from qlora.answering.citations import EMPTY_WORDS, WORD
from qlora.words import SPACELESS

NEAR = 0.75  # difflib's ratio; "wideners" for "widowers" has 0.75. From 0.7 to 0.85 F1 on the sample is the same
SHORTEST = 3  # letters
LAST_WORD = re.compile(rf"[^\W{SPACELESS}]+$")


class Speller:
    """Spells a text as its sources do, also one that comes in pieces, of which it passes on whole words."""

    def __init__(self, sources: Sequence[str]):
        words = (word for source in sources for word in WORD.findall(source) if word.isalpha())
        self.known = {word.lower(): word for word in words if word.lower() not in EMPTY_WORDS}
        self.rest = ""

    def spell(self, text: str) -> str:
        return WORD.sub(lambda match: self.spell_word(match[0]), text)

    def spell_word(self, word: str) -> str:
        low = word.lower()
        if len(word) < SHORTEST or not word.isalpha() or low in self.known or low in EMPTY_WORDS:
            return word
        alike = [known for known in self.known if known[0] == low[0]]  # "illegal" must not become "legal"
        for near in difflib.get_close_matches(low, alike, 1, NEAR):
            right = self.known[near]
            return right[0].upper() + right[1:] if word[0].isupper() else right
        return word

    def add(self, piece: str) -> str:
        """The words that are complete with this piece."""
        text = self.rest + piece
        last = LAST_WORD.search(text)
        self.rest = last[0] if last else ""
        return self.spell(text[: len(text) - len(self.rest)])

    def finish(self) -> str:
        """The last word."""
        rest, self.rest = self.rest, ""
        return self.spell(rest)


def spell_as(text: str, sources: Sequence[str]) -> str:
    return Speller(sources).spell(text)
