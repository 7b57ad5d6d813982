"""What is read, by suffix, and what is refused before a parser sees it."""

import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from qlora.console import fail
from qlora.reading import packages, pdf, slides, table, text, web, word
from qlora.reading.section import Note, Section

READERS: dict[str, Callable[[Path], Iterator[Section | Note]]] = {
    ".txt": text.read_plain,
    ".md": text.read_markdown,
    ".markdown": text.read_markdown,
    ".rst": text.read_rst,
    ".html": web.read_html,
    ".htm": web.read_html,
    ".pdf": pdf.read_pdf,
    ".docx": word.read_docx,
    ".pptx": slides.read_pptx,
    ".xlsx": table.read_sheets,
    ".ods": table.read_sheets,
    ".csv": table.read_csv,
    ".tsv": table.read_csv,
    ".json": table.read_json,
    ".jsonl": table.read_json_lines,
    ".eml": packages.read_email,
    ".epub": packages.read_epub,
}
SUFFIXES = tuple(READERS)
ZIPPED = {".docx", ".pptx", ".xlsx", ".ods", ".epub"}
OLD_OFFICE = b"\xd0\xcf\x11\xe0"  # also what holds an encrypted file
MOST_UNPACKED = 1_000_000_000  # bytes


def read_sections(file: Path, ocr: str = "") -> Iterator[Section | Note]:
    """The sections of a file by its kind. Raises UserError, or whatever the kind's parser raises."""
    suffix = file.suffix.lower()
    if suffix in ZIPPED:
        check_zip(file)
    return pdf.read_pdf(file, ocr) if suffix == ".pdf" else READERS[suffix](file)


def check_zip(file: Path) -> None:
    """Raises UserError for an encrypted file, and for one that unpacks to more than 1 GB."""
    with file.open("rb") as content:
        if content.read(4) == OLD_OFFICE:
            what = "encrypted, or saved in an old format under a new name"
            raise fail(what, str(file), f"save it as {file.suffix.lower()} without a password")
    with zipfile.ZipFile(file) as packed:
        size = sum(member.file_size for member in packed.infolist())
    if size > MOST_UNPACKED:
        raise fail(f"unpacks to {size / 1e9:,.1f} GB (limit {MOST_UNPACKED / 1e9:.0f})", str(file), "split it")


def choose_ocr(asked: str) -> str:
    """The languages for Tesseract: none for `off`, and for `auto` English or what is installed.

    Raises UserError for a language that is not installed.
    """
    if asked == "off":
        return ""
    installed = pdf.tesseract_languages()
    if asked == "auto":
        return "eng" if "eng" in installed else "+".join(installed[:1])
    if not installed:
        raise fail("Tesseract is not installed", "--ocr", "install tesseract-ocr, or leave --ocr out")
    if missing := [language for language in asked.split("+") if language not in installed]:
        fix = f"install tesseract-ocr-{missing[0]}, or give {', '.join(installed)}"
        raise fail(f"Tesseract has no language {missing[0]}", "--ocr", fix)
    return asked
