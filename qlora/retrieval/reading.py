"""Files of every type -> pages of text, through LangChain's loaders.

Parsers are for well-meant files. So another process reads, with bounds of time and memory for each file, and one that
a file has killed is started again.
"""

import atexit
import contextlib
import functools
import json
import os
import resource
import sys
from collections.abc import Iterator
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from types import ModuleType

from langchain_core.documents import Document

from qlora.console import UserError, fail

MOST_PAGES = 5_000
SECONDS, SECONDS_PER_MB = 120, 20  # that reading a file may take; a PDF of 5,000 pages of text takes 100
MEMORY = 4_000_000_000  # bytes that the reading process may have


def read_file(file: Path) -> list[Document]:
    """The pages of a file, as `read_pages` makes them.

    Raises UserError for a file that takes too long or too much memory, and whatever a parser raises.
    """
    from pebble import ProcessExpired

    seconds = SECONDS + SECONDS_PER_MB * file.stat().st_size / 1e6
    reading = reader().schedule(read_all, args=[file, os.getcwd()], timeout=seconds)
    try:
        return reading.result()
    except TimeoutError as error:
        raise fail(f"reading it takes longer than {seconds:.0f} s", str(file), "split it, or leave it out") from error
    except (MemoryError, ProcessExpired) as error:
        raise fail(
            f"reading it takes more than {MEMORY / 1e9:.0f} GB", str(file), "split it, or leave it out"
        ) from error
    finally:
        reading.cancel()  # after Ctrl-C


class ReaderProcess(SpawnProcess):
    """A new process, not a fork, since torch's threads may hold locks. It does not import the caller's script again.

    spawn would run a script that has no `if __name__ == "__main__"` a second time.
    """

    @staticmethod
    def _Popen(process):
        main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
        try:
            return SpawnProcess._Popen(process)
        finally:
            sys.modules["__main__"] = main


class ReaderContext(SpawnContext):
    Process = ReaderProcess


@functools.cache
def reader():
    """A pool of one process, started by its first task and stopped with this process."""
    from pebble import ProcessPool

    bounds = resource.RLIMIT_AS, (MEMORY, MEMORY)
    pool = ProcessPool(max_workers=1, context=ReaderContext(), initializer=resource.setrlimit, initargs=bounds)
    atexit.register(pool.stop)
    return pool


def read_all(file: Path, folder: str) -> list[Document]:
    """The pages of a file, whose path may be relative to this folder."""
    os.chdir(folder)
    return list(read_pages(file))


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
