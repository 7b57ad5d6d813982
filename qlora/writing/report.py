"""What came out of writing: the funnel, kinds of questions and documents, as text and as JSON beside the rows."""

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora import machine
from qlora.console import fail, note
from qlora.writing.drafts import DraftLog, Wanted, spread
from qlora.writing.selection import Chosen, count_kinds, select_rows
from qlora.writing.writing import Tools, write_drafts

FIXES = {
    "search does not find its passage": "raise --top-k",
    "reader answers otherwise": "give a better reader with --writer, or --writer none beside --base-url",
    "reader finds no answer": "give a better reader with --writer, or --writer none beside --base-url",
    "over --keep": "raise --keep",
    "an evaluation asks it": "give fewer --questions",
}


@dataclass(frozen=True)
class Files:
    """What lies beside rows.jsonl."""

    rows: Path

    def beside(self, name: str) -> Path:
        """rows.NAME beside rows.jsonl."""
        return self.rows.with_name(f"{self.rows.stem}.{name}")

    @property
    def drafts(self) -> Path:
        return self.beside("drafts.jsonl")

    @property
    def questions(self) -> Path:
        return self.beside("questions.jsonl")

    @property
    def report(self) -> Path:
        return self.beside("report.json")

    @property
    def review(self) -> Path:
        return self.beside("review.jsonl")


def write_and_select(passages, tools: Tools, log: DraftLog, wanted: Wanted) -> tuple[Chosen, dict]:
    """The rows about the passages, and the report. Raises UserError when the passages are too few."""
    passages, started = spread(passages, wanted.seed), time.perf_counter()
    wanted = wanted.fit(len(passages))
    chosen = select_rows(write_drafts(passages, tools, log, wanted), wanted)
    return chosen, build_report(chosen, tools.writer.failures, time.perf_counter() - started)


def build_report(chosen: Chosen, failures: Counter, seconds: float) -> dict:
    """The numbers of a run. `seconds` are those of writing and checking in this run."""
    rows = [*chosen.rows, *chosen.held_out]
    answered = [row for row in rows if row["category"] != "unanswerable"]
    funnel = chosen.funnel
    return {
        "written": chosen.written,
        "kept": len(answered),
        "refusing": len(rows) - len(answered),
        "held_out": len(chosen.held_out),
        "dropped": {
            reason: {"drafts": count, "examples": funnel.examples[reason]}
            for reason, count in funnel.counts.most_common()
        },
        "kinds": count_kinds(answered),
        "documents": dict(sorted(Counter(row["source"] for row in rows).items())),
        "server_failures": dict(failures),
        "seconds": round(seconds, 1),
    }


def print_report(report: dict) -> None:
    """The funnel on stderr: what was written, what each check dropped with examples, what is kept."""
    note(f"{report['written']:6} drafts written")
    for reason, found in report["dropped"].items():
        note(f"{found['drafts']:6} dropped: {reason}")
        for example in found["examples"]:
            note(f"         {example}")
    note(f"{report['kept']:6} kept, and {report['refusing']} rows that refuse")
    kinds = ", ".join(f"{count} {kind}" for kind, count in report["kinds"].items())
    note(f"{len(report['documents'])} documents; {kinds}")
    for what, count in report["server_failures"].items():
        note(f"the server failed {count} times: {what}")


def write_all(files: Files, rows: Sequence[dict], held_out: Sequence[dict], report: dict) -> None:
    """The rows, the questions held out, and the report, each whole or not at all.

    Raises UserError when there is no row, with the check that dropped most.
    """
    machine.write_whole(files.report, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    if not report["kept"]:
        reason = next(iter(report["dropped"]), "nothing was written")
        fix = FIXES.get(reason, "see the examples in the report; give other documents, or a better writer")
        raise fail(f"no row passed the checks; most were dropped because: {reason}", str(files.report), fix)
    write_rows(files.rows, rows)
    files.questions.unlink(missing_ok=True)  # those of an earlier run may be rows now
    if held_out:
        write_rows(files.questions, held_out)


def write_rows(path: Path, rows: Sequence[dict]) -> None:
    machine.write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
