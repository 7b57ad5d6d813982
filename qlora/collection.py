"""What a collection holds: files put in, changed and left alone."""

from qlora import documents
from qlora.console import Problems, note, progress


def put_files(store, paths: list[str], embedding_model: str, passage_tokens: int, overlap: int) -> None:
    """Adds new files, replaces changed ones, leaves unchanged ones alone.

    Raises UserError with the files that could not be read, when all others are in.
    """
    files = documents.find_files(paths)
    known = store.fingerprints()
    embedder = store.embeddings._client  # the SentenceTransformer: its tokenizer and its window
    sizes = (embedder.max_seq_length, passage_tokens, overlap)
    problems = Problems()
    counts = {"added": 0, "changed": 0, "unchanged": 0, "passages": 0}
    with progress() as bar:
        for file, source in bar.track(files, description="documents"):
            with problems.collecting():
                fingerprint = documents.fingerprint(file, sizes, embedding_model)
                state = "unchanged" if known.get(source) == fingerprint else "changed" if source in known else "added"
                if state != "unchanged":
                    passages = documents.load_passages(file, source, embedder.tokenizer, *sizes)
                    store.put_document(source, fingerprint, passages)
                    counts["passages"] += len(passages)
                counts[state] += 1
    note(", ".join(f"{count} {name}" for name, count in counts.items()) + f", {len(problems.found)} unreadable")
    problems.raise_if_any()
