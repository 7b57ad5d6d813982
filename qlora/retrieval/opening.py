"""A collection, opened: its embedding model, and the store that it is in."""

from qlora import machine, settings
from qlora.console import fail, note
from qlora.model import base_model

LATE = 10  # seconds by which a copy of the database may be behind before anybody is told


def load_embeddings(name: str):
    """The embedding function: sentence-transformers, vectors of length 1.

    In bf16 where the CPU multiplies it: about twice as fast, cosine to the fp32 vectors at least 0.999.
    """
    from langchain_huggingface import HuggingFaceEmbeddings

    source = base_model.resolve_embedding_model(name)
    with base_model.explaining(source, "--embedding-model"):
        return HuggingFaceEmbeddings(
            model_name=source,
            encode_kwargs={"normalize_embeddings": True, "batch_size": 16},
            model_kwargs={"trust_remote_code": False, "model_kwargs": {"dtype": machine.compute_dtype()}},
        )


def open_collection(store: str, name: str, embeddings, embedding_model: str, from_copy: bool = False):
    """The store of a collection: in Pinecone, in the PostgreSQL of DATABASE_URL, or in the embedded one.

    With `from_copy` it looks in the copy of DATABASE_REPLICA_URL, where that is set.
    """
    copy = settings.get("DATABASE_REPLICA_URL") if from_copy else None
    open_it = open_pinecone if store == "pinecone" else open_copy if copy else open_pgvector
    opened, where = open_it(embeddings, embedding_model, name)
    note(f"Collection {name} in {where}: {opened.count()} passages")
    return opened


def open_pgvector(embeddings, embedding_model: str, name: str):
    """The collection in PostgreSQL, and where that is."""
    from qlora.retrieval import database, embedded_postgres, pgvector_store

    url = settings.get("DATABASE_URL")
    server = (url, None) if url else (embedded_postgres.start_server(), embedded_postgres.revive_server)
    connected = database.Database(*server)
    where = database.describe_url(url) if url else "the embedded PostgreSQL"
    return pgvector_store.PgVectorStore(connected, embeddings, embedding_model, name), where


def open_copy(embeddings, embedding_model: str, name: str):
    """The collection in the read-only copy of PostgreSQL, and where that is. Reports a copy that is behind."""
    from qlora.retrieval import database, pgvector_store

    url = settings.get("DATABASE_REPLICA_URL")
    connected, original = database.Database(url), database.Database(settings.get("DATABASE_URL"))
    if not connected.is_copy():
        fix = "name a copy that follows DATABASE_URL by streaming replication, or leave it out"
        raise fail("a database of its own, which is no copy", "DATABASE_REPLICA_URL", fix)
    if (behind := connected.seconds_behind(original)) > LATE:
        note(f"The copy of the database is {behind:.0f} s behind: it lacks what was added since")
    store = pgvector_store.PgVectorStore(connected, embeddings, embedding_model, name)
    if store.count() == 0:
        raise pgvector_store.lacking(name, connected)
    store.original = original
    return store, f"the copy {database.describe_url(url)}"


def open_pinecone(embeddings, embedding_model: str, name: str):
    """The collection in Pinecone, and where that is."""
    from qlora.retrieval import pinecone_store

    index = pinecone_store.open_index(len(embeddings.embed_query("dimension")))
    return pinecone_store.PineconeStore(index, embeddings, embedding_model, name), "Pinecone"
