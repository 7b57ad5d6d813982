"""What the benchmarks of documents share: a collection filled by the command line, and recall of questions on it.

The command runs as people run it, in a process of its own; its time is the wall clock's, its memory that of the whole
tree of processes (without the database server). A passage is a hit when it holds an answer, and by source when it is
of the document that the question names.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qlora.retrieval.search_modes import MODES

PROJECT = Path(__file__).resolve().parent.parent
DEPTH = 3  # passages that the model reads
EVERY = 0.5  # seconds between two looks at the processes


@dataclass(frozen=True)
class Ingest:
    """What a run of `ingest` took, and what it reported on stderr."""

    code: int
    seconds: float
    cpu_seconds: float  # of all its processes: hardly longer beside other work, as the wall clock's are
    peak_bytes: int
    report: str

    @property
    def problems(self) -> list[str]:
        """The files that were left out, each with its reason."""
        return [line.strip(" *") for line in self.report.splitlines() if line.startswith("  * ")]


def ingest(paths: Sequence[Path], collection: str, flags: Sequence[str] = ()) -> Ingest:
    """Runs `ingest` of this project. Raises RuntimeError when it does more than leave files out (exit code 2)."""
    done = run_measured(["rag_qlora.py", "ingest", *map(str, paths), "--collection", collection, *flags])
    if done.code not in (0, 2) or "Traceback" in done.report:
        raise RuntimeError(f"ingest ends with {done.code}: {done.report[-2000:]}")
    return done


def run_measured(words: Sequence[str], project: Path = PROJECT, most_seconds: float = 86_400, **variables) -> Ingest:
    """Runs Python with these words in a checkout; it is stopped after `most_seconds`, which is no error."""
    environment, seen = {**os.environ, **variables}, Seen()
    started = time.perf_counter()
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    # What a shell starts in the background ignores Ctrl-C, and hands that on.
    heed = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen([sys.executable, *words], cwd=project, env=environment, **pipes, **heed) as run:
        watch = threading.Thread(target=watch_processes, args=(run, seen), daemon=True)
        watch.start()
        try:
            _, report = run.communicate(timeout=most_seconds)
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGINT)  # as Ctrl-C: then it stops its database server, too
            _, report = run.communicate()
    watch.join()
    return Ingest(run.returncode, time.perf_counter() - started, sum(seen.cpu.values()), seen.peak, report)


@dataclass
class Seen:
    """The most memory of a tree of processes so far, and the CPU seconds of each of them."""

    peak: int = 0
    cpu: dict[int, float] = field(default_factory=dict)


def watch_processes(run: subprocess.Popen, seen: Seen) -> None:
    """Keeps `seen` up to date until the run ends; memory that processes share counts once (PSS)."""
    import psutil

    while run.poll() is None:
        total = 0
        try:
            for process in [(root := psutil.Process(run.pid)), *root.children(recursive=True)]:
                memory = process.memory_full_info()
                total += getattr(memory, "pss", memory.uss)
                seen.cpu[process.pid] = sum(process.cpu_times()[:2])
            seen.peak = max(seen.peak, total)
        except psutil.Error:
            pass  # a process ended between the two looks
        time.sleep(EVERY)


# ------------------------------------------------------------------------------- search


def open_collection(name: str, flags: Sequence[str] = ()):
    """The store of the collection, and search(question, k, mode=...) as the `search` command runs it."""
    import rag_qlora
    from qlora.cli.rag_flags import resolve_arguments

    args = resolve_arguments(["search", "--collection", name, *flags, "?"], rag_qlora.__doc__, rag_qlora.STEPS)
    store = rag_qlora.open_store(args)
    return store, rag_qlora.make_search(args, store)


def find_passages(search: Callable, questions: Sequence[dict]) -> dict[str, list[list]]:
    """mode -> the first DEPTH passages of every question."""
    return {mode: [search(row["question"], DEPTH, mode=mode) for row in questions] for mode in MODES}


def score(questions: Sequence[dict], found: Sequence[Sequence]) -> dict[str, float]:
    """recall@1 and recall@3, by an answer in the passage and by its source."""
    pairs = list(zip(questions, found, strict=True))
    by_answer = [[holds(text_of(passage), row["answers"]) for passage in passages] for row, passages in pairs]
    by_source = [[is_of(passage, row.get("source")) for passage in passages] for row, passages in pairs]
    named = {"answer": by_answer, "source": by_source}
    return {
        f"{name}@{k}": round(sum(any(hits[:k]) for hits in rows) / len(rows), 3)
        for name, rows in named.items()
        for k in (1, DEPTH)
    }


def text_of(passage) -> str:
    return f"{passage.metadata.get('heading', '')}\n{passage.page_content}"


def is_of(passage, source: str | None) -> bool:
    """Whether the passage is of the document; the same text may be of several, all of which its metadata name."""
    return json.dumps(source, ensure_ascii=False) in json.dumps(passage.metadata, ensure_ascii=False)


def holds(text: str, answers: Sequence[str]) -> bool:
    """Whether an answer stands in the text, whatever its white space and case; `9` is not in `19`.

    Not the project's own metric: that needs spaces between words, which Chinese has not.
    """
    return any(re.search(as_pattern(answer), fold(text)) for answer in answers)


def as_pattern(answer: str) -> str:
    """A pattern of the answer's characters with any white space between them, not inside a longer word."""
    characters = re.sub(r"\s", "", fold(answer))
    before, after = (r"(?<![0-9a-z])", r"(?![0-9a-z])")
    is_word = [re.match("[0-9a-z]", characters[at]) for at in (0, -1)]
    return before * bool(is_word[0]) + r"\s*".join(map(re.escape, characters)) + after * bool(is_word[1])


def fold(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold().replace("\u00ad", "")


def read_questions(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
