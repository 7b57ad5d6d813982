"""Several processes that ingest into one PostgreSQL server at the same time, each its own share of the documents.

    python -m benchmarks.ingest_processes --documents squad_documents     # 8 minutes on two cores
    python -m benchmarks.ingest_processes --processes 1 2 4 --copies 8

On one machine they share its cores, so what is shown is that they do not wait for each other. The numbers of processes
take turns, `--rounds` times. Passages per second count from the first document that is in to the last one: a process
takes some seconds to start.
"""

import itertools
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from psycopg2 import sql

from benchmarks.fill_and_search import PROJECT, run_measured
from benchmarks.train_speed import spread
from qlora import console, machine
from qlora.markdown import as_markdown_table
from qlora.retrieval.database import Database, name_parts


def main(argv: list[str]) -> int:
    args, problems = console.parse_arguments(build_parser(), argv)
    problems.raise_if_any()
    from qlora.retrieval import embedded_postgres

    with tempfile.TemporaryDirectory(prefix="pg") as folder:
        Path(folder).chmod(0o755)  # for root's server
        url = embedded_postgres.start_server(Path(folder, "data"))
        measured = {count: [] for count in args.processes}
        for number, count in itertools.product(range(args.rounds), args.processes):
            parts = make_parts(args, Path(folder, f"{number} {count}"), count)
            measured[count].append(ingest_at_once(url, f"{number} {count}", parts))
            console.note(f"{count} processes: {measured[count][-1]}")
    table = [["processes", "documents", "passages", "passages per second", "cores busy", "in all"]]
    for count, runs in measured.items():
        documents, passages, rates, busy, seconds = zip(*runs, strict=True)
        rate = spread(rates)
        shown = f"{rate['median']:.0f} ({rate['min']:.0f} .. {rate['max']:.0f})"
        cells = f"{min(documents)}", f"{min(passages):,}", shown, f"{max(busy):.1f}", f"{min(seconds):.0f} s"
        table.append([str(count), *cells])
    print(as_markdown_table(table))
    return 0


def build_parser():
    title, _, text = __doc__.partition("\n\n")
    parser = console.Parser(usage="ingest_processes.py [flags]", description=title, epilog=text)
    count = console.number(int, 1)
    folders = [str(PROJECT / "sample_data" / "documents")]
    parser.add_argument("--documents", nargs="+", metavar="FOLDER", default=folders, help="folders of text files")
    parser.add_argument("--processes", nargs="+", type=count, default=[1, 2, 4], help="at the same time")
    parser.add_argument("--copies", type=count, default=4, help="of each document, with other words")
    parser.add_argument("--rounds", type=count, default=2, help="of each number of processes")
    return parser


def make_parts(args, folder: Path, count: int) -> list[Path]:
    """`count` folders of about the same size, with the documents and their copies, whose paragraphs differ."""
    files = sorted(
        (file for place in args.documents for file in Path(place).rglob("*.md")), key=lambda f: f.stat().st_size
    )
    parts = [folder / str(number) for number in range(count)]
    for part in parts:
        part.mkdir(parents=True)
    for number, (copy, file) in enumerate(itertools.product(range(args.copies), files)):
        text = file.read_text(encoding="utf-8").replace("\n\n", f" ({copy})\n\n")
        (parts[number % count] / f"{copy} {file.name}").write_text(text, encoding="utf-8")
    return parts


def ingest_at_once(url: str, collection: str, parts: list[Path]) -> tuple[int, int, float, float, float]:
    """Documents, passages, passages per second, cores that were busy, and seconds in all, with one process per part."""
    threads = str(max(1, len(machine.list_cores()) // len(parts)))
    variables = {"DATABASE_URL": url, "OMP_NUM_THREADS": threads}

    def run(part: Path):
        return run_measured(["rag_qlora.py", "ingest", str(part), "--collection", collection], **variables)

    with ThreadPoolExecutor(len(parts)) as pool:
        runs = list(pool.map(run, parts))
    if failed := [one.report for one in runs if one.code]:
        raise RuntimeError(failed[0])
    with Database(url).transaction() as cursor:
        cursor.execute(
            "SELECT d.id, added FROM rag.documents d JOIN rag.collections c ON c.id = collection WHERE name = %s "
            "ORDER BY added",
            (collection,),
        )
        documents, times = zip(*cursor.fetchall(), strict=True)
        cursor.execute("SELECT id FROM rag.collections WHERE name = %s", (collection,))
        (key,) = cursor.fetchone()
        count = sql.SQL("SELECT count(*) FILTER (WHERE document <> %s), count(*) FROM {table}")
        cursor.execute(count.format(**name_parts(key)), (documents[-1],))
        done, passages = cursor.fetchone()
    shutil.rmtree(parts[0].parent)
    seconds = max(one.seconds for one in runs)
    busy = sum(one.cpu_seconds for one in runs) / seconds
    return len(documents), passages, done / (times[-1] - times[0]).total_seconds(), busy, seconds


if __name__ == "__main__":
    sys.exit(console.run(main))
