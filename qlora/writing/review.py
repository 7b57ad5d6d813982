"""Rows looked at by a person: at the terminal, or in a spreadsheet. Decisions are kept apart from what was written.

    review_rows(rows, files, "terminal")        # accept, edit or drop each row; quit, and come back later
    review_rows(rows, files, "rows.csv")        # the first time writes the table, later reads it back

A decision names its row by its question and passage.
"""

import csv
import hashlib
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path

from qlora import machine
from qlora.answering.citations import content_words
from qlora.console import Problems, note, say
from qlora.machine import decode_text
from qlora.words import SENTENCE_END
from qlora.writing.report import Files
from qlora.writing.selection import Chosen

KEEP, DROP = "keep", "drop"
COLUMNS = ("id", "decision", "question", "answer", "sentence", "passage", "source")
KEYS = "[a]ccept, [e]dit, [d]rop, [b]ack, [q]uit"


def review_rows(rows: Sequence[dict], files: Files, where: str) -> None:
    """Asks about every row without a decision, or exchanges decisions with a table, and saves them."""
    decisions = read_decisions(files)
    if where == "terminal":
        review_at_terminal(rows, decisions, files)
    elif Path(where).exists():
        for entry in read_table(Path(where), {row_id(row) for row in rows}):
            decisions[entry["id"]] = entry
        save(files, decisions)
    else:
        write_table(Path(where), rows, decisions)
        note(f"Edit {where} (decision: keep or drop), then give the same command again")
    decided = sum(row_id(row) in decisions for row in rows)
    note(f"{decided} of {len(rows)} rows are decided: {files.review}")


def read_decisions(files: Files) -> dict[str, dict]:
    """The decisions so far, by the id of their row."""
    if not files.review.exists():
        return {}
    lines = files.review.read_text(encoding="utf-8").split("\n")
    return {entry["id"]: entry for entry in map(json.loads, filter(None, lines))}


def row_id(row: dict) -> str:
    """What a decision names its row by."""
    return hashlib.sha256(f"{row['instruction']}\0{row['context']}".encode()).hexdigest()[:12]


def apply_to(chosen: Chosen, files: Files) -> tuple[list[dict], list[dict]]:
    """Rows and questions as a person decided so far."""
    decisions = read_decisions(files)
    return apply(chosen.rows, decisions), apply(chosen.held_out, decisions)


def apply(rows: Sequence[dict], decisions: dict[str, dict]) -> list[dict]:
    """The rows as a person decided; those without a decision stay."""
    kept = []
    for row in rows:
        entry = decisions.get(row_id(row), {"decision": KEEP})
        if entry["decision"] == KEEP:
            texts = {"instruction": entry.get("question"), "response": entry.get("answer")}
            kept.append({**row, **{name: text for name, text in texts.items() if text}})
    return kept


def save(files: Files, decisions: dict[str, dict]) -> None:
    machine.write_whole(files.review, "".join(json.dumps(entry) + "\n" for entry in decisions.values()))


def support(row: dict) -> str:
    """The sentence of the passage that shares most words with question and answer."""
    wanted = content_words(f"{row['instruction']} {row['response']}")
    sentences = SENTENCE_END.split(row["context"])
    return " ".join(max(sentences, key=lambda sentence: len(wanted & content_words(sentence))).split())


# ------------------------------------------------------------------------------- terminal


def review_at_terminal(rows: Sequence[dict], decisions: dict[str, dict], files: Files) -> None:
    """Shows row after row and asks; every decision is saved at once. Ends at the last row, with q, or Ctrl-D."""
    at = next((n for n, row in enumerate(rows) if row_id(row) not in decisions), len(rows))
    while at < len(rows):
        row = rows[at]
        show(row, decisions.get(row_id(row)), at, len(rows))
        try:
            key = input(f"{KEYS}: ").strip().lower()[:1]
            if key == "q":
                return
            if key == "b":
                at = max(0, at - 1)
                continue
            entry = decide(row, key)
        except (EOFError, KeyboardInterrupt):
            return
        if entry:
            decisions[row_id(row)] = entry
            save(files, decisions)
            at += 1


def decide(row: dict, key: str) -> dict | None:
    """The decision of a key; None for a key that is none."""
    entry = {"id": row_id(row), "decision": DROP if key == "d" else KEEP}
    if key == "e":
        entry["question"] = input("question (empty: as it is): ").strip() or row["instruction"]
        entry["answer"] = input("answer (empty: as it is): ").strip() or row["response"]
    return entry if key in ("a", "d", "e") else None


def show(row: dict, entry: dict | None, at: int, count: int) -> None:
    """The row as a person reads it, with its passage and the sentence that supports the answer."""
    before = f" ({entry['decision']})" if entry else ""
    say(f"\n--- {at + 1} of {count}, {row['source']}{before}")
    say(row["context"])
    say(f"\n  Q: {row['instruction']}\n  A: {row['response']}\n  from: {support(row)}")


# ------------------------------------------------------------------------------- spreadsheet


def write_table(path: Path, rows: Sequence[dict], decisions: dict[str, dict]) -> None:
    """A CSV with a row each; cells that a spreadsheet would compute begin with an apostrophe."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(COLUMNS)
    for row in rows:
        entry = decisions.get(row_id(row), {})
        cells = [entry.get("question") or row["instruction"], entry.get("answer") or row["response"]]
        cells += [support(row), row["context"], row["source"]]
        table.writerow([row_id(row), entry.get("decision", KEEP), *map(harmless, cells)])
    machine.write_whole(path, "\ufeff" + text.getvalue())  # the mark says UTF-8 to spreadsheets


def harmless(cell: str) -> str:
    return f"'{cell}" if cell[:1] in "=+-@\t\r" else cell


def read_table(path: Path, known: set[str]) -> list[dict]:
    """The decisions of an edited table. Raises UserError that names every line that is none."""
    problems, found = Problems(), []
    content = decode_text(path.read_bytes(), path).removeprefix("\ufeff")
    first = content.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)  # as the spreadsheet's country writes it
    for line, cells in enumerate(csv.DictReader(io.StringIO(content, newline=""), delimiter=delimiter), 2):
        decision = (cells.get("decision") or "").strip().lower()
        if (cells.get("id") or "") not in known:
            problems.add("a line without a row", f"{path}:{line}", "leave the column id as it was")
        elif decision not in (KEEP, DROP):
            problems.add(f"unknown decision {decision}", f"{path}:{line}", "write keep or drop")
        elif decision == KEEP and not ((cells.get("question") or "").strip() and (cells.get("answer") or "").strip()):
            problems.add("question or answer is empty", f"{path}:{line}", "write both, or drop")
        else:
            plain = {name: re.sub(r"^'(?=[=+\-@])", "", cells[name].strip()) for name in ("question", "answer")}
            texts = {name: " ".join(text.split()) for name, text in plain.items()}
            found.append({"id": cells["id"], "decision": decision, **texts})
    problems.raise_if_any()
    return found
