"""The same section, a title with paragraphs and a table, as a file of every format.

Each writer takes the path and a Section, and writes what people's programs write: headings as headings where the
format has them, the table as a table. CSV has no place for prose: paragraphs are rows of a file beside it.
"""

import csv
import json
import textwrap
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from email.message import EmailMessage
from html import escape
from pathlib import Path

from benchmarks.hostile import pdf, stream

LINE, WIDTH, HEIGHT = 90, 595, 842  # characters of a line; points of an A4 page
LEFT, TOP, STEP = 56, 780, 15  # points: margin, first line, from line to line


@dataclass(frozen=True)
class Section:
    """A title, paragraphs, and a table whose first row is its head; questions are those of formats.json."""

    title: str
    paragraphs: Sequence[str]
    table: Sequence[Sequence[str]]
    questions: Sequence[dict] = field(default=())


# ------------------------------------------------------------------------------- text


def write_txt(path: Path, section: Section) -> None:
    """A row of the table is a line that names its columns."""
    head, *rows = section.table
    lines = [", ".join(f"{name}: {cell}" for name, cell in zip(head, row, strict=True)) for row in rows]
    put(path, "\n\n".join([section.title, *section.paragraphs, "\n".join(lines)]))


def write_md(path: Path, section: Section) -> None:
    head, *rows = ["| " + " | ".join(row) + " |" for row in section.table]
    ruler = "|" + "---|" * len(section.table[0])
    table = "\n".join([head, ruler, *rows])
    put(path, "\n\n".join([f"# {section.title}", *section.paragraphs, "## Plants", table]))


def write_rst(path: Path, section: Section) -> None:
    widths = [max(map(len, column)) for column in zip(*section.table, strict=True)]
    ruler = "  ".join("=" * width for width in widths)
    head, *rows = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in section.table]
    title = f"{section.title}\n{'=' * len(section.title)}"
    table = "\n".join([ruler, head, ruler, *rows, ruler])
    put(path, "\n\n".join([title, *section.paragraphs, "Plants\n------", table]))


def write_html(path: Path, section: Section) -> None:
    body = f"<nav><a href='/'>Home</a> <a href='/tickets'>Tickets</a></nav>\n<main>\n{as_html(section)}</main>"
    style = "<style>td { padding: 1ex }</style>"
    put(path, f"<!DOCTYPE html>\n<html><head><title>{section.title}</title>{style}</head>\n<body>{body}</body></html>")


def as_html(section: Section) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>\n"

    head, *rows = section.table
    table = f"<table>\n{row(head, 'th')}{''.join(row(cells, 'td') for cells in rows)}</table>\n"
    paragraphs = "".join(f"<p>{escape(text)}</p>\n" for text in section.paragraphs)
    return f"<h1>{escape(section.title)}</h1>\n{paragraphs}<h2>Plants</h2>\n{table}"


def write_eml(path: Path, section: Section) -> None:
    message = EmailMessage()
    message["Subject"], message["From"], message["To"] = section.title, "keeper@marrowfield.example", "all@example.org"
    head, *rows = section.table
    lines = [", ".join(f"{name}: {cell}" for name, cell in zip(head, row, strict=True)) for row in rows]
    message.set_content("\n\n".join([*section.paragraphs, "\n".join(lines)]))
    message.add_alternative(as_html(section), subtype="html")
    path.write_bytes(bytes(message))


def put(path: Path, text: str) -> None:
    path.write_text(f"{text}\n", encoding="utf-8")


# ------------------------------------------------------------------------------- rows


def write_csv(path: Path, section: Section, delimiter: str = ",") -> None:
    notes = [["House", "Note"], *([section.title, text] for text in section.paragraphs)]
    for place, rows in ((path, section.table), (path.with_stem(f"{path.stem}-notes"), notes)):
        with place.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows(rows)


def write_tsv(path: Path, section: Section) -> None:
    write_csv(path, section, "\t")


def write_json(path: Path, section: Section) -> None:
    head, *rows = section.table
    plants = [dict(zip(map(str.lower, head), row, strict=True)) for row in rows]
    notes = [{"house": section.title, "note": text} for text in section.paragraphs]
    put(path, json.dumps({"title": section.title, "notes": notes, "plants": plants}, indent=2, ensure_ascii=False))


def write_xlsx(path: Path, section: Section) -> None:
    import xlsxwriter

    notes = [["House", "Note"], *([section.title, text] for text in section.paragraphs)]
    with xlsxwriter.Workbook(path) as book:
        for name, rows in (("Notes", notes), ("Plants", section.table)):
            sheet = book.add_worksheet(name)
            for number, row in enumerate(rows):
                sheet.write_row(number, 0, row)


# ------------------------------------------------------------------------------- office, books, pages


def write_docx(path: Path, section: Section) -> None:
    import docx

    document = docx.Document()
    document.add_heading(section.title, 1)
    for text in section.paragraphs:
        document.add_paragraph(text)
    document.add_heading("Plants", 2)
    table = document.add_table(0, len(section.table[0]))
    for row in section.table:
        for cell, text in zip(table.add_row().cells, row, strict=True):
            cell.text = text
    document.save(path)


def write_pptx(path: Path, section: Section) -> None:
    """A slide per paragraph, and one with the table."""
    from pptx import Presentation
    from pptx.util import Cm

    show = Presentation()
    for text in section.paragraphs:
        slide = show.slides.add_slide(show.slide_layouts[1])
        slide.shapes.title.text, slide.placeholders[1].text = section.title, text
    slide = show.slides.add_slide(show.slide_layouts[5])
    slide.shapes.title.text = f"{section.title}: plants"
    size = len(section.table), len(section.table[0])
    table = slide.shapes.add_table(*size, Cm(2), Cm(4), Cm(20), Cm(12)).table
    for number, row in enumerate(section.table):
        for column, text in enumerate(row):
            table.cell(number, column).text = text
    show.save(path)


def write_epub(path: Path, section: Section) -> None:
    """A book of one chapter."""
    package = (
        '<package xmlns="http://www.idpf.org/2007/opf" version="3.0" unique-identifier="id">'
        '<metadata xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:identifier id="id">urn:x</dc:identifier>'
        f"<dc:title>{escape(section.title)}</dc:title><dc:language>en</dc:language></metadata>"
        '<manifest><item id="c1" href="c1.xhtml" media-type="application/xhtml+xml"/></manifest>'
        '<spine><itemref idref="c1"/></spine></package>'
    )
    container = (
        '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container" version="1.0"><rootfiles>'
        '<rootfile full-path="content.opf" media-type="application/oebps-package+xml"/></rootfiles></container>'
    )
    html = f'<html xmlns="http://www.w3.org/1999/xhtml"><head><title>{escape(section.title)}</title></head><body>'
    with zipfile.ZipFile(path, "w") as book:
        book.writestr("mimetype", "application/epub+zip")
        book.writestr("META-INF/container.xml", f'<?xml version="1.0"?>{container}')
        book.writestr("content.opf", f'<?xml version="1.0"?>{package}')
        book.writestr("c1.xhtml", f'<?xml version="1.0"?>{html}{as_html(section)}</body></html>')


def write_pdf(path: Path, section: Section) -> None:
    """Lines of Helvetica; the cells of the table at their columns, without rules."""
    lines = [[(LEFT, section.title)], []]
    for text in section.paragraphs:
        lines += [*([(LEFT, line)] for line in textwrap.wrap(text, LINE)), []]
    step = (WIDTH - 2 * LEFT) // len(section.table[0])
    lines += [[(LEFT + step * n, cell) for n, cell in enumerate(row)] for row in section.table]
    path.write_bytes(pdf(*make_pages(lines)))


def make_pages(lines: Sequence[list[tuple[int, str]]]) -> Iterator[bytes]:
    """The objects of a PDF file whose lines are (x, text) pairs, 48 lines per page."""
    each = 48
    pages = [lines[at : at + each] for at in range(0, len(lines), each)]
    kids = b" ".join(b"%d 0 R" % (4 + 2 * n) for n in range(len(pages)))
    yield b"<< /Type /Catalog /Pages 2 0 R >>"
    yield b"<< /Type /Pages /Kids [%s] /Count %d >>" % (kids, len(pages))
    yield b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>"
    box = b"/MediaBox [0 0 %d %d] /Resources << /Font << /F1 3 0 R >> >>" % (WIDTH, HEIGHT)
    for n, page in enumerate(pages):
        yield b"<< /Type /Page /Parent 2 0 R %s /Contents %d 0 R >>" % (box, 5 + 2 * n)
        shown = [show_text(x, TOP - STEP * at, text) for at, line in enumerate(page) for x, text in line]
        yield stream(b"BT /F1 11 Tf\n" + b"".join(shown) + b"ET", 1)


def show_text(x: int, y: int, text: str) -> bytes:
    """The operators that put the text at a place."""
    raw = text.encode("cp1252", "replace").replace(b"\\", rb"\\").replace(b"(", rb"\(").replace(b")", rb"\)")
    return b"1 0 0 1 %d %d Tm (%s) Tj\n" % (x, y, raw)


WRITERS: dict[str, Callable[[Path, Section], None]] = {
    **{"txt": write_txt, "md": write_md, "html": write_html, "docx": write_docx, "pdf": write_pdf},
    **{"csv": write_csv, "xlsx": write_xlsx, "json": write_json},
    **{"pptx": write_pptx, "eml": write_eml, "epub": write_epub, "rst": write_rst, "tsv": write_tsv},
}
