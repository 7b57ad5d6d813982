"""The PostgreSQL server: the connection, the schema `rag`, and what happens after a restart.

rag.collections   name, embedding model, dimension, language and dictionary of its words, refusal threshold
rag.documents     collection, source, fingerprint (sha256 of content and splitting), folder, size, when
rag.feedback      judgements of answers, as JSON, with the digests of adapter and prompt
rag.passages_N    one table per collection: halfvec embedding, text, metadata, key of equal texts, tsvector
"""

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator

import psycopg2
from pgvector.psycopg2 import register_vector
from psycopg2 import sql
from psycopg2.extras import execute_values

from qlora.console import UserError, fail, note, show_value
from qlora.retrieval.word_index import index_words, text_key

OLDEST_PGVECTOR = (0, 8)  # hnsw.iterative_scan came with 0.8.0
PAUSES = (0.2, 0.5, 1, 2, 4, 8)  # seconds before each attempt to reach a server that went away
# Two first runs at once would both pass IF NOT EXISTS and collide; the number is arbitrary.
SCHEMA_LOCK = 7_102_023
INDEX_LOCK = -1  # before a collection's key; the locks of its documents begin with that key, which is above 0

PASSAGES = """
CREATE TABLE {table} (
    id text PRIMARY KEY,
    document bigint NOT NULL REFERENCES rag.documents ON DELETE CASCADE,
    text text NOT NULL,
    metadata jsonb NOT NULL,
    embedding halfvec({dimension}) NOT NULL,
    same uuid NOT NULL,
    words tsvector NOT NULL
);
CREATE INDEX ON {table} (document);
CREATE INDEX ON {table} (same);
"""
# ef_construction: with pgvector's 64 the graph of a million passages has a recall@10 of 0.91, with 200 of 0.998.
INDEXES = """
CREATE INDEX IF NOT EXISTS {dense} ON {table} USING hnsw (embedding halfvec_cosine_ops) WITH (ef_construction = 200);
CREATE INDEX IF NOT EXISTS {words} ON {table} USING gin (words);
ANALYZE {table};
"""
GRAPH_BYTES = 800  # of an HNSW graph per passage beside its embedding: pgvector 0.8 with m = 16, 32 neighbours below
MOST_MEMORY = 4 << 30  # bytes of the server that building an index may take
FIRST_SCHEMA = """
CREATE SCHEMA rag;
CREATE TABLE rag.collections (
    id serial PRIMARY KEY,
    name text UNIQUE NOT NULL,
    embedding_model text NOT NULL,
    dimension int NOT NULL,
    refusal_threshold real,
    made timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE rag.documents (
    id bigserial PRIMARY KEY,
    collection int NOT NULL REFERENCES rag.collections ON DELETE CASCADE,
    source text NOT NULL,
    fingerprint text NOT NULL,
    added timestamptz NOT NULL DEFAULT now(),
    UNIQUE (collection, source)
);
"""
# Names of passages that LangChain's callers choose, headings among the words, folders to prune.
SECOND_SCHEMA = """
CREATE TABLE rag.schema (version int NOT NULL);
INSERT INTO rag.schema VALUES (1);
ALTER TABLE rag.documents ADD COLUMN folder text, ADD COLUMN bytes bigint NOT NULL DEFAULT 0;
DO $$
DECLARE passages text;
BEGIN
    FOR passages IN SELECT format('passages_%s', id) FROM rag.collections LOOP
        EXECUTE format('ALTER TABLE rag.%I DROP COLUMN words', passages);
        EXECUTE format('ALTER TABLE rag.%I ALTER COLUMN id DROP DEFAULT', passages);
        EXECUTE format('ALTER TABLE rag.%I ALTER COLUMN id TYPE text', passages);
        EXECUTE format('DROP SEQUENCE rag.%I', passages || '_id_seq');
        EXECUTE format('ALTER TABLE rag.%I ADD COLUMN words tsvector GENERATED ALWAYS AS (to_tsvector(''english'', '
            'coalesce(metadata->>''heading'', '''') || '' '' || text)) STORED', passages);
    END LOOP;
END $$;
"""
# Languages, and passages of the same text; their words are made by our own function (`renew_words`).
THIRD_SCHEMA = """
ALTER TABLE rag.collections ADD COLUMN language text, ADD COLUMN dictionary text NOT NULL DEFAULT 'english';
UPDATE rag.collections SET language = 'en';
DO $$
DECLARE passages text;
BEGIN
    FOR passages IN SELECT format('passages_%s', id) FROM rag.collections LOOP
        EXECUTE format('ALTER TABLE rag.%I DROP COLUMN words, ADD COLUMN words tsvector, ADD COLUMN same uuid',
            passages);
    END LOOP;
END $$;
"""
FOURTH_SCHEMA = """
CREATE TABLE rag.feedback (
    id bigserial PRIMARY KEY,
    collection int NOT NULL REFERENCES rag.collections ON DELETE CASCADE,
    given timestamptz NOT NULL DEFAULT now(),
    judgement jsonb NOT NULL
);
CREATE INDEX ON rag.feedback (collection);
"""
# Which weights and which prompt an answer came from: an adapter is improved by what people said of its own answers.
FIFTH_SCHEMA = """
ALTER TABLE rag.feedback ADD COLUMN adapter text NOT NULL DEFAULT '', ADD COLUMN prompt text NOT NULL DEFAULT '';
"""
MIGRATIONS = (FIRST_SCHEMA, SECOND_SCHEMA, THIRD_SCHEMA, FOURTH_SCHEMA, FIFTH_SCHEMA)
# How far the log of changes is written here (PostgreSQL's documentation, "System Administration Functions").
POSITION = "SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END"
BEHIND = """
SELECT CASE WHEN pg_last_wal_replay_lsn() < %(reached)s::pg_lsn
    THEN extract(epoch FROM now() - coalesce(pg_last_xact_replay_timestamp(), pg_postmaster_start_time())) END
"""
AT_ONCE = 2_000  # passages whose words are made anew
# Not to_regclass: it answers from a cache that does not see what another process made while this one waited.
VERSION = """
SELECT CASE
    WHEN NOT EXISTS (SELECT FROM pg_tables WHERE schemaname = 'rag' AND tablename = 'collections') THEN 0
    WHEN NOT EXISTS (SELECT FROM pg_tables WHERE schemaname = 'rag' AND tablename = 'schema') THEN 1
END
"""


class Database:
    """One connection, used by one thread at a time. `revive` starts a server of our own that was killed."""

    def __init__(self, url: str, revive: Callable[[], None] | None = None):
        self.url, self.revive = url, revive
        self.lock = threading.RLock()
        self.connection = connect(url)

    @contextlib.contextmanager
    def transaction(self, seconds: int = 0) -> Iterator:
        """A cursor whose work is kept when the block ends and undone when it raises.

        No statement may take longer than `seconds`; 0 is no limit. It reconnects to a server that was restarted.
        Raises UserError when the server goes away, takes too long, is full, or the role lacks a right.
        """
        with self.lock, explaining(describe_url(self.url)):
            self.begin(seconds)
            with self.connection, self.connection.cursor() as cursor:
                yield cursor

    def begin(self, seconds: int) -> None:
        """Runs the transaction's first statement, which also shows whether the server is still there."""
        for pause in (*PAUSES, None):
            try:
                with self.connection.cursor() as cursor:
                    cursor.execute("SET LOCAL statement_timeout = %s", (f"{seconds}s",))
                return
            except (psycopg2.OperationalError, psycopg2.InterfaceError) as error:
                if pause is None:
                    raise fail("the database is not responding", describe_url(self.url), "start it again") from error
            note(f"Lost the connection to the database; trying again in {pause} s")
            time.sleep(pause)
            self.close()
            with contextlib.suppress(UserError):
                if self.revive:
                    self.revive()
                self.connection = connect(self.url)

    def seconds_behind(self, original: "Database") -> float:
        """The age of the newest change in a copy that lacks something of the original; 0 where it has all.

        A moment is no delay: what was written just now may be on its way.
        """
        with original.transaction() as cursor:
            cursor.execute(POSITION)
            (reached,) = cursor.fetchone()
        for _ in range(5):
            with self.transaction() as cursor:
                cursor.execute(BEHIND, {"reached": reached})
                if not (behind := cursor.fetchone()[0]):
                    return 0.0
            time.sleep(0.1)
        return float(behind)

    def is_copy(self) -> bool:
        """Whether it follows another server by streaming replication, and can only be read."""
        with self.transaction() as cursor:
            cursor.execute("SELECT pg_is_in_recovery()")
            return cursor.fetchone()[0]

    def close(self) -> None:
        """Ends the connection; the next transaction would open another."""
        with contextlib.suppress(psycopg2.Error):
            self.connection.close()


@contextlib.contextmanager
def explaining(where: str) -> Iterator[None]:
    """Turns the errors that a server may raise at any moment into a UserError; the transaction is rolled back."""
    try:
        yield
    except psycopg2.errors.QueryCanceled as error:
        fix = "ask a shorter question, or run: python rag_qlora.py doctor"
        raise fail(f"the database took too long ({first_line(error)})", where, fix) from error
    except psycopg2.errors.ReadOnlySqlTransaction as error:
        fix = "name the database itself: a copy of it cannot be changed"
        raise fail(f"this database may only be read ({first_line(error)})", where, fix) from error
    except psycopg2.errors.InsufficientPrivilege as error:
        fix = "connect as the owner of the database, or ask its owner for the right"
        raise fail(f"this role may not do that ({first_line(error)})", where, fix) from error
    except (psycopg2.OperationalError, psycopg2.InterfaceError) as error:
        fix = "check the server and run this again; every document is whole or absent"
        raise fail(f"the database failed ({first_line(error)})", where, fix) from error


def connect(url: str, name: str = "DATABASE_URL"):
    """A psycopg2 connection to a server that has pgvector >= 0.8.

    Raises UserError, which never holds the password, when it cannot be reached or lacks pgvector.
    """
    parts, where = read_url(url, name), describe_url(url)
    try:
        connection = psycopg2.connect(**{"connect_timeout": 10, "application_name": "rag_qlora", **parts})
    except psycopg2.OperationalError as error:
        raise fail(f"database unreachable ({first_line(error)})", where, f"start it, or fix {name}") from error
    try:
        version = find_pgvector(connection)
    except psycopg2.InterfaceError as error:  # PgBouncer in statement mode ends the connection, and tells only its log
        connection.close()
        fix = "start the server again; if it is PgBouncer, set pool_mode = transaction"
        raise fail("the server ended the connection at the first transaction", where, fix) from error
    except psycopg2.Error as error:
        connection.close()
        fix = "install pgvector 0.8 or newer on the server; its owner runs CREATE EXTENSION vector"
        raise fail(f"the database has no pgvector ({first_line(error)})", where, fix) from error
    if tuple(map(int, version.split(".")[:2])) < OLDEST_PGVECTOR:
        connection.close()
        raise fail(f"pgvector {version} is too old", where, "update it to 0.8 or newer: ALTER EXTENSION vector UPDATE")
    register_vector(connection)
    return connection


def find_pgvector(connection) -> str:
    """The version of the extension, which is created where it is missing."""
    installed = "SELECT extversion FROM pg_extension WHERE extname = 'vector'"
    with connection, connection.cursor() as cursor:
        cursor.execute(installed)
        if (found := cursor.fetchone()) is None:
            cursor.execute("SELECT pg_advisory_xact_lock(%s)", (SCHEMA_LOCK,))
            cursor.execute("CREATE EXTENSION IF NOT EXISTS vector")
            cursor.execute(installed)
            found = cursor.fetchone()
    return found[0]


def read_url(url: str, name: str = "DATABASE_URL") -> dict[str, str]:
    """The parts of a connection string, which is the value of `name`.

    SQLAlchemy's, which name a driver (postgresql+psycopg2://), are read as well.

    Raises UserError, which never holds the password, for any other and for a password that is not percent-encoded.
    """
    form = "write postgresql://USER:PASSWORD@HOST:PORT/NAME"
    if url.startswith("jdbc:"):
        raise fail(f"{name} is the address of a Java driver (jdbc:)", name, form)
    try:
        parts = psycopg2.extensions.parse_dsn(re.sub(r"^postgres(ql)?\+\w+://", "postgresql://", url))
    except psycopg2.ProgrammingError as error:
        parts, cause = {}, error
    else:
        cause = None
    misplaced = any("@" in parts.get(name, "") for name in ("host", "port", "dbname"))
    if url.startswith("postgres") and "@" in url and (misplaced or cause):
        fix = "percent-encode @ # % / : ? and spaces in user and password: %40 %23 %25 %2F %3A %3F %20"
        raise fail(f"{name} cannot be read", name, f"{form}; {fix}") from cause
    if cause:
        raise fail(f"{name} cannot be read", name, form) from cause
    return parts


def describe_url(url: str) -> str:
    """Host and database of a connection string: the parts that may be printed."""
    parts = read_url(url)
    return f"{parts.get('dbname', 'postgres')} at {show_value(parts.get('host', 'localhost'))}"


def is_unprotected(url: str) -> bool:
    """Whether the server is on another machine and its certificate is not checked."""
    parts = read_url(url)
    host = parts.get("host", "localhost")
    is_local = host.startswith("/") or host in ("localhost", "127.0.0.1", "::1")
    return not is_local and parts.get("sslmode") != "verify-full"


def first_line(error: psycopg2.Error) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def migrate(cursor) -> None:
    """Brings the schema `rag` to this version; one query when it is up to date.

    Raises UserError when a newer version of this project made it.
    """
    if (version := read_version(cursor)) == len(MIGRATIONS):
        return
    cursor.execute("SELECT pg_advisory_xact_lock(%s)", (SCHEMA_LOCK,))
    version = read_version(cursor)  # another process may have been faster
    if version > len(MIGRATIONS):
        fix = "update this project, or name another database"
        raise fail(f"the database has schema version {version}, this project knows {len(MIGRATIONS)}", "database", fix)
    for statements in MIGRATIONS[version:]:
        cursor.execute(statements)
    cursor.execute("SELECT id FROM rag.collections ORDER BY id")
    for (collection,) in cursor.fetchall() if version < 3 else ():
        renew_words(cursor, collection)
    cursor.execute("UPDATE rag.schema SET version = %s", (len(MIGRATIONS),))


def name_parts(collection: int) -> dict[str, sql.Identifier]:
    """The names of a collection's passage table and of its two indexes, which lie in its schema."""
    indexes = {name: sql.Identifier(f"passages_{collection}_{name}") for name in ("dense", "words")}
    return {"table": sql.Identifier("rag", f"passages_{collection}"), **indexes}


def renew_words(cursor, collection: int) -> None:
    """Makes words and text keys of all passages of an English collection of schema version 2.

    The index of embeddings is made anew, since each of its rows would be written again one by one.
    """
    parts = name_parts(collection)
    cursor.execute("SELECT to_regclass(%s)", (f"rag.passages_{collection}_dense",))
    is_indexed = cursor.fetchone()[0] is not None
    cursor.execute(sql.SQL("DROP INDEX IF EXISTS rag.{dense}").format(**parts))
    cursor.execute(sql.SQL("SELECT id, coalesce(metadata->>'heading', ''), text FROM {table}").format(**parts))
    rows = cursor.fetchall()
    if rows:
        note(f"Making the words of {len(rows):,} passages anew (once)")
    change = sql.SQL(
        "UPDATE {table} SET same = made.same::uuid, words = to_tsvector('english', made.words) "
        "FROM (VALUES %s) AS made (id, same, words) WHERE {table}.id = made.id"
    ).format(**parts)
    made = ((key, text_key(text).hex(), index_words(f"{heading}\n{text}")) for key, heading, text in rows)
    execute_values(cursor, change.as_string(cursor), made, page_size=AT_ONCE)
    cursor.execute(
        sql.SQL(
            "ALTER TABLE {table} ALTER COLUMN same SET NOT NULL, ALTER COLUMN words SET NOT NULL;"
            "CREATE INDEX ON {table} (same)"
        ).format(**parts)
    )
    if is_indexed:
        build_indexes(cursor, collection)


def build_indexes(cursor, collection: int) -> None:
    """Builds the HNSW and the word index, with memory for the whole graph as far as MOST_MEMORY reaches.

    What does not fit is built on the disk, many times slower (pgvector's README, "Index Build Time"). Where the
    server's own maintenance_work_mem is larger, that holds. Of several processes one builds, and the others wait.
    """
    parts = name_parts(collection)
    cursor.execute("SELECT pg_advisory_xact_lock(%s, %s)", (INDEX_LOCK, collection))
    cursor.execute(sql.SQL("SELECT count(*) FROM {table}").format(**parts))
    (passages,) = cursor.fetchone()
    cursor.execute("SELECT dimension FROM rag.collections WHERE id = %s", (collection,))
    (dimension,) = cursor.fetchone()
    needed = min(MOST_MEMORY, passages * (2 * dimension + GRAPH_BYTES)) // 1024
    cursor.execute("SELECT setting::bigint FROM pg_settings WHERE name = 'maintenance_work_mem'")
    cursor.execute("SET LOCAL maintenance_work_mem = %s", (f"{max(needed, *cursor.fetchone())}kB",))
    cursor.execute(sql.SQL(INDEXES).format(**parts))


def read_version(cursor) -> int:
    """How many migrations the database had; 0 without the schema."""
    cursor.execute(VERSION)
    (version,) = cursor.fetchone()
    if version is None:
        cursor.execute("SELECT version FROM rag.schema")
        (version,) = cursor.fetchone()
    return version
