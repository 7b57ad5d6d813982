"""Rows of an instruction dataset: load and validate.

A row has `instruction`, `response` and optionally `context`, `category` and `source` (the document
its context comes from): the columns of databricks-dolly-15k and one more.
"""

import csv
import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora.console import Problems, fail

COLUMNS = ("instruction", "response", "context", "category", "source")
REQUIRED = ("instruction", "response")
BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Row:
    """One question with its right response; the model sees `passages`, and `context` holds the answer."""

    instruction: str
    response: str
    context: str = ""
    category: str = ""
    source: str = ""
    passages: tuple[str, ...] = ()

    @property
    def document(self) -> str:
        """The group of rows that is held out together: the document, else the context, else the row."""
        return self.source or self.context or self.instruction

    @property
    def subject(self) -> str:
        """The group of related documents: the folder of `source`, else the category."""
        return self.source.rpartition("/")[0] or self.category


# ------------------------------------------------------------------------------- load


def load_rows(source: str, columns: dict[str, str] | None = None) -> list[Row]:
    """All rows of a file (.json, .jsonl, .csv, .parquet) or of the train split of a hub dataset.

    `columns` maps our names to the dataset's. Raises UserError for a missing file, an unknown type, a
    line that is not JSON, a missing column, cells that are not text, and an empty dataset.
    """
    path = Path(source)
    is_file = path.exists() or path.suffix in BUILDERS or path.is_absolute()
    table = load_file(path) if is_file else load_from_hub(source)
    if len(table) == 0:
        raise fail("the dataset has no rows", source, "give a dataset with at least two rows")
    names = map_columns(table.column_names, columns or {}, source)
    check_cells(table, names, source)
    return [
        Row(**{ours: (row[theirs] or "").strip() for ours, theirs in names.items()})
        for row in table.select_columns(list(names.values()))
    ]


def load_file(path: Path):
    """A datasets.Dataset of the file's rows."""
    if not path.is_file():
        raise fail("dataset file not found", str(path), "check the path")
    if path.suffix not in BUILDERS:
        known = ", ".join(BUILDERS)
        raise fail(f"unknown dataset type {path.suffix or '(none)'}", str(path), f"give one of {known}")
    if path.stat().st_size == 0:
        raise fail("the dataset has no rows", str(path), "give a dataset with at least two rows")
    if path.suffix in (".json", ".jsonl"):
        check_json(path)
    import datasets

    try:
        options = csv_options(path) if path.suffix == ".csv" else {}
        return datasets.load_dataset(BUILDERS[path.suffix], data_files=str(path), split="train", **options)
    except (datasets.exceptions.DatasetGenerationError, ValueError, csv.Error, StopIteration, OSError) as error:
        cause = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
        if "no data" in cause:
            raise fail("the dataset has no rows", str(path), "give a dataset with at least two rows") from error
        raise fail(f"unreadable dataset ({cause})", str(path), "fix the file, or convert it to JSON Lines") from error


def csv_options(path: Path) -> dict:
    """Options that read every cell of a CSV file as text: 27 stays "27", and NA stays "NA"."""
    import datasets

    with path.open(encoding="utf-8-sig", newline="") as file:
        names = next(csv.reader(file), [])
    return {"features": datasets.Features(dict.fromkeys(names, datasets.Value("string"))), "keep_default_na": False}


def check_json(path: Path) -> None:
    """Raises UserError for what is neither JSON Lines nor, in a .json file, a list of objects.

    pyarrow ends the process when it reads `null`.
    """
    if path.suffix == ".jsonl":
        return check_json_lines(path)
    content = path.read_bytes().strip()
    try:
        whole = json.loads(content)
    except (ValueError, RecursionError) as error:
        if not content.startswith(b"["):
            return check_json_lines(path)
        raise fail(f"unreadable dataset ({error})", str(path), "fix the file, or convert it to JSON Lines") from error
    if not all(isinstance(row, dict) for row in (whole if isinstance(whole, list) else [whole])):
        raise fail("not a list of JSON objects", str(path), 'write [{"instruction": "...", "response": "..."}, ...]')


def check_json_lines(path: Path) -> None:
    """Raises UserError that names every line (the first five) that is not a JSON object with text cells."""
    problems = Problems()
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                problems.add(f"not JSON ({error})", f"{path}:{number}", "fix or remove the line")
                continue
            if not isinstance(row, dict):
                problems.add("not a JSON object", f"{path}:{number}", "write one object with named columns per line")
                continue
            for name in REQUIRED:
                if name in row and not isinstance(row[name], str | None):
                    found = type(row[name]).__name__
                    problems.add(f"{name} is not text but {found}", f"{path}:{number}", "put the text in quotes")
            if len(problems.found) >= 5:
                break
    problems.raise_if_any()


def load_from_hub(name: str):
    """The train split of a hub dataset."""
    import datasets

    try:
        return datasets.load_dataset(name, split="train")
    except (OSError, ValueError) as error:  # DatasetNotFoundError, also of a gated dataset, is an OSError
        raise fail(
            f"dataset {name} cannot be loaded ({str(error).strip().splitlines()[0][:160]})",
            "--dataset",
            "check the name and the network (gated? set HF_TOKEN), or give a .jsonl, .json, .csv or .parquet file",
        ) from error


def map_columns(present: Sequence[str], columns: dict[str, str], source: str) -> dict[str, str]:
    """Our column names -> the dataset's. An unknown name is a problem that names the nearest one."""
    problems = Problems()
    for ours, theirs in columns.items():
        if ours not in COLUMNS:
            problems.add(f"unknown column {ours}", "--columns", f"the names to map are {', '.join(COLUMNS)}")
        elif theirs not in present:
            problems.add(f"the dataset has no column {theirs}", source, suggest_column(theirs, present, ours))
    names = {name: columns.get(name, name) for name in COLUMNS if columns.get(name, name) in present}
    for name in REQUIRED:
        if name not in names and name not in columns:
            problems.add(f"the dataset has no column {name}", source, suggest_column(name, present, name))
    problems.raise_if_any()
    return names


def suggest_column(wanted: str, present: Sequence[str], ours: str) -> str:
    nearest = difflib.get_close_matches(wanted, present, n=1, cutoff=0.5)
    hint = f"--columns {ours}={nearest[0]}" if nearest else f"map one with --columns {ours}=NAME"
    return f"{hint} (it has {', '.join(present)})"


def check_cells(table, names: dict[str, str], source: str) -> None:
    """Raises UserError for columns whose cells are not text."""
    problems = Problems()
    for ours, theirs in names.items():
        kind = getattr(table.features[theirs], "dtype", "a list")
        if kind not in ("string", "large_string", "null"):
            problems.add(f"column {theirs} holds {kind}, not text", source, f"give {ours} as text")
    problems.raise_if_any()


# ------------------------------------------------------------------------------- filter, split
