"""Documents: files -> pages of text -> passages that fit the embedding model.

A passage keeps its source, the path of headings above it, and its place: a line (text, Markdown,
HTML), a page (PDF) or a row (CSV, JSON), and its span of characters in that text.
"""

import functools
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

from langchain_core.documents import Document

from qlora.console import Problems, fail
from qlora.retrieval.reading import explaining_file, read_file
from qlora.words import clean, unify

MOST_BYTES = 100_000_000
VERSION_CONTROL = {"CVS", "_darcs"}  # the names of others begin with a dot
SUFFIXES = (".txt", ".md", ".html", ".htm", ".pdf", ".docx", ".csv", ".json", ".jsonl")
AT_ONCE = 500_000  # characters that the splitter gets; it keeps a list of all lines
NAMED = 3  # other sources of a text that are named to people
VERSION = 3  # of the splitting: raised when it changes, so that all documents are ingested again


@dataclass(frozen=True)
class SourceFile:
    """A file to ingest; `folder` is the one that was named, None for a file named by itself."""

    path: Path
    source: str
    folder: str | None

    @property
    def root(self) -> str:
        """The folder that the source is a path below."""
        return self.folder or os.path.realpath(self.path.parent)


def find_files(paths: list[str], unreadable: Problems | None = None) -> list[SourceFile]:
    """Every file under the paths, once; its source is the path below the outermost folder that was named.

    Hidden files, links and files of other types in folders are left out; folders that cannot be read are added to
    `unreadable`. Raises one UserError for all paths that do not exist, files of an unknown type, different files of
    one name and folders without documents.
    """
    problems, unreadable = Problems(), Problems() if unreadable is None else unreadable
    found: dict[str, SourceFile] = {}
    seen: set[str] = set()
    for path in sorted(map(Path, paths), key=lambda path: (not path.is_dir(), os.path.realpath(path).count(os.sep))):
        with problems.collecting():
            for file in files_below(path, unreadable):
                if (real := os.path.realpath(file.path)) in seen:
                    continue
                seen.add(real)
                if other := found.get(file.source):
                    both = f"{other.path} and {file.path}"
                    problems.add(f"two files with one name, {file.source}", both, "ingest the folder above them")
                found[file.source] = file
    problems.raise_if_any()
    return list(found.values())


def files_below(path: Path, unreadable: Problems) -> list[SourceFile]:
    """The documents of a folder, or the one file."""
    if path.is_dir():
        files = sorted(walk_folder(path, unreadable))
        if not files and not unreadable.found:
            raise fail("no documents in the folder", str(path), f"give files of type {', '.join(SUFFIXES)}")
        return [SourceFile(file, file.relative_to(path).as_posix(), os.path.realpath(path)) for file in files]
    if not path.is_file():
        raise fail("not a file" if path.exists() else "file not found", str(path), "check the path")
    if path.suffix.lower() not in SUFFIXES:
        fix = f"convert it to one of {', '.join(SUFFIXES)}"
        raise fail(f"unknown file type {path.suffix or '(none)'}", str(path), fix)
    return [SourceFile(path, path.name, None)]


def walk_folder(folder: Path, unreadable: Problems) -> Iterator[Path]:
    """The documents in it: not hidden, not of a version control system, not links."""

    def report(error: OSError) -> None:
        unreadable.add(f"unreadable folder ({error.strerror.lower()})", error.filename, "give yourself the right")

    for place, folders, names in os.walk(folder, onerror=report):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in VERSION_CONTROL]
        for file in (Path(place, name) for name in names if not name.startswith(".")):
            if file.suffix.lower() in SUFFIXES and file.is_file() and not file.is_symlink():
                yield file


def check_name(file: SourceFile) -> None:
    """Raises UserError for a name that is not UTF-8: a database takes no other."""
    try:
        f"{file.source}{file.folder}".encode()
    except UnicodeEncodeError as error:
        fix = "rename it, such as with convmv -f latin1 -t utf8"
        raise fail("the file's name is not UTF-8", os.fsencode(file.path).decode(errors="replace"), fix) from error


def fingerprint_file(file: Path, splitting: object) -> str:
    """sha256 of the content and of how it is split and embedded: equal means that nothing changed.

    Raises UserError for a file that is too large or cannot be read.
    """
    with explaining_file(file):
        if (size := file.stat().st_size) > MOST_BYTES:
            raise fail(f"{size / 1e6:,.0f} MB is too large (limit {MOST_BYTES / 1e6:,.0f})", str(file), "split it")
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256")
    digest.update(repr((VERSION, splitting)).encode())
    return digest.hexdigest()


# ------------------------------------------------------------------------------- load


def load_passages(file: Path, source: str, tokenizer, window: int, size: int, overlap: int) -> list[Document]:
    """The passages of a file, as `split_pages` makes them.

    Raises UserError when it cannot be read or holds no text.
    """
    with explaining_file(file):
        pages = read_file(file)
        for page in pages:
            page.page_content = clean(page.page_content).replace("\r\n", "\n").replace("\r", "\n")
            page.metadata["source"] = source
        passages = split_pages(pages, tokenizer, window, size, overlap)
    if not passages:
        fix = "scanned? run OCR on it first" if file.suffix.lower() == ".pdf" else "leave it out"
        raise fail("the document holds no text", str(file), fix)
    return passages


# ------------------------------------------------------------------------------- split


def split_pages(pages: list[Document], tokenizer, window: int, size: int, overlap: int) -> list[Document]:
    """Passages of at most `size` tokens of the embedding model's tokenizer, neighbours sharing `overlap`.

    Sections are never mixed: a passage belongs to one heading path. With its heading path a passage never
    exceeds `window`, where the model cuts (256 word pieces for all-MiniLM-L6-v2).
    """
    from langchain_text_splitters import RecursiveCharacterTextSplitter

    @functools.cache  # the splitter asks two or three times for every piece
    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    passages = []
    for page in pages:
        for heading, text, line, offset in (part for section in split_sections(page) for part in cut_section(*section)):
            while count(heading) > window // 2:  # a line that looks like a heading but is not
                heading = heading[: len(heading) // 2]
            room = min(size, window - 2 - count(heading + "\n"))
            splitter = RecursiveCharacterTextSplitter(
                separators=["\n\n", "\n", ". ", " ", ""],
                chunk_size=room,
                chunk_overlap=min(overlap, room // 2),
                length_function=count,
            )
            start = -1
            for piece in splitter.split_text(text):
                # The splitter's own add_start_index counts the overlap in characters: wrong for tokens.
                start = text.find(piece, start + 1)
                metadata = {**page.metadata, **({"heading": heading} if heading else {})}
                metadata["span"] = [offset + start, offset + start + len(piece)]
                if not {"page", "row"} & metadata.keys():
                    metadata["line"] = line + text.count("\n", 0, start)
                passages.append(Document(piece, metadata=metadata))
    return passages


def split_sections(page: Document) -> Iterator[tuple[str, str, int, int]]:
    """(heading path, text, first line, first character) of every section under a Markdown heading."""
    lines = page.page_content.split("\n")
    starts = list(accumulate((len(line) + 1 for line in lines), initial=0))
    path: list[tuple[int, str]] = []
    first = 0
    for begin, end, level, title in [*find_headings(page.page_content), (len(lines), len(lines), 1, "")]:
        if any(map(str.strip, lines[first:begin])):
            yield " > ".join(title for _, title in path), "\n".join(lines[first:begin]), first + 1, starts[first]
        path = [*(entry for entry in path if entry[0] < level), (level, title)]
        first = end


def cut_section(heading: str, text: str, line: int, offset: int) -> Iterator[tuple[str, str, int, int]]:
    """The section in parts of at most AT_ONCE characters, each of whole lines where it has any."""
    while len(text) > AT_ONCE:
        end = text.rfind("\n", 0, AT_ONCE) + 1 or AT_ONCE
        yield heading, text[:end], line, offset
        line, offset, text = line + text.count("\n", 0, end), offset + end, text[end:]
    yield heading, text, line, offset


def find_headings(text: str) -> Iterator[tuple[int, int, int, str]]:
    """(first line, line after it, level, title) of every Markdown heading, by CommonMark's rules for blocks.

    What looks like one in code, HTML, lists or quotations is none, and neither is the end of the front matter.
    """
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark")
    parser.core.ruler.enableOnly(["normalize", "block"])  # titles stay as they are written
    front = text.find("\n---\n", 3) if text.startswith("---\n") else -1
    body = text.count("\n", 0, front + 1) + 1 if front >= 0 else 0
    for heading, title in pairwise(parser.parse(text)):
        if heading.type == "heading_open" and heading.level == 0 and heading.map[0] >= body and title.content:
            yield *heading.map, int(heading.tag[1]), " ".join(title.content.split())


def place(metadata: dict) -> str:
    """The place of a passage, for people: `ferry/crew.md, line 9, Crew > Watches (and in a.md, b.md)`."""
    parts = [metadata["source"]]
    parts += [f"{key} {metadata[key]}" for key in ("page", "line", "row") if key in metadata]
    also = metadata.get("also_in", [])
    more = f" and {len(also) - NAMED} more" if len(also) > NAMED else ""
    others = f" (and in {', '.join(also[:NAMED])}{more})" if also else ""
    return ", ".join(parts + [metadata[key] for key in ("heading",) if key in metadata]) + others


def embedded_text(passage: Document) -> str:
    """The text to embed: the passage after its heading path, which often names the subject, in one form of letters."""
    heading = passage.metadata.get("heading")
    return unify(f"{heading}\n{passage.page_content}" if heading else passage.page_content)
