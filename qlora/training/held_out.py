"""The rows of an adapter's dataset, apart as training kept them: trained on, and held out."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict

from qlora.console import fail
from qlora.evaluation.questions import read_asked
from qlora.training.row_filters import hold_out
from qlora.training.rows import Row, load_rows
from qlora.words import normalize


def digest_rows(rows: Sequence[Row]) -> str:
    """The sha256 of the rows. Earlier turns count where there are some: runs of earlier versions knew none."""
    cells = [{name: cell for name, cell in asdict(row).items() if cell or name != "turns"} for row in rows]
    return hashlib.sha256("\n".join(json.dumps(each, sort_keys=True) for each in cells).encode()).hexdigest()


def name_documents(rows: Sequence[Row]) -> list[str]:
    """Short digests of the documents of rows, as run.json keeps them: a document without a name is a whole text."""
    return sorted({name_document(row) for row in rows})


def name_document(row: Row) -> str:
    return hashlib.sha256(row.document.encode()).hexdigest()[:12]


def split_again(run: dict, where: str) -> tuple[list[Row], list[Row]]:
    """The rows that the run trained on and those that it held out, from its dataset.

    Raises UserError where the dataset is gone, or where its documents are others by now. Runs of earlier versions do
    not name their held-out documents: their rows must be unchanged, and none dropped.
    """
    words, fix = run["arguments"], "put the rows back, or name questions that it was not trained on with --questions"
    options = {name: words[name] for name in ("columns", "train_on", "config", "split") if name in words}
    rows = load_rows(words["dataset"], **options)
    rows += load_rows(words["added_rows"]) if words.get("added_rows") else []
    asked = read_asked(words.get("exclude", ()))
    rows = [row for row in rows if normalize(row.instruction) not in asked]
    parts = part_rows(rows, run)
    if not all(parts):
        raise fail(f"the rows of the adapter are others by now ({run['dataset']['source']})", where, fix)
    return parts


def part_rows(rows: Sequence[Row], run: dict) -> tuple[list[Row], list[Row]]:
    """The rows apart as the run had them, by the documents that it held out."""
    words, held = run["arguments"], set(run["dataset"].get("held_out_documents", ()))
    if not held and digest_rows(rows) == run["dataset"]["sha256_of_rows"]:
        held = set(name_documents(hold_out(rows, words["eval_share"], words["seed"])[1]))
    return [row for row in rows if name_document(row) not in held], [row for row in rows if name_document(row) in held]
