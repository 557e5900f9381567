"""Tests C1 under real servers: each is a process, and answers many requests at once."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psycopg
import pytest
import websocket

from tests.conftest import wait_for
from tests.contract.servers.running import KINDS, Server, environment
from tests.library.models import Author, Book, Tag

REQUESTS = 40
MAX_SIZE = 4  # of the pool, in the tests' settings


@pytest.fixture(scope="module")
def servers(
    django_db_setup: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Server]]:
    """Start all servers at once; yield them by name."""
    folder = tmp_path_factory.mktemp("servers")
    started = {name: Server(name, folder) for name in KINDS}
    try:
        for server in started.values():
            wait_for(server.is_ready, f"{server.name} listens", seconds=40)
        yield started
    finally:
        for server in started.values():
            server.kill()


def sessions(admin: psycopg.Connection[Any], name: str) -> int:
    query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"
    (count,) = admin.execute(query, [name]).fetchone()  # type: ignore[misc]
    return int(count)


async def _ask(server: Server, count: int) -> list[Any]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=f"http://{server.address}", timeout=30, trust_env=False, limits=limits
    ) as client:
        get = client.get
        answers = await asyncio.gather(
            *(get("/contract/several/", params={"nonce": f"n{n}"}) for n in range(count))
        )
        return [answer.json() if answer.status_code == 200 else answer.text for answer in answers]


@pytest.mark.sweep(one_in=8)
@pytest.mark.parametrize("name", KINDS)
def test_concurrent_requests_get_their_own_answers(
    servers: dict[str, Server], name: str, admin: psycopg.Connection[Any]
) -> None:
    """The async view has several statements, and awaits between them, in ASGI and in WSGI."""
    with ThreadPoolExecutor(1) as executor:
        asking = executor.submit(lambda: asyncio.run(_ask(servers[name], REQUESTS)))
        most = 0
        while not asking.done():
            most = max(most, sessions(admin, name))
            time.sleep(0.002)
    answers = asking.result()
    assert [answer["nonces"] for answer in answers] == [[f"n{n}"] * 4 for n in range(REQUESTS)]
    if KINDS[name].asgi:
        assert 1 <= most <= MAX_SIZE + KINDS[name].sync_sessions
        assert len({answer["pid"] for answer in answers}) <= MAX_SIZE
    assert Book.objects.count() == Author.objects.count() == REQUESTS


@pytest.mark.parametrize("name", KINDS)
def test_a_sync_view_and_a_streaming_one_are_served(servers: dict[str, Server], name: str) -> None:
    for n in range(3):
        Book.objects.create(title=f"book {n}", author=Author.objects.create(name=f"author {n}"))
    with httpx.Client(base_url=f"http://{servers[name].address}", trust_env=False) as client:
        where = client.get("/contract/where/").text
        assert where.startswith("3 ")
        if KINDS[name].asgi:
            assert where == f"3 {KINDS[name].sync_views}"
        lines = client.get("/contract/stream/async/").text.splitlines()
        assert lines == [f"book {n} by author {n}" for n in range(3)]


WITH_WEBSOCKETS = [name for name, kind in KINDS.items() if kind.asgi and kind.websockets]


@pytest.mark.parametrize("name", WITH_WEBSOCKETS)
def test_consumers_of_channels_use_plain_querysets(servers: dict[str, Server], name: str) -> None:
    Book.objects.create(title="a", author=Author.objects.create(name="b"))
    address = servers[name].address
    text, jsons, sync = (
        websocket.create_connection(f"ws://{address}/{path}/", timeout=20)
        for path in ("text", "json", "sync")
    )
    try:
        wait_for(Tag.objects.filter(name="connected").exists, "connect() has written")
        text.send("a")
        assert text.recv() == "a by b"
        sync.send("?")
        assert sync.recv() == "a in a thread"
        jsons.send(json.dumps({"author": "c", "titles": ["d", "e", "f"]}))
        assert json.loads(jsons.recv()) == {"made": ["d", "e", "f"]}
        with httpx.Client(base_url=f"http://{address}", trust_env=False) as client:
            assert client.get("/consumer/").text == "a d e f"
    finally:
        for socket in (text, jsons, sync):
            socket.close()
    wait_for(lambda: not Tag.objects.exists(), "disconnect() has deleted")


@pytest.mark.slow
def test_servers_end_in_silence_and_leave_no_session(
    servers: dict[str, Server], admin: psycopg.Connection[Any]
) -> None:
    """The last test of this file ends all servers, by SIGTERM or SIGINT."""
    for server in servers.values():
        assert server.process.poll() is None, server.output.read_text()
        server.tell_to_end()
    for server in servers.values():
        wait_for(lambda: server.process.poll() is not None, f"{server.name} ends", 15)  # noqa: B023
    for server in servers.values():
        assert server.complaints() == [], server.output.read_text()
        wait_for(lambda: not sessions(admin, server.name), "its sessions are gone")  # noqa: B023


# --- Without a server ---------------------------------------------------------------------------


def _run(name: str, *argv: str, script: str = "") -> str:
    """Run a program that ends by itself, and return its output."""
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", *argv],
        env=environment(name),
        input=script,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


SHELL = """
import asyncio
from tests.library.models import Tag
Tag.objects.create(name="sync")
asyncio.run(Tag.objects.all().acreate(name="async"))
async def both():
    async with transaction.atomic():
        await Tag.objects.acreate(name="in a block")
    return [tag.name async for tag in Tag.objects.order_by("pk")]
from django.db import transaction
print(asyncio.run(both()), Tag.objects.count())
"""


def test_the_shell_takes_sync_and_async_orm(admin: psycopg.Connection[Any]) -> None:
    said = _run("shell", "-m", "django", "shell", script=SHELL)
    assert said.splitlines()[-1] == "['sync', 'async', 'in a block'] 3"
    wait_for(lambda: not sessions(admin, "shell"), "its session is gone")


PREFORK = """
import asyncio, os, sys
import django
from django.conf import settings
del settings.DATABASES["default"]["OPTIONS"]["pool"]  # Django's own, for threads, survives no fork
django.setup()
from django.db import connections, transaction
from tests.library.models import Author, Tag

def use(name):
    with transaction.atomic():
        Author.objects.create(name=name)
    return asyncio.run(a_use(name))

async def a_use(name):
    tag = await Tag.objects.acreate(name=name)
    await asyncio.gather(*(Author.objects.filter(name=name).acount() for _ in range(8)))
    tag = await Tag.objects.aget(pk=tag.pk)
    return [await Author.objects.filter(name=name).acount(), tag.name]

def worker(number):
    # What Celery's fix-up for Django does in a new worker: close the inherited socket's copy.
    for connection in connections.all():
        if connection.connection is not None:
            os.close(connection.connection.fileno())
        connection.close()
    for task in range(3):
        name = f"{number}.{task}"
        assert use(name) == [1, name]
    connections.close_all()

assert use("parent") == [1, "parent"]
children = []
for number in range(4):
    pid = os.fork()
    if not pid:
        try:
            worker(number)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    children.append(pid)
assert use("parent again") == [1, "parent again"]
assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4
assert Tag.objects.count() == Author.objects.count() == 14
print("done")
"""


def test_prefork_workers_use_sync_and_async_orm(admin: psycopg.Connection[Any]) -> None:
    assert _run("prefork", "-W", "ignore::DeprecationWarning", "-c", PREFORK) == "done\n"
    wait_for(lambda: not sessions(admin, "prefork"), "its sessions are gone")
