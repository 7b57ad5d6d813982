"""What answers the jobs: `ask`'s chain for one, and the same steps for several at once, piece by piece.

service = Service(find, prompt, generator, threshold, complete)
service.answer(jobs)           # in the worker's thread
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document

from qlora import machine
from qlora.answering import chain
from qlora.answering.chat_session import Session
from qlora.answering.citations import check_answer, refuse
from qlora.answering.continuous_batch import ContinuousBatch
from qlora.answering.conversation import Turn, answer_question
from qlora.answering.shared_beginnings import common_beginning
from qlora.prompt import Prompt, encode_prompt
from qlora.serving.worker import BATCH, Job
from qlora.words import clean

log = logging.getLogger("qlora.serving")


class Cancelled(Exception):
    """The asker went away, or pressed stop."""


@dataclass(frozen=True)
class Service:
    """The parts that `ask` loads. `complete` rewrites questions that continue a conversation; None: by rule."""

    find: Callable[[str], list[Document]]
    prompt: Prompt
    generator: Any  # a Generator or a ServerModel
    threshold: float | None
    complete: Callable[[list[dict]], str] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)  # a tokenizer serves one search at a time

    def search(self, text: str) -> list[Document]:
        with self.lock:
            return self.find(text)

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
        bound = model.bind(stop=list(job.stop)) if job.stop else model
        built = chain.build_chain(self.search, fill, bound, self.prompt.refusal, self.threshold)
        built = built.with_config(callbacks=[Pieces(job)])
        try:
            turn = answer_question(built, job.question, job.history, self.stand_alone(job))
        except Cancelled:
            return
        job.emit(turn)

    def answer_together(self, jobs: Sequence[Job], more: Callable[[int], list[Job]]) -> None:
        """The chain's steps for several questions, whose answers grow together."""
        texts = [self.prompt.messages(question, [question]) for question in "?!"]
        beginning = common_beginning([encode_prompt(self.generator.tokenizer, messages) for messages in texts])
        batch = ContinuousBatch(self.generator, beginning)
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
            prompt, take = asked
            watch = follow(take, len(prompt))
            model.generate_ids([prompt], stopping_criteria=StoppingCriteriaList([watch]))

    def prepare(self, job: Job, model) -> tuple[list[int], Callable[[int], bool]] | None:
        """The prompt, and what takes the answer's tokens; None when the question is refused unread, or asked no more.

        Errors are the job's own: those that are answered with it go on.
        """
        if job.cancelled.is_set():
            return None
        started = time.perf_counter()
        try:
            found = self.search(clean(self.stand_alone(job)))
            searched = time.perf_counter() - started
            if chain.refuses_unread(found, self.threshold):
                job.emit(Turn(job.question, refuse(found, self.prompt.refusal), job.question))
                return None
            limit = job.max_tokens or model.max_new_tokens
            fill = chain.make_fill(self.prompt, model.model_copy(update={"max_new_tokens": limit}))
            messages = fill(clean(job.question), [d.page_content for d in found], job.history)
        except Exception as error:
            log.exception("a question failed", exc_info=error)
            job.emit(error)
            return None
        prompt = encode_prompt(model.tokenizer, messages)
        finish = partial(self.finish, job, found, searched, len(prompt), time.perf_counter())
        return prompt, Row(job, limit, model.tokenizer, model.end_tokens(), finish).add

    def finish(self, job: Job, found: list[Document], searched: float, prompt: int, started: float, row: "Row") -> None:
        """Emits the turn of a complete answer to a prompt of so many tokens."""
        answer = check_answer(row.text, found, self.prompt.refusal)
        timings = {"retrieve_s": round(searched, 3), "first_token_s": round(row.first - started, 3)}
        timings |= {"generate_s": round(time.perf_counter() - started, 3)}
        tokens = {"prompt": prompt, "completion": len(row.ids)}
        job.emit(Turn(job.question, answer, job.question, timings, tokens))


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

    def __init__(self, job: Job):
        self.job = job

    def on_llm_new_token(self, token, *args, **kwargs):
        if self.job.cancelled.is_set():
            raise Cancelled
        if token:
            self.job.emit(token)


class Row:
    """One answer of a batch while it grows."""

    def __init__(self, job: Job, limit: int, tokenizer, ends: Sequence[int], finish: Callable[["Row"], None]):
        self.job, self.limit, self.tokenizer, self.ends, self.finish = job, limit, tokenizer, ends, finish
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
            piece, self.text = text[len(self.text) :], text
            if piece and not self.job.cancelled.is_set():
                self.job.emit(piece)
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
