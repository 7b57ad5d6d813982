"""Plain text, and Markdown and reStructuredText with their headings.

Plain text has no headings: a line that begins with # is a comment, or a gate code.
"""

import io
import re
import textwrap
from collections.abc import Iterator
from itertools import chain, pairwise
from operator import itemgetter
from pathlib import Path

from qlora.reading.encoding import open_text
from qlora.reading.section import LINE, Block, Section, join_blocks, sections
from qlora.reading.table import as_rows
from qlora.reading.web import parse_html, table_blocks

AT_ONCE = 500_000  # characters: a file may be larger than the memory


def read_plain(file: Path) -> Iterator[Section]:
    """The lines, in sections of about AT_ONCE characters."""
    number = 1
    with open_text(file) as lines:
        while text := "".join(lines.readlines(AT_ONCE)):
            yield join_blocks([Block(text, number)], "line")
            number += text.count("\n")


def read_whole(file: Path) -> str:
    """The text in its encoding, its line ends as one character."""
    with open_text(file) as text:
        return text.read()


# ------------------------------------------------------------------------------- Markdown


def read_markdown(file: Path) -> Iterator[Section]:
    """A section per heading, its text as it is written but for tables."""
    return sections(markdown_blocks(read_whole(file)), "line")


def markdown_blocks(text: str) -> Iterator[Block]:
    """Headings and rows by CommonMark's rules for blocks (and GitHub's for tables), and the lines between them.

    What looks like a heading in code, HTML, lists or quotations is none, and neither is the end of the front matter.
    """
    lines = text.split("\n")
    first = 0
    for begin, end, made in find_structure(text):
        if first < begin:
            yield Block("\n".join(lines[first:begin]), first + 1, join=LINE)
        yield from made
        first = end
    yield Block("\n".join(lines[first:]), first + 1, join=LINE)


def find_structure(text: str) -> Iterator[tuple[int, int, list[Block]]]:
    """(first line, line after it, its blocks) of every heading and table."""
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark").enable("table")
    parser.core.ruler.enableOnly(["normalize", "block"])  # titles stay as they are written
    front = text.find("\n---\n", 3) if text.startswith("---\n") else -1
    body = text.count("\n", 0, front + 1) + 1 if front >= 0 else 0
    tokens = parser.parse(text)
    for n, (token, title) in enumerate(pairwise(tokens)):
        if token.level or not token.map or token.map[0] < body:
            continue
        if token.type == "heading_open" and title.content:
            name = " ".join(title.content.split())
            yield *token.map, [Block(name, token.map[0] + 1, level=int(token.tag[1]))]
        elif token.type == "table_open":
            yield *token.map, read_table(tokens, n)


def read_table(tokens: list, first: int) -> list[Block]:
    """The rows of the table that opens at this token."""
    rows: list[tuple[int, list[str]]] = []
    for token in tokens[first:]:
        if token.type == "table_close":
            break
        if token.type == "tr_open":
            rows.append((token.map[0] + 1, []))
        elif token.type == "inline":
            rows[-1][1].append(token.content)
    return list(as_rows(rows[0][1], rows[1:], header_number=rows[0][0]))


# ------------------------------------------------------------------------------- reStructuredText


QUIET = {"report_level": 5, "halt_level": 5}
SAFE = {"file_insertion_enabled": False, "raw_enabled": False, "doctitle_xform": False}
BORDER = re.compile(r" *(?:\+[-=+]+\+|=+(?: +=+)+) *")  # of a grid, of a simple table


def read_rst(file: Path) -> Iterator[Section]:
    """A section per title, its text as it is written but for tables."""
    return sections(rst_blocks(read_whole(file)), "line")


def rst_blocks(text: str) -> Iterator[Block]:
    """Titles as docutils finds them, rows of tables, and the lines between them."""
    lines, first = text.split("\n"), 0
    for begin, end, made in sorted(chain(find_titles(text, lines), find_tables(lines)), key=itemgetter(0)):
        if first < begin:
            yield Block("\n".join(lines[first:begin]), first + 1, join=LINE)
        yield from made
        first = max(first, end)
    yield Block("\n".join(lines[first:]), first + 1, join=LINE)


def find_titles(text: str, lines: list[str]) -> Iterator[tuple[int, int, list[Block]]]:
    """(first line, line after it, heading) of every title, with the lines below and above it."""
    from docutils import nodes
    from docutils.core import publish_doctree

    tree = publish_doctree(text, settings_overrides={**QUIET, **SAFE, "warning_stream": io.StringIO()})
    for section in tree.findall(nodes.section):
        title = section[0]
        under = title.line - 1  # the line below the title; docutils counts from 1
        over = under - 2 if under > 1 and lines[under - 2].strip() == lines[under].strip() else under - 1
        depth = sum(isinstance(node, nodes.section) for node in ancestors(section))
        yield over, under + 1, [Block(title.astext(), under, level=depth)]


def find_tables(lines: list[str]) -> Iterator[tuple[int, int, list[Block]]]:
    """(first line, line after it, rows) of every grid and simple table."""
    from docutils.core import publish_string

    at = 0
    while at < len(lines):
        begin, at = at, at + 1
        if not BORDER.fullmatch(lines[begin]):
            continue
        while at < len(lines) and (lines[at].strip() or not BORDER.fullmatch(lines[at - 1])):
            at += 1
        text = textwrap.dedent("\n".join(lines[begin:at]))
        page = publish_string(
            text, writer="html5", settings_overrides={**QUIET, **SAFE, "warning_stream": io.StringIO()}
        )
        table = parse_html(page).find(".//table")
        if table is not None:
            yield begin, at, table_blocks(table, begin + 1)


def ancestors(node) -> Iterator:
    """The node and everything that it stands in."""
    while node is not None:
        yield node
        node = node.parent
