"""Tests docs/deploy.md: its commands serve a project, its sums are those of the formula."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from django.db import connections

from pgbackend.operating import sums
from tests.contract.servers.running import environment
from tests.docs.snippets import ROOT, Snippet, collected
from tests.docs.tables import table_after
from tests.support.polling import wait_for
from tests.support.ports import free_port
from tests.support.processes import Program, run_all

PAGE = ROOT / "docs/deploy.md"
COMMANDS = {row["server"]: row["command"].strip("`") for row in table_after(PAGE, "## Servers")}
ASGI = [each for each in collected() if each.page == "docs/deploy.md"]

# --- The commands ---------------------------------------------------------------------------------

_SETTINGS = """
import os
from pgbackend import embedded

SECRET_KEY = "tests"
ALLOWED_HOSTS = ["127.0.0.1"]
ROOT_URLCONF = "shop.urls"
INSTALLED_APPS = ["django.contrib.contenttypes", "django.contrib.auth"]
database = embedded.database_settings(os.environ["DATABASE_URL"])
DATABASES = {"default": {"ENGINE": "pgbackend", **database}}
"""
_URLS = """
import os
from django.contrib.auth.models import User
from django.db import connection
from django.http import JsonResponse
from django.urls import path

async def users(request):
    return JsonResponse({"users": User.objects.count(), "pid": os.getpid()})

async def sleep(request):
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_sleep(30)")
    finally:
        User.objects.count()
        print("the view has cleaned up", flush=True)

urlpatterns = [path("users/", users), path("sleep/", sleep)]
"""
_CONSUMERS = "websocket_urlpatterns = []\n"


def _asgi(text: str) -> Snippet:
    """Return the page's only `asgi.py` that has a line with `text`."""
    (found,) = [
        each for each in ASGI if re.search(rf"^.*(?<!_){re.escape(text)}", each.text, re.MULTILINE)
    ]
    return found


class Served:
    """The small project of the page, served by one of its commands."""

    def __init__(self, home: Path, command: str, asgi: Snippet) -> None:
        self.name = f"deploy-{home.name}"
        self.port = free_port()
        self.output = home / "output.txt"
        shop = home / "shop"
        shop.mkdir(parents=True)
        files = {"settings": _SETTINGS, "urls": _URLS, "consumers": _CONSUMERS, "asgi": asgi.text}
        for name, text in {"__init__": "", **files}.items():
            (shop / f"{name}.py").write_text(text)
        self.process = self._start(home, command)

    def _start(self, home: Path, command: str) -> subprocess.Popen[bytes]:
        environ = environment(self.name, "shop.settings")
        programs = Path(sys.executable).parent
        environ |= {"PYTHONPATH": str(ROOT), "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
        assert "8000" in command
        with self.output.open("wb") as output:
            return subprocess.Popen(
                shlex.split(command.replace("8000", str(self.port))),
                cwd=home,
                env=environ,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def get(self) -> Any:
        """Return the answer to a request on a connection of its own; None before there is one."""
        assert self.process.poll() is None, self.output.read_text()
        try:
            url = f"http://127.0.0.1:{self.port}/users/"
            with urllib.request.urlopen(url, timeout=10) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise AssertionError(self.output.read_text()) from error
        except OSError:
            return None

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def _served(home: Path, command: str, asgi: Snippet) -> Iterator[Served]:
    served = Served(home, command, asgi)
    try:
        yield served
    finally:
        served.end()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("server", "asgi"),
    [
        *((server, "application = get_asgi_application()") for server in COMMANDS),
        ("daphne", "ProtocolTypeRouter"),
    ],
)
def test_a_command_serves_and_ends(
    tmp_path: Path, server: str, asgi: str, admin: psycopg.Connection[Any], transactional_db: None
) -> None:
    snippet = _asgi(asgi)
    processes = 1 if server in ("daphne", "hypercorn") else 2
    with _served(tmp_path / server.split(maxsplit=1)[0], COMMANDS[server], snippet) as served:
        assert wait_for(served.get, f"{server} answers", seconds=60)["users"] == 0
        pids = set[int]()
        wait_for(
            lambda: pids.add(served.get()["pid"]) or len(pids) == processes,
            f"{processes} processes answer",
            seconds=60,
        )
        served.process.send_signal(signal.SIGTERM)
        served.process.wait(30)
        assert "Traceback" not in served.output.read_text()
    query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"
    wait_for(
        lambda: admin.execute(query, [served.name]).fetchone() == (0,), "all sessions have ended"
    )


def _asleep(admin: psycopg.Connection[Any], name: str) -> bool:
    query = "SELECT FROM pg_stat_activity WHERE application_name = %s AND query ~ 'pg_sleep'"
    return admin.execute(query, [name]).fetchone() is not None


@contextmanager
def _in_flight(served: Served, admin: psycopg.Connection[Any]) -> Iterator[socket.socket]:
    """Send a request whose statement takes long, and wait until it is executed."""
    wait_for(served.get, "the server answers", seconds=60)
    with socket.create_connection(("127.0.0.1", served.port)) as client:
        client.settimeout(20)
        client.sendall(b"GET /sleep/ HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        wait_for(lambda: _asleep(admin, served.name), "the statement is executed", seconds=20)
        yield client


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asgi", "cleans_up"),
    [("lifespan", True), ("application = get_asgi_application()", False)],
)
def test_a_cancelled_request_under_uvicorn_cleans_up_if_the_application_waits(
    tmp_path: Path,
    asgi: str,
    cleans_up: bool,
    admin: psycopg.Connection[Any],
    transactional_db: None,
) -> None:
    command = COMMANDS["uvicorn"].replace("shutdown 20", "shutdown 1")
    with _served(tmp_path / "uvicorn", command, _asgi(asgi)) as served:
        with _in_flight(served, admin):
            served.process.send_signal(signal.SIGTERM)
            served.process.wait(30)
        assert ("the view has cleaned up" in served.output.read_text()) is cleans_up
    wait_for(lambda: not _asleep(admin, served.name), "its session has ended")


@pytest.mark.slow
def test_hypercorn_with_workers_kills_requests_in_flight(
    tmp_path: Path, admin: psycopg.Connection[Any], transactional_db: None
) -> None:
    """The page advises one process for each hypercorn for this reason."""
    command = f"{COMMANDS['hypercorn']} --workers 2"
    asgi = _asgi("application = get_asgi_application()")
    with (
        _served(tmp_path / "hypercorn", command, asgi) as served,
        _in_flight(served, admin) as client,
    ):
        served.process.send_signal(signal.SIGTERM)
        assert client.recv(100) == b""
        served.process.wait(30)
        assert "the view has cleaned up" not in served.output.read_text()
    wait_for(lambda: not _asleep(admin, served.name), "its session has ended")


# --- The sums -------------------------------------------------------------------------------------

ROWS = table_after(PAGE, "<!-- sums")
#: The connections that PostgreSQL's default of 100 leaves.
LIMIT = 97


@contextmanager
def _as_in(row: dict[str, str]) -> Iterator[None]:
    """Set the databases of a row of the page."""
    pool = row['`OPTIONS["pool"]`'].strip("`")
    options = {} if pool == "not set" else {"pool": json.loads(pool)}
    saved = dict(connections.settings)
    default = {**saved["default"], "OPTIONS": options}
    replica = {**default, "OPTIONS": {**options, "replica_of": "default"}}
    replicas = {f"replica{n}": replica for n in range(int(row["replicas"]))}
    connections.settings.update(default=default, **replicas)
    try:
        yield
    finally:
        connections.settings.clear()
        connections.settings.update(saved)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['the project']}, {row['processes']}")
def test_a_sum_is_that_of_the_formula(row: dict[str, str]) -> None:
    load = sums.Load(
        processes=int(row["processes"]),
        loops=int(row["loops"]),
        threads=int(row["threads"]),
        listens="`listen()`" in row["the project"],
    )
    with _as_in(row):
        each = sums.of_process("default", load).total
        replicas = [
            sums.of_process(alias, load).total
            for alias in connections.settings
            if alias.startswith("replica")
        ]
    assert each is not None
    assert replicas == [each] * int(row["replicas"])
    together = each * load.processes
    assert int(row["connections of each server"]) == together
    assert row[f"fits in {LIMIT}"].startswith("yes" if together <= LIMIT else "no: ")


_OPEN = """
import asyncio, threading
import django
django.setup()
from django.db import connection
import pgbackend
from pgbackend.metrics import connections

together = threading.Barrier({loops} + {threads} + 1)

def ask():
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")

async def on_a_loop():
    await pgbackend.aio.run(ask)
    await asyncio.to_thread(wait)

def wait():
    together.wait(30)
    together.wait(30)

def in_a_thread():
    ask()
    wait()

kinds = [lambda: asyncio.run(on_a_loop())] * {loops} + [in_a_thread] * {threads}
started = [threading.Thread(target=kind) for kind in kinds]
for thread in started:
    thread.start()
together.wait(30)
print(connections().max)
together.wait(30)
for thread in started:
    thread.join()
"""


@pytest.mark.slow
def test_the_formula_is_what_a_process_counts(tmp_path: Path, transactional_db: None) -> None:
    """Compare the sum with `pgbackend.metrics`, in a process that has so many loops and threads."""
    load = sums.Load(loops=2, threads=3)
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop/__init__.py").touch()
    (tmp_path / "shop/settings.py").write_text(_SETTINGS)
    script = "import os; os.environ['DJANGO_SETTINGS_MODULE'] = 'shop.settings'"
    script += _OPEN.format(loops=load.loops, threads=load.threads)
    url = environment("sum")["DATABASE_URL"]
    variables = {"DATABASE_URL": url, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    (done,) = run_all([Program(["-c", script], tmp_path, variables)])
    with _as_in({'`OPTIONS["pool"]`': "not set", "replicas": "0"}):
        assert int(done.check()) == sums.of_process("default", load).total
