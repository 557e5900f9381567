"""Tests C19: how the whole stack sends a response, and what is left when its client hangs up."""

from __future__ import annotations

import asyncio
import gzip
import warnings
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import django
import psycopg
import pytest
from asgiref.sync import async_to_sync
from django.contrib.staticfiles.handlers import ASGIStaticFilesHandler
from django.db import connection, connections, transaction
from django.http import FileResponse, HttpRequest, HttpResponse, StreamingHttpResponse
from django.urls import path

import pgbackend
from pgbackend import aio, whole_stack
from tests.conftest import Runner, wait_for
from tests.library.models import Author, Tag
from tests.support.exchange import Exchange
from tests.support.sweep import ABANDONING, CANCELLING, Mode, Outcome, sweep

HERE = __name__

#: For tests in which the handler is cancelled or fails: that of older Djangos leaves the view, in a
#: task of its own, to itself, and the body to the garbage collector.
of_handler = pytest.mark.shortcut("handler") if django.VERSION < (6, 1) else lambda test: test
#: For coroutines that are closed or dropped: Django's handler waits for tasks, and cannot be.
ABANDONED = [pytest.param(mode, marks=pytest.mark.shortcut("handler")) for mode in ABANDONING]


@pytest.fixture(autouse=True)
def _no_thread_and_no_warning(threads: list[str]) -> Iterator[None]:
    """Fail a test that starts a thread; warnings are errors."""
    yield
    assert threads == []


@pytest.fixture
def exchange_with(settings: Any) -> Callable[..., Exchange]:
    """Return a function that makes an exchange with a new application, whose view is given."""
    settings.MIDDLEWARE = []

    def make(view: Any) -> Exchange:
        class urls:  # noqa: N801 - a module
            urlpatterns = [path("", view)]

        settings.ROOT_URLCONF = urls
        return Exchange(application=pgbackend.get_asgi_application())

    return make


ExchangeWith = Callable[..., Exchange]

#: What the iterators of the views do, in order.
steps: list[str] = []


def names() -> Iterator[str]:
    """Yield the names of the authors, and note each step; a server-side cursor is open."""
    try:
        for author in Author.objects.order_by("pk").iterator(chunk_size=1):
            steps.append(author.name)
            yield f"{author.name}\n"
    finally:
        steps.append(f"closed after {Tag.objects.count()}")


def stream(request: HttpRequest) -> StreamingHttpResponse:
    steps.clear()
    return StreamingHttpResponse(names())


@pytest.fixture
def three(transactional_db: None) -> None:
    for name in "abc":
        Author.objects.create(name=name)


# --- Streams --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("three")
def test_a_sync_iterator_is_stepped_as_its_pieces_are_sent(
    run: Runner, exchange_with: ExchangeWith
) -> None:
    """The next step is made when the client has taken the piece, and holds one connection."""

    async def main() -> None:
        exchange = Slow(exchange_with(stream))
        task = exchange.start()
        await exchange.sending.wait()
        assert steps == []
        for so_far in (["a"], ["a", "b"]):
            await exchange.take()
            assert steps == so_far
            (record,) = pgbackend.statistics()
            assert record.leased == 1
        exchange.hurry()
        await task
        assert exchange.content == b"a\nb\nc\n"
        assert steps == ["a", "b", "c", "closed after 0"]
        (record,) = pgbackend.statistics()
        assert record.leased == 0

    run(main())


class Slow(Exchange):
    """An exchange whose client takes a message when `take()` is called, and after `hurry()` all."""

    def __init__(self, exchange: Exchange) -> None:
        super().__init__(application=exchange.application)
        self.scope = exchange.scope
        self._may_take = asyncio.Semaphore(0)

    async def send(self, message: dict[str, Any]) -> None:
        self.sending.set()
        await self._may_take.acquire()
        self.sent.append(message)

    async def take(self) -> None:
        """Take one message, and wait until the handler sends the next."""
        await self.sending.wait()
        self.sending.clear()
        self._may_take.release()
        await self.sending.wait()

    def hurry(self) -> None:
        for _ in range(100):
            self._may_take.release()


@pytest.mark.parametrize("how", ["gzip", "wrapped", "map", "list", "file"])
@pytest.mark.usefixtures("three")
def test_middleware_may_wrap_a_stream(
    run: Runner, settings: Any, exchange_with: ExchangeWith, tmp_path: Path, how: str
) -> None:
    def view(request: HttpRequest) -> StreamingHttpResponse:
        if how == "map":
            return StreamingHttpResponse(map(str, names()))
        if how == "list":
            return StreamingHttpResponse([*names()])
        if how == "file":
            (tmp_path / "file").write_bytes(b"a\nb\nc\n")
            return FileResponse((tmp_path / "file").open("rb"))
        return stream(request)

    async def main() -> None:
        exchange = exchange_with(view)
        if how in ("gzip", "wrapped"):
            settings.MIDDLEWARE = [
                "django.middleware.gzip.GZipMiddleware" if how == "gzip" else f"{HERE}.wraps"
            ]
            exchange.application = pgbackend.get_asgi_application()
        exchange.scope["headers"] = [(b"accept-encoding", b"gzip")]
        await exchange.serve()
        content = gzip.decompress(exchange.content) if how == "gzip" else exchange.content
        assert content == (b"A\nB\nC\n" if how == "wrapped" else b"a\nb\nc\n")

    run(main())


def wraps(get_response: Any) -> Any:
    def middleware(request: HttpRequest) -> Any:
        response = get_response(request)
        response.streaming_content = (piece.upper() for piece in response.streaming_content)
        return response

    return middleware


def test_an_async_iterator_stays_one(run: Runner, exchange_with: ExchangeWith) -> None:
    async def pieces() -> Any:
        yield f"{await Tag.objects.acount()}"
        yield f" and {Tag.objects.count()}"

    async def main() -> None:
        exchange = exchange_with(lambda request: StreamingHttpResponse(pieces()))
        await exchange.serve()
        assert exchange.content == b"0 and 0"

    run(main())


def test_a_subclass_that_iterates_in_its_own_way_is_left_alone(
    run: Runner, exchange_with: ExchangeWith
) -> None:
    class Own(StreamingHttpResponse):
        async def __aiter__(self) -> Any:
            yield b"its own"

    async def main() -> None:
        exchange = exchange_with(lambda request: Own([b"never read"]))
        await exchange.serve()
        assert exchange.content == b"its own"

    run(main())


@of_handler
def test_an_iterator_that_fails_ends_the_request_as_in_django(
    run: Runner, exchange_with: ExchangeWith
) -> None:
    def pieces() -> Iterator[bytes]:
        with transaction.atomic():
            Tag.objects.create(name="undone")
            yield b"a"
            raise LookupError("of the stream")

    async def main() -> None:
        exchange = exchange_with(lambda request: StreamingHttpResponse(pieces()))
        with pytest.raises(LookupError, match="of the stream"):
            await exchange.serve()
        assert exchange.content == b"a"
        assert not await Tag.objects.aexists()

    run(main())


def test_an_iterator_that_never_waits_lets_the_loop_serve_others(
    run: Runner, exchange_with: ExchangeWith, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that takes each piece at once makes the request wait for nothing."""
    monkeypatch.setattr(whole_stack, "_AT_MOST", -1.0)
    turns: list[int] = []

    async def other() -> None:
        while True:
            turns.append(len(turns))
            await asyncio.sleep(0)

    async def main() -> None:
        exchange = exchange_with(lambda request: StreamingHttpResponse(["x"] * 1000))
        neighbour = asyncio.create_task(other())
        await exchange.serve()
        neighbour.cancel()
        assert len(exchange.content) == 1000

    run(main())
    assert len(turns) > 100, "a shuffled loop may put it off"


def test_a_file_is_read_in_pieces_and_closed(
    run: Runner, exchange_with: ExchangeWith, tmp_path: Path
) -> None:
    """While a slow client takes the first piece, the second is not read yet."""
    (tmp_path / "large").write_bytes(b"x" * 300_000)
    file = (tmp_path / "large").open("rb")

    async def main() -> None:
        exchange = Slow(exchange_with(lambda request: FileResponse(file)))
        task = exchange.start()
        await exchange.take()
        assert file.tell() == 2**16
        exchange.hurry()
        await task
        assert len(exchange.content) == 300_000
        assert file.closed

    run(main())


def test_djangos_handler_of_static_files_may_stand_in_front(
    run: Runner, settings: Any, exchange_with: ExchangeWith
) -> None:
    settings.STATIC_URL = "/static/"

    async def main() -> None:
        exchange = exchange_with(lambda request: HttpResponse(f"{Tag.objects.count()}"))
        exchange.application = ASGIStaticFilesHandler(exchange.application)
        await exchange.serve()
        assert exchange.content == b"0"

    run(main())


# --- Clients that hang up -------------------------------------------------------------------------


@pytest.fixture
def atomic_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(connections.settings["default"], "ATOMIC_REQUESTS", True)


@pytest.mark.usefixtures("atomic_requests")
def test_a_client_that_hangs_up_cancels_the_statement_and_rolls_back(
    run: Runner, exchange_with: ExchangeWith, admin: psycopg.Connection[Any]
) -> None:
    ended: list[str] = []

    def view(request: HttpRequest) -> HttpResponse:
        Author.objects.create(name="undone")
        try:
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_sleep(30), 'of the whole stack'")
        except BaseException as exc:
            ended.append(type(exc).__name__)
            raise
        raise AssertionError("nobody waits for it")

    def sleeping() -> int:
        query = "SELECT FROM pg_stat_activity WHERE state = 'active' AND query LIKE %s"
        return admin.execute(query, ["SELECT pg_sleep(30), 'of the%"]).rowcount

    async def main() -> None:
        exchange = exchange_with(view)
        task = exchange.start()
        while not sleeping():
            await asyncio.sleep(0.005)
        exchange.hang_up()
        await asyncio.wait_for(task, 5)
        assert ended == ["CancelledError"]
        assert exchange.sent == []
        assert not await Author.objects.aexists()

    run(main())
    wait_for(lambda: not sleeping(), "the statement is cancelled on the server")


@pytest.mark.usefixtures("three")
def test_a_client_that_hangs_up_closes_the_iterator_and_gives_its_connection_back(
    run: Runner, exchange_with: ExchangeWith
) -> None:
    async def main() -> None:
        exchange = Slow(exchange_with(stream))
        task = exchange.start()
        await exchange.take()
        exchange.hang_up()
        await asyncio.wait_for(task, 5)
        assert steps == ["a", "closed after 0"]
        (record,) = pgbackend.statistics()
        assert record.leased == 0

    run(main())


@of_handler
@pytest.mark.usefixtures("three")
def test_a_server_that_cancels_closes_the_iterator_too(
    run: Runner, exchange_with: ExchangeWith
) -> None:
    async def main() -> None:
        exchange = Slow(exchange_with(stream))
        task = exchange.start()
        await exchange.take()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert steps == ["a", "closed after 0"]

    run(main())


def write(request: HttpRequest) -> HttpResponse:
    """Write two rows, with a nested block and an await in between."""
    Author.objects.create(name="first")
    with transaction.atomic():
        Tag.objects.create(name=f"{Author.objects.count()}")
    async_to_sync(asyncio.sleep)(0)
    Author.objects.create(name="second")
    return HttpResponse("written")


def walk(request: HttpRequest) -> StreamingHttpResponse:
    """Stream rows of a server-side cursor; the end of the iterator waits for nothing."""

    def pieces() -> Iterator[str]:
        steps.append("begun")
        try:
            yield from Author.objects.values_list("name", flat=True).iterator(chunk_size=1)
        finally:
            steps.append("closed")

    steps.clear()
    return StreamingHttpResponse(pieces())


@of_handler
@pytest.mark.sweep(one_in=3)
@pytest.mark.parametrize("mode", [*CANCELLING, *ABANDONED])
@pytest.mark.parametrize("view", [write, walk])
@pytest.mark.usefixtures("atomic_requests", "three")
def test_a_request_that_is_interrupted_at_any_wait_leaves_nothing(
    run: Runner, exchange_with: ExchangeWith, view: Any, mode: Mode
) -> None:
    """It has committed all or nothing; no lease is left, and the pool serves the next."""

    async def main() -> None:
        exchange = exchange_with(view)
        application = exchange.application
        before = await Author.objects.acount()

        def operation() -> Coroutine[Any, Any, Any]:
            return Exchange(application=application).serve()

        async def check(outcome: Outcome) -> None:
            written = await Author.objects.acount() - before
            assert written in ((0, 2) if view is write else (0,)), outcome
            assert await Tag.objects.acount() == written / 2
            assert outcome.interrupted or view is walk or written == 2
            if view is walk and steps:
                assert steps[-1] == "closed", steps
            await aio.run(_delete_written)
            for record in pgbackend.statistics():
                assert record.leased == 0

        with warnings.catch_warnings():
            # A dropped coroutine, and Django 5.2's handler, leave the body to the collector.
            warnings.simplefilter("ignore", ResourceWarning)
            assert await sweep(operation, mode, check) >= 4

    run(main(), timeout=60)


def _delete_written() -> None:
    Author.objects.filter(name__in=("first", "second")).delete()
    Tag.objects.all().delete()
