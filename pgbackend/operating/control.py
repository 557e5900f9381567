"""A socket by which `manage.py pgbackend status` and `dump` ask this process.

A daemon thread answers, so also while the code of an event loop hangs. The socket is opened when
the process begins to serve: with its first async pool, or its first request under WSGI. It is not
opened while Django starts: a server may fork its workers then, which is unsafe beside threads, and
most commands serve nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import socket
import struct
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from django.core.handlers.wsgi import WSGIHandler
from django.core.signals import request_started

from pgbackend import conf
from pgbackend.driver import loops
from pgbackend.driver.dump import text as dump
from pgbackend.driver.forks import after_fork

from . import directory, report

logger = logging.getLogger("pgbackend.operating")

#: Seconds that a client has to send its question, and to read the answer.
PATIENCE = 2.0
#: A question is one of these words, and a line feed.
STATUS, DUMP = b"status", b"dump"

_lock = threading.Lock()
_serving: _Server | None = None
#: Whether the process has tried to open its socket; a failure is told once.
_tried = False
#: Whether the first request of a WSGI server is waited for.
_waits_for_request = False


def start_when_serving() -> None:
    """Open the socket at the first async pool, or the first request of a WSGI server."""
    global _waits_for_request  # noqa: PLW0603 - of the process
    if conf.control_directory() is None or not hasattr(socket, "AF_UNIX"):
        return
    if start not in loops.when_opened:
        loops.when_opened.append(start)
    request_started.connect(_request_started, sender=WSGIHandler, dispatch_uid=_UID)
    _waits_for_request = True


_UID = "pgbackend.operating.control"


def _request_started(**kwargs: object) -> None:
    start()


def start() -> None:
    """Open the socket of this process, and answer on it in a thread; do nothing if it is open.

    Workers that serve no requests and use no async pool, such as those of Celery, may call it. If
    the socket cannot be opened, that is logged, once.
    """
    global _serving, _tried  # noqa: PLW0603 - a process has one socket
    if _tried:
        return
    with _lock:
        if _has_tried():  # another thread, meanwhile
            return
        _tried = True
        _wait_no_longer()
        try:
            _serving = _Server(directory.to_serve_in())
        except (OSError, directory.Unusable) as exc:
            logger.warning("manage.py pgbackend status cannot ask this process: %s", exc)


def _has_tried() -> bool:
    return _tried


def _wait_no_longer() -> None:
    """Disconnect the receiver: with one that is not Django's, each request takes more steps."""
    global _waits_for_request  # noqa: PLW0603 - as above
    if _waits_for_request:  # not in a forked child: a lock of the signal may be held there
        _waits_for_request = False
        request_started.disconnect(sender=WSGIHandler, dispatch_uid=_UID)


def stop() -> None:
    """Close the socket of this process and remove its file; a later `start()` opens another."""
    global _serving, _tried
    with _lock:
        if _serving is not None:
            _serving.close()
        _serving, _tried = None, False


atexit.register(stop)


@after_fork
def _start_anew() -> None:
    """Close the parent's socket in a forked child, and open one of the child's own.

    While the child had a copy of the parent's socket, nobody would notice that the parent is gone.
    """
    global _lock, _serving, _tried
    inherited, _lock = _serving, threading.Lock()
    _serving, _tried = None, False
    if inherited is not None:
        inherited.listening.close()
        start()


class _Server:
    """Answers on the socket of this process, in a thread of its own."""

    def __init__(self, within: Path) -> None:
        remove_stale(within)
        self._path = within / f"{os.getpid()}{directory.SUFFIX}"
        self._pid = os.getpid()
        self._since = time.time()
        self.listening = _listen_at(self._path)
        threading.Thread(target=self._serve, name="pgbackend.control", daemon=True).start()

    def close(self) -> None:
        """Remove the file, and end the thread."""
        if os.getpid() != self._pid:
            return
        with contextlib.suppress(OSError):
            self._path.unlink()
        with contextlib.suppress(OSError):
            self.listening.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self.listening.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self.listening.accept()
            except OSError:
                if self.listening.fileno() < 0 or not self._path.exists():
                    return  # closed
                time.sleep(PATIENCE)  # the process has no file left to open
                continue
            with client:
                try:
                    self._answer(client)
                except Exception:
                    logger.debug("a client of the socket got no answer", exc_info=True)

    def _answer(self, client: socket.socket) -> None:
        client.settimeout(PATIENCE)
        question = _read_line(client)  # unread, it would be an error for who is refused
        if (peer := _user_of(client)) not in {None, 0, os.geteuid()}:
            logger.warning("the user %s was refused at %s", peer, self._path)
            return
        client.sendall(self._text(question).encode(errors="backslashreplace"))

    def _text(self, question: bytes) -> str:
        try:
            if question == DUMP:
                return dump() + report.threads()
            if question == STATUS:
                return json.dumps(report.of_this_process(self._since))
        except Exception:
            return f"pgbackend could not answer: {traceback.format_exc()}"
        return f"pgbackend does not know the question {question!r}"


def _listen_at(path: Path) -> socket.socket:
    """Return a socket that listens at `path`, which appears only when clients can connect."""
    new = path.with_name(f"{path.name}.new")
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        new.unlink(missing_ok=True)
        listening.bind(str(new))
        new.chmod(0o600)
        listening.listen(16)
        new.rename(path)
    except BaseException:
        listening.close()
        raise
    return listening


def _read_line(client: socket.socket) -> bytes:
    """Return the client's line without its end; a line of more than some bytes is cut."""
    line = b""
    while not line.endswith(b"\n") and len(line) < 16 and (more := client.recv(16)):
        line += more
    return line.strip()


def _user_of(client: socket.socket) -> int | None:
    """Return the user id of the process at the other end; None where the system does not tell.

    There, the directory alone keeps other users out.
    """
    wanted: Any = getattr(socket, "SO_PEERCRED", None)
    if wanted is None:
        return None
    size = struct.calcsize("3i")
    _, uid, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, wanted, size))
    return int(uid)


def remove_stale(within: Path) -> None:
    """Remove the sockets of processes that have ended without removing theirs."""
    for path in within.glob(f"*{directory.SUFFIX}"):
        if is_stale(path):
            path.unlink(missing_ok=True)


def is_stale(path: Path) -> bool:
    """Return whether nobody listens at `path`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(0)
        try:
            client.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:  # its queue is full, for example
            return False
    return False
