"""The loop that writes: passage after passage, drafts are written, checked, and logged.

    write_drafts(passages, tools, log, wanted)      # [Written], as many as are wanted

Writer, reader and search are given: an adapter or a server, and a store.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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

    at_once: int  # passages that are asked about at the same time
    failures: Counter  # of a server

    def write(self, text: str, count: int, seed: int) -> list[Draft]: ...


@dataclass(frozen=True)
class Tools:
    """Who writes and who checks. Without `read`, drafts are not read back."""

    writer: Writer
    read: Callable[[str, Sequence[str]], list[str]] | None
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
    """read(passage, questions) -> answers, by the adapter of the generator."""
    return LocalWriter(generator, prompt).read


def write_drafts(passages: Sequence[Document], tools: Tools, log: DraftLog, wanted: Wanted) -> list[Written]:
    """What was written about the passages, in their order, until enough has passed the checks or all are done.

    Passages that are in the log already are not asked about again.
    """
    done: list[Written] = []
    refusals = Refusals(tools, passages, wanted)
    passed = 0
    with console.progress() as bar, ThreadPoolExecutor(tools.writer.at_once) as pool:
        task = bar.add_task("rows", total=wanted.enough)
        for passage, drafts in draft(passages, tools.writer, log, wanted, pool):
            key = passage_key(passage)
            if key not in log.done:
                written = Written(key, passage.metadata["source"], passage.page_content, drafts)
                review_drafts(written, passage, tools)
                written.unanswerable = refusals.make(written, passage)
                log.add(written)
            done.append(log.done[key])
            passed += min(wanted.per_passage, sum(not one.dropped for one in log.done[key].drafts))
            bar.update(
                task, completed=min(passed, wanted.enough), description=f"rows, passage {len(done)} of {len(passages)}"
            )
            if passed >= wanted.enough and len(done) % tools.writer.at_once == 0:  # what was asked for is logged
                break
    return done


def draft(passages, writer: Writer, log: DraftLog, wanted: Wanted, pool) -> Iterator[tuple[Document, list[Draft]]]:
    """Each passage with its drafts, some passages at once where the writer can; those in the log come without."""

    def write(number: int) -> list[Draft]:
        seed = random.Random(f"{wanted.seed} {passage_key(passages[number])}").getrandbits(32)
        return writer.write(passages[number].page_content, wanted.drafts, seed)

    run = pool.map if writer.at_once > 1 else map  # a model on this machine is slower in another thread
    for at in range(0, len(passages), writer.at_once):
        part = range(at, min(at + writer.at_once, len(passages)))
        missing = [n for n in part if passage_key(passages[n]) not in log.done]
        made = dict(zip(missing, run(write, missing), strict=True))
        yield from ((passages[n], made.get(n, [])) for n in part)


def review_drafts(written: Written, passage: Document, tools: Tools) -> None:
    """Notes with each draft the first check that it fails, the reader's answer, and the rank of its passage."""
    kept: list[Draft] = []
    for one in written.drafts:
        one.dropped = one.dropped or check_text(one, written.text, passage.metadata.get("heading", ""))
        if not one.dropped and any(same_question(one.question, other.question) >= ALIKE for other in kept):
            one.dropped = "repeats another"
        if not one.dropped:
            kept.append(one)
    if tools.read and kept:
        for one, answer in zip(kept, tools.read(written.text, [one.question for one in kept]), strict=True):
            one.read, one.agreement = answer, round(token_f1(answer, [one.answer]), 3)
            if is_refusal(answer, tools.refusal):
                one.dropped = "reader finds no answer"
            elif one.agreement < AGREEING:
                one.dropped = "reader answers otherwise"
    for one in kept:
        if not one.dropped:
            one.rank = find_rank(one.question, passage, tools.find)
            one.dropped = "" if one.rank and one.rank <= tools.first else "search does not find its passage"


def find_rank(question: str, passage: Document, find, depth: int = 10) -> int | None:
    """The place of the passage among the first `depth` that the search finds, from 1."""
    texts = [found.page_content for found in find(question, depth)]
    return texts.index(passage.page_content) + 1 if passage.page_content in texts else None
