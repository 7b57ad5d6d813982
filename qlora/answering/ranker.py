"""Passages in order: what the search found, a cross-encoder's scores and the model's own reading, weighed.

ranker = Ranker(ranking, reader, score)
documents = ranker(question, documents)     # in a new order; the metadata of the first has `confidence`
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from langchain_core.documents import Document

from qlora.answering.ranking import SCORES, UNREAD, Ranking
from qlora.console import UserError

AMONG = 10  # passages of a search that are ranked: they hold the answer to all sample questions
CONTENDERS = 3  # passages that the model reads, at most
NEAR = 0.2  # of the best, in units of the search's total: farther ones are not read. Best on held-out rows (.1 to .3)


@dataclass(frozen=True)
class Ranker:
    """Puts the passages of a search in order. `reader` has `odds`; `score(question, texts)` is the cross-encoder."""

    ranking: Ranking
    reader: object = None
    score: Callable[[str, list[str]], list[float]] | None = None
    bias: float = 0.0
    keeps_going: bool = False  # without the reranker, where that fails

    def __call__(self, question: str, documents: Sequence[Document], history: Sequence[dict] = ()) -> list[Document]:
        """The passages, best first, with scores and `ranks["search"]` in their metadata; the first has `confidence`."""
        try:
            scored = self.score_all(question, documents)
        except UserError as error:
            if not self.keeps_going:
                raise
            return [note_rank(document, n, unranked=str(error)) for n, document in enumerate(documents, 1)]
        found = self.order(question, scored, history)
        if found and self.ranking.decides:
            found[0].metadata["confidence"] = round(self.ranking.confidence(found[0].metadata, self.bias), 4)
        return found

    def score_all(self, question: str, documents: Sequence[Document]) -> list[Document]:
        """The passages with their rank in the search, and the cross-encoder's scores, where there is one."""
        found = [note_rank(document, n) for n, document in enumerate(documents, 1)]
        if not (self.score and found):
            return found
        texts = [document.page_content for document in found]
        for document, value in zip(found, self.score(question, texts), strict=True):
            document.metadata["cross"] = round(value, 4)
        return found

    def weigh(self, document: Document, among: Sequence[str]) -> float:
        return self.ranking.weigh(document.metadata, among)

    def sort(self, found: Sequence[Document]) -> list[Document]:
        """The passages in the order of the search and, where it counts, the cross-encoder."""
        if "cross" not in self.ranking.order:
            return list(found)
        return sorted(found, key=lambda document: -self.weigh(document, UNREAD))

    def order(self, question: str, found: Sequence[Document], history: Sequence[dict] = ()) -> list[Document]:
        """The passages that come near the first, in the order that reading them gives, then the others."""
        found = self.sort(found)
        if not (found and self.ranking.reads):
            return found
        near = self.read(question, found, history)
        others = [document for document in found if document not in near]
        return [*sorted(near, key=lambda document: -self.weigh(document, SCORES)), *others]

    def read(self, question: str, found: Sequence[Document], history: Sequence[dict] = ()) -> list[Document]:
        """The contenders, with their odds in the metadata; the first alone where odds do not change the order."""
        most = CONTENDERS if "odds" in self.ranking.order else 1
        least = self.weigh(found[0], UNREAD) - NEAR
        near = [document for document in found[:most] if self.weigh(document, UNREAD) >= least]
        for document, odds in zip(near, self.reader.odds(question, near, history), strict=True):
            document.metadata["odds"] = round(odds, 4)
        return near


def note_rank(document: Document, n: int, **notes) -> Document:
    """The passage with its rank in the search, apart from the one that the store returned."""
    metadata = {**document.metadata, "ranks": {**document.metadata["ranks"], "search": n}, **notes}
    return Document(document.page_content, metadata=metadata, id=document.id)
