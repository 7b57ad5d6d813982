"""Trials of a recipe: train, evaluate, and a line in benchmarks/runs.jsonl, which holds every trial that was ever run.

A trial is its flags, its seed and its data. A trial in the log is not run again, and an existing adapter
is not trained again.
"""

import hashlib
import json
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from qlora import console, presets
from qlora.evaluation.report import as_text_table, show
from qlora.training.row_filters import hold_out
from qlora.training.rows import load_rows

PROJECT = Path(__file__).resolve().parent.parent

ADAPTERS = PROJECT / "adapters"
LOG = PROJECT / "benchmarks" / "runs.jsonl"
SAMPLE = presets.SAMPLE_DATA
DOCUMENTS = SAMPLE / "documents"
INGEST = ("passage-tokens", "overlap")  # what a collection depends on
UNTRAINED = ("drop_headings",)  # parts of the scripts that training does not use
ANSWER = ("top-k", "search", "fetch-k", "diversity", "refusal-bias", "limit", "rerank")
SCORES = ("em", "f1", "refusal_precision", "refusal_recall", "refusal_f1", "citation_precision", "overall_f1")


@dataclass(frozen=True)
class Data:
    """What a trial trains on and is judged by."""

    name: str
    rows: Path
    questions: Path
    documents: Path

    def describe(self) -> dict[str, str]:
        return {"name": self.name, "rows": digest(self.rows), "questions": digest(self.questions)}


@dataclass(frozen=True)
class Trial:
    """A recipe by its flags, as far as they are not the preset's."""

    data: Data
    flags: dict[str, str] = field(default_factory=dict)
    seed: int = 0
    without: str = ""  # a function of benchmarks/ablation.py that takes a part of the scripts away

    def select(self, *names: str) -> dict[str, str]:
        return {name: value for name, value in self.flags.items() if name in names}

    @property
    def training(self) -> dict:
        """What its adapter differs in."""
        flags = {name: value for name, value in self.flags.items() if name not in (*INGEST, *ANSWER)}
        return {"flags": flags, "without": "" if self.without in UNTRAINED else self.without}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def run_trial(trial: Trial) -> dict:
    """The trial's line of the log: trained and evaluated now, unless it stands there."""
    described = {"data": trial.data.describe(), "flags": trial.flags, "seed": trial.seed, "without": trial.without}
    key = name_of(described)
    if key in (known := read_log()):
        return known[key]
    ADAPTERS.mkdir(exist_ok=True)
    folder, collection = places(trial)
    if not (folder / "run.json").exists():
        run_script(trial, "instruct_train_qlora", folder, train_words(trial, folder))
    flags = as_words(trial.select(*INGEST))
    run_script(trial, "rag_qlora", folder, ["ingest", trial.data.documents, "--collection", collection, *flags])
    fit(trial, folder, collection)
    output = folder / f"evaluation-{key}"
    words = ["evaluate", "--questions", trial.data.questions, "--collection", collection, "--adapter", folder]
    words += ["--models", "tuned", "--contexts", "retrieved", "oracle", "--output", output]
    words += as_words({"rerank": "none"} | trial.select(*ANSWER))
    run_script(trial, "rag_qlora", folder, words)
    record = {"key": key, **described, **read_results(folder, output)}
    with LOG.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    return record


def places(trial: Trial) -> tuple[Path, str]:
    """The adapter's folder and the collection of a trial; others with the same training or documents have the same."""
    described = {"data": trial.data.describe(), "flags": trial.flags, "seed": trial.seed, "without": trial.without}
    folder = ADAPTERS / f"trial-{name_of([described | trial.training])}"
    return folder, f"trial-{trial.data.name}-{name_of([trial.select(*INGEST), trial.without])}"


def fit(trial: Trial, folder: Path, collection: str) -> None:
    """Fits the trial's ranking, where it has one; the adapter keeps one at a time."""
    name, path = trial.flags.get("rerank", "none"), folder / "ranking.json"
    if name != "none" and not (path.exists() and json.loads(path.read_text())["rerank"] == name):
        words = ["fit", "--rerank", name, "--adapter", folder, "--collection", collection]
        run_script(trial, "rag_qlora", folder, words)


def train_words(trial: Trial, folder: Path) -> list:
    fixed = {"preset": "laptop", "dataset": trial.data.rows, "output": folder, "seed": trial.seed, "eval-answers": 0}
    return ["--overwrite", *as_words(fixed | trial.training["flags"])]


def as_words(flags: dict) -> list[str]:
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


def name_of(described) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:12]


def run_script(trial: Trial, script: str, folder: Path, words: list) -> None:
    """Runs a script of the project, its output in a log beside the adapter folder; ends with its code if it fails."""
    log = folder.with_suffix(".log")
    program = PROJECT / f"{script}.py"
    part = [PROJECT / "benchmarks" / "ablation.py", "--run", trial.without, script] if trial.without else [program]
    with log.open("a", encoding="utf-8") as file:
        command = [sys.executable, *map(str, [*part, *words])]
        code = subprocess.run(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, cwd=PROJECT).returncode
    if code:
        sys.stderr.write(log.read_text(encoding="utf-8", errors="replace")[-4000:])
        raise SystemExit(max(code, 1))


def read_results(folder: Path, output: Path) -> dict:
    """What training and evaluation measured."""
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    report = json.loads((output / "evaluation.json").read_text(encoding="utf-8"))
    cells = {f"{cell['model']} {cell['context']}": {name: cell[name] for name in SCORES} for cell in report["cells"]}
    return {
        "commit": run["git_commit"],
        "questions": report["questions"],
        "training_rows": run["dataset"]["training_rows"],
        "train_seconds": run["result"]["train_seconds"],
        "eval_loss": run["result"]["eval_loss_after"],
        "refusal_bias": run["result"]["refusal_bias"],
        "recall@1": report["retrieval"]["recall@1"],
        "recall@3": report["retrieval"]["recall@3"],
        "calibration_error": report.get("confidence", {}).get("calibration_error"),
        "cells": cells,
    }


def read_log() -> dict[str, dict]:
    lines = LOG.read_text(encoding="utf-8").splitlines() if LOG.exists() else []
    return {record["key"]: record for record in map(json.loads, lines)}


def show_table(title: str, rows: list[tuple[str, dict]]) -> None:
    """One line a trial on stdout: what it differs in, and its scores from retrieved and oracle passages."""
    heads = ["", "F1", "oracle", "refusal P", "R", "F1", "citation P", "recall@3", "loss", "minutes"]
    lines = []
    for name, record in rows:
        found, oracle = record["cells"]["tuned retrieved"], record["cells"]["tuned oracle"]
        values = [found["f1"], oracle["f1"], *(found[key] for key in SCORES[2:6]), record["recall@3"]]
        lines.append([name, *map(show, [*values, record["eval_loss"], record["train_seconds"] / 60])])
    print(f"{title}\n{as_text_table([heads, *lines])}")


def split_data(name: str, dataset: Path, documents: Path, folder: Path, share: float = 0.25) -> Data:
    """Training rows, and questions on documents of the same rows that are not trained on, as files in `folder`."""

    rows = load_rows(str(dataset))
    training, validation = hold_out(rows, share, seed=1)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for part, chosen in (("rows", training), ("questions", validation)):
        paths.append(folder / f"{name}-{part}.jsonl")
        lines = [json.dumps({key: value for key, value in asdict(row).items() if key != "passages"}) for row in chosen]
        paths[-1].write_text("\n".join(lines) + "\n", encoding="utf-8")
    console.note(f"{name}: {len(training)} rows to train on, {len(validation)} questions on other documents of theirs")
    return Data(name, *paths, documents)
