"""The documents over HTTP: list, upload, delete, search, and a passage with the sentence that supports an answer.

An upload is put in by `ingest`'s own code. A client's file name becomes the name of a document, never a path.
"""

import re
import threading
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, File, UploadFile
from fastapi.concurrency import run_in_threadpool

from qlora.reading.kinds import SUFFIXES
from qlora.retrieval.ingest import put_files
from qlora.retrieval.passage_store import PassageStore
from qlora.retrieval.passages import Splitting
from qlora.serving.chat_routes import Refused, as_refused
from qlora.serving.shapes import SearchRequest

LONGEST_NAME = 120
MOST_FILES = 100


@dataclass(frozen=True)
class Library:
    """The collection as uploads change it: a store of its own, so that asking goes on meanwhile."""

    store: PassageStore
    splitting: Splitting
    folder: Path  # of uploaded files
    find: Callable
    read_only: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)  # one upload at a time


def make_router(library: Library) -> APIRouter:
    """The routes of one collection's documents."""
    router = APIRouter()

    @router.get("/documents")
    def list_documents() -> dict:
        """What is in the collection."""
        entries = library.store.documents()
        names = ("source", "passages", "bytes")
        documents = [{**{name: getattr(one, name) for name in names}, "added": str(one.added)} for one in entries]
        return {"documents": documents, "read_only": library.read_only, "types": sorted(SUFFIXES)}

    @router.post("/documents", status_code=201)
    async def upload(files: Annotated[list[UploadFile], File()], replace: bool = False) -> dict:
        """Puts files into the collection; of each it says how many passages it has, or why it could not be read."""
        check_writable(library)
        if len(files) > MOST_FILES:
            raise Refused(400, f"more than {MOST_FILES} files at once")
        return {"files": [await run_in_threadpool(put_upload, library, file, replace) for file in files]}

    @router.delete("/documents/{source:path}")
    def delete(source: str) -> dict:
        """Removes a document, and the file where it was uploaded."""
        check_writable(library)
        if not library.store.forget([source]):
            raise Refused(404, "there is no such document", "not_found")
        (library.folder / clean_name(source)).unlink(missing_ok=True)
        return {"deleted": source}

    @router.get("/documents/{source:path}/passages/{key:path}")
    def passage(source: str, key: str, sentence: str = "") -> dict:
        """A passage, and where the sentence begins and ends in its text."""
        found = library.store.get_by_ids([key])
        if not found or found[0].metadata.get("source") != source:
            raise Refused(404, "there is no such passage", "not_found")
        text = found[0].page_content
        return {"id": key, "text": text, "metadata": found[0].metadata, "span": find_span(text, sentence)}

    @router.post("/search")
    def search(body: SearchRequest) -> dict:
        """The nearest passages, without a language model."""
        found = library.find(body.question, body.top_k)
        passages = [{"id": one.id, "text": one.page_content, **one.metadata} for one in found]
        return {"question": body.question, "passages": passages}

    return router


def check_writable(library: Library) -> None:
    if library.read_only:
        raise Refused(403, "this server does not take or delete documents (--read-only)", "read_only")


def clean_name(name: str) -> str:
    """The last part of a client's file name, of letters, digits and -_. alone. Raises Refused when nothing is left."""
    last = unicodedata.normalize("NFC", name.replace("\\", "/").rpartition("/")[2])
    plain = re.sub(r"[^\w.\- ]", "_", last).strip(". ")[-LONGEST_NAME:]
    if not plain:
        raise Refused(400, "the file has no name")
    return plain


def put_upload(library: Library, file: UploadFile, replace: bool) -> dict:
    """The document's name and passages. Raises Refused for a name that is taken, or of an unknown type."""
    name = clean_name(file.filename or "")
    if Path(name).suffix.lower() not in SUFFIXES:
        return {"name": name, "error": f"files of type {Path(name).suffix or '(none)'} are not read"}
    with library.lock:
        known = {entry.source: entry for entry in library.store.documents()}
        path = library.folder / name
        if name in known and not replace:
            return {"name": name, "error": "there is a document of this name; delete it first, or replace it"}
        library.folder.mkdir(parents=True, exist_ok=True)
        before = path.read_bytes() if path.exists() else None
        path.write_bytes(file.file.read())
        try:
            put_files(library.store, [str(path)], library.splitting)
        except Exception as error:  # the file is the client's: whatever is wrong with it is told in words
            path.write_bytes(before) if before is not None else path.unlink()
            return {"name": name, "error": as_refused(error).message}
    count = next((entry.passages for entry in library.store.documents() if entry.source == name), 0)
    return {"name": name, "passages": count}


def find_span(text: str, sentence: str) -> list[int] | None:
    """Begin and end of the sentence in the text, whatever the white space; None where it is not there."""
    words = sentence.split()
    found = re.search(r"\s+".join(map(re.escape, words)), text) if words else None
    return [found.start(), found.end()] if found else None
