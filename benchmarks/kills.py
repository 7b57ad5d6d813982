"""kill -9 at random moments, and two commands at once: nothing is lost, and the next run completes.

    python -m benchmarks.kills                        # 50 kills of each command, and every pair of commands: two hours
    python -m benchmarks.kills --only train --times 5

Each command is killed again and again, and from time to time may run to its end: then what it made is compared with
what a run made that nobody killed. A fault is a result that differs or was there before and is gone, and a traceback.
"""

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations_with_replacement
from pathlib import Path

from benchmarks import edges
from qlora.markdown import as_markdown_table

PROJECT = Path(__file__).resolve().parent.parent
CHAIN = 5  # kills before a run may end
WEIGHTS = "adapter_model.safetensors"
TRAIN, RAG = (str(PROJECT / script) for script in edges.SCRIPTS)


@dataclass(frozen=True)
class Task:
    """A command to kill. `made()` is what it made: equal after every whole run, and a part of that at any moment.

    `again` are the words of a run after a kill; `clear()` removes what was made. A kill comes within `latest` seconds.
    """

    words: tuple[str, ...]
    again: tuple[str, ...]
    made: Callable[[], dict[str, str]]
    clear: Callable[[], object]
    latest: float = math.inf


def start(words: tuple[str, ...]) -> subprocess.Popen:
    """The command in a session of its own, so that what it has started dies with it."""
    command = words if words[0] == "make" else (sys.executable, *words)
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def run(words: tuple[str, ...]) -> str:
    """What the command said. Raises AssertionError when it fails."""
    process = start(words)
    said, _ = process.communicate(timeout=1800)
    assert process.returncode in (0, 2, 3), f"exit {process.returncode}: {' '.join(words)}\n{said}"
    return said


def kill(words: tuple[str, ...], seconds: float) -> bool:
    """Whether the command was still running when it was killed."""
    process = start(words)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True
    return False


def kill_again_and_again(task: Task, times: int) -> dict:
    """Kills the task that often. Returns the number of kills, of whole runs in between, and the faults."""
    chance, faults = random.Random(), []
    task.clear()
    started = time.perf_counter()
    run(task.words)
    seconds, wanted = time.perf_counter() - started, task.made()
    assert wanted
    task.clear()
    killed = whole = 0
    while killed < times:
        before = {}
        for n in range(CHAIN):
            killed += kill(task.again if n else task.words, chance.uniform(0, min(seconds, task.latest)))
            there = task.made()
            if not before.items() <= there.items() or not there.items() <= wanted.items():
                faults.append(f"after kill {killed}: {sorted(there.items() ^ wanted.items())[:3]}")
            before = there
        try:
            said = run(task.again)
            if task.made() != wanted:
                faults.append(f"whole run {whole}: {sorted(task.made().items() ^ wanted.items())[:3]}\n{said[-600:]}")
        except AssertionError as error:
            faults.append(str(error))
        whole += 1
        print(f"{killed} kills, {whole} whole runs, {len(faults)} faults", file=sys.stderr, flush=True)
        task.clear()
    return {"kills": killed, "whole runs": whole, "seconds of one": f"{seconds:.1f}", "faults": faults}


# ------------------------------------------------------------------------------- tasks


def digest_files(folder: Path, *names: str) -> dict[str, str]:
    """Name -> sha256 of the files that are in the folder."""
    found = [folder / name for name in names]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in found if file.is_file()}


def read_answers(folder: Path) -> dict[str, str]:
    """Key -> answer of the whole lines of answers.jsonl, and the report without times once it is there."""
    answers, report = folder / "answers.jsonl", folder / "evaluation.json"
    lines = answers.read_text(encoding="utf-8").split("\n")[:-1] if answers.is_file() else []
    found = {line["key"]: line["answer"] for line in map(json.loads, lines)}
    if report.is_file():
        cells = json.loads(report.read_text(encoding="utf-8"))["cells"]
        found["report"] = json.dumps([{**cell, "seconds_median": 0} for cell in cells])
    return found


def read_collection(name: str) -> dict[str, str]:
    """Source -> fingerprint and number of passages, as `documents` lists them."""
    said = subprocess.run(
        [sys.executable, RAG, "documents", "--json", "--collection", name], capture_output=True, text=True, check=True
    )
    return {entry["source"]: f"{entry['fingerprint']} {entry['passages']}" for entry in json.loads(said.stdout)}


def remove(*paths: Path) -> None:
    """Removes folders, and what lies hidden beside them."""
    for path in paths:
        for one in (path, *path.parent.glob(f".{path.name}.*")):
            shutil.rmtree(one, ignore_errors=True) if one.is_dir() else one.unlink(missing_ok=True)


def make_tasks(folder: Path) -> dict[str, Task]:
    rows, base = edges.make_rows(folder / "rows"), edges.make_base(folder / "base")
    documents, adapter = folder / "documents", folder / "adapter"
    documents.mkdir()
    for n in range(60):
        (documents / f"{n}.md").write_text(f"# Part {n}\n\n" + f"Word {n} says a thing about otters. " * 200)
    questions = folder / "q.jsonl"
    lines = [{"question": f"What does word {n} say?", "answers": ["a thing"]} for n in range(40)]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    train = TRAIN, "--base-model", f"{base}", "--dataset", f"{rows}/rows.jsonl", "--distractors", "0", "--warmup", "0"
    train += "--learning-rate", "0.02", "--eval-answers", "0", "--max-steps", "12", "--save-steps", "1"
    run((*train, "--output", f"{adapter}"))
    run((RAG, "ingest", f"{documents}", "--collection", "kept"))
    ingest = RAG, "ingest", f"{documents}", "--collection", "killed"
    evaluate = RAG, "evaluate", "--adapter", f"{adapter}", "--questions", f"{questions}", "--collection", "kept"
    evaluate += "--max-new-tokens", "8", "--batch-size", "1", "--output", f"{folder}/evaluation"
    merge = *train, "--output", f"{adapter}", "--resume", "--merge", f"{folder}/merged"
    killed, merged, evaluation = folder / "killed", folder / "merged", folder / "evaluation"
    clone = folder / "clone"
    set_up = "make", "-C", f"{clone}", "setup"

    def clear_collection():
        if found := read_collection("killed"):
            run((RAG, "forget", *found, "--collection", "killed"))

    def clone_project():
        shutil.rmtree(clone, ignore_errors=True)
        subprocess.run(["git", "clone", "--quiet", str(PROJECT), str(clone)], check=True)

    def is_set_up() -> dict[str, str]:
        return {"ready": "yes"} if (clone / ".venv" / "ready").is_file() and works(clone) else {}

    return {
        "train": Task(
            (*train, "--output", f"{killed}"),
            (*train, "--output", f"{killed}", "--resume"),
            lambda: digest_files(killed, WEIGHTS, "adapter_config.json", "prompt.json"),
            lambda: remove(killed),
        ),
        "ingest": Task(ingest, ingest, lambda: read_collection("killed"), clear_collection),
        "evaluate": Task(evaluate, evaluate, lambda: read_answers(evaluation), lambda: remove(evaluation)),
        "merge": Task(
            merge, merge, lambda: digest_files(merged, "model.safetensors", "config.json"), lambda: remove(merged)
        ),
        "setup": Task(set_up, set_up, is_set_up, clone_project, latest=30),  # each goes on where the last one stopped
    }


def works(clone: Path) -> bool:
    """Whether every package of the clone's .venv imports, by two steps of training and an answer."""
    python, output = clone / ".venv" / "bin" / "python", clone / "smoke"
    shutil.rmtree(output, ignore_errors=True)
    words = "--max-rows", "24", "--max-steps", "2", "--eval-answers", "0", "--output", str(output)
    done = subprocess.run([python, "instruct_train_qlora.py", *words], cwd=clone, capture_output=True)
    return done.returncode == 0


# ------------------------------------------------------------------------------- two at once


def run_pairs(folder: Path) -> dict:
    """Every pair of commands at once on one output, adapter and collection: each ends with 0, 2 or 3, in words."""
    tasks = make_pairs(folder)
    faults, pairs = [], list(combinations_with_replacement(tasks, 2))
    for names in pairs:
        processes = [start(tasks[name]) for name in names]
        for name, process in zip(names, processes, strict=True):
            said, _ = process.communicate(timeout=600)
            if process.returncode not in (0, 2, 3) or "Traceback" in said:
                faults.append(f"{' + '.join(names)}: {name} ended with {process.returncode}\n{said[-1500:]}")
    return {"pairs": len(pairs), "faults": faults}


def make_pairs(folder: Path) -> dict[str, tuple[str, ...]]:
    """The commands, by name; they use what `make_tasks` made."""
    base, rows, adapter = folder / "base", folder / "rows" / "rows.jsonl", f"{folder}/adapter"
    train = TRAIN, "--base-model", f"{base}", "--dataset", f"{rows}", "--distractors", "0", "--warmup", "0"
    train += "--learning-rate", "0.02", "--eval-answers", "0", "--max-steps", "12", "--save-steps", "1"
    train += "--output", adapter
    there = "--collection", "pairs"
    model = "--adapter", adapter, "--max-new-tokens", "4"
    report = "--questions", f"{folder}/q.jsonl", "--output", f"{folder}/pair"
    return {
        "train": (*train, "--overwrite"),
        "merge": (*train, "--resume", "--merge", f"{folder}/merged twice"),
        "ingest": (RAG, "ingest", f"{folder}/documents", *there),
        "forget": (RAG, "forget", "0.md", "1.md", *there),
        "documents": (RAG, "documents", *there),
        "search": (RAG, "search", "What does word 7 say?", *there),
        "ask": (RAG, "ask", *model, "What does word 7 say?", *there),
        "evaluate": (RAG, "evaluate", *model, *report, *there),
        "sweep": (
            RAG,
            "sweep",
            "search=dense",
            "--questions",
            f"{folder}/q.jsonl",
            "--output",
            f"{folder}/pair",
            *there,
        ),
        "doctor": (RAG, "doctor", *there),
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=50, metavar="N", help="kills of each command (50)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="train, ingest, evaluate, merge, setup, pairs")
    args = parser.parse_args(argv)
    rows, faults = [["command", "kills", "whole runs", "seconds of one", "faults"]], []
    with tempfile.TemporaryDirectory(prefix="kills") as name:
        folder = Path(name)
        folder.chmod(0o755)  # for root's database server
        os.environ |= {"QLORA_DATA_DIR": f"{folder}/data", "HF_HUB_OFFLINE": "1"}
        tasks = make_tasks(folder)
        for each in args.only or [*tasks, "pairs"]:
            found = run_pairs(folder) if each == "pairs" else kill_again_and_again(tasks[each], args.times)
            rows.append([each, *(str(found.get(key, "")) for key in rows[0][1:4]), str(len(found["faults"]))])
            faults += [f"{each}: {fault}" for fault in found["faults"]]
            print(rows[-1], *found["faults"], sep="\n", file=sys.stderr, flush=True)
    print(as_markdown_table(rows))
    print("\n".join(faults))
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
