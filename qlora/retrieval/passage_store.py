"""What every store of passages is to LangChain and to the scripts, whichever database is behind it."""

import hashlib
import json
import uuid
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore
from langchain_core.vectorstores.utils import maximal_marginal_relevance

from qlora.retrieval import metadata_filter, search_modes
from qlora.retrieval.documents import embedded_text
from qlora.retrieval.metadata_filter import Condition
from qlora.words import clean, unify

ADDED_AS_TEXT = "added as text"  # the fingerprint of what came through LangChain's add_texts


@dataclass(frozen=True)
class Entry:
    """A document as the collection knows it."""

    source: str
    fingerprint: str
    folder: str | None = None  # that was ingested; None for texts and files that were named one by one
    bytes: int = 0
    passages: int = 0
    added: datetime | None = None


@dataclass(frozen=True)
class Passage:
    """A passage ready to be stored."""

    id: str
    document: Document
    vector: Sequence[float]


@dataclass(frozen=True)
class Hit:
    """A passage that a search found: `score` is its cosine similarity, `total` what the search ranks by.

    `dense` and `lexical` are its ranks among the different texts, by the two legs. `sources` are those of all passages
    with this text.
    """

    id: str
    text: str
    metadata: dict
    score: float
    total: float
    dense: int | None
    lexical: int | None
    embedding: Sequence[float]
    sources: tuple[str, ...] = ()

    def as_document(self, with_score: bool = True) -> Document:
        """A LangChain Document; `also_in` in its metadata names other sources of the text, where there are some.

        With the score and the ranks, unless LangChain's callers ask for the metadata as they were given.
        """
        others = [source for source in self.sources if source != self.metadata.get("source")]
        found = {"also_in": others} if others else {}
        if with_score:
            found |= {
                "score": round(self.score, 4),
                "total": round(self.total, 4),
                "ranks": {"dense": self.dense, "lexical": self.lexical},
            }
        return Document(self.text, metadata={**self.metadata, **found}, id=self.id)


Prepared = tuple[Entry, Sequence[Document], Sequence]  # a document, its passages, their vectors


class PassageStore(VectorStore):
    """One collection of passages; a subclass per database implements what is abstract here."""

    _embeddings: Embeddings
    refusal_threshold: float | None  # the similarity that the best passage must reach; None when all are answered
    language: str | None  # its code; None until the first passages are there

    @property
    def embeddings(self) -> Embeddings:
        return self._embeddings

    @embeddings.setter
    def embeddings(self, embeddings: Embeddings) -> None:
        self._embeddings = embeddings

    @abstractmethod
    def choose_language(self, code: str) -> None:
        """Sets the language of a collection without documents; does nothing to others."""

    @abstractmethod
    def move_documents(self, sources: Sequence[str], folder: str) -> None:
        """Notes that documents are in another folder now."""

    @abstractmethod
    def count(self) -> int:
        """The number of passages in the collection."""

    @abstractmethod
    def documents(self) -> list[Entry]:
        """The entries of the collection, by source."""

    def digest(self) -> str:
        """The sha256 of all documents and how they were split: with an equal one the passages are equal."""
        lines = sorted(json.dumps([entry.source, entry.fingerprint]) for entry in self.documents())
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @abstractmethod
    def all_passages(self, most: int | None = None) -> list[Document]:
        """All passages with id and metadata, or some."""

    def feedback(self):
        """The log of judgements; None where the database keeps none."""
        return None

    @abstractmethod
    def put_parts(self, entry: Entry, parts: Iterable[tuple[Sequence[Document], Sequence]]) -> int:
        """Adds a document or replaces it, from parts of its passages with their vectors; returns their number."""

    def put_document(self, entry: Entry, passages: Sequence[Document], vectors: Sequence | None = None) -> int:
        """Adds a document or replaces it, with all its passages; returns their number."""
        if vectors is None:
            vectors = self._embeddings.embed_documents([embedded_text(passage) for passage in passages])
        return self.put_parts(entry, [(passages, vectors)])

    def put_documents(self, prepared: Iterable[Prepared]) -> Iterator[tuple[Entry, int]]:
        """Writes documents one after the other; yields each with its number of passages once it is written."""
        for entry, passages, vectors in prepared:
            self.put_document(entry, passages, vectors)
            yield entry, len(passages)

    @abstractmethod
    def forget(self, sources: Sequence[str]) -> int:
        """Removes documents with their passages; returns how many there were."""

    @abstractmethod
    def finish(self) -> None:
        """Work to do after everything has been written."""

    @abstractmethod
    def drop(self) -> None:
        """Removes the collection with everything in it, and closes the store."""

    @abstractmethod
    def _put_texts(self, by_source: dict[str, list[Passage]]) -> None:
        """Adds passages to documents, which are created where they are missing."""

    @abstractmethod
    def _find_passages(self, question: str, vector, k: int, mode: str, where, fetch_k: int) -> list[Hit]:
        """The best passages of the `k` best texts, best first."""

    # ----------------------------------------------------------------------- LangChain's way in

    def add_texts(self, texts: Iterable[str], metadatas=None, *, ids=None, **kwargs) -> list[str]:
        """Adds passages, or replaces those of the same id; returns the ids in the order of the texts.

        They belong to the document that `source` in their metadata names, else to one called "texts".
        """
        texts = list(texts)
        ids = [given or str(uuid.uuid4()) for given in ids or [None] * len(texts)]
        vectors = self._embeddings.embed_documents([unify(text) for text in texts])
        # A later text of the same id replaces an earlier one, as it would in two calls.
        last = {given: n for n, given in enumerate(ids)}
        by_source: dict[str, list[Passage]] = {}
        for given, n in last.items():
            metadata = (metadatas[n] if metadatas else None) or {}
            passage = Passage(given, Document(texts[n], metadata=metadata), vectors[n])
            by_source.setdefault(str(metadata.get("source", "texts")), []).append(passage)
        self._put_texts(by_source)
        return ids

    # ----------------------------------------------------------------------- search

    def find(
        self,
        question: str,
        k: int = 3,
        mode: str = search_modes.DEFAULT_MODE,
        where: Sequence[Condition] = (),
        fetch_k: int = search_modes.FETCH,
        diversity: float = 0.0,
    ) -> list[Document]:
        """The `k` best passages, best first; their metadata has `score`, the cosine similarity (-1 to 1),
        and `ranks`, the place that each leg of the search gave them.

        Each leg ranks `fetch_k` passages. With `diversity` above 0, passages that repeat a better one move
        down (maximal marginal relevance, lambda = 1 - diversity).
        """
        question = unify(clean(question))
        vector = self._embeddings.embed_query(question)
        pool = max(k, fetch_k)
        found = self._find_passages(question, vector, pool if diversity else k, mode, where, pool)
        if diversity:
            found = choose_diverse(found, vector, k, 1 - diversity)
        return [hit.as_document() for hit in found]

    def similarity_search(self, query: str, k: int = 4, filter: dict | None = None, **kwargs) -> list[Document]:
        return [document for document, _ in self.similarity_search_with_score(query, k, filter)]

    def similarity_search_with_score(self, query: str, k: int = 4, filter: dict | None = None, **kwargs):
        """(passage, cosine similarity) of the nearest, best first; metadata as they were given."""
        return self._nearest(query, self._embeddings.embed_query(unify(clean(query))), k, filter)

    def similarity_search_by_vector(self, embedding: list[float], k: int = 4, filter: dict | None = None, **kwargs):
        return [document for document, _ in self._nearest("", embedding, k, filter)]

    def _nearest(self, query: str, vector, k: int, filters: dict | None) -> list[tuple[Document, float]]:
        found = self._find_passages(query, vector, k, "dense", metadata_filter.read_dict(filters), k)
        return [(hit.as_document(with_score=False), hit.score) for hit in found]

    def max_marginal_relevance_search(self, query, k=4, fetch_k=20, lambda_mult=0.5, filter=None, **kwargs):
        vector = self._embeddings.embed_query(unify(clean(query)))
        return self.max_marginal_relevance_search_by_vector(vector, k, fetch_k, lambda_mult, filter)

    def max_marginal_relevance_search_by_vector(
        self, embedding, k=4, fetch_k=20, lambda_mult=0.5, filter=None, **kwargs
    ):
        found = self._find_passages("", embedding, fetch_k, "dense", metadata_filter.read_dict(filter), fetch_k)
        chosen = choose_diverse(found, embedding, k, lambda_mult)
        return [hit.as_document(with_score=False) for hit in chosen]

    def _select_relevance_score_fn(self):
        return lambda score: (score + 1) / 2


def choose_diverse(found: Sequence[Hit], vector, k: int, weight: float) -> list[Hit]:
    """The `k` of the passages with the highest marginal relevance; `weight` 1 is relevance alone."""
    vectors = [hit.embedding for hit in found]
    return [found[n] for n in maximal_marginal_relevance(numpy.array(vector), vectors, weight, k)]
