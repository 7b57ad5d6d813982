"""A sweep: retrieval metrics for several values of one setting, ranked; no language model runs."""

import json
from pathlib import Path

from qlora.console import Invalid, choice, note, number
from qlora.evaluation.evaluation import score_retrieval, search_all
from qlora.evaluation.report import as_text_table, show
from qlora.machine import write_whole
from qlora.markdown import as_markdown_table
from qlora.retrieval.search_modes import MODES

SWEPT = {"passages": number(int, 16, 4096), "top-k": number(int, 1, 50), "search": choice(*MODES), "rerank": str}
SWEEP_COLUMNS = {
    "given": "answered",  # among the top-k passages, the only ones that the model sees
    "recall@1": "recall@1",
    "recall@3": "recall@3",
    "recall@10": "recall@10",
    "mrr": "MRR",
    "ndcg@10": "nDCG@10",
    "words": "words",
}


def read_setting(text: str) -> tuple[str, list] | Invalid:
    """An argparse type: `passages=120,200` -> ("passages", [120, 200])."""
    name, _, values = text.partition("=")
    read = [SWEPT[name](value) for value in values.split(",")] if name in SWEPT else []
    if not read or any(isinstance(value, Invalid) for value in read):
        expected = "passages=120,200,256 (tokens, 16 or more), top-k=1,3,5 (at most 50), "
        expected += "search=dense,lexical,hybrid or rerank=none,MODEL"
        return Invalid(text, expected)
    return name, list(dict.fromkeys(read))


def score_values(searching, questions, name: str, values: list, top_k: int) -> dict:
    """Metrics for every value, best first: more answers among the given passages, then higher MRR, then fewer words.

    `with searching(name, value) as search` gives search(question, k) with that value of the setting.
    """
    rows = []
    for value in values:
        given = value if name == "top-k" else top_k
        note(f"{name}={value}")
        with searching(name, value) as search:
            rows.append({"value": value, **score_passages(questions, search_all(search, questions, given), given)})
    rows.sort(key=lambda row: (-(row["given"] or 0), -(row["mrr"] or 0), row["words"]))
    return {
        "setting": name,
        "top_k": None if name == "top-k" else top_k,
        "answerable": sum(bool(question.answers) for question in questions),
        "rows": rows,
    }


def score_passages(questions, found, top_k: int) -> dict:
    """Retrieval metrics by answer span, with the share answered by the first `top_k` passages and their mean length."""
    metrics = score_retrieval(questions, found, (1, 3, 10, top_k))
    words = [len(document.page_content.split()) for documents in found for document in documents[:top_k]]
    return {
        "given": metrics.get(f"recall@{top_k}"),
        **{key: metrics.get(key) for key in ("recall@1", "recall@3", "recall@10", "mrr", "ndcg@10")},
        "words": round(sum(words) / len(questions)),
    }


# ------------------------------------------------------------------------------- output


def table_of(result: dict) -> list[list[str]]:
    """Headings, then one row per value."""
    rows = [[str(row["value"]), *(show(row[key]) for key in SWEEP_COLUMNS)] for row in result["rows"]]
    return [[result["setting"], *SWEEP_COLUMNS.values()], *rows]


def title_of(result: dict) -> str:
    given = f"the top {result['top_k']}" if result["top_k"] else "the top-k"
    return (
        f"{result['setting']}: {result['answerable']} answerable questions, best first. `answered` is the share with "
        f"an answer among {given} passages, `words` how many words those have."
    )


def as_text(results: list[dict]) -> str:
    return "\n".join(f"{title_of(result)}\n{as_text_table(table_of(result))}" for result in results)


def write_results(folder: Path, results: list[dict]) -> None:
    """Writes sweep.json, sweep.md and sweep.png."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "sweep.json", json.dumps(results, indent=2) + "\n")
    parts = [f"{title_of(result)}\n\n{as_markdown_table(table_of(result))}\n" for result in results]
    write_whole(folder / "sweep.md", "\n".join(parts))
    plot_values(results, folder / "sweep.png")


def plot_values(results: list[dict], picture: Path) -> None:
    """Draws the share of answers given, MRR and nDCG over the values, one panel per setting."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * len(results), 3.6), dpi=100, layout="constrained")
    for axes, result in zip(figure.subplots(1, len(results), squeeze=False)[0], results, strict=True):
        rows = sorted(result["rows"], key=lambda row: row["value"])
        values = [str(row["value"]) for row in rows]
        for key in ("given", "mrr", "ndcg@10"):
            axes.plot(values, [row[key] or 0 for row in rows], "o-", label=SWEEP_COLUMNS[key])
        axes.set(xlabel=result["setting"], ylim=(0, 1.02), title=f"n={result['answerable']} questions")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, loc="lower right")
    figure.savefig(picture)
