"""One model for many askers: a queue, and a thread that answers what waits in batches.

    worker = Worker(service.answer, size=32)
    worker.submit(Job(question, emit=...))     # raises Full when too many wait

Torch runs in this one thread. A second one would slow both down on the CPU.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from qlora.answering.conversation import Turn

BATCH = 8  # answers that are generated together, or asked of a server at the same time
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

    @property
    def decoding(self) -> tuple:
        """Jobs with equal values can be answered together; sampled ones are answered alone."""
        alone = id(self) if self.temperature else 0
        return (self.tuned, alone)


class Worker:
    """Answers jobs, the oldest first, and those that wait with it: `answer(jobs)` emits the events of all.

    A model on this machine is one thread's, and up to `batch` answers are generated together. A model server takes
    requests of several threads, one by one.
    """

    def __init__(self, answer: Callable[[Sequence[Job]], None], size: int, threads: int = 1, batch: int = BATCH):
        self.answer, self.size, self.batch = answer, size, batch
        self.waiting: list[Job] = []
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

    def take(self) -> list[Job]:
        """The next jobs to answer together; none when the worker is to stop and nothing waits."""
        with self.condition:
            self.forget_cancelled()
            while not self.waiting and not self.stopping:
                self.condition.wait()
                self.forget_cancelled()
            if not self.waiting:
                return []
            first = self.waiting[0].decoding
            jobs = [one for one in self.waiting if one.decoding == first][: self.batch]
            self.waiting = [one for one in self.waiting if one not in jobs]
            return jobs

    def forget_cancelled(self) -> None:
        self.waiting = [one for one in self.waiting if not one.cancelled.is_set()]

    def run(self) -> None:
        """What each thread does."""
        while jobs := self.take():
            try:
                self.answer(jobs)
            except Exception as error:  # a job's fault must not end the thread that all others wait for
                log.exception("an answer failed", exc_info=error)
                for job in jobs:
                    job.emit(error)

    def stop(self) -> None:
        """Lets the waiting jobs be answered, and ends the threads."""
        with self.condition:
            self.stopping = True
            self.condition.notify_all()
        for thread in self.threads:
            thread.join()
