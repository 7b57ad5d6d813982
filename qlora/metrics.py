"""Exact match and token F1 as SQuAD defines them, and metrics of ranked passages."""

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

from qlora.words import CHARACTER, unify

RANKS = (1, 3, 10)
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case without punctuation, articles and extra white space (SQuAD's evaluate-v2.0.py).

    In scripts without spaces between words a character is a word, as in KorQuAD's and CMRC's own scores.
    """
    text = text.lower().translate(PUNCTUATION)
    if CHARACTER.search(text):
        text = "".join(letter for letter in unify(text) if unicodedata.category(letter)[0] not in "PS")
        text = CHARACTER.sub(r" \g<0> ", text.lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    return float(any(normalize_answer(prediction) == normalize_answer(answer) for answer in answers))


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """The best harmonic mean of token precision and recall over the answers, 0 to 1."""
    return max(
        (pair_f1(normalize_answer(prediction).split(), normalize_answer(answer).split()) for answer in answers),
        default=0.0,
    )


def pair_f1(found: list[str], wanted: list[str]) -> float:
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted)) if common else float(found == wanted)


# ------------------------------------------------------------------------------- numbers


def ratio(part: float, whole: float) -> float | None:
    return round(part / whole, 4) if whole else None


def total(scores: Sequence[dict], key: str) -> float:
    return sum(score[key] for score in scores if score[key] is not None)


def mean(scores: Sequence[dict], key: str) -> float | None:
    """The mean over the scores that are not None."""
    return ratio(total(scores, key), sum(score[key] is not None for score in scores))


# ------------------------------------------------------------------------------- retrieval


def rank_metrics(relevance: Sequence[Sequence[bool]], ranks: Sequence[int] = RANKS) -> dict:
    """Metrics of ranked lists of relevant or not; nDCG takes all relevant passages found as the ideal."""
    if not relevance:
        return {}
    gains = [sum(hit / math.log2(n + 2) for n, hit in enumerate(row)) for row in relevance]
    ideals = [sum(1 / math.log2(n + 2) for n in range(sum(row))) for row in relevance]
    return {
        **{f"recall@{k}": ratio(sum(any(row[:k]) for row in relevance), len(relevance)) for k in ranks},
        "mrr": ratio(sum(next((1 / n for n, hit in enumerate(row, 1) if hit), 0) for row in relevance), len(relevance)),
        "ndcg@10": ratio(sum(g / i for g, i in zip(gains, ideals, strict=True) if i), len(relevance)),
    }
