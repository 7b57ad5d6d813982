"""One model for many askers: a queue, and a thread that answers what waits in batches.

    worker = Worker(service.answer, size=32)
    worker.submit(Job(question, emit=...))     # raises Full when too many wait
    worker.call(work)                          # the result of other work of the model's thread, such as embedding

Torch runs in this one thread. A second one would slow both down on the CPU.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

from langchain_core.embeddings import Embeddings

from qlora.answering.conversation import Turn

BATCH = 8  # answers that are generated together
AT_ONCE = 32  # answers that are asked of a model server at the same time
PART = 16  # texts that are embedded between two tokens
log = logging.getLogger("qlora.serving")


class Full(Exception):
    """Too many questions are waiting."""


@dataclass(eq=False)
class Job:
    """A question with its history and decoding; `emit` takes its events from the worker's thread.

    An event is a piece of text, the finished Turn, or the exception that ended it.
    """

    question: str
    history: tuple[dict, ...] = ()
    tuned: bool = True
    temperature: float | None = None  # None: as the server was started, here and below
    top_p: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    emit: Callable[[str | Turn | Exception], None] = lambda event: None
    cancelled: threading.Event = field(default_factory=threading.Event)
    held: bool = False  # the answer is given out when it is checked, not piece by piece

    def emit_piece(self, piece: str) -> None:
        if piece and not self.held:
            self.emit(piece)

    def finish(self, turn: Turn) -> None:
        """Emits the turn, after the text that was held."""
        if self.held:
            self.emit(turn.answer.text)
        self.emit(turn)

    @property
    def decoding(self) -> tuple:
        """Jobs with equal values can be answered together; sampled ones are answered alone."""
        alone = id(self) if self.temperature else 0
        return (self.tuned, alone)


class Worker:
    """Answers jobs, the oldest first, and those that wait with it: `answer(jobs, more)` emits the events of all.

    `more(places)` gives `answer` jobs that can join. A model on this machine is one thread's, and up to `batch`
    answers are generated together. A model server takes requests of several threads, one by one.
    """

    def __init__(
        self, answer: Callable[[Sequence[Job], Callable], None], size: int, threads: int = 1, batch: int = BATCH
    ):
        self.answer, self.size, self.batch = answer, size, batch
        self.waiting: list[Job] = []
        self.calls: list[tuple[Future, Callable[[], Any]]] = []
        self.condition = threading.Condition()
        self.stopping = False
        self.threads = [threading.Thread(target=self.run, name=f"answers {n}", daemon=True) for n in range(threads)]

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def submit(self, job: Job) -> None:
        """Puts the job in line. Raises Full when `size` jobs wait already, or the server is stopping."""
        with self.condition:
            self.forget_cancelled()
            if len(self.waiting) >= self.size or self.stopping:
                raise Full
            self.waiting.append(job)
            self.condition.notify()

    def call(self, work: Callable[[], Any]) -> Any:
        """The result of `work`, which runs before the next token or answer. Raises Full when the server is stopping."""
        done = Future()
        with self.condition:
            if self.stopping:
                raise Full
            self.calls.append((done, work))
            self.condition.notify()
        return done.result()

    def take(self) -> list[Job]:
        """The next jobs to answer together; none when the worker is to stop and nothing waits."""
        with self.condition:
            while not self.waiting and not (self.stopping and not self.calls):
                if not (self.calls or self.stopping):
                    self.condition.wait()
                self.make_calls()
                self.forget_cancelled()
            return self.take_alike(self.batch)

    def take_more(self, decoding: tuple, places: int) -> list[Job]:
        """Jobs that can join those that are answered now; none when the oldest that waits cannot."""
        with self.condition:
            self.make_calls()
            self.forget_cancelled()
            alike = bool(self.waiting) and self.waiting[0].decoding == decoding
            return self.take_alike(places) if alike else []

    def take_alike(self, most: int) -> list[Job]:
        """The oldest of the jobs that wait, and those that can be answered together with it."""
        alike = [one for one in self.waiting if one.decoding == self.waiting[0].decoding][:most]
        self.waiting = [one for one in self.waiting if one not in alike]
        return alike

    def make_calls(self) -> None:
        """Does the other work that waits, without holding up those who ask meanwhile."""
        calls, self.calls = self.calls, []
        self.condition.release()
        try:
            for done, work in calls:
                try:
                    done.set_result(work())
                except Exception as error:
                    done.set_exception(error)
        finally:
            self.condition.acquire()

    def forget_cancelled(self) -> None:
        self.waiting = [one for one in self.waiting if not one.cancelled.is_set()]

    def run(self) -> None:
        """What each thread does."""
        while jobs := self.take():
            begun = list(jobs)

            def more(places: int, decoding=jobs[0].decoding, begun=begun) -> list[Job]:
                found = self.take_more(decoding, places)
                begun.extend(found)
                return found

            try:
                self.answer(jobs, more)
            except Exception as error:  # a job's fault must not end the thread that all others wait for
                log.exception("an answer failed", exc_info=error)
                for job in begun:
                    job.emit(error)

    def finish(self) -> None:
        """Lets `run` end when nothing waits any more."""
        with self.condition:
            self.stopping = True
            self.condition.notify_all()

    def stop(self) -> None:
        """Lets the waiting jobs be answered, and ends the threads."""
        self.finish()
        for thread in self.threads:
            thread.join()


class Lent(Embeddings):
    """The embedding model for other threads: the worker's thread computes, some texts at a time."""

    def __init__(self, worker: Worker, embeddings: Embeddings):
        self.worker, self.own = worker, embeddings
        # Passages are counted in another thread, and a tokenizer serves one at a time.
        model = embeddings._client
        self._client = SimpleNamespace(tokenizer=deepcopy(model.tokenizer), max_seq_length=model.max_seq_length)

    def embed_query(self, text: str) -> list[float]:
        return self.worker.call(lambda: self.own.embed_query(text))

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        parts = [texts[at : at + PART] for at in range(0, len(texts), PART)]
        return [vector for part in parts for vector in self.worker.call(partial(self.own.embed_documents, part))]
