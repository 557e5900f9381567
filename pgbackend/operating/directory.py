"""The directory of the sockets by which `manage.py pgbackend` asks the user's processes.

Only its user may enter it. The setting `PGBACKEND_CONTROL_DIR` names one. Otherwise it is in the
user's runtime directory, if the environment names that, else in the directory for temporary files.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pgbackend import conf

#: The longest path of a socket that all systems take, in bytes.
LONGEST = 103
SUFFIX = ".sock"


class Unusable(Exception):  # noqa: N818 - its message says what is wrong, and the cure
    """Raised for a directory that cannot be used, or could be read by other users."""


def to_serve_in() -> Path:
    """Return the directory for this process's socket; make it if need be."""
    given = conf.control_directory()
    path = Path(given) if given else _default(os.environ.get("XDG_RUNTIME_DIR"))
    try:
        path.mkdir(mode=0o700, parents=bool(given), exist_ok=True)
    except OSError as exc:
        raise Unusable(f"cannot make the directory {path} ({exc.strerror}). {_CURE}") from None
    check(path, os.geteuid())
    return path


def to_look_in(uid: int) -> list[Path]:
    """Return the directories that exist and that processes of the user `uid` may serve in.

    A process that a supervisor has started often lacks the environment of a login; so all
    directories that it may have chosen are looked in.
    """
    return [path for path in dict.fromkeys(_candidates(uid)) if path.is_dir()]


def _candidates(uid: int) -> Iterator[Path]:
    if given := conf.control_directory():
        yield Path(given)
        return
    if uid == os.geteuid() and (runtime := os.environ.get("XDG_RUNTIME_DIR")):
        yield _default(runtime)
    yield Path(f"/run/user/{uid}/pgbackend")
    yield _temporary(uid)


def _default(runtime: str | None) -> Path:
    """Return the default directory; `runtime` may be that of another user, after ``sudo -E``."""
    with contextlib.suppress(OSError):
        if runtime and Path(runtime).stat().st_uid == os.geteuid():
            return Path(runtime) / "pgbackend"
    return _temporary(os.geteuid())


def _temporary(uid: int) -> Path:
    return Path(tempfile.gettempdir()) / f"pgbackend-{uid}"


def check(path: Path, uid: int) -> None:
    """Raise `Unusable` unless `path` is a directory of the user `uid` that nobody else may enter.

    Anybody may make a directory of that name among the temporary files before its user does.
    """
    found = path.lstat() if not conf.control_directory() else path.stat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != uid or found.st_mode & 0o077:
        raise Unusable(
            f"{path} is not a directory that only the user {uid} may enter. "
            f"Remove it, or let its user run 'chmod 700 {path}'. {_CURE}"
        )
    if len(os.fsencode(path)) + len("/4294967295.sock.new") > LONGEST:
        raise Unusable(f"the path {path} is too long for a socket. {_CURE}")


_CURE = "PGBACKEND_CONTROL_DIR may name another directory."
