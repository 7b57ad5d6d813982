"""Reads files in another process, with bounds of time and memory for each file.

Parsers are for well-meant files. A process that a file has killed is started again. The sections come back through a
temporary file, so that a document may be larger than the memory.
"""

import atexit
import contextlib
import functools
import json
import os
import resource
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from types import ModuleType

from qlora.console import UserError, fail
from qlora.reading.section import Note, Section

SECONDS, SECONDS_PER_MB = 120, 20  # that reading a file may take
OCR_SECONDS_PER_MB = 600  # a scanned page has some 100 kB, and takes 3 to 10 s
MEMORY = 4_000_000_000  # bytes that the reading process may have


def read_file(file: Path, ocr: str = "") -> Iterator[Section | Note]:
    """The sections of a file, as `kinds.read_sections` makes them.

    Raises UserError for a file that takes too long or too much memory, and whatever a parser raises; all before the
    first section.
    """
    from pebble import ProcessExpired

    per_mb = OCR_SECONDS_PER_MB if ocr and file.suffix.lower() == ".pdf" else SECONDS_PER_MB
    seconds = SECONDS + per_mb * file.stat().st_size / 1e6
    with tempfile.NamedTemporaryFile("r", prefix="qlora-", encoding="utf-8") as made:
        reading = reader().schedule(write_sections, args=[file, os.getcwd(), ocr, made.name], timeout=seconds)
        try:
            reading.result()
        except TimeoutError as error:
            what = f"reading it takes longer than {seconds:.0f} s"
            raise fail(what, str(file), "split it, or leave it out") from error
        except (MemoryError, ProcessExpired) as error:
            what = f"reading it takes more than {MEMORY / 1e9:.0f} GB"
            raise fail(what, str(file), "split it, or leave it out") from error
        finally:
            reading.cancel()  # after Ctrl-C
        for line in made:
            kind, *fields = json.loads(line)
            yield (Note if kind == "note" else Section)(*fields)


def write_sections(file: Path, folder: str, ocr: str, made: str) -> None:
    """Runs in the reading process: a line of JSON per section. Paths may be relative to this folder."""
    from qlora.reading.kinds import read_sections

    os.chdir(folder)
    with open(made, "w", encoding="utf-8") as lines:
        for part in read_sections(file, ocr):
            kind = "note" if isinstance(part, Note) else "section"
            lines.write(json.dumps([kind, *vars(part).values()]) + "\n")


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
