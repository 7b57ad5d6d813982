"""What answers the jobs: `ask`'s chain for one, and the same steps for several at once, piece by piece.

service = Service(find, prompt, generator, threshold, complete)
service.answer(jobs)           # in the worker's thread
"""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document

from qlora.answering import chain
from qlora.answering.chat_session import Session
from qlora.answering.citations import check_answer, refuse
from qlora.answering.conversation import Turn, answer_question
from qlora.prompt import Prompt, encode_prompt
from qlora.serving.worker import Job
from qlora.words import clean


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

    def answer(self, jobs: Sequence[Job]) -> None:
        """Emits the pieces of each answer, then its Turn. Jobs have equal `decoding`."""
        with nullcontext() if jobs[0].tuned else self.generator.without_adapter():
            is_local = hasattr(self.generator, "generate_ids")
            if len(jobs) == 1 and not (jobs[0].stop and is_local):  # transformers gives the stop text out, too
                self.answer_one(jobs[0])
            else:
                self.answer_several(jobs)

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

    def answer_several(self, jobs: Sequence[Job]) -> None:
        """The chain's steps for several questions, whose answers are generated together."""
        turns: dict[int, Turn] = {}
        asked: list[tuple[int, list[Document], float]] = []
        for n, job in enumerate(jobs):
            started = time.perf_counter()
            found = self.search(clean(self.stand_alone(job)))
            seconds = time.perf_counter() - started
            if chain.refuses_unread(found, self.threshold):
                turns[n] = Turn(job.question, refuse(found, self.prompt.refusal), job.question)
            else:
                asked.append((n, found, seconds))
        if asked:
            self.generate(jobs, asked, turns)
        for n, job in enumerate(jobs):
            if n in turns and not job.cancelled.is_set():
                job.emit(turns[n])

    def generate(self, jobs: Sequence[Job], asked: list, turns: dict[int, Turn]) -> None:
        """Adds the turns of the questions that the model answers."""
        from transformers import StoppingCriteriaList

        limits = [jobs[n].max_tokens or self.generator.max_new_tokens for n, _, _ in asked]
        model = self.model_for(jobs[0], max(limits))
        fill = chain.make_fill(self.prompt, model)
        prompts = []
        for n, found, _ in asked:
            messages = fill(clean(jobs[n].question), [d.page_content for d in found], jobs[n].history)
            prompts.append(encode_prompt(model.tokenizer, messages))
        rows = [
            Row(jobs[n], limit, model.tokenizer, model.end_tokens())
            for (n, _, _), limit in zip(asked, limits, strict=True)
        ]
        started = time.perf_counter()
        watch = follow(rows, max(map(len, prompts)))
        model.generate_ids(prompts, stopping_criteria=StoppingCriteriaList([watch]))
        seconds = time.perf_counter() - started
        for (n, found, searched), row, prompt in zip(asked, rows, prompts, strict=True):
            answer = check_answer(row.text, found, self.prompt.refusal)
            timings = {"retrieve_s": round(searched, 3), "first_token_s": round(row.first - started, 3)}
            timings |= {"generate_s": round(seconds, 3)}
            tokens = {"prompt": len(prompt), "completion": len(row.ids)}
            turns[n] = Turn(jobs[n].question, answer, jobs[n].question, timings, tokens)


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

    def __init__(self, job: Job, limit: int, tokenizer, ends: Sequence[int]):
        self.job, self.limit, self.tokenizer, self.ends = job, limit, tokenizer, ends
        self.ids: list[int] = []
        self.text, self.first, self.done = "", 0.0, False

    def add(self, token: int) -> None:
        """Takes the next token, and emits the text that is certain by now."""
        if self.done:
            return
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


def follow(rows: Sequence[Row], start: int) -> Callable:
    """A stopping criterion that gives each row its new tokens, and says which rows need no further one.

    With prompt lookup a single row may get several at once.
    """
    import torch

    def is_done(ids, scores, **kwargs):
        for row, made in zip(rows, ids[:, start:].tolist(), strict=True):
            for token in made[len(row.ids) :]:
                row.add(token)
        return torch.tensor([row.done for row in rows], device=ids.device)

    return is_done
