"""What people said of answers, made into training rows and questions.

    made = make_rows(judgements, search, refusal)
    made.rows, made.questions, made.review

A correction is a row when a passage holds its answer; a "not in the documents" is a row that refuses. An answer that a
person called right is a row when its passage supports it. All else is for review, with the reason. Half of the
questions, by a hash of their words, become questions for evaluation: the same question never changes sides.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from langchain_core.documents import Document

from qlora.answering.citations import check_answer
from qlora.console import Problems, fail, shorten_text
from qlora.refusal import is_refusal
from qlora.retrieval.feedback import GOOD, Judgement
from qlora.words import answer_span, normalize
from qlora.writing.checks import is_grounded, plain_answer
from qlora.writing.report import write_rows

LOOKED_AT = 10  # passages of a search, where those that were shown do not hold the answer
NOBODY_SAID = "wrong, and nobody said what is right"
NOT_THERE = "the answer is in no passage that was shown or found"
UNSUPPORTED = "called right, but no passage supports it"
NO_PASSAGE = "no passage was shown or found"
Search = Callable[[str, int], list[Document]]


@dataclass
class Made:
    """Rows to train on, questions to evaluate with, and judgements that are neither, each with a `reason`."""

    rows: list[dict] = field(default_factory=list)
    questions: list[dict] = field(default_factory=list)
    review: list[dict] = field(default_factory=list)
    origins: str = ""  # whose answers were judged


def find_numbers(judgements: Sequence[Judgement], wanted: Sequence[str]) -> list[int]:
    """The numbers of the judgements that are named: some, or `all`. Raises UserError for one that is not there."""
    known, problems = [one.id for one in judgements], Problems()
    for name in wanted:
        if name != "all" and name not in map(str, known):
            problems.add("no such judgement", name, "see: python rag_qlora.py feedback")
    problems.raise_if_any()
    return known if "all" in wanted else [int(name) for name in wanted]


def make_rows(judgements: Sequence[Judgement], search: Search, refusal: str) -> Made:
    """What the judgements make; of several that say the same the first counts, of contradicting ones none."""
    made, by_question = Made(origins=describe_origins(judgements)), defaultdict(list)
    for one in judgements:
        response = read_response(one, refusal)
        if response:
            by_question[normalize(one.question)].append((one, response))
        else:
            made.review.append(describe(one, NOBODY_SAID))
    for said in by_question.values():
        if len({answer_key(response, refusal) for _, response in said}) > 1:
            numbers = ", ".join(str(one.id) for one, _ in said)
            made.review += [describe(one, f"judgements {numbers} contradict each other") for one, _ in said]
            continue
        (first, response), *others = said
        made.review += [describe(one, f"says the same as judgement {first.id}") for one, _ in others]
        add_row(made, first, response, search, refusal)
    return made


def describe_origins(judgements: Sequence[Judgement]) -> str:
    """How many adapters and prompts the judged answers are of. All count: what is right depends on neither."""
    adapters, prompts = ({getattr(one, name) for one in judgements} for name in ("adapter", "prompt"))
    return f"Judgements: {len(judgements)}. Adapters that answered: {len(adapters)}. Prompts: {len(prompts)}."


def read_response(one: Judgement, refusal: str) -> str:
    """What would have been right; empty where nobody said."""
    if one.not_in_documents:
        return refusal
    return plain_answer(one.right_answer or (one.answer if one.rating == GOOD else ""))


def answer_key(response: str, refusal: str) -> str:
    return "" if is_refusal(response, refusal) else normalize(answer_span(response))


def add_row(made: Made, one: Judgement, response: str, search: Search, refusal: str) -> None:
    """Adds a row or a question, or the judgement and why it is neither. Searches where what was shown does not do."""
    shown = [Document(p["text"], metadata={"source": p["source"]}, id=p["id"]) for p in one.passages if "text" in p]
    passages = [document for document in shown if document.id == one.right_passage] or shown
    refuses = is_refusal(response, refusal)

    def choose(documents: Sequence[Document]) -> list[Document]:
        return [d for d in documents if refuses or holds(d, response, one, refusal)]

    holding = choose(passages)
    if not holding and passages is shown:
        passages = [*shown, *search(one.question, LOOKED_AT)]
        holding = choose(passages[len(shown) :])
    if not holding:
        was_right = one.rating == GOOD and not one.right_passage
        made.review.append(describe(one, NO_PASSAGE if not passages else UNSUPPORTED if was_right else NOT_THERE))
        return
    context, source = holding[0].page_content, holding[0].metadata["source"]
    if is_question(one.question):
        answers = [] if refuses else [response]
        made.questions.append({"question": one.question, "answers": answers, "source": source, "context": context})
    else:
        category = "unanswerable" if refuses else "closed_qa"
        row = {"instruction": one.question, "response": response, "context": context}
        made.rows.append({**row, "category": category, "source": source})


def holds(passage: Document, response: str, one: Judgement, refusal: str) -> bool:
    """Whether the passage has a corrected answer word for word, or supports one that was called right."""
    if one.right_answer:
        return is_grounded(answer_span(response), passage.page_content)
    answer = check_answer(f"{response} [1]", [passage], refusal)
    return answer.is_supported and not answer.unsupported


def is_question(question: str) -> bool:
    """Whether a question is for evaluation, by the hash of its words."""
    return hashlib.sha256(normalize(question).encode()).digest()[0] % 2 == 0


def describe(one: Judgement, reason: str) -> dict:
    """A line for review."""
    known = {"id": one.id, "question": one.question, "answer": one.answer, "right_answer": one.right_answer}
    return {**known, "not_in_documents": one.not_in_documents, "reason": reason}


# ------------------------------------------------------------------------------- files, and what people read


def write_made(path: Path, made: Made) -> str:
    """Writes rows, and beside them questions and what is for review; returns a line for each file.

    Raises UserError, and writes no rows, where nothing became a row or a question.
    """
    files = {path: made.rows, path.with_suffix(".questions.jsonl"): made.questions}
    files[path.with_suffix(".review.jsonl")] = made.review
    if not (made.rows or made.questions):
        counts = Counter(one["reason"] for one in made.review).most_common(3)
        why = "; ".join(f"{count}: {reason}" for reason, count in counts) or "nobody has judged an answer"
        raise fail(
            f"no rows come of it ({why})", "feedback", "correct answers in `chat` (/right ANSWER) or on the page"
        )
    lines = [made.origins]
    for place, entries in files.items():
        write_rows(place, entries)
        lines.append(f"{len(entries):6}  {place}")
    return "\n".join(lines)


def as_text(judgements: Sequence[Judgement]) -> str:
    """A line per judgement: number, time, what was said, question."""
    lines = [f"{one.id:5}  {one.given:%Y-%m-%d %H:%M}  {say_briefly(one):<30}  {one.question}" for one in judgements]
    return "\n".join(lines) or "no feedback yet"


def say_briefly(one: Judgement) -> str:
    if one.not_in_documents:
        return "not in the documents"
    return shorten_text(f"right: {one.right_answer}" if one.right_answer else one.rating, 30)
