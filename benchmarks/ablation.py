#!/usr/bin/env python
"""What each part of the recipe buys: the sample's preset, and the same without one part, on all sample questions.

    python benchmarks/ablation.py                   # two seeds; about two and a half hours on two cores, resumable
    python benchmarks/ablation.py --curve           # F1 against the number of training rows, and a picture
    python benchmarks/ablation.py --curve --start-from adapters/squad    # with a second line, from that adapter
    python benchmarks/ablation.py --write docs/measurements.md    # puts the table there

Every trial is a line of benchmarks/runs.jsonl. A part without a flag is taken away by a function of this file, in its
own process.
"""

import importlib
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks import trials
from qlora import console, presets, settings
from qlora.evaluation.report import show
from qlora.markdown import as_markdown_table, put_section
from qlora.words import CITATIONS

PICTURE = trials.PROJECT / "learning_curve.png"
QUESTIONS = ("questions.jsonl", "second_questions.jsonl")
TABLE_COLUMNS = ["F1 (of each seed)", "oracle F1", "refusal F1", "citation P"]

# name -> (flags, the function that takes the part away)
PARTS = {
    "the recipe": ({}, ""),
    "the right passage first": ({"rerank": "likelihood"}, ""),  # what `fit` adds
    "two passages to read": ({"top-k": "2"}, ""),
    "refusing where the model would": ({"refusal-bias": "0"}, ""),
    "dense search": ({"search": "dense"}, ""),
    "without heading paths": ({}, "drop_headings"),
    "without refusals": ({"refusal-share": "0", "gold-probability": "1"}, ""),
    "a distractor, two passages to read": ({"distractors": "1", "epochs": "0.75"}, ""),  # of about the same minutes
    "without citations": ({}, "drop_citations"),
    "every layer in 4-bit": ({}, "quantize_all"),
    "16-bit base": ({}, "keep_16_bit"),
    "rows that share no passages": ({"epochs": "0.55"}, "scatter_rows"),  # of about the same minutes
    "rows of 160 tokens, the right passage cut last": ({"max-length": "160"}, ""),
    "rows of 160 tokens, cut at the end": ({"max-length": "160"}, "cut_any_passage"),
}
CURVE = (50, 100, 200, 400)
FEWER = (50, 200)  # for the second line


# ------------------------------------------------------------------------------- parts taken away


CALLED: dict[str, bool] = {}  # per replaced function, whether it was called
HIT_BY = {"drop_headings": "rag_qlora ingest"}  # the command that must call it; the others: training


def swap(module, name: str, new: Callable) -> None:
    """Puts `new` in the place of a module's function. Raises AttributeError where there is none."""
    where = f"{module.__name__}.{name}"
    getattr(module, name)
    CALLED[where] = False

    def run(*given, **named):
        CALLED[where] = True
        return new(*given, **named)

    setattr(module, name, run)


def drop_citations() -> None:
    from qlora.training import distractors

    shape = distractors.shape_row

    def shape_without(*given):
        row = shape(*given)
        return replace(row, response=CITATIONS.sub("", row.response))

    swap(distractors, "shape_row", shape_without)


def cut_any_passage() -> None:
    from qlora.training import examples

    fit = examples.fit_passages
    swap(examples, "fit_passages", lambda *given, last=None, keep="", **others: fit(*given, **others))


def drop_headings() -> None:
    from qlora.retrieval import documents

    split = documents.split_sections
    swap(
        documents, "split_sections", lambda sections, *given: split((replace(s, heading="") for s in sections), *given)
    )


def scatter_rows() -> None:
    from qlora.training import examples

    batch = examples.batch_groups
    swap(examples, "batch_groups", lambda groups, size, seed: batch(range(len(groups)), size, seed))


def quantize_all() -> None:
    from qlora.model import base_model

    base_model.SENSITIVE.clear()


def keep_16_bit() -> None:
    from transformers import AutoModelForCausalLM

    from qlora.model import quantised_base

    load = AutoModelForCausalLM.from_pretrained
    swap(quantised_base, "folder_for", lambda *given: None)
    swap(
        AutoModelForCausalLM,
        "from_pretrained",
        lambda *given, quantization_config=None, **others: load(*given, **others),
    )


# ------------------------------------------------------------------------------- run


def main(argv: list[str]) -> int:
    if argv[:1] == ["--run"]:
        return run_without(*argv[1:3], argv[3:])
    args, problems = console.parse_arguments(build_parser(), argv)
    problems.raise_if_any()
    text = measure_curve(args.seeds, args.start_from) if args.curve else measure_parts(args.parts, args.seeds)
    print(text)
    if args.write:
        put_section(args.write, "curve" if args.curve else "ablation", text)
    return 0


def run_without(part: str, script: str, words: list[str]) -> int:
    """The script, after the part was taken away from the modules that it imports.

    Raises UserError when nothing called what was put in its place: the trial would measure the whole recipe.
    """
    globals()[part]()
    code = console.run(importlib.import_module(script).main, words)
    missed = [where for where, called in CALLED.items() if not called]
    if code == 0 and missed and " ".join([script, *words]).startswith(HIT_BY.get(part, "instruct_train_qlora")):
        raise console.fail(f"nothing called {', '.join(missed)}", f"--run {part}", "patch what the script calls today")
    return code


def measure_parts(names: list[str], seeds: list[int]) -> str:
    """A Markdown table: the recipe, and the recipe without each part."""
    records = [[run(*PARTS[name], seed) for name in names] for seed in seeds]  # one seed after the other
    rows = [[name, *describe(of_part)] for name, *of_part in zip(names, *records, strict=True)]
    return as_markdown_table([["", *TABLE_COLUMNS, "minutes"], *rows])


def measure_curve(seeds: list[int], parent: str | None) -> str:
    """A Markdown table of F1 against the number of rows, from the base and from the parent, after drawing both."""
    everything = sum(1 for _ in (trials.SAMPLE / "train.jsonl").open(encoding="utf-8"))
    lines = {"the base": [train_on(count, everything, {}, seeds) for count in (*CURVE, everything)]}
    if parent:
        named = {"start-from": parent}
        lines[f"{Path(parent).name}"] = [train_on(count, everything, named, seeds) for count in (*FEWER, everything)]
    draw_curve(lines, PICTURE)
    table = [[str(n), name, *describe(records)] for name, line in lines.items() for n, records in line]
    return as_markdown_table([["rows", "from", *TABLE_COLUMNS, "minutes"], *table])


def train_on(count: int, everything: int, flags: dict, seeds: list[int]) -> tuple[int, list[dict]]:
    """Trials with a sample of the rows: as many steps as with all of them, but at most 8 epochs."""
    if count < everything:
        epochs = min(8, presets.PRESETS["laptop"].epochs * everything / count)
        flags = {"max-rows": str(count), "epochs": f"{epochs:g}"} | flags
    return count, [run(flags, "", seed) for seed in seeds]


def run(flags: dict, without: str, seed: int) -> dict:
    data = trials.Data("sample", trials.SAMPLE / "train.jsonl", join_questions(), trials.DOCUMENTS)
    record = trials.run_trial(trials.Trial(data, flags, seed, without))
    f1 = record["cells"]["tuned retrieved"]["f1"]
    console.note(f"{without or flags or 'the recipe'}, seed {seed}: F1 {f1:.3f}")
    return record


def join_questions() -> Path:
    """Both files of sample questions in one: more of them, narrower intervals."""
    path = settings.data_folder() / "trials" / "sample-questions.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((trials.SAMPLE / name).read_text(encoding="utf-8") for name in QUESTIONS), encoding="utf-8")
    return path


def describe(records: list[dict]) -> list[str]:
    """The mean of every score over the seeds; F1 with each seed's."""
    found, oracle = ([record["cells"][f"tuned {context}"] for record in records] for context in ("retrieved", "oracle"))
    each = ", ".join(show(cell["f1"]) for cell in found)
    means = [mean_of(oracle, "f1"), mean_of(found, "refusal_f1"), mean_of(found, "citation_precision")]
    minutes = statistics.mean(record["train_seconds"] for record in records) / 60
    return [f"{show(mean_of(found, 'f1'))} ({each})", *map(show, means), f"{minutes:.1f}"]


def mean_of(cells: list[dict], score: str) -> float | None:
    """None where a cell has none: nothing was refused, or cited."""
    values = [cell[score] for cell in cells]
    return None if None in values else statistics.mean(values)


def draw_curve(lines: dict[str, list[tuple[int, list[dict]]]], picture: Path) -> None:
    """F1 against rows: the mean over the seeds, and every seed as a dot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), dpi=100, layout="constrained")
    axes = figure.subplots()
    for (name, rows), style in zip(lines.items(), ("o-", "s--"), strict=False):
        for context, colour in (("oracle", "tab:blue"), ("retrieved", "tab:orange")):
            points = [(count, [r["cells"][f"tuned {context}"]["f1"] for r in records]) for count, records in rows]
            means = [statistics.mean(values) for _, values in points]
            label = f"{context} context, from {name}"
            axes.plot([count for count, _ in points], means, style, color=colour, label=label)
            for count, values in points:
                axes.plot([count] * len(values), values, ".", color=colour, alpha=0.5)
    axes.set(xscale="log", xlabel="training rows", ylabel="F1", ylim=(0, 1))
    ticks = sorted({count for rows in lines.values() for count, _ in rows})
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.minorticks_off()
    axes.legend()
    figure.savefig(picture)


def build_parser() -> console.Parser:
    title, _, text = __doc__.partition("\n\n")
    parser = console.Parser(usage="ablation.py [flags]", description=title, epilog=text)
    flag = parser.add_argument
    flag("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="NAME", help="some lines of the table only")
    flag("--curve", action="store_true", help="F1 against the number of rows instead")
    flag("--start-from", metavar="ADAPTER", help="a second line of the curve, trained further from this adapter")
    flag("--seeds", type=console.number(int, 0), nargs="+", default=[0, 1], help="each trial once per seed")
    flag("--write", type=Path, metavar="FILE", help="put the table between its marks in this file")
    return parser


if __name__ == "__main__":
    sys.exit(console.run(main))
