"""HTML as a browser would show it: its encoding, its headings, lists and tables; not its navigation and scripts.

html_blocks(parse_html(content))     # mails and books have HTML inside, too
"""

import re
from collections.abc import Iterator
from pathlib import Path

from qlora.reading.encoding import find_mark, guess
from qlora.reading.section import LINE, PARAGRAPH, Block, Section, sections
from qlora.reading.table import BETWEEN, as_rows

HEADINGS = {f"h{level}": level + 1 for level in range(1, 7)}  # level 1 is the title of the page
UNSEEN = {
    *(
        "script",
        "style",
        "template",
        "noscript",
        "head",
        "nav",
        "svg",
        "iframe",
        "object",
        "canvas",
        "select",
        "button",
    ),
    *("audio", "video", "map", "dialog", "datalist"),
}
UNSEEN_ROLES = {"navigation", "search", "menu", "menubar", "banner", "contentinfo"}
# Bootstrap, DocBook and Sphinx call navigation so.
UNSEEN_CLASSES = {"nav", "navbar", "navigation", "navheader", "navfooter", "breadcrumb", "breadcrumbs", "headerlink"}
INLINE = {
    *(
        "a",
        "abbr",
        "acronym",
        "b",
        "bdi",
        "bdo",
        "big",
        "br",
        "cite",
        "code",
        "data",
        "del",
        "dfn",
        "em",
        "font",
        "i",
        "img",
    ),
    *("ins", "kbd", "label", "mark", "q", "rp", "rt", "ruby", "s", "samp", "small", "span", "strike", "strong", "sub"),
    *("sup", "time", "tt", "u", "var", "wbr"),
}
DECLARED = rb"""<meta[^>]+charset\s*=\s*["']?\s*([\w:.-]+)"""


def read_html(file: Path) -> Iterator[Section]:
    """A section per heading, under the page's title."""
    return sections(html_blocks(parse_html(file.read_bytes())), "line")


def parse_html(content: bytes):
    """The root element of the page.

    Raises ValueError for one that has no element at all.
    """
    from lxml import etree, html

    text = decode_html(content)
    parser = html.HTMLParser(encoding="utf-8", huge_tree=True, remove_pis=True, no_network=True)
    try:
        return html.document_fromstring(text.encode("utf-8", "replace"), parser=parser)
    except etree.ParserError:  # nothing but white space or comments
        return html.document_fromstring(b"<html></html>")


def decode_html(content: bytes) -> str:
    """The text in the encoding that the byte order mark or `<meta charset>` names, as the HTML standard has it."""

    import webencodings

    if marked := find_mark(content):
        return content.decode(marked, "replace")
    if declared := re.search(DECLARED, content[:4096], re.IGNORECASE):
        label = declared[1].decode("ascii", "replace")
        if encoding := webencodings.lookup(label):
            # A page that is read as ASCII so far is not UTF-16 (HTML standard, "prescan a byte stream").
            name = "utf-8" if encoding.name.startswith("utf-16") else encoding.codec_info.name
            return content.decode(name, "replace")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode(guess(content), "replace")


def html_blocks(root, number: int = 0) -> Iterator[Block]:
    """The blocks of a page, each with the line of its element, or with the number of the chapter that the page is."""
    title = " ".join((root.findtext("head/title") or "").split())
    body = find_main(root)
    first = next((collapse(heading) for heading in body.iter("h1")), "")
    if title and not (first and first in title):
        yield Block(title, number or 1, level=1)
    yield from Page(number).read(body)


def find_main(root):
    """The only element that is marked as the page's main content, else the body."""
    marked = root.xpath("//main | //*[@role='main']")
    outermost = [element for element in marked if not any(parent in marked for parent in element.iterancestors())]
    if len(outermost) == 1 and collapse(outermost[0]):
        return outermost[0]
    body = root.find("body")
    return root if body is None else body


def collapse(element) -> str:
    """All text in the element, on one line. An element between words divides them, but an inline one does not."""
    return " ".join("".join(visible_text(element)).split())


def visible_text(element) -> Iterator[str]:
    """The pieces of text that a browser shows, with a space between blocks."""
    from lxml import etree

    walker = etree.iterwalk(element, events=("start", "end", "comment"))
    for event, part in walker:
        if event == "start" and is_unseen(part):
            walker.skip_subtree()
        elif event == "start":
            yield own_text(part)
        if event != "start" and part is not element:
            yield ("" if event == "comment" or part.tag in INLINE else " ") + (part.tail or "")


def own_text(element) -> str:
    """What stands before the element's first child: of a picture its description."""
    if element.tag == "img":
        return element.get("alt") or ""
    start = "" if element.tag in INLINE and element.tag != "br" else " "
    return start + (element.text or "")


def is_unseen(element) -> bool:
    """Whether a browser does not show the element, or shows it on every page."""
    style = (element.get("style") or "").replace(" ", "").lower()
    return (
        element.tag in UNSEEN
        or element.get("hidden") is not None
        or element.get("aria-hidden") == "true"
        or element.get("role") in UNSEEN_ROLES
        or "display:none" in style
        or "visibility:hidden" in style
        or not UNSEEN_CLASSES.isdisjoint((element.get("class") or "").lower().split())
        or (element.tag == "footer" and not any(element.iterancestors("main", "article", "section", "blockquote")))
    )


class Page:
    """Collects the text of a page up to the end of a block."""

    def __init__(self, number: int = 0):
        self.number = number
        self.line = 1
        self.words: list[str] = []
        self.lists: list[int | None] = []  # of the open lists the next number, None without numbers
        self.mark = ""  # of the list's item that begins

    def read(self, body) -> Iterator[Block]:
        from lxml import etree

        walker = etree.iterwalk(body, events=("start", "end", "comment"))
        for event, element in walker:
            if event == "start":
                if is_unseen(element):
                    walker.skip_subtree()
                elif made := self.take_whole(element):
                    yield from made
                    walker.skip_subtree()
                else:
                    yield from self.open(element)
                continue
            if event == "end" and element.tag not in INLINE:
                yield from self.flush(LINE if self.lists else PARAGRAPH)
                if element.tag in ("ol", "ul") and self.lists and not is_unseen(element):
                    self.lists.pop()
            if element is not body:
                self.words.append(element.tail or "")
        yield from self.flush(PARAGRAPH)

    def open(self, element) -> Iterator[Block]:
        if element.tag == "br":
            self.words.append("\n")
        if element.tag not in INLINE:
            yield from self.flush(LINE if self.lists else PARAGRAPH)
            self.line = element.sourceline or self.line
        if element.tag in ("ol", "ul"):
            self.lists.append(as_number(element.get("start"), 1) if element.tag == "ol" else None)
        elif element.tag == "li":
            self.mark = self.next_mark(element)
        self.words.append(element.get("alt") or "" if element.tag == "img" else element.text or "")

    def next_mark(self, item) -> str:
        """`3. ` for the third of a numbered list."""
        if not self.lists or self.lists[-1] is None:
            return "- "
        number = as_number(item.get("value"), self.lists[-1])
        self.lists[-1] = number + 1
        return f"{number}. "

    def take_whole(self, element) -> list[Block]:
        """The blocks of a heading, a table or preformatted text; none for any other element."""
        if element.tag not in HEADINGS and element.tag not in ("table", "pre"):
            return []
        made = list(self.flush(PARAGRAPH))
        self.line = element.sourceline or self.line
        at = self.number or self.line
        if element.tag in HEADINGS:
            title = collapse(element)
            return made + ([Block(title, at, level=HEADINGS[element.tag])] if title else [])
        if element.tag == "pre":
            return [*made, Block("".join(element.itertext()).strip("\n"), at)]
        if element.find(".//table") is not None:  # for layout
            return []
        return made + table_blocks(element, self.number)

    def flush(self, join: str) -> Iterator[Block]:
        """The block that ends here, if it has text."""
        lines = (" ".join(line.split()) for line in "".join(self.words).split("\n"))
        self.words.clear()
        if text := "\n".join(filter(None, lines)):
            yield Block(self.mark + text, self.number or self.line, join=join)
            self.mark = ""


def as_number(text: str | None, default: int) -> int:
    return int(text) if text and text.lstrip("-").isdecimal() else default


# ------------------------------------------------------------------------------- tables


def table_blocks(table, number: int) -> list[Block]:
    """The rows of the table. Where each row begins with a header, as in a form, that is the name of what follows."""
    caption = table.find("caption")
    title = collapse(caption) if caption is not None else ""
    made = [Block(title, number or caption.sourceline)] if title else []
    trs = list(table.iter("tr"))
    grid = fill_spans([[(collapse(cell), cell) for cell in tr.iter("td", "th")] for tr in trs])
    heads = 0
    while heads < len(trs) and is_header(trs[heads]):
        heads += 1
    if not heads and len(trs) > 1 and not any(tr.find("th") is not None for tr in trs):
        heads = 1
    rows = [(number or tr.sourceline, cells) for tr, cells in zip(trs, grid, strict=True)]
    if not heads:
        between = ": " if trs and trs[0].find("th") is not None else BETWEEN
        return made + [Block(between.join(filter(None, cells)), at, join=LINE) for at, cells in rows if any(cells)]
    names = [" ".join(dict.fromkeys(filter(None, column))) for column in zip(*grid[:heads], strict=True)]
    return made + list(as_rows(names, rows[heads:], header_number=rows[0][0]))


def is_header(tr) -> bool:
    """Whether the row stands in the table's head, or all its cells are headers."""
    cells = list(tr.iter("td", "th"))
    return tr.getparent().tag == "thead" or (bool(cells) and all(cell.tag == "th" for cell in cells))


def fill_spans(rows: list[list[tuple[str, object]]]) -> list[list[str]]:
    """The cells of every row, those that span several rows or columns in each place; rows equally long."""
    grid: dict[tuple[int, int], str] = {}
    for top, row in enumerate(rows):
        left = 0
        for text, cell in row:
            while (top, left) in grid:
                left += 1
            wide, high = (min(as_number(cell.get(name), 1) or 1, 1000) for name in ("colspan", "rowspan"))
            for down in range(min(high, len(rows) - top)):
                for right in range(wide):
                    grid[top + down, left + right] = text
    width = max((column for _, column in grid), default=-1) + 1
    return [[grid.get((row, column), "") for column in range(width)] for row in range(len(rows))]
