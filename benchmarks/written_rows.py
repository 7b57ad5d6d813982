#!/usr/bin/env python
"""What rows that `write` makes of documents are worth, beside rows that people wrote.

    python -m benchmarks.written_rows --writer adapters/writer-squad                 # the sample; an hour on two cores
    python -m benchmarks.written_rows --writer adapters/writer-squad --squad SQUAD_FOLDER
    python -m benchmarks.written_rows --writer adapters/writer-squad --write docs/measurements.md

Rows are written about the documents that the questions are about. Neither writer nor checks see the questions, and rows
that resemble one are dropped. Every trial is a line of benchmarks/runs.jsonl: the recipe of the laptop with as
many steps as for all human rows, but at most 8 epochs.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import ablation, trials
from qlora import console, presets, settings
from qlora.markdown import as_markdown_table, put_section
from qlora.training.row_filters import Selection, keep_usable, sample_rows
from qlora.training.rows import COLUMNS, Row, load_rows

FEW = 50


@dataclass(frozen=True)
class Set:
    """Rows that people wrote, and documents with questions that no person wrote rows about."""

    name: str
    human: Path
    documents: Path
    questions: Path


def main(argv: list[str]) -> int:
    args, problems = console.parse_arguments(build_parser(), argv)
    problems.raise_if_any()
    settings.quieten_libraries()
    chosen = squad(args.squad) if args.squad else sample()
    written, report = write_rows(chosen, args.writer, args.rows)
    table = compare(chosen, written, args.seed)
    text = f"{describe(report)}\n\n{table}"
    print(text)
    if args.write:
        put_section(args.write, f"written-{chosen.name}", text)
    return 0


def sample() -> Set:
    return Set("sample", trials.SAMPLE / "train.jsonl", trials.DOCUMENTS, ablation.join_questions())


def squad(folder: Path) -> Set:
    return Set("squad", folder / "squad_train.jsonl", folder / "squad_documents", folder / "squad_questions.jsonl")


def write_rows(chosen: Set, writer: Path, rows: int | None) -> tuple[Path, dict]:
    """The rows about the documents of the questions, and the report of writing them."""
    folder = settings.data_folder() / "trials"
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / f"written-{chosen.name}-{writer.name}.jsonl"
    collection = f"written-{chosen.name}"
    asked = [json.loads(line)["source"] for line in chosen.questions.read_text(encoding="utf-8").splitlines()]
    documents = [str(chosen.documents / source) for source in sorted(set(asked))]
    run("ingest", *documents, "--collection", collection)
    limit = ["--rows", str(rows)] if rows else []
    flags = ["--writer", writer, "--output", output, "--questions", chosen.questions, *limit]
    run("write", "--collection", collection, *flags)
    return output, json.loads(output.with_suffix(".report.json").read_text(encoding="utf-8"))


def run(*words) -> None:
    command = [sys.executable, str(trials.PROJECT / "rag_qlora.py"), *map(str, words)]
    subprocess.run(command, check=True, cwd=trials.PROJECT, stdin=subprocess.DEVNULL)


def compare(chosen: Set, written: Path, seed: int) -> str:
    """A Markdown table: F1 on the questions after training on human rows, written ones, and both."""
    human, _ = keep_usable(load_rows(str(chosen.human)), Selection(refusal_share=0.2))
    own = load_rows(str(written))
    few, as_many = (sample_rows(human, count, seed) for count in (FEW, len(own)))
    cells = {
        "written rows": own,
        "as many rows of people about other documents": as_many,
        f"{FEW} rows of people": few,
        f"{FEW} rows of people, and the written ones": [*few, *own],
        "all rows of people": human,
        "all rows of people, and the written ones": [*human, *own],
    }
    lines = [[name, str(len(rows)), *measure(chosen, name, rows, len(human), seed)] for name, rows in cells.items()]
    return as_markdown_table([["trained on", "rows", *ablation.TABLE_COLUMNS, "minutes"], *lines])


def measure(chosen: Set, name: str, rows: Sequence[Row], everything: int, seed: int) -> list[str]:
    """The scores of the recipe with these rows, in as many steps as with `everything`, but at most 8 epochs."""
    path = settings.data_folder() / "trials" / f"{chosen.name}-{trials.name_of(name)}.jsonl"
    lines = [json.dumps({column: getattr(row, column) for column in COLUMNS}) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    epochs = min(8, presets.PRESETS["laptop"].epochs * everything / len(rows))
    data = trials.Data(chosen.name, path, chosen.questions, chosen.documents)
    record = trials.run_trial(trials.Trial(data, {"epochs": f"{epochs:g}"}, seed))
    console.note(f"{name}: F1 {record['cells']['tuned retrieved']['f1']:.3f}")
    return ablation.describe([record])


def describe(report: dict) -> str:
    """What was written, in a sentence."""
    kept, minutes = report["kept"], report["seconds"] / 60
    dropped = ", ".join(f"{found['drafts']} {reason}" for reason, found in report["dropped"].items())
    made = f"{report['written']} drafts in {minutes:.0f} minutes, {kept} kept, {report['refusing']} rows that refuse"
    return f"{made}. Dropped: {dropped}."


def build_parser() -> console.Parser:
    title, _, text = __doc__.partition("\n\n")
    parser = console.Parser(usage="python -m benchmarks.written_rows [flags]", description=title, epilog=text)
    flag = parser.add_argument
    flag("--writer", type=Path, required=True, metavar="ADAPTER", help="trained with --writer")
    flag("--squad", type=Path, metavar="FOLDER", help="SQuAD's rows, questions and documents instead of the sample's")
    flag("--rows", type=console.number(int, 1), help="rows to write (2 per passage)")
    flag("--seed", type=console.number(int, 0), default=0, help="of the training")
    flag("--write", type=Path, metavar="FILE", help="put the table between its marks in this file")
    return parser


if __name__ == "__main__":
    sys.exit(console.run(main))
