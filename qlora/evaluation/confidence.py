"""How far a confidence can be trusted: its calibration error, and the risk of answering only what is surest.

Both are of answers that were given: a refused question has none.
"""

from collections.abc import Sequence

RIGHT = 0.5  # F1 from which an answer is right, as in the fit of a ranking
BINS = 10


def measure_confidence(scores: Sequence[dict]) -> dict | None:
    """Expected calibration error and risk-coverage curve of one cell; None where no answer has a confidence.

    A point of the curve is [coverage, risk]: the share of questions that are answered, the surest first, and the mean
    of 1 - F1 of those answers, which is 1 where a question has no answer (El-Yaniv and Wiener, JMLR 2010).
    """
    given = [score for score in scores if score.get("confidence") is not None and not score["refused"]]
    if not given:
        return None
    surest = sorted(given, key=lambda score: -score["confidence"])
    lost, curve = 0.0, []
    for count, score in enumerate(surest, 1):
        lost += 1 - (score["f1"] or 0.0)
        curve.append([round(count / len(scores), 4), round(lost / count, 4)])
    return {"answers": len(given), "calibration_error": calibration_error(given), "risk_coverage": curve}


def calibration_error(scores: Sequence[dict]) -> float:
    """The mean distance of confidence and share of right answers, over `BINS` bins of equal width (Guo et al. 2017)."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for score in scores:
        place = min(BINS - 1, int(score["confidence"] * BINS))
        bins.setdefault(place, []).append((score["confidence"], (score["f1"] or 0.0) >= RIGHT))
    gaps = [abs(sum(confidence - right for confidence, right in part)) for part in bins.values()]
    return round(sum(gaps) / len(scores), 4)
