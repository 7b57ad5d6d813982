#!/usr/bin/env python
"""Checks all of the GPU path on one card in eight minutes: right, how fast, how large, and what when things go wrong.

    python benchmarks/gpu_check.py                      # results.json, results.md and a log in gpu_check/
    python benchmarks/gpu_check.py --minutes 4          # the most valuable parts first, until the time is over
    python benchmarks/gpu_check.py --only decode merge
    python benchmarks/gpu_check.py --tiny               # everything on the CPU, with a tiny model, in two minutes

It runs what users run: instruct_train_qlora.py, what rag_qlora.py loads and answers with, and TRL's SFTTrainer beside
them; on the embedded model, and on random weights of Llama-2-7B's shape. Each part has its own time limit, and the
results are written after each. On a machine without a network: make gpu-wheels DIR=wheels elsewhere, and there
pip install --no-index --no-deps wheels/*.whl && PYTHONPATH=. python benchmarks/gpu_check.py
"""

import contextlib
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.gpu_bench import CARD, TINY, Bench, Measure
from qlora import console, settings

PROJECT = Path(__file__).resolve().parent.parent

MINUTES = 8
SLACK = 1.3  # of each part's share of the time: most parts need less
START = 120  # seconds that importing torch and starting CUDA may take
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "trl", "bitsandbytes", "datasets", "sentence-transformers")


@dataclass(frozen=True)
class Part:
    """A function of a module that takes a Bench, and about how many seconds it takes."""

    module: str
    function: str
    seconds: int


TRAINING, ANSWERING = "benchmarks.gpu_training", "benchmarks.gpu_answering"
PARTS = {  # the most valuable first
    "small": Part(TRAINING, "check_small", 60),
    "prepare": Part(TRAINING, "prepare", 15),
    "ours": Part(TRAINING, "train_ours", 55),
    "plain": Part(TRAINING, "train_plain", 40),
    "unshared": Part(TRAINING, "train_unshared", 50),
    "profile": Part(ANSWERING, "profile", 40),
    "decode": Part(ANSWERING, "time_answers", 75),
    "memory": Part(TRAINING, "check_memory", 110),
    "merge": Part(ANSWERING, "merge", 40),
    "ingest": Part(ANSWERING, "ingest", 45),
}


@dataclass(frozen=True)
class Outcome:
    """How a part went: pass, fail (a measure is not ok), error, out of time, or not run."""

    result: str
    seconds: float = 0.0
    measures: tuple[Measure, ...] = ()
    said: str = ""


def main(argv: list[str]) -> int:
    args, problems = console.parse_arguments(build_parser(), argv)
    for name in set(args.only) - set(PARTS):
        problems.add(f"there is no part {name}", "--only", f"give some of {', '.join(PARTS)}")
    problems.raise_if_any()
    names = [name for name in PARTS if not args.only or name in args.only]
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as work:
        bench = Bench(Path(work), args.output.resolve(), TINY if args.tiny else CARD)
        outcomes = run_parts(names, bench, args.minutes, PARTS)
    console.note(f"Results: {args.output / 'results.md'}, {args.output / 'results.json'}")
    return int(any(outcome.result != "pass" for outcome in outcomes.values()))


def build_parser():
    title, _, text = __doc__.partition("\n\n")
    parser = console.Parser(usage="gpu_check.py [flags]", description=title, epilog=text)
    flag = parser.add_argument
    flag("--only", nargs="+", default=[], metavar="PART", help=f"some of {', '.join(PARTS)}")
    flag("--minutes", type=console.number(float, 0, above=True), default=MINUTES, help="in all")
    flag("--tiny", action="store_true", help="everything on the CPU, with a tiny model")
    flag("--output", type=Path, default=Path("gpu_check"), help="folder for the results")
    return parser


# ------------------------------------------------------------------------------- parts in a process of their own


def run_parts(names: Sequence[str], bench: Bench, minutes: float, parts: dict[str, Part]) -> dict[str, Outcome]:
    """The outcome of every part, written down after each.

    After an error, a crash or a timeout the rest runs in a new process: CUDA does not recover in the old one.
    Raises UserError when the machine can't run them.
    """
    deadline = time.monotonic() + 60 * minutes
    stretch = SLACK * 60 * minutes / sum(parts[name].seconds for name in names)
    outcomes: dict[str, Outcome] = {}
    while waiting := [name for name in names if name not in outcomes]:
        with start_worker([parts[name] for name in waiting], bench) as ask:
            machine = ask(START)
            if isinstance(machine, list):
                raise console.UserError(*machine)
            if not outcomes:
                print_machine(machine)
            for name in waiting:
                limit = min(parts[name].seconds * stretch, deadline - time.monotonic())
                outcomes[name] = run_part(name, limit, ask)
                write_results(bench.output, machine, outcomes)
                if outcomes[name].result not in ("pass", "fail", "not run"):
                    break
    return outcomes


def run_part(name: str, limit: float, ask) -> Outcome:
    """What the worker says of its next part, within `limit` seconds."""
    if limit <= 0:
        outcome = Outcome("not run", said="no time was left")
    else:
        console.note(f"{name} (at most {limit:.0f} s)")
        outcome = ask(limit)
    if not isinstance(outcome, Outcome):
        outcome = Outcome("error", said="the process did not start")
    console.note(f"  {outcome.result}, {outcome.seconds:.0f} s {outcome.said}".rstrip())
    for measure in outcome.measures:
        if measure.ok is False:
            console.note(f"  {measure.name}: {show_value(measure)}, wanted: {measure.limit}")
    return outcome


@contextlib.contextmanager
def start_worker(parts: list[Part], bench: Bench) -> Iterator:
    """A function that waits so many seconds for what a new process says next, an Outcome when it says nothing."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=work, args=(parts, bench, theirs))
    process.start()
    theirs.close()

    def ask(seconds: float):
        if not ours.poll(seconds):
            return Outcome("out of time", seconds)
        try:
            return ours.recv()
        except EOFError:
            process.join()
            return Outcome("error", said=f"the process ended with exit code {process.exitcode}: see the log")

    try:
        yield ask
    finally:
        process.kill()
        process.join()


def work(parts: list[Part], bench: Bench, connection) -> None:
    """In the process: says what machine this is, or what is wrong with it, and then how each part went.

    Other output, of libraries and of the scripts, goes to the log.
    """
    log = os.open(bench.output / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if bench.is_tiny:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    settings.quieten_libraries()
    from qlora import machine

    try:
        if not bench.is_tiny:
            machine.check_gpu()
    except console.UserError as error:
        connection.send(list(error.problems))
        return
    connection.send(describe_machine(bench))
    for part in parts:
        outcome = run_here(part, bench)
        connection.send(outcome)
        if outcome.result == "error":
            return


def run_here(part: Part, bench: Bench) -> Outcome:
    started = time.perf_counter()
    try:
        measures = tuple(getattr(importlib.import_module(part.module), part.function)(bench))
    except Exception as error:  # of any kind: it is reported, and the other parts run
        traceback.print_exc()
        return Outcome("error", time.perf_counter() - started, said=f"{type(error).__name__}: {error}"[:300])
    failed = any(measure.ok is False for measure in measures)
    return Outcome("fail" if failed else "pass", time.perf_counter() - started, measures)


# ------------------------------------------------------------------------------- machine


def describe_machine(bench: Bench) -> dict:
    """Card, driver, processor and the versions of the libraries, as JSON keeps them."""
    import torch

    from qlora import machine

    found = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": f"{machine.processor()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {name: version for name in LIBRARIES if (version := find_version(name))},
        "optional": {name: find_version(name) for name in ("flash-attn", "liger-kernel")},
    }
    if bench.is_tiny:
        return {"card": "none (--tiny)", **found}
    sizes = torch.cuda.get_device_properties(0)
    card = {"card": sizes.name, "memory_gb": round(sizes.total_memory / 1e9, 1), "cuda": torch.version.cuda}
    return {
        **card,
        "capability": f"{sizes.major}.{sizes.minor}",
        "driver": machine.list_gpus()[0].split(",")[-1].strip(),
        **found,
    }


def find_version(name: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def print_machine(machine: dict) -> None:
    """The card, and each library's version with the pinned one where it is another."""
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", (PROJECT / "requirements.txt").read_text(encoding="utf-8"), re.M))
    console.note(", ".join(f"{name} {machine[name]}" for name in ("card", "driver", "cuda") if name in machine))
    console.note(f"{machine['processor']}, Python {machine['python']}")
    shown = []
    for name, version in machine["versions"].items():
        other = name in pins and version.partition("+")[0] != pins[name]
        shown.append(f"{name} {version}" + (f" (pinned: {pins[name]})" if other else ""))
    console.note(", ".join(shown))


# ------------------------------------------------------------------------------- results


def write_results(folder: Path, machine: dict, outcomes: dict[str, Outcome]) -> None:
    """Writes results.json and results.md anew."""
    values = {"machine": machine, "parts": {name: asdict(outcome) for name, outcome in outcomes.items()}}
    (folder / "results.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(make_tables(machine, outcomes), encoding="utf-8")


def make_tables(machine: dict, outcomes: dict[str, Outcome]) -> str:
    """Markdown: the machine, a line a part, and a line a measure."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    about = [f"{name} {machine[name]}" for name in ("card", "driver", "cuda", "python", "processor") if name in machine]
    lines = [", ".join([*about, versions]), "", "| Part | Result | Seconds | |", "|---|---|---|---|"]
    for name, outcome in outcomes.items():
        lines.append(f"| {name} | {outcome.result} | {outcome.seconds:.0f} | {escape(outcome.said)} |")
    lines += ["", "| Part | Measure | Value | Wanted | |", "|---|---|---|---|---|"]
    for name, outcome in outcomes.items():
        for measure in outcome.measures:
            ok = {True: "pass", False: "fail", None: ""}[measure.ok]
            lines.append(
                f"| {name} | {escape(measure.name)} | {escape(show_value(measure))} | {measure.limit} | {ok} |"
            )
    return "\n".join(lines) + "\n"


def show_value(measure: Measure) -> str:
    """The value with its unit: 1,579 tokens/s, 7.52 GB, 0.0031."""
    value = measure.value
    if isinstance(value, float):
        value = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value} {measure.unit}".strip()


def escape(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


if __name__ == "__main__":
    sys.exit(console.run(main))
