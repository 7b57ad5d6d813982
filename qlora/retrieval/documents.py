"""Documents: the files of a folder, known by their content, and loaded as passages."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from langchain_core.documents import Document

from qlora.console import Problems, fail
from qlora.reading.kinds import SUFFIXES
from qlora.reading.reader import explaining_file, read_file
from qlora.reading.section import Note, Section
from qlora.retrieval.passages import Splitting, split_sections
from qlora.words import unify

MOST_BYTES = 1_000_000_000
VERSION_CONTROL = {"CVS", "_darcs"}  # the names of others begin with a dot
NAMED = 3  # other sources of a text that are named to people
UNITS = ("page", "slide", "chapter", "paragraph", "line", "row", "part")
VERSION = 5  # of the splitting: raised when it changes, so that all documents are ingested again


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


def find_files(
    paths: list[str], unreadable: Problems | None = None, passed_over: Counter | None = None
) -> list[SourceFile]:
    """Every file under the paths, once; its source is the path below the outermost folder that was named.

    Hidden files, links and files of other types in folders are left out. Folders that cannot be read are added to
    `unreadable`, files of other types to `passed_over`, by suffix.

    Raises one UserError for all paths that do not exist, files of an unknown type, different files of one name and
    folders without documents.
    """
    problems, unreadable = Problems(), Problems() if unreadable is None else unreadable
    passed_over = Counter() if passed_over is None else passed_over
    found: dict[str, SourceFile] = {}
    seen: set[str] = set()
    for path in sorted(map(Path, paths), key=lambda path: (not path.is_dir(), os.path.realpath(path).count(os.sep))):
        with problems.collecting():
            for file in files_below(path, unreadable, passed_over):
                if (real := os.path.realpath(file.path)) in seen:
                    continue
                seen.add(real)
                if other := found.get(file.source):
                    both = f"{other.path} and {file.path}"
                    problems.add(f"two files with one name, {file.source}", both, "ingest the folder above them")
                found[file.source] = file
    problems.raise_if_any()
    return list(found.values())


def files_below(path: Path, unreadable: Problems, passed_over: Counter) -> list[SourceFile]:
    """The documents of a folder, or the one file."""
    if path.is_dir():
        there = sorted(walk_folder(path, unreadable))
        files = [file for file in there if file.suffix.lower() in SUFFIXES]
        others = (file.suffix.lower() for file in there if file.suffix.lower() not in SUFFIXES)
        passed_over.update(suffix or "no suffix" for suffix in others)
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
    """The files in it: not hidden, not of a version control system, not links."""

    def report(error: OSError) -> None:
        unreadable.add(f"unreadable folder ({error.strerror.lower()})", error.filename, "give yourself the right")

    for place, folders, names in os.walk(folder, onerror=report):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in VERSION_CONTROL]
        for file in (Path(place, name) for name in names if not name.startswith(".")):
            if file.is_file() and not file.is_symlink():
                yield file


def check_name(file: SourceFile) -> None:
    """Raises UserError for a name that is not UTF-8: a database takes no other."""
    try:
        f"{file.source}{file.folder}".encode()
    except UnicodeEncodeError as error:
        fix = "rename it, such as with convmv -f latin1 -t utf8"
        raise fail("the file's name is not UTF-8", os.fsencode(file.path).decode(errors="replace"), fix) from error


def fingerprint_file(file: Path, splitting: Splitting) -> str:
    """sha256 of the content and of how it is read, split and embedded: equal means that nothing changed.

    Raises UserError for a file that is too large or cannot be read.
    """
    with explaining_file(file):
        if (size := file.stat().st_size) > MOST_BYTES:
            raise fail(f"{size / 1e6:,.0f} MB is too large (limit {MOST_BYTES / 1e6:,.0f})", str(file), "split it")
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256")
    if file.suffix.lower() != ".pdf":
        splitting = replace(splitting, ocr="")
    digest.update(repr((VERSION, splitting)).encode())
    return digest.hexdigest()


# ------------------------------------------------------------------------------- load


def load_passages(
    file: Path, source: str, tokenizer, splitting: Splitting, notes: list[Note] | None = None
) -> Iterator[Document]:
    """The passages of a file, as `split_sections` makes them; what was left out is added to the notes.

    Raises UserError when it cannot be read or holds no text.
    """
    notes = [] if notes is None else notes
    empty = True
    with explaining_file(file):
        parts = read_file(file, splitting.ocr)
        for passage in split_sections(keep_sections(parts, notes), source, tokenizer, splitting):
            empty = False
            yield passage
    if empty:
        fix = notes[-1].fix if notes else "leave it out"
        raise fail("the document holds no text", str(file), fix)


def keep_sections(parts: Iterator[Section | Note], notes: list[Note]) -> Iterator[Section]:
    for part in parts:
        if isinstance(part, Note):
            notes.append(part)
        else:
            yield part


def place(metadata: dict) -> str:
    """The place of a passage, for people: `ferry/crew.md, line 9, Crew > Watches (and in a.md, b.md)`."""
    parts = [metadata["source"]]
    parts += [f"{unit} {metadata[unit]}" for unit in UNITS if unit in metadata]
    if "last_page" in metadata:
        parts[-1] = f"pages {metadata['page']}-{metadata['last_page']}"
    also = metadata.get("also_in", [])
    more = f" and {len(also) - NAMED} more" if len(also) > NAMED else ""
    others = f" (and in {', '.join(also[:NAMED])}{more})" if also else ""
    return ", ".join(parts + [metadata[key] for key in ("heading",) if key in metadata]) + others


def embedded_text(passage: Document) -> str:
    """The text to embed: the passage after its heading path, which often names the subject, in one form of letters."""
    heading = passage.metadata.get("heading")
    return unify(f"{heading}\n{passage.page_content}" if heading else passage.page_content)
