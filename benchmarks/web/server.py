"""Runs a server process: one stack, from its start to its end."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, Self

from .apps import given
from .environment import ROOT
from .stacks import THREADS, Stack

_READY_SECONDS = 60.0
_STOP_SECONDS = 5.0
#: More connections than the clients of any measurement; a keep-alive that outlasts one.
_BACKLOG, _CLIENTS, _KEEP_ALIVE = 4096, 20_000, 900
_APPS = "benchmarks.web.apps"
_ASGI = {
    "django": f"{_APPS}.on_django.asgi:application",
    "starlette": f"{_APPS}.on_starlette.application:application",
}


class ServerError(RuntimeError):
    """Says that a server did not start, or ended; has the end of its log."""


class Server:
    """Runs one stack on a port of its own.

    Attributes:
        pid: of the one process that answers requests.
    """

    def __init__(self, stack: Stack, python: Path, database: Mapping[str, Any], log: Path) -> None:
        self.stack = stack
        self.port = _free_port()
        # A name of its own keeps the sessions of a server that has just ended out of the count.
        self.application_name = f"bench-{stack.name}-{self.port}"
        self._log = log
        self._begun_at = log.stat().st_size if log.exists() else 0
        told = given.as_environment(stack.settings, database, self.application_name)
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [str(python), *_command(stack, self.port)],
                cwd=ROOT,
                env={**_clean_environment(), **told},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> Self:
        deadline = time.monotonic() + _READY_SECONDS
        while not self._accepts():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise ServerError(f"{self.stack.name} did not start:\n{self.said()}")
            time.sleep(0.05)
        self.ask("/one/1")
        self.pid = self._find_worker()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _accepts(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True

    def _find_worker(self) -> int:
        """Return the id of the server process, or of the one that it has started to do the work."""
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(children[0]) if children else pid

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:  # threads may wait for a connection for long
            self._process.kill()
            self._process.wait()

    def said(self) -> str:
        """Return the end of the output of the server."""
        return self._log.read_bytes()[self._begun_at :][-3000:].decode(errors="replace")

    def memory(self, key: str = "VmRSS") -> int:
        """Return the resident memory in kB; with ``VmHWM``, its greatest value so far."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1])
        raise ServerError(f"{self.stack.name} has ended:\n{self.said()}")

    def ask(self, path: str, method: str = "GET") -> bytes:
        """Send one request, on a connection of its own; return the body of the answer."""
        with _http(self.port) as connection:
            connection.request(method, path)
            response = connection.getresponse()
            body = response.read()
        if response.status != 200:
            raise ServerError(
                f"{self.stack.name} answers {path} with {response.status}:\n{self.said()}"
            )
        return body

    def ask_json(self, path: str, method: str = "GET") -> Any:
        return json.loads(self.ask(path, method))


@contextmanager
def _http(port: int) -> Iterator[HTTPConnection]:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        yield connection
    finally:
        connection.close()


def _command(stack: Stack, port: int) -> list[str]:
    if stack.kind == "wsgi":
        return [
            *(
                "-m",
                "gunicorn",
                f"{_APPS}.on_django.wsgi:application",
                "--bind",
                f"127.0.0.1:{port}",
            ),
            *("--workers", "1", "--worker-class", "gthread", "--threads", str(THREADS)),
            # A parser in C, as the other servers have.
            *("--http-parser", "fast", "--no-control-socket", "--log-level", "warning"),
            *("--backlog", str(_BACKLOG), "--keep-alive", str(_KEEP_ALIVE)),
            *("--worker-connections", str(_CLIENTS)),
        ]
    return [
        *("-m", "uvicorn", _ASGI[stack.kind], "--host", "127.0.0.1", "--port", str(port)),
        *("--loop", "uvloop", "--http", "httptools", "--no-access-log", "--log-level", "warning"),
        *("--backlog", str(_BACKLOG), "--timeout-keep-alive", str(_KEEP_ALIVE)),
    ]


def _clean_environment() -> dict[str, str]:
    """Return this process's environment, without the variables that would change a server."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PG", "PYTHON", "DJANGO_", "DATABASE_URL", "UVICORN_", "VIRTUAL_"))
    }
    settings = f"{_APPS}.on_django.settings"
    return {**kept, "PYTHONPATH": str(ROOT), "DJANGO_SETTINGS_MODULE": settings}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
