"""A store behind a real PgBouncer: transaction mode works, statement mode is refused, and certificates are checked."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import rag
from test_store import open_store, passages

from qlora.console import UserError
from qlora.retrieval.database import Database, connect, read_url
from qlora.retrieval.feedback import Judgement
from qlora.retrieval.passage_store import Entry

PGBOUNCER = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
pytestmark = pytest.mark.skipif(not PGBOUNCER, reason="needs PgBouncer (apt install pgbouncer)")
SERVERS = 2  # connections to PostgreSQL, for any number of askers


@pytest.fixture
def pool(database):
    """start(mode, lines) -> the address of a PgBouncer before the tests' database."""
    folder, started = Path(tempfile.mkdtemp(prefix="pgb")), []
    folder.chmod(0o755)  # for root's PgBouncer, which runs as the user of the server

    def start(mode: str, *lines: str) -> str:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        given = ["[databases]", f"postgres = host={read_url(database)['host']} dbname=postgres user=postgres"]
        given += ["[pgbouncer]", "listen_addr = 127.0.0.1", f"listen_port = {port}", "unix_socket_dir =", *lines]
        given += ["auth_type = any", f"pool_mode = {mode}", f"default_pool_size = {SERVERS}"]
        file = folder / f"{port}.ini"
        file.write_text("\n".join(given) + "\n")
        user = ["-u", "pgserver"] if os.geteuid() == 0 else []
        started.append(subprocess.Popen([PGBOUNCER, *user, str(file)], stderr=subprocess.DEVNULL))
        wait_for(port)
        return f"postgresql://ada:s3cret@127.0.0.1:{port}/postgres"

    yield start
    for process in started:
        process.kill()
        process.wait()
    shutil.rmtree(folder)


def wait_for(port: int) -> None:
    for _ in range(100):
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise TimeoutError(f"nothing listens on port {port}")


def count_connections(url: str) -> int:
    """Connections to the server, with those of other tests."""
    with Database(url).transaction() as cursor:
        cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'rag_qlora'")
        return cursor.fetchone()[0]


def test_more_askers_than_connections_write_and_search(pool, database, collection):
    """No setting of one transaction is left behind for the next one, which another asker may have."""
    url, before = pool("transaction"), count_connections(database)

    def work(n: int) -> list[str]:
        store = open_store(url, collection)
        store.put_document(Entry(f"{n}.md", "1"), passages(f"text {n} one", f"text {n} two", source=f"{n}.md"))
        store.feedback().add(Judgement(f"Where is {n}?", not_in_documents=True))
        return [store.find(f"text {n} two", 1, mode=mode)[0].page_content for mode in ("dense", "hybrid") * 4]

    with ThreadPoolExecutor(4 * SERVERS) as threads:
        found = list(threads.map(work, range(4 * SERVERS)))
    assert found == [[f"text {n} two"] * 8 for n in range(4 * SERVERS)]
    assert count_connections(database) <= before + SERVERS
    direct = open_store(database, collection)
    assert len(direct.documents()) == len(direct.feedback().all()) == 4 * SERVERS


def test_statement_mode_is_refused_in_one_sentence(pool, capsys, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", pool("statement"))
    begun = time.monotonic()
    assert rag("documents") == 2 and time.monotonic() - begun < 5
    said = capsys.readouterr().err
    assert "set pool_mode = transaction" in said and "s3cret" not in said and "Traceback" not in said


def make_certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A key and a certificate for 127.0.0.1, which vouches for itself."""
    key, certificate = folder / f"{name}.key", folder / f"{name}.crt"
    words = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*words.split(), "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    key.chmod(0o644)  # root's PgBouncer runs as another user
    return key, certificate


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")
def test_a_server_proves_who_it_is(pool, collection):
    folder = Path(tempfile.mkdtemp(prefix="tls"))
    folder.chmod(0o755)
    (key, certificate), (_, other) = make_certificate(folder, "server"), make_certificate(folder, "other")
    files = f"client_tls_key_file = {key}", f"client_tls_cert_file = {certificate}"
    url = pool("transaction", "client_tls_sslmode = require", *files)
    store = open_store(f"{url}?sslmode=verify-full&sslrootcert={certificate}", collection)
    store.put_document(Entry("a.md", "1"), passages("one"))
    assert store.find("one", 1)[0].page_content == "one"
    with store.database.transaction() as cursor:
        assert store.database.connection.info.ssl_in_use and cursor is not None
    elsewhere = url.replace("127.0.0.1", "localhost")  # a name that the certificate does not have
    for address, what in (
        (f"{url}?sslmode=verify-full&sslrootcert={other}", "certificate verify failed"),
        (f"{elsewhere}?sslmode=verify-full&sslrootcert={certificate}", "does not match host name"),
        (f"{url}?sslmode=disable", "SSL required"),
    ):
        with pytest.raises(UserError, match=what) as error:
            connect(address)
        assert "s3cret" not in str(error.value.problems[0])
    shutil.rmtree(folder)
