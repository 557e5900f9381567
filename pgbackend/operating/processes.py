"""Asks other processes of this project for their state, by their sockets (control.py)."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pgbackend import conf

from . import control, directory

#: Seconds that a process has to answer. Its thread answers at once, unless it cannot run.
PATIENCE = 5.0


class NoAnswer(Exception):  # noqa: N818 - its message says the cause and the cure
    """Raised for a process that cannot be asked, or does not answer."""


def status(pid: int) -> dict[str, Any]:
    """Return the state of the process `pid`, as report.py makes it."""
    text = _ask(_socket_of(pid), control.STATUS)
    try:
        answer = json.loads(text)
    except ValueError:
        raise NoAnswer(f"process {pid} answers: {text.strip() or 'nothing'}") from None
    return dict(answer)


def dump(pid: int) -> str:
    """Return the text of `pgbackend.dump()` of the process `pid`."""
    return _ask(_socket_of(pid), control.DUMP)


def running() -> Iterator[int]:
    """Yield the process ids of this user's processes that have a socket, in order."""
    require_sockets()
    found = set()
    for within in directory.to_look_in(os.geteuid()):
        directory.check(within, os.geteuid())
        control.remove_stale(within)
        for path in within.glob(f"*{directory.SUFFIX}"):
            if path.stem.isdecimal():
                found.add(int(path.stem))
    yield from sorted(found)


def require_sockets() -> None:
    """Raise `NoAnswer` where there are no Unix sockets, or the setting allows none."""
    if not hasattr(socket, "AF_UNIX") or sys.platform == "win32":
        raise NoAnswer(
            "a running process is asked by a Unix socket, which this system does not have: "
            "call pgbackend.statistics() or pgbackend.dump() in a view of the process"
        )
    if conf.control_directory() is None:
        raise NoAnswer(
            "PGBACKEND_CONTROL_DIR is False, so no process of this project can be asked: remove "
            "the setting, and restart the process"
        )


def _socket_of(pid: int) -> Path:
    """Return the path of the socket of the process `pid`."""
    require_sockets()
    owner = _owner_of(pid)
    for within in directory.to_look_in(owner):
        path = within / f"{pid}{directory.SUFFIX}"
        try:
            if not path.exists():
                continue
        except PermissionError:
            continue
        directory.check(within, owner)
        return path
    raise NoAnswer(_why_none(pid, owner))


def _owner_of(pid: int) -> int:
    """Return the user id of the process `pid`; this user's where the system does not tell."""
    try:
        os.kill(pid, 0)  # sends no signal: only asks whether the process exists
    except (ProcessLookupError, OverflowError):
        raise NoAnswer(
            f"there is no process {pid} here: 'manage.py pgbackend status --all' lists those that "
            "can be asked. A process in a container is asked from within the container"
        ) from None
    except PermissionError:
        pass
    try:
        # Not the owner of the directory: that is root if the process has changed its user.
        status = Path(f"/proc/{pid}/status").read_text()
        return int(_EFFECTIVE_USER.findall(status)[0])
    except (OSError, IndexError):
        return os.geteuid()


_EFFECTIVE_USER = re.compile(r"^Uid:\s+\d+\s+(\d+)", re.MULTILINE)


def _why_none(pid: int, owner: int) -> str:
    if owner != os.geteuid() and os.geteuid() != 0:
        return (
            f"process {pid} belongs to the user {owner}: run the command as that user, or as root"
        )
    return (
        f"process {pid} has no socket of pgbackend's. Either 'pgbackend' is not in its "
        "INSTALLED_APPS, or it has served no request and opened no async pool yet, or it has "
        "another PGBACKEND_CONTROL_DIR, XDG_RUNTIME_DIR or TMPDIR than this command (systemd's "
        "PrivateTmp gives a service its own): let PGBACKEND_CONTROL_DIR name a directory"
    )


def _ask(path: Path, question: bytes) -> str:
    """Send `question` to the process that listens at `path`; return its whole answer."""
    pid = path.stem
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(PATIENCE)
        try:
            client.connect(str(path))
            client.sendall(question + b"\n")
            answer = b"".join(iter(lambda: client.recv(65536), b""))
        except ConnectionRefusedError:
            _remove_stale(path)
            raise NoAnswer(
                f"process {pid} has no socket any more: it was ended, or has forked and lost it"
            ) from None
        except TimeoutError:
            raise NoAnswer(
                f"process {pid} does not answer within {PATIENCE:g} s: it is stopped, or C code "
                "in it holds Python's lock (GIL). 'py-spy dump --native --pid "
                f"{pid}' shows where"
            ) from None
        except OSError as exc:
            raise NoAnswer(f"process {pid} cannot be asked: {exc.strerror}") from None
    if not answer:
        raise NoAnswer(f"process {pid} refuses to answer the user {os.geteuid()}")
    return answer.decode(errors="replace")


def _remove_stale(path: Path) -> None:
    if stat.S_ISSOCK(path.lstat().st_mode):
        path.unlink(missing_ok=True)


def all_running() -> list[dict[str, Any]]:
    """Return the state of each of this user's processes; the error of each that does not answer."""
    found = []
    for pid in running():
        try:
            found.append(status(pid))
        except NoAnswer as exc:
            found.append({"pid": pid, "error": str(exc)})
    return found
