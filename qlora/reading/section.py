"""What every reader gives: blocks in reading order, and the sections that they make.

    sections(blocks, "line")     # a section per path of headings, its blocks joined, their places kept

A block is a paragraph, an item of a list, a row of a table or a heading, with the line, page or row where it begins.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from operator import itemgetter

from qlora.words import clean

PARAGRAPH, LINE, RUNNING = "\n\n", "\n", " "  # what stands between a block and the one before it


@dataclass(frozen=True)
class Block:
    """Text that stands together. `level` above 0 makes it a heading.

    `lead` says which row of a table it is, and is repeated where the row is too long for one passage.
    """

    text: str
    number: int = 1
    level: int = 0
    lead: str = ""
    join: str = PARAGRAPH


@dataclass(frozen=True)
class Section:
    """Text under one path of headings.

    `marks` are (first character, line, page or row), ascending. `rows` are (first character, the one after the last,
    lead) of the rows in it.
    """

    text: str
    heading: str = ""
    unit: str = "line"
    marks: Sequence[tuple[int, int]] = ((0, 1),)
    rows: Sequence[tuple[int, int, str]] = ()


@dataclass(frozen=True)
class Note:
    """What a reader left out, for the person who ingests: `page 2 of 3 has no text`."""

    text: str
    fix: str


def sections(blocks: Iterable[Block], unit: str) -> Iterator[Section]:
    """The sections in order, without empty ones."""
    for path, placed in groupby(under_headings(blocks), key=itemgetter(0)):
        section = join_blocks([block for _, block in placed], unit, " > ".join(heading.text for heading in path))
        if section.text.strip():
            yield section


def under_headings(blocks: Iterable[Block]) -> Iterator[tuple[tuple[Block, ...], Block]]:
    """Every block of text with the headings above it. A heading with nothing below it is text of the section above."""
    path: tuple[Block, ...] = ()
    bare = False  # whether nothing followed the last heading yet
    for block in chain(blocks, [Block("end", level=1)]):
        if not block.text.strip():
            continue
        if block.level:
            if bare and block.level <= path[-1].level:
                yield path[:-1], Block(path[-1].text, path[-1].number, join=LINE)
            path = (*(heading for heading in path if heading.level < block.level), block)
        else:
            yield path, block
        bare = bool(block.level)


def join_blocks(blocks: Sequence[Block], unit: str, heading: str = "") -> Section:
    """One section of all the blocks."""
    parts: list[str] = []
    marks, rows, at = [], [], 0
    for block in blocks:
        text = clean(block.text)
        if parts:
            parts.append(block.join)
            at += len(block.join)
        marks.append((at, block.number))
        if block.lead:
            rows.append((at, at + len(text), clean(block.lead)))
        parts.append(text)
        at += len(text)
    return Section("".join(parts), clean(heading), unit, marks, rows)


def find_number(section: Section, at: int) -> int:
    """The line, page or row of a character of the section."""
    first, number = section.marks[bisect_right(section.marks, at, key=itemgetter(0)) - 1]
    return number + section.text.count("\n", first, at) if section.unit == "line" else number
