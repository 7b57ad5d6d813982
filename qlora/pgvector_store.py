"""The LangChain VectorStore over PostgreSQL + pgvector, on psycopg2.

    rag.collections   name, embedding model, dimension, refusal threshold
    rag.documents     collection, source, fingerprint (sha256 of content and splitting), when
    rag.passages_N    one table a collection: halfvec embedding, text, metadata, tsvector

A document is written in one transaction, whole or not at all. Values are bound, never formatted in;
the only identifier that varies is rag.passages_N, where N is the collection's integer key.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import psycopg2
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore
from pgvector import HalfVector
from pgvector.psycopg2 import register_vector
from psycopg2 import sql
from psycopg2.extras import Json, execute_values

from qlora.console import fail
from qlora.documents import embedded_text

OLDEST_PGVECTOR = (0, 7)  # halfvec came with 0.7
SCHEMA = """
CREATE SCHEMA IF NOT EXISTS rag;
CREATE TABLE IF NOT EXISTS rag.collections (
    id serial PRIMARY KEY,
    name text UNIQUE NOT NULL,
    embedding_model text NOT NULL,
    dimension int NOT NULL,
    refusal_threshold real,
    made timestamptz NOT NULL DEFAULT now()
);
ALTER TABLE rag.collections ADD COLUMN IF NOT EXISTS refusal_threshold real;
CREATE TABLE IF NOT EXISTS rag.documents (
    id bigserial PRIMARY KEY,
    collection int NOT NULL REFERENCES rag.collections ON DELETE CASCADE,
    source text NOT NULL,
    fingerprint text NOT NULL,
    added timestamptz NOT NULL DEFAULT now(),
    UNIQUE (collection, source)
);
"""
# Whether SCHEMA ran on this database: run each time, its ALTER TABLE would wait for every reader.
NEWEST_COLUMN = """
SELECT 1 FROM pg_attribute WHERE attrelid = to_regclass('rag.collections') AND attname = 'refusal_threshold'
"""
PASSAGES = """
CREATE TABLE IF NOT EXISTS {table} (
    id bigserial PRIMARY KEY,
    document bigint NOT NULL REFERENCES rag.documents ON DELETE CASCADE,
    text text NOT NULL,
    metadata jsonb NOT NULL,
    embedding halfvec({dimension}) NOT NULL,
    words tsvector GENERATED ALWAYS AS (to_tsvector('english', text)) STORED
);
CREATE INDEX IF NOT EXISTS {index} ON {table} (document);
"""
# Two first runs at once would both pass IF NOT EXISTS and collide; the number is arbitrary.
SCHEMA_LOCK = 7_102_023


@dataclass(frozen=True)
class Collection:
    id: int
    name: str
    table: sql.Identifier


def connect(url: str):
    """A psycopg2 connection to a server that has pgvector >= 0.7.

    Raises UserError, which never holds the password, when it cannot be reached or lacks pgvector.
    """
    where = describe_url(url)
    try:
        connection = psycopg2.connect(url, connect_timeout=10, application_name="rag_qlora")
    except psycopg2.OperationalError as error:
        cause = str(error).strip().splitlines()[0]
        raise fail(f"database unreachable ({cause})", where, "start it, or mend DATABASE_URL") from error
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_xact_lock(%s)", (SCHEMA_LOCK,))
            cursor.execute("CREATE EXTENSION IF NOT EXISTS vector")
            cursor.execute("SELECT extversion FROM pg_extension WHERE extname = 'vector'")
            version = cursor.fetchone()[0]
    except psycopg2.Error as error:
        connection.close()
        cause = str(error).strip().splitlines()[0]
        fix = "install pgvector 0.7 or newer on the server; its owner runs CREATE EXTENSION vector"
        raise fail(f"the database has no pgvector ({cause})", where, fix) from error
    if tuple(map(int, version.split(".")[:2])) < OLDEST_PGVECTOR:
        connection.close()
        raise fail(f"pgvector {version} is too old", where, "update it to 0.7 or newer: ALTER EXTENSION vector UPDATE")
    register_vector(connection)
    return connection


def describe_url(url: str) -> str:
    """Host and database of a connection string: what may be printed."""
    try:
        parts = psycopg2.extensions.parse_dsn(url)
    except psycopg2.ProgrammingError as error:
        raise fail("DATABASE_URL cannot be read", "DATABASE_URL", "write postgresql://USER@HOST:PORT/NAME") from error
    return f"{parts.get('dbname', 'postgres')} at {parts.get('host', 'localhost')}"


class PgVectorStore(VectorStore):
    """One collection of passages, searched exactly by cosine similarity."""

    def __init__(self, connection, embeddings: Embeddings, embedding_model: str, collection: str):
        """Opens the collection, made when it is not there.

        Raises UserError when it was made with another embedding model.
        """
        self.connection = connection
        self._embeddings = embeddings
        self.collection = self._open(collection, embedding_model)

    @property
    def embeddings(self) -> Embeddings:
        return self._embeddings

    def _open(self, name: str, model: str) -> Collection:
        try:
            return self._find_or_make(name, model)
        except psycopg2.Error as error:
            cause = str(error).strip().splitlines()[0]
            fix = "let the owner of the database run this once, or grant CREATE on it"
            raise fail(f"collection {name} cannot be opened ({cause})", "database", fix) from error

    def _find_or_make(self, name: str, model: str) -> Collection:
        with self.connection, self.connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_xact_lock(%s)", (SCHEMA_LOCK,))
            cursor.execute(NEWEST_COLUMN)
            if cursor.fetchone() is None:
                cursor.execute(SCHEMA)
            cursor.execute("SELECT id, embedding_model, dimension FROM rag.collections WHERE name = %s", (name,))
            found = cursor.fetchone()
            if found and found[1] != model:
                raise fail(
                    f"collection {name} was made with embedding model {found[1]} ({found[2]} dimensions), not {model}",
                    "--collection",
                    "use that --embedding-model, or give another --collection",
                )
            if found:
                return Collection(found[0], name, sql.Identifier("rag", f"passages_{found[0]}"))
            dimension = len(self._embeddings.embed_query("dimension"))
            cursor.execute(
                "INSERT INTO rag.collections (name, embedding_model, dimension) VALUES (%s, %s, %s) RETURNING id",
                (name, model, dimension),
            )
            key = cursor.fetchone()[0]
            table = sql.Identifier("rag", f"passages_{key}")
            index = sql.Identifier(f"passages_{key}_document")
            statement = sql.SQL(PASSAGES).format(table=table, index=index, dimension=sql.Literal(dimension))
            cursor.execute(statement)
            return Collection(key, name, table)

    # ----------------------------------------------------------------------- collection

    @property
    def refusal_threshold(self) -> float | None:
        """The similarity that the best passage must reach for an answer; None when all are answered."""
        with self.connection, self.connection.cursor() as cursor:
            cursor.execute("SELECT refusal_threshold FROM rag.collections WHERE id = %s", (self.collection.id,))
            return cursor.fetchone()[0]

    @refusal_threshold.setter
    def refusal_threshold(self, value: float | None) -> None:
        with self.connection, self.connection.cursor() as cursor:
            change = "UPDATE rag.collections SET refusal_threshold = %s WHERE id = %s"
            cursor.execute(change, (value, self.collection.id))

    def drop(self) -> None:
        """Removes the collection with everything in it."""
        with self.connection, self.connection.cursor() as cursor:
            cursor.execute(sql.SQL("DROP TABLE {}").format(self.collection.table))
            cursor.execute("DELETE FROM rag.collections WHERE id = %s", (self.collection.id,))

    # ----------------------------------------------------------------------- write

    def fingerprints(self) -> dict[str, str]:
        """The fingerprint of every document, by source."""
        with self.connection, self.connection.cursor() as cursor:
            cursor.execute("SELECT source, fingerprint FROM rag.documents WHERE collection = %s", (self.collection.id,))
            return dict(cursor.fetchall())

    def put_document(self, source: str, fingerprint: str, passages: Sequence[Document]) -> None:
        """Adds a document or replaces it, with all its passages, in one transaction."""
        vectors = self._embeddings.embed_documents([embedded_text(passage) for passage in passages])
        with self.connection, self.connection.cursor() as cursor:
            cursor.execute(
                "DELETE FROM rag.documents WHERE collection = %s AND source = %s", (self.collection.id, source)
            )
            cursor.execute(
                "INSERT INTO rag.documents (collection, source, fingerprint) VALUES (%s, %s, %s) RETURNING id",
                (self.collection.id, source, fingerprint),
            )
            key = cursor.fetchone()[0]
            rows = [
                (key, passage.page_content, Json(passage.metadata), HalfVector(vector))
                for passage, vector in zip(passages, vectors, strict=True)
            ]
            insert = sql.SQL("INSERT INTO {} (document, text, metadata, embedding) VALUES %s").format(
                self.collection.table
            )
            execute_values(cursor, insert, rows)

    def add_texts(self, texts, metadatas=None, **kwargs) -> list[str]:
        """LangChain's way in: every distinct `source` in the metadata replaces that document."""
        by_source: dict[str, list[Document]] = {}
        for text, metadata in zip(texts, metadatas or [{} for _ in texts], strict=True):
            source = metadata.get("source", text[:60])
            by_source.setdefault(source, []).append(Document(text, metadata={**metadata, "source": source}))
        for source, passages in by_source.items():
            self.put_document(source, "added as text", passages)
        return list(by_source)

    @classmethod
    def from_texts(cls, texts, embedding, metadatas=None, *, connection, embedding_model, collection, **kwargs):
        store = cls(connection, embedding, embedding_model, collection)
        store.add_texts(texts, metadatas)
        return store

    # ----------------------------------------------------------------------- search

    def count(self) -> int:
        """How many passages the collection has."""
        with self.connection, self.connection.cursor() as cursor:
            cursor.execute(sql.SQL("SELECT count(*) FROM {}").format(self.collection.table))
            return cursor.fetchone()[0]

    def similarity_search(self, query: str, k: int = 3, **kwargs) -> list[Document]:
        """The `k` nearest passages, best first; `metadata["score"]` is the cosine similarity (-1 to 1)."""
        nearest = sql.SQL(
            "SELECT text, metadata, 1 - (embedding <=> %s) AS score FROM {} ORDER BY embedding <=> %s, id LIMIT %s"
        ).format(self.collection.table)
        vector = HalfVector(self._embeddings.embed_query(query.replace("\0", "")))
        with self.connection, self.connection.cursor() as cursor:
            cursor.execute(nearest, (vector, vector, k))
            return [
                Document(text, metadata={**metadata, "score": round(score, 4)})
                for text, metadata, score in cursor.fetchall()
            ]

    def similarity_search_with_score(self, query: str, k: int = 3, **kwargs) -> list[tuple[Document, float]]:
        return [(document, document.metadata["score"]) for document in self.similarity_search(query, k)]

    def _select_relevance_score_fn(self):
        return lambda score: (score + 1) / 2
