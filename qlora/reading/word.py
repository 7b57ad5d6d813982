"""Word files: headings by their styles, list numbers as Word shows them, tables, footnotes where they are called.

Comments, deleted and hidden text are not read; inserted text is. Header and footer come once, at the end.
"""

from collections.abc import Iterator
from pathlib import Path

from qlora.reading.numbering import Numbering, W
from qlora.reading.section import LINE, PARAGRAPH, Block, Section, sections
from qlora.reading.table import BETWEEN, as_rows

MC = "{http://schemas.openxmlformats.org/markup-compatibility/2006}"
UNSEEN = {f"{W}del", f"{W}moveFrom", f"{W}instrText", f"{W}delText", f"{W}pPr", f"{W}rPr", f"{MC}Fallback"}
BREAKS = {f"{W}tab": " ", f"{W}br": "\n", f"{W}cr": "\n", f"{W}noBreakHyphen": "-", f"{W}softHyphen": ""}
NOTES = {f"{W}footnoteReference": "footnotes", f"{W}endnoteReference": "endnotes"}


def read_docx(file: Path) -> Iterator[Section]:
    """A section per heading; a passage is found by the number of its paragraph."""
    import docx

    return sections(WordFile(docx.Document(str(file))).read(), "paragraph")


class WordFile:
    """A document of python-docx with what its paragraphs refer to."""

    def __init__(self, document):
        self.document = document
        self.styles = {style.style_id: style for style in document.styles}
        self.numbering = Numbering(document.part)
        self.notes = {name: read_notes(document.part, name) for name in NOTES.values()}
        self.number = 0

    def read(self) -> Iterator[Block]:
        yield from self.read_blocks(self.document.element.body)
        yield from self.read_margins()

    def read_blocks(self, parent) -> Iterator[Block]:
        """The paragraphs and tables of the body or of a control in it."""
        for element in parent:
            if element.tag == f"{W}p":
                self.number += 1
                yield from self.read_paragraph(element)
            elif element.tag == f"{W}tbl":
                self.number += 1
                yield from self.read_table(element)
            elif element.tag in (f"{W}sdt", f"{W}sdtContent", f"{W}ins", f"{W}moveTo", f"{W}customXml"):
                yield from self.read_blocks(element)

    def read_paragraph(self, paragraph) -> Iterator[Block]:
        """The paragraph, and the text boxes that hang on it."""
        text = self.text_of(paragraph)
        if text:
            style = self.style_of(paragraph)
            mark = self.numbering.next_mark(paragraph, style)
            level = heading_level(style)
            if level:
                yield Block(" ".join(f"{mark}{text}".split()), self.number, level=level)
            else:
                yield Block(mark + text, self.number, join=LINE if mark else PARAGRAPH)
        for box in paragraph.iter(f"{W}txbxContent"):
            if next(box.iterancestors(f"{MC}Fallback"), None) is None:
                yield from self.read_blocks(box)

    def style_of(self, paragraph):
        named = paragraph.find(f"{W}pPr/{W}pStyle")
        return self.styles.get(named.get(f"{W}val")) if named is not None else None

    def text_of(self, element) -> str:
        """The text that a reader sees, on lines of its own breaks."""
        lines = (" ".join(line.split()) for line in "".join(self.pieces(element)).split("\n"))
        return "\n".join(filter(None, lines))

    def pieces(self, element) -> Iterator[str]:
        for child in element:
            if child.tag in UNSEEN or child.tag == f"{W}txbxContent" or is_hidden(child):
                continue
            if child.tag == f"{W}t":
                yield child.text or ""
            elif child.tag in BREAKS:
                yield BREAKS[child.tag]
            elif child.tag in NOTES:
                note = self.notes[NOTES[child.tag]].get(child.get(f"{W}id"))
                yield f" ({self.text_of(note)})" if note is not None else ""
            else:
                yield from self.pieces(child)
                if child.tag == f"{W}p":  # in a cell or a note
                    yield "\n"

    # ----------------------------------------------------------------------- tables

    def read_table(self, table) -> Iterator[Block]:
        """The rows; cells that are merged are repeated in every row and column that they cover."""
        rows = self.fill_merged([tr for tr in table.iter(f"{W}tr") if next(tr.iterancestors(f"{W}tbl")) is table])
        if len(rows) == 1 or max(map(len, rows), default=0) == 1:  # a frame around text
            for cells in rows:
                yield Block(BETWEEN.join(filter(None, cells)), self.number)
            return
        yield from as_rows(rows[0], [(self.number, cells) for cells in rows[1:]], header_number=self.number)

    def fill_merged(self, trs: list) -> list[list[str]]:
        rows: list[list[str]] = []
        for tr in trs:
            cells: list[str] = []
            for tc in tr.iter(f"{W}tc"):
                if next(tc.iterancestors(f"{W}tr")) is not tr:  # of a table in a cell
                    continue
                text = " ".join(self.text_of(tc).split())
                merge = tc.find(f"{W}tcPr/{W}vMerge")
                if merge is not None and merge.get(f"{W}val") != "restart" and rows and len(cells) < len(rows[-1]):
                    text = rows[-1][len(cells)]
                span = tc.find(f"{W}tcPr/{W}gridSpan")
                cells += [text] * (min(int(span.get(f"{W}val")), 1000) if span is not None else 1)
            rows.append(cells)
        return rows

    # ----------------------------------------------------------------------- header and footer

    def read_margins(self) -> Iterator[Block]:
        """The text of headers and footers, each once."""
        seen = set()
        for part in self.document.sections:
            for margin in (part.header, part.first_page_header, part.footer, part.first_page_footer):
                for paragraph in [] if margin.is_linked_to_previous else margin._element.iter(f"{W}p"):
                    text = self.text_of(paragraph)
                    if text and text not in seen:
                        seen.add(text)
                        yield Block(text, self.number or 1)


def is_hidden(run) -> bool:
    vanish = run.find(f"{W}rPr/{W}vanish") if run.tag == f"{W}r" else None
    return vanish is not None and vanish.get(f"{W}val") not in ("0", "false")


def heading_level(style) -> int:
    """1 for the title, 2 and more for headings, by name or by the level in the outline; 0 for other text."""
    while style is not None:
        name = (style.name or "").lower()
        if name == "title":
            return 1
        outline = style.element.find(f"{W}pPr/{W}outlineLvl")
        if outline is not None and int(outline.get(f"{W}val")) < 9:
            return int(outline.get(f"{W}val")) + 2
        if name.startswith("heading ") and name[8:].isdecimal():
            return int(name[8:]) + 1
        style = style.base_style
    return 0


def read_notes(part, kind: str) -> dict[str, object]:
    """The notes by their id."""
    from docx.oxml import parse_xml

    for relation in part.rels.values():
        if relation.reltype.endswith(f"/{kind}"):
            root = parse_xml(relation.target_part.blob)
            return {note.get(f"{W}id"): note for note in root if note.get(f"{W}type") is None}
    return {}
