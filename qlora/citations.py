"""What an answer cites: every `[n]` is looked up among the passages that were given; others are removed."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from langchain_core.documents import Document

from qlora.prompt import Prompt

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


def best_score(documents: Sequence[Document]) -> float:
    """The similarity of the best passage; -1, the lowest there is, when there is none."""
    return max((document.metadata["score"] for document in documents), default=-1.0)


def refuse(documents: Sequence[Document], refusal: str = Prompt.refusal) -> Answer:
    """The refusal, with the passages that did not answer."""
    return Answer(refusal, True, (), tuple(Cited(n, document) for n, document in enumerate(documents, 1)), 0)


def check_answer(text: str, documents: Sequence[Document], refusal: str) -> Answer:
    """The answer with its citations resolved, in order of first mention. A refusal cites nothing."""
    if is_refusal(text, refusal):
        return refuse(documents, refusal)
    passages = tuple(Cited(n, document) for n, document in enumerate(documents, 1))
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
