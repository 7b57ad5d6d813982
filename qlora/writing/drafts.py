"""Drafts of rows, the order in which passages are asked about, and the log that makes writing resumable.

    passages = spread(store.all_passages(), seed)      # every document early on, in proportion to its length
    log = DraftLog(path, settings)                     # log.done: what is written, by the key of its passage

A passage is known by its source and text, so that a collection may grow between two runs.
"""

import hashlib
import json
import math
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from langchain_core.documents import Document

from qlora.console import fail
from qlora.prompt import Prompt

DRAFTS = 2  # per row that a passage may give
MOST_ROWS = 1000  # where no number is given
FEWEST_WORDS = 8  # of a passage: shorter ones are headings and captions


@dataclass(frozen=True)
class Wanted:
    """What is to be written: `rows` rows (None: two per passage), `per_passage` about each at most.

    Of the rows that pass all checks `keep` is the share that stays, the likeliest. `refusal_share` of all rows refuse,
    in the words of `refusal`. The rows of the share `hold_out` of the documents become questions. No row resembles
    the questions that an evaluation has `asked`.
    """

    rows: int | None = None
    per_passage: int = 3
    keep: float = 1.0
    refusal_share: float = 0.1
    refusal: str = Prompt.refusal
    hold_out: float = 0.0
    asked: Sequence[str] = ()
    seed: int = 0

    @property
    def drafts(self) -> int:
        """Drafts per passage."""
        return DRAFTS * self.per_passage

    @property
    def enough(self) -> int:
        """Drafts that must pass the checks, so that the share to keep are as many rows as are wanted."""
        return math.ceil(self.rows / self.keep)

    def fit(self, passages: int) -> "Wanted":
        """The same with a number of rows. Raises UserError when the passages are too few for it."""
        if not passages:
            raise fail("the collection has no passage to ask about", "--collection", "ingest documents into it")
        rows = self.rows or min(MOST_ROWS, 2 * passages)
        if rows > self.per_passage * passages:
            what = f"{passages} passages are too few for {rows} rows, {self.per_passage} about each"
            raise fail(what, f"--rows {rows}", "give fewer --rows, a higher --per-passage, or more documents")
        return replace(self, rows=rows)


@dataclass
class Draft:
    """A question about a passage with its answer, and what the checks found.

    `dropped` is the name of the first check that it failed, empty where it passed.
    """

    question: str
    answer: str
    likelihood: float | None = None  # mean log-probability of the question's tokens under the writer
    read: str | None = None  # the reader's answer, given the passage
    agreement: float | None = None  # token F1 of both answers
    rank: int | None = None  # of its passage in the search for the question, from 1; None: not among the first
    dropped: str = ""


@dataclass
class Unanswerable:
    """A question that its passage does not answer, and how it was made."""

    question: str
    text: str
    source: str
    how: str


@dataclass
class Written:
    """A passage with the drafts about it, and a question near one of them without an answer."""

    id: str
    source: str
    text: str
    drafts: list[Draft] = field(default_factory=list)
    unanswerable: Unanswerable | None = None


def spread(passages: Iterable[Document], seed: int) -> list[Document]:
    """The passages that can be asked about, so ordered that any first part has the proportions of the whole.

    The order within a document is random: sections and pages are spread as well.
    """
    by_source, seen = defaultdict(list), set()
    for passage in sorted(passages, key=lambda passage: passage.metadata["source"]):
        if len(passage.page_content.split()) >= FEWEST_WORDS and passage.page_content not in seen:
            seen.add(passage.page_content)
            by_source[passage.metadata["source"]].append(passage)
    chance = random.Random(seed)
    placed = []
    for source in sorted(by_source):
        members = sorted(by_source[source], key=passage_key)
        chance.shuffle(members)
        shift = chance.random()
        placed += [((n + shift) / len(members), passage) for n, passage in enumerate(members)]
    return [passage for _, passage in sorted(placed, key=lambda pair: pair[0])]


class DraftLog:
    """The drafts of each passage, a line per passage as soon as it is done. A killed run continues from it."""

    def __init__(self, path: Path, settings: dict, overwrite: bool = False):
        self.path, self.done = path, {}
        if overwrite:
            path.unlink(missing_ok=True)
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
        if lines and lines[0] and (before := json.loads(lines[0])["settings"]) != settings:
            changed = ", ".join(sorted(name for name in settings if settings[name] != before.get(name)))
            what = f"drafts of another run are there: other {changed}"
            raise fail(
                what, str(path), "give the same flags to continue, --overwrite to begin again, or a new --output"
            )
        whole = [line for line in lines[1:-1] if line]  # the last line may be half
        for line in whole:
            written = read_written(json.loads(line))
            self.done[written.id] = written
        kept = [json.dumps({"settings": settings}), *whole]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def add(self, *many: Written) -> None:
        """Logs what was written together in one go, so that a run which continues groups the rest alike."""
        lines = (json.dumps(asdict(written), ensure_ascii=False) + "\n" for written in many)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))
        self.done |= {written.id: written for written in many}


def read_written(cells: dict) -> Written:
    """What a line of the log holds."""
    drafts = [Draft(**draft) for draft in cells["drafts"]]
    unanswerable = Unanswerable(**cells["unanswerable"]) if cells["unanswerable"] else None
    return Written(cells["id"], cells["source"], cells["text"], drafts, unanswerable)


def passage_key(passage: Document) -> str:
    """What a passage is known by, also after its file was ingested again: its source and text."""
    return hashlib.sha256(f"{passage.metadata['source']}\0{passage.page_content}".encode()).hexdigest()[:16]
