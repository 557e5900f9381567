"""Directories for servers: made with the right owner and mode, and short enough for a socket."""

from __future__ import annotations

import os
import re
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from .errors import EmbeddedError

PORT = "5432"
SOCKET = f".s.PGSQL.{PORT}"
# sun_path holds 104 bytes on macOS and 108 on Linux, with the closing NUL.
_SOCKET_PATH_BYTES = 103


def make_base(base: Path) -> Path:
    """Make the directory that a user named, and return its absolute path."""
    base = Path(base).resolve()
    base.mkdir(parents=True, exist_ok=True)
    return base


def temporary_base() -> Path:
    """Make a directory for a server that is removed with it."""
    if os.geteuid() != 0:
        return Path(tempfile.mkdtemp(prefix="pgbackend-")).resolve()
    # Not in TMPDIR, which may be root's own; and 0711, for the server's user to get through.
    base = Path(tempfile.mkdtemp(prefix="pgbackend-", dir="/tmp")).resolve()
    base.chmod(0o711)
    return base


def own_dir(path: Path, mode: int) -> None:
    """Make a directory for this user alone, or raise if the path is another user's or no directory.

    Its parents exist.
    """
    with suppress(FileExistsError):
        path.mkdir(mode=mode)
    info = path.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid():
        raise EmbeddedError(
            f"{path} is not a directory of this user: use another directory as base, or delete it"
        )
    if stat.S_IMODE(info.st_mode) != mode:  # the umask may have narrowed it
        path.chmod(mode)


def socket_fits(run: Path) -> bool:
    """Return whether the path of a socket in this directory is short and plain enough."""
    # The server splits its list of directories, and libpq its list of hosts, at commas.
    path = str(run / SOCKET)
    return len(path) <= _SOCKET_PATH_BYTES and bool(re.fullmatch(r"[A-Za-z0-9/._+@-]+", path))
