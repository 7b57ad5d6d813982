"""The LangChain VectorStore over Pinecone: one index for all collections, two namespaces per collection.

`NAME` holds the passages; `NAME documents` holds a record for each complete document and one about the
collection. (A NAME that ends in " documents" or " passages" has its passages in `NAME passages`.) Pinecone has no
transactions: a document's passages are written first, its record after them, and its old passages are removed last.
The next run completes one that stopped.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import UTC, datetime
from itertools import islice

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from pinecone import Index, Pinecone
from pinecone.errors import exceptions

from qlora import settings
from qlora.console import UserError, fail, note
from qlora.retrieval.metadata_filter import LANGCHAIN, NUMBER, Condition
from qlora.retrieval.passage_store import ADDED_AS_TEXT, Entry, Hit, Passage, PassageStore, Prepared
from qlora.retrieval.word_index import text_key

REQUEST_BYTES, METADATA_BYTES = 2_000_000, 40_960  # docs.pinecone.io, "Database limits"
REQUEST_RECORDS, LISTED = 200, 100
AT_ONCE = 4  # requests
READY_SECONDS, VISIBLE_SECONDS = 300, 60
ABOUT = "collection"  # id of the record about the collection itself
# Ours among a record's metadata: the words, their key, the metadata as they were given, what the passage belongs to.
TEXT, SAME, GIVEN, SOURCE, FINGERPRINT = "_text", "_same", "_metadata", "_source", "_fingerprint"
LOOKED_AT, MOST_FOUND = 2, 1_000  # records per text that a search looks at first; the most that Pinecone gives


def open_index(dimension: int) -> Index:
    """The index that the settings name, created where it is missing, once it is ready.

    Raises UserError without a key, with a wrong one, over quota, when it has another dimension or metric, or when it
    is not ready in five minutes.
    """
    key = settings.get("PINECONE_API_KEY")
    if not key:
        raise fail("no Pinecone key", "PINECONE_API_KEY", "set it in the environment or in .env (app.pinecone.io)")
    name = settings.get("PINECONE_INDEX") or "qlora"
    client = Pinecone(api_key=key, host=settings.get("PINECONE_HOST"))
    with explaining(name):
        if not client.indexes.exists(name):
            cloud, region = settings.get("PINECONE_CLOUD") or "aws", settings.get("PINECONE_REGION") or "us-east-1"
            note(f"Making the Pinecone index {name} ({cloud}, {region}), once")
            place = {"deployment_type": "managed", "cloud": cloud, "region": region}
            with contextlib.suppress(exceptions.ConflictError):  # another process was first
                client.indexes.create(name=name, dimension=dimension, metric="cosine", deployment=place, timeout=-1)
        index = wait_until_ready(client, name)
        check_index(index, dimension)
        return client.index(host=index.host)


def wait_until_ready(client: Pinecone, name: str):
    """The index's description once it serves requests."""
    end = time.monotonic() + READY_SECONDS
    while not (index := client.indexes.describe(name)).status.ready:
        if time.monotonic() > end:
            what = f"the index is not ready after {READY_SECONDS} s (it is {index.status.state})"
            raise fail(what, name, "run it again later, or look at app.pinecone.io")
        time.sleep(1)
    return index


def check_index(index, dimension: int) -> None:
    """Raises UserError unless the index holds dense vectors of that dimension and compares them by cosine."""
    found = index.dimension, index.metric
    if found != (dimension, "cosine"):
        what = f"the index has dimension {found[0]} and metric {found[1]}; {dimension} and cosine are needed"
        raise fail(what, f"Pinecone index {index.name}", "name another index with PINECONE_INDEX: it will be made")


class PineconeStore(PassageStore):
    """One collection of passages in an index."""

    def __init__(self, index: Index, embeddings: Embeddings, embedding_model: str, collection: str):
        """Opens the collection. Raises UserError when it was made with another embedding model."""
        self.index = index
        self._embeddings, self._embedding_model = embeddings, embedding_model
        self.collection = collection
        self._awaited: dict[str, str | None] = {}  # fingerprints that reads should show soon, by source
        self._dimension = len(embeddings.embed_query("dimension"))
        with explaining(collection):
            about = self._about()
        if about.get("embedding_model", embedding_model) != embedding_model:
            raise fail(
                f"collection {collection} was made with embedding model {about['embedding_model']}, "
                f"not {embedding_model}",
                "--collection",
                "use that --embedding-model, or give another --collection",
            )
        if not about:
            self._write([self._record(ABOUT, {"embedding_model": embedding_model})])

    @property
    def passages(self) -> str:
        """The namespace of the passages; no other collection has it."""
        ends_like_another = self.collection.endswith((" documents", " passages"))
        return f"{self.collection} passages" if ends_like_another else self.collection

    @property
    def records(self) -> str:
        """The namespace of the records about documents."""
        return f"{self.collection} documents"

    def _about(self) -> dict:
        return self._fetch([ABOUT], self.records).get(ABOUT, {})

    def _record(self, key: str, values: dict) -> dict:
        """A record with a meaningless vector: Pinecone demands one."""
        kept = {name: value for name, value in values.items() if value is not None}
        return {"id": key, "values": [1.0] + [0.0] * (self._dimension - 1), "metadata": kept}

    @property
    def language(self) -> str | None:
        return self._about().get("language")

    def choose_language(self, code: str) -> None:
        """Notes the language of the documents: there are no words to stem here."""
        self._change_about(language=code)

    def _change_about(self, **values) -> None:
        """Writes the record about the collection; one that was made a moment ago may not be seen yet."""
        about = {"embedding_model": self._embedding_model, **self._about(), **values}
        self._write([self._record(ABOUT, about)])

    @property
    def refusal_threshold(self) -> float | None:
        threshold = self._about().get("refusal_threshold", "")
        return None if threshold == "" else threshold

    @refusal_threshold.setter
    def refusal_threshold(self, value: float | None) -> None:
        self._change_about(refusal_threshold="" if value is None else value)

    def count(self) -> int:
        with explaining(self.collection):
            found = self.index.describe_index_stats().namespaces.get(self.passages)
        return found.vector_count if found else 0

    def documents(self) -> list[Entry]:
        entries = []
        for keys in self._list(self.records):
            for key, values in self._fetch(keys, self.records).items():
                if key != ABOUT:
                    entries.append(as_entry(values))
        return sorted(entries, key=lambda entry: entry.source)

    def all_passages(self, most: int | None = None) -> list[Document]:
        found = (passage for keys in self._list(self.passages) for passage in self.get_by_ids(keys))
        return list(islice(found, most))

    def drop(self) -> None:
        for namespace in (self.passages, self.records):
            with explaining(namespace), contextlib.suppress(exceptions.NotFoundError):
                self.index.delete(delete_all=True, namespace=namespace)

    def finish(self) -> None:
        """Waits until reads see what was written: Pinecone is eventually consistent."""
        end = time.monotonic() + VISIBLE_SECONDS
        while not (seen := self._is_visible()) and time.monotonic() < end:
            time.sleep(1)
        if not seen:
            note("Pinecone does not show everything that was written yet: answers may miss some of it for a while")

    def _is_visible(self) -> bool:
        entries = {entry.source: entry for entry in self.documents()}
        found = {source: source in entries and entries[source].fingerprint for source in self._awaited}
        all_there = all(found[source] == (wanted or False) for source, wanted in self._awaited.items())
        return all_there and self.count() == sum(entry.passages for entry in entries.values())

    # ----------------------------------------------------------------------- write

    def put_parts(self, entry: Entry, parts: Iterable[tuple[Sequence[Document], Sequence]]) -> int:
        """Adds a document or replaces it: passages, then its record, then what it had before is removed.

        Raises UserError, with nothing of the part written, for metadata above Pinecone's 40 kB.
        """
        start, count = f"{digest(entry.source)}/{digest(entry.fingerprint)}", 0
        for passages, vectors in parts:
            numbered = enumerate(zip(passages, vectors, strict=True), count + 1)
            rows = [as_record(Passage(f"{start}/{n}", *pair), entry) for n, pair in numbered]
            self._write(rows, self.passages)
            count += len(passages)
        self._write_entry(replace(entry, passages=count))
        self._delete({"$and": [{SOURCE: {"$eq": entry.source}}, {FINGERPRINT: {"$ne": entry.fingerprint}}]})
        return count

    def put_documents(self, prepared: Iterable[Prepared]) -> Iterator[tuple[Entry, int]]:
        """Several at once: each needs three answers of a server that may be far away."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            begun = [(each[0], len(each[1]), pool.submit(self.put_document, *each)) for each in prepared]
            try:
                for entry, count, putting in begun:
                    putting.result()
                    yield entry, count
            finally:  # after a failure the rest is not tried: each would wait for the network
                pool.shutdown(cancel_futures=True)

    def _write_entry(self, entry: Entry) -> None:
        values = {**asdict(entry), "added": datetime.now(UTC).isoformat()}
        self._write([self._record(digest(entry.source), values)])
        self._awaited[entry.source] = entry.fingerprint

    def _put_texts(self, by_source: dict[str, list[Passage]]) -> None:
        for source, passages in by_source.items():
            entry = self._fetch([digest(source)], self.records).get(digest(source))
            entry = as_entry(entry) if entry else Entry(source, ADDED_AS_TEXT)
            known = self._fetch([passage.id for passage in passages], self.passages)
            self._write([as_record(passage, entry) for passage in passages], self.passages)
            self._write_entry(replace(entry, passages=entry.passages + len(passages) - len(known)))

    def move_documents(self, sources: Sequence[str], folder: str) -> None:
        known = self._fetch([digest(source) for source in sources], self.records)
        for values in known.values():
            self._write_entry(replace(as_entry(values), folder=folder))

    def forget(self, sources: Sequence[str]) -> int:
        keys = [digest(source) for source in sources]
        known = self._fetch(keys, self.records)
        for source in sources:
            self._delete({SOURCE: {"$eq": source}})
        if known:
            with explaining(self.collection):
                self.index.delete(ids=list(known), namespace=self.records)
            self._awaited |= {values["source"]: None for values in known.values()}
        return len(known)

    def _write(self, rows: list[dict], namespace: str | None = None) -> None:
        """Upserts records, several requests at once; the SDK waits and repeats refused requests for a while.

        Raises UserError, after the rest was written, when some were not.
        """
        if not rows:
            return
        largest = max(len(json.dumps(row)) for row in rows)
        size = max(1, min(REQUEST_RECORDS, REQUEST_BYTES // largest))
        with explaining(self.collection):
            answer = self.index.upsert(
                vectors=rows,
                namespace=namespace or self.records,
                batch_size=size,
                max_concurrency=AT_ONCE,
                show_progress=False,
            )
            if answer.has_errors:
                raise answer.errors[0].error

    def _delete(self, condition: dict) -> None:
        with explaining(self.collection), contextlib.suppress(exceptions.NotFoundError):
            self.index.delete(filter=condition, namespace=self.passages)

    # ----------------------------------------------------------------------- read

    def _list(self, namespace: str) -> Iterator[list[str]]:
        """The ids of all records, some at a time."""
        token = None
        while True:
            with explaining(self.collection):
                page = self.index.list_paginated(namespace=namespace, limit=LISTED, pagination_token=token)
            if keys := [item.id for item in page.vectors]:
                yield keys
            token = page.pagination.next if page.pagination else None
            if not token:
                return

    def _fetch(self, keys: Sequence[str], namespace: str) -> dict[str, dict]:
        """The metadata of the records that are there, by id."""
        found = {}
        for at in range(0, len(keys), LISTED):
            with explaining(self.collection):
                answer = self.index.fetch(ids=list(keys[at : at + LISTED]), namespace=namespace)
            found |= {key: vector.metadata or {} for key, vector in answer.vectors.items()}
        return found

    def _find_passages(self, question: str, vector, k: int, mode: str, where, fetch_k: int) -> list[Hit]:
        if mode != "dense":
            raise fail("Pinecone searches by meaning only", f"search {mode}", "use dense, or --store pgvector")
        looked_at = min(MOST_FOUND, LOOKED_AT * k)
        while True:
            matches = self._query(vector, looked_at, as_pinecone(where), with_vectors=True)
            texts: dict[str, list] = {}
            for match in matches:
                texts.setdefault(text_key(match.metadata[TEXT]).hex(), []).append(match)
            if len(texts) >= k or len(matches) < looked_at or looked_at == MOST_FOUND:
                break
            looked_at = min(MOST_FOUND, 8 * looked_at)
        texts = dict(list(texts.items())[:k])
        sources = self._find_sources(vector, texts, where, is_all=len(matches) < looked_at)
        return [
            Hit(
                *(best.id, best.metadata[TEXT], json.loads(best.metadata[GIVEN])),
                *(best.score, best.score, n, None, best.values, also),
            )
            for n, ((best, *_), also) in enumerate(zip(texts.values(), sources, strict=True), 1)
        ]

    def _find_sources(self, vector, texts: dict[str, list], where, is_all: bool) -> list[tuple[str, ...]]:
        """The sources of each text. Where copies were seen and there may be more, another request looks for them."""
        copied = [key for key, matches in texts.items() if len(matches) > 1]
        if copied and not is_all:
            condition = {"$and": [*(as_pinecone(where) or {"$and": []})["$and"], {SAME: {"$in": copied}}]}
            for match in self._query(vector, MOST_FOUND, condition):
                texts[match.metadata[SAME]].append(match)
        given = [[json.loads(match.metadata[GIVEN]).get("source") for match in matches] for matches in texts.values()]
        return [tuple(sorted({source for source in sources if source})) for sources in given]

    def _query(self, vector, count: int, condition: dict | None, with_vectors: bool = False) -> list:
        """The nearest records, with their metadata."""
        with explaining(self.collection):
            answer = self.index.query(
                top_k=count,
                vector=[float(x) for x in vector],
                namespace=self.passages,
                filter=condition,
                include_metadata=True,
                include_values=with_vectors,
            )
        return answer.matches

    @classmethod
    def from_texts(cls, texts, embedding, metadatas=None, *, ids=None, index, embedding_model, collection, **kwargs):
        store = cls(index, embedding, embedding_model, collection)
        store.add_texts(texts, metadatas, ids=ids)
        return store

    def delete(self, ids: list[str] | None = None, **kwargs) -> bool | None:
        """Removes passages by id; unknown ids are ignored. None does nothing: it does not mean all."""
        if ids is None:
            return None
        for at in range(0, len(ids), LISTED):
            with explaining(self.collection), contextlib.suppress(exceptions.NotFoundError):  # nothing was ever written
                self.index.delete(ids=ids[at : at + LISTED], namespace=self.passages)
        return True

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        found = self._fetch(ids, self.passages)
        return [
            Document(found[key][TEXT], metadata=json.loads(found[key][GIVEN]), id=key) for key in ids if key in found
        ]


def as_record(passage: Passage, entry: Entry) -> dict:
    """The passage as Pinecone stores it: metadata that it can filter by beside our own.

    Raises UserError when they are too large together.
    """
    given = passage.document.metadata
    flat = {key: value for key, value in given.items() if isinstance(value, str | int | float | bool)}
    ours = {
        TEXT: passage.document.page_content,
        GIVEN: json.dumps(given, ensure_ascii=False, default=str),
        SAME: text_key(passage.document.page_content).hex(),
        SOURCE: entry.source,
        FINGERPRINT: entry.fingerprint,
    }
    size = len(json.dumps({**flat, **ours}, ensure_ascii=False).encode())
    if size > METADATA_BYTES:
        what = f"a passage with its metadata has {size:,} bytes, Pinecone takes {METADATA_BYTES:,}"
        raise fail(what, entry.source, "ingest with smaller --passage-tokens, or take metadata out")
    return {"id": passage.id, "values": [float(x) for x in passage.vector], "metadata": {**flat, **ours}}


def as_entry(values: dict) -> Entry:
    known = {name: values.get(name) for name in ("source", "fingerprint", "folder")}
    sizes = {name: int(values.get(name, 0)) for name in ("bytes", "passages")}
    return Entry(**known, **sizes, added=datetime.fromisoformat(values["added"]))


def digest(text: str) -> str:
    """The part of an id that stands for a source: sources may be long, and have any letters."""
    return hashlib.sha256(text.encode()).hexdigest()[:24]


@contextlib.contextmanager
def explaining(what: str) -> Iterator[None]:
    """Turns the errors of the SDK into a UserError."""
    try:
        yield
    except exceptions.PineconeError as error:
        raise explain(error, what) from error


def explain(error: exceptions.PineconeError, what: str) -> UserError:
    """What an error of the SDK means for the user; the key is never in it."""
    fixes = (
        (exceptions.UnauthorizedError, "set PINECONE_API_KEY to a valid key (app.pinecone.io)"),
        (exceptions.ForbiddenError, "the quota may be used up, or the key has no right to it: see app.pinecone.io"),
        (exceptions.PaymentRequiredError, "the quota is used up: see app.pinecone.io"),
        (exceptions.RateLimitError, "too many requests: wait a minute and run it again, what is done stays done"),
        (exceptions.PineconeConnectionError, "check the network and run it again: what is done stays done"),
        (exceptions.PineconeTimeoutError, "check the network and run it again: what is done stays done"),
    )
    fix = next((fix for kind, fix in fixes if isinstance(error, kind)), "run it again, or see status.pinecone.io")
    said = " ".join(str(error).split()).replace(settings.get("PINECONE_API_KEY") or "\0", "PINECONE_API_KEY")[:200]
    return fail(f"Pinecone: {said}", what, fix)


def as_pinecone(conditions: Sequence[Condition]) -> dict | None:
    """The conditions in Pinecone's filter language (docs.pinecone.io, "Filter by metadata").

    Its values have types: a value that reads as a number or a truth value is looked for as text, too. Raises ValueError
    for < and > with text, which Pinecone does not compare.
    """
    parts = []
    for condition in conditions:
        key, operator = condition.key, condition.operator
        if operator == "!=":
            parts += [
                {"$or": [{key: {"$exists": False}}, {"$and": [{key: {"$ne": v}} for v in read_values(text)]}]}
                for text in condition.values
            ]
        elif operator == "=":
            values = [value for text in condition.values for value in read_values(text)]
            # Not $in, whose values have one type. No value is equal to none of them.
            parts.append({"$or": [{key: {"$eq": value}} for value in values]} if values else {key: {"$in": []}})
        elif NUMBER.fullmatch(condition.values[0]):
            names = {ours: theirs for theirs, ours in LANGCHAIN.items()}
            parts.append({key: {names[operator]: float(condition.values[0])}})
        else:
            raise ValueError(f"Pinecone compares numbers only: {condition}")
    return {"$and": parts} if parts else None


def read_values(text: str) -> list[str | float | bool]:
    """What the text may have been in a passage's metadata."""
    values: list[str | float | bool] = [text]
    if NUMBER.fullmatch(text):
        values.append(float(text))
    if text in ("true", "false"):
        values.append(text == "true")
    return values
