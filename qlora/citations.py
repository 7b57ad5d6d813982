"""What an answer cites: every `[n]` is looked up among the passages that were given; others are removed."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from langchain_core.documents import Document

MARK = re.compile(r"\[(\d+)\]")


@dataclass(frozen=True)
class Cited:
    """A passage with the number it had in the prompt."""

    n: int
    document: Document

    def as_json(self) -> dict:
        metadata = self.document.metadata
        return {
            "n": self.n,
            "source": metadata["source"],
            "score": metadata["score"],
            "text": self.document.page_content,
        }


@dataclass(frozen=True)
class Answer:
    """A checked answer; `unknown` counts citations of passages that were not given."""

    text: str
    refused: bool
    citations: tuple[Cited, ...]
    passages: tuple[Cited, ...]
    unknown: int


def check_answer(text: str, documents: Sequence[Document], refusal: str) -> Answer:
    """The answer with its citations resolved, in order of first mention. A refusal cites nothing."""
    passages = tuple(Cited(n, document) for n, document in enumerate(documents, 1))
    if is_refusal(text, refusal):
        return Answer(refusal, True, (), passages, 0)
    numbers = [int(number) for number in MARK.findall(text)]
    known = [n for n in dict.fromkeys(numbers) if 1 <= n <= len(passages)]
    clean = MARK.sub(lambda mark: mark[0] if 1 <= int(mark[1]) <= len(passages) else "", text)
    clean = re.sub(r"\s+([.,;:!?]|$)", r"\1", clean).strip()
    unknown = sum(not 1 <= n <= len(passages) for n in numbers)
    return Answer(clean, False, tuple(passages[n - 1] for n in known), passages, unknown)


def is_refusal(text: str, refusal: str) -> bool:
    """Whether the answer is the refusal, whatever follows it; typographic apostrophes count as plain ones."""
    plain = MARK.sub("", text).replace("\u2019", "'").strip().lower()
    return not plain or plain.startswith(refusal.rstrip(".").lower())
