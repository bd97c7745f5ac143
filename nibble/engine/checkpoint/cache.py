"""Making something in a cache directory exactly once: a lock between processes, a private directory, one rename.

What is under its final name is complete. A process that dies while it works leaves a `*.partial-*` directory, which the
next process to come by removes; the kernel releases its lock with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

_PARTIAL = ".partial-"


@contextlib.contextmanager
def exclusive(path: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock of `path` (a file `path.lock` beside it). `on_wait` is called once if another process has it."""
    with _lock_file(path).open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file releases the lock; the file stays, since removing it would let two processes in


@contextlib.contextmanager
def partial_directory(path: Path) -> Iterator[Path]:
    """A new directory beside `path` that is gone when the block is left, however it is left; rename it to keep it.

    The caller holds `exclusive(path)`, so that others like it are leftovers: they are removed, and those of other
    paths whose lock nobody holds.
    """
    _remove_leftovers(path)
    directory = path.with_name(path.name + _PARTIAL + secrets.token_hex(4))
    directory.mkdir()  # unlike tempfile's, readable to whom the user's umask says
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def publish(made: Path, path: Path) -> None:
    """Rename `made`, within one file system, and make the rename last through a power failure."""
    os.replace(made, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _lock_file(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def _remove_leftovers(held: Path) -> None:
    for leftover in held.parent.glob(f"*{_PARTIAL}*"):
        owner = held.with_name(leftover.name.rpartition(_PARTIAL)[0])
        if owner == held:
            shutil.rmtree(leftover, ignore_errors=True)
            continue
        with _lock_file(owner).open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # somebody is at work on it
            shutil.rmtree(leftover, ignore_errors=True)
