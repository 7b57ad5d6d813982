"""The encoding of a text file: its byte order mark, UTF-8, or what it looks like."""

import codecs
from pathlib import Path
from typing import TextIO

SAMPLE = 200_000  # bytes that are looked at
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def open_text(file: Path, newline: str | None = None) -> TextIO:
    """The file opened in its encoding; what does not fit that becomes U+FFFD."""
    return file.open(encoding=find_encoding(file), errors="replace", newline=newline)


def find_encoding(file: Path) -> str:
    """The name of the file's encoding, for Python. A file is read once, in parts, to see whether it is UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with file.open("rb") as content:
        first = content.read(SAMPLE)
        if marked := find_mark(first):
            return marked
        part = first
        try:
            while part:
                if "\0" in decoder.decode(part):
                    found = guess(first)  # UTF-16 without its mark, or a stray byte
                    return found if found.lower().startswith(("utf-16", "utf-32")) else "utf-8"
                part = content.read(SAMPLE)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return guess(first if part is first else first + part)
    return "utf-8"


def find_mark(content: bytes) -> str | None:
    """The encoding that a byte order mark names."""
    return next((name for mark, name in MARKS if content.startswith(mark)), None)


def guess(content: bytes) -> str:
    """What the bytes look like; Windows-1252 where that is unclear."""
    import chardet

    # The other eras, such as DOS, make Hebrew of a short English text with a euro sign.
    eras = chardet.EncodingEra.MODERN_WEB | chardet.EncodingEra.LEGACY_ISO
    return chardet.detect(content, encoding_era=eras, prefer_superset=True)["encoding"] or "cp1252"
