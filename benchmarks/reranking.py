#!/usr/bin/env python
"""What puts the right passage first, and when to refuse: none, likelihood and cross-encoder on one adapter per seed.

    python -m benchmarks.reranking                                    # the sample, both files of questions
    python -m benchmarks.reranking --squad SQUAD_FOLDER --epochs 2    # SQuAD
    python -m benchmarks.reranking --write docs/measurements.md

Each line is a trial of benchmarks/runs.jsonl: `fit` on rows that training held out, then `evaluate` on the questions,
which nothing was fitted on. Seconds are those of `ask` from the search to the last word, mean of 24 questions.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks import ablation, trials, written_rows
from qlora import console, settings
from qlora.evaluation.report import show
from qlora.markdown import as_markdown_table, put_section

RANKED = ("none", "likelihood", "cross-encoder")
COLUMNS = ["--rerank", "recall@1", "F1 (of each seed)", "overall F1", "refusal P", "R", "F1", "calibration error"]
ASKED = 24


def main(argv: list[str]) -> int:
    args, problems = console.parse_arguments(build_parser(), argv)
    problems.raise_if_any()
    settings.quieten_libraries()
    text = measure(args)
    print(text)
    if args.write:
        put_section(args.write, f"reranking-{'squad' if args.squad else 'sample'}", text)
    return 0


def measure(args) -> str:
    """A Markdown table with a line per way of ranking."""
    chosen = written_rows.squad(args.squad) if args.squad else written_rows.sample()
    data = trials.Data(chosen.name, chosen.human, chosen.questions, chosen.documents)
    flags = {"epochs": f"{args.epochs:g}"} if args.epochs else {}
    rows = []
    for name in args.rerank:
        made = [trials.Trial(data, {**flags, "rerank": name}, seed) for seed in args.seeds]
        found = [trials.run_trial(trial) for trial in made]
        # At once: an adapter keeps one ranking at a time.
        rows.append([f"`{name}`", *describe(found), f"{time_answers(made[-1]):.2f}"])
    return as_markdown_table([[*COLUMNS, "seconds per answer"], *rows])


def describe(records: list[dict]) -> list[str]:
    """The mean of every score over the seeds; F1 with each seed's."""
    cells = [record["cells"]["tuned retrieved"] for record in records]
    each = ", ".join(show(cell["f1"]) for cell in cells)
    names = "overall_f1", "refusal_precision", "refusal_recall", "refusal_f1"
    errors = [record["calibration_error"] for record in records]
    return [
        show(statistics.mean(record["recall@1"] for record in records)),
        f"{show(ablation.mean_of(cells, 'f1'))} ({each})",
        *(show(ablation.mean_of(cells, name)) for name in names),
        show(None if None in errors else statistics.mean(errors)),
    ]


def time_answers(trial: trials.Trial) -> float:
    """Seconds per answer of `ask`, from the search to the last word."""
    lines = trial.data.questions.read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["question"] for line in lines[:: len(lines) // ASKED][:ASKED]]
    folder, collection = trials.places(trial)
    trials.fit(trial, folder, collection)
    words = ["ask", "--json", "--adapter", folder, "--collection", collection, "--rerank", trial.flags["rerank"]]
    command = [sys.executable, str(trials.PROJECT / "rag_qlora.py"), *map(str, words), *texts]
    done = subprocess.run(command, check=True, cwd=trials.PROJECT, stdin=subprocess.DEVNULL, capture_output=True)
    timings = [json.loads(line)["timings"] for line in done.stdout.decode().splitlines()]
    return statistics.mean(one["retrieve_s"] + one["rank_s"] + one["generate_s"] for one in timings)


def build_parser() -> console.Parser:
    title, _, text = __doc__.partition("\n\n")
    parser = console.Parser(usage="python -m benchmarks.reranking [flags]", description=title, epilog=text)
    flag = parser.add_argument
    flag("--squad", type=Path, metavar="FOLDER", help="SQuAD's rows, questions and documents instead of the sample's")
    flag("--epochs", type=console.number(float, 0, above=True), help="of the training (the preset's)")
    flag("--rerank", nargs="+", metavar="NAME", default=list(RANKED), help="what to compare")
    flag("--seeds", type=console.number(int, 0), nargs="+", default=[0, 1], help="each trial once per seed")
    flag("--write", type=Path, metavar="FILE", help="put the table between its marks in this file")
    return parser


if __name__ == "__main__":
    sys.exit(console.run(main))
