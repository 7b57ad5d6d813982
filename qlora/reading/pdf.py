"""PDF files: text in reading order, tables, filled forms; headers of every page left out, scans by OCR.

pypdfium2 reads (BSD-3-Clause, Apache-2.0): of a page of text with a table it takes 8 ms, pypdf 30, pdfminer.six 300 and
pdfplumber 800, and it draws pages for OCR. It gives pieces of lines with their places; `layout` makes text of them.
"""

import ctypes
import io
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import cache
from itertools import groupby
from pathlib import Path

from qlora import settings
from qlora.console import fail
from qlora.reading.layout import Box, Paragraph, is_broken, join_touching, lay_out
from qlora.reading.section import PARAGRAPH, RUNNING, Block, Note, Section, join_blocks
from qlora.words import FULL_STOPS

MOST_PAGES = 5_000
MARGIN = 2  # lines at the top and at the bottom of a page that may be its header or footer
REPEATED = 0.6  # share of the pages that have a header or footer
OCR_AT_ONCE = 32  # pages that are drawn; one takes 1 to 9 MB
DPI = 300  # what Tesseract's documentation asks for
PAGE_NUMBER = re.compile(r"[-\u2013 ]*(?:page |seite |p\. ?)?#+(?: ?(?:/|of|von|de) ?#+)?[-\u2013 ]*")
SENTENCE_ENDS = re.compile(rf"[{FULL_STOPS}:;][\"'\u201d\u2019)\]]*$")


def read_pdf(file: Path, ocr: str = "") -> Iterator[Section | Note]:
    """A section per page, or for the pages that a sentence joins, and what is missing.

    `ocr` are the languages that Tesseract reads pages without text in; empty for no OCR. Raises UserError for a file
    that needs a password, and for one with too many pages.
    """
    with closing(open_pdf(file)) as document:
        if len(document) > MOST_PAGES:
            raise fail(f"{len(document)} pages are too many (limit {MOST_PAGES})", str(file), "split it")
        document.init_forms()
        pages = [read_page(document, number) for number in range(len(document))]
        blank = [number for number, page in enumerate(pages, 1) if not page]
        if ocr and blank:
            for at in range(0, len(blank), OCR_AT_ONCE):
                some = blank[at : at + OCR_AT_ONCE]
                for number, paragraphs in zip(some, recognise(document, some, ocr), strict=True):
                    pages[number - 1] = paragraphs
            blank = [number for number in blank if not pages[number - 1]]
    yield from join_pages(drop_repeated(pages))
    if blank:
        yield Note(describe_blank(blank, len(pages)), advise_ocr(ocr))


def open_pdf(file: Path):
    """Raises UserError for a file that needs a password."""
    import pypdfium2

    try:
        return pypdfium2.PdfDocument(file)
    except pypdfium2.PdfiumError as error:
        if error.err_code == pypdfium2.raw.FPDF_ERR_PASSWORD:
            raise fail("the file needs a password", str(file), "save it without one") from error
        raise


def describe_blank(blank: list[int], pages: int) -> str:
    """`page 2 of 3 has no text`; runs of pages are shortened: `pages 2-5, 9 of 12 have no text`."""
    runs = [list(group) for _, group in groupby(enumerate(blank), key=lambda pair: pair[1] - pair[0])]
    shown = ", ".join(f"{run[0][1]}-{run[-1][1]}" if len(run) > 1 else str(run[0][1]) for run in runs)
    return f"page {shown} of {pages} has no text" if len(blank) == 1 else f"pages {shown} of {pages} have no text"


def advise_ocr(ocr: str) -> str:
    if ocr:
        return "check that it is not blank, and the language of --ocr"
    if tesseract_languages():
        return "give --ocr auto"
    return "scanned? install tesseract-ocr, and ingest again"


# ------------------------------------------------------------------------------- pages


def read_page(document, number: int) -> list[Paragraph]:
    with closing(document[number]) as page, closing(page.get_textpage()) as text:
        pieces = list(read_pieces(text))
        turn = make_turn(page, pieces)
        boxes = [*join_touching(map(turn, pieces)), *map(turn, read_fields(document, page))]
        return lay_out(boxes, [turn(line) for line in read_lines(page)])


def make_turn(page, pieces: list[Box]):
    """A function that turns a box from how the page is stored to how its text is read.

    A page may be stored on its side and shown upright, or the other way round: the longer side of lines decides.
    """
    long = [piece for piece in pieces if len(piece.text) > 3]
    is_upright = 2 * sum(piece.right - piece.left > piece.height for piece in long) >= len(long)
    turns = 0 if is_upright and page.get_rotation() != 180 else page.get_rotation() // 90
    width, height = page.get_size()
    across, up = (height, width) if turns % 2 else (width, height)  # of the page as it is stored

    def turn(box: Box) -> Box:
        left, bottom, right, top = box.left, box.bottom, box.right, box.top
        if turns == 1:
            left, bottom, right, top = bottom, across - right, top, across - left
        elif turns == 2:
            left, bottom, right, top = across - right, up - top, across - left, up - bottom
        elif turns == 3:
            left, bottom, right, top = up - top, left, up - bottom, right
        return Box(left, bottom, right, top, box.text)

    return turn


def read_pieces(text) -> Iterator[Box]:
    """The pieces of lines as the file has them, in its order."""
    for n in range(text.count_rects()):
        left, bottom, right, top = text.get_rect(n)
        yield Box(left, bottom, right, top, text.get_text_bounded(left, bottom, right, top).replace("\x02", "-"))


def read_fields(document, page) -> Iterator[Box]:
    """The values of filled form fields, at their places."""
    import pypdfium2.raw as pdfium

    if document.formenv is None:
        return
    for n in range(pdfium.FPDFPage_GetAnnotCount(page)):
        annotation = pdfium.FPDFPage_GetAnnot(page, n)
        rectangle = pdfium.FS_RECTF()
        is_field = pdfium.FPDFAnnot_GetSubtype(annotation) == pdfium.FPDF_ANNOT_WIDGET
        if is_field and pdfium.FPDFAnnot_GetRect(annotation, rectangle):
            value = field_value(document.formenv, annotation)
            if value:
                yield Box(rectangle.left, rectangle.bottom, rectangle.right, rectangle.top, value)
        pdfium.FPDFPage_CloseAnnot(annotation)


def field_value(form, annotation) -> str:
    """What is filled in; Yes for a ticked box."""
    import pypdfium2.raw as pdfium

    kind = pdfium.FPDFAnnot_GetFormFieldType(form, annotation)
    if kind in (pdfium.FPDF_FORMFIELD_CHECKBOX, pdfium.FPDF_FORMFIELD_RADIOBUTTON):
        return "Yes" if pdfium.FPDFAnnot_IsChecked(form, annotation) else ""
    if kind in (pdfium.FPDF_FORMFIELD_PUSHBUTTON, pdfium.FPDF_FORMFIELD_SIGNATURE):
        return ""
    size = pdfium.FPDFAnnot_GetFormFieldValue(form, annotation, None, 0)
    buffer = (ctypes.c_ushort * (size // 2 + 1))()
    pdfium.FPDFAnnot_GetFormFieldValue(form, annotation, buffer, size)
    return " ".join(bytes(buffer).decode("utf-16-le").rstrip("\0").split())


def read_lines(page) -> Iterator[Box]:
    """The straight lines and edges that are drawn on the page."""
    import pypdfium2.raw as pdfium

    x, y = ctypes.c_float(), ctypes.c_float()
    for drawn in page.get_objects(filter=[pdfium.FPDF_PAGEOBJ_PATH], max_depth=2):
        matrix = drawn.get_matrix()
        here = start = (0.0, 0.0)
        for n in range(min(pdfium.FPDFPath_CountSegments(drawn), 500)):
            part = pdfium.FPDFPath_GetPathSegment(drawn, n)
            pdfium.FPDFPathSegment_GetPoint(part, x, y)
            before, here = here, matrix.on_point(x.value, y.value)
            if pdfium.FPDFPathSegment_GetType(part) == pdfium.FPDF_SEGMENT_MOVETO:
                start = here
            else:
                yield span(before, here)
            if pdfium.FPDFPathSegment_GetClose(part):
                yield span(here, start)


def span(one: tuple[float, float], other: tuple[float, float]) -> Box:
    (left, right), (bottom, top) = (sorted(pair) for pair in zip(one, other, strict=True))
    return Box(left, bottom, right, top)


# ------------------------------------------------------------------------------- between pages


def drop_repeated(pages: list[list[Paragraph]]) -> list[list[Paragraph]]:
    """The pages without headers and footers that most of them have; the first of each stays, page numbers do not."""
    counts = Counter(key for page in pages for key in {margin_key(part) for part in margins(page)})
    often = {key for key, count in counts.items() if count >= max(3, REPEATED * len(pages))}
    kept, seen = [], set()
    for page in pages:
        edges = margins(page)
        dropped = set()
        for part in edges:
            key = margin_key(part)
            if key in often and (key in seen or PAGE_NUMBER.fullmatch(key)):
                dropped.add(id(part))
            seen.add(key)
        kept.append([part for part in page if id(part) not in dropped])
    return kept


def margins(page: list[Paragraph]) -> list[Paragraph]:
    """The paragraphs at the top and at the bottom that are one line."""
    return [part for part in [*page[:MARGIN], *page[MARGIN:][-MARGIN:]] if part.lines == 1 and not part.rows]


def margin_key(part: Paragraph) -> str:
    return re.sub(r"\d", "#", part.text.casefold())


def join_pages(pages: list[list[Paragraph]]) -> Iterator[Section]:
    """A section per page, but one for pages that a sentence goes on in."""
    held: list[Block] = []
    last: Paragraph | None = None
    for number, page in enumerate(pages, 1):
        for n, part in enumerate(page):
            runs_on = n == 0 and last is not None and goes_on(last, part)
            if n == 0 and held and not runs_on:
                yield join_blocks(held, "page")
                held = []
            join = RUNNING if runs_on else PARAGRAPH
            if runs_on and is_broken(last.text, part.text):
                held[-1], join = replace(held[-1], text=held[-1].text[:-1]), ""
            held += part.blocks(number, join)
            last = part
    if held:
        yield join_blocks(held, "page")


def goes_on(last: Paragraph, first: Paragraph) -> bool:
    """Whether a page begins within the sentence that the one before ends with."""
    if last.rows or first.rows or SENTENCE_ENDS.search(last.text):
        return False
    return first.text[:1].islower() or (last.lines > 1 and first.lines > 1)


# ------------------------------------------------------------------------------- OCR


@cache
def tesseract_languages() -> tuple[str, ...]:
    """The languages that an installed Tesseract reads; none without one."""
    program = shutil.which("tesseract")
    if program is None:
        return ()
    listed = subprocess.run([program, "--list-langs"], capture_output=True, text=True, check=False).stdout
    return tuple(line for line in listed.splitlines()[1:] if line and line != "osd")


def recognise(document, blank: list[int], languages: str) -> list[list[Paragraph]]:
    """The paragraphs of pages that are pictures, several pages at a time."""

    def read(picture: bytes) -> list[Paragraph]:
        command = ["tesseract", "stdin", "stdout", "-l", languages, "--dpi", str(DPI)]
        alone = settings.environment(OMP_THREAD_LIMIT="1")  # with more threads a page is hardly faster
        done = subprocess.run(command, input=picture, capture_output=True, env=alone, check=True)
        parts = re.split(r"\n\s*\n", done.stdout.decode("utf-8", "replace").replace("\f", ""))
        return [Paragraph(" ".join(part.split())) for part in parts if part.strip()]

    with ThreadPoolExecutor(os.cpu_count()) as workers:
        # Pages are drawn by this thread: PDFium is not safe for several.
        return list(workers.map(read, [draw_page(document, number - 1) for number in blank]))


def draw_page(document, number: int) -> bytes:
    """The page as a grey PNG."""
    with closing(document[number]) as page:
        picture = page.render(scale=DPI / 72, grayscale=True).to_pil()
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
