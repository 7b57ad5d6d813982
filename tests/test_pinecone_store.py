"""The Pinecone store through the real SDK over HTTP, against a loopback server."""

import json
import os
import time

import pytest
from conftest import rag
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_tests.integration_tests import VectorStoreIntegrationTests
from pinecone_server import KEY, PineconeServer

from qlora.console import UserError
from qlora.retrieval import pinecone_store
from qlora.retrieval.metadata_filter import read_condition
from qlora.retrieval.passage_store import Entry
from qlora.retrieval.pinecone_store import PineconeStore, open_index

SIZE = 16


@pytest.fixture
def server(monkeypatch):
    server = PineconeServer().start()
    monkeypatch.setenv("PINECONE_API_KEY", KEY)
    monkeypatch.setenv("PINECONE_HOST", server.url)
    yield server
    server.shutdown()
    server.server_close()


def open_store(collection: str = "docs", model: str = "fake") -> PineconeStore:
    return PineconeStore(open_index(SIZE), DeterministicFakeEmbedding(size=SIZE), model, collection)


class TestStandard(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, server):
        return PineconeStore(open_index(6), self.get_embeddings(), "fake", "standard")


def put(store, source: str, *texts: str, fingerprint: str = "1") -> None:
    passages = [Document(text, metadata={"source": source, "line": n}) for n, text in enumerate(texts, 1)]
    store.put_document(Entry(source, fingerprint, "folder", 12), passages)


def test_the_index_is_made_once_and_waited_for(server):
    open_store()
    assert server.requests["/indexes"] == 1 and list(server.indexes) == ["qlora"]
    assert server.indexes["qlora"]["deployment"]["region"] == "us-east-1"
    open_store("another")
    assert server.requests["/indexes"] == 1


def test_no_two_collections_share_a_namespace(server):
    names = [
        "mine",
        "mine documents",
        "mine passages",
        "mine documents passages",
        "mine passages documents",
    ]
    stores = [open_store(name) for name in names]
    for store in stores:
        put(store, f"{store.collection}.md", store.collection)
    for store in stores:
        assert store.count() == 1 and [entry.source for entry in store.documents()] == [f"{store.collection}.md"]
        assert [found.page_content for found in store.find("?", 9, mode="dense")] == [store.collection]
    stores[1].drop()
    assert [store.count() for store in stores] == [1, 0, 1, 1, 1]


def test_copies_take_one_place_and_are_all_named(server):
    store = open_store()
    for n in range(30):
        put(store, f"{n}.md", "one  ONE" if n % 2 else "One one")
    put(store, "b.md", "four")
    store.finish()
    found = store.find("One one", 2, mode="dense")
    assert [d.page_content.casefold().split() for d in found] == [["one", "one"], ["four"]]
    assert len(found[0].metadata["also_in"]) == 29 and "also_in" not in found[1].metadata
    assert [d.metadata["ranks"]["dense"] for d in found] == [1, 2]


def test_language_and_folder_are_kept(server):
    store = open_store()
    assert store.language is None
    store.choose_language("de")
    store.refusal_threshold = 0.5
    put(store, "a.md", "one")
    store.move_documents(["a.md"], "elsewhere")
    again = open_store()
    assert (again.language, again.refusal_threshold) == ("de", 0.5)
    assert [(entry.folder, entry.passages) for entry in again.documents()] == [("elsewhere", 1)]


def test_documents_are_replaced_listed_and_forgotten(server):
    store = open_store()
    put(store, "a.md", "one", "two", "three")
    put(store, "b.md", "four")
    put(store, "a.md", "five", fingerprint="2")
    store.finish()
    listed = store.documents()
    assert [(e.source, e.fingerprint, e.folder, e.bytes, e.passages) for e in listed] == [
        ("a.md", "2", "folder", 12, 1),
        ("b.md", "1", "folder", 12, 1),
    ]
    assert store.count() == 2 and listed[0].added is not None
    found = store.find("five", 5, mode="dense")
    assert found[0].page_content == "five" and len(found) == 2
    assert found[0].metadata["score"] == pytest.approx(1) and found[0].metadata["ranks"]["dense"] == 1
    assert store.forget(["a.md", "nothing.md"]) == 1
    assert store.count() == 1 and [entry.source for entry in store.documents()] == ["b.md"]
    assert open_store("other").count() == 0


def test_filters(server):
    store = open_store()
    metadatas = [{"page": 3, "kind": "rule"}, {"page": "3"}, {"page": 7, "final": True}, {}]
    store.add_texts(["a", "b", "c", "d"], metadatas)

    def found(*conditions: str) -> set[str]:
        where = [read_condition(condition) for condition in conditions]
        return {document.page_content for document in store.find("a", 9, mode="dense", where=where)}

    assert found("page=3") == {"a", "b"} and found("page!=3") == {"c", "d"}
    assert found("page>=3") == {"a", "c"} and found("page<7", "kind=rule") == {"a"}
    assert found("final=true") == {"c"} and found("kind!=rule") == {"b", "c", "d"}
    assert {d.page_content for d in store.similarity_search("a", 9, filter={"kind": {"$in": ["rule", "x"]}})} == {"a"}
    with pytest.raises(ValueError, match="numbers only"):
        found("kind>rule")


def test_the_refusal_threshold_stays_with_the_collection(server):
    store = open_store()
    assert store.refusal_threshold is None
    store.refusal_threshold = 0.25
    assert open_store().refusal_threshold == 0.25
    store.refusal_threshold = None
    assert open_store().refusal_threshold is None


def test_another_embedding_model_or_index_is_refused(server, monkeypatch):
    put(open_store(), "a.md", "one")
    with pytest.raises(UserError, match="was made with embedding model fake, not other"):
        open_store(model="other")
    with pytest.raises(UserError, match="dimension 16 and metric cosine; 384"):
        open_index(384)
    server.indexes["qlora"]["schema"]["fields"]["_values"]["metric"] = "euclidean"
    with pytest.raises(UserError, match="metric euclidean"):
        open_index(SIZE)


def test_mistakes_are_explained_without_the_key(server, monkeypatch):
    monkeypatch.setenv("PINECONE_API_KEY", "")
    with pytest.raises(UserError, match="no Pinecone key"):
        open_store()
    monkeypatch.setenv("PINECONE_API_KEY", "pcsk-wrong")
    with pytest.raises(UserError, match="valid key") as raised:
        open_store()
    assert "pcsk-wrong" not in str(raised.value)
    monkeypatch.setenv("PINECONE_API_KEY", KEY)
    server.polls = 10**6
    monkeypatch.setattr(pinecone_store, "READY_SECONDS", 0)
    with pytest.raises(UserError, match="not ready after 0 s"):
        open_store()
    server.indexes["qlora"]["polls"] = 0
    store = open_store()
    server.faults["/vectors/upsert"] = [403]
    with pytest.raises(UserError, match="quota"):
        put(store, "a.md", "one")
    large = Document("text", metadata={"source": "a.md", "notes": "x" * 41_000})
    with pytest.raises(UserError, match="Pinecone takes 40,960"):
        store.put_document(Entry("a.md", "1"), [Document("fine"), large])
    assert not server.visible("docs")


def test_a_busy_server_is_asked_again(server):
    store = open_store()
    server.faults["/vectors/upsert"] = [429, 503]
    put(store, "a.md", "one", "two")
    assert store.count() == 2


def test_requests_stay_below_two_megabytes(server):
    store = open_store()
    passages = [Document("x" * 15_000, metadata={"n": n}) for n in range(300)]
    store.put_document(Entry("a.md", "1"), passages)
    assert store.count() == 300 and server.requests["/vectors/upsert"] >= 3 + 2


def test_a_network_that_goes_away_is_completed_by_the_second_run(server, tmp_path, capsys):
    """`ingest` breaks off in the middle; the next one writes what is missing and embeds nothing that is there."""
    for name in "abcd":
        (tmp_path / f"{name}.md").write_text(f"# {name}\n\nThe {name} bell rings.")
    words = "ingest", tmp_path, "--store", "pinecone", "--collection", "mine"
    server.faults["/vectors/upsert"] = [200] * 7 + [0] * 90  # the collection's record twice, and five of eight requests
    assert rag(*words) == 2
    error = capsys.readouterr().err
    assert "what is done stays done" in error and KEY not in error
    server.faults.clear()
    done = len(server.visible("mine documents")) - 1
    assert 1 <= done <= 2
    before = server.vectors_written
    assert rag(*words) == 0
    assert f"{done} unchanged" in capsys.readouterr().err
    assert server.vectors_written - before == 2 * (4 - done)  # a passage and a record each
    assert rag(*words) == 0 and "4 unchanged" in capsys.readouterr().err


def test_after_a_failure_the_rest_is_not_tried(server):
    store = open_store()
    server.faults["/vectors/upsert"] = [403] * 200
    prepared = [(Entry(f"{n}.md", "1"), [Document("text")], [[1.0] * SIZE]) for n in range(100)]
    before = server.requests["/vectors/upsert"]
    with pytest.raises(UserError, match="quota"):
        list(store.put_documents(prepared))
    assert server.requests["/vectors/upsert"] - before < 50


def test_what_was_just_written_is_waited_for(server):
    server.delay = 1.5
    store = open_store()
    put(store, "a.md", "one")
    started = time.monotonic()
    store.finish()
    assert time.monotonic() - started >= 1 and store.count() == 1


def test_every_command_works_over_pinecone(server, tiny_base, tmp_path, capsys):
    flags = "--store", "pinecone", "--collection", "mine"
    model = "--adapter", "none", "--base-model", tiny_base, "--max-new-tokens", 8
    kept, gone = tmp_path / "bell.md", tmp_path / "gone.md"
    kept.write_text("# Bells\n\nThe bell is rung twice before a departure.")
    gone.write_text("# Old\n\nNothing of use.")
    assert rag("ingest", tmp_path, *flags) == 0
    assert "ask --collection mine --store pinecone" in capsys.readouterr().err
    gone.unlink()
    assert rag("ingest", tmp_path, *flags, "--prune") == 0
    capsys.readouterr()
    assert rag("documents", *flags, "--json") == 0
    assert [entry["source"] for entry in json.loads(capsys.readouterr().out)] == ["bell.md"]
    assert rag("search", "When is the bell rung?", *flags, "--json") == 0
    assert "rung twice" in json.loads(capsys.readouterr().out)["passages"][0]["text"]
    assert rag("ask", "When is the bell rung?", *flags, *model, "--json") == 0
    assert json.loads(capsys.readouterr().out)["passages"][0]["source"] == "bell.md"
    for words in (["feedback"], ["ask", "When?", "--feedback", *model]):
        assert rag(*words, *flags) == 2 and "Pinecone keeps no feedback" in capsys.readouterr().err
    assert rag("forget", "bell.md", *flags) == 0
    assert rag("search", "bell", *flags, "--search", "hybrid") == 2
    assert "Pinecone searches by meaning only" in capsys.readouterr().err
    assert rag("doctor", *flags) == 2


def test_retrieval_is_that_of_postgresql(server, database, tmp_path, capsys, monkeypatch):
    """The same questions over the same documents: recall and MRR within half a point."""
    monkeypatch.setenv("DATABASE_URL", database)
    found = {}
    for store in ("pgvector", "pinecone"):
        flags = "search=dense", "--store", store, "--collection", "sample", "--output", tmp_path / store
        assert rag("sweep", *flags, "--search", "dense", "--json") == 0
        found[store] = json.loads(capsys.readouterr().out)[0]["rows"][0]
    numbers = {name: [value for value in found[name].values() if isinstance(value, float)] for name in found}
    assert len(numbers["pgvector"]) >= 3
    assert numbers["pinecone"] == pytest.approx(numbers["pgvector"], abs=0.005)


@pytest.mark.skipif("PINECONE_API_KEY" not in os.environ, reason="set PINECONE_API_KEY to test against Pinecone itself")
def test_pinecone_itself(monkeypatch):
    """In an index of its own, which is removed afterwards."""
    from pinecone import Pinecone

    key = os.environ["PINECONE_API_KEY"]
    monkeypatch.setenv("PINECONE_API_KEY", key)
    monkeypatch.setenv("PINECONE_INDEX", "qlora-test")
    try:
        store = open_store()
        put(store, "a.md", "one", "two")
        store.finish()
        assert store.count() == 2 and store.find("one", 1, mode="dense")[0].page_content == "one"
        assert store.forget(["a.md"]) == 1
    finally:
        Pinecone(api_key=key).indexes.delete("qlora-test")
