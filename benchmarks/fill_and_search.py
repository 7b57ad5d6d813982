"""What the benchmarks of documents share: a collection filled by the command line, and recall of questions on it.

The command runs as people run it, in a process of its own; its time is the wall clock's, its memory that of the whole
tree of processes (without the database server). A passage is a hit when it holds an answer, and by source when it is
of the document that the question names.
"""

import json
import re
import subprocess
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora.retrieval.search_modes import MODES

PROJECT = Path(__file__).resolve().parent.parent
DEPTH = 3  # passages that the model reads
EVERY = 0.2  # seconds between two looks at the memory


@dataclass(frozen=True)
class Ingest:
    """What a run of `ingest` took, and what it reported on stderr."""

    code: int
    seconds: float
    peak_bytes: int
    report: str

    @property
    def problems(self) -> list[str]:
        """The files that were left out, each with its reason."""
        return [line.strip(" *") for line in self.report.splitlines() if line.startswith("  * ")]


def ingest(paths: Sequence[Path], collection: str, project: Path = PROJECT, flags: Sequence[str] = ()) -> Ingest:
    """Runs the `ingest` of a checkout. Raises RuntimeError when it does more than leave files out (exit code 2)."""
    command = [sys.executable, "rag_qlora.py", "ingest", *map(str, paths), "--collection", collection, *flags]
    started, peak = time.perf_counter(), [0]
    with subprocess.Popen(command, cwd=project, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:
        watch = threading.Thread(target=watch_memory, args=(run, peak), daemon=True)
        watch.start()
        report = run.stderr.read()
    watch.join()
    if run.returncode not in (0, 2) or "Traceback" in report:
        raise RuntimeError(f"ingest of {project} ends with {run.returncode}: {report[-2000:]}")
    return Ingest(run.returncode, time.perf_counter() - started, peak[0], report)


def watch_memory(run: subprocess.Popen, peak: list[int]) -> None:
    """Keeps in `peak[0]` the most bytes that the processes had together; pages that they share count once (PSS)."""
    import psutil

    while run.poll() is None:
        total = 0
        try:
            for process in [(root := psutil.Process(run.pid)), *root.children(recursive=True)]:
                memory = process.memory_full_info()
                total += getattr(memory, "pss", memory.uss)
            peak[0] = max(peak[0], total)
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
    text = squeeze(text)
    return any(re.search(rf"(?<!\d){re.escape(squeeze(answer))}(?!\d)", text) for answer in answers)


def squeeze(text: str) -> str:
    return re.sub(r"[\s\u00ad]+", "", unicodedata.normalize("NFKC", text).casefold())


def read_questions(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
