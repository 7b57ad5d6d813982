"""Brings a collection up to date with files: new ones are added, changed ones replaced, the rest left alone.

A document is written whole or not at all, so that a second run completes one that was killed.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from langchain_core.documents import Document

from qlora.console import Problems, note, progress, say
from qlora.reading.section import Note
from qlora.retrieval import documents
from qlora.retrieval.documents import SourceFile
from qlora.retrieval.passage_store import Entry, Prepared
from qlora.retrieval.passages import Splitting

BATCH = 256  # passages embedded together: enough to put those of one length together
REMEMBERED = 20_000  # embedded texts, about 30 MB: a text of many documents is embedded once


@dataclass(frozen=True)
class Plan:
    """What a run will do; `known` are the sources that the collection already had."""

    put: list[tuple[SourceFile, Entry]]
    unchanged: int
    gone: list[str]
    known: frozenset[str]


def choose_splitting(store, embedding_model: str, passage_tokens: int, overlap: int, ocr: str = "") -> Splitting:
    """How files become passages that fit the window of the store's embedder."""
    return Splitting(embedding_model, store.embeddings._client.max_seq_length, passage_tokens, overlap, ocr)


def put_files(store, paths: list[str], splitting: Splitting, prune: bool = False, dry_run: bool = False) -> None:
    """Syncs the collection with the files; with `prune` it removes documents whose files are gone from the folders.

    Raises UserError with the files that could not be read, after all others are written.
    """
    embedder = store.embeddings._client  # the SentenceTransformer
    problems, passed_over = Problems(), Counter()
    plan = make_plan(store, documents.find_files(paths, problems, passed_over), splitting, prune, problems)
    if dry_run:
        print_plan(plan)
    else:
        store.forget(plan.gone)
        written = write_documents(store, plan, embedder.tokenizer, splitting, problems)
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


def make_plan(store, files: list[SourceFile], splitting: Splitting, prune: bool, problems: Problems) -> Plan:
    """What to write and what to remove; files that cannot be read are added to the problems.

    `problems` has the folders that could not be read: then nothing is removed.
    """
    known = {entry.source: entry for entry in store.documents()}
    put, unchanged = [], 0
    if prune and problems.found:
        note("Nothing is removed: a folder could not be read")
    prune = prune and not problems.found
    for file in files:
        with problems.collecting():
            documents.check_name(file)
            fingerprint = documents.fingerprint_file(file.path, splitting)
            entry = Entry(file.source, fingerprint, file.folder, file.path.stat().st_size)
            if file.source in known and known[file.source].fingerprint == fingerprint:
                unchanged += 1
            else:
                put.append((file, entry))
    folders = {file.folder for file in files} - {None}
    there = {file.source for file in files}
    gone = [source for source, entry in known.items() if entry.folder in folders and source not in there]
    return Plan(put, unchanged, gone if prune else [], frozenset(known))


def print_plan(plan: Plan) -> None:
    """Prints one line per document on stdout: + is new, ~ changed, - removed."""
    for _, entry in plan.put:
        say(f"{'~' if entry.source in plan.known else '+'} {entry.source}")
    for source in plan.gone:
        say(f"- {source}")
    note(f"{len(plan.put)} to write, {plan.unchanged} unchanged, {len(plan.gone)} to remove; nothing was done")


def write_documents(store, plan: Plan, tokenizer, splitting: Splitting, problems: Problems) -> list[tuple[Entry, int]]:
    """The entries that were written, each with its number of passages."""
    written: list[tuple[Entry, int]] = []
    remembered: dict[str, list[float]] = {}

    with progress() as bar:
        task = bar.add_task("documents", total=len(plan.put))
        for batch in read_batches(plan, tokenizer, splitting, problems):
            texts = [documents.embedded_text(passage) for _, passages in batch for passage in passages]
            # In this thread: another thread makes torch slower on the CPU, by more than overlapping saves.
            vectors = embed_once(store.embeddings, texts, remembered)
            for put in store.put_documents(share_out(batch, vectors)):
                written.append(put)
                bar.advance(task)
    return written


def share_out(batch: list[tuple[Entry, list[Document]]], vectors: list[list[float]]) -> Iterator[Prepared]:
    """Each document of the batch with its own of the vectors."""
    at = 0
    for entry, passages in batch:
        yield entry, passages, vectors[at : at + len(passages)]
        at += len(passages)


def read_batches(
    plan: Plan, tokenizer, splitting: Splitting, problems: Problems
) -> Iterator[list[tuple[Entry, list[Document]]]]:
    """The documents with their passages, in groups of about BATCH passages."""
    batch: list[tuple[Entry, list[Document]]] = []
    for file, entry in plan.put:
        notes: list[Note] = []
        with problems.collecting():
            batch.append((entry, list(documents.load_passages(file.path, file.source, tokenizer, splitting, notes))))
            for left_out in notes:
                note(f"{file.source}: {left_out.text} - {left_out.fix}")
        if sum(len(passages) for _, passages in batch) >= BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def embed_once(embeddings, texts: list[str], remembered: dict[str, list[float]]) -> list[list[float]]:
    """The vectors of the texts, in their order; equal texts are embedded once."""
    if len(remembered) > REMEMBERED:
        remembered.clear()
    new = [text for text in dict.fromkeys(texts) if text not in remembered]
    remembered |= zip(new, embeddings.embed_documents(new), strict=True)
    return [remembered[text] for text in texts]
