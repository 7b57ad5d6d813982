#!/usr/bin/env python
"""Which flags train the best model on your rows? Judged by questions on training documents that are held out.

    python benchmarks/recipe_search.py --vary learning-rate=5e-4,1e-3,2e-3 --vary rank=8,16,32
    python benchmarks/recipe_search.py --set epochs=2 --vary distractors=1,2 --seeds 0 1
    python benchmarks/recipe_search.py --dataset rows.jsonl --documents my_documents/ --vary top-k=2,3

A quarter of the documents (by the rows' `source`) is not trained on; their rows are the questions. Every value is
tried alone, with the preset's other values. Flags are those of instruct_train_qlora.py, of `ingest` (passage-tokens,
overlap) and of `evaluate` (top-k, search, fetch-k, diversity, refusal-bias, limit). All trials are in
benchmarks/runs.jsonl; a trial that is there is not run again.
"""

import sys
from pathlib import Path

from benchmarks import trials
from qlora import console, settings


def main(argv: list[str]) -> int:
    args, problems = console.parse_arguments(build_parser(), argv)
    fixed = read_flags(args.set, "--set", problems)
    varied = read_flags(args.vary, "--vary", problems)
    problems.raise_if_any()
    folder = settings.data_folder() / "trials"
    data = trials.split_data(args.dataset.stem, args.dataset, args.documents, folder)
    recipes = {"as it is": fixed}
    recipes |= {f"{name} {v}": fixed | {name: v} for name, values in varied.items() for v in values.split(",")}
    rows = []
    for name, flags in recipes.items():
        for seed in args.seeds:
            rows.append((f"{name}, seed {seed}", trials.run_trial(trials.Trial(data, flags, seed))))
            found = rows[-1][1]["cells"]["tuned retrieved"]
            console.note(f"{rows[-1][0]}: F1 {found['f1']:.3f}, refusal F1 {found['refusal_f1'] or 0:.2f}")
    trials.show_table(f"{data.name}: {rows[0][1]['questions']} questions", rows)
    return 0


def read_flags(words: list[str], flag: str, problems: console.Problems) -> dict[str, str]:
    pairs = [word.partition("=") for word in words]
    for name, _, value in pairs:
        if not (name and value):
            problems.add(f"{flag} {name} : expected FLAG=VALUE", "command line", f"write {flag} FLAG=VALUE")
    return {name: value for name, _, value in pairs}


def build_parser() -> console.Parser:
    title, _, text = __doc__.partition("\n\n")
    parser = console.Parser(usage="recipe_search.py [flags]", description=title, epilog=text)
    flag = parser.add_argument
    flag("--dataset", type=Path, default=trials.SAMPLE / "train.jsonl", help="rows with a source")
    flag("--documents", type=Path, default=trials.DOCUMENTS, help="what is searched")
    flag("--set", nargs="+", action="extend", default=[], metavar="FLAG=VALUE", help="for all trials")
    flag("--vary", action="append", default=[], metavar="FLAG=A,B", help="values to try, one at a time")
    flag("--seeds", type=console.number(int, 0), nargs="+", default=[0], help="each trial once per seed")
    return parser


if __name__ == "__main__":
    sys.exit(console.run(main))
