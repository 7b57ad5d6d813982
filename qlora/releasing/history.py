"""What a release changed, for people: the table, ten answers, and the scores of every release so far.

write_report(folder, adapter, comparisons, decision)     # improve.md and improve.png, from releases.jsonl
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora.evaluation import gate
from qlora.evaluation.report import read_report, show
from qlora.machine import write_whole
from qlora.markdown import as_markdown_table

SCORES = {"overall_f1": "overall F1", "f1": "F1", "refusal_f1": "refusal F1", "citation_precision": "citation P"}
SHOWN = 5  # answers that got better, and as many that got worse
LEGEND = (
    "Overall F1 is 1 for a right refusal. Where the interval of new - old contains 0, it shows no difference. "
    "Questions that were fed back were answered wrongly before: any other adapter gains there. The old "
    "questions are the proof."
)
LOG, PICTURE = "releases.jsonl", "improve.png"


@dataclass(frozen=True)
class Comparison:
    """The evaluations of the new and the old adapter on the same questions, and the gate's result."""

    name: str
    new: Path
    old: Path
    result: dict


def read_scores(folder: Path) -> dict:
    """The scores of the cell that the gate judges."""
    cells = read_report(folder)["cells"]
    return next(cell for cell in cells if (cell["model"], cell["context"]) == gate.CELL)


def read_releases(folder: Path) -> list[dict]:
    """The lines of releases.jsonl, the oldest first."""
    path = folder / LOG
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def last_release(folder: Path) -> dict:
    """The youngest of them; empty where there is none."""
    return (read_releases(folder) or [{}])[-1]


def note_release(folder: Path, comparisons: Sequence[Comparison], about: dict) -> None:
    """Adds a line to releases.jsonl, in place of the same adapter's; the first time also one for the old adapter."""
    releases = read_releases(folder) or [{"when": "", **scores_of(comparisons, "old")}]
    releases = [one for one in releases if one.get("adapter") != about["adapter"]]
    releases.append({**about, **scores_of(comparisons, "new")})
    write_whole(folder / LOG, "".join(json.dumps(one) + "\n" for one in releases))


def scores_of(comparisons: Sequence[Comparison], side: str) -> dict:
    found = {one.name: read_scores(getattr(one, side)) for one in comparisons}
    return {name: {score: cell[score] for score in SCORES} for name, cell in found.items()}


def write_report(folder: Path, adapter: str, comparisons: Sequence[Comparison], decision: str) -> None:
    """Writes improve.md, and the picture of all releases where there is more than one."""
    decided = f"**{decision[0].upper()}{decision[1:]}.**"
    parts = [f"# A new adapter for {adapter}", decided, compare_scores(comparisons), LEGEND]
    for one in comparisons:
        parts += [f"## Answers that changed: {one.name}", describe_changes(one)]
    releases = read_releases(folder)
    if len(releases) > 1:
        draw_releases(releases, folder / PICTURE)
        parts += ["## Releases", f"![Scores of every release]({PICTURE})"]
    write_whole(folder / "improve.md", "\n\n".join(parts) + "\n")


def compare_scores(comparisons: Sequence[Comparison]) -> str:
    """A table with a line per file of questions."""
    rows = [["questions", "number", *(f"{name}, {side}" for name in SCORES.values() for side in ("old", "new"))]]
    rows[0].append("overall F1, new - old")
    for one in comparisons:
        old, new = read_scores(one.old), read_scores(one.new)
        scores = [show(cell[name]) for name in SCORES for cell in (old, new)]
        rows.append([one.name, str(one.result["n"]), *scores, gate.describe_interval(one.result, metric=False)])
    return as_markdown_table(rows)


def describe_changes(one: Comparison) -> str:
    """A table of the answers that changed most: the worse ones first."""
    new, old = (gate.read_cell(folder / "evaluation.json") for folder in (one.new, one.old))
    pairs = [(new[key], old[key]) for key in new if key in old]
    gains = sorted(pairs, key=lambda pair: pair[0]["scores"][gate.METRIC] - pair[1]["scores"][gate.METRIC])
    worse = [pair for pair in gains if pair[0]["scores"][gate.METRIC] < pair[1]["scores"][gate.METRIC]]
    better = [pair for pair in reversed(gains) if pair[0]["scores"][gate.METRIC] > pair[1]["scores"][gate.METRIC]]
    rows = [["", "question", "right answer", "old", "new"]]
    for how, chosen in (("worse", worse[:SHOWN]), ("better", better[:SHOWN])):
        for after, before in chosen:
            right = after["answers"][0] if after["answers"] else "(not in the documents)"
            cells = how, after["question"], right, before["answer"], after["answer"]
            rows.append([" ".join(cell.replace("|", "\\|").split()) for cell in cells])
    counts = f"{len(better)} answers are better, {len(worse)} worse, of {len(pairs)}."
    return f"{counts}\n\n{as_markdown_table(rows, left=5)}" if len(rows) > 1 else counts


def draw_releases(releases: Sequence[dict], picture: Path) -> None:
    """The scores of every release, a panel per file of questions."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for one in releases for name in one if isinstance(one[name], dict)))
    figure = Figure(figsize=(4.8 * len(names), 3.6), dpi=100, layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for color, score in enumerate(("f1", "refusal_f1", "citation_precision")):
            known = [(n, one[name][score]) for n, one in enumerate(releases) if name in one]
            points = [point for point in known if point[1] is not None]
            if points:
                axes.plot(*zip(*points, strict=True), "o-", color=f"C{color}", label=SCORES[score])
        labels = [one["when"][:10] or "before" for one in releases]
        axes.set(ylim=(0, 1.03), xticks=range(len(releases)), xticklabels=labels)
        axes.set_title(name, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(picture)
