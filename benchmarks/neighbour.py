#!/usr/bin/env python
"""How much longer training and answering take beside a process that keeps one core busy.

    python benchmarks/neighbour.py                          # adapters/demo and the collection demo, after make demo
    python benchmarks/neighbour.py --rounds 5 --json

Each round times the scripts on the idle machine and beside the neighbour, in alternating order: a training's optimizer
step, the generation of an answer, and an answer of an evaluation's batches of eight.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from qlora import console

PROJECT = Path(__file__).resolve().parent.parent

BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"  # ends with this process, however it ends
QUESTIONS = ["Why do rowing gigs have right of way over nearly everything?", "Which form records a lost key?"] * 2
STEPS = 25


def main(argv: list[str]) -> int:
    args, problems = console.parse_arguments(build_parser(), argv)
    problems.raise_if_any()
    seconds = {name: {False: [], True: []} for name in TIMERS}
    for number in range(args.rounds):
        for is_busy in (False, True)[:: -1 if number % 2 else 1]:
            for name, timer in TIMERS.items():
                seconds[name][is_busy].append(beside_neighbour(timer, args) if is_busy else timer(args))
                console.note(
                    f"round {number + 1}, {name}, {'busy' if is_busy else 'idle'}: {seconds[name][is_busy][-1]:.2f} s"
                )
    found = {name: describe(times) for name, times in seconds.items()}
    print(json.dumps(found, indent=2) if args.json else make_table(found))
    return 0


def build_parser():
    title, _, text = __doc__.partition("\n\n")
    parser = console.Parser(usage="neighbour.py [flags]", description=title, epilog=text)
    parser.add_argument("--rounds", type=console.number(int, 1), default=3, help="of each")
    parser.add_argument("--adapter", default="adapters/demo", help="that answers")
    parser.add_argument("--collection", default="demo", help="that it answers from")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return parser


def beside_neighbour(timer, args) -> float:
    neighbour = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        return timer(args)
    finally:
        neighbour.kill()
        neighbour.wait()


# ------------------------------------------------------------------------------- time


def time_training(args) -> float:
    """Seconds a step."""
    with tempfile.TemporaryDirectory(prefix="neighbour-") as folder:
        words = ["--preset", "laptop", "--max-rows", 400, "--max-steps", STEPS, "--eval-answers", 0]
        run_script("instruct_train_qlora.py", *words, "--save-steps", STEPS, "--output", f"{folder}/adapter")
        result = json.loads(Path(folder, "adapter", "run.json").read_text())["result"]
    return result["train_seconds"] / STEPS


def time_answers(args) -> float:
    """Seconds of generating an answer, median."""
    asked = run_script("rag_qlora.py", "ask", *places(args), "--json", *QUESTIONS)
    return statistics.median(json.loads(line)["timings"]["generate_s"] for line in asked.splitlines())


def time_evaluation(args) -> float:
    """Seconds of a batch by its size, median."""
    with tempfile.TemporaryDirectory(prefix="neighbour-") as folder:
        words = ["--limit", 24, "--models", "tuned", "--contexts", "retrieved", "--output", folder, "--json"]
        run_script("rag_qlora.py", "evaluate", *places(args), *words)
        (cell,) = json.loads(Path(folder, "evaluation.json").read_text())["cells"]
    return cell["seconds_median"]


TIMERS = {"train": time_training, "ask": time_answers, "evaluate": time_evaluation}


def places(args) -> list[str]:
    return ["--adapter", args.adapter, "--collection", args.collection]


def run_script(*words) -> str:
    """What the script says on stdout. Raises UserError when it fails."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=PROJECT, capture_output=True, text=True)
    if done.returncode:
        raise console.fail(f"{words[0]} ended with exit code {done.returncode}", words[0], done.stderr[-500:])
    return done.stdout


# ------------------------------------------------------------------------------- report


def describe(times: dict[bool, list[float]]) -> dict:
    """Medians, and the ratio of each round's two times: median, smallest and largest."""
    ratios = sorted(busy / idle for idle, busy in zip(times[False], times[True], strict=True))
    spread = {"median": statistics.median(ratios), "min": ratios[0], "max": ratios[-1]}
    return {"idle": statistics.median(times[False]), "busy": statistics.median(times[True]), "busy_over_idle": spread}


def make_table(found: dict) -> str:
    lines = ["| | idle, s | beside a busy core, s | ratio |", "|---|--:|--:|--:|"]
    for name, each in found.items():
        ratio = each["busy_over_idle"]
        spread = f"{ratio['median']:.1f} ({ratio['min']:.1f} .. {ratio['max']:.1f})"
        lines.append(f"| {name} | {each['idle']:.2f} | {each['busy']:.2f} | {spread} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(console.run(main))
