"""A real corpus: the HTML pages of the manuals of PostgreSQL 15 and Python 3.11, ingested whole and searched.

    apt-get download postgresql-doc-15 python3.11-doc              # in a folder of its own; 15 MB
    for package in *.deb; do dpkg -x $package .; done
    python -m benchmarks.corpus usr/share/doc/postgresql-doc-15/html usr/share/doc/python3.11/html

About 1,700 pages, 55,000 passages: a quarter of an hour on two cores with AVX512-BF16, an hour and a half without.
`--pages 100` takes fewer, those of the questions and others evenly; `--write docs/measurements.md` puts the tables
there. Every question of benchmarks/corpus_questions.jsonl names the page that answers it.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks.fill_and_search import PROJECT, find_passages, ingest, open_collection, read_questions, score
from qlora import console, settings
from qlora.markdown import as_markdown_table, put_section

QUESTIONS = PROJECT / "benchmarks" / "corpus_questions.jsonl"
COLLECTION = "benchmark corpus"


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    settings.quieten_libraries()
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        if not args.searched:
            copy_pages(Path(folder), {"postgresql": args.postgresql, "python": args.python}, args.pages)
            result = measure_ingest(Path(folder))
    store, search = open_collection(COLLECTION)
    result |= {"documents": len(store.documents()), "passages": store.count()}
    result["recall"] = measure_recall(search, read_questions(QUESTIONS))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    text = describe(result)
    print(text)
    if args.write:
        put_section(args.write, "corpus", text, "A real corpus")
    return 0


def build_parser() -> argparse.ArgumentParser:
    title, _, text = __doc__.partition("\n\n")
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="corpus.py", description=title, epilog=text, formatter_class=kind)
    parser.add_argument("postgresql", type=Path, help="folder of PostgreSQL's pages")
    parser.add_argument("python", type=Path, help="folder of Python's pages")
    parser.add_argument("--pages", type=int, metavar="N", help="about N pages, those of the questions among them (all)")
    parser.add_argument("--searched", action="store_true", help="only search: the collection is there already")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables into this page")
    return parser


def copy_pages(folder: Path, manuals: dict[str, Path], count: int | None) -> None:
    """Copies the .html files, each manual below its name, without the pictures and sources beside them."""
    pages = {
        f"{name}/{page.relative_to(root)}": page for name, root in manuals.items() for page in root.rglob("*.html")
    }
    sources, asked = sorted(pages), {row["source"] for row in read_questions(QUESTIONS)}
    chosen = set(sources[:: max(1, len(sources) // count)]) | asked if count else sources
    for source in chosen:
        copy = folder / source
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(pages[source], copy)


def measure_ingest(folder: Path) -> dict:
    """Minutes, peak memory, and what was left out, of a collection that is made anew."""
    store, _ = open_collection(COLLECTION)
    store.drop()
    pages = sum(1 for _ in folder.rglob("*.html"))
    console.note(f"{pages} pages")
    run = ingest([folder], COLLECTION)
    return {
        "pages": pages,
        "minutes": round(run.seconds / 60, 1),
        "peak_gb": round(run.peak_bytes / 1e9, 2),
        "left_out": [problem.replace(f"{folder}/", "") for problem in run.problems],
    }


def measure_recall(search, questions: list[dict]) -> dict:
    """manual -> mode -> recall, by source, and of both."""
    found = find_passages(search, questions)
    manuals = {"both": questions}
    for row in questions:
        manuals.setdefault(row["source"].partition("/")[0], []).append(row)
    places = {row["question"]: n for n, row in enumerate(questions)}
    return {
        name: {mode: score(rows, [each[places[row["question"]]] for row in rows]) for mode, each in found.items()}
        for name, rows in manuals.items()
    }


# ------------------------------------------------------------------------------- output


def describe(result: dict) -> str:
    """The numbers of the ingest and of the search, as Markdown."""
    parts = [as_markdown_table(ingest_rows(result)), ""] if "minutes" in result else []
    head = ["By source", *(f"{mode}, first {k}" for mode in result["recall"]["both"] for k in (1, 3))]
    rows = [
        [name, *(f"{scores[f'source@{k}']:.2f}" for scores in modes.values() for k in (1, 3))]
        for name, modes in result["recall"].items()
    ]
    return "\n".join([*parts, as_markdown_table([head, *rows])])


def ingest_rows(result: dict) -> list[list[str]]:
    rate = result["passages"] / result["minutes"] / 60
    reasons = Counter(problem.partition(" - ")[0] for problem in result["left_out"])
    left = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common())
    return [
        ["Corpus", ""],
        ["pages", f"{result['pages']:,}"],
        ["documents in the collection", f"{result['documents']:,}"],
        ["passages", f"{result['passages']:,}"],
        ["minutes", f"{result['minutes']}"],
        ["passages per second", f"{rate:.0f}"],
        ["most memory, GB", f"{result['peak_gb']}"],
        ["left out", left or "nothing"],
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
