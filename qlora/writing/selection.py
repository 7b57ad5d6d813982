"""From drafts to rows: which of those that passed the checks are kept, and the funnel that says what fell where.

    chosen = select_rows(written, wanted)      # .rows, .held_out, .funnel

Nothing is written anew: other wishes choose other rows from the same drafts.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from qlora.words import normalize
from qlora.writing.checks import ALIKE, same_question
from qlora.writing.drafts import Draft, Wanted, Written
from qlora.writing.question_kinds import kind_of_question

EXAMPLES = 3  # per reason


@dataclass
class Funnel:
    """What fell where: the number of drafts per reason, with the first examples of each."""

    counts: Counter = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, question: str, answer: str) -> None:
        self.counts[reason] += 1
        shown = self.examples.setdefault(reason, [])
        if len(shown) < EXAMPLES:
            shown.append(f"{question} -> {answer}")


@dataclass
class Chosen:
    """Rows and questions as dicts of our own format, and the funnel."""

    rows: list[dict]
    held_out: list[dict]
    funnel: Funnel
    written: int


def select_rows(written: Sequence[Written], wanted: Wanted) -> Chosen:
    """The best rows, every passage's first before any passage's second; rows that refuse; questions held out.

    The rows are in the order of writing.
    """
    funnel = Funnel()
    passed: list[tuple[int, Written, Draft]] = []
    for number, one in enumerate(written):
        for draft in one.drafts:
            if draft.dropped:
                funnel.add(draft.dropped, draft.question, draft.answer)
            else:
                passed.append((number, one, draft))
    passed = drop_alike(passed, wanted.asked, funnel)
    passed = drop_unlikely(passed, wanted.keep, funnel)
    chosen = take_in_turn(passed, wanted, funnel)
    rows = [as_row(draft.question, draft.answer, one.text, one.source) for _, one, draft in chosen]
    rows = [*rows, *refusing_rows(written, len(rows), wanted)]
    held = hold_out_documents({row["source"] for row in rows}, wanted.hold_out)
    held_out = [row for row in rows if row["source"] in held]
    # A question without an answer may be shown with the passage of another document.
    seen = {row["context"] for row in held_out if row["category"] != "unanswerable"}
    return Chosen(
        [row for row in rows if row["source"] not in held and row["context"] not in seen],
        held_out,
        funnel,
        sum(len(one.drafts) for one in written),
    )


def drop_alike(passed: list, asked: Sequence[str], funnel: Funnel) -> list:
    """Without rows whose question the user's evaluation asks, or an earlier row about the same document."""
    kept, seen, by_source = [], set(), defaultdict(list)
    for number, one, draft in passed:
        plain = normalize(draft.question)
        if any(same_question(draft.question, question) >= ALIKE for question in asked):
            funnel.add("an evaluation asks it", draft.question, draft.answer)
        elif plain in seen or any(same_question(draft.question, other) >= ALIKE for other in by_source[one.source]):
            funnel.add("repeats another", draft.question, draft.answer)
        else:
            seen.add(plain)
            by_source[one.source].append(draft.question)
            kept.append((number, one, draft))
    return kept


def drop_unlikely(passed: list, keep: float, funnel: Funnel) -> list:
    """The share of rows whose questions the writer finds likeliest; rows of a server have no likelihood and stay."""
    scored = sorted((draft.likelihood for _, _, draft in passed if draft.likelihood is not None), reverse=True)
    if keep >= 1 or not scored:
        return passed
    least = scored[max(0, round(keep * len(scored)) - 1)]
    kept = []
    for entry in passed:
        if entry[2].likelihood is None or entry[2].likelihood >= least:
            kept.append(entry)
        else:
            funnel.add("over --keep", entry[2].question, entry[2].answer)
    return kept


def take_in_turn(passed: list, wanted: Wanted, funnel: Funnel) -> list:
    """At most `rows` of them, and at most `most` per passage: the likeliest of each passage first."""
    by_passage = defaultdict(list)
    for entry in passed:
        by_passage[entry[0]].append(entry)
    turns = [
        (turn, *entry)
        for entries in by_passage.values()
        for turn, entry in enumerate(sorted(entries, key=lambda entry: -(entry[2].likelihood or 0)))
    ]
    turns.sort(key=lambda entry: entry[:2])
    allowed = [entry for entry in turns if entry[0] < wanted.per_passage]
    for _, _, _, draft in [*allowed[wanted.rows :], *(entry for entry in turns if entry[0] >= wanted.per_passage)]:
        funnel.add("more than --rows or --per-passage", draft.question, draft.answer)
    return [entry[1:] for entry in sorted(allowed[: wanted.rows], key=lambda entry: entry[1])]


def refusing_rows(written: Iterable[Written], answerable: int, wanted: Wanted) -> list[dict]:
    """Rows whose context does not hold the answer: the share of all rows, or as many as there are."""
    count = round(wanted.refusal_share / (1 - wanted.refusal_share) * answerable)
    found = [one.unanswerable for one in written if one.unanswerable]
    rows = [as_row(each.question, wanted.refusal, each.text, each.source, "unanswerable") for each in found[:count]]
    return [row for row in rows if all(same_question(row["instruction"], q) < ALIKE for q in wanted.asked)]


def hold_out_documents(sources: Iterable[str], share: float) -> set[str]:
    """About the share of the documents: those whose hash is lowest, at least one where there are two or more."""
    ordered = sorted(sources, key=lambda source: hashlib.sha256(source.encode()).digest())
    count = round(share * len(ordered))
    return set(ordered[: max(count, min(1, len(ordered) - 1)) if share else 0])


def as_row(question: str, answer: str, text: str, source: str, category: str = "closed_qa") -> dict:
    """A row in our own format."""
    return {"instruction": question, "response": answer, "context": text, "category": category, "source": source}


def count_kinds(rows: Sequence[dict]) -> dict[str, int]:
    """How many questions of each kind there are."""
    return dict(Counter(kind_of_question(row["instruction"]) for row in rows).most_common())
