"""Tests C19 with real sockets: slow clients by the hundred, and clients that hang up."""

from __future__ import annotations

import asyncio
import resource
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import uvicorn
from django.db import connection, connections
from django.http import FileResponse, HttpRequest, HttpResponse, StreamingHttpResponse
from django.urls import path

import pgbackend
from tests.conftest import Runner, wait_for
from tests.library.models import Author, Tag
from tests.support.fixtures import _no_signals, pool_of_default

CLIENTS, POOL_SIZE, QUICK = 500, 5, 100
#: Larger than all buffers between the view and a client that reads nothing.
PIECES, PIECE = 48, 16 * 1024


class Counts:
    """Counts the streams and files that the views have begun and closed."""

    def __init__(self) -> None:
        self.begun = self.closed = self.steps = 0


counts = Counts()


def _pieces() -> Iterator[str]:
    """Yield pieces, each from a statement of its own, which has a lease of its own."""
    try:
        for _ in range(PIECES):
            with connection.cursor() as cursor:
                cursor.execute("SELECT repeat('x', %s)", [PIECE])
                (piece,) = cursor.fetchone()
            counts.steps += 1
            yield piece
    finally:
        counts.closed += 1


def stream(request: HttpRequest) -> StreamingHttpResponse:
    counts.begun += 1
    return StreamingHttpResponse(_pieces())


class _File:
    """Wraps an open file, and counts its end."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self.closed = False

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            counts.closed += 1
            self._file.close()


large: list[Path] = []


def file(request: HttpRequest) -> FileResponse:
    counts.begun += 1
    return FileResponse(_File(large[0]), content_type="text/plain")


def quick(request: HttpRequest) -> HttpResponse:
    Tag.objects.create(name=request.GET["name"])
    return HttpResponse(f"{Tag.objects.filter(name=request.GET['name']).count()}")


def writes_and_sleeps(request: HttpRequest) -> HttpResponse:
    Author.objects.create(name="undone")
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_sleep(30), 'whole stack'")
    return HttpResponse()


class Urls:
    urlpatterns = [
        path("stream/", stream),
        path("file/", file),
        path("quick/", quick),
        path("sleeps/", writes_and_sleeps),
    ]


@pytest.fixture(autouse=True)
def _project(settings: Any, tmp_path: Path) -> Iterator[None]:
    settings.ROOT_URLCONF = Urls
    settings.MIDDLEWARE = [f"{__name__}.sync_middleware"]
    settings.ALLOWED_HOSTS = ["*"]
    (tmp_path / "large").write_bytes(b"x" * (PIECES * PIECE))
    large[:] = [tmp_path / "large"]
    counts.__init__()  # type: ignore[misc]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 4096), hard), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def sync_middleware(get_response: Any) -> Any:
    def middleware(request: Any) -> Any:
        return get_response(request)

    return middleware


@asynccontextmanager
async def serving() -> AsyncIterator[int]:
    """Serve the whole stack with uvicorn on the running loop; yield its port."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * 1024)
        sock.bind(("127.0.0.1", 0))
        sock.listen(1024)
        application = pgbackend.get_asgi_application()
        config = uvicorn.Config(application, lifespan="off", log_level="warning", backlog=1024)
        server = uvicorn.Server(config)
        server.capture_signals = _no_signals  # type: ignore[method-assign]
        task = asyncio.create_task(server.serve(sockets=[sock]))
        try:
            yield sock.getsockname()[1]
        finally:
            server.should_exit = True
            await task


async def ask(port: int, page: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send a request by a client with a small buffer, which reads nothing by itself."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=1024)
    writer.write(
        b"GET /%s/ HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" % page.encode()
    )
    return reader, writer


async def until(condition: Any, what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}; {vars(counts)}"
        await asyncio.sleep(0.02)


@pytest.mark.slow
def test_500_slow_clients_keep_nobody_waiting_and_nothing_open(
    run: Runner, threads: list[str]
) -> None:
    """Half of them hang up in the end, and half read all; other requests are served meanwhile."""

    async def main() -> None:
        async with serving() as port:
            pages = ["stream", "file"] * (CLIENTS // 2)
            clients = [await ask(port, page) for page in pages]
            await until(lambda: counts.begun == CLIENTS, "all clients are served")
            steps = -1
            while steps != counts.steps:  # until all buffers are full
                steps = counts.steps
                await asyncio.sleep(0.3)
            assert counts.closed == 0
            assert steps < CLIENTS // 2 * PIECES // 2
            await _ask_quickly(port)
            assert (counts.closed, counts.steps) == (0, steps)
            (record,) = pgbackend.statistics()
            assert (record.leased, record.size <= POOL_SIZE) == (0, True)
            gone, staying = clients[: CLIENTS // 2], clients[CLIENTS // 2 :]
            for _, writer in gone:
                writer.transport.abort()
            await asyncio.gather(*(_read_all(*client) for client in staying))
            await until(lambda: counts.closed == CLIENTS, "all streams and files are closed")
        (record,) = pgbackend.statistics()
        assert (record.leased, record.size <= POOL_SIZE) == (0, True)

    with pool_of_default(max_size=POOL_SIZE, timeout=20):
        run(main(), timeout=120)
    assert threads == []


async def _ask_quickly(port: int) -> None:
    """Send other requests; each is answered, and none waits for the slow clients."""
    limits = httpx.Limits(max_connections=20)
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{port}", timeout=10, trust_env=False, limits=limits
    ) as client:
        names = [f"quick {n}" for n in range(QUICK)]
        answers = await asyncio.gather(
            *(client.get("/quick/", params={"name": name}) for name in names)
        )
    assert [answer.text for answer in answers] == ["1"] * QUICK


async def _read_all(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)
    received = 0
    while data := await reader.read(2**16):
        received += data.count(b"x")
    assert received >= PIECES * PIECE
    writer.close()


def test_a_client_that_hangs_up_rolls_its_transaction_back(
    run: Runner,
    threads: list[str],
    monkeypatch: pytest.MonkeyPatch,
    admin: psycopg.Connection[Any],
) -> None:
    monkeypatch.setitem(connections.settings["default"], "ATOMIC_REQUESTS", True)

    def sleeps() -> int:
        query = "SELECT FROM pg_stat_activity WHERE state = 'active' AND query LIKE %s"
        return admin.execute(query, ["SELECT pg_sleep(30), 'whole%"]).rowcount

    async def main() -> None:
        async with serving() as port:
            _, writer = await ask(port, "sleeps")
            await until(sleeps, "the statement runs")
            writer.transport.abort()
            await until(lambda: not sleeps(), "the statement is cancelled", 5)
            await until(
                lambda: not any(record.leased for record in pgbackend.statistics()), "it is over"
            )
            assert not await Author.objects.aexists()

    run(main())
    assert threads == []
    wait_for(lambda: not sleeps(), "no statement is left")
