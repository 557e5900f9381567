"""Tests C7: a cancellation, at any await point, leaves the server, the pool and the tables whole.

The sweep interrupts every operation at each of its waits, in every way, in every state of the pool;
after each interruption the same facts are checked, while another task reads rows of its own all the
time. Then come the ways in which cancellations reach real programs, and links that fail.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any

import django
import httpx
import psycopg
import pytest
import uvicorn
from asgiref.sync import SyncToAsync
from django.core.exceptions import SuspiciousOperation
from django.db import DatabaseError, connection, connections, transaction
from django.db.models import Value
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.urls import path

import pgbackend
import tests.urls
from pgbackend import aio
from pgbackend.driver import bridge
from pgbackend.driver import connection as driver_connection
from pgbackend.driver.errors import NothingCommitted, OutcomeUnknown
from tests.conftest import Runner, wait_for
from tests.driver.conftest import take_all
from tests.library.models import Author, Book, Entry, Tag
from tests.support.exchange import Exchange, serve_by
from tests.support.fixtures import settings_of_default
from tests.support.link import Link
from tests.support.sweep import ABANDONING, CANCELLING, Mode, Outcome, sweep

__all__ = ["serve_by"]

#: Seconds in which an interrupted operation must have ended.
AT_MOST = 1.0

#: Connections that the pool may open.
MAX_SIZE = 2
POOL = {"min_size": 0, "max_size": MAX_SIZE, "timeout": 5}

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def watch(django_db_setup: None, conninfo: str) -> Iterator[psycopg.Connection[Any]]:
    """Open a session in Django's database that watches the others."""
    params = {"dbname": connections["default"].settings_dict["NAME"], "autocommit": True}
    with psycopg.connect(conninfo, **params, application_name="watcher") as watching:
        yield watching


def pool() -> Any:
    return connections["default"]._async_pool()  # type: ignore[attr-defined]


# --- Operations: each is given a number, and all the rows that it writes and reads carry it ------


def _tag(n: int, letter: str) -> Tag:
    return Tag(name=f"{n} {letter}")


async def get(n: int) -> None:
    found = await Tag.objects.annotate(n=Value(n)).aget(name="x 1")
    assert (found.n, found.name) == (n, "x 1")


async def create(n: int) -> None:
    await Tag.objects.acreate(name=f"{n} a")


async def bulk_create(n: int) -> None:
    await Tag.objects.abulk_create([_tag(n, letter) for letter in "abcd"], batch_size=2)


@aio.as_async
def atomic(n: int) -> None:
    with transaction.atomic():
        _tag(n, "a").save()
        assert Tag.objects.filter(name__startswith=f"{n} ").count() == 1
        _tag(n, "b").save()


class Undo(Exception):
    pass


@aio.as_async
def nested_atomic(n: int) -> None:
    with transaction.atomic():
        _tag(n, "a").save()
        with suppress(Undo), transaction.atomic():
            _tag(n, "undone").save()
            raise Undo
        with transaction.atomic():
            _tag(n, "b").save()


hooks_ran: set[int] = set()


@aio.as_async
def on_commit_hook(n: int) -> None:
    with transaction.atomic():
        transaction.on_commit(lambda: hooks_ran.add(n))
        transaction.on_commit(lambda: Tag.objects.filter(name=f"{n} a").get())
        _tag(n, "a").save()


@aio.as_async
def select_for_update(n: int) -> None:
    with transaction.atomic():
        counter = Entry.objects.select_for_update().get(text__startswith="last ")
        counter.text = f"last {n}"
        counter.save()
        _tag(n, "a").save()


async def update_or_create(n: int) -> None:
    await Tag.objects.aupdate_or_create(name=f"{n} a", defaults={"name": f"{n} a"})


async def aiterator(n: int) -> None:
    rows = Tag.objects.filter(name__startswith="x ").annotate(n=Value(n)).order_by("name")
    read = [(tag.n, tag.name) async for tag in rows.aiterator(chunk_size=2)]
    assert read == [(n, f"x {number}") for number in (1, 2, 3)]


@aio.as_async
def server_side_iterator(n: int) -> None:
    rows = Tag.objects.filter(name__startswith="x ").annotate(n=Value(n)).order_by("name")
    read = [(tag.n, tag.name) for tag in rows.iterator(chunk_size=2)]
    assert read == [(n, f"x {number}") for number in (1, 2, 3)]


@aio.as_async
def copy(n: int) -> None:
    with transaction.atomic(), connection.cursor() as cursor:
        with cursor.copy("COPY library_tag (name) FROM STDIN") as into:
            for letter in "abcd":
                into.write_row([f"{n} {letter}"])
        with cursor.copy(
            "COPY (SELECT name FROM library_tag WHERE name LIKE %s ORDER BY 1) TO STDOUT",
            [f"{n} %"],
        ) as out:
            assert [name for (name,) in out.rows()] == [f"{n} {letter}" for letter in "abcd"]


@aio.as_async
def prefetch_related(n: int) -> None:
    books = Book.objects.filter(title="steady").annotate(n=Value(n)).prefetch_related("tags")
    read = [(book.n, sorted(tag.name for tag in book.tags.all())) for book in books]
    assert read == [(n, ["x 1", "x 2", "x 3"])]


@aio.as_async
def raw_cursor(n: int) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT set_config('app.n', %s, false)", [str(n)])
        cursor.execute("SELECT %s::int, current_setting('app.n'), pg_sleep(0.001)", [n])
        assert cursor.fetchall() == [(n, str(n), "")]


async def m2m_set(n: int) -> None:
    book = await Book.objects.aget(title="changing")
    await book.tags.aset([tag async for tag in Tag.objects.filter(name__startswith=_side(n))])


def _side(n: int) -> str:
    return "xy"[n % 2]


@dataclass(frozen=True)
class Operation:
    """Describes a swept operation: its writes, if it is done, and its least number of waits."""

    do: Callable[[int], Coroutine[Any, Any, None]]
    writes: str
    waits: int


OPERATIONS = [
    Operation(get, "", 1),
    Operation(create, "a", 1),
    Operation(bulk_create, "abcd", 3),
    Operation(atomic, "ab", 4),
    Operation(nested_atomic, "ab", 9),
    Operation(on_commit_hook, "a", 3),
    Operation(select_for_update, "a", 4),
    Operation(update_or_create, "a", 5),
    Operation(aiterator, "", 3),
    Operation(server_side_iterator, "", 3),
    Operation(copy, "abcd", 6),
    Operation(prefetch_related, "", 2),
    Operation(raw_cursor, "", 2),
    Operation(m2m_set, "", 4),
]


# --- States of the pool ---------------------------------------------------------------------------


class Scene:
    """Prepares the pool for an operation; this state has idle connections."""

    def __init__(self, watch: psycopg.Connection[Any]) -> None:
        self.watch = watch
        self.others: list[asyncio.Task[Any]] = []
        self.released = asyncio.Event()

    async def set_up(self) -> None:
        """Prepare the pool before each run of the operation."""

    async def tear_down(self) -> None:
        """Let the other tasks end, after each run of the operation."""
        self.released.set()
        for other in self.others:
            await other
        self.others.clear()

    def operation_waits(self) -> None:
        """Release held connections: the operation has begun its first wait."""
        asyncio.get_running_loop().call_soon(self.released.set)


Idle = Scene


class Full(Scene):
    """Lets another task hold all connections until the operation waits for one."""

    async def set_up(self) -> None:
        self.released = asyncio.Event()
        held = asyncio.Event()
        self.others.append(asyncio.create_task(aio.run(self._hold, held)))
        await held.wait()

    def _hold(self, held: asyncio.Event) -> None:
        leases = [pool().lease() for _ in range(MAX_SIZE)]
        try:
            held.set()
            bridge.await_(self.released.wait())
        finally:
            for lease in leases:
                lease.end()


class Growing(Scene):
    """Begins with a pool that has opened no connection yet."""

    async def set_up(self) -> None:
        connections["default"].close_pool()  # type: ignore[attr-defined]


class EmptyWithWaiters(Full):
    """Begins with all connections held, and two tasks waiting already."""

    async def set_up(self) -> None:
        await super().set_up()
        for number in (-1, -2):
            self.others.append(asyncio.create_task(get(number)))
        while pool().statistics().waiting < 2:
            await asyncio.sleep(0)


class Broken(Scene):
    """Begins with idle connections that were terminated on the server."""

    async def set_up(self) -> None:
        assert await aio.run(take_all, pool()) == MAX_SIZE
        sql = (
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
            "WHERE application_name = 'swept'"
        )
        self.watch.execute(sql)
        wait_for(lambda: self.watch.execute(sql).fetchone() == (0,), "sessions terminated")


SCENES = {
    "idle": Idle,
    "full": Full,
    "growing": Growing,
    "empty with waiters": EmptyWithWaiters,
    "broken": Broken,
}


# --- The sweep ------------------------------------------------------------------------------------


class Sweeper:
    """Sweeps one operation in one state of the pool, and checks the facts after every point."""

    def __init__(self, operation: Operation, scene: Scene) -> None:
        self.operation = operation
        self.scene = scene
        self.watch = scene.watch
        self.quiet = asyncio.Lock()
        self.waited = asyncio.Event()
        self.n = 0
        self.points = 0
        self.read = 0

    async def sweep(self, mode: Mode) -> int:
        """Sweep in one mode, beside a bystander that reads; return the number of points."""
        bystander = asyncio.create_task(self.stand_by())
        self.points = 0
        try:
            await self.begin()
            waits = await sweep(self.start, self.telling(mode), self.check, AT_MOST)
            await self.scene.tear_down()
        except BaseException as exc:
            exc.add_note(f"in mode {mode.__name__}, after {self.points} points")
            raise
        finally:
            bystander.cancel()
            with suppress(asyncio.CancelledError):
                await bystander
        return waits

    async def stand_by(self) -> None:
        """Read rows of its own while the operation waits: they are never another's."""
        for nonce in itertools.count():
            await self.waited.wait()
            self.waited.clear()
            async with self.quiet:
                rows = Entry.objects.filter(text__startswith="mine ").annotate(nonce=Value(nonce))
                read = [row async for row in rows.order_by("text").values_list("nonce", "text")]
            assert read == [(nonce, "mine 1"), (nonce, "mine 2")]
            self.read += 1

    async def begin(self) -> None:
        async with self.quiet:
            await self.scene.set_up()
        self.n = next(_numbers)

    def start(self) -> Coroutine[Any, Any, None]:
        return self.operation.do(self.n)

    def telling(self, mode: Mode) -> Mode:
        """Return `mode`, extended so that the scene learns of the operation's first wait."""

        def at(at: int) -> Any:
            interrupt = mode(at)

            def told(number: int, waits_for: Any, task: asyncio.Task[Any]) -> str | None:
                self.waited.set()
                if number == 0:
                    self.scene.operation_waits()
                return interrupt(number, waits_for, task)

            return told

        return at

    async def check(self, outcome: Outcome) -> None:
        if not outcome.interrupted:
            outcome.task.result()
        await self.scene.tear_down()
        async with self.quiet:
            assert await aio.run(take_all, pool()) == MAX_SIZE, "capacity is whole"
            stats = pool().statistics()
            assert (stats.leased, stats.waiting) == (0, 0) and stats.size <= MAX_SIZE
        wait_for(self.none_in_transaction, "no session is idle in a transaction")
        self.check_rows(outcome)
        self.points += outcome.interrupted
        await self.begin()

    def none_in_transaction(self) -> bool:
        return not self.watch.execute(
            "SELECT 1 FROM pg_stat_activity WHERE application_name = 'swept' "
            "AND state IN ('active', 'idle in transaction', 'idle in transaction (aborted)')"
        ).fetchall()

    def check_rows(self, outcome: Outcome) -> None:
        """Check that all of the operation's rows are there, or, if it was interrupted, none."""
        n = self.n
        rows = self.watch.execute(
            "SELECT name FROM library_tag WHERE name LIKE %s ORDER BY 1", [f"{n} %"]
        )
        written = [name for (name,) in rows]
        all_of_it = [f"{n} {letter}" for letter in self.operation.writes]
        assert written == all_of_it or (outcome.interrupted and not written), (n, written)
        if self.operation.do is on_commit_hook and (outcome.cancelled or not outcome.interrupted):
            assert bool(written) == (n in hooks_ran), "hooks run after a commit, and only then"
        if self.operation.do is select_for_update:
            last = self.one("SELECT text FROM library_entry WHERE text LIKE 'last %'")
            assert (last == f"last {n}") == bool(written)
        if self.operation.do is m2m_set:
            tags = self.one(
                "SELECT string_agg(substr(tag.name, 1, 1), '' ORDER BY tag.name) FROM library_tag "
                "tag JOIN library_book_tags link ON tag.id = tag_id JOIN library_book book "
                "ON book.id = book_id WHERE title = 'changing'"
            )
            assert tags in ("xxx", "yyy")
            assert outcome.interrupted or tags == _side(n) * 3

    def one(self, sql: str) -> Any:
        row = self.watch.execute(sql).fetchone()
        assert row is not None
        return row[0]


@pytest.fixture
def rows() -> None:
    """Write the rows that the operations and the bystander read."""
    tags = [Tag.objects.create(name=f"{side} {n}") for side in "xy" for n in (1, 2, 3)]
    author = Author.objects.create(name="somebody")
    for title in ("steady", "changing"):
        Book.objects.create(title=title, author=author).tags.set(tags[:3])
    for text in ("last 0", "mine 1", "mine 2"):
        Entry.objects.create(text=text)


@pytest.mark.sweep(one_in=14)
@pytest.mark.parametrize("state", SCENES)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.do.__name__)
def test_an_operation_that_is_interrupted_anywhere_leaves_everything_whole(
    run: Runner,
    rows: None,
    watch: psycopg.Connection[Any],
    operation: Operation,
    state: str,
) -> None:
    # Before Python 3.13 a coroutine that is closed does not close the async generator that it
    # iterates, and the loop's finalizer cannot close it either: the loop reports an error of its
    # own.
    closes = operation.do is not aiterator or sys.version_info >= (3, 13)
    abandoning = ABANDONING if closes else []

    async def main() -> int:
        points = 0
        for mode in CANCELLING + abandoning:
            sweeper = Sweeper(operation, SCENES[state](watch))
            waits = await sweeper.sweep(mode)
            assert waits >= operation.waits, (mode.__name__, waits)
            points += sweeper.points
        return points

    options = {"application_name": "swept", "pool": POOL}
    with settings_of_default(OPTIONS=options):
        points = run(main(), timeout=60)
    print(f"{points} points")


@pytest.mark.sweep(one_in=3)
@pytest.mark.parametrize(
    "operation",
    [each for each in OPERATIONS if each.do.__name__ in ("bulk_create", "nested_atomic", "copy")],
    ids=lambda operation: operation.do.__name__,
)
def test_the_sweep_holds_where_what_does_not_block_always_yields(
    run: Runner,
    rows: None,
    watch: psycopg.Connection[Any],
    monkeypatch: pytest.MonkeyPatch,
    operation: Operation,
) -> None:
    monkeypatch.setattr(driver_connection, "MAX_BUSY_TIME", 0.0)
    test_an_operation_that_is_interrupted_anywhere_leaves_everything_whole(
        run, rows, watch, operation, "growing"
    )


def test_the_sweep_has_more_than_1500_points() -> None:
    """Each sweep asserts its own floor; this is their sum, as long as nothing is taken out."""
    modes = len(CANCELLING + ABANDONING)
    assert sum(operation.waits for operation in OPERATIONS) * len(SCENES) * modes >= 1500


# --- Ways in which a cancellation arrives ---------------------------------------------------------


def sleep(seconds: float = 20) -> None:
    """Execute a statement that runs until it is cancelled."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_sleep(%s)", [seconds])


class Server:
    """Looks at the sessions of the pool from the server's side."""

    def __init__(self, watch: psycopg.Connection[Any]) -> None:
        self.watch = watch

    def sessions(self, condition: str = "true") -> list[int]:
        return [
            pid
            for (pid,) in self.watch.execute(
                "SELECT pid FROM pg_stat_activity WHERE application_name = 'swept' "
                f"AND backend_type = 'client backend' AND {condition}"
            )
        ]

    def active(self) -> int:
        """Return how many sessions are in `sleep()`; a session that is being reset is not."""
        return len(self.sessions("state = 'active' AND query LIKE '%pg_sleep%'"))

    async def busy(self, count: int = 1, condition: str = "state = 'active'") -> None:
        """Wait until so many sessions are in the midst of a statement."""
        async with asyncio.timeout(10):
            while len(self.sessions(condition)) < count:
                await asyncio.sleep(0.001)

    async def quiet(self) -> None:
        """Wait, on the loop which cleans up after a cancellation, until no statement runs."""
        async with asyncio.timeout(5):  # a `sleep()` would run on for longer
            while self.active():
                await asyncio.sleep(0.001)


@pytest.fixture
def server(watch: psycopg.Connection[Any]) -> Iterator[Server]:
    """Give loops of the test a pool of `MAX_SIZE`; its sessions must be gone afterwards."""
    given = Server(watch)
    connection.ensure_connection()  # the test thread's own: it must not count among the pool's
    with settings_of_default(OPTIONS={"application_name": "swept", "pool": POOL}):
        yield given
    wait_for(lambda: not given.sessions(), "the pool's sessions are gone")


async def assert_whole() -> None:
    assert await aio.run(take_all, pool()) == pool().statistics().max_size
    stats = pool().statistics()
    assert (stats.leased, stats.waiting) == (0, 0)


def test_the_statement_is_cancelled_on_the_server_and_its_session_serves_on(
    run: Runner, server: Server
) -> None:
    async def main() -> None:
        await Tag.objects.acount()
        (pid,) = server.sessions()
        for cancels in (1, 2):
            task = asyncio.create_task(aio.run(sleep))
            await server.busy()
            started = monotonic()
            for _ in range(cancels):
                task.cancel()
                await asyncio.sleep(0)
            await asyncio.wait([task])
            assert task.cancelled() and monotonic() - started < AT_MOST
            assert not server.active()
            assert pid in server.sessions()
        await assert_whole()

    run(main())


def test_a_cancellation_in_the_tick_of_the_result_is_raised(run: Runner, server: Server) -> None:
    """The result has been read when the cancellation comes: only the result is dropped."""

    async def main() -> None:
        async def read(goes_on: bool) -> Any:
            result = await Tag.objects.acount()
            task.cancel()
            if goes_on:
                await asyncio.sleep(0)
            return result

        for goes_on in (True, False):
            task = asyncio.create_task(read(goes_on))
            await asyncio.wait([task])
            assert task.cancelled()
        await assert_whole()

    run(main())


@pytest.mark.parametrize("way", ["gather", "TaskGroup", "timeout", "wait_for"])
def test_each_of_asyncios_ways_to_cancel_cancels_the_statements(
    run: Runner, server: Server, way: str
) -> None:
    async def main() -> None:
        async def fail() -> None:
            await server.busy(MAX_SIZE)
            raise ZeroDivisionError

        async def gather() -> None:
            sleeping = asyncio.gather(aio.run(sleep), aio.run(sleep))
            await server.busy(MAX_SIZE)
            sleeping.cancel()
            with suppress(asyncio.CancelledError):
                await sleeping

        async def task_group() -> None:
            with pytest.raises(ExceptionGroup) as caught:
                async with asyncio.TaskGroup() as tasks:
                    for _ in range(MAX_SIZE + 1):  # one of them waits for a connection
                        tasks.create_task(aio.run(sleep))
                    tasks.create_task(fail())
            assert [type(exc) for exc in caught.value.exceptions] == [ZeroDivisionError]

        async def timeout() -> None:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await aio.run(sleep)

        async def waiting_for() -> None:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(aio.run(sleep), 0.05)

        ways = {
            "gather": gather,
            "TaskGroup": task_group,
            "timeout": timeout,
            "wait_for": waiting_for,
        }
        await ways[way]()
        await server.quiet()  # gather() ends with its first task, while the other cleans up
        await assert_whole()

    run(main())


def test_a_timeout_inside_green_code_leaves_the_task_alive(run: Runner, server: Server) -> None:
    async def main() -> None:
        async def view() -> int:
            with transaction.atomic():
                Tag.objects.create(name="kept")
                try:
                    async with asyncio.timeout(0.05):
                        with transaction.atomic():
                            Tag.objects.create(name="undone")
                            sleep()
                except TimeoutError:
                    pass
                Tag.objects.create(name="kept too")
            return Tag.objects.count()

        assert await aio.portal(view()) == 2
        await assert_whole()

    run(main())
    assert sorted(Tag.objects.values_list("name", flat=True)) == ["kept", "kept too"]


def test_finally_blocks_may_use_the_database(run: Runner, server: Server) -> None:
    @aio.as_async
    def work(where: str) -> None:
        try:
            with transaction.atomic():
                Tag.objects.create(name="undone")
                sleep()
        except asyncio.CancelledError:
            Entry.objects.create(text="saw it")
            raise
        finally:
            Entry.objects.create(text="tidied up")

    async def main() -> None:
        task = asyncio.create_task(work("here"))
        await server.busy()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        await assert_whole()

    run(main())
    assert list(Entry.objects.values_list("text", flat=True)) == ["saw it", "tidied up"]
    assert not Tag.objects.exists()


# --- The end of a transaction ---------------------------------------------------------------------


@pytest.fixture
def slow_commit(watch: psycopg.Connection[Any]) -> Iterator[None]:
    """Make a COMMIT after a row of Entry slow."""
    watch.execute(
        """
        CREATE FUNCTION slowly() RETURNS trigger LANGUAGE plpgsql AS
          'BEGIN PERFORM pg_sleep(0.1); RETURN NULL; END';
        CREATE CONSTRAINT TRIGGER slowly AFTER INSERT ON library_entry
          DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION slowly();
        """
    )
    yield
    watch.execute("DROP TRIGGER slowly ON library_entry; DROP FUNCTION slowly")


COMMITTING = "state = 'active' AND query = 'COMMIT'"


@pytest.mark.parametrize("cancels", [1, 3])
def test_a_commit_that_is_cancelled_is_done_and_its_hooks_run_first(
    run: Runner, server: Server, slow_commit: None, cancels: int
) -> None:
    ran: list[str] = []

    async def hook() -> None:
        await asyncio.sleep(0)
        await Tag.objects.acreate(name="by a hook")
        ran.append("coroutine")

    @aio.as_async
    def work() -> None:
        with transaction.atomic():
            transaction.on_commit(lambda: ran.append("first"))
            transaction.on_commit(hook)
            transaction.on_commit(lambda: ran.append("last"))
            Entry.objects.create(text="kept")
        ran.append("not delivered")

    async def main() -> None:
        task = asyncio.create_task(work())
        await server.busy(condition=COMMITTING)
        for _ in range(cancels):
            task.cancel()
            await asyncio.sleep(0)
        await asyncio.wait([task])
        assert task.cancelled()
        await assert_whole()

    run(main())
    assert Entry.objects.count() == Tag.objects.count() == 1
    assert ran == ["first", "coroutine", "last"]


@pytest.mark.parametrize("end", ["transaction()", "commit()"])
def test_a_commit_through_psycopgs_own_interface_is_not_torn_either(
    run: Runner, server: Server, slow_commit: None, end: str
) -> None:
    after: list[str] = []
    insert = "INSERT INTO library_entry (text) VALUES ('kept')"

    @aio.as_async
    def work() -> None:
        with pgbackend.pinned(), connection.cursor() as cursor:
            raw = cursor.connection
            if end == "commit()":
                raw.autocommit = False
                cursor.execute(insert)
                raw.commit()
            else:
                with raw.transaction(), raw.transaction():
                    cursor.execute(insert)
            after.append("not delivered")

    async def main() -> None:
        task = asyncio.create_task(work())
        await server.busy(condition="state = 'active' AND query = 'COMMIT'")
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() and not after
        await assert_whole()

    run(main())
    assert Entry.objects.count() == 1


# --- Programs: clients that hang up, servers that stop --------------------------------------------


async def sleeping_view(request: HttpRequest) -> HttpResponse:
    with suppress(Undo):
        try:
            with transaction.atomic():
                Tag.objects.create(name="undone")
                sleep()
        finally:
            Entry.objects.create(text="a view ended")
    return HttpResponse("slept")


async def sleeping_stream(request: HttpRequest) -> StreamingHttpResponse:
    async def lines() -> AsyncIterator[str]:
        async for tag in Tag.objects.aiterator(chunk_size=1):
            yield f"{tag.name}\n"
            sleep()

    return StreamingHttpResponse(lines())


urlpatterns = [
    path("sleep/", sleeping_view),
    path("stream/", sleeping_stream),
    *tests.urls.urlpatterns,
]


def test_a_client_that_hangs_up_cancels_the_statement_of_its_view(
    run: Runner, server: Server, site: Any, settings: Any
) -> None:
    settings.ROOT_URLCONF = __name__

    async def main() -> None:
        async with site() as client:
            for _ in range(2):
                requests = [asyncio.create_task(client.get("/sleep/")) for _ in range(MAX_SIZE + 1)]
                await server.busy(MAX_SIZE)
                while not pool().statistics().waiting:
                    await asyncio.sleep(0.001)
                for request in requests:
                    request.cancel()  # the client closes its connection
                async with asyncio.timeout(2):
                    await asyncio.wait(requests)
                    while await Entry.objects.acount() < len(requests):
                        await asyncio.sleep(0.005)
                assert not server.active()
                await assert_whole()
                await Entry.objects.all().adelete()

    run(main())
    assert not Tag.objects.exists()


def test_a_client_that_hangs_up_in_a_streaming_response_ends_its_cursor(
    run: Runner, server: Server, site: Any, settings: Any, rows: None
) -> None:
    settings.ROOT_URLCONF = __name__

    async def main() -> None:
        async with site() as client:

            async def read() -> None:
                async with client.stream("GET", "/stream/") as response:
                    async for _ in response.aiter_lines():
                        pass

            request = asyncio.create_task(read())
            await server.busy(condition="query LIKE '%pg_sleep%' AND state = 'active'")
            request.cancel()
            async with asyncio.timeout(2):
                await asyncio.wait([request])
                while server.active() or pool().statistics().leased:
                    await asyncio.sleep(0.005)
            await assert_whole()

    run(main())


class _EndsFirst(ThreadPoolExecutor):
    """An executor whose functions have ended when `submit()` returns, as quick ones may have."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = super().submit(fn, *args, **kwargs)
        wait([future])
        return future


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("message", ["http.disconnect", "http.unheard_of"])
def test_a_client_that_has_gone_is_not_answered_however_quick_a_sync_view_is(
    run: Runner, monkeypatch: pytest.MonkeyPatch, serve_by: Any, message: str, fails: bool
) -> None:
    def view(request: HttpRequest) -> HttpResponse:
        called.append(threading.current_thread())
        if fails:
            raise SuspiciousOperation
        return HttpResponse("too late")

    called: list[threading.Thread] = []

    async def main() -> None:
        serve_by(view)
        exchange = Exchange()
        exchange.incoming.put_nowait({"type": message})
        expected = pytest.raises(AssertionError, match="unheard_of")
        with expected if message == "http.unheard_of" else nullcontext():
            await exchange.serve()
        assert exchange.sent == []

    with _EndsFirst(max_workers=1) as executor:
        monkeypatch.setattr(SyncToAsync, "single_thread_executor", executor)
        run(main())
    assert threading.main_thread() not in called


@pytest.mark.skipif(
    django.VERSION < (6, 0),
    reason="Django 5.2's handler does not cancel the task of a view when its own is cancelled",
)
def test_a_server_that_shuts_down_under_load_cancels_and_leaves_nothing(
    run: Runner, server: Server, settings: Any
) -> None:
    """uvicorn cancels requests that have not ended when its graceful timeout is over."""
    settings.ROOT_URLCONF = __name__

    async def main() -> None:
        from proj.asgi import application

        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            config = uvicorn.Config(
                application, lifespan="off", log_level="critical", timeout_graceful_shutdown=0
            )
            stopping = uvicorn.Server(config)
            stopping.capture_signals = nullcontext  # type: ignore[method-assign]
            serving = asyncio.create_task(stopping.serve(sockets=[sock]))
            while not stopping.started:
                await asyncio.sleep(0.001)
            url = f"http://127.0.0.1:{sock.getsockname()[1]}/sleep/"
            async with httpx.AsyncClient(timeout=30, trust_env=False) as client:
                requests = [asyncio.create_task(client.get(url)) for _ in range(20)]
                await server.busy(MAX_SIZE)
                while pool().statistics().waiting < 20 - MAX_SIZE:
                    await asyncio.sleep(0.001)
                stopping.should_exit = True
                await asyncio.wait([*requests, serving], timeout=10)
                assert serving.done()
        async with asyncio.timeout(5):
            while await Entry.objects.acount() < 20:
                await asyncio.sleep(0.005)
        assert not server.active()
        await assert_whole()

    run(main())
    assert Entry.objects.filter(text="a view ended").count() == 20
    assert not server.active() and not Tag.objects.exists()


# --- Links that fail ------------------------------------------------------------------------------


@contextmanager
def by_link(link: Link, **pool: Any) -> Iterator[None]:
    """Let the pools of loops that start in the block connect through `link`."""
    options = {
        "application_name": "swept",
        "sslmode": "disable",
        "gssencmode": "disable",
        "connect_timeout": 2,
        "pool": {**POOL, **pool},
    }
    with settings_of_default(HOST="127.0.0.1", PORT=link.port, OPTIONS=options):
        yield


async def served_again() -> None:
    """Retry until a request is served: for half a second after a failure no attempt is made."""
    while True:
        with suppress(DatabaseError):
            await Tag.objects.acount()
            return
        await asyncio.sleep(0.05)


class Moments:
    """Brings each of several operations to a point of its own, where the link fails."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.failed = asyncio.Event()
        self.ready = 0

    def wait(self) -> None:
        self.ready += 1
        bridge.await_(self.failed.wait())

    def in_a_query(self) -> None:
        self.ready += 1
        sleep(0.5)

    def in_a_transaction(self) -> None:
        with transaction.atomic():
            Tag.objects.create(name="in a transaction")
            self.wait()
            Tag.objects.count()

    def at_a_commit(self) -> None:
        with transaction.atomic():
            Tag.objects.create(name="at a commit")
            self.wait()

    def at_a_rollback(self) -> None:
        with suppress(Undo), transaction.atomic():
            Tag.objects.create(name="at a rollback")
            self.wait()
            raise Undo

    def at_the_return(self) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SET search_path = public")
            self.wait()

    def with_an_idle_connection(self) -> None:
        self.wait()
        Tag.objects.count()

    def while_connecting(self) -> None:
        self.wait()
        Tag.objects.count()

    ALL = (
        in_a_query,
        in_a_transaction,
        at_a_commit,
        at_a_rollback,
        at_the_return,
        with_an_idle_connection,
        while_connecting,
    )

    async def run(
        self, fail: Callable[[], object]
    ) -> dict[str, tuple[float, BaseException | None]]:
        """Bring all to their points, let the link fail; return when and how each ended."""
        limits: list[asyncio.Timeout] = []

        async def limited(moment: Callable[[Moments], None]) -> None:
            async with asyncio.timeout(None) as limit:
                limits.append(limit)
                await aio.run(moment, self)

        async def timed(task: asyncio.Task[None]) -> tuple[float, BaseException | None]:
            await asyncio.wait([task])
            return monotonic() - began, task.exception()

        tasks = {moment.__name__: asyncio.create_task(limited(moment)) for moment in self.ALL}
        async with asyncio.timeout(10):
            while self.ready < len(self.ALL):
                await asyncio.sleep(0.001)
            await Tag.objects.acount()  # leave a connection idle
            await self.server.busy()
        fail()
        began = monotonic()
        for limit in limits:
            limit.reschedule(asyncio.get_running_loop().time() + 1)
        self.failed.set()
        ends = await asyncio.gather(*map(timed, tasks.values()))
        return dict(zip(tasks, ends, strict=True))


FAULTS: dict[str, Callable[[Link], object]] = {
    "frozen": lambda link: link.freeze(),
    "half open, the client hears its end": lambda link: link.half_close("client"),
    "half open, the server hears its end": lambda link: link.half_close("server"),
    "reset": lambda link: link.reset(),
    "truncated": lambda link: link.truncate(7, silent=True, new=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_under_a_timeout_of_1_s_an_operation_ends_within_2_s_whatever_the_link_does(
    run: Runner, server: Server, link: Link, fault: str
) -> None:
    async def main() -> None:
        moments = Moments(server)
        ends = await moments.run(lambda: FAULTS[fault](link))
        for moment, (seconds, error) in ends.items():
            assert seconds < 2, (moment, seconds)
            known = TimeoutError | DatabaseError | None
            assert isinstance(error, known), (moment, error)  # type: ignore[arg-type]
        seconds, error = ends["at_the_return"]
        assert error is None and seconds < 0.5, "nothing is awaited at the return"
        if fault == "frozen":
            assert isinstance(ends["in_a_query"][1], TimeoutError)
            _, lost = ends["at_a_commit"]
            assert lost is not None and isinstance(lost.__cause__, OutcomeUnknown)
        link.thaw()
        async with asyncio.timeout(3.5):  # an attempt to connect that went silent has 2 s
            await served_again()
        await assert_whole()

    with by_link(link, max_size=8):
        run(main())
    wait_for(lambda: not server.sessions(), "sessions closed")
    assert {*Tag.objects.values_list("name", flat=True)} <= {"at a commit"}


def test_a_loop_ends_at_once_while_the_link_is_silent(
    run: Runner, server: Server, link: Link
) -> None:
    async def main() -> float:
        moments = Moments(server)

        async def meet(moment: Callable[[Moments], None]) -> None:
            with suppress(DatabaseError):  # at the commit, whose outcome is not known
                await aio.run(moment, moments)

        tasks = [asyncio.create_task(meet(moment)) for moment in moments.ALL]
        async with asyncio.timeout(10):
            while moments.ready < len(moments.ALL):
                await asyncio.sleep(0.001)
        link.freeze()
        moments.failed.set()
        await asyncio.sleep(0.05)
        assert not all(task.done() for task in tasks)
        return monotonic()

    with by_link(link, max_size=8):
        left = run(main())  # asyncio.run() cancels the tasks, and waits for them
    assert monotonic() - left < 2
    link.thaw()


def test_a_reply_that_is_cut_short_at_any_byte_is_an_error_and_no_more(
    run: Runner, server: Server, link: Link, rows: None
) -> None:
    async def main() -> None:
        cut = done = 0
        for after in itertools.chain(range(30), range(30, 400, 10)):
            await Tag.objects.acount()
            link.truncate(after)
            try:
                rows = [name async for name in Tag.objects.values_list("name", flat=True)]
            except DatabaseError:
                cut += 1
            else:
                assert len(rows) == 6
                done += 1
            link.restore()
            await served_again()
        assert cut > 30 and done > 1
        await assert_whole()

    with by_link(link, max_size=1):
        run(main())


@pytest.mark.parametrize("mode", CANCELLING, ids=lambda mode: mode.__name__)
def test_the_sweep_holds_on_a_slow_link_too(
    run: Runner, rows: None, server: Server, link: Link, mode: Mode
) -> None:
    async def main() -> int:
        link.delay = 0.002
        return await Sweeper(Operation(atomic, "ab", 4), Idle(server.watch)).sweep(mode)

    with by_link(link):
        assert run(main()) >= 4


def test_a_rollback_whose_answer_never_comes_says_that_nothing_was_committed(
    run: Runner, server: Server, link: Link
) -> None:
    async def main() -> None:
        def work() -> None:
            with pgbackend.pinned():
                with connection.cursor() as cursor:
                    raw = cursor.connection
                    raw.autocommit = False
                    cursor.execute("INSERT INTO library_tag (name) VALUES ('undone')")
                    link.freeze()
                    asyncio.get_running_loop().call_later(0.05, task.cancel)
                    raw.rollback()

        task = asyncio.create_task(aio.run(work))
        with pytest.raises(NothingCommitted, match="nothing was committed; the connection was"):
            await task
        link.thaw()
        await assert_whole()

    with by_link(link):
        run(main())
    assert not Tag.objects.exists()
