"""A new adapter in the place of the old one: whoever loads it at any moment gets the one or the other, whole.

    release(adapter, candidate)     # the old one is adapter.previous then
    roll_back(adapter)              # and now the new one is

The two folders exchange their names in one system call (renameat2 with RENAME_EXCHANGE, Linux 3.15; ext4, xfs, btrfs,
tmpfs and overlayfs know it). What was begun is known by the names of folders, so that it is finished after a kill.
"""

import ctypes
import errno
import os
from pathlib import Path

from qlora import machine
from qlora.console import Problem, RunError, fail
from qlora.model.adapter import digest_weights, read_adapter

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of linux/fcntl.h and linux/fs.h


def beside(adapter: Path, name: str) -> Path:
    """adapter.NAME, beside the adapter."""
    return adapter.with_name(f"{adapter.name}.{name}")


def release(adapter: Path, candidate: Path) -> None:
    """Puts the candidate in the adapter's place; the adapter that was there stays as adapter.previous.

    Raises UserError for a candidate that is damaged, and RunError where the file system cannot exchange folders.
    """
    read_adapter(candidate)
    machine.remove_folder(beside(adapter, "next"))
    machine.write_whole(beside(adapter, "releasing"), digest_weights(candidate))
    candidate.rename(beside(adapter, "next"))
    finish(adapter)


def finish(adapter: Path) -> None:
    """Finishes a release that was begun; does nothing where none was."""
    mark, coming = beside(adapter, "releasing"), beside(adapter, "next")
    if not mark.is_file():
        return
    if coming.is_dir():
        if digest_weights(adapter) != mark.read_text(encoding="utf-8"):
            exchange(adapter, coming)
        machine.remove_folder(beside(adapter, "previous"))
        coming.rename(beside(adapter, "previous"))
    mark.unlink()


def roll_back(adapter: Path) -> None:
    """Exchanges the adapter and the one before it. Raises UserError where there is none."""
    finish(adapter)
    previous = beside(adapter, "previous")
    if not previous.is_dir():
        raise fail("there is no earlier adapter", str(previous), "nothing was released in its place")
    read_adapter(previous)
    exchange(adapter, previous)


def exchange(one: Path, other: Path) -> None:
    """Two folders exchange their names at once. Raises RunError where the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        what, fix = "this file system cannot exchange two folders at once", "move the adapter to a local disk"
        raise RunError(Problem(what, str(one), fix))
    raise OSError(number, os.strerror(number), str(one), None, str(other))
