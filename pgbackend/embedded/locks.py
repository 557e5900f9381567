"""Locks between processes: files of a server's directory, locked with ``flock``.

# Note [Locks]
Who uses a server and whether one runs is known from ``flock`` alone, since the kernel drops those
locks however a process ends, and a process number proves nothing after a crash or a reboot:

- ``users.lock``  shared by each user; a process that holds it exclusively knows that no user is
  left.
- ``start.lock``  exclusive while a server is started or stopped.
- ``keeper.lock`` exclusive, held by the one keeper that waits for the users to go.
- ``server.lock`` inherited by ``postgres`` and its children; free means that none of them lives.

A keeper is a process in a session of its own: it starts the server, waits for ``users.lock`` and
stops the server. So a user that is killed, even in the middle of the start, leaves no server.
Order: ``users.lock`` before ``start.lock``; under ``start.lock`` nobody waits for ``users.lock``.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path


def open_lock(path: Path) -> int:
    """Open a lock file, made if missing, and return its descriptor; closing it drops the lock."""
    # os.open makes it non-inheritable: a program started by a user must not count as a user.
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)


@contextmanager
def locked(path: Path, how: int) -> Generator[int, None, None]:
    """Wait for a lock, ``LOCK_SH`` or ``LOCK_EX``, and hold it for the block."""
    fd = open_lock(path)
    try:
        fcntl.flock(fd, how)
        yield fd
    finally:
        os.close(fd)


@contextmanager
def locked_or_none(path: Path) -> Generator[int | None, None, None]:
    """Hold a lock exclusively for the block, or yield None if another process holds it."""
    fd = open_lock(path)
    try:
        yield fd if try_lock(fd, fcntl.LOCK_EX) else None
    finally:
        os.close(fd)


def try_lock(fd: int, how: int) -> bool:
    """Take a lock if no other process stands against it; return whether it was taken."""
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_at(fd: int, path: Path) -> bool:
    """Return whether `path` still names this open file.

    It does not when a throwaway directory was removed, or replaced, since the file was opened.
    """
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except FileNotFoundError:
        return False
