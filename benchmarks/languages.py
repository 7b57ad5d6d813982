"""Retrieval in German, French, Spanish and Chinese: 20 questions over eight small documents of each language.

    python -m benchmarks.languages                               # about three minutes on two cores
    python -m benchmarks.languages --embedding-model MODEL       # with another embedder
    python -m benchmarks.languages --write docs/measurements.md  # puts the table there

The documents of benchmarks/languages/ were written for this, as were the questions, in other words than the text, in
other forms of them (`welchen Vordruck füllt ein Gast` for `mit dem Formular B7`), and some by an identifier that is
typed differently (`Fehler 1042`). The Chinese documents tell what the German ones do.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.fill_and_search import PROJECT, find_passages, ingest, open_collection, read_questions, score
from qlora import console, settings
from qlora.markdown import as_markdown_table, put_section

FOLDER = PROJECT / "benchmarks" / "languages"
LANGUAGES = {"de": "German", "fr": "French", "es": "Spanish", "zh": "Chinese"}


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    settings.quieten_libraries()
    flags = ["--embedding-model", args.embedding_model] if args.embedding_model else []
    results = {code: measure_language(code, flags) for code in args.languages}
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    text = describe(results)
    print(text)
    if args.write:
        put_section(args.write, "languages", text, "Other languages")
    return 0


def build_parser() -> argparse.ArgumentParser:
    title, _, text = __doc__.partition("\n\n")
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="languages.py", description=title, epilog=text, formatter_class=kind)
    codes = list(LANGUAGES)
    parser.add_argument(
        "--languages", nargs="+", choices=codes, default=codes, metavar="CODE", help=f"of {codes} (all)"
    )
    parser.add_argument("--embedding-model", metavar="MODEL", help="as for `ingest` (its default)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into this page")
    return parser


def measure_language(code: str, flags: list[str]) -> dict:
    """mode -> recall, on a collection of the language's documents that is made anew."""
    console.note(LANGUAGES[code])
    collection = f"benchmark {code}" + " of another embedder" * bool(flags)
    open_collection(collection, flags)[0].drop()
    run = ingest([FOLDER / code], collection, flags=flags)
    if run.problems:
        raise RuntimeError(f"{code}: {run.problems}")
    questions = read_questions(FOLDER / f"{code}.jsonl")
    _, search = open_collection(collection, flags)
    return {mode: score(questions, found) for mode, found in find_passages(search, questions).items()}


def describe(results: dict) -> str:
    head = ["20 questions each", "search", "answer @1", "answer @3", "source @1", "source @3"]
    rows = [
        [LANGUAGES[code], mode, *(f"{scores[key]:.2f}" for key in ("answer@1", "answer@3", "source@1", "source@3"))]
        for code, modes in results.items()
        for mode, scores in modes.items()
    ]
    return as_markdown_table([head, *rows], left=2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
