"""The files of an evaluation: evaluation.json, evaluation.md, evaluation.png, and answers.jsonl.

    python -m qlora.evaluation.report docs/measurements.md README.md evaluations/demo evaluations/second

puts table, picture and answers of the first folder into docs/measurements.md, and its verdict into README.md; into both
one line per folder.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from qlora.console import UserError, fail, note, run
from qlora.evaluation.comparison import METRICS, MODELS, describe_interval, read_answers
from qlora.machine import write_whole
from qlora.markdown import as_markdown_table, put_section

CELL_COLUMNS = {  # key in a cell -> heading of the table
    "em": "exact match",
    "f1": "F1",
    "overall_f1": "overall F1",
    "refusal_precision": "refusal P",
    "refusal_recall": "refusal R",
    "refusal_f1": "refusal F1",
    "citation_precision": "citation P",
    "citation_recall": "citation R",
    "faithfulness": "in context",
    "words_mean": "words",
    "seconds_median": "seconds",
}
PICTURE = "evaluation.png"


class AnswerLog:
    """answers.jsonl: one line per answer, written at once, so that a stopped evaluation continues where it was.

    Nothing is ever deleted: after those of the report come the other answers, with `"asked": false`. They were given
    with other settings (adapter, prompt, top-k), or to questions that a smaller run left out.
    """

    def __init__(self, path: Path, settings: dict):
        self.path = path
        self.settings = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        if path.exists() and not path.is_file():
            raise fail("not a file", str(path), "remove it, or give another --output")
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
        self.known = {line["key"]: line for line in map(read_line, lines) if line.get("key")}

    def key(self, *parts) -> str:
        """The key of an answer: a digest of everything that it depends on."""
        return hashlib.sha256(json.dumps([self.settings, *parts]).encode()).hexdigest()[:16]

    def add(self, key: str, record: dict) -> None:
        self.known[key] = {"key": key, "settings": self.settings, **record}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.known[key], ensure_ascii=False) + "\n")

    def close(self, asked: Iterable[tuple[str, str]]) -> None:
        """Rewrites the file with the answers of these (key, context), in this order, and then all others."""
        asked = list(asked)
        answers = [self.known[key] | {"context": context, "asked": True} for key, context in asked]
        others = self.known.keys() - {key for key, _ in asked}
        answers += [line | {"asked": False} for key, line in self.known.items() if key in others]
        lines = [json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers]
        write_whole(self.path, "".join(lines))


def read_line(line: str) -> dict:
    """A logged answer, or nothing when the line was cut off by a kill."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def write_report(folder: Path, report: dict) -> None:
    """Writes evaluation.json, evaluation.md and evaluation.png."""
    write_whole(folder / "evaluation.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    write_whole(folder / "evaluation.md", as_markdown(report))
    plot_cells(report, folder / PICTURE)


def show(value: float | None) -> str:
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.2f}"


def table_rows(report: dict) -> list[list[str]]:
    """Headings, then one row per cell."""
    rows = [["model", "context", *CELL_COLUMNS.values()]]
    return rows + [
        [cell["model"], cell["context"], *(show(cell[key]) for key in CELL_COLUMNS)] for cell in report["cells"]
    ]


def describe_difference(difference: dict) -> str:
    """`tuned - base, retrieved: +0.31 F1 [0.24, 0.38], n=80`"""
    return f"{difference['what']}, {difference['of']}: {describe_interval(difference)}"


def describe_retrieval(report: dict) -> str:
    metrics = ", ".join(f"{key} {value:.2f}" for key, value in report["retrieval"].items() if isinstance(value, float))
    return f"Retrieval: {metrics or 'no answerable question'}"


def describe_calibration(report: dict) -> list[str]:
    """The result of a calibration in one or two sentences; empty without one."""
    found = report.get("calibration")
    if not found:
        return []
    fitted = f"fitted on {found['fitted_on']} questions"
    if found["threshold"] is None:
        return [f"Refusal threshold: none, since none improves overall F1 ({fitted}). All questions go to the model."]
    before, after = show(found["without"]["refusal_f1"]), show(found["with"]["refusal_f1"])
    return [
        f"Refusal threshold: {found['threshold']:.3f} ({fitted}), now stored with the collection. On the other "
        f"{found['reported_on']}: refusal F1 {before} -> {after}, {describe_interval(found['difference'])}."
    ]


def describe_confidence(report: dict) -> list[str]:
    """How far the confidence of answers can be trusted; empty where they have none."""
    if not (found := report.get("confidence")):
        return []
    half = [risk for coverage, risk in found["risk_coverage"] if coverage <= 0.5]
    surest = f"; mean F1 of the surest half of the questions {1 - half[-1]:.2f}" if half else ""
    return [f"Confidence of {found['answers']} answers: calibration error {found['calibration_error']:.2f}{surest}"]


def describe_findings(report: dict) -> list[str]:
    """Retrieval, calibration, confidence and differences, one per line."""
    differences = [describe_difference(difference) for difference in report["differences"]]
    return [describe_retrieval(report), *describe_calibration(report), *describe_confidence(report), *differences]


def verdict(report: dict) -> str:
    return report["verdict"][0].upper() + report["verdict"][1:]


def as_text_table(rows: list[list[str]]) -> str:
    """Rows, the first of them headings, for a terminal; the first column aligned left."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, heading in enumerate(rows[0]):
        table.add_column(heading, justify="right" if number else "left")
    for row in rows[1:]:
        table.add_row(*row)
    console = Console(highlight=False)
    with console.capture() as text:
        console.print(table)
    return text.get().rstrip()


def as_markdown(report: dict) -> str:
    """The verdict, the table and the findings as Markdown."""
    return "\n".join(
        [
            f"**{verdict(report)}**",
            "",
            as_markdown_table(table_rows(report), left=2),
            "",
            f"{report['questions']} questions, {report['answerable']} of them answerable. P is precision, R recall. "
            "Exact match, F1 and citations are over the answerable ones; overall F1 counts a refusal of another one as "
            "right, as SQuAD 2.0 does. Intervals: paired bootstrap, 95 %.",
            "",
            *(f"* {finding}" for finding in describe_findings(report)),
            "",
        ]
    )


def as_text(report: dict) -> str:
    """The table with one metric per line (so that it fits 80 columns), the findings and the verdict."""
    models, *rows = zip(*table_rows(report), strict=True)
    contexts, *metrics = rows
    headings = ["", *(f"{model}\n{context}" for model, context in zip(models[1:], contexts[1:], strict=True))]
    table = as_text_table([headings, *map(list, metrics)])
    return "\n".join([table, "", *describe_findings(report), "", verdict(report)])


def comparison_as_text(rows: list[dict], first: Path, second: Path) -> str:
    """One line per cell and metric: both means, and first - second with its interval."""
    table = [["", "first", "second", "first - second"]]
    for row in rows:
        numbers = [show(row["first"]), show(row["second"]), describe_interval(row, metric=False)]
        table.append([f"{row['model']}, {row['context']}, {METRICS[row['metric']]}", *numbers])
    return f"first:  {first}\nsecond: {second}\n{as_text_table(table)}"


def describe_answers(folder: Path) -> str:
    """A Markdown table of three answers from retrieved passages, each the first of its kind in the file.

    One that is right, one that is wrong, and one to a question without an answer, all of the tuned model.
    """
    lines = read_answers(folder / "answers.jsonl")
    given = {(line["model"], line["question"]): line for line in lines if line["context"] == "retrieved"}
    tuned = [line for (model, _), line in given.items() if model == "tuned"]
    kinds = (lambda s: s["f1"] == 1, lambda s: s["f1"] == 0, lambda s: not s["answerable"])
    chosen = [next((line for line in tuned if is_kind(line["scores"])), None) for is_kind in kinds]
    rows = [["question", "right answer", "base", "tuned"]]
    for line in filter(None, chosen):
        right = line["answers"][0] if line["answers"] else "(not in the documents)"
        row = line["question"], right, given["base", line["question"]]["answer"], line["answer"]
        rows.append([" ".join(cell.replace("|", "\\|").split()) for cell in row])
    return as_markdown_table(rows, left=4)


def compare_files(folders: Iterable[Path]) -> str:
    """A Markdown table with one line per evaluation: base and tuned model on its questions."""
    keys = "refusal_f1", "citation_precision"
    rows = [["questions", "number", "answerable", "base F1", "tuned F1", "refusal F1", "citation P", "recall@3"]]
    for folder in folders:
        report = read_report(folder)
        cells = {cell["model"]: cell for cell in report["cells"] if cell["context"] == "retrieved"}
        if cells.keys() < set(MODELS):
            what = f"the evaluation has no retrieved answers of the {' and '.join(set(MODELS) - cells.keys())} model"
            raise fail(what, str(folder), "evaluate both models: python rag_qlora.py evaluate --adapter FOLDER")
        base, tuned = (cells[model] for model in MODELS)
        values = [report["questions"], report["answerable"], base["f1"], tuned["f1"], *(tuned[key] for key in keys)]
        name = Path(report["settings"]["questions"]).name
        rows.append([f"`{name}`", *map(show, [*values, report["retrieval"]["recall@3"]])])
    return as_markdown_table(rows)


def put_evaluation(page: Path, folder: Path, picture: Path, details: str = "") -> None:
    """Puts table and picture of an evaluation, and details, into a page, and replaces older ones."""
    shutil.copyfile(folder / PICTURE, picture)
    link = f"![F1 of every model and context]({os.path.relpath(picture, page.parent)})"
    table = (folder / "evaluation.md").read_text(encoding="utf-8")
    put_section(page, "evaluation", f"{link}\n\n{table}{details}".rstrip(), "Evaluation")


def put_into_card(adapter: Path, folder: Path) -> None:
    """Puts an evaluation into the adapter's README.md; reports when that is missing or cannot be written."""
    try:
        put_evaluation(adapter / "README.md", folder, adapter / PICTURE)
    except (OSError, UserError) as error:
        note(f"{adapter / 'README.md'} does not show this evaluation: {error}")


def put_proof(page: Path, folders: Sequence[Path]) -> None:
    """Puts the verdict of the first evaluation, and one line per evaluation, into a page."""
    report = read_report(folders[0])
    put_section(page, "proof", f"**{verdict(report)}**\n\n{compare_files(folders)}")


def plot_cells(report: dict, picture: Path) -> None:
    """Draws F1 of every cell with its 95 % interval as bars, and beside it the risk of answers by their confidence."""
    from matplotlib.figure import Figure

    sure = report.get("confidence")
    figure = Figure(figsize=(9.6 if sure else 6.4, 3.6), dpi=100, layout="constrained")
    axes, *more = figure.subplots(1, 1 + bool(sure), squeeze=False, width_ratios=[2, 1][: 1 + bool(sure)])[0]
    if sure:
        plot_risk(more[0], sure["risk_coverage"])
    contexts = list(dict.fromkeys(cell["context"] for cell in report["cells"]))
    models = list(dict.fromkeys(cell["model"] for cell in report["cells"]))
    for number, (model, colour) in enumerate(zip(models, ("#9aa5b1", "#1f77b4"), strict=False)):
        cells = [cell for cell in report["cells"] if cell["model"] == model]
        places = [contexts.index(cell["context"]) + (number - (len(models) - 1) / 2) * 0.38 for cell in cells]
        heights = [cell["f1"] or 0 for cell in cells]
        bounds = [(cell["f1_low"] or 0, cell["f1_high"] or 0) for cell in cells]
        margins = [(height - low, high - height) for height, (low, high) in zip(heights, bounds, strict=True)]
        spread = list(zip(*margins, strict=True))
        bars = axes.bar(places, heights, 0.36, yerr=spread, capsize=3, color=colour, label=model)
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=9)
    axes.set(ylabel="token F1", ylim=(0, 1), xticks=range(len(contexts)), xticklabels=contexts)
    axes.set_title(f"n={report['answerable']} answerable questions, 95 % intervals", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(picture)


def plot_risk(axes, curve: Sequence[Sequence[float]]) -> None:
    """Draws the risk of the surest answers against their share of all questions."""
    axes.plot(*zip(*curve, strict=True), color="#1f77b4", linewidth=1.5)
    axes.set(xlabel="share of questions answered", ylabel="risk: 1 - F1", xlim=(0, 1), ylim=(0, 1))
    axes.set_title("surest answers first", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)


def read_report(folder: Path) -> dict:
    """evaluation.json of a folder. Raises UserError without one."""
    try:
        return json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise fail(f"no evaluation there ({error})", str(folder), "name a folder that evaluate wrote") from error


def main(argv: list[str]) -> None:
    """Writes the evaluations of some folders into a page of measurements, and their proof into the README."""
    if len(argv) < 3:
        raise fail("expected two pages and at least one folder", "command line", "PAGE README FOLDER ...")
    measurements, readme, *folders = map(Path, argv)
    details = f"\n{compare_files(folders)}\n\n{describe_answers(folders[0])}"
    put_evaluation(measurements, folders[0], readme.parent / PICTURE, details)
    put_proof(readme, folders)


if __name__ == "__main__":
    sys.exit(run(main))
