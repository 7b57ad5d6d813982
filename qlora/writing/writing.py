"""The loop that writes: passage after passage, drafts are written, checked, and logged.

    write_drafts(passages, tools, log, wanted)      # [Written], as many as are wanted

Writer, reader and search are given: an adapter or a server, and a store.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from langchain_core.documents import Document

from qlora import console
from qlora.metrics import token_f1
from qlora.prompt import Prompt
from qlora.refusal import is_refusal
from qlora.writing.checks import ALIKE, check_text, same_question
from qlora.writing.drafts import Draft, DraftLog, Wanted, Written, passage_key
from qlora.writing.local_writer import LocalWriter
from qlora.writing.refusal_rows import Refusals

AGREEING = 0.6  # token F1 of the writer's answer and the reader's, from which on they are one answer


class Writer(Protocol):
    """Who writes drafts."""

    at_once: int  # passages that are asked about together
    failures: Counter  # of a server

    def write(self, texts: Sequence[str], count: int, seed: int) -> list[list[Draft]]: ...


@dataclass(frozen=True)
class Tools:
    """Who writes and who checks. Without `read`, drafts are not read back."""

    writer: Writer
    read: Callable[[Sequence[tuple[str, str]]], list[str]] | None  # (passage, question) -> answer
    find: Callable[[str, int], list[Document]]  # the search: question, number -> passages
    first: int  # of the passages that it finds, among which the right one must be
    refusal: str


def choose_writer(url: str | None, model: str | None, generator, prompt: Prompt) -> Writer:
    """The server's model, or the adapter of the generator."""
    if not url:
        return LocalWriter(generator, prompt)
    from qlora.writing.server_writer import ServerWriter

    return ServerWriter(url, model)


def make_reader(generator, prompt: Prompt):
    """read([(passage, question)]) -> answers, by the adapter of the generator."""
    return LocalWriter(generator, prompt).read


def write_drafts(passages: Sequence[Document], tools: Tools, log: DraftLog, wanted: Wanted) -> list[Written]:
    """What was written about the passages, in their order, until enough has passed the checks or all are done.

    What the log has of them is taken, and not written again.
    """
    done: list[Written] = []
    refusals = Refusals(tools, passages, wanted)
    passed = 0
    with console.progress() as bar:
        task = bar.add_task("rows", total=wanted.enough)
        for part in group_passages(passages, log, tools.writer.at_once):
            if passage_key(part[0]) not in log.done:
                if passed >= wanted.enough:
                    break
                log.add(*write_part(part, tools, wanted, refusals))
            for one in (log.done[passage_key(passage)] for passage in part):
                done.append(one)
                passed += min(wanted.per_passage, sum(not draft.dropped for draft in one.drafts))
            shown = f"rows, passage {len(done)} of {len(passages)}"
            bar.update(task, completed=min(passed, wanted.enough), description=shown)
    return done


def group_passages(passages: Sequence[Document], log: DraftLog, size: int) -> Iterator[list[Document]]:
    """The passages one by one where they are in the log, the others in groups."""
    missing: list[Document] = []
    for passage in passages:
        if passage_key(passage) in log.done:
            yield [passage]
            continue
        missing.append(passage)
        if len(missing) == size:
            yield missing
            missing = []
    if missing:
        yield missing


def write_part(part: Sequence[Document], tools: Tools, wanted: Wanted, refusals: Refusals) -> list[Written]:
    """The checked drafts about some passages, written together."""
    seed = random.Random(f"{wanted.seed} {passage_key(part[0])}").getrandbits(32)
    made = tools.writer.write([passage.page_content for passage in part], wanted.drafts, seed)
    written = [
        Written(passage_key(passage), passage.metadata["source"], passage.page_content, drafts)
        for passage, drafts in zip(part, made, strict=True)
    ]
    review_drafts(written, part, tools)
    for one, passage in zip(written, part, strict=True):
        one.unanswerable = refusals.make(one, passage)
    return written


def review_drafts(written: Sequence[Written], passages: Sequence[Document], tools: Tools) -> None:
    """Notes with each draft the first check that it fails, the reader's answer, and the rank of its passage."""
    for one, passage in zip(written, passages, strict=True):
        check_texts(one, passage.metadata.get("heading", ""))
    if tools.read:
        read_back(written, tools)
    for one, passage in zip(written, passages, strict=True):
        for draft in one.drafts:
            if not draft.dropped:
                draft.rank = find_rank(draft.question, passage, tools.find)
                found = draft.rank and draft.rank <= tools.first
                draft.dropped = "" if found else "search does not find its passage"


def check_texts(written: Written, heading: str) -> None:
    """The checks that need nothing but the texts; of questions that are alike the first stays."""
    kept: list[Draft] = []
    for one in written.drafts:
        one.dropped = one.dropped or check_text(one, written.text, heading)
        if not one.dropped and any(same_question(one.question, other.question) >= ALIKE for other in kept):
            one.dropped = "repeats another"
        if not one.dropped:
            kept.append(one)


def read_back(written: Sequence[Written], tools: Tools) -> None:
    """The round trip: the reader, given passage and question, must give the answer back."""
    pairs = [(one.text, draft) for one in written for draft in one.drafts if not draft.dropped]
    answers = tools.read([(text, draft.question) for text, draft in pairs])
    for (_, draft), answer in zip(pairs, answers, strict=True):
        draft.read, draft.agreement = answer, round(token_f1(answer, [draft.answer]), 3)
        if is_refusal(answer, tools.refusal):
            draft.dropped = "reader finds no answer"
        elif draft.agreement < AGREEING or yes_or_no(answer) != yes_or_no(draft.answer):
            draft.dropped = "reader answers otherwise"


def yes_or_no(answer: str) -> str:
    """The word, where the answer begins with it: the rest of a sentence outweighs the word in token F1."""
    first = re.match(r"\W*(yes|no)\b", answer, re.IGNORECASE)
    return first[1].lower() if first else ""


def find_rank(question: str, passage: Document, find, depth: int = 10) -> int | None:
    """The place of the passage among the first `depth` that the search finds, from 1."""
    texts = [found.page_content for found in find(question, depth)]
    return texts.index(passage.page_content) + 1 if passage.page_content in texts else None
