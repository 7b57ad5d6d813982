"""Tables of every format, a row per line with the names of its columns: `berth: N1 / fee: 13,50 EUR / power:`.

A row of a CSV file, a sheet or a JSON list is a section of its own; a table within a text is part of its section.
"""

import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import date, datetime, time, timedelta
from itertools import chain, islice, zip_longest
from pathlib import Path

from qlora.console import fail
from qlora.reading.encoding import open_text
from qlora.reading.section import LINE, PARAGRAPH, Block, Section, join_blocks

BETWEEN = " / "  # cells of a row
DELIMITERS = {".csv": ",;\t|", ".tsv": "\t"}
LONGEST_LEAD = 80  # characters
LOOKED_AT = 20  # first rows, to find the delimiter and the header

Rows = Iterable[tuple[int, Sequence[str]]]  # where each row is, and its cells


def as_rows(names: Sequence[str], rows: Rows, header_number: int = 1) -> Iterator[Block]:
    """A block per row that has a cell; the names alone where there is no such row."""
    join = PARAGRAPH
    for number, cells in rows:
        if any(cells):
            text, lead = join_cells(names, cells)
            yield Block(text, number, lead=lead, join=join)
            join = LINE
    if join is PARAGRAPH and any(names):
        yield Block(BETWEEN.join(filter(None, names)), header_number)


def join_cells(names: Sequence[str], cells: Sequence[str]) -> tuple[str, str]:
    """The row's text, and its first cell, which says which row it is.

    An empty cell keeps its name. A row that is one cell over all columns is that cell.
    """
    if len(cells) > 1 and len(set(cells)) == 1:
        return cells[0], cells[0][:LONGEST_LEAD]
    named = [(name, cell) for name, cell in zip_longest(names, cells, fillvalue="") if name or cell]
    parts = [f"{name}: {cell}".strip() if name else cell for name, cell in named]
    lead = next(part for part, (_, cell) in zip(parts, named, strict=True) if cell)
    return BETWEEN.join(parts), lead[:LONGEST_LEAD]


def as_sections(rows: Rows, heading: str = "") -> Iterator[Section]:
    """A section per row below the header: the first row with as many cells as most of the first rows have.

    Each row above the header is a section, too.
    """
    rows = iter(rows)
    first = list(islice(rows, LOOKED_AT))
    widths = Counter(sum(map(bool, cells)) for _, cells in first)
    common = max(widths, key=widths.__getitem__, default=0)
    at = next((n for n, (_, cells) in enumerate(first) if sum(map(bool, cells)) >= common), 0)
    for block in as_rows([], first[:at]):
        yield join_blocks([block], "row", heading)
    if first:
        number, names = first[at]
        for block in as_rows(names, chain(first[at + 1 :], rows), header_number=number):
            yield join_blocks([block], "row", heading)


# ------------------------------------------------------------------------------- CSV


def read_csv(file: Path) -> Iterator[Section]:
    """A section per row. The delimiter is the one that divides most of the first lines into equally many cells."""
    csv.field_size_limit(sys.maxsize)
    with open_text(file, newline="") as text:
        delimiter = find_delimiter(text.read(100_000), DELIMITERS[file.suffix.lower()])
        text.seek(0)
        rows = ([cell.strip() for cell in cells] for cells in csv.reader(text, delimiter=delimiter))
        yield from as_sections((max(number, 1), cells) for number, cells in enumerate(rows) if any(cells))


def find_delimiter(text: str, delimiters: str) -> str:
    """The one that divides most of the first rows, and then into the fewest different numbers of cells."""

    def score(delimiter: str) -> tuple[int, int, int]:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        widths = [len(cells) for cells in islice(rows, LOOKED_AT) if cells]
        return sum(width > 1 for width in widths), -len(set(widths)), sum(widths)

    return max(delimiters, key=score)


# ------------------------------------------------------------------------------- sheets


def read_sheets(file: Path) -> Iterator[Section]:
    """A section per row of every sheet, under the sheet's name; a merged cell is repeated in all its places."""
    from python_calamine import CalamineWorkbook

    book = CalamineWorkbook.from_path(str(file))
    for name in book.sheet_names:
        sheet = book.get_sheet_by_name(name)
        cells = [[show_cell(cell) for cell in row] for row in sheet.to_python(skip_empty_area=False)]
        for (top, left), (bottom, right) in sheet.merged_cell_ranges or []:
            for row in cells[top : bottom + 1]:
                row[left : right + 1] = [cells[top][left]] * len(row[left : right + 1])
        yield from as_sections(((n, row) for n, row in enumerate(cells, 1) if any(row)), name)


def show_cell(value) -> str:
    """A cell as people write it: 12 for 12.0, 2026-11-29 for midnight of that day."""
    if isinstance(value, datetime) and value.time() == time():
        value = value.date()
    if isinstance(value, date | time | timedelta):
        return str(value)
    if isinstance(value, float):
        return f"{value:.15g}"  # what Excel shows: 0.1 + 0.2 is 0.3
    return " ".join(str(value).split())


# ------------------------------------------------------------------------------- JSON


def read_json(file: Path) -> Iterator[Section]:
    """A section per object of a list, wherever the list is, under the names that lead to it."""
    with open_text(file) as text:
        whole = parse(text.read(), str(file))
    if not isinstance(whole, list):
        yield from json_sections(whole, 0, ())
        return
    for number, item in enumerate(whole, 1):
        yield from json_sections(item, number, ())


def read_json_lines(file: Path) -> Iterator[Section]:
    """A section per line. Raises UserError that names the line that is not JSON."""
    number = 0
    # Not splitlines: it also splits at U+2028 and others, which JSON may have inside a string.
    with open_text(file, newline="\n") as lines:
        for place, line in enumerate(lines, 1):
            if line.strip():
                number += 1
                yield from json_sections(parse(line, f"{file}:{place}"), number, ())


def parse(text: str, where: str) -> object:
    """The value, its numbers as they are written. Raises UserError for what is not JSON."""
    try:
        return json.loads(text, parse_float=str, parse_int=str, parse_constant=str)
    except (ValueError, RecursionError) as error:
        raise fail(f"not JSON ({error})", where, "fix or remove it") from error


def json_sections(item: object, number: int, names: tuple[str, ...]) -> Iterator[Section]:
    """The item's own values as one row, and then a section per object of each list in it.

    Without a number of its own an item lends its objects their places.
    """
    cells, lists = [], []
    for path, value in walk_values(item, ()):
        (lists if isinstance(value, list) else cells).append((" ".join(path), value))
    if any(value for _, value in cells):
        text, lead = join_cells(*zip(*cells, strict=True))
        yield join_blocks([Block(text, number or 1, lead=lead)], "row", " > ".join(names))
    for name, values in lists:
        for place, value in enumerate(values, 1):
            yield from json_sections(value, number or place, (*names, *filter(None, [name])))


def walk_values(item: object, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], object]]:
    """(names that lead to it, text or list of objects) of every value, without null."""
    if isinstance(item, dict):
        for name, value in item.items():
            yield from walk_values(value, (*path, str(name)))
    elif isinstance(item, list) and any(isinstance(value, dict | list) for value in item):
        yield path, item
    elif isinstance(item, list):
        yield path, ", ".join(filter(None, map(show_value, item)))
    elif item is not None:
        yield path, show_value(item)


def show_value(value: object) -> str:
    return {True: "true", False: "false", None: ""}[value] if isinstance(value, bool | None) else str(value)
