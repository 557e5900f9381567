"""Starts real servers, each a process on a port of its own, as their documentation shows."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

from django.db import connection

from tests.support.ports import free_port

ASGI, WSGI = "tests.contract.servers.asgi:application", "proj.wsgi:application"
GREEN = "tests.contract.servers.asgi_green:application"
BARE = "tests.contract.servers.asgi_bare:application"
SETTINGS = "tests.contract.servers.settings"
#: Words that must not be in a process's output when it ends.
COMPLAINTS = (
    "Traceback", "never awaited", "was destroyed", "Exception ignored", "ResourceWarning",
    "unclosed", "was never", "pool", "rror",
)  # fmt: skip


@dataclass
class Kind:
    """Describes how to start a server, what it serves, and how to end it."""

    command: str
    end: signal.Signals = signal.SIGTERM
    asgi: bool = True
    websockets: bool = True
    settings: str = SETTINGS
    sync_views: str = "in a thread"
    """The places where they run under ASGI."""
    sync_sessions: int = 0
    """How many it keeps for sync code of its own."""

    def argv(self, port: int) -> list[str]:
        words = self.command.format(port=port, ASGI=ASGI, WSGI=WSGI, GREEN=GREEN, BARE=BARE)
        return [sys.executable, "-m", *words.split()]


_BIND = "--bind 127.0.0.1:{port}"
_HOST = "--host 127.0.0.1 --port {port}"
KINDS = {
    "runserver": Kind("django runserver --noreload 127.0.0.1:{port}", signal.SIGINT, asgi=False),
    "runserver of daphne": Kind(
        "django runserver --noreload 127.0.0.1:{port}",
        signal.SIGINT,
        settings="tests.contract.servers.settings_daphne",
        sync_sessions=1,  # of the command, which looks for migrations
    ),
    "daphne": Kind("daphne -b 127.0.0.1 -p {port} {ASGI}"),
    "uvicorn": Kind(f"uvicorn {_HOST} --loop asyncio --ws wsproto {{ASGI}}"),
    "uvicorn on uvloop": Kind(
        f"uvicorn {_HOST} --loop uvloop --ws wsproto {{ASGI}}", signal.SIGINT
    ),
    "uvicorn of the whole stack": Kind(
        f"uvicorn {_HOST} --loop asyncio --ws wsproto {{GREEN}}", sync_views="on the loop"
    ),
    "hypercorn": Kind(f"hypercorn {_BIND} {{ASGI}}"),
    "granian": Kind(f"granian --interface asgi {_HOST} --loop asyncio {{ASGI}}"),
    "granian of WSGI": Kind(
        f"granian --interface wsgi {_HOST} --blocking-threads 4 {{WSGI}}", asgi=False
    ),
    "gunicorn with threads": Kind(f"gunicorn {_BIND} --threads 4 {{WSGI}}", asgi=False),
}


class Server:
    """Runs one server, whose sessions have its name as application_name."""

    def __init__(self, name: str, folder: Path, kind: Kind | None = None) -> None:
        self.kind = kind or KINDS[name]
        self.name = name
        self.port = free_port()
        self.output = folder / f"{name.replace(' ', '-')}.txt"
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                self.kind.argv(self.port),
                env=environment(name, self.kind.settings),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.output.read_text()
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", self.port)) == 0

    def tell_to_end(self) -> None:
        self.process.send_signal(self.kind.end)

    def kill(self) -> None:
        """Kill the server and its children, whatever state they are in."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def complaints(self) -> list[str]:
        lines = self.output.read_text().splitlines()
        return [
            line
            for line in lines
            if any(word in line for word in COMPLAINTS)
            # Django's runserver does not close the socket on which it has listened.
            and f"laddr=('127.0.0.1', {self.port})" not in line
            and "Enable tracemalloc" not in line
        ]


def environment(name: str, settings: str = SETTINGS) -> dict[str, str]:
    """Return the environment of a process that uses the database of the tests."""
    entry = connection.settings_dict
    parts = {key.lower(): entry[key] for key in ("HOST", "PORT", "USER", "PASSWORD")}
    query = {key: value for key, value in parts.items() if value}
    return {
        **os.environ,
        "DATABASE_URL": f"postgresql:///{entry['NAME']}?{urlencode(query)}",
        "DJANGO_SETTINGS_MODULE": settings,
        "PGAPPNAME": name,
        "PYTHONPATH": os.getcwd(),
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "default::ResourceWarning,default::RuntimeWarning",
    }
