"""Plain text, and Markdown and reStructuredText with their headings.

Plain text has no headings: a line that begins with # is a comment, or a gate code.
"""

import io
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from qlora.reading.encoding import open_text
from qlora.reading.section import LINE, Block, Section, join_blocks, sections
from qlora.reading.table import as_rows

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


def read_rst(file: Path) -> Iterator[Section]:
    """A section per title, its text as it is written."""
    return sections(rst_blocks(read_whole(file)), "line")


def rst_blocks(text: str) -> Iterator[Block]:
    """Titles as docutils finds them, and the lines between them."""
    from docutils import nodes
    from docutils.core import publish_doctree

    quiet = {"report_level": 5, "halt_level": 5, "warning_stream": io.StringIO()}
    safe = {"file_insertion_enabled": False, "raw_enabled": False, "doctitle_xform": False}
    tree = publish_doctree(text, settings_overrides=quiet | safe)
    lines, first = text.split("\n"), 0
    for section in tree.findall(nodes.section):
        title = section[0]
        under = title.line - 1  # the line below the title; docutils counts from 1
        over = under - 2 if under > 1 and lines[under - 2].strip() == lines[under].strip() else under - 1
        if first < over:
            yield Block("\n".join(lines[first:over]), first + 1, join=LINE)
        depth = sum(isinstance(node, nodes.section) for node in ancestors(section))
        yield Block(title.astext(), under, level=depth)
        first = under + 1
    yield Block("\n".join(lines[first:]), first + 1, join=LINE)


def ancestors(node) -> Iterator:
    """The node and everything that it stands in."""
    while node is not None:
        yield node
        node = node.parent
