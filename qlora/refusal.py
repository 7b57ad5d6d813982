"""What a refusal is, and when to refuse: one definition for training, answering and evaluation."""

from collections.abc import Sequence
from itertools import pairwise

from qlora.prompt import Prompt
from qlora.words import MARK, SENTENCE_END, WORD, normalize

CONTRAST = {"but", "however", "though", "although", "aber", "jedoch", "mais", "pero", "però", "но", "但"}

ASKED = 0.2  # share of questions that the documents don't answer
NOISE = 0.01  # of a mean over some hundred rows: with resampling the best bias moves by half a nat
FEW = 10  # fewer rows that refuse, or that don't, are too few for a fit


def is_refusal(text: str, refusal: str = Prompt.refusal) -> bool:
    """Whether a response or an answer refuses: it begins with the words of the refusal, and no "but" follows.

    "I don't know who signs." refuses, "I don't know who signs, but the form is B7." answers. Case, citations and the
    kind of apostrophe do not matter. A text without words is a refusal as well.
    """
    bare = MARK.sub("", text).strip()
    first, wanted = normalize(SENTENCE_END.split(bare)[0]).split(), normalize(refusal).split()
    return not WORD.search(bare) or (first[: len(wanted)] == wanted and not CONTRAST & set(first))


# ------------------------------------------------------------------------------- fit


def fit_threshold(
    confidences: Sequence[float], scores: Sequence[dict], weights: Sequence[float] | None = None, noise: float = 0.0
) -> float | None:
    """The confidence below which refusing gives the best overall F1; None when it never helps.

    SQuAD 2.0's own rule (find_best_thresh in evaluate-v2.0.py), with weights of the questions where they are given. Of
    thresholds within `noise` of the best the lowest, which refuses least.
    """
    weights = weights or [1.0] * len(scores)
    ordered = sorted(zip(confidences, scores, weights, strict=True), key=lambda entry: entry[0])
    gain, total, cuts = 0.0, sum(weights), [(0.0, None)]
    for (here, score, weight), (after, *_) in zip(ordered, [*ordered[1:], (float("inf"),)], strict=True):
        gain += weight * (float(not score["answerable"]) - score["overall_f1"])
        if after > here:
            cuts.append((gain / total, here + 1e-4 if after == float("inf") else (here + after) / 2))
    least = max(gain for gain, _ in cuts) - noise - 1e-9
    threshold = next(cut for gain, cut in cuts if gain >= least)
    return threshold and round(threshold, 5)


def fit_refusal_bias(
    odds: Sequence[float], refused: Sequence[bool], right: Sequence[float]
) -> tuple[float, float | None]:
    """The refusal bias, and the F1 of refusals with it: refuse where log-odds + bias are above 0.

    Models rank questions by how answerable they are, but their probabilities are off. `right` is how good the answer
    of a row is when it is not refused, 0 to 1. As SQuAD 2.0's threshold (find_best_thresh in evaluate-v2.0.py) the
    bias gives the best mean of answers and right refusals; of those within `NOISE` of the best it is the nearest to 0.
    Rows that refuse count as `ASKED` of all at most, since training may have more of them than people ask. Returns
    (0, None) with fewer than `FEW` rows of either kind.
    """
    rows = sorted(zip(odds, refused, right, strict=True), reverse=True)
    refusing = sum(refused)
    answering = len(rows) - refusing
    if min(refusing, answering) < FEW:
        return 0.0, None
    weight = min(1.0, ASKED / (1 - ASKED) * answering / refusing)
    gained = found = wrong = 0.0
    cuts = [(0.0, 0.0, -rows[0][0] - 0.5)]  # what refusing so many gains over refusing none, F1, bias
    for (here, is_right, score), (after, *_) in pairwise([*rows, (rows[-1][0] - 1, False, 0.0)]):
        found += weight * is_right
        wrong += not is_right
        gained += weight if is_right else -score
        if after < here:
            f1 = 2 * found / (found + wrong + weight * refusing)
            cuts.append((gained / (answering + weight * refusing), f1, -(here + after) / 2))
    least = max(cuts)[0] - NOISE
    _, f1, bias = min((cut for cut in cuts if cut[0] >= least), key=lambda cut: abs(cut[2]))
    return round(bias, 4), round(f1, 4)
