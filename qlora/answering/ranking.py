"""Which passage answers, and whether one does: scores of a passage and their weights, saved beside the adapter.

    ranking = read_ranking(folder)          # None where none was fitted
    ranking.confidence({"total": 1.2, "odds": 3.0})     # 0.84

`rag_qlora.py fit` fits the weights on held-out training rows. They are numbers in a text file.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from qlora.console import fail
from qlora.machine import write_whole

SCHEMA = 1
FILE, FOLDER = "ranking.json", "reranker"  # in the adapter's folder; the cross-encoder of its own
NONE, LIKELIHOOD, TRAINED = "none", "likelihood", "cross-encoder"  # names of --rerank beside those of models
UNFITTED = {"total": 1.0, "odds": 0.05, "cross": 0.1}  # weights to begin with, near those fitted on the sample
UNREAD = ("total", "cross")  # scores of a passage: the search's and the cross-encoder's
SCORES = (*UNREAD, "odds")  # and the reading model's


@dataclass(frozen=True)
class Ranking:
    """Weights of the scores, by their names: how passages are ordered, and when the first of them answers."""

    rerank: str  # as --rerank names it
    order: dict[str, float]
    answers: dict[str, float] = field(default_factory=dict)  # of the log-odds that the answer is there, and `intercept`
    threshold: float = 0.0  # the confidence below which a question is refused
    scored_by: str = ""  # the cross-encoder: a folder, a model of the hub, or an address
    mode: str = ""  # of the search that it was fitted with; empty: of any
    collection: str = ""  # that it was fitted in; in others the confidence is not known
    fitted_on: dict = field(default_factory=dict)

    @property
    def reads(self) -> bool:
        return "odds" in self.order or "odds" in self.answers

    @property
    def decides(self) -> bool:
        """Whether it says when to refuse; else the model does."""
        return bool(self.answers)

    def weigh(self, scores: dict, among: Sequence[str] = SCORES) -> float:
        """What a passage with these scores is ordered by."""
        return sum(weight * scores[name] for name, weight in self.order.items() if name in among)

    def confidence(self, scores: dict, bias: float = 0.0) -> float:
        """The probability, 0 to 1, that an answer from the passage is right; `bias` is added to the log-odds that it
        is not."""
        known = {"intercept": 1.0, **scores}
        odds = sum(weight * known[name] for name, weight in self.answers.items()) - bias
        return 1 / (1 + math.exp(-max(-60.0, min(60.0, odds))))


def read_ranking(folder: Path) -> Ranking | None:
    """The ranking of an adapter folder; None where none was fitted. Raises UserError for a damaged file."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("schema") != SCHEMA:
            raise ValueError("another schema")
        if values["rerank"] == TRAINED:
            values["scored_by"] = str(folder / FOLDER)
        ranking = Ranking(**values)
        numbers = [*ranking.order.values(), *ranking.answers.values(), ranking.threshold]
        if not all(math.isfinite(number) for number in numbers):
            raise ValueError("weights that are not numbers")
        if not {*ranking.order} <= {*SCORES} or not {*ranking.answers} <= {*SCORES, "intercept"}:
            raise ValueError("unknown scores")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise fail(f"damaged ranking ({error})", str(path), "fit it again: rag_qlora.py fit") from error
    return ranking


def write_ranking(folder: Path, ranking: Ranking) -> None:
    values = {"schema": SCHEMA, **asdict(ranking)}
    write_whole(folder / FILE, json.dumps(values, indent=2) + "\n")
