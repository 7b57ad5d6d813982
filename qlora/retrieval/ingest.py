"""Brings a collection up to date with files: new ones are added, changed ones replaced, the rest left alone.

A document is written whole or not at all, so that a second run completes one that was killed.
"""

import filecmp
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice

from langchain_core.documents import Document

from qlora.console import Problems, fail, note, progress, say, shorten_text
from qlora.reading.section import Note
from qlora.retrieval import documents, languages
from qlora.retrieval.documents import SourceFile
from qlora.retrieval.passage_store import Entry, Prepared
from qlora.retrieval.passages import Splitting

MANY = 2_000  # passages of a document that is written part by part, since it may be larger than the memory
BATCH = 256  # passages embedded together: enough to put those of one length together
REMEMBERED = 20_000  # embedded texts, about 30 MB: a text of many documents is embedded once


@dataclass(frozen=True)
class Plan:
    """What a run will do; `known` are the sources that the collection already had, `moved` those of new folders."""

    put: list[tuple[SourceFile, Entry]]
    unchanged: int
    gone: list[str]
    known: frozenset[str]
    moved: dict[str, list[str]]


@dataclass(frozen=True)
class Loaded:
    """A document with its passages; of one with MANY or more the first of them, and the rest as it is read."""

    entry: Entry
    passages: list[Document]
    rest: Iterator[Document] | None


def choose_splitting(store, embedding_model: str, passage_tokens: int, overlap: int, ocr: str = "") -> Splitting:
    """How files become passages that fit the window of the store's embedder."""
    return Splitting(embedding_model, store.embeddings._client.max_seq_length, passage_tokens, overlap, ocr)


def put_files(
    store, paths: list[str], splitting: Splitting, prune: bool = False, dry_run: bool = False, language: str = "auto"
) -> None:
    """Syncs the collection with the files; with `prune` it removes documents whose files are gone from the folders.

    `language` is that of a collection that has no passages yet. Raises UserError with the files that could not be
    read, after all others are written.
    """
    check_language(store, language)
    embedder = store.embeddings._client  # the SentenceTransformer
    problems, passed_over = Problems(), Counter()
    plan = make_plan(store, documents.find_files(paths, problems, passed_over), splitting, prune, problems)
    if dry_run:
        print_plan(plan)
    else:
        store.forget(plan.gone)
        for folder, sources in plan.moved.items():
            store.move_documents(sources, folder)
        batches = read_batches(plan, embedder.tokenizer, splitting, problems)
        written = write_documents(store, plan, batches, language, problems)
        store.finish()
        new = sum(entry.source not in plan.known for entry, _ in written)
        note(
            f"{new} added, {len(written) - new} changed, {plan.unchanged} unchanged, {len(plan.gone)} removed, "
            f"{sum(count for _, count in written)} passages, {len(problems.found)} unreadable"
        )
    if passed_over:
        counted = ", ".join(f"{count} {suffix}" for suffix, count in sorted(passed_over.items()))
        note(f"Passed over, since their type is not read: {counted}")
    problems.raise_if_any()


def check_language(store, wanted: str) -> None:
    """Raises UserError when the collection's words are of another language."""
    known = store.language
    if wanted in (languages.AUTO, known) or not known or not store.count():
        return
    what = f"the collection's words are {languages.NAMES[known]}, not {languages.NAMES[wanted]}"
    raise fail(what, "--language", "leave it out, or ingest into another --collection")


def make_plan(store, files: list[SourceFile], splitting: Splitting, prune: bool, problems: Problems) -> Plan:
    """What to write and what to remove; files that cannot be read are added to the problems.

    `problems` has the folders that could not be read: then nothing is removed.
    """
    known = {entry.source: entry for entry in store.documents()}
    if prune and problems.found:
        note("Nothing is removed: a folder could not be read")
    prune = prune and not problems.found
    found: list[tuple[SourceFile, Entry]] = []
    for file in files:
        with problems.collecting():
            documents.check_name(file)
            found.append((file, describe_file(file, splitting)))
    elsewhere = [(file, entry) for file, entry in found if comes_from_elsewhere(entry, known)]
    refused = refuse_namesakes(elsewhere, known, problems)
    put, moved, unchanged = [], {}, 0
    for file, entry in found:
        if entry.source in refused:
            continue
        if entry.source not in known or known[entry.source].fingerprint != entry.fingerprint:
            put.append((file, entry))
            continue
        unchanged += 1
        if (file, entry) in elsewhere and not os.path.exists(place_of(known[entry.source])):
            moved.setdefault(entry.folder, []).append(entry.source)
    folders = {file.folder for file in files} - {None}
    there = {file.source for file in files}
    gone = [source for source, entry in known.items() if entry.folder in folders and source not in there]
    return Plan(put, unchanged, gone if prune else [], frozenset(known), moved)


def describe_file(file: SourceFile, splitting: Splitting) -> Entry:
    return Entry(file.source, documents.fingerprint_file(file.path, splitting), file.root, file.path.stat().st_size)


# ------------------------------------------------------------------------------- two folders, one name


def place_of(entry: Entry) -> str:
    """Where the file of a document was."""
    return os.path.join(entry.folder or "", entry.source)


def comes_from_elsewhere(entry: Entry, known: dict[str, Entry]) -> bool:
    """Whether the collection has a document of this source from another folder.

    Of texts and of documents of earlier versions that were named by themselves nobody knows from where they are.
    """
    folder = known[entry.source].folder if entry.source in known else None
    return folder is not None and os.path.realpath(place_of(known[entry.source])) != os.path.realpath(place_of(entry))


def has_another_text(old: str, new: str) -> bool:
    """Whether the first file is still there, with another content: the splitting may be all that changed."""
    return os.path.exists(old) and not filecmp.cmp(old, new, shallow=False)


def refuse_namesakes(
    elsewhere: list[tuple[SourceFile, Entry]], known: dict[str, Entry], problems: Problems
) -> set[str]:
    """The sources that would replace a document of another folder; adds one problem per pair of folders.

    A folder that was moved is not another one: the old files are gone, and half of the documents or more are as they
    were (in size, since another version of the splitting changes every fingerprint).
    """
    pairs: dict[tuple[str, str], list[Entry]] = {}
    for _, entry in elsewhere:
        pairs.setdefault((known[entry.source].folder, entry.folder), []).append(entry)
    refused: set[str] = set()
    for (old, new), entries in pairs.items():
        changed = [entry for entry in entries if entry.fingerprint != known[entry.source].fingerprint]
        there = [entry for entry in changed if has_another_text(place_of(known[entry.source]), place_of(entry))]
        same = sum(entry.bytes == known[entry.source].bytes for entry in entries)
        namesakes = there if 2 * same >= len(entries) else changed
        if namesakes:
            refused |= {entry.source for entry in namesakes}
            names = shorten_text(", ".join(entry.source for entry in namesakes))
            what = f"the collection has other documents with the same names, from {old}: {names}"
            fix = "ingest the folder above both, or give another --collection; to replace a document, `forget` it first"
            problems.add(what, new, fix)
    return refused


# ------------------------------------------------------------------------------- write


def print_plan(plan: Plan) -> None:
    """Prints one line per document on stdout: + is new, ~ changed, - removed."""
    for _, entry in plan.put:
        say(f"{'~' if entry.source in plan.known else '+'} {entry.source}")
    for source in plan.gone:
        say(f"- {source}")
    note(f"{len(plan.put)} to write, {plan.unchanged} unchanged, {len(plan.gone)} to remove; nothing was done")


def write_documents(store, plan: Plan, batches, language: str, problems: Problems) -> list[tuple[Entry, int]]:
    """The entries that were written, each with its number of passages; the first texts settle the language."""
    written: list[tuple[Entry, int]] = []
    remembered: dict[str, list[float]] = {}

    with progress() as bar:
        task = bar.add_task("documents", total=len(plan.put))
        for number, batch in enumerate(batches):
            if number == 0:
                languages.settle_language(store, language, sample_texts(batch))
            if batch[0].rest:
                with problems.collecting():
                    written.append((batch[0].entry, write_large(store, batch[0])))
                bar.advance(task)
                continue
            # In this thread: another thread makes torch slower on the CPU, by more than overlapping saves.
            vectors = embed_once(store.embeddings, [passage for one in batch for passage in one.passages], remembered)
            for put in store.put_documents(share_out(batch, vectors)):
                written.append(put)
                bar.advance(task)
    return written


def write_large(store, document: Loaded) -> int:
    """Writes a document whose passages are read, embedded and sent part by part; returns their number."""
    passages = chain(document.passages, document.rest)
    parts = iter(lambda: list(islice(passages, BATCH)), [])
    return store.put_parts(document.entry, ((part, embed_once(store.embeddings, part, {})) for part in parts))


def sample_texts(batch: list[Loaded]) -> Iterator[str]:
    """Texts of all documents by turns, so that a long one does not speak for the others."""
    longest = max(len(one.passages) for one in batch)
    return (one.passages[n].page_content for n in range(longest) for one in batch if n < len(one.passages))


def share_out(batch: list[Loaded], vectors: list[list[float]]) -> Iterator[Prepared]:
    """Each document of the batch with its own of the vectors."""
    at = 0
    for one in batch:
        yield one.entry, one.passages, vectors[at : at + len(one.passages)]
        at += len(one.passages)


def read_batches(plan: Plan, tokenizer, splitting: Splitting, problems: Problems) -> Iterator[list[Loaded]]:
    """The documents with their passages, in groups of about BATCH passages; a large one is a group of its own."""
    batch: list[Loaded] = []
    for file, _ in plan.put:
        with problems.collecting():
            entry = describe_file(file, splitting)
            passages = load_unchanged(file, entry, tokenizer, splitting)
            first = list(islice(passages, MANY))
            if len(first) == MANY and batch:
                yield batch
                batch = []
            batch.append(Loaded(entry, first, passages if len(first) == MANY else None))
        if batch and (batch[-1].rest or sum(len(one.passages) for one in batch) >= BATCH):
            yield batch
            batch = []
    if batch:
        yield batch


def load_unchanged(file: SourceFile, entry: Entry, tokenizer, splitting: Splitting) -> Iterator[Document]:
    """The passages of the file, and a note of what was left out.

    Raises UserError at the end when the file has changed meanwhile.
    """
    notes: list[Note] = []
    yield from documents.load_passages(file.path, file.source, tokenizer, splitting, notes)
    if describe_file(file, splitting) != entry:
        raise fail("the file changed while it was read", str(file.path), "ingest it again")
    for left_out in notes:
        note(f"{file.source}: {left_out.text} - {left_out.fix}")


def embed_once(embeddings, passages: list[Document], remembered: dict[str, list[float]]) -> list[list[float]]:
    """The vectors of the passages, in their order; equal texts are embedded once."""
    if len(remembered) > REMEMBERED:
        remembered.clear()
    texts = list(map(documents.embedded_text, passages))
    new = [text for text in dict.fromkeys(texts) if text not in remembered]
    remembered |= zip(new, embeddings.embed_documents(new), strict=True)
    return [remembered[text] for text in texts]
