"""The same 30 facts in every format: how often a search finds them, beside plain text.

    python -m benchmarks.formats                                 # all formats; about five minutes on two cores
    python -m benchmarks.formats --formats txt pdf xlsx
    python -m benchmarks.formats --write docs/measurements.md    # puts the table there

Ten sections about the houses of a garden (formats.json, beside this file) become ten files of each format. Of each
section's three facts two stand in paragraphs, among others that resemble them, and one in a table of 30 rows. A fact is
found when one passage holds the answer; for a cell of the table it must name the row's plant and the column, too.
The goal is a recall@1 and recall@3 within .05 of those of .txt.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import document_files
from benchmarks.document_files import Section
from benchmarks.fill_and_search import DEPTH, PROJECT, holds, ingest, open_collection, text_of
from qlora import console, settings
from qlora.markdown import as_markdown_table, put_section

COLUMNS = ["Plant", "Bed", "Height", "Price"]
SIZES = ("small", "medium", "large")  # of every plant; the questions are about large ones
FACTS = PROJECT / "benchmarks" / "formats.json"
WITHIN = 0.05


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    settings.quieten_libraries()
    sections = read_sections()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.formats:
            console.note(name)
            results[name] = measure_format(name, sections, Path(folder, name), args.search)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    text = describe(results)
    print(text)
    if args.write:
        put_section(args.write, "formats", text, "The same facts in every format")
    return 0


def build_parser() -> argparse.ArgumentParser:
    title, _, text = __doc__.partition("\n\n")
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="formats.py", description=title, epilog=text, formatter_class=kind)
    names = list(document_files.WRITERS)
    parser.add_argument("--formats", nargs="+", choices=names, default=names, metavar="NAME", help=f"of {names} (all)")
    parser.add_argument("--search", choices=("dense", "lexical", "hybrid"), default="hybrid", help="(hybrid)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into this page")
    return parser


# ------------------------------------------------------------------------------- facts


def read_sections() -> list[Section]:
    """The ten sections; the cells of their tables are counted out, so that no value stands there twice."""
    sections = []
    for n, row in enumerate(json.loads(FACTS.read_text(encoding="utf-8"))):
        plants = enumerate((f"{size} {plant}" for size in SIZES for plant in row["plants"]), 1)
        table = [[plant, f"{'ABCDEFGHKL'[n]}{at}", f"{90 * n + 3 * at} cm", cost(30 * n + at)] for at, plant in plants]
        sections.append(Section(row["title"], row["paragraphs"], [COLUMNS, *table], row["questions"]))
    return sections


def cost(number: int) -> str:
    return f"{1001 + 17 * number} crowns"


def facts_of(section: Section) -> list[tuple[str, list[str]]]:
    """(question, what its passage must hold): the answer, and for a row of the table plant and column, too."""
    facts = []
    for fact in section.questions:
        question, wanted = fact["question"], fact.get("answers", [])
        if plant := fact.get("plant"):
            asked, column = f"{SIZES[-1]} {plant}", fact["column"]
            row = next(row for row in section.table if row[0] == asked)
            question, wanted = question.replace(plant, asked), [asked, column, row[COLUMNS.index(column)]]
        facts.append((question, wanted))
    return facts


# ------------------------------------------------------------------------------- measurement


def measure_format(name: str, sections: Sequence[Section], folder: Path, mode: str) -> dict:
    """recall@1 and recall@3 over all facts, and of those in paragraphs and in tables; none where nothing is read."""
    write_format(name, sections, folder)
    collection = f"benchmark {name}"
    store, search = open_collection(collection)
    store.drop()
    run = ingest([folder], collection)
    shutil.rmtree(folder)
    store, search = open_collection(collection)
    if not store.count():
        return {"problem": next(iter(run.problems), "no documents")}
    hits = {"prose": [], "table": []}
    for section in sections:
        for fact, (question, wanted) in zip(section.questions, facts_of(section), strict=True):
            found = search(question, DEPTH, mode=mode)
            hits["table" if "plant" in fact else "prose"].append([holds_all(passage, wanted) for passage in found])
    hits["all"] = hits["prose"] + hits["table"]
    recall = {f"{kind}@{k}": share(rows, k) for kind, rows in hits.items() for k in (1, DEPTH)}
    return {"passages": store.count(), **recall, "left_out": run.problems}


def write_format(name: str, sections: Sequence[Section], folder: Path) -> None:
    folder.mkdir(parents=True)
    write: Callable = document_files.WRITERS[name]
    for section in sections:
        write(folder / f"{section.title.lower().replace(' ', '-')}.{name}", section)


def holds_all(passage, wanted: Sequence[str]) -> bool:
    return all(holds(text_of(passage), [one]) for one in wanted)


def share(rows: Sequence[Sequence[bool]], k: int) -> float:
    return round(sum(any(row[:k]) for row in rows) / len(rows), 3)


def describe(results: dict) -> str:
    """The table: one line per format, with the distance to .txt."""
    head = [
        "Format",
        "recall@1",
        "recall@3",
        "paragraphs, first three",
        "tables, first three",
        "passages",
        f"within {WITHIN}",
    ]
    rows = [row_of(name, result, results.get("txt")) for name, result in results.items()]
    return as_markdown_table([head, *rows])


def row_of(name: str, result: dict, plain: dict | None) -> list[str]:
    if "problem" in result:
        return [f".{name}", "not read", *[""] * 5]
    near = ""
    if plain and "problem" not in plain:
        near = "yes" if all(result[key] >= plain[key] - WITHIN - 1e-9 for key in ("all@1", "all@3")) else "no"
    values = [f"{result[key]:.2f}" for key in ("all@1", "all@3", "prose@3", "table@3")]
    return [f".{name}", *values, str(result["passages"]), near]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
