#!/usr/bin/env python
"""Training speed, memory and held-out loss of instruct_train_qlora.py beside the plain recipe, TRL's SFTTrainer.

    python benchmarks/train_speed.py                          # sample rows; about 20 minutes on two idle cores
    python benchmarks/train_speed.py --rows 16 --rounds 1     # a quick look
    python benchmarks/train_speed.py --dataset rows.jsonl --base-model ./my-llama --json

Every run is a fresh process with its own peak memory. Every second round runs in reverse order, so that a
machine that slows down affects all recipes alike. All train one epoch on the same rows, with the
same 4-bit base, LoRA shape, order and learning rates; the plain recipe leaves the rest to TRL. A batch of
ours has at most --batch-size rows, those about the same passages. The optimizer steps are timed, without
loading and evaluation; padding does not count. The held-out loss is measured by one function for all. With
several GPUs set CUDA_VISIBLE_DEVICES=0.
"""

import contextlib
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from benchmarks import plain_recipe as recipe
from benchmarks.plain_recipe import VARIANTS, Setup
from qlora import console, presets
from qlora.training.row_filters import keep_usable
from qlora.training.rows import COLUMNS, Row, load_rows

PROJECT = Path(__file__).resolve().parent.parent

OURS = {
    "preset": "laptop",  # every value of a preset is repeated here
    "seed": recipe.SEED,
    "eval-share": recipe.EVAL_SHARE,
    "distractors": recipe.DISTRACTORS,
    "gold-probability": recipe.GOLD_PROBABILITY,
    "max-length": recipe.MAX_LENGTH,
    "rank": recipe.RANK,
    "alpha": recipe.ALPHA,
    "dropout": 0,
    "accumulation": 1,
    "epochs": 1,
    "learning-rate": recipe.LEARNING_RATE,
    "warmup": recipe.WARMUP,
    "scheduler": "cosine",  # TRL's default is linear; the plain recipe is given cosine
}


def main(argv: list[str]) -> int:
    args, problems = console.parse_arguments(build_parser(), argv)
    problems.raise_if_any()
    result = compare_recipes(args)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print_comparison(result)
    return 0


def build_parser():
    title, _, text = __doc__.partition("\n\n")
    parser = console.Parser(usage="train_speed.py [flags]", description=title, epilog=text)
    flag, count = parser.add_argument, console.number(int, 1)
    flag("--dataset", default=str(PROJECT / "sample_data" / "train.jsonl"), help="file or hub id")
    flag("--base-model", default=presets.EMBEDDED, help="hub id or folder")
    flag("--rows", type=count, default=64, help="training rows, one epoch")
    flag("--rounds", type=count, default=3, help="runs of each recipe")
    flag("--batch-size", type=count, default=8, help="rows per optimizer step, at most")
    flag("--json", action="store_true", help="print one JSON object instead of the table")
    return parser


# ------------------------------------------------------------------------------- run


def compare_recipes(args) -> dict:
    """What every run measured, and the spread of the ratio ours / plain over the rounds.

    This process never imports torch: on Linux a child's ru_maxrss starts from its parent's.
    """
    rows, _ = keep_usable(load_rows(args.dataset))
    with tempfile.TemporaryDirectory(prefix="train-speed-") as folder:
        setup = write_setup(Path(folder), args.base_model, args.batch_size, rows, args.rows)
        run_recipe("prepare", setup)
        runs = {variant: [] for variant in VARIANTS}
        for number in range(args.rounds):
            for variant in order_of_round(number):
                run = run_variant(variant, setup)
                runs[variant].append(run)
                rate = run["useful_tokens_per_second"]
                console.note(f"round {number + 1} of {args.rounds}, {variant}: {rate:.1f} useful tokens/s")
        check_same_work(runs)
        run_recipe("score", setup)
        losses = json.loads(setup.path("losses.json").read_text(encoding="utf-8"))
    return summarise(setup, runs, losses)


def write_setup(folder: Path, base_model: str, batch_size: int, rows: list[Row], wanted: int) -> Setup:
    """The files that all processes read; each splits and shapes the rows itself, with the same seed."""
    sample, trained = choose_rows(rows, wanted)
    setup = Setup(str(folder), base_model, batch_size, trained)
    lines = [json.dumps({name: getattr(row, name) for name in COLUMNS}) for row in sample]
    setup.path("rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    setup.path("setup.json").write_text(json.dumps(asdict(setup)), encoding="utf-8")
    return setup


def choose_rows(rows: list[Row], wanted: int) -> tuple[list[Row], int]:
    """A seeded sample of the contexts with all their rows, and how many the split leaves to train on.

    Of all samples of up to 2 * `wanted` rows it is the one nearest to `wanted`. Raises UserError without one.
    """
    short = [row for row in rows if len(row.instruction + row.context + row.response) <= recipe.MAX_CHARACTERS]
    chance = random.Random(recipe.SEED)
    place = {text: chance.random() for text in sorted({row.context for row in short})}
    short.sort(key=lambda row: place[row.context])
    left = {}
    for count in range(math.ceil(wanted / (1 - recipe.EVAL_SHARE)), min(2 * wanted, len(short)) + 1):
        with contextlib.suppress(console.UserError):  # a single document, or every question held out, too
            left[count] = len(recipe.split_rows(short[:count])[0])
    if not left:
        what = f"{len(short)} rows of at most {recipe.MAX_CHARACTERS} characters don't leave {wanted} to train on"
        raise console.fail(what, "--rows, --dataset", "ask for fewer rows, or give more or shorter ones")
    count = min(left, key=lambda count: abs(left[count] - wanted))
    return short[:count], left[count]


def order_of_round(number: int) -> list[str]:
    """The variants, in every second round from last to first: plain, ours, ours, plain."""
    return list(VARIANTS)[:: -1 if number % 2 else 1]


def run_variant(variant: str, setup: Setup) -> dict:
    """What a fresh process measured of itself."""
    if variant == "plain":
        run_recipe("train", setup)
        return json.loads(setup.path("plain", "run.json").read_text(encoding="utf-8"))
    words = ["--output", setup.path(variant), "--overwrite", *our_words(setup, variant)]
    run_process([PROJECT / "instruct_train_qlora.py", *words], setup)
    run = json.loads(setup.path(variant, "run.json").read_text(encoding="utf-8"))
    return {**run["result"], "rows": run["dataset"]["training_rows"]}


def our_words(setup: Setup, variant: str) -> list[str]:
    """The command line of instruct_train_qlora.py, but for its output; `ours` keeps activations."""
    flags = OURS | {
        "base-model": setup.base_model,
        "dataset": setup.path("rows.jsonl"),
        "batch-size": setup.batch_size,
        "eval-steps": 10**6,  # at the end alone
        "eval-answers": 0,
        "gradient-checkpointing": "off" if variant == "ours" else "on",
    }
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


def run_recipe(command: str, setup: Setup) -> None:
    run_process([Path(recipe.__file__), command, setup.folder], setup)


def run_process(words: list, setup: Setup) -> None:
    """Runs a script silently; when it fails, ends the benchmark with what it said last and its exit code."""
    log = setup.path("log.txt")
    with log.open("w", encoding="utf-8") as file:
        command = [sys.executable, *map(str, words)]
        code = subprocess.run(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL).returncode
    if code:
        console.note(f"{Path(words[0]).name} ended with exit code {code}")
        sys.stderr.write(log.read_text(encoding="utf-8", errors="replace")[-4000:])
        raise SystemExit(max(code, 1))


def check_same_work(runs: dict[str, list[dict]]) -> None:
    """Raises UserError when runs differ in rows, or by over 1 % in tokens: their speeds then say nothing."""
    everything = [run for measured in runs.values() for run in measured]
    rows = {run["rows"] for run in everything}
    tokens = {run["useful_tokens"] for run in everything}
    if len(rows) > 1 or max(tokens) > 1.01 * min(tokens):
        what = f"the recipes did different work: rows {sorted(rows)}, tokens {sorted(tokens)}"
        raise console.fail(what, "benchmark", f"give rows of fewer than {recipe.MAX_LENGTH} tokens")


# ------------------------------------------------------------------------------- report


def summarise(setup: Setup, runs: dict[str, list[dict]], losses: dict[str, float]) -> dict:
    """Medians and spreads over the rounds; a ratio compares two runs of one round, which the machine treats alike."""
    plain = runs["plain"][0]
    rates = {name: [run["useful_tokens_per_second"] for run in measured] for name, measured in runs.items()}
    # A token costs 2 FLOPs a weight on the way forward and 2 on the way back to the inputs; frozen weights
    # need no gradient. Embeddings and head are left out: ours skips most of the head's work,
    # and recomputed activations do not count either.
    gflops = statistics.median(rates["ours"]) * 4 * plain["layer_weights"] / 1e9
    return {
        "base_model": setup.base_model,
        "batch_size": setup.batch_size,
        **{key: plain[key] for key in ("rows", "rows_with_equal_tokens", "useful_tokens")},
        "held_out_loss_before": losses["before"],
        "variants": {
            name: {
                "useful_tokens_per_second": spread(rates[name]),
                "examples_per_second": statistics.median(rates[name]) * setup.rows / measured[0]["useful_tokens"],
                "steps": measured[0]["steps"],
                **{f"peak_{key}": max(run["peak_memory"][key] for run in measured) for key in plain["peak_memory"]},
                "held_out_loss": losses[name],
            }
            for name, measured in runs.items()
        },
        "ours_over_plain": spread([ours / its for ours, its in zip(rates["ours"], rates["plain"], strict=True)]),
        "ours_gflops": gflops,
        "matmul_gflops": statistics.median(run["matmul_gflops"] for run in runs["plain"]),
    }


def spread(values: list[float]) -> dict:
    """Median, smallest, largest and all of the values."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": values}


def show_range(numbers: dict, digits: int) -> str:
    """The ends of a spread as text: 3.98 .. 4.20."""
    return f"{numbers['min']:,.{digits}f} .. {numbers['max']:,.{digits}f}"


def print_comparison(result: dict) -> None:
    """The comparison as a table on stdout, a measure a line."""
    variants = result["variants"].values()
    lines = [
        ("useful tokens/s, median", [f"{v['useful_tokens_per_second']['median']:,.1f}" for v in variants]),
        ("from .. to", [show_range(v["useful_tokens_per_second"], 1) for v in variants]),
        ("examples/s", [f"{v['examples_per_second']:.3f}" for v in variants]),
        ("peak memory, GB", [f"{v['peak_process_gb']:.2f}" for v in variants]),
        ("peak GPU memory, GB", [f"{v['peak_gpu_gb']:.2f}" for v in variants if "peak_gpu_gb" in v]),
        ("optimizer steps", [str(v["steps"]) for v in variants]),
        ("held-out loss after", [f"{v['held_out_loss']:.3f}" for v in variants]),
    ]
    rows, tokens, batch = (f"{result[key]:,}" for key in ("rows", "useful_tokens", "batch_size"))
    title = f"{result['base_model']}: {rows} rows, {tokens} tokens, batch {batch}"
    ratio, share = result["ours_over_plain"], result["ours_gflops"] / result["matmul_gflops"]
    notes = (
        f"ours / plain: {ratio['median']:.2f} times the useful tokens/s "
        f"(median; {show_range(ratio, 2)}; rounds: {len(ratio['rounds'])})",
        f"rows with the same token ids in both: {result['rows_with_equal_tokens']} of {result['rows']}",
        f"held-out loss before: {result['held_out_loss_before']:.3f}",
        f"ours: {result['ours_gflops']:,.1f} GFLOP/s (4 FLOPs a token and weight of the layers), "
        f"{share:.0%} of the {result['matmul_gflops']:,.0f} of a bf16 matmul",
    )
    filled = [(name, *cells) for name, cells in lines if cells]
    print_lines(title, ("", *result["variants"]), filled, notes)


def print_lines(title: str, head: tuple[str, ...], lines: list[tuple], notes: tuple[str, ...]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for n, name in enumerate(head):
        table.add_column(name, justify="right" if n else "left")
    for line in lines:
        table.add_row(*line)
    stdout = Console(highlight=False, soft_wrap=True)
    stdout.print(table)
    for note in notes:
        stdout.print(note, markup=False)


if __name__ == "__main__":
    sys.exit(console.run(main))
