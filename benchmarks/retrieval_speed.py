#!/usr/bin/env python
"""Speed of ingest and search beside LangChain's own PGVector, on the same passages, vectors and server.

    python benchmarks/retrieval_speed.py                        # 100,000 passages; about 5 minutes on two cores
    python benchmarks/retrieval_speed.py --passages 1000000 --rounds 1    # 25 minutes
    python benchmarks/retrieval_speed.py --documents docs/      # embed and ingest these instead of the sample's

Four measurements, ours beside the plain way in alternating rounds where there is one:
embedding (SentenceTransformer.encode with its defaults), ingest end to end (against embedding alone, the limit),
the database path alone with vectors ready, and queries at that size: exact search, HNSW and its recall, with words
(hybrid), and by several askers at once; with the server's memory and its disk.
The passages of the last two are random words with random clustered vectors: 100,000 real ones would take half an
hour to embed.
"""

import contextlib
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.train_speed import spread
from qlora import console, presets, settings
from qlora.model import base_model

PROJECT = Path(__file__).resolve().parent.parent

DIMENSION, WORDS, CLUSTERS, PER_DOCUMENT, QUERIES = 384, 100, 1_000, 1_000, 200
ASKERS = (1, 4, 16)  # at once
CANDIDATES = (100, 200, 400, 800)  # ef_search of the index
COMMUNITY_ROWS = 4_000  # for the plain store: all of them would take hours


def main(argv: list[str]) -> int:
    args, problems = console.parse_arguments(build_parser(), argv)
    problems.raise_if_any()
    settings.quieten_libraries()
    from qlora.retrieval import embedded_postgres

    with tempfile.TemporaryDirectory(prefix="pg") as folder:
        Path(folder).chmod(0o755)  # for root's server
        url = embedded_postgres.start_server(Path(folder, "data"))
        result = measure_embedding(args, url)
        result |= measure_store(args, url)
    print(json.dumps(result, indent=2))
    return 0


def build_parser():
    title, _, text = __doc__.partition("\n\n")
    parser = console.Parser(usage="retrieval_speed.py [flags]", description=title, epilog=text)
    count = console.number(int, 1)
    parser.add_argument("--passages", type=count, default=100_000, help="in the database")
    parser.add_argument("--rounds", type=count, default=3, help="of every comparison")
    documents = PROJECT / "sample_data" / "documents"
    parser.add_argument("--documents", default=str(documents), help="folder to embed and ingest")
    return parser


# ------------------------------------------------------------------------------- embedding and ingest


def measure_embedding(args, url: str) -> dict:
    """Passages a second of plain encode, of our embedder, and of a whole ingest; and how near the vectors are."""
    import numpy

    from qlora.retrieval.database import Database
    from qlora.retrieval.ingest import choose_splitting, put_files
    from qlora.retrieval.pgvector_store import PgVectorStore

    plain, ours = load_plain(), load_ours()
    texts = load_texts([args.documents], ours)
    made, wanted = numpy.array(ours.embed_documents(texts)), plain.encode(texts, normalize_embeddings=True)
    near = numpy.sum(made * wanted, axis=1) / numpy.linalg.norm(made, axis=1)
    times = {"plain": [], "ours": [], "ingest": []}
    for number in range(args.rounds):
        store = PgVectorStore(Database(url), ours, "ours", f"round {number}")
        runs = {
            "plain": lambda: plain.encode(texts),
            "ours": lambda: ours.embed_documents(texts),
            "ingest": lambda store=store: put_files(store, [args.documents], choose_splitting(store, "ours", 200, 40)),
        }
        for name in list(runs)[:: -1 if number % 2 else 1]:
            times[name].append(stopwatch(runs[name]))
        store.drop()
    rates = {name: [len(texts) / seconds for seconds in taken] for name, taken in times.items()}
    return {
        "texts": len(texts),
        "texts_per_second": {name: spread(values) for name, values in rates.items()},
        "embedder_over_plain": spread(ratios(rates["ours"], rates["plain"])),
        "ingest_over_embedder": spread(ratios(rates["ingest"], rates["ours"])),
        "lowest_cosine_to_fp32": float(near.min()),
    }


def load_texts(places: list[str], embeddings) -> list[str]:
    """What is embedded of the passages of files and folders, each text once."""
    from qlora.retrieval import documents
    from qlora.retrieval.passages import Splitting

    tokenizer, splitting = embeddings._client.tokenizer, Splitting("ours", embeddings._client.max_seq_length, 200, 40)
    files = documents.find_files(places)
    passages = [p for f in files for p in documents.load_passages(f.path, f.source, tokenizer, splitting)]
    return list(dict.fromkeys(map(documents.embedded_text, passages)))


def load_plain():
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(base_model.resolve_embedding_model(presets.EMBEDDED_EMBEDDER))


def load_ours():
    from qlora.retrieval.opening import load_embeddings

    return load_embeddings(presets.EMBEDDED_EMBEDDER)


# ------------------------------------------------------------------------------- store


def measure_store(args, url: str) -> dict:
    """Rows a second into the database with vectors ready, then queries with and without the index."""
    from langchain_core.documents import Document

    from qlora.retrieval import doctor
    from qlora.retrieval.database import Database
    from qlora.retrieval.metadata_filter import Condition
    from qlora.retrieval.passage_store import Entry
    from qlora.retrieval.pgvector_store import PgVectorStore

    texts, vectors = make_passages(args.passages)
    ready = Ready()
    store = PgVectorStore(Database(url), ready, "ready", "large")
    taken = {"ours": [], "community": []}
    community = open_community(url, ready)
    console.note(f"{args.passages:,} passages into the database")
    share = args.passages // args.rounds
    for number in range(args.rounds):
        part = range(number * share, (number + 1) * share)
        passages = [Document(texts[n], metadata={"source": f"{n // PER_DOCUMENT}", "row": n}) for n in part]

        def put(passages=passages, part=part):
            for at in range(0, len(passages), PER_DOCUMENT):
                chosen = slice(part.start + at, min(part.start + at + PER_DOCUMENT, part.stop))
                entry = Entry(f"{part.start + at}", "1")
                store.put_document(entry, passages[at : at + PER_DOCUMENT], vectors[chosen])

        taken["ours"].append(len(passages) / stopwatch(put))
        rows = slice(number * COMMUNITY_ROWS, (number + 1) * COMMUNITY_ROWS)
        add = lambda rows=rows: community.add_embeddings(texts[rows], vectors[rows].tolist())  # noqa: E731
        taken["community"].append(len(texts[rows]) / stopwatch(add))
    asked = make_questions(texts, vectors)
    half = [Condition("row", "<", (str(args.passages // 2),))]
    exact = time_queries(store, ready, asked[: QUERIES // 10], "dense")
    store.database.connection.notices.clear()
    with watching_memory() as building:
        built = stopwatch(store.finish)
    overflowed = any("maintenance_work_mem" in notice for notice in store.database.connection.notices)
    with watching_memory() as asking:
        modes = {mode: time_queries(store, ready, asked, mode) for mode in ("dense", "hybrid")}
        modes["hybrid among half of them"] = time_queries(store, ready, asked, "hybrid", half)
        askers = {count: ask_at_once(url, asked, count) for count in ASKERS}
    return {
        "passages": store.count(),
        "rows_per_second": {name: spread(values) for name, values in taken.items()},
        "database_path_over_community": spread(ratios(taken["ours"], taken["community"])),
        "index_seconds": round(built, 1),
        "graph_built_in_memory": not overflowed,
        "query_ms": {"exact": exact, **modes},
        "hybrid_searches_by_askers": askers,
        "recall@10": doctor.measure_recall(store, 10) if store.is_indexed() else 1.0,
        "recall@10_by_candidates": {count: doctor.measure_recall(store, 10, count) for count in CANDIDATES},
        "bytes": measure_size(store),
        "server_memory_gb": {"building": round(max(building), 2), "searching": round(max(asking), 2)},
    }


class Ready:
    """Embeddings whose vectors are made beforehand: what is measured is the database."""

    next_vector: list[float] = [0.0] * DIMENSION

    def embed_query(self, text: str) -> list[float]:
        return self.next_vector

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.next_vector for _ in texts]


def make_passages(count: int):
    """Texts of 100 words with the frequencies of a language, and unit vectors around 1,000 centres."""
    import numpy

    chance = numpy.random.default_rng(0)
    words = numpy.array([f"w{n:x}" for n in range(20_000)])
    numbers = chance.zipf(1.3, size=(count, WORDS)) % len(words)
    texts = [" ".join(words[row]) for row in numbers]
    centres = chance.normal(size=(CLUSTERS, DIMENSION)).astype("float32")
    noise = chance.normal(size=(count, DIMENSION)).astype("float32")
    vectors = centres[chance.integers(CLUSTERS, size=count)] + 0.6 * noise
    return texts, vectors / numpy.linalg.norm(vectors, axis=1, keepdims=True)


def open_community(url: str, embeddings):
    """LangChain's own PGVector (langchain_community), with its defaults."""
    import warnings

    warnings.filterwarnings("ignore")
    from langchain_community.vectorstores.pgvector import PGVector

    url = url.replace("postgresql://", "postgresql+psycopg2://", 1)
    return PGVector(connection_string=url, embedding_function=embeddings, collection_name="community", use_jsonb=True)


def make_questions(texts: list[str], vectors) -> list[tuple[str, list[float]]]:
    """Five words of a passage, some of them common, and its vector: for passages of the whole collection."""
    import numpy

    chance = numpy.random.default_rng(1)
    chosen = range(0, len(texts), max(1, len(texts) // QUERIES))
    return [(" ".join(chance.choice(texts[n].split(), 5)), vectors[n].tolist()) for n in chosen]


def time_queries(store, ready: Ready, asked, mode: str, where: Sequence = ()) -> dict[str, float]:
    """Milliseconds of a search for ten passages: median and 95th percentile."""
    return summarise([time_query(store, ready, *question, mode, where) for question in asked])


def time_query(store, ready: Ready, words: str, vector: list[float], mode: str, where: Sequence = ()) -> float:
    ready.next_vector = vector
    return 1000 * stopwatch(lambda: store.find(words, 10, mode=mode, where=where))


def summarise(taken: list[float]) -> dict[str, float]:
    return {"p50": round(statistics.median(taken), 2), "p95": round(statistics.quantiles(taken, n=20)[-1], 2)}


def ask_at_once(url: str, asked, count: int) -> dict[str, float]:
    """Hybrid searches per second of `count` askers, each with its own connection, and the milliseconds of one."""
    from concurrent.futures import ThreadPoolExecutor

    from qlora.retrieval.database import Database
    from qlora.retrieval.pgvector_store import PgVectorStore

    def ask(number: int) -> list[float]:
        ready = Ready()
        store = PgVectorStore(Database(url), ready, "ready", "large")
        taken = [time_query(store, ready, *question, "hybrid") for question in asked[number::count]]
        store.database.close()
        return taken

    with ThreadPoolExecutor(count) as pool:
        started = time.perf_counter()
        taken = [one for some in pool.map(ask, range(count)) for one in some]
    return {"per_second": round(len(taken) / (time.perf_counter() - started), 1), **summarise(taken)}


@contextlib.contextmanager
def watching_memory() -> Iterator[list[float]]:
    """GB of all PostgreSQL's processes, measured twice per second during the block; what they share counts once."""
    import psutil

    def measure() -> float:
        total = 0
        for process in psutil.process_iter(["name"]):
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss if "postgres" in process.info["name"] else 0
        return total / 1e9

    def watch() -> None:
        while not ended.wait(0.5):
            seen.append(measure())

    seen, ended = [measure()], threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        ended.set()
        watcher.join()


def measure_size(store) -> dict[str, int]:
    with store.database.transaction() as cursor:
        table = f"rag.passages_{store.collection.id}"
        cursor.execute("SELECT pg_table_size(%s::regclass), pg_indexes_size(%s::regclass)", (table, table))
        return dict(zip(("table", "indexes"), cursor.fetchone(), strict=True))


# ------------------------------------------------------------------------------- numbers


def stopwatch(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def ratios(ours: list[float], others: list[float]) -> list[float]:
    return [mine / its for mine, its in zip(ours, others, strict=True)]


if __name__ == "__main__":
    sys.exit(console.run(main))
