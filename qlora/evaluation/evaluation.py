"""The evaluation table: what fine-tuning and retrieval gain, without a judge model.

{base, tuned} x {closed-book, retrieved, oracle context}: exact match and token F1 as SQuAD defines
them, refusals, citations, faithfulness; retrieval metrics; paired bootstrap intervals; one verdict.
"""

import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from qlora.answering.chain import best_score, drop_confidence, is_decided, refuses_unread
from qlora.answering.citations import Answer, refuse
from qlora.console import fail, progress
from qlora.evaluation.comparison import compare_cells, give_verdict, paired_bootstrap, split_halves
from qlora.evaluation.confidence import measure_confidence
from qlora.evaluation.questions import Question
from qlora.metrics import RANKS, exact_match, mean, normalize_answer, rank_metrics, ratio, token_f1, total
from qlora.prompt import Prompt
from qlora.refusal import fit_threshold
from qlora.words import MARK

# ------------------------------------------------------------------------------- metrics


def supports(text: str, question: Question) -> bool:
    """Whether a passage holds one of the answers (without "Yes," or "No,", which are in no passage)."""
    spans = [re.sub(r"^(yes|no)\b", "", normalize_answer(answer)).strip() for answer in question.answers]
    return any(span and f" {span} " in f" {normalize_answer(text)} " for span in spans)


def score_answer(question: Question, answer: Answer) -> dict:
    """Every score of one answer; None where it has no meaning (no right answer, no passage to cite)."""
    text = MARK.sub("", answer.text).strip()
    answerable = bool(question.answers)
    passages = [cited.document.page_content for cited in answer.passages]
    cited = [supports(cited.document.page_content, question) for cited in answer.citations]
    citable = answerable and not answer.refused and any(supports(passage, question) for passage in passages)
    found = any(f" {normalize_answer(text)} " in f" {normalize_answer(passage)} " for passage in passages)
    f1 = token_f1(text, question.answers) * (not answer.refused)
    return {
        "em": exact_match(text, question.answers) * (not answer.refused) if answerable else None,
        "f1": f1 if answerable else None,
        "overall_f1": f1 if answerable else float(answer.refused),
        "refused": answer.refused,
        "answerable": answerable,
        "citations": len(cited) if answerable else None,
        "right_citations": sum(cited) if answerable else None,
        "cited_support": float(any(cited)) if citable else None,
        "faithful": float(found) if passages and not answer.refused else None,
        "words": len(text.split()),
        "confidence": answer.decided.get("confidence"),
    }


def summarize(scores: Sequence[dict]) -> dict:
    """One cell of the table from the scores of its answers."""
    refused = sum(score["refused"] for score in scores)
    unanswerable = sum(not score["answerable"] for score in scores)
    right = sum(score["refused"] and not score["answerable"] for score in scores)
    precision, recall = ratio(right, refused), ratio(right, unanswerable)
    return {
        "em": mean(scores, "em"),
        "f1": mean(scores, "f1"),
        "overall_f1": mean(scores, "overall_f1"),
        "refusal_precision": precision,
        "refusal_recall": recall,
        "refusal_f1": None if recall is None else ratio(2 * right, refused + unanswerable),
        "citation_precision": ratio(total(scores, "right_citations"), total(scores, "citations")),
        "citation_recall": mean(scores, "cited_support"),
        "faithfulness": mean(scores, "faithful"),
        "words_mean": mean(scores, "words"),
        "seconds_median": round(statistics.median(score["seconds"] for score in scores), 3),
    }


def search_all(search, questions: Sequence[Question], depth: int = max(RANKS)) -> list[list]:
    """The `depth` best passages of every question, at least ten, by `search(question, k)`."""
    with progress() as bar:
        return [
            search(question.question, max(*RANKS, depth)) for question in bar.track(questions, description="searches")
        ]


def score_retrieval(questions: Sequence[Question], found: Sequence[Sequence], ranks: Sequence[int] = RANKS) -> dict:
    """recall@1/3/10, MRR and nDCG@10 over answerable questions: by answer span, and by source.

    `found` holds ten documents per question, best first. A passage is relevant when it holds an answer.
    """
    answerable = [(q, documents) for q, documents in zip(questions, found, strict=True) if q.answers]
    by_span = [[supports(d.page_content, q) for d in documents] for q, documents in answerable]
    by_source = [
        [q.source in (d.metadata["source"], *d.metadata.get("also_in", ())) for d in documents]
        for q, documents in answerable
        if q.source
    ]
    return {**rank_metrics(by_span, ranks), "by_source": rank_metrics(by_source, ranks)}


# ------------------------------------------------------------------------------- run


def calibrate(questions: Sequence[Question], found: Sequence[Sequence], scores: Sequence[dict], seed: int) -> dict:
    """The refusal threshold fitted on half of the questions, and what it changes on the other half.

    `scores` are those of answers from the retrieved passages, made without a threshold.
    """
    confidences = [best_score(documents) for documents in found]
    fitting, reporting = split_halves(scores)
    threshold = fit_threshold([confidences[n] for n in fitting], [scores[n] for n in fitting])
    plain = [scores[n] for n in reporting]
    gated = [
        score_answer(questions[n], refuse(found[n])) | {"seconds": 0.0}
        if refuses_unread(found[n], threshold)
        else scores[n]
        for n in reporting
    ]
    overall = ([score["overall_f1"] for score in part] for part in (gated, plain))
    return {
        "threshold": threshold,
        "fitted_on": len(fitting),
        "reported_on": len(reporting),
        "without": summarize(plain),
        "with": summarize(gated),
        "difference": {"metric": "overall_f1", **paired_bootstrap(*overall, seed)},
    }


def gather_passages(
    questions: Sequence[Question], found: Sequence[Sequence], top_k: int, wanted: Sequence[str]
) -> dict[str, list]:
    """(question, documents) of every question by context, of the wanted contexts that have questions.

    Raises UserError when none has.
    """
    from langchain_core.documents import Document

    pairs = {
        "closed-book": [(question, []) for question in questions],
        "retrieved": [(q, list(documents[:top_k])) for q, documents in zip(questions, found, strict=True)],
        "oracle": [
            (q, [Document(q.context, metadata={"source": q.source or "context", "score": 1.0})])
            for q in questions
            if q.context
        ],
    }
    contexts = {context: asked for context, asked in pairs.items() if asked and context in wanted}
    if not contexts:
        raise fail("no question has a context", "the questions", "add --contexts closed-book retrieved")
    return contexts


@dataclass(frozen=True)
class Asking:
    """The way to answer questions, and the log of their answers.

    `complete(pairs)` gives the Answers to (question, documents) with their places, as `answer_each`; it gets `batch` of
    them at a time. A question is refused where `refuses` rejects its retrieved passages, as in `ask`.
    """

    log: Any  # report.AnswerLog
    complete: Callable[[list[tuple]], Iterable[list[tuple[int, Answer]]]]
    refuses: Callable[[Sequence], bool]
    batch: int
    refusal: str = Prompt.refusal


def answer_cells(asking: Asking, modes: dict, contexts: dict[str, list]) -> dict:
    """The scores of every answer, by (model, context).

    `modes` maps a model's name to the context manager under which it answers. Equal passages in
    two contexts (the right one is often the best found) are read once. The log is closed with all answers.
    """
    keys, log = {}, asking.log
    with progress() as bar:
        task = bar.add_task("answers", total=len(modes) * sum(map(len, contexts.values())))
        for model, mode in modes.items():
            with mode():
                for context, asked in contexts.items():
                    advance = partial(bar.advance, task)
                    keys[model, context] = answer_cell(asking, model, context, asked, advance)
    log.close([(key, context) for (_, context), cell_keys in keys.items() for key in cell_keys])
    return {cell: [log.known[key]["scores"] for key in cell_keys] for cell, cell_keys in keys.items()}


def answer_cell(asking: Asking, model: str, context: str, asked: list[tuple], advance) -> list[str]:
    """The log's keys of one cell's answers; missing answers are generated, longest prompts first.

    `advance(n)` moves the progress bar.
    """
    keys, missing, log = [], [], asking.log
    for question, documents in asked:
        documents = drop_confidence(documents) if model == "base" else documents  # it is the adapter's
        refused = context == "retrieved" and asking.refuses(documents)
        passages = [(document.metadata["source"], document.page_content) for document in documents]
        # Where a confidence decided, the model may not refuse: from the same passage it answers otherwise.
        decided = ("decided",) if is_decided(documents) else ()
        keys.append(log.key(model, question.question, question.answers, passages, refused, *decided))
        if keys[-1] in log.known:
            advance(1)
        elif refused:
            log.add(keys[-1], describe_answer(model, context, question, refuse(documents, asking.refusal), 0.0))
            advance(1)
        else:
            missing.append((keys[-1], (question, documents)))
    missing.sort(key=lambda entry: -sum(len(document.page_content) for document in entry[1][1]))
    for at in range(0, len(missing), asking.batch):
        part = missing[at : at + asking.batch]
        started, given = time.perf_counter(), 0
        for ready in asking.complete([(question.question, documents) for _, (question, documents) in part]):
            given += len(ready)
            seconds = round((time.perf_counter() - started) / given, 3)
            for place, answer in ready:
                key, (question, _) = part[place]
                log.add(key, describe_answer(model, context, question, answer, seconds))
            advance(len(ready))
    return keys


def describe_answer(model: str, context: str, question: Question, answer: Answer, seconds: float) -> dict:
    """A line of answers.jsonl."""
    passages = [cited.document for cited in answer.passages]
    return {
        "model": model,
        "context": context,
        "question": question.question,
        "answers": question.answers,
        "source": question.source,
        "passages": [{"source": d.metadata["source"], "text": d.page_content} for d in passages],
        "answer": answer.text,
        "citations": [cited.n for cited in answer.citations],
        "scores": {**score_answer(question, answer), "seconds": seconds},
    }


def build_result(questions, found, cells: dict[tuple[str, str], list[dict]], settings: dict, seed: int) -> dict:
    """evaluation.json: every cell, retrieval, differences and the verdict."""
    rows = []
    for (model, context), scores in cells.items():
        values = [score["f1"] for score in scores if score["f1"] is not None]
        spread = paired_bootstrap(values, [0.0] * len(values), seed) if values else {"low": None, "high": None}
        rows.append({"model": model, "context": context, **summarize(scores)})
        rows[-1] |= {"f1_low": spread["low"], "f1_high": spread["high"]}
    differences = compare_cells(cells, seed)
    sure = measure_confidence(cells.get(("tuned", "retrieved"), ()))
    return {
        "questions": len(questions),
        "answerable": sum(bool(question.answers) for question in questions),
        "cells": rows,
        "retrieval": score_retrieval(questions, found),
        "differences": differences,
        "verdict": give_verdict(differences),
        **({"confidence": sure} if sure else {}),
        "settings": settings,
    }
