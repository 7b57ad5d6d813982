"""Speed and memory of `ingest`: a mixed folder of 2,000 files, a long PDF and a large CSV file.

    python -m benchmarks.ingest_speed                            # 2,000 files: an hour on two cores without AVX512
    python -m benchmarks.ingest_speed --files 400 --other ../before --rounds 3    # beside another checkout
    python -m benchmarks.ingest_speed --large                    # memory, no speed: at most twenty minutes
    python -m benchmarks.ingest_speed --write docs/measurements.md

The files are made of the sample's sentences, shuffled; the same at every call. Each checkout has a database of its own.
With `--other` both are timed in every round, in alternating order. The ratio is taken within rounds, of CPU seconds:
beside other work they are hardly longer. The start of the script is timed with eight files, and taken away.
`without embedding` gives every passage an arbitrary vector: what is left is reading, splitting and the database.
"""

import argparse
import csv
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.document_files import LEFT, WRITERS, Section, make_pages
from benchmarks.fill_and_search import PROJECT, Ingest, run_measured
from benchmarks.hostile import pdf
from qlora import console
from qlora.markdown import as_markdown_table, put_section
from qlora.presets import SAMPLE_DATA

SHARES = {"txt": 0.25, "md": 0.2, "html": 0.2, "pdf": 0.15, "docx": 0.12, "csv": 0.04, "json": 0.04}
PDF_PAGES, CSV_MEGABYTES = (50, 500), (20, 200)  # memory is flat when the large one takes hardly more
MOST_SECONDS = 300  # of a large file: what grows has grown until then
WITHOUT_EMBEDDING = """
import sys, numpy, rag_qlora
from langchain_huggingface import HuggingFaceEmbeddings
from qlora import console
def embed_documents(self, texts):
    size = len(self.embed_query("dimension"))
    return [numpy.random.default_rng(len(text)).normal(size=size).tolist() for text in texts]
HuggingFaceEmbeddings.embed_documents = embed_documents
sys.exit(console.run(rag_qlora.main))
"""
WAYS = {"whole": ["rag_qlora.py"], "without embedding": ["-c", WITHOUT_EMBEDDING]}


@dataclass(frozen=True)
class Checkout:
    """A working folder of the project, and where its database lies."""

    name: str
    folder: Path
    data: Path

    def ingest(self, way: str, path: Path, collection: str, most_seconds: float = 86_400) -> Ingest:
        words = [*WAYS[way], "ingest", str(path), "--collection", collection]
        return run_measured(words, self.folder, most_seconds, QLORA_DATA_DIR=str(self.data), DATABASE_URL="")

    def count_passages(self, collection: str) -> int:
        """By the `documents` command, which every version has."""
        command = [sys.executable, "rag_qlora.py", "documents", "--json", "--collection", collection]
        values = {**os.environ, "QLORA_DATA_DIR": str(self.data), "DATABASE_URL": ""}
        listed = subprocess.run(command, cwd=self.folder, env=values, capture_output=True, text=True, check=True).stdout
        return sum(entry["passages"] for entry in json.loads(listed))


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="speed") as folder:
        place = Path(folder)
        place.chmod(0o755)  # for root's server
        checkouts = [Checkout("this", PROJECT, place / "this")]
        if args.other:
            checkouts.append(Checkout("other", args.other.resolve(), place / "other"))
        for checkout in checkouts:
            checkout.data.mkdir()
        if args.large:
            result = {"large": measure_large(checkouts, place / "large", args.seconds)}
        else:
            result = {"files": args.files, "speed": measure_speed(checkouts, place, args.files, args.rounds)}
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    text = describe_large(result["large"]) if args.large else describe_speed(result)
    print(text)
    if args.write:
        name = "large files" if args.large else "ingest speed"
        put_section(args.write, name, text, name.capitalize())
    return 0


def build_parser() -> argparse.ArgumentParser:
    title, _, text = __doc__.partition("\n\n")
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="ingest_speed.py", description=title, epilog=text, formatter_class=kind)
    parser.add_argument("--files", type=int, default=2000, metavar="N", help="in the mixed folder (2000)")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="of every measurement (1)")
    parser.add_argument("--other", type=Path, metavar="FOLDER", help="another checkout, timed in alternation")
    parser.add_argument("--large", action="store_true", help="only the memory of large files")
    parser.add_argument("--seconds", type=float, default=MOST_SECONDS, metavar="X", help=f"per file ({MOST_SECONDS})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into this page")
    return parser


# ------------------------------------------------------------------------------- files


def write_folder(folder: Path, count: int) -> None:
    """The mixed folder: `count` files, in SHARES of their types, of one to eight paragraphs and up to 20 rows."""
    chance, sentences = random.Random(0), read_sentences()
    types = [name for name, share in SHARES.items() for _ in range(round(share * count))]
    for number, name in enumerate(types):
        paragraphs = [" ".join(chance.sample(sentences, chance.randint(2, 6))) for _ in range(chance.randint(1, 8))]
        rows = [
            [f"R{number}-{n}", f"{chance.randint(1, 900)} kg", f"{chance.randint(1, 99)} crowns"] for n in range(20)
        ]
        table = [["Item", "Weight", "Price"], *rows[: chance.choice((2, 5, 20))]]
        path = folder / f"{number % 20:02}" / f"{number:05}.{name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        WRITERS[name](path, Section(f"Report {number}", paragraphs, table))


def read_sentences() -> list[str]:
    """The sentences of the sample documents, about 800."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((SAMPLE_DATA / "documents").rglob("*.md"))]
    lines = [line for text in texts for line in text.splitlines() if line and not line.startswith(("#", "-", "1"))]
    return [sentence for line in lines for sentence in re.split(r"(?<=[.!?])\s+", line) if len(sentence) > 30]


def write_long_pdf(path: Path, pages: int) -> None:
    """Pages of 48 lines."""
    chance, sentences = random.Random(0), read_sentences()
    lines = [[(LEFT, chance.choice(sentences)[:90])] for _ in range(48 * pages)]
    path.write_bytes(pdf(*make_pages(lines)))


def write_large_csv(path: Path, megabytes: int) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["number", "note", "price"])
        for row in large_rows():
            writer.writerow(row)
            if row[0] % 1000 == 0 and file.tell() >= megabytes * 1_000_000:
                return


def large_rows() -> Iterator[tuple]:
    chance, sentences = random.Random(0), read_sentences()
    for number in itertools.count(1):
        yield number, " ".join(chance.sample(sentences, 2)), f"{chance.randint(1, 999)} crowns"


# ------------------------------------------------------------------------------- speed


def measure_speed(checkouts: Sequence[Checkout], place: Path, files: int, rounds: int) -> dict:
    """way -> checkout -> passages, and per round the seconds, passages per second and peak memory."""
    write_folder(place / "mixed", files)
    few = place / "few"
    write_folder(few, 8)
    result: dict = {way: {checkout.name: [] for checkout in checkouts} for way in WAYS}
    for number in range(rounds):
        for way in WAYS:
            for checkout in checkouts[:: -1 if number % 2 else 1]:
                console.note(f"round {number + 1}, {way}, {checkout.name}")
                result[way][checkout.name].append(time_ingest(checkout, way, place / "mixed", few, number))
    return result


def time_ingest(checkout: Checkout, way: str, mixed: Path, few: Path, number: int) -> dict:
    """An ingest into a new collection; its seconds are those beyond an ingest of eight files."""
    start = checkout.ingest(way, few, f"start {way} {number}")
    run = checkout.ingest(way, mixed, f"mixed {way} {number}")
    if start.code or run.code:
        raise RuntimeError(f"{checkout.name}: ingest ends with {run.code}: {(start.report + run.report)[-2000:]}")
    passages = checkout.count_passages(f"mixed {way} {number}")
    passages -= checkout.count_passages(f"start {way} {number}")
    seconds, cpu = run.seconds - start.seconds, run.cpu_seconds - start.cpu_seconds
    return {"passages": passages, "seconds": seconds, "cpu_seconds": cpu, "peak_gb": run.peak_bytes / 1e9}


def describe_speed(result: dict) -> str:
    """A line per way and checkout; the last column compares its CPU seconds with this checkout's, within rounds."""
    head = ["Ingest", "checkout", "passages", "passages per second", "CPU ms per passage", "peak, GB", "CPU, to this"]
    rows = [[f"{result['files']:,} files", *head[1:]]]
    for way, checkouts in result["speed"].items():
        for name, runs in checkouts.items():
            rate = statistics.median(run["passages"] / run["seconds"] for run in runs)
            cpu = statistics.median(1000 * run["cpu_seconds"] / run["passages"] for run in runs)
            pairs = zip(runs, checkouts["this"], strict=True)
            ratios = sorted(one["cpu_seconds"] / ours["cpu_seconds"] for one, ours in pairs)
            row = [
                f"{runs[0]['passages']:,}",
                f"{rate:.1f}",
                f"{cpu:.1f}",
                f"{max(run['peak_gb'] for run in runs):.2f}",
            ]
            compared = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            rows.append([way, name, *row, "" if name == "this" else compared])
    return as_markdown_table(rows, left=2)


# ------------------------------------------------------------------------------- memory


def measure_large(checkouts: Sequence[Checkout], folder: Path, most_seconds: float) -> list[dict]:
    """Peak memory for a small and a large file of each kind, without embedding, in `most_seconds` at most."""
    folder.mkdir()
    files = {f"a PDF of {pages} pages": (".pdf", write_long_pdf, pages) for pages in PDF_PAGES}
    files |= {f"a CSV file of {size} MB": (".csv", write_large_csv, size) for size in CSV_MEGABYTES}
    results = []
    for name, (suffix, write, size) in files.items():
        path = folder / f"large{size}{suffix}"
        write(path, size)
        for checkout in checkouts:
            console.note(f"{name}, {checkout.name}")
            run = checkout.ingest("without embedding", path, name, most_seconds)
            seen = "whole" if run.code == 0 else f"stopped after {most_seconds:.0f} s"
            seen = next(iter(run.problems), seen).partition(" - ")[0] if run.code == 2 else seen
            if run.code == 1:
                raise RuntimeError(run.report[-2000:])
            memory = {"peak_gb": round(run.peak_bytes / 1e9, 2), "seconds": round(run.seconds)}
            results.append({"file": name, "checkout": checkout.name, **memory, "result": seen})
        path.unlink()
    return results


def describe_large(rows: list[dict]) -> str:
    head = ["File", "checkout", "result", "seconds", "peak of all processes, GB"]
    body = [[row["file"], row["checkout"], row["result"], str(row["seconds"]), f"{row['peak_gb']:.2f}"] for row in rows]
    return as_markdown_table([head, *body], left=3)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
