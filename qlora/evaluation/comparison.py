"""Paired differences with bootstrap intervals, the verdict, the refusal threshold, and two runs side by side."""

import json
from collections.abc import Sequence
from pathlib import Path

from qlora.console import fail

MODELS = ("base", "tuned")
CONTEXTS = ("closed-book", "retrieved", "oracle")
METRICS = {"f1": "F1", "overall_f1": "overall F1"}
DRAWS = 10_000  # bootstrap samples: the third decimal of a 95 % bound is stable


def paired_bootstrap(left: Sequence[float], right: Sequence[float], seed: int) -> dict:
    """Mean of left - right with its 95 % percentile interval over resampled questions."""
    import numpy

    differences = numpy.asarray(left, dtype=float) - numpy.asarray(right, dtype=float)
    draws = numpy.random.default_rng(seed).integers(0, len(differences), (DRAWS, len(differences)))
    low, high = numpy.percentile(differences[draws].mean(axis=1), [2.5, 97.5])
    return {
        "mean": round(float(differences.mean()), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
        "n": len(differences),
    }


def compare_cells(cells: dict[tuple[str, str], list[dict]], seed: int) -> list[dict]:
    """The paired F1 differences tuned - base per context, and retrieved - closed-book per model."""

    def values(key: tuple[str, str]) -> list[float]:
        return [score["f1"] for score in cells[key] if score["f1"] is not None]

    pairs = [("tuned - base", context, ("tuned", context), ("base", context)) for context in CONTEXTS]
    pairs += [("retrieved - closed-book", model, (model, "retrieved"), (model, "closed-book")) for model in MODELS]
    return [
        {"what": what, "of": of, "metric": "f1", **paired_bootstrap(values(left), values(right), seed)}
        for what, of, left, right in pairs
        if left in cells and right in cells and values(left)
    ]


def describe_interval(difference: dict, metric: bool = True) -> str:
    """`+0.31 F1 [0.24, 0.38], n=80`; without `metric` its name is left out."""
    name = f" {METRICS[difference['metric']]}" if metric else ""
    return f"{difference['mean']:+.2f}{name} [{difference['low']:.2f}, {difference['high']:.2f}], n={difference['n']}"


def give_verdict(differences: Sequence[dict]) -> str:
    """One line on whether the tuned model answers better from retrieved passages."""
    found = next((d for d in differences if (d["what"], d["of"]) == ("tuned - base", "retrieved")), None)
    if found is None:
        return "only one model: nothing to compare"
    numbers = describe_interval(found)
    if found["low"] > 0:
        return f"tuned answers better: {numbers}"
    if found["high"] < 0:
        return f"tuned answers worse, keep the base: {numbers}"
    return f"no evidence that tuned answers better: {numbers}"


# ------------------------------------------------------------------------------- refusal threshold


def split_halves(scores: Sequence[dict]) -> tuple[list[int], list[int]]:
    """The numbers of the questions to fit on and to report on, with equal shares of unanswerable ones."""
    ordered = sorted(range(len(scores)), key=lambda n: scores[n]["answerable"])
    return sorted(ordered[::2]), sorted(ordered[1::2])


# ------------------------------------------------------------------------------- two runs


def read_run(report: Path) -> dict[tuple, dict]:
    """(model, context, question, answers) -> scores, from the answers.jsonl beside an evaluation.json."""
    answers = report.parent / "answers.jsonl"
    if not (report.is_file() and answers.is_file()):
        raise fail("no evaluation there", str(report), "name an evaluation.json that has its answers.jsonl beside it")
    try:
        return {
            (line["model"], line["context"], line["question"], tuple(line["answers"])): line["scores"]
            for line in read_answers(answers)
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise fail(f"damaged answers ({error})", str(answers), "evaluate again") from error


def read_answers(path: Path) -> list[dict]:
    """The lines of an answers.jsonl that the report beside it is about."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return [line for line in lines if line.get("asked", True)]


def compare_runs(first: Path, second: Path, seed: int) -> list[dict]:
    """first - second in F1 and overall F1 for every cell that both have, over the questions that both have.

    Raises UserError when they share no question.
    """
    left, right = read_run(first), read_run(second)
    rows = []
    for cell in [(model, context) for model in MODELS for context in CONTEXTS]:
        for metric in METRICS:
            keys = [key for key in left if key[:2] == cell and key in right and left[key].get(metric) is not None]
            if keys:
                values = [[run[key][metric] for key in keys] for run in (left, right)]
                means = [round(sum(part) / len(part), 4) for part in values]
                row = {"model": cell[0], "context": cell[1], "metric": metric, "first": means[0], "second": means[1]}
                rows.append({**row, **paired_bootstrap(*values, seed)})
    if not rows:
        raise fail("the two runs share no question", f"{first}, {second}", "compare runs over the same questions")
    return rows
