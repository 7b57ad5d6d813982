"""Checks of machine, database and collection, and the recall of the index."""

import importlib.metadata
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from psycopg2 import sql

from qlora import machine, settings
from qlora.console import printable, show_value
from qlora.model import base_model
from qlora.retrieval import languages, search_sql
from qlora.retrieval.database import describe_url, find_pgvector, is_unprotected
from qlora.retrieval.pgvector_store import INDEXED_FROM, PgVectorStore

GOOD_PGVECTOR = (0, 8, 3)
ENOUGH_RECALL = 0.95
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "trl", "sentence-transformers", "langchain-core")
LITTLE_MEMORY = 3e9  # bytes that training the embedded model takes
SAMPLE = 100  # passages whose neighbours are searched
MARKS = {"good": "[green]ok[/]", "warning": "[yellow]warning[/]", "bad": "[red]bad[/]"}


@dataclass(frozen=True)
class Finding:
    what: str
    state: str  # one of MARKS
    detail: str


def examine(store: PgVectorStore, embedding_model: str) -> list[Finding]:
    """The findings about server, index and embeddings."""
    findings = [*examine_server(store), *examine_collection(store, embedding_model)]
    if store.is_indexed():
        findings += examine_index(store)
    else:
        state = "good" if store.count() <= INDEXED_FROM else "bad"
        fix = "exact search" if state == "good" else "missing: run ingest again"
        findings.append(Finding("index", state, f"none, made above {INDEXED_FROM:,} passages: {fix}"))
    return findings


def examine_machine() -> list[Finding]:
    """Processor, GPU, memory, disk and versions of this machine."""
    cores, features = len(machine.list_cores()), ", ".join(machine.cpu_features()) or "no AVX2"
    memory, folder = machine.available_memory(), settings.data_folder()
    free, models = shutil.disk_usage(folder).free, folder_size(folder / "models")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    gpus = machine.list_gpus()
    return [
        Finding("processor", "good", f"{machine.processor()}, {cores} cores, {features}"),
        Finding("GPU", "good", "; ".join(gpus) or "none"),
        Finding("computes on", "good" if machine.is_fast() else "warning", machine.describe()),
        Finding("memory", "good" if memory > LITTLE_MEMORY else "warning", f"{memory / 1e9:.1f} GB available"),
        Finding(
            "disk",
            "good" if free > base_model.EMBEDDED_BYTES else "warning",
            f"{free / 1e9:.1f} GB free; models take {models / 1e9:.1f} GB of {show_value(folder)}",
        ),
        Finding("versions", "good", f"Python {platform.python_version()}, {versions}"),
    ]


def folder_size(folder: Path) -> int:
    """Bytes of all files in it; 0 where it is missing."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def examine_server(store: PgVectorStore) -> list[Finding]:
    """Versions of PostgreSQL and pgvector, and whether the connection is protected."""
    url = store.database.url
    with store.database.transaction() as cursor:
        cursor.execute("SELECT current_setting('server_version')")
        (version,) = cursor.fetchone()
    pgvector = find_pgvector(store.database.connection)
    is_new = tuple(map(int, pgvector.split("."))) >= GOOD_PGVECTOR
    advice = "" if is_new else f": update to {'.'.join(map(str, GOOD_PGVECTOR))} or newer"
    findings = [
        Finding("server", "good", f"PostgreSQL {version}, {describe_url(url)}"),
        Finding("pgvector", "good" if is_new else "warning", pgvector + advice),
    ]
    if is_unprotected(url):
        findings.append(Finding("encryption", "warning", "the certificate is not checked: add sslmode=verify-full"))
    return findings


def examine_collection(store: PgVectorStore, embedding_model: str) -> list[Finding]:
    """The collection's size, and whether its vectors are those of the embedding model."""
    dimension = len(store.embeddings.embed_query("dimension"))
    fits = dimension == store.collection.dimension
    detail = f"{embedding_model}, {dimension} dimensions" + ("" if fits else f", not {store.collection.dimension}")
    documents = len(store.documents())
    size = f"{documents:,} documents, {store.count():,} passages"
    language = f", {languages.NAMES[store.language]}" if store.language else ""
    return [
        Finding("collection", "good", f"{store.collection.name}: {size}{language}"),
        Finding("embeddings", "good" if fits else "bad", detail),
    ]


def examine_index(store: PgVectorStore) -> list[Finding]:
    """Validity and size of the HNSW index, and its recall against exact search on a sample of the passages."""
    name = f"rag.passages_{store.collection.id}_dense"
    with store.database.transaction() as cursor:
        cursor.execute(
            "SELECT indisvalid, pg_size_pretty(pg_relation_size(indexrelid)) FROM pg_index "
            "WHERE indexrelid = to_regclass(%s)",
            (name,),
        )
        valid, size = cursor.fetchone()
    recall = measure_recall(store, 10)
    found = Finding("index", "good" if valid else "bad", f"HNSW, {size}" + ("" if valid else ", invalid: REINDEX it"))
    detail = f"{recall:.3f} of exact search, for {SAMPLE} passages"
    if recall >= ENOUGH_RECALL:
        return [found, Finding("recall@10", "good", detail)]
    return [found, Finding("recall@10", "bad", f"{detail}: DROP INDEX {name}; then ingest, which builds it anew")]


def measure_recall(store: PgVectorStore, k: int, candidates: int | None = None) -> float:
    """The share of the `k` nearest passages that the index finds, over a sample of the collection's own passages.

    It keeps `candidates` entries in mind, or as many as a search does.
    """
    candidates = candidates or search_sql.count_candidates(k)
    parts = {"table": store.collection.table, "condition": sql.SQL("true")}
    statement = sql.SQL(search_sql.NEAREST).format(**parts)
    sample = sql.SQL("SELECT embedding FROM {} ORDER BY md5(id) LIMIT %s").format(store.collection.table)
    hits = 0
    with store.database.transaction() as cursor:
        cursor.execute(sample, (SAMPLE,))
        vectors = [row[0] for row in cursor.fetchall()]
        cursor.execute(search_sql.INDEX_SETTINGS, {"candidates": candidates})
        for vector in vectors:
            nearest = []
            for scan in ("on", "off"):
                cursor.execute(f"SET LOCAL enable_indexscan = {scan}")
                cursor.execute(statement, {"vector": vector, "looked_at": k})
                nearest.append({row[0] for row in cursor.fetchall()})
            hits += len(set.intersection(*nearest))
    return hits / (k * len(vectors))


def print_findings(findings: list[Finding]) -> None:
    """Prints one line per finding on stdout."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for finding in findings:
        table.add_row(MARKS[finding.state], finding.what, escape(printable(finding.detail)))
    Console(soft_wrap=True, highlight=False).print(table)


def as_json(findings: list[Finding]) -> list[dict]:
    return [asdict(finding) for finding in findings]
