"""LangChain's own tests of a vector store, filters, search in both legs, indexes, and a server that goes away."""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import pytest
import torch
from conftest import rag
from hypothesis import HealthCheck, given, settings, strategies
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding, Embeddings
from langchain_tests.integration_tests import VectorStoreIntegrationTests
from psycopg2 import sql

from qlora import machine
from qlora.console import UserError
from qlora.retrieval import database as db
from qlora.retrieval import doctor, metadata_filter, pgvector_store, search_sql
from qlora.retrieval.database import MIGRATIONS, Database, is_unprotected
from qlora.retrieval.metadata_filter import Condition, read_condition
from qlora.retrieval.passage_store import Entry
from qlora.retrieval.pgvector_store import PgVectorStore

INJECTIONS = [
    "' OR '1'='1",
    "x'; DROP SCHEMA rag CASCADE; --",
    "%(k)s",
    "%s",
    "{table}",
    "a\\'b",
    '"; --',
    "$$",
    "é\u2028",
]


class Steered(Embeddings):
    """Vectors that a test can reason about: a text's first number is its angle in degrees."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        import math

        angle = math.radians(next((float(word) for word in text.split() if word.lstrip("-").isdigit()), 0))
        return [math.cos(angle), math.sin(angle)]


def open_store(url, name, embeddings=None) -> PgVectorStore:
    return PgVectorStore(Database(url), embeddings or Steered(), "steered", name)


@pytest.fixture
def store(database, collection) -> PgVectorStore:
    return open_store(database, collection)


class TestStandard(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, database, request):
        store = PgVectorStore(Database(database), self.get_embeddings(), "fake", f"standard {request.node.name}")
        yield store
        store.drop()


def test_chains_of_langchain_work_on_it(store):
    from langchain_classic.chains import RetrievalQA
    from langchain_core.language_models import FakeListLLM
    from langchain_core.runnables import RunnablePassthrough

    store.add_texts(["0 the bosun signs", "90 nothing"])
    retriever = store.as_retriever(search_kwargs={"k": 1})
    chain = RetrievalQA.from_chain_type(FakeListLLM(responses=["the bosun"]), retriever=retriever)
    assert chain.invoke({"query": "0 who signs?"})["result"] == "the bosun"
    found = ({"context": retriever, "question": RunnablePassthrough()} | RunnablePassthrough()).invoke("0 who signs?")
    assert found["context"][0].page_content == "0 the bosun signs"


def test_texts_of_many_documents_are_written_in_one_go(store):
    count = 1000
    begun = time.perf_counter()
    store.add_texts([f"{n % 90} text {n}" for n in range(count)], [{"source": f"{n}.md"} for n in range(count)])
    assert time.perf_counter() - begun < 20  # quadratic, it would take minutes
    assert [entry.passages for entry in store.documents()] == [1] * count


# ------------------------------------------------------------------------------- filters


def add_years(store: PgVectorStore, count: int = 20) -> None:
    texts = [f"{n} passage" for n in range(count)]
    store.add_texts(texts, [{"year": 2000 + n, "kind": "even" if n % 2 == 0 else "odd", "n": n} for n in range(count)])


@pytest.mark.parametrize(
    ("condition", "wanted"),
    [
        ("year>=2015", {15, 16, 17, 18, 19}),
        ("year<2002", {0, 1}),
        ("year = 2003", {3}),
        ("kind=odd", set(range(1, 20, 2))),
        ("kind!=odd", set(range(0, 20, 2))),
        ("missing=1", set()),
        ("missing!=1", set(range(20))),
        ("kind>3", set()),  # no number: passed over, not an error
    ],
)
def test_conditions(store, condition, wanted):
    add_years(store)
    for mode in ("dense", "hybrid"):
        found = store.find("0 passage", 20, mode=mode, where=[read_condition(condition)])
        assert {document.metadata["n"] for document in found} == wanted


def test_langchain_s_filters(store):
    add_years(store)
    found = store.similarity_search("0", k=20, filter={"kind": "even", "year": {"$gte": 2010, "$lt": 2014}})
    assert {document.metadata["n"] for document in found} == {10, 12}
    found = store.similarity_search("0", k=20, filter={"n": {"$in": [3, 5]}})
    assert {document.metadata["n"] for document in found} == {3, 5}
    assert len(store.similarity_search("0", k=20, filter={"n": {"$nin": [3, 5]}})) == 18
    assert store.similarity_search("0", k=20, filter={"n": {"$in": []}}) == []
    with pytest.raises(ValueError, match="unknown operator"):
        store.similarity_search("0", filter={"n": {"$where": "1=1"}})
    retriever = store.as_retriever(search_kwargs={"k": 2, "filter": {"kind": "odd"}})
    assert [d.metadata["n"] for d in retriever.invoke("0")] == [1, 3]


@pytest.mark.parametrize("text", ["", "year", "=5", "  ", "ye\0ar=1"])
def test_what_is_no_condition(text):
    with pytest.raises(ValueError, match="not a condition"):
        read_condition(text)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    key=strategies.one_of(strategies.sampled_from(INJECTIONS), strategies.text(min_size=1, max_size=30)),
    value=strategies.one_of(strategies.sampled_from(INJECTIONS), strategies.text(max_size=30)),
    operator=strategies.sampled_from(list(metadata_filter.OPERATORS)),
)
def test_keys_and_values_are_bound(database, key, value, operator):
    """A passage with that very key and value is found by =, and nothing else ever happens."""
    key, value = (text.replace("\0", "").encode("utf-8", "replace").decode() for text in (key, value))
    store = open_store(database, "fuzzed")
    store.add_texts(["1 one", "2 two"], [{key: value}, {"other": "thing"}], ids=["a", "b"])
    found = {d.id for d in store.find("1", where=[Condition(key, operator, (value,))])}
    assert found <= {"a", "b"}
    if operator == "=":
        assert "a" in found
    if operator == "!=":
        assert "a" not in found
    assert store.count() == 2


# ------------------------------------------------------------------------------- search


def test_lexical_and_hybrid_find_a_name_that_is_far_away(store):
    store.add_texts([f"{n} common text" for n in range(60, 140)], [{"n": n} for n in range(60, 140)])
    store.add_texts(["-90 the form B7 is signed by Okonkwo"], [{"n": -90}])
    question = "who is Okonkwo?"  # no number: 0 degrees; 60 degrees to the nearest, a cosine of a half
    assert -90 not in {d.metadata["n"] for d in store.find(question, 5, mode="dense")}
    assert store.find(question, 5, mode="lexical")[0].metadata["n"] == -90
    best = store.find(question, 2, mode="hybrid", fetch_k=5)
    assert [d.metadata["n"] for d in best] == [-90, 60]
    assert [d.metadata["ranks"] for d in best] == [{"dense": None, "lexical": 1}, {"dense": 1, "lexical": None}]
    found = store.find("0 who has Okonkwo's common text?", 2, mode="hybrid")
    assert [d.metadata["n"] for d in found] == [-90, 60]  # words of 80 passages weigh little


def test_rare_words_weigh_more_than_common_ones(store):
    store.add_texts([f"0 the crew of the ferry, {n}" for n in range(20)], [{"n": n} for n in range(20)])
    store.add_texts(["0 the moth cupboard"], [{"n": 99}])
    found = store.find("Does the ferry crew use the moth cupboard?", 2, mode="lexical")
    assert found[0].metadata["n"] == 99 and found[1].metadata["n"] < 20
    assert store.find("Which crew?", 1, mode="lexical")  # a common word alone


def test_a_word_of_too_many_passages_is_not_looked_for(store, monkeypatch):
    monkeypatch.setattr(search_sql, "COMMON", 10)
    store.add_texts([f"0 ferry {n}" for n in range(20)] + ["0 moth"])
    assert [d.page_content for d in store.find("ferry moth", 5, mode="lexical")] == ["0 moth"]
    assert len(store.find("ferry", 50, mode="lexical")) == 10


def test_a_word_that_statistics_know_to_be_everywhere_is_the_last_one_to_be_looked_for(store, monkeypatch):
    monkeypatch.setattr(search_sql, "COMMON", 10)
    monkeypatch.setattr(pgvector_store, "INDEXED_FROM", 30)
    texts = [f"0 ferry {chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(100)]
    store.add_texts([*texts, "0 moth"], [{"n": n} for n in range(101)])
    store.finish()  # which makes statistics, too
    with store.database.transaction() as cursor:
        known = "SELECT most_common_elems::text::text[] FROM pg_stats WHERE tablename = %s AND attname = 'words'"
        cursor.execute(known, (f"passages_{store.collection.id}",))
        assert "ferri" in cursor.fetchone()[0]
    assert [d.page_content for d in store.find("ferry moth", 5, mode="lexical")] == ["0 moth"]
    for question in ("ferry", "ferry walrus"):  # no passage has a rarer word
        assert len(store.find(question, 50, mode="lexical")) == 10
        ranks = [d.metadata["ranks"] for d in store.find(question, 50, mode="hybrid")]
        assert ranks and not any(rank["lexical"] for rank in ranks)  # ten of all passages would be chosen by chance
    few = [Condition("n", "<", ("5",))]  # among which the word may be rare
    assert len(store.find("ferry", 50, mode="lexical", where=few)) == 5
    most = [Condition("n", ">=", ("0",))]
    assert not any(d.metadata["ranks"]["lexical"] for d in store.find("ferry", 50, mode="hybrid", where=most))
    count_changes(store)
    with store.database.transaction() as cursor:  # as a crash does
        table = f"rag.passages_{store.collection.id}"
        cursor.execute("SELECT pg_stat_reset_single_table_counters(%s::regclass)", (table,))
    store.add_texts(["0 walrus"], [{"n": 101}])
    count_changes(store)  # one passage
    ranks = [d.metadata["ranks"] for d in store.find("ferry", 50, mode="hybrid")]
    assert ranks and not any(rank["lexical"] for rank in ranks)


def count_changes(store) -> None:
    """Lets the server know of them now, not in a second."""
    with store.database.transaction() as cursor:
        cursor.execute("SELECT pg_stat_force_next_flush()")


def test_scores_are_cosine_similarities(store):
    store.add_texts(["0 a", "60 b", "90 c"])
    for mode in ("dense", "hybrid"):
        scores = {d.page_content[-1]: d.metadata["score"] for d in store.find("0 a b c", 3, mode=mode)}
        assert scores == {
            "a": pytest.approx(1, abs=1e-3),
            "b": pytest.approx(0.5, abs=1e-3),
            "c": pytest.approx(0, abs=1e-3),
        }


def test_diversity_takes_another_passage_before_a_repetition(store):
    store.add_texts(["10 same", "11 same", "12 same", "-40 other"])
    assert [d.page_content for d in store.find("0", 2, mode="dense")] == ["10 same", "11 same"]
    found = store.find("0", 2, mode="dense", diversity=0.7)
    assert [d.page_content for d in found] == ["10 same", "-40 other"]
    found = store.max_marginal_relevance_search("0", k=2, fetch_k=4, lambda_mult=0.3)
    assert [d.page_content for d in found] == ["10 same", "-40 other"]


@pytest.mark.parametrize(
    "question",
    [
        "the of and",
        "",
        "0 " + "long word " * 5000,
        'O\'Brien "quoted" \\ & | ! <-> :*',
        "a\0b",
        "\U0001f40b whale",
        "(((",
    ],
)
def test_any_question_is_answered(store, question):
    store.add_texts(["0 a whale by O'Brien", "40 nothing"])
    for mode in ("dense", "lexical", "hybrid"):
        found = store.find(question, 2, mode=mode)
        assert len(found) == 2 or mode == "lexical"


def test_headings_count_among_the_words(store):
    store.add_texts(["50 The price is nine pounds."], [{"heading": "Antifouling"}])
    assert len(store.find("0 antifouling", 1, mode="lexical")) == 1


# ------------------------------------------------------------------------------- index


def test_large_collections_get_indexes_and_filters_stay_complete(database, collection, monkeypatch):
    monkeypatch.setattr(pgvector_store, "INDEXED_FROM", 500)
    store = open_store(database, collection, DeterministicFakeEmbedding(size=16))
    passages = [Document(f"text {n}", metadata={"source": "a.md", "rare": n % 750 == 7, "n": n}) for n in range(3000)]
    store.put_document(Entry("a.md", "1"), passages[:400])
    store.finish()
    assert not store.is_indexed()
    store.put_document(Entry("a.md", "2"), passages)
    store.finish()
    store.finish()
    assert store.is_indexed()
    with store.database.transaction() as cursor:
        cursor.execute("SET LOCAL enable_seqscan = off")
        cursor.execute(
            sql.SQL("EXPLAIN SELECT id FROM {} ORDER BY embedding <=> %s LIMIT 5").format(store.collection.table),
            (str([1] * 16),),
        )
        assert "_dense" in str(cursor.fetchall())
    found = store.find("text 1", 10, mode="dense", where=[read_condition("rare=true")])
    assert {d.metadata["n"] for d in found} == {7, 757, 1507, 2257}
    found = store.find("text 1", 2000, mode="dense", where=[read_condition("n>=1000")])
    assert len(found) == 2000
    store.put_document(Entry("a.md", "3"), passages[:10])
    assert store.is_indexed() and len(store.find("text 3", 10, mode="dense")) == 10


def test_an_index_is_built_in_the_memory_that_its_graph_takes(store, monkeypatch):
    store.add_texts(["0 a", "60 b"])
    for per_passage, mib in ((800, 64), (64 << 20, 128), (64 << 30, 4096)):
        monkeypatch.setattr(db, "GRAPH_BYTES", per_passage)
        with store.database.transaction() as cursor:
            db.build_indexes(cursor, store.collection.id)
            cursor.execute("SELECT setting::int / 1024 FROM pg_settings WHERE name = 'maintenance_work_mem'")
            assert cursor.fetchone() == (mib,)


def test_processes_that_end_together_build_the_index_once(database, collection, monkeypatch):
    """Without a lock each holds the table that the other one needs: a deadlock, and no index."""
    monkeypatch.setattr(pgvector_store, "INDEXED_FROM", 1)
    monkeypatch.setattr(db, "INDEXES", db.INDEXES.replace("ANALYZE", "SELECT pg_sleep(2); ANALYZE"))
    stores = [open_store(database, collection) for _ in range(3)]
    stores[0].add_texts(["0 a", "60 b"])
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(PgVectorStore.finish, stores))
    assert stores[0].is_indexed()


def test_doctor(database, collection, monkeypatch, capsys):
    monkeypatch.setattr(pgvector_store, "INDEXED_FROM", 100)
    store = open_store(database, collection, DeterministicFakeEmbedding(size=16))
    store.put_document(Entry("a.md", "1"), [Document(f"text {n}", metadata={}) for n in range(300)])
    store.finish()
    findings = {finding.what: finding for finding in doctor.examine(store, "steered")}
    assert {finding.state for finding in findings.values()} == {"good"}
    assert (
        findings["recall@10"].detail.startswith(("1.000", "0.99")) and "300 passages" in findings["collection"].detail
    )
    monkeypatch.setattr(doctor, "ENOUGH_RECALL", 1.1)
    (found,) = (finding for finding in doctor.examine(store, "steered") if finding.what == "recall@10")
    assert found.state == "bad"
    with store.database.transaction() as cursor:
        cursor.execute(re.search("DROP INDEX .*?;", found.detail)[0])
    assert not store.is_indexed()
    store.finish()
    assert store.is_indexed()
    with store.database.transaction() as cursor:
        cursor.execute(
            "UPDATE pg_index SET indisvalid = false WHERE indexrelid = to_regclass(%s)",
            (f"rag.passages_{store.collection.id}_dense",),
        )
    assert {finding.what: finding.state for finding in doctor.examine(store, "steered")}["index"] == "bad"


def test_doctor_on_the_command_line(collection, capsys):
    assert rag("doctor", "--json") == 0
    findings = json.loads(capsys.readouterr().out)
    assert {finding["what"] for finding in findings} >= {"server", "pgvector", "collection", "embeddings", "index"}
    details = {finding["what"]: finding["detail"] for finding in findings}
    assert f"torch {version('torch')}" in details["versions"] and "GB available" in details["memory"]
    assert "cpu in" in details["computes on"] or "GPU" in details["computes on"]


def test_doctor_tells_the_machine_without_a_database_and_where_16_bit_is_slow(monkeypatch, capsys):
    monkeypatch.setenv("DATABASE_URL", "postgresql://nobody@127.0.0.1:1/x")
    monkeypatch.setattr(machine, "compute_dtype", lambda: torch.float32)
    assert rag("doctor", "--json") == 1
    findings = {finding["what"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert findings["database"]["state"] == "bad" and "refused" in findings["database"]["detail"]
    assert findings["computes on"]["state"] == "warning" and "no AVX512-BF16" in findings["computes on"]["detail"]


# ------------------------------------------------------------------------------- server


def test_a_lost_connection_is_made_again(store, capsys):
    store.add_texts(["0 kept"])
    with Database(store.database.url).transaction() as cursor:
        cursor.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND pid = %s",
            (store.database.connection.info.backend_pid,),
        )
    assert store.find("0", 1)[0].page_content == "0 kept"
    assert "trying again in" in capsys.readouterr().err


def test_a_reader_s_role_is_enough_to_search(database, store):
    store.add_texts(["0 open to all"])
    with store.database.transaction() as cursor:
        cursor.execute("DROP ROLE IF EXISTS reader")
        cursor.execute("CREATE ROLE reader")
        cursor.execute("GRANT USAGE ON SCHEMA rag TO reader; GRANT SELECT ON ALL TABLES IN SCHEMA rag TO reader")
    try:
        reader = Database(database)
        with reader.connection.cursor() as cursor:
            cursor.execute("SET ROLE reader; SET default_transaction_read_only = on")
        reader.connection.commit()
        again = PgVectorStore(reader, Steered(), "steered", store.collection.name)
        assert again.find("0 open", 1, mode="hybrid")[0].page_content == "0 open to all"
        assert again.refusal_threshold is None
        with pytest.raises(UserError, match="may only be read"):
            again.forget(["a.md"])
        with reader.connection.cursor() as cursor:
            cursor.execute("SET default_transaction_read_only = off")
        reader.connection.commit()
        with pytest.raises(UserError, match="may not do that"):
            again.forget(["a.md"])
    finally:
        with store.database.transaction() as cursor:
            cursor.execute("DROP OWNED BY reader; DROP ROLE reader")


def test_statements_have_a_limit(database):
    with pytest.raises(UserError, match="took too long"), Database(database).transaction(seconds=1) as cursor:
        cursor.execute("SELECT pg_sleep(5)")


def test_an_old_database_is_brought_forward(database):
    """What version 1 of this project left: its collection, its document and its passage are all there afterwards."""
    import psycopg2

    admin = psycopg2.connect(database)
    admin.autocommit = True
    admin.cursor().execute("CREATE DATABASE old")
    url = database.replace("/postgres?", "/old?")
    with Database(url).transaction() as cursor:
        cursor.execute(MIGRATIONS[0])
        cursor.execute("INSERT INTO rag.collections (name, embedding_model, dimension) VALUES ('mine', 'steered', 2)")
        cursor.execute("INSERT INTO rag.documents (collection, source, fingerprint) VALUES (1, 'a.md', 'f')")
        cursor.execute(
            "CREATE TABLE rag.passages_1 (id bigserial PRIMARY KEY, document bigint NOT NULL REFERENCES rag.documents "
            "ON DELETE CASCADE, text text NOT NULL, metadata jsonb NOT NULL, embedding halfvec(2) NOT NULL, "
            "words tsvector GENERATED ALWAYS AS (to_tsvector('english', text)) STORED)"
        )
        cursor.execute(
            "INSERT INTO rag.passages_1 (document, text, metadata, embedding) "
            "VALUES (1, '0 kept', '{\"heading\": \"Crew\"}', '[1,0]')"
        )
    store = open_store(url, "mine")
    assert store.find("crew", 1, mode="hybrid")[0].metadata["ranks"] == {"dense": 1, "lexical": 1}
    store.put_document(Entry("b.md", "1"), [Document("5 new", metadata={"source": "b.md"})])
    assert [entry.source for entry in store.documents()] == ["a.md", "b.md"]
    with store.database.transaction() as cursor:
        cursor.execute("UPDATE rag.schema SET version = 99")
    with pytest.raises(UserError, match="schema version 99"):
        open_store(url, "mine")


def test_a_database_of_version_2_keeps_its_words_and_its_index(database, monkeypatch, capsys):
    """English words as before, now with identifiers; copies take one place; the index of embeddings is there."""
    import psycopg2

    admin = psycopg2.connect(database)
    admin.autocommit = True
    admin.cursor().execute("CREATE DATABASE second")
    url = database.replace("/postgres?", "/second?")
    with Database(url).transaction() as cursor:
        for statements in (*MIGRATIONS[:2], "UPDATE rag.schema SET version = 2"):
            cursor.execute(statements)
        cursor.execute(
            "INSERT INTO rag.collections (name, embedding_model, dimension, refusal_threshold) "
            "VALUES ('mine', 'steered', 2, 0.5), ('empty', 'steered', 2, NULL)"
        )
        cursor.execute("INSERT INTO rag.documents (collection, source, fingerprint) VALUES (1, 'a.md', 'f')")
        for n in (1, 2):
            cursor.execute(
                f"CREATE TABLE rag.passages_{n} (id text PRIMARY KEY, document bigint NOT NULL "
                "REFERENCES rag.documents ON DELETE CASCADE, text text NOT NULL, metadata jsonb NOT NULL, "
                "embedding halfvec(2) NOT NULL, words tsvector GENERATED ALWAYS AS "
                "(to_tsvector('english', coalesce(metadata->>'heading', '') || ' ' || text)) STORED)"
            )
        cursor.execute(
            "INSERT INTO rag.passages_1 (id, document, text, metadata, embedding) SELECT n::text, 1, "
            "CASE WHEN n < 3 THEN 'The crew''s code ERR-1042' ELSE 'text ' || n END, "
            "jsonb_build_object('source', n || '.md', 'heading', 'Watches'), '[1,0]' FROM generate_series(1, 50) n"
        )
        cursor.execute("CREATE INDEX passages_1_dense ON rag.passages_1 USING hnsw (embedding halfvec_cosine_ops)")
        cursor.execute("CREATE INDEX passages_1_words ON rag.passages_1 USING gin (words)")
    store = open_store(url, "mine")
    assert "Making the words of 50 passages anew (once)" in capsys.readouterr().err
    assert (store.language, store.refusal_threshold) == ("en", 0.5) and store.is_indexed()
    for question in ("Which crew?", "error 1042", "watch"):
        assert store.find(question, 50, mode="lexical")[0].metadata["also_in"] == ["2.md"]
    store.choose_language("de")
    assert store.language == "en"
    open_store(url, "empty").add_texts(["0 new"], [{"source": "b.md"}])
    assert "anew" not in capsys.readouterr().err


def test_servers_elsewhere_should_be_verified():
    assert is_unprotected("postgresql://u@db.example/x") and is_unprotected(
        "postgresql://u@db.example/x?sslmode=require"
    )
    assert not is_unprotected("postgresql://u@db.example/x?sslmode=verify-full")
    assert not is_unprotected("postgresql://u@localhost/x") and not is_unprotected("postgresql:///x?host=/tmp/pg")
