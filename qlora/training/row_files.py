"""Files of rows, as people have them: JSON, JSON Lines, CSV and Parquet, each cell as it is written.

    read_records("rows.jsonl")              # [Record({"instruction": "Who?", ...}, "rows.jsonl:1"), ...]
    read_records("rows/*.csv")              # a folder, a glob, and gzip work as well

Nothing is guessed: "2024-01-05" stays text, 3.50 stays 3.50, and a row of a CSV file that does not fit its header is a
mistake with its line number. Nothing is cached either. Datasets of the hub come from `datasets`.
"""

import csv
import gzip
import io
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora.console import Problems, UserError, fail, note
from qlora.machine import decode_text

TABLES = {".csv": ",;|\t", ".tsv": "\t"}  # suffix -> delimiters, of which the header has one
SUFFIXES = (".jsonl", ".ndjson", ".json", *TABLES, ".parquet")
PACKED = ".gz"
SHOWN = 5  # mistakes of one file that are reported
HUB = ("hf://datasets/", "hf://")
SPARE, LEAST = 4, 1000  # rows that are streamed for one that is wanted, since filters drop some; and at least
PIECE = 2**17  # bytes that are fetched at a time beyond what is read; by default 5 and 10 MB
FOOTERS = 64  # Parquet files up to which every footer is read, to draw from all row groups and not from whole files


@dataclass(frozen=True)
class Record:
    """A row as its file has it, and where that is: `rows.csv:12`, or `rows.parquet, row 12`."""

    cells: dict[str, object]
    where: str


@dataclass(frozen=True)
class Draw:
    """How many rows are wanted in the end of a dataset of the hub, and the seed that they are drawn with."""

    rows: int
    seed: int


def read_records(
    source: str, config: str | None = None, split: str = "train", draw: Draw | None = None
) -> list[Record]:
    """All rows of a file, a folder of files, a glob, a saved dataset, or a dataset of the hub.

    `config` and `split` choose a part of the last two. With `draw`, only rows enough for it are read from the hub.
    Raises UserError for what is not there or cannot be read.
    """
    path = Path(source).expanduser()
    if not source.strip():
        raise fail("the dataset has no name", "--dataset", "give files of rows, a folder, or a hub id")
    if path.is_dir() and (path / "dataset_dict.json").is_file() | (path / "state.json").is_file():
        records = read_saved(path, split)
    elif files := find_files(path):
        records = [record for file in files for record in read_file(file)]
    elif kind_of(path) in SUFFIXES or path.is_absolute() or source.startswith((".", "~")) or set("*?[") & set(source):
        raise fail("dataset file not found", source, "check the path")
    else:
        records = read_hub(source, config, split, draw)
    if not records:
        raise fail("the dataset has no rows", source, "give a dataset with at least two rows")
    return records


def kind_of(path: Path) -> str:
    """The suffix that says how a file is read, in lower case, without that of gzip."""
    name = path.name.lower().removesuffix(PACKED)
    return Path(name).suffix


def find_files(path: Path) -> list[Path]:
    """The file, the files of the folder, or those that match the glob, in the order of their names.

    Raises UserError for a folder without any, and for a file of another type.
    """
    known = ", ".join(SUFFIXES)
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.is_file() and kind_of(file) in SUFFIXES)
        if not found:
            raise fail("no file of rows in the folder", str(path), f"put one there: {known}, also with {PACKED}")
        return found
    found = [path] if path.exists() else []
    if not found and set("*?[") & set(path.name):
        found = sorted(file for file in path.parent.glob(path.name) if file.is_file())
    for file in found:
        if not file.is_file():
            raise fail("the dataset is not a file", str(file), "give a file")
        if kind_of(file) not in SUFFIXES:
            raise fail(f"unknown dataset type {kind_of(file) or '(none)'}", str(file), f"give one of {known}")
    return found


def read_file(path: Path) -> list[Record]:
    """The rows of one file. Raises UserError for one that is not what its suffix says."""
    kind = kind_of(path)
    if kind == ".parquet":
        return read_parquet(path)
    text = read_text(path)
    if kind in TABLES:
        return read_table(path, text, TABLES[kind])
    return read_json(path, text) if kind == ".json" else read_json_lines(path, text)


def read_text(path: Path) -> str:
    """The text, unpacked. Raises UserError for what is neither packed as its name says nor text."""
    content = path.read_bytes()
    try:
        content = gzip.decompress(content) if path.name.lower().endswith(PACKED) else content
    except (gzip.BadGzipFile, EOFError) as error:
        raise fail(f"damaged gzip file ({error})", str(path), "pack it again") from error
    return decode_text(content, path)


# ------------------------------------------------------------------------------- JSON


def read_json_lines(path: Path, text: str) -> list[Record]:
    """One object per line. Raises UserError that names every line (the first five) that is none."""
    problems, records = Problems(), []
    # Not splitlines: it also splits at U+2028 and others, which JSON may have inside a string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip() and len(problems.found) < SHOWN:
            with problems.collecting():
                records.append(as_record(parse(line, f"{path}:{number}"), f"{path}:{number}"))
    problems.raise_if_any()
    return records


def read_json(path: Path, text: str) -> list[Record]:
    """A list of objects, alone or as `data`; columns as lists; one object; or JSON Lines in spite of the suffix."""
    try:
        whole = parse(text, str(path))
    except UserError:
        if text.lstrip().startswith("["):
            raise
        return read_json_lines(path, text)
    if isinstance(whole, dict) and isinstance(whole.get("data"), list):
        whole = whole["data"]
    elif isinstance(whole, dict) and (columns := columns_of(whole)):
        whole = columns
    rows = whole if isinstance(whole, list) else [whole]
    problems, records = Problems(), []
    for number, row in enumerate(rows, 1):
        if len(problems.found) < SHOWN:
            with problems.collecting():
                records.append(as_record(row, f"{path}, row {number}"))
    problems.raise_if_any()
    return records


def parse(text: str, where: str) -> object:
    """The value of a JSON text, its numbers as they are written. Raises UserError for what is not JSON."""
    try:
        return json.loads(text, parse_float=str, parse_int=str, parse_constant=str)
    except (ValueError, RecursionError) as error:
        raise fail(f"not JSON ({error})", where, "fix or remove it") from error


def columns_of(whole: dict) -> list[dict]:
    """The rows of an object that has a list of cells per column; none for any other object."""
    lists = [value for value in whole.values() if isinstance(value, list)]
    if len(lists) < max(2, len(whole)) or len(set(map(len, lists))) != 1:
        return []
    return [dict(zip(whole, cells, strict=True)) for cells in zip(*lists, strict=True)]


def as_record(row: object, where: str) -> Record:
    """Raises UserError for what is not an object, and for half a surrogate pair, which no tokenizer takes."""
    if not isinstance(row, dict):
        fix = 'write one object per row: {"instruction": "...", "response": "..."}'
        raise fail("not a JSON object", where, fix)
    for name, value in row.items():
        try:
            json.dumps([name, value], ensure_ascii=False).encode()
        except RecursionError as error:
            raise fail(f"{name} is nested too deeply", where, "flatten it") from error
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise fail(f"{name} has half a surrogate pair ({half})", where, "write the whole character") from error
    return Record(row, where)


# ------------------------------------------------------------------------------- tables


def read_table(path: Path, text: str, delimiters: str) -> list[Record]:
    """The rows of a CSV file, every cell as text; its delimiter is the one that the header has most of.

    Raises UserError for a header without names or with one twice, and for every row (the first five) that has more or
    fewer cells than the header.
    """
    if not text.strip():
        return []
    if "\n" not in text:
        text = text.replace("\r", "\n")  # of old Macs
    first = text.split("\n", 1)[0].replace("\r", "")
    if not first.strip():
        raise fail("the first line is empty", f"{path}:1", "remove it: the first line names the columns")
    csv.field_size_limit(sys.maxsize)
    delimiter = max(delimiters, key=lambda one: len(next(csv.reader([first], delimiter=one))))
    rows = number_lines(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), path)
    names = [name.strip() for name in next(rows)[0]]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise fail(f"the header names {twice[0]} twice", f"{path}:1", "give every column a name of its own")
    problems, records = Problems(), []
    for cells, line in rows:
        if cells and len(cells) != len(names):
            what = f"{len(cells)} cells below {len(names)} names"
            problems.add(what, f"{path}:{line}", f"put cells that contain {delimiter!r} in quotes")
            if len(problems.found) == SHOWN:
                break
        elif any(cells):
            records.append(Record(dict(zip(names, cells, strict=True)), f"{path}:{line}"))
    problems.raise_if_any()
    return records


def number_lines(reader, path: Path) -> Iterator[tuple[list[str], int]]:
    """The rows of a CSV reader, each with the number of its first line. Raises UserError for quotes that stay open."""
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise fail(f"unreadable dataset ({error})", f"{path}:{line}", "close its quotes") from error
        if cells is None:
            return
        yield cells, line


def read_parquet(path: Path) -> list[Record]:
    """The rows of a Parquet file, with its lists and structs."""
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        cause = str(error).splitlines()[0]
        raise fail(f"unreadable dataset ({cause})", str(path), "write it again as Parquet") from error
    return number_rows(rows, str(path))


# ------------------------------------------------------------------------------- datasets


def read_saved(path: Path, split: str) -> list[Record]:
    """The rows that `save_to_disk` of `datasets` wrote."""
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise fail(f"unreadable dataset ({error})", str(path), "save it again with save_to_disk") from error
    if isinstance(saved, datasets.DatasetDict):
        check_split(split, list(saved), str(path))
        saved = saved[split]
    return number_rows(saved, str(path))


def check_split(split: str, present: Sequence[str], source: str) -> None:
    if split not in present:
        raise fail(f"the dataset has no split {split}", source, f"give --split {' or '.join(present)}")


def read_hub(source: str, config: str | None, split: str, draw: Draw | None = None) -> list[Record]:
    """The rows of a split of a hub dataset: all, kept in the cache of `datasets`, or those of `draw`, streamed."""
    import datasets

    name = source
    for prefix in HUB:
        name = name.removeprefix(prefix)
    if not name:
        raise fail("the dataset has no name", source, "write hf://datasets/USER/NAME")
    try:
        if draw:
            return stream_rows(name, config, split, draw)
        return number_rows(datasets.load_dataset(name, config, split=split), name)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:  # an OSError when it is gated
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        fix = "check the name and the network (gated? set HF_TOKEN), --split and --config; or give a file of rows"
        raise fail(f"dataset {name} cannot be loaded ({said})", "--dataset", fix) from error


def stream_rows(name: str, config: str | None, split: str, draw: Draw) -> list[Record]:
    """Rows enough for `draw`, of which only their part of the files is downloaded, and nothing is kept on the disk.

    They come from ten places at a time, in an order that depends on the seed and the files alone: row groups of Parquet
    files, or the beginnings of other files.
    """
    import datasets

    most = max(LEAST, SPARE * draw.rows)
    builder = datasets.load_dataset_builder(name, config, storage_options={"hf": {"block_size": PIECE}})
    if hasattr(builder.config, "chunksize"):  # bytes of JSON, or rows of CSV
        builder.config.chunksize = min(builder.config.chunksize, PIECE)
    stream = builder.as_streaming_dataset(split=split)
    if stream.num_shards <= FOOTERS:
        stream = stream.reshard()
    rows = list(stream.shuffle(seed=draw.seed, buffer_size=LEAST).take(most))
    part = f"{most} of its rows are streamed, drawn by --seed" if len(rows) == most else f"it has {len(rows)} rows"
    note(f"{name}: {part}; filters and --max-rows {draw.rows} choose from them")
    return number_rows(rows, f"{name} as streamed")


def number_rows(rows, source: str) -> list[Record]:
    return [Record(row, f"{source}, row {number}") for number, row in zip(itertools.count(1), rows, strict=False)]
