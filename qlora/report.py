"""What an evaluation leaves: evaluation.json, evaluation.md, evaluation.png, and answers.jsonl as it goes."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

COLUMNS = {  # key in a cell -> heading of the table
    "em": "exact match",
    "f1": "F1",
    "refusal_precision": "refusal precision",
    "refusal_recall": "refusal recall",
    "refusal_f1": "refusal F1",
    "citation_precision": "citation precision",
    "citation_recall": "citation recall",
    "faithfulness": "in context",
    "words_mean": "words",
    "seconds_median": "s an answer",
}


class AnswerLog:
    """answers.jsonl: one line an answer, kept as it comes, so that a stopped evaluation goes on where it was.

    Lines of other settings (another adapter, prompt, collection, top-k) are dropped when the log is closed.
    """

    def __init__(self, path: Path, settings: dict):
        self.path = path
        self.settings = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        self.known = {line["key"]: line for line in map(read_line, lines) if line.get("settings") == self.settings}

    def key(self, *parts) -> str:
        """Names an answer by everything it depends on."""
        return hashlib.sha256(json.dumps([self.settings, *parts]).encode()).hexdigest()[:16]

    def add(self, key: str, record: dict) -> None:
        self.known[key] = {"key": key, "settings": self.settings, **record}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.known[key], ensure_ascii=False) + "\n")

    def close(self, keys: Iterable[str]) -> None:
        """Rewrites the file with these answers in this order."""
        lines = [json.dumps(self.known[key], ensure_ascii=False) + "\n" for key in keys]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(lines), encoding="utf-8")
        partial.replace(self.path)


def read_line(line: str) -> dict:
    """A logged answer, or nothing when the line was cut off by a kill."""
    try:
        return json.loads(line)
    except ValueError:
        return {}


def write_report(folder: Path, report: dict) -> None:
    """Writes evaluation.json, evaluation.md and evaluation.png."""
    (folder / "evaluation.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "evaluation.md").write_text(as_markdown(report), encoding="utf-8")
    plot_cells(report, folder / "evaluation.png")


def show(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def table_rows(report: dict) -> list[list[str]]:
    """Headings, then one row a cell."""
    rows = [["model", "context", *COLUMNS.values()]]
    return rows + [[cell["model"], cell["context"], *(show(cell[key]) for key in COLUMNS)] for cell in report["cells"]]


def describe_difference(difference: dict) -> str:
    """`tuned - base, retrieved: +0.31 F1 [0.24, 0.38], n=80`"""
    bounds = f"[{difference['low']:.2f}, {difference['high']:.2f}]"
    return f"{difference['what']}, {difference['of']}: {difference['mean']:+.2f} F1 {bounds}, n={difference['n']}"


def describe_retrieval(report: dict) -> str:
    return ", ".join(f"{key} {value:.2f}" for key, value in report["retrieval"].items() if isinstance(value, float))


def as_markdown(report: dict) -> str:
    """The table, the differences and the verdict as Markdown."""
    head, *body = table_rows(report)
    lines = ["| " + " | ".join(row) + " |" for row in [head, ["---"] * 2 + ["--:"] * (len(head) - 2), *body]]
    return "\n".join(
        [
            f"**{report['verdict'][0].upper()}{report['verdict'][1:]}**",
            "",
            f"{report['questions']} questions, {report['answerable']} of them answerable. Exact match, F1 and "
            "citations are over the answerable ones; differences have paired bootstrap 95 % intervals.",
            "",
            *lines,
            "",
            f"Retrieval: {describe_retrieval(report)}.",
            "",
            *(f"* {describe_difference(difference)}" for difference in report["differences"]),
            "",
        ]
    )


def print_table(report: dict) -> None:
    """The table, differences and verdict on stdout."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    models, contexts, *metrics = zip(*table_rows(report), strict=True)  # a metric a line: fits 80 columns
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for model, context in zip(models, contexts, strict=True):
        table.add_column(
            "" if model == "model" else f"{model}\n{context}", justify="right" if table.columns else "left"
        )
    for row in metrics:
        table.add_row(*row)
    console.print(table)
    print(f"Retrieval: {describe_retrieval(report)}")
    for difference in report["differences"]:
        print(describe_difference(difference))
    print(f"\n{report['verdict'][0].upper()}{report['verdict'][1:]}")


def plot_cells(report: dict, picture: Path) -> None:
    """Draws F1 of every cell with its 95 % interval as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), dpi=100, layout="constrained")
    axes = figure.subplots()
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
