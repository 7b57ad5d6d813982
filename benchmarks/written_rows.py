#!/usr/bin/env python
"""What rows that `write` makes of documents are worth, beside rows that people wrote.

    python -m benchmarks.written_rows --writer adapters/writer-squad                 # the sample; an hour on two cores
    python -m benchmarks.written_rows --writer adapters/writer-squad --squad SQUAD_FOLDER
    python -m benchmarks.written_rows --writer adapters/writer-squad --write docs/measurements.md

Rows are written about the documents that the questions are about. Neither writer nor checks see the questions, and rows
that resemble one are dropped. Every trial is a line of benchmarks/runs.jsonl: the recipe of the laptop with as
many steps as for all human rows, but at most 8 epochs; with --from-writer 3 epochs, from the adapter that wrote.
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
MOST_EPOCHS = 8
FROM_WRITER = 3  # epochs
NAMES = ("written", "people, as many", "people, 50", "people, 50 + written", "people, all", "people, all + written")


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
    written, report = write_rows(chosen, args.writer, args.per_passage, args.keep)
    start = args.writer if args.from_writer else None
    table = compare(chosen, written, args.only or NAMES, start, args.seed)
    text = f"{describe(report)}\n\n{table}"
    print(text)
    if args.write:
        put_section(args.write, f"written-{chosen.name}", text)
    return 0


def sample() -> Set:
    return Set("sample", trials.SAMPLE / "train.jsonl", trials.DOCUMENTS, ablation.join_questions())


def squad(folder: Path) -> Set:
    return Set("squad", folder / "squad_train.jsonl", folder / "squad_documents", folder / "squad_questions.jsonl")


def write_rows(chosen: Set, writer: Path, per_passage: int, keep: float) -> tuple[Path, dict]:
    """The rows about the documents of the questions, and the report of writing them."""
    folder = settings.data_folder() / "trials"
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / f"written-{chosen.name}-{writer.name}.jsonl"
    collection = f"written-{chosen.name}"
    asked = [json.loads(line)["source"] for line in chosen.questions.read_text(encoding="utf-8").splitlines()]
    documents = [str(chosen.documents / source) for source in sorted(set(asked))]
    run("ingest", *documents, "--collection", collection)
    flags = ["--writer", writer, "--output", output, "--questions", chosen.questions]
    flags += ["--per-passage", per_passage, "--keep", keep]
    run("write", "--collection", collection, *flags)
    return output, json.loads(output.with_suffix(".report.json").read_text(encoding="utf-8"))


def run(*words) -> None:
    command = [sys.executable, str(trials.PROJECT / "rag_qlora.py"), *map(str, words)]
    subprocess.run(command, check=True, cwd=trials.PROJECT, stdin=subprocess.DEVNULL)


def compare(chosen: Set, written: Path, names: Sequence[str], start: Path | None, seed: int) -> str:
    """A Markdown table: F1 on the questions after training on human rows, written ones, and both."""
    human, _ = keep_usable(load_rows(str(chosen.human)), Selection(refusal_share=0.2))
    own = load_rows(str(written))
    few, as_many = (sample_rows(human, count, seed) for count in (FEW, len(own)))
    sets = [own, as_many, few, [*few, *own], human, [*human, *own]]
    cells = {name: rows for name, rows in zip(NAMES, sets, strict=True) if name in names}
    lines = []
    for name, rows in cells.items():
        epochs = FROM_WRITER if start else min(MOST_EPOCHS, presets.PRESETS["laptop"].epochs * len(human) / len(rows))
        flags = {"epochs": f"{epochs:g}"} | ({"start-from": str(start)} if start else {})
        lines.append([name, str(len(rows)), *measure(chosen, name, rows, flags, seed)])
    return as_markdown_table([["trained on", "rows", *ablation.TABLE_COLUMNS, "minutes"], *lines])


def measure(chosen: Set, name: str, rows: Sequence[Row], flags: dict[str, str], seed: int) -> list[str]:
    """The scores after training on these rows."""
    path = settings.data_folder() / "trials" / f"{chosen.name}-{trials.name_of(name)}.jsonl"
    lines = [json.dumps({column: getattr(row, column) for column in COLUMNS}) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    data = trials.Data(chosen.name, path, chosen.questions, chosen.documents)
    record = trials.run_trial(trials.Trial(data, flags, seed))
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
    flag("--per-passage", type=console.number(int, 1), default=6, help="rows to write per passage, at most")
    flag("--keep", type=console.number(float, 0, 1, above=True), default=0.5, help="share of the good rows")
    flag("--from-writer", action="store_true", help="go on from the writer, which answers as well, not from the base")
    flag("--only", nargs="+", choices=NAMES, metavar="NAME", help=f"rows to train on: {'; '.join(NAMES)}")
    flag("--seed", type=console.number(int, 0), default=0, help="of the training")
    flag("--write", type=Path, metavar="FILE", help="put the table between its marks in this file")
    return parser


if __name__ == "__main__":
    sys.exit(console.run(main))
