"""The rows of a dataset to train on: which are selected or dropped, and why.

    selection = read_selection(["category=closed_qa,summarization", "source!=old.md"], ["response=2"], [], problems)
    reason_to_drop(row, selection)      # "", or such as "response shorter than 2 words"

Texts are compared as sequences of whole words (`normalize`), so that "9" is not in "19".
"""

import hashlib
import random
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from qlora.console import Invalid, Problems, fail, number, shorten_text
from qlora.prompt import Prompt
from qlora.refusal import is_refusal
from qlora.training.rows import COLUMNS, REQUIRED, Row
from qlora.words import answer_span, normalize, pad_words

EXAMPLES = 3  # rows shown per reason


@dataclass(frozen=True)
class Selection:
    """Conditions on rows: values that a column must or must not have, its number of words, and the most rows.

    `extractive` demands that the response is in the context, where there is one. At most `refusal_share` of the rows
    may refuse, in the words of `refusal`. None may have one of the questions in `asked` (`normalize`).
    """

    equal: dict[str, set[str]] = field(default_factory=dict)
    unequal: dict[str, set[str]] = field(default_factory=dict)
    min_words: dict[str, int] = field(default_factory=dict)
    max_words: dict[str, int] = field(default_factory=dict)
    max_rows: int | None = None
    extractive: bool = False
    refusal_share: float = 1.0
    refusal: str = Prompt.refusal
    asked: frozenset[str] = frozenset()


class Dropped(Counter):
    """The number of rows dropped per reason; `examples` holds the first three of each."""

    def __init__(self, *counts):
        super().__init__(*counts)
        self.examples: dict[str, list[dict[str, str]]] = {}

    def add(self, reason: str, row: Row) -> None:
        self[reason] += 1
        shown = self.examples.setdefault(reason, [])
        if len(shown) < EXAMPLES:
            shown.append({name: shorten_text(getattr(row, name)) for name in REQUIRED})


# ------------------------------------------------------------------------------- command line


def read_selection(
    filters: Sequence[str],
    min_words: Sequence[str],
    max_words: Sequence[str],
    problems: Problems,
) -> Selection:
    """The selection that the words of --filter, --min-words and --max-words describe.

    Adds a problem for every other word. Valid are `COLUMN=A,B`, `COLUMN!=A,B`, and `COLUMN=N` for numbers of words.
    """
    equal, unequal = {}, {}
    for text in filters:
        match = re.fullmatch(r"([^=!]+)(!?=)(.+)", text, re.DOTALL)
        if not match:
            problems.add(f"--filter {text} is not a filter", "command line", "write COLUMN=A,B or COLUMN!=A,B")
        elif check_column(match[1], "--filter", problems):
            values = (equal if match[2] == "=" else unequal).setdefault(match[1], set())
            values.update(value.strip() for value in match[3].split(","))
    fewest = read_word_counts(min_words, "--min-words", problems)
    most = read_word_counts(max_words, "--max-words", problems)
    for name in fewest.keys() & most.keys():
        if fewest[name] > most[name]:
            what = f"--min-words {name}={fewest[name]} is above --max-words {name}={most[name]}"
            problems.add(what, "command line", "give a smaller --min-words")
    return Selection(equal, unequal, fewest, most)


def read_word_counts(texts: Sequence[str], flag: str, problems: Problems) -> dict[str, int]:
    """Column -> number of words, of `COLUMN=N` words."""
    counts = {}
    for text in texts:
        name, _, digits = text.partition("=")
        count = number(int, 1)(digits)
        if isinstance(count, Invalid):
            problems.add(f"{flag} {text} is not valid", "command line", f"write COLUMN=N, N {count.expected}")
        elif check_column(name, flag, problems):
            counts[name] = count
    return counts


def check_column(name: str, flag: str, problems: Problems) -> bool:
    """Whether rows have the column; adds a problem when they don't."""
    if name not in COLUMNS:
        problems.add(f"unknown column {name}", flag, f"filter by one of {', '.join(COLUMNS)}")
    return name in COLUMNS


# ------------------------------------------------------------------------------- select


def reason_to_drop(row: Row, selection: Selection) -> str:
    """The reason to drop a row, or an empty string."""
    return reason_by_value(row, selection) or reason_by_words(row, selection)


def reason_by_value(row: Row, selection: Selection) -> str:
    """A reason when a column has a value that is not selected, a question is excluded, or a needed column is empty."""
    for name, values in selection.equal.items():
        if getattr(row, name) not in values:
            return f"{name} not selected"
    for name, values in selection.unequal.items():
        if getattr(row, name) in values:
            return f"{name} not selected"
    if normalize(row.instruction) in selection.asked:
        return "question of --exclude"
    return next((f"empty {name}" for name in REQUIRED if not getattr(row, name)), "")


def reason_by_words(row: Row, selection: Selection) -> str:
    """A reason when a column is too short or too long, or the response is not in the context."""
    for name, fewest in selection.min_words.items():
        if len(getattr(row, name).split()) < fewest:
            return f"{name} shorter than {fewest} words"
    for name, most in selection.max_words.items():
        if len(getattr(row, name).split()) > most:
            return f"{name} longer than {most} words"
    if selection.extractive and not is_extractive(row.response, row.context, selection.refusal):
        return "response not in context"
    return ""


def is_extractive(response: str, context: str, refusal: str = Prompt.refusal) -> bool:
    """Whether the answer is in the context, letter by letter and as whole words.

    Case and white space don't matter. True without a context, and for refusals and a bare "Yes" or "No".
    """
    if not context or is_refusal(response, refusal):
        return True
    span = answer_span(response)
    letters = " ".join(span.casefold().split()) in " ".join(context.casefold().split())
    return letters and (not normalize(span) or pad_words(span) in pad_words(context))


def word_refusals(rows: Sequence[Row], refusal: str) -> list[Row]:
    """The rows, where those that refuse in English, as SQuAD's unanswered ones do here, have this refusal."""
    if refusal == Prompt.refusal:
        return list(rows)
    return [replace(row, response=refusal) if is_refusal(row.response) else row for row in rows]


def limit_refusals(rows: Sequence[Row], selection: Selection, seed: int) -> list[Row]:
    """The rows in their order, with at most `refusal_share` of them refusing."""
    share = selection.refusal_share
    refusing = [row for row in rows if is_refusal(row.response, selection.refusal)]
    most = len(rows) if share == 1 else round(share / (1 - share) * (len(rows) - len(refusing)))
    left_out = set(refusing) - set(sample_rows(refusing, most, seed))
    return [row for row in rows if row not in left_out]


def sample_rows(rows: Sequence[Row], count: int | None, seed: int) -> list[Row]:
    """At most `count` different rows in their order: those whose hash with the seed is lowest.

    The sample depends only on the content of the rows and the seed; a smaller one is part of a larger one.
    """
    if count is None or len(rows) <= count:
        return list(rows)

    def rank(row: Row) -> bytes:
        cells = [str(seed), *(getattr(row, name) for name in COLUMNS)]
        return hashlib.sha256("\0".join(cells).encode()).digest()

    chosen = set(sorted(rows, key=rank)[:count])
    return [row for row in rows if row in chosen]


TEMPLATE = 5  # contexts with one instruction from which on it is a task for any text ("Summarise this"), not a question
EVERY_ROW = Selection()


def keep_usable(rows: Sequence[Row], selection: Selection = EVERY_ROW, seed: int = 0) -> tuple[list[Row], Dropped]:
    """The rows that pass, in their order, and the number dropped per reason, with examples.

    Rows with an empty instruction or response and repeated rows are dropped as well; `seed` decides which rows stay
    within `max_rows`. Raises UserError when nothing is left.
    """
    passed: dict[Row, None] = {}
    dropped = Dropped()
    for row in rows:
        reason = reason_to_drop(row, selection) or ("duplicate" if row in passed else "")
        if reason:
            dropped.add(reason, row)
        else:
            passed[row] = None
    if not passed:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise fail("no row is left after filtering", reasons, "loosen --filter or give other rows")
    limited = limit_refusals(list(passed), selection, seed)
    kept = sample_rows(limited, selection.max_rows, seed)
    for reason, rows, chosen in (("--refusal-share", passed, set(limited)), ("--max-rows", limited, set(kept))):
        for row in rows:
            if row not in chosen:
                dropped.add(f"over {reason}", row)
    return kept, dropped


def hold_out(
    rows: Sequence[Row], share: float, seed: int, trained: Collection[str] = ()
) -> tuple[list[Row], list[Row]]:
    """Training rows and evaluation rows without a document in common; about `share` of the rows are held out.

    At most the share and one document more, which has less than half of all rows; where every document has that many,
    the smallest; none of the documents in `trained`. Raises UserError when all others are one document.
    """
    by_document = defaultdict(list)
    for row in rows:
        if row.document not in trained:
            by_document[row.document].append(row)
    if len(by_document) < 2:
        raise fail("all rows come from one document", "dataset", "give rows of two documents, to hold one out")
    documents = sorted(by_document)
    random.Random(seed).shuffle(documents)
    smallest = min(documents, key=lambda document: len(by_document[document]))
    smaller = [document for document in documents if len(by_document[document]) < len(rows) / 2] or [smallest]
    held: set[str] = set()
    count = 0
    for document in smaller if len(smaller) < len(documents) else smaller[:-1]:
        if count >= share * len(rows):
            break
        held.add(document)
        count += len(by_document[document])
    training = [row for row in rows if row.document not in held]
    return training, [row for row in rows if row.document in held]


def drop_leaked(training: Sequence[Row], held_out: Sequence[Row]) -> tuple[list[Row], Dropped]:
    """Training rows whose question and context no held-out row has, and what was dropped.

    `hold_out` keeps documents apart, but two documents may share a paragraph, or answer one question.
    Whole words are compared (`normalize`). An instruction for any text ("Summarise this"), with `TEMPLATE` contexts
    or more, is not a question. Raises UserError when no training row is left.
    """
    contexts_of = defaultdict(set)
    for row in [*training, *held_out]:
        contexts_of[normalize(row.instruction)].add(normalize(row.context))
    templates = {question for question, contexts in contexts_of.items() if len(contexts) >= TEMPLATE}
    questions = {normalize(row.instruction) for row in held_out} - templates - {""}
    contexts = {normalize(row.context) for row in held_out} - {""}
    kept, dropped = [], Dropped()
    for row in training:
        if normalize(row.instruction) in questions:
            dropped.add("question also held out", row)
        elif normalize(row.context) in contexts:
            dropped.add("context also held out", row)
        else:
            kept.append(row)
    if not kept:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise fail("no training row is left beside the held-out ones", reasons, "give rows of more documents")
    return kept, dropped
