"""Documents: files -> pages of text -> passages that fit the embedding model.

A passage keeps its source, the path of headings above it, and its place: a line (text, Markdown,
HTML), a page (PDF) or a row (CSV, JSON), and its span of characters in that text.
"""

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from langchain_core.documents import Document

from qlora.console import Problems, UserError, fail

MOST_BYTES, MOST_PAGES = 100_000_000, 5_000
VERSION_CONTROL = {"CVS", "_darcs"}  # the names of others begin with a dot
SUFFIXES = (".txt", ".md", ".html", ".htm", ".pdf", ".docx", ".csv", ".json", ".jsonl")
VERSION = 2  # of the splitting: raised when it changes, so that all documents are ingested again
HEADING = re.compile(r"^(#{1,6})\s+(.+?)\s*#*$")


@dataclass(frozen=True)
class SourceFile:
    """A file to ingest; `folder` is the one that was named, None for a file named by itself."""

    path: Path
    source: str
    folder: str | None


def find_files(paths: list[str]) -> list[SourceFile]:
    """Every file under the paths; its source is the path below the folder that was named.

    Hidden files, links and files of other types in folders are left out. Raises one UserError for all paths
    that do not exist, files of an unknown type and folders without documents.
    """
    problems = Problems()
    found: dict[str, SourceFile] = {}
    for name in paths:
        with problems.collecting():
            inside = files_below(Path(name))
            for source in sorted(inside.keys() & found.keys()):
                both = f"{found[source].path} and {inside[source].path}"
                problems.add(f"two files with one name, {source}", both, "ingest the folder above them")
            found |= inside
    problems.raise_if_any()
    return list(found.values())


def files_below(path: Path) -> dict[str, SourceFile]:
    """Source -> file for a folder, or for one file."""
    if path.is_dir():
        root = str(path.resolve())
        files = [file for file in sorted(path.rglob("*")) if is_document(file, path)]
        if not files:
            raise fail("no documents in the folder", str(path), f"give files of type {', '.join(SUFFIXES)}")
        sources = [file.relative_to(path).as_posix() for file in files]
        return {source: SourceFile(file, source, root) for file, source in zip(files, sources, strict=True)}
    if not path.is_file():
        raise fail("file not found", str(path), "check the path")
    if path.suffix.lower() not in SUFFIXES:
        fix = f"convert it to one of {', '.join(SUFFIXES)}"
        raise fail(f"unknown file type {path.suffix or '(none)'}", str(path), fix)
    return {path.name: SourceFile(path, path.name, None)}


def is_document(file: Path, root: Path) -> bool:
    """Whether a folder's file is ingested: not hidden, not of a version control system, not a link out of it."""
    skipped = any(part.startswith(".") or part in VERSION_CONTROL for part in file.relative_to(root).parts)
    if skipped or file.suffix.lower() not in SUFFIXES or not file.is_file():
        return False
    return not file.is_symlink() and file.resolve().is_relative_to(root.resolve())


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


@contextlib.contextmanager
def explaining_file(file: Path) -> Iterator[None]:
    """Turns any error of a file's parser into a UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = (str(error).splitlines() or [""])[0][:120]
        message = f"unreadable {file.suffix} file ({type(error).__name__}: {cause})"
        raise fail(message, str(file), "open and save it again, or leave it out") from error


# ------------------------------------------------------------------------------- load


def load_passages(file: Path, source: str, tokenizer, window: int, size: int, overlap: int) -> list[Document]:
    """The passages of a file, as `split_pages` makes them.

    Raises UserError when it cannot be read or holds no text.
    """
    with explaining_file(file):
        pages = list(read_pages(file))
        for page in pages:
            page.page_content = clean(page.page_content)
            page.metadata["source"] = source
        passages = split_pages(pages, tokenizer, window, size, overlap)
    if not passages:
        fix = "scanned? run OCR on it first" if file.suffix.lower() == ".pdf" else "leave it out"
        raise fail("the document holds no text", str(file), fix)
    return passages


def clean(text: str) -> str:
    """The text without NUL bytes and lone surrogates, which PostgreSQL or a tokenizer cannot hold."""
    return text.encode("utf-8", "replace").decode().replace("\0", "").replace("\r\n", "\n")


def read_pages(file: Path) -> Iterator[Document]:
    """Pages with `page` (PDF) or `row` (CSV, JSON) in their metadata, through LangChain's loaders."""
    from langchain_community import document_loaders as loaders

    suffix = file.suffix.lower()
    if suffix == ".pdf":
        pages = loaders.PyPDFLoader(str(file)).load()
        if len(pages) > MOST_PAGES:
            raise fail(f"{len(pages)} pages are too many (limit {MOST_PAGES})", str(file), "split it")
        for page in pages:
            yield Document(page.page_content, metadata={"page": page.metadata["page"] + 1})
    elif suffix == ".docx":
        yield from strip_metadata(loaders.Docx2txtLoader(str(file)).load())
    elif suffix in (".html", ".htm"):
        yield from strip_metadata(
            loaders.BSHTMLLoader(str(file), get_text_separator=" ", bs_kwargs={"features": "html.parser"}).load()
        )
    elif suffix == ".csv":
        for row in loaders.CSVLoader(str(file), encoding="utf-8-sig", autodetect_encoding=True).load():
            yield Document(row.page_content, metadata={"row": row.metadata["row"] + 1})
    elif suffix in (".json", ".jsonl"):
        yield from read_json(file)
    else:
        yield from strip_metadata(loaders.TextLoader(str(file), encoding="utf-8", autodetect_encoding=True).load())


def strip_metadata(pages: list[Document]) -> list[Document]:
    """The pages without the loader's own metadata, which holds absolute paths."""
    return [Document(page.page_content) for page in pages]


def read_json(file: Path) -> Iterator[Document]:
    """One page for every line of a .jsonl file or item of a .json list, written as `key: value` lines."""
    content = file.read_bytes()
    text = content.decode(json.detect_encoding(content))  # UTF-8, 16 or 32, with or without a byte order mark
    if file.suffix.lower() == ".jsonl":
        items = []
        for number, line in enumerate(text.split("\n"), 1):
            try:
                items += [json.loads(line)] if line.strip() else []
            except ValueError as error:
                raise fail(f"not JSON ({error})", f"{file}:{number}", "fix or remove the line") from error
    else:
        whole = json.loads(text)
        items = whole if isinstance(whole, list) else [whole]
    for row, item in enumerate(items, 1):
        lines = [f"{key}: {value}" for key, value in item.items()] if isinstance(item, dict) else [str(item)]
        yield Document("\n".join(lines), metadata={"row": row})


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
        for heading, text, line, offset in split_sections(page):
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
    """(heading path, text, first line, first character) of every section under a Markdown heading.

    A line in fenced code is never a heading.
    """
    path: list[tuple[int, str]] = []
    lines: list[str] = []
    first, offset, end, fenced = 1, 0, 0, False
    for number, line in enumerate(page.page_content.split("\n"), 1):
        end += len(line) + 1
        fenced ^= line.lstrip().startswith("```")
        heading = None if fenced else HEADING.match(line)
        if not heading:
            lines.append(line)
            continue
        if any(map(str.strip, lines)):
            yield " > ".join(title for _, title in path), "\n".join(lines), first, offset
        level = len(heading[1])
        path = [*(entry for entry in path if entry[0] < level), (level, heading[2])]
        lines, first, offset = [], number + 1, end
    if any(map(str.strip, lines)):
        yield " > ".join(title for _, title in path), "\n".join(lines), first, offset


def place(metadata: dict) -> str:
    """The place of a passage, for people: `ferry/crew.md, line 9, Crew > Watches`."""
    parts = [metadata["source"]]
    parts += [f"{key} {metadata[key]}" for key in ("page", "line", "row") if key in metadata]
    return ", ".join(parts + [metadata[key] for key in ("heading",) if key in metadata])


def embedded_text(passage: Document) -> str:
    """The text to embed: the passage after its heading path, which often names the subject."""
    heading = passage.metadata.get("heading")
    return f"{heading}\n{passage.page_content}" if heading else passage.page_content
