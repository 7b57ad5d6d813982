"""What answers the jobs: `ask`'s chain for one, and the same steps for several at once, piece by piece.

service = Service(finding, prompt, generator, complete)
service.answer(jobs)           # in the worker's thread
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document

from qlora import machine
from qlora.answering import chain
from qlora.answering.chat_session import Session
from qlora.answering.citations import check_answer, refuse
from qlora.answering.continuous_batch import Asked, ContinuousBatch
from qlora.answering.conversation import Turn, answer_question
from qlora.answering.shared_beginnings import rules_of_all
from qlora.answering.spelling import Speller
from qlora.prompt import Prompt, encode_prompt
from qlora.serving.worker import BATCH, Job
from qlora.words import clean

log = logging.getLogger("qlora.serving")


class Cancelled(Exception):
    """The asker went away, or pressed stop."""


@dataclass(frozen=True)
class Service:
    """The parts that `ask` loads. `complete` rewrites questions that continue a conversation; None: by rule."""

    finding: chain.Finding
    prompt: Prompt
    generator: Any  # a Generator or a ServerModel
    complete: Callable[[list[dict]], str] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)  # a tokenizer serves one search at a time

    def finding_for(self, job: Job) -> chain.Finding:
        """How passages are found; the ranking is the adapter's, and not for the base model."""
        return replace(self.finding, search=self.search, ranker=self.finding.ranker if job.tuned else None)

    def search(self, text: str, k: int) -> list[Document]:
        with self.lock:
            return self.finding.search(text, k)

    def answer(self, jobs: Sequence[Job], more: Callable[[int], list[Job]] = lambda places: []) -> None:
        """Emits the pieces of each answer, then its Turn. Jobs have equal `decoding`.

        `more(places)` gives jobs that have come meanwhile: they join those that are answered.
        """
        is_local = hasattr(self.generator, "generate_ids")
        with nullcontext() if jobs[0].tuned else self.generator.without_adapter():
            if is_local and len(jobs) == 1 and jobs[0].stop:  # transformers gives the stop text out, too
                self.answer_until(jobs[0])
            elif len(jobs) == 1 or not is_local or self.generator.temperature > 0:
                for job in jobs:
                    self.answer_one(job)
            else:
                self.answer_together(jobs, more)

    def stand_alone(self, job: Job) -> str:
        """The text to search for, as `chat` rewrites it."""
        session = Session(complete=self.complete)
        session.turns = as_turns(job.history)
        return session.stand_alone(job.question)

    def model_for(self, job: Job, limit: int | None):
        """The generator with the job's decoding, as far as it names one."""
        asked = {"temperature": job.temperature, "top_p": job.top_p, "seed": job.seed}
        given = {name: value for name, value in asked.items() if value is not None}
        return self.generator.model_copy(update=given | limit_field(self.generator, limit))

    def answer_one(self, job: Job) -> None:
        """Through the chain of `ask`."""
        model = self.model_for(job, job.max_tokens)
        fill = chain.make_fill(self.prompt, model)
        built = chain.build_chain(self.finding_for(job), fill, model, self.prompt.refusal, job.stop)
        built = built.with_config(callbacks=[Pieces(job, self.prompt.refusal)])
        try:
            turn = answer_question(built, job.question, job.history, self.stand_alone(job))
        except Cancelled:
            return
        job.finish(turn)

    def answer_together(self, jobs: Sequence[Job], more: Callable[[int], list[Job]]) -> None:
        """The chain's steps for several questions, whose answers grow together."""
        batch = ContinuousBatch(self.generator, rules_of_all(self.generator.tokenizer, self.prompt))
        while jobs or batch:
            asked = [self.prepare(job, self.generator) for job in jobs]
            batch.admit([one for one in asked if one])
            machine.threads().adjust()
            batch.step()
            jobs = more(BATCH - len(batch))

    def answer_until(self, job: Job) -> None:
        """Answers a question until one of its stop texts."""
        from transformers import StoppingCriteriaList

        model = self.model_for(job, job.max_tokens)
        if asked := self.prepare(job, model):
            watch = follow(asked.take, len(asked.prompt))
            asked.generator.generate_ids([asked.prompt], stopping_criteria=StoppingCriteriaList([watch]))

    def prepare(self, job: Job, model) -> Asked | None:
        """The prompt, and what takes the answer's tokens; None when the question is refused, or asked no more.

        Errors are the job's own: those that are answered with it go on.
        """
        if job.cancelled.is_set():
            return None
        started = time.perf_counter()
        try:
            finding, question = self.finding_for(job), clean(job.question)
            found = finding.search(clean(self.stand_alone(job)), finding.depth)
            searched = time.perf_counter()
            found = finding.rank(question, found, job.history)[: finding.top_k]
            timings = {"retrieve_s": searched - started, "rank_s": time.perf_counter() - searched}
            if finding.refuses(found):
                job.emit(Turn(job.question, refuse(found, self.prompt.refusal), job.question))
                return None
            limit = job.max_tokens or model.max_new_tokens
            fill = chain.make_fill(self.prompt, model.model_copy(update={"max_new_tokens": limit}))
            messages = fill(question, [d.page_content for d in found], job.history)
        except Exception as error:
            log.exception("a question failed", exc_info=error)
            job.emit(error)
            return None
        prompt = encode_prompt(model.tokenizer, messages)
        finish = partial(self.finish, job, found, timings, len(prompt), time.perf_counter())
        speller = Speller(chain.known_texts(job.question, found, self.prompt.refusal))
        job.held = chain.is_doubted(found)
        row = Row(job, limit, model, speller, finish)
        read = model.known.get(tuple(prompt))
        return Asked(prompt, row.add, chain.unrefusing(model, found, self.prompt.refusal), read)

    def finish(self, job: Job, found: list[Document], timings: dict, prompt: int, started: float, row: "Row") -> None:
        """Emits the turn of a complete answer to a prompt of so many tokens."""
        answer = chain.finish_answer(row.text, job.question, found, self.prompt.refusal)
        timings |= {"first_token_s": row.first - started, "generate_s": time.perf_counter() - started}
        tokens = {"prompt": prompt, "completion": len(row.ids)}
        rounded = {name: round(seconds, 3) for name, seconds in timings.items()}
        job.finish(Turn(job.question, answer, job.question, rounded, tokens))


def limit_field(generator, count: int | None) -> dict[str, int]:
    """The field of the generator that holds the largest number of new tokens."""
    return {"max_tokens" if "max_tokens" in type(generator).model_fields else "max_new_tokens": count} if count else {}


def as_turns(history: Sequence[dict]) -> list[Turn]:
    """Earlier questions and answers as turns, of which only the texts are known."""
    pairs = zip(history[::2], history[1::2], strict=False)
    return [Turn(q["content"], check_answer(a["content"], (), ""), q["content"]) for q, a in pairs]


class Pieces(BaseCallbackHandler):
    """Emits each piece of an answer; a cancelled job ends the generation at its next token."""

    raise_error = True  # LangChain logs other exceptions of a callback, and goes on

    def __init__(self, job: Job, refusal: str):
        self.job, self.refusal = job, refusal
        self.speller = Speller(())

    def on_chat_model_start(self, serialized, messages, *args, tags=None, **kwargs):
        self.job.held = chain.DOUBTED in (tags or ())
        self.speller = Speller([messages[0][-1].text, self.refusal])  # passages and question

    def on_llm_new_token(self, token, *args, **kwargs):
        if self.job.cancelled.is_set():
            raise Cancelled
        self.job.emit_piece(self.speller.add(token))

    def on_llm_end(self, *args, **kwargs):
        self.job.emit_piece(self.speller.finish())


class Row:
    """One answer of a batch while it grows."""

    def __init__(self, job: Job, limit: int, model, speller: Speller, finish: Callable[["Row"], None]):
        self.job, self.limit, self.tokenizer, self.ends = job, limit, model.tokenizer, model.end_tokens()
        self.speller, self.finish = speller, finish
        self.ids: list[int] = []
        self.text, self.first, self.done = "", 0.0, False

    def add(self, token: int) -> bool:
        """Takes the next token, emits the text that is certain by now, and says whether the answer is complete."""
        if self.done:
            return True
        self.first = self.first or time.perf_counter()
        self.ids.append(token)
        self.done = token in self.ends or len(self.ids) >= self.limit or self.job.cancelled.is_set()
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        for mark in self.job.stop:
            if mark in text:
                text, self.done = text.partition(mark)[0], True
        if not text.endswith("\ufffd") or self.done:  # half a character
            piece, self.text = self.speller.add(text[len(self.text) :]), text
            piece += self.speller.finish() if self.done else ""
            if not self.job.cancelled.is_set():
                self.job.emit_piece(piece)
        if self.done and not self.job.cancelled.is_set():
            self.finish(self)
        return self.done


def follow(take: Callable[[int], bool], start: int) -> Callable:
    """A stopping criterion of one answer, which `take` gets token by token."""
    import torch

    seen = start

    def is_done(ids, scores, **kwargs):
        nonlocal seen
        new, seen = ids[0, seen:].tolist(), ids.shape[1]
        return torch.tensor([any([take(token) for token in new])], device=ids.device)

    return is_done
