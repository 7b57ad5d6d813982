"""The LangChain VectorStore over PostgreSQL + pgvector: exact search on small collections, HNSW on large ones.

A document is written in one transaction, whole or not at all. Values are bound, never formatted in;
the only identifier that varies is rag.passages_N, where N is the collection's integer key.
"""

import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from pgvector import HalfVector
from psycopg2 import sql

from qlora.console import UserError, fail, note
from qlora.retrieval import languages, search_sql
from qlora.retrieval.database import PASSAGES, Database, build_indexes, describe_url, migrate
from qlora.retrieval.feedback import FeedbackLog
from qlora.retrieval.passage_store import ADDED_AS_TEXT, Entry, Hit, Passage, PassageStore
from qlora.retrieval.word_index import index_words, text_key

INDEXED_FROM = 20_000  # passages; below, a scan takes a few milliseconds and finds everything
PASSAGE_COLUMNS = "id, document, text, metadata, embedding, same"
NEVER = 2.0  # more than the share of passages that any word is in: few passages may have few of a common one
COPY_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
COPY_TRAILER = struct.pack("!h", -1)


@dataclass(frozen=True)
class Collection:
    """A row of rag.collections."""

    id: int
    name: str
    dimension: int

    @property
    def table(self) -> sql.Identifier:
        return sql.Identifier("rag", f"passages_{self.id}")


class PgVectorStore(PassageStore):
    """One collection of passages."""

    def __init__(self, database: Database, embeddings: Embeddings, embedding_model: str, collection: str):
        """Opens the collection, which is created where it is missing.

        Raises UserError when it was made with another embedding model.
        """
        self.database = database
        self.original: Database | None = None  # that `database` is a copy of
        self._embeddings = embeddings
        self.collection = self._open(collection, embedding_model) or self._make(collection, embedding_model)

    def _open(self, name: str, model: str) -> Collection | None:
        with self.database.transaction() as cursor:
            migrate(cursor)
            cursor.execute("SELECT id, embedding_model, dimension FROM rag.collections WHERE name = %s", (name,))
            found = cursor.fetchone()
        if found and found[1] != model:
            raise fail(
                f"collection {name} was made with embedding model {found[1]} ({found[2]} dimensions), not {model}",
                "--collection",
                "use that --embedding-model, or give another --collection",
            )
        return Collection(found[0], name, found[2]) if found else None

    def _make(self, name: str, model: str) -> Collection:
        if self.database.is_copy():
            raise lacking(name, self.database)
        dimension = len(self._embeddings.embed_query("dimension"))
        with self.database.transaction() as cursor:
            cursor.execute(
                "INSERT INTO rag.collections (name, embedding_model, dimension) VALUES (%s, %s, %s) "
                "ON CONFLICT (name) DO NOTHING RETURNING id",
                (name, model, dimension),
            )
            if made := cursor.fetchone():
                collection = Collection(made[0], name, dimension)
                cursor.execute(sql.SQL(PASSAGES).format(table=collection.table, dimension=sql.Literal(dimension)))
                return collection
        return self._open(name, model)  # another process was first

    # ----------------------------------------------------------------------- collection

    @property
    def language(self) -> str | None:
        """The code of the language that words are stemmed in; None before the first passages."""
        with self.database.transaction() as cursor:
            cursor.execute("SELECT language FROM rag.collections WHERE id = %s", (self.collection.id,))
            return cursor.fetchone()[0]

    def choose_language(self, code: str) -> None:
        with self.database.transaction() as cursor:
            cursor.execute("SELECT FROM rag.collections WHERE id = %s FOR UPDATE", (self.collection.id,))
            cursor.execute("SELECT FROM rag.documents WHERE collection = %s LIMIT 1", (self.collection.id,))
            if cursor.fetchone() is None:  # else another process was first
                cursor.execute("SELECT cfgname FROM pg_ts_config")
                dictionary = languages.choose_dictionary(code, [name for (name,) in cursor.fetchall()])
                change = "UPDATE rag.collections SET (language, dictionary) = (%s, %s) WHERE id = %s"
                cursor.execute(change, (code, dictionary, self.collection.id))

    @property
    def refusal_threshold(self) -> float | None:
        """The similarity that the best passage must reach for an answer; None when all are answered."""
        with self.database.transaction() as cursor:
            cursor.execute("SELECT refusal_threshold FROM rag.collections WHERE id = %s", (self.collection.id,))
            return cursor.fetchone()[0]

    @refusal_threshold.setter
    def refusal_threshold(self, value: float | None) -> None:
        with self.database.transaction() as cursor:
            change = "UPDATE rag.collections SET refusal_threshold = %s WHERE id = %s"
            cursor.execute(change, (value, self.collection.id))

    def drop(self) -> None:
        """Removes the collection with everything in it, and closes the store."""
        with self.database.transaction() as cursor:
            cursor.execute(sql.SQL("DROP TABLE {}").format(self.collection.table))
            cursor.execute("DELETE FROM rag.collections WHERE id = %s", (self.collection.id,))
        self.database.close()

    def count(self) -> int:
        """The number of passages in the collection."""
        with self.database.transaction() as cursor:
            cursor.execute(sql.SQL("SELECT count(*) FROM {}").format(self.collection.table))
            return cursor.fetchone()[0]

    def documents(self) -> list[Entry]:
        """What is in the collection, by source."""
        listed = sql.SQL(
            "SELECT source, fingerprint, folder, bytes, count(p.id), added FROM rag.documents d "
            "LEFT JOIN {} p ON p.document = d.id WHERE collection = %s GROUP BY d.id ORDER BY source"
        ).format(self.collection.table)
        with self.database.transaction() as cursor:
            cursor.execute(listed, (self.collection.id,))
            return [Entry(*row) for row in cursor.fetchall()]

    def all_passages(self, most: int | None = None) -> list[Document]:
        listed = sql.SQL("SELECT id, text, metadata FROM {} LIMIT %s").format(self.collection.table)
        with self.database.transaction() as cursor:
            cursor.execute(listed, (most,))
            return [Document(text, metadata=metadata, id=key) for key, text, metadata in cursor.fetchall()]

    def feedback(self) -> FeedbackLog:
        return FeedbackLog(self.original or self.database, self.collection.id)

    def finish(self) -> None:
        """Creates the HNSW and the word index once the collection has more than 20,000 passages; they stay."""
        if self.count() <= INDEXED_FROM or self.is_indexed():
            return
        note(f"Over {INDEXED_FROM:,} passages: building the indexes (once)")
        with self.database.transaction() as cursor:
            build_indexes(cursor, self.collection.id)

    def is_indexed(self) -> bool:
        """Whether the HNSW index exists."""
        with self.database.transaction() as cursor:
            cursor.execute("SELECT to_regclass(%s)", (f"rag.passages_{self.collection.id}_dense",))
            return cursor.fetchone()[0] is not None

    # ----------------------------------------------------------------------- write

    def put_parts(self, entry: Entry, parts: Iterable[tuple[Sequence[Document], Sequence]]) -> int:
        """Adds a document or replaces it, in one transaction; each part is written before the next is asked for.

        Returns the number of its passages: 0, with nothing done, when another process has just written the same.
        """
        with self.database.transaction() as cursor:
            cursor.execute("SELECT pg_advisory_xact_lock(%s, hashtext(%s))", (self.collection.id, entry.source))
            key = (self.collection.id, entry.source)
            cursor.execute("SELECT fingerprint FROM rag.documents WHERE (collection, source) = (%s, %s)", key)
            if cursor.fetchone() == (entry.fingerprint,):
                return 0
            cursor.execute("DELETE FROM rag.documents WHERE (collection, source) = (%s, %s)", key)
            document, count = self._add_entry(cursor, entry), 0
            for passages, vectors in parts:
                numbered = enumerate(zip(passages, vectors, strict=True), count + 1)
                self._upsert(cursor, {document: [Passage(f"{document}/{n}", *pair) for n, pair in numbered]})
                count += len(passages)
        return count

    def _add_entry(self, cursor, entry: Entry) -> int:
        """The key of the document's row, which is inserted where it is missing."""
        cursor.execute(
            "INSERT INTO rag.documents (collection, source, fingerprint, folder, bytes) VALUES (%s, %s, %s, %s, %s) "
            "ON CONFLICT (collection, source) DO UPDATE SET added = now() RETURNING id",
            (self.collection.id, entry.source, entry.fingerprint, entry.folder, entry.bytes),
        )
        return cursor.fetchone()[0]

    def _upsert(self, cursor, by_document: dict[int, list[Passage]]) -> None:
        """Writes passages by a binary COPY into a temporary table (ten times as fast as INSERT), then one upsert."""
        cursor.execute(  # the dictionary stays what it is until the commit
            "SELECT dictionary FROM rag.collections WHERE id = %s FOR SHARE", (self.collection.id,)
        )
        (dictionary,) = cursor.fetchone()
        cursor.execute(
            sql.SQL(
                "CREATE TEMPORARY TABLE IF NOT EXISTS {} ON COMMIT DELETE ROWS AS "
                "SELECT {}, '' AS words FROM {} LIMIT 0"
            ).format(sql.Identifier(f"incoming_{self.collection.id}"), sql.SQL(PASSAGE_COLUMNS), self.collection.table)
        )
        incoming = sql.Identifier(f"incoming_{self.collection.id}")
        rows = encode_rows(by_document)
        cursor.execute(sql.SQL("DELETE FROM {}").format(incoming))  # of an earlier part of this transaction
        cursor.copy_expert(sql.SQL("COPY {} FROM STDIN WITH (FORMAT binary)").format(incoming), rows)
        cursor.execute(
            sql.SQL(
                "INSERT INTO {table} ({columns}, words) "
                "SELECT {columns}, to_tsvector(%s::regconfig, words) FROM {incoming} "
                "ON CONFLICT (id) DO UPDATE SET (document, text, metadata, embedding, same, words) = "
                "(excluded.document, excluded.text, excluded.metadata, excluded.embedding, excluded.same, "
                "excluded.words)"
            ).format(table=self.collection.table, columns=sql.SQL(PASSAGE_COLUMNS), incoming=incoming),
            (dictionary,),
        )

    def move_documents(self, sources: Sequence[str], folder: str) -> None:
        with self.database.transaction() as cursor:
            cursor.execute(
                "UPDATE rag.documents SET folder = %s WHERE collection = %s AND source = ANY(%s)",
                (folder, self.collection.id, list(sources)),
            )

    def forget(self, sources: Sequence[str]) -> int:
        """Removes documents with their passages; returns how many there were."""
        with self.database.transaction() as cursor:
            cursor.execute(
                "DELETE FROM rag.documents WHERE collection = %s AND source = ANY(%s)",
                (self.collection.id, list(sources)),
            )
            return cursor.rowcount

    # ----------------------------------------------------------------------- LangChain's way in

    def _put_texts(self, by_source: dict[str, list[Passage]]) -> None:
        if self.language is None:
            self.choose_language(languages.DEFAULT)
        with self.database.transaction() as cursor:
            self._upsert(
                cursor,
                {
                    self._add_entry(cursor, Entry(source, ADDED_AS_TEXT)): passages
                    for source, passages in sorted(by_source.items())  # in the same order everywhere: no deadlock
                },
            )

    @classmethod
    def from_texts(cls, texts, embedding, metadatas=None, *, ids=None, database, embedding_model, collection, **kwargs):
        store = cls(database, embedding, embedding_model, collection)
        store.add_texts(texts, metadatas, ids=ids)
        return store

    def delete(self, ids: list[str] | None = None, **kwargs) -> bool | None:
        """Removes passages by id; unknown ids are ignored. None does nothing: it does not mean all."""
        if ids is None:
            return None
        with self.database.transaction() as cursor:
            cursor.execute(sql.SQL("DELETE FROM {} WHERE id = ANY(%s)").format(self.collection.table), (list(ids),))
        return True

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        chosen = sql.SQL(
            "SELECT id, text, metadata FROM {} WHERE id = ANY(%(ids)s) ORDER BY array_position(%(ids)s, id)"
        ).format(self.collection.table)
        with self.database.transaction() as cursor:
            cursor.execute(chosen, {"ids": list(ids)})
            return [Document(text, metadata=metadata, id=key) for key, text, metadata in cursor.fetchall()]

    # ----------------------------------------------------------------------- search

    def _find_passages(self, question: str, vector, k: int, mode: str, where, fetch_k: int) -> list[Hit]:
        """Looks at more passages where those of one text leave too few texts."""
        nearest = k if mode == "dense" else max(k, fetch_k)
        looked_at = search_sql.LOOKED_AT * nearest
        condition, values = search_sql.as_sql(where)
        values |= {"words": index_words(question), "vector": HalfVector(vector), "collection": self.collection.id}
        values |= {"k": k, "nearest": nearest, "texts": k if mode != "hybrid" else max(k, nearest // 4)}
        values |= {"most": search_sql.WORDS, "passages": f"passages_{self.collection.id}"}
        values |= {"common": search_sql.COMMON, "alone": mode == "lexical"}
        values |= {"lexical_weight": search_sql.LEXICAL_WEIGHT}
        parts = {"table": self.collection.table, "condition": condition}
        with self.database.transaction(search_sql.SECONDS) as cursor:
            settings = sql.SQL(search_sql.INDEX_SETTINGS)
            values |= self._measure(cursor, parts, values, bool(where))
            # HNSW walks through neighbours that the filter rejects. Where few passages match, all are compared.
            if where and values["total"] <= INDEXED_FROM:
                settings += sql.SQL("SET LOCAL enable_indexscan = off;")
            statement = settings + sql.SQL(search_sql.STATEMENTS[mode]).format(**parts)
            while True:
                values |= {"looked_at": looked_at, "candidates": search_sql.count_candidates(looked_at)}
                cursor.execute(statement, values)
                found = cursor.fetchall()
                if not found or not found[0][-1] or looked_at >= search_sql.MOST:
                    return [Hit(*row, near.to_numpy(), tuple(sources)) for *row, near, sources, _ in found]
                looked_at *= search_sql.MORE

    def _measure(self, cursor, parts, values, is_filtered: bool) -> dict[str, float]:
        """How many passages there are to find, and the share of them from which a word is too common.

        Many are estimated: counting a million takes a tenth of a second, and half a second with a filter.
        """
        cursor.execute(search_sql.SIZE, values)
        (total,) = cursor.fetchone()
        if is_filtered and total > INDEXED_FROM:
            share = INDEXED_FROM / total
            cursor.execute(sql.SQL(search_sql.SAMPLE).format(**parts), values | {"percent": 100 * share})
            total = cursor.fetchone()[0] / share
        if total <= 2 * INDEXED_FROM:  # an estimate may be wrong
            cursor.execute(sql.SQL(search_sql.COUNT).format(**parts), values)
            (total,) = cursor.fetchone()
        return {"total": total, "often": 2 * search_sql.COMMON / total if total > INDEXED_FROM else NEVER}


def lacking(collection: str, copy: Database) -> UserError:
    """The UserError for a collection that a copy of the database does not have."""
    what = f"collection {collection} is not in this copy of the database, or not yet"
    return fail(what, describe_url(copy.url), "wait until it has caught up, or name the database itself")


def encode_rows(by_document: dict[int, list[Passage]]) -> BytesIO:
    """The passages as PostgreSQL's binary COPY reads them (documentation of COPY, "Binary Format")."""
    rows = BytesIO()
    rows.write(COPY_HEADER)
    for document, passages in by_document.items():
        owner = struct.pack("!q", document)
        for passage in passages:
            vector = numpy.asarray(passage.vector, dtype=">f2")
            metadata = json.dumps(passage.document.metadata, ensure_ascii=False, default=str).encode()
            fields = (
                passage.id.encode(),
                owner,
                passage.document.page_content.encode(),
                b"\1" + metadata,  # jsonb, version 1
                struct.pack("!hh", len(vector), 0) + vector.tobytes(),  # halfvec: dimension, unused
                text_key(passage.document.page_content),
                index_words(
                    f"{passage.document.metadata.get('heading', '')}\n{passage.document.page_content}"
                ).encode(),
            )
            rows.write(struct.pack("!h", len(fields)))
            for field in fields:
                rows.write(struct.pack("!i", len(field)))
                rows.write(field)
    rows.write(COPY_TRAILER)
    rows.seek(0)
    return rows
