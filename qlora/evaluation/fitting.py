"""Fits a ranking on questions with known answers: held-out training rows, never the questions of an evaluation.

    asked = gather(questions, search, ranker)
    order = fit_order(asked, ranker)                    # which passage answers
    ranking = fit_ranking(asked, ranker, complete)      # and when the best one does

Every question is asked twice: as it is, and without the passages that answer it. That gives near misses, which the
search finds for a question that the documents do not answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from langchain_core.documents import Document

from qlora.answering.chain import is_doubted
from qlora.answering.ranker import AMONG, Ranker
from qlora.answering.ranking import Ranking
from qlora.console import fail, progress
from qlora.evaluation.confidence import RIGHT
from qlora.evaluation.evaluation import score_answer, supports
from qlora.evaluation.questions import Question
from qlora.refusal import ASKED, FEW, NOISE, fit_threshold


@dataclass(frozen=True)
class Candidates:
    """A question with the passages of a search, which have all scores in their metadata."""

    question: Question
    documents: list[Document]

    def is_hit(self, document: Document) -> bool:
        return supports(document.page_content, self.question)

    def without_hits(self) -> "Candidates":
        """The question as if the documents did not answer it."""
        rest = [document for document in self.documents if not self.is_hit(document)]
        return Candidates(replace(self.question, answers=()), rest)


class Remembering:
    """A reader that reads no passage twice for a question."""

    def __init__(self, reader):
        self.reader, self.known = reader, {}

    def odds(self, question: str, documents: Sequence[Document], history: Sequence[dict] = ()) -> list[float]:
        """As the reader gives them."""
        new = [document for document in documents if (question, document.page_content) not in self.known]
        for document, value in zip(new, self.reader.odds(question, new) if new else (), strict=True):
            self.known[question, document.page_content] = value
        return [self.known[question, document.page_content] for document in documents]


def gather(questions: Sequence[Question], search, ranker: Ranker) -> list[Candidates]:
    """The candidates of every question that finds some."""
    found = []
    with progress() as bar:
        for question in bar.track(questions, description="searches"):
            documents = ranker.sort(ranker.score_all(question.question, search(question.question, AMONG)))
            found += [Candidates(question, documents)] if documents else []
    return found


def fit_order(asked: Sequence[Candidates], ranker: Ranker) -> dict[str, float]:
    """The weight of each score of the ranker's order, that of the search's total being 1.

    Logistic regression over pairs of a passage that answers and one that does not (as RankNet compares them; Burges et
    al. 2005), of those that the model reads. Raises UserError with fewer than `FEW` pairs.
    """
    import numpy
    from sklearn.linear_model import LogisticRegression

    names, pairs = list(ranker.ranking.order), []
    if names == ["total"]:
        return {"total": 1.0}
    with progress() as bar:
        for one in bar.track(asked, description="passages read"):
            near = ranker.read(one.question.question, one.documents)
            read = [(values_of(document, names), one.is_hit(document)) for document in near]
            pairs += [numpy.subtract(a, b) for a, answers in read if answers for b, others in read if not others]
    if len(pairs) < FEW:
        what = f"{len(pairs)} pairs of a passage that answers and one that does not are too few"
        raise fail(what, "held-out rows", "train with more rows, or ingest the documents that the rows are about")
    differences = numpy.array([*pairs, *numpy.negative(pairs)])
    spread = differences.std(axis=0) + 1e-9
    model = LogisticRegression(fit_intercept=False).fit(differences / spread, [1] * len(pairs) + [0] * len(pairs))
    weights = model.coef_[0] / spread
    unit = max(weights[0], 1e-3)  # a search that says nothing about which passage is right
    others = {name: round(float(weight / unit), 4) for name, weight in zip(names[1:], weights[1:], strict=True)}
    return {names[0]: 1.0, **others}


def values_of(document: Document, names: Sequence[str]) -> list[float]:
    return [document.metadata[name] for name in names]


def fit_ranking(asked: Sequence[Candidates], ranker: Ranker, complete: Callable[[list[tuple]], list]) -> Ranking:
    """The ranker's ranking with `answers` and `threshold`, and what it was fitted on.

    `complete(pairs)` answers questions from passages, as `answer_batch`. The confidence is the probability that such an
    answer is right. The threshold is the lowest within `NOISE` of the best mean of answers' F1 and right refusals
    (`fit_threshold`): the best one moves with every row. Questions without an answer weigh as much as `ASKED` of all.
    Raises UserError with fewer than `FEW` right or wrong answers.
    """
    import numpy
    from sklearn.linear_model import LogisticRegression

    names = list(ranker.ranking.answers)
    both = [one for one in (*asked, *(one.without_hits() for one in asked if one.question.answers)) if one.documents]
    first = find_first(both, ranker)
    for document in first:
        document.metadata["confidence"] = 1.0  # so that the model answers: what it refused could not be right
    is_asked = numpy.array([bool(one.question.answers) for one in both])
    scores = score_answers([(one.question, document) for one, document in zip(both, first, strict=True)], complete)
    is_right = is_asked & (numpy.array([score["overall_f1"] for score in scores]) >= RIGHT)
    if min(is_right.sum(), (~is_right).sum()) < FEW:
        what = f"{is_right.sum()} of {is_asked.sum()} answers are right: too few to fit a confidence on"
        raise fail(what, "held-out rows", "train with more rows, or ingest the documents that the rows are about")
    weights = numpy.where(is_asked, 1.0, ASKED / (1 - ASKED) * is_asked.sum() / (~is_asked).sum())
    values = numpy.array([values_of(document, names) for document in first])
    middle, spread = values.mean(axis=0), values.std(axis=0) + 1e-9
    model = LogisticRegression().fit((values - middle) / spread, is_right, sample_weight=weights)
    slopes = model.coef_[0] / spread
    answers = {"intercept": float(model.intercept_[0] - slopes @ middle)}
    answers |= {name: float(slope) for name, slope in zip(names, slopes, strict=True)}
    fitted = replace(ranker.ranking, answers={name: round(value, 4) for name, value in answers.items()})
    confidences = [fitted.confidence(document.metadata) for document in first]
    threshold = fit_threshold(confidences, scores, list(weights), NOISE) or 0.0
    return replace(fitted, threshold=threshold, fitted_on=describe_fit(asked, first[: len(asked)]))


def find_first(asked: Sequence[Candidates], ranker: Ranker) -> list[Document]:
    """The passage that each question would be answered from."""
    with progress() as bar:
        tracked = bar.track(asked, description="passages read")
        return [ranker.order(one.question.question, one.documents)[0] for one in tracked]


def score_answers(pairs: Sequence[tuple[Question, Document]], complete, batch: int = 8) -> list[dict]:
    """Overall F1 of the answer to each question from its passage.

    A question without an answer is asked only where its answer may become a refusal (`is_doubted`): any other is wrong.
    """
    wanted = [n for n, (question, document) in enumerate(pairs) if question.answers or is_doubted([document])]
    scores = [{"answerable": bool(question.answers), "overall_f1": 0.0} for question, _ in pairs]
    with progress() as bar:
        task = bar.add_task("answers", total=len(wanted))
        for at in range(0, len(wanted), batch):
            part = wanted[at : at + batch]
            answers = complete([(pairs[n][0].question, [pairs[n][1]]) for n in part])
            for n, answer in zip(part, answers, strict=True):
                scores[n] = score_answer(pairs[n][0], answer)
            bar.advance(task, len(part))
    return scores


def describe_fit(asked: Sequence[Candidates], first: Sequence[Document]) -> dict:
    """How many questions there were, and the share of the answerable ones whose first passage answers."""
    answerable = [(one, document) for one, document in zip(asked, first, strict=True) if one.question.answers]
    before = sum(one.is_hit(search_first(one)) for one, _ in answerable)
    after = sum(one.is_hit(document) for one, document in answerable)
    return {
        "questions": len(asked),
        "answerable": len(answerable),
        "recall@1 before": round(before / len(answerable), 3),
        "recall@1": round(after / len(answerable), 3),
    }


def search_first(asked: Candidates) -> Document:
    """What the search alone would have put first."""
    return min(asked.documents, key=lambda document: document.metadata["ranks"]["search"])


def as_text(fitted: Ranking) -> str:
    """What was fitted, for people."""
    on = fitted.fitted_on
    order = ", ".join(f"{name} {weight:g}" for name, weight in fitted.order.items())
    return (
        f"fitted on {on['questions']} questions, {on['answerable']} of them answerable; weights: {order}\n"
        f"the first passage answers: {on['recall@1 before']:.2f} before, {on['recall@1']:.2f} now\n"
        f"refuses below a confidence of {fitted.threshold:.2f}: that the answer is right"
    )
