"""Files that hold pages: e-mails and e-books. Their pages are HTML, or plain text."""

import posixpath
import zipfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from qlora.reading.section import Block, Section, sections
from qlora.reading.web import html_blocks, parse_html

SHOWN = ("From", "To", "Cc", "Date")
CONTAINER = "META-INF/container.xml"


def read_email(file: Path) -> Iterator[Section]:
    """The text under its subject, after who wrote to whom; attachments are named."""
    return sections(email_blocks(file), "part")


def email_blocks(file: Path) -> Iterator[Block]:
    """Subject, header, text and the names of attachments. Raises ValueError for what is not a message."""
    import email
    from email import policy

    with file.open("rb") as content:
        message = email.message_from_binary_file(content, policy=policy.default)
    if not message.keys():
        raise ValueError("no header of a message")
    if subject := str(message["Subject"] or "").strip():
        yield Block(" ".join(subject.split()), level=1)
    yield Block("\n".join(f"{name}: {message[name]}" for name in SHOWN if message[name]))
    body = message.get_body(("plain", "html"))
    if body is not None and body.get_content_subtype() == "html":
        page = f"\ufeff{body.get_content()}"  # in the encoding that the mail names; the mark tells the parser
        yield from html_blocks(parse_html(page.encode("utf-8", "replace")), 1)
    elif body is not None:
        yield Block(body.get_content().replace("\r\n", "\n"))
    if names := [part.get_filename() for part in message.iter_attachments() if part.get_filename()]:
        yield Block(f"Attachments: {', '.join(names)}")


def read_epub(file: Path) -> Iterator[Section]:
    """The chapters in reading order."""
    return sections(epub_blocks(file), "chapter")


def epub_blocks(file: Path) -> Iterator[Block]:
    """The blocks of every chapter, with its number."""
    with zipfile.ZipFile(file) as book:
        (root,) = parse_xml(book.read(CONTAINER)).xpath("//*[local-name()='rootfile']/@full-path")[:1]
        package = parse_xml(book.read(root))
        items = {item.get("id"): item for item in package.xpath("//*[local-name()='manifest']/*")}
        spine = package.xpath("//*[local-name()='spine']/*/@idref")
        for number, key in enumerate(spine, 1):
            if key in items and "html" in items[key].get("media-type", ""):
                name = posixpath.normpath(posixpath.join(posixpath.dirname(root), unquote(items[key].get("href"))))
                yield from html_blocks(parse_html(book.read(name)), number)


def parse_xml(content: bytes):
    """The root element; entities stay unresolved, and nothing is fetched."""
    from lxml import etree

    return etree.fromstring(content, etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False))
