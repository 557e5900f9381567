"""Compares the driver's shortcuts with the ways of psycopg and psycopg_pool.

`lease` and `queue`: the order in which tasks are served, what the pool counts and reports, the
errors of an exhausted pool. `run`: rows, counts, errors, messages. `portals`: what code sees of the
greenlet that it runs in.
"""

from __future__ import annotations

import asyncio
import contextvars
import decimal
import sys
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import UUID

import greenlet
import psycopg
import pytest
from psycopg.types.json import Jsonb
from psycopg.types.range import Range

from pgbackend.driver import bridge, events
from pgbackend.driver.bridge import await_
from pgbackend.driver.bridge import run as green
from pgbackend.driver.loops import close_pools
from tests.conftest import Runner
from tests.driver.conftest import Pools, fetch, pinned
from tests.driver.test_pool import hold_one, until
from tests.support.both_ways import Wire, compare, error_of, told_error

from .test_comparisons import named, values

Seen = list[Any]


@pytest.fixture(autouse=True)
def fresh_tables() -> None:
    """Leave Django's database alone, which these tests do not use."""


def counted(pool: Any) -> tuple[Any, ...]:
    """Return the statistics of a pool, without the time."""
    found = pool.statistics()
    return tuple(getattr(found, each) for each in found.__slots__ if not each.endswith("_ms"))


# --- Leases ---------------------------------------------------------------------------------------


async def in_turn(pools: Pools, seen: Seen) -> None:
    """Let six tasks wait for one connection; one is cancelled, one fails, one is asked twice."""
    pool = pools(max_size=1)

    def use(n: int) -> Any:
        with pinned(pool) as lease:
            seen.append(n)
            if n == 1:
                return lease.connection.execute("SELECT 1 / 0")
            return lease.connection.execute("SELECT %s::int", [n]).fetchone()

    await green(use, -1)
    held = await green(pool.lease)
    tasks = [asyncio.create_task(green(use, n), name=f"task {n}") for n in range(6)]
    await until(lambda: pool.statistics().waiting == 6)
    seen.append(counted(pool))
    tasks[2].cancel()
    await asyncio.sleep(0)
    held.end()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    seen += [told_error(each) if isinstance(each, Exception) else each for each in ended[:2]]
    seen += [type(ended[2]), tasks[2].cancelled(), ended[3:], counted(pool)]


async def too_late(pools: Pools, seen: Seen) -> None:
    """Exhaust a pool: wait too long, alone, in the queue of others, and for oneself."""
    pool = pools(max_size=1)
    holding, released = await hold_one(pool)
    pool._psycopg.timeout = 0.03  # not before: a connection may take longer to open
    waits = [asyncio.create_task(green(fetch, pool, "SELECT 1"), name=f"w {n}") for n in range(2)]
    seen += [*map(told_error, await asyncio.gather(*waits, return_exceptions=True)), counted(pool)]
    released.set()
    await holding
    seen += [await green(fetch, pool, "SELECT 2"), counted(pool)]


async def deadlocked(pools: Pools, seen: Seen) -> None:
    pool = pools(max_size=1)

    def twice() -> Any:
        with pinned(pool):
            return error_of(lambda: fetch(pool, "SELECT 1"))

    seen += [await asyncio.create_task(green(twice), name="twice"), counted(pool)]


async def crowded(pools: Pools, seen: Seen) -> None:
    pool = pools(max_size=1, max_waiting=1)
    holding, released = await hold_one(pool)
    waiting = asyncio.create_task(green(fetch, pool, "SELECT 1"))
    await until(lambda: pool.statistics().waiting == 1)
    seen += [await green(error_of, lambda: fetch(pool, "SELECT 2")), counted(pool)]
    released.set()
    seen += [await holding, await waiting, counted(pool)]


async def closed(pools: Pools, seen: Seen) -> None:
    """Close a pool that a task waits for, and that another task has a connection of."""
    pool = pools(max_size=1)
    holding, released = await hold_one(pool)
    waiting = asyncio.create_task(green(fetch, pool, "SELECT 1"))
    await until(lambda: pool.statistics().waiting)
    close_pools(pools.name)
    seen.append(told_error((await asyncio.gather(waiting, return_exceptions=True))[0]))
    released.set()
    await holding
    seen.append(await green(error_of, lambda: fetch(pool, "SELECT 1")))
    await until(lambda: not pools.sessions())


async def dropped(pools: Pools, seen: Seen) -> None:
    """Close the coroutine of a task that waits, before and after it was given a connection."""
    pool = pools(max_size=1)
    await green(fetch, pool, "SELECT 1")
    for served in (False, True):
        lease = await asyncio.create_task(green(pool.lease))
        coro = green(fetch, pool, "SELECT 1")
        coro.send(None)
        if served:
            lease.end()
        coro.close()
        lease.end()
        seen += [await green(fetch, pool, "SELECT 2"), counted(pool)]


async def lost(pools: Pools, seen: Seen) -> None:
    """End the sessions of a pool, while free, and while leased."""
    pool = pools(max_size=1)
    await green(fetch, pool, "SELECT 1")
    pools.terminate_sessions()
    seen += [await green(fetch, pool, "SELECT 2"), counted(pool)]
    lease = await green(pool.lease)
    pools.terminate_sessions()
    lease.end()
    seen += [await green(fetch, pool, "SELECT 3"), counted(pool)]


async def dirty(pools: Pools, seen: Seen) -> None:
    """Leave something in a session, and a transaction open."""
    pool = pools(max_size=1)
    lease = await green(pool.lease)
    await green(lambda: lease.connection.execute("SET statement_timeout = 4321"))
    lease.dirty = True
    lease.end()
    seen.append(await green(fetch, pool, "SHOW statement_timeout"))

    def leave_open() -> None:
        with pinned(pool) as lease:
            lease.connection.autocommit = False
            lease.connection.execute("SELECT 1")

    await green(leave_open)
    seen += [await green(fetch, pool, "SELECT now() = statement_timestamp()"), counted(pool)]


async def checked(pools: Pools, seen: Seen) -> None:
    async def check(connection: Any) -> None:
        seen.append("checked")

    pool = pools(max_size=1, check=check)
    for n in range(3):
        seen += [await green(fetch, pool, f"SELECT {n}"), counted(pool)]


async def expired(pools: Pools, seen: Seen) -> None:
    """Use a connection whose lifetime has ended: it is replaced when it comes back."""
    pool = pools(max_size=1, max_lifetime=1000)
    seen.append(await green(fetch, pool, "SELECT 1"))
    (connection,) = pool._psycopg._pool
    connection._expire_at = 0.0  # no clock that a busy machine could outrun
    seen.append(await green(fetch, pool, "SELECT 2"))
    await until(lambda: pool.statistics().connections_made == 2)
    seen += [await green(fetch, pool, "SELECT 3"), pool.statistics().connections_made]


async def many(pools: Pools, seen: Seen) -> None:
    """Let tasks crowd a pool of two, and hold connections across waits."""
    pool = pools(max_size=2)

    def work(n: int) -> list[Any]:
        with pinned(pool) as lease:
            await_(asyncio.sleep(0))
            return [lease.connection.execute("SELECT %s::int", [n]).fetchone(), fetch_own(lease)]

    def fetch_own(lease: Any) -> Any:
        return lease.connection.execute("SELECT 'own'").fetchall()

    seen += await asyncio.gather(*(green(work, n) for n in range(12)))
    found = pool.statistics()
    seen += [found.requests, found.requests_errors, found.leased, found.waiting, found.idle <= 2]


POOLS: tuple[Callable[[Pools, Seen], Awaitable[None]], ...] = (
    in_turn, too_late, deadlocked, crowded, closed, dropped, lost, dirty, checked, expired, many,
)  # fmt: skip


@pytest.mark.sweep(one_in=2)
@pytest.mark.parametrize("name", [named(each) for each in ("lease", "queue", "portals", "all")])
def test_a_pool_serves_alike(run_once: Runner, pools: Pools, heard: list[Any], name: str) -> None:
    own = pools.name

    def once() -> Any:
        told: list[Any] = []
        for work in POOLS:
            heard.clear()
            seen: Seen = []
            run_once(work(pools, seen))
            kinds = [(type(each), getattr(each, "discarded", None)) for each in heard]
            told.append((work.__name__, seen, kinds if work is not many else len(kinds)))
        return told

    assert own == pools.name
    compare(name, once)


@pytest.fixture
def heard() -> Any:
    """Record the events that the pools report to their hooks."""
    seen: list[events.Event] = []
    hear = seen.append
    events.add_hook(hear)
    yield seen
    events.remove_hook(hear)


# --- Statements -----------------------------------------------------------------------------------

PARAMS: list[Any] = [
    None, True, 1, 1 << 40, 1 << 70, -1, 1.5, float("nan"), float("inf"), decimal.Decimal("1.20"),
    "a", "", "%s", "'; --", "\\", "é€😀", b"\0\xff", date(2026, 1, 2),
    datetime(2026, 1, 2, tzinfo=UTC),
    timedelta(1, 2, 3), UUID(int=1), Jsonb({"a": [1, None]}), [1, 2], ["a", None], [[1], [2]],
    Range(1, 5),
]  # fmt: skip

STATEMENTS: list[tuple[Any, Any]] = [
    *(("SELECT %s", (each,)) for each in PARAMS),
    ("SELECT 1", None), ("SELECT 1", ()), ("SELECT '%'", None), ("SELECT '%%'", ()),
    ("SELECT %s, %s", (1, "a")), ("SELECT %s, %s", [1, "a"]), ("SELECT %(a)s", {"a": 1}),
    ("SELECT %(a)s, %(a)s", {"a": "x"}), ("SELECT generate_series(1, 300)", None), ("", None),
    ("SELECT 1 WHERE false", None), ("SELECT", None), ("SELECT 1; SELECT 2", None),
    ("SELECT 1 AS a, 2 AS a", None), ("SELECT NULL::text[], ARRAY[1, NULL], '{}'::jsonb", None),
    ("CREATE TEMPORARY TABLE things (n int PRIMARY KEY, t text)", None),
    ("INSERT INTO things VALUES (%s, %s)", (1, "a")),
    ("INSERT INTO things VALUES (%s, %s)", (2, None)),
    ("INSERT INTO things VALUES (3, 'c') RETURNING n, t", None), ("SELECT * FROM things", None),
    ("UPDATE things SET t = %s WHERE n < %s", ("x", 3)),
    ("UPDATE things SET t = 'y' RETURNING n", ()),
    ("DELETE FROM things WHERE n = %s", (9,)), ("TRUNCATE things", None),
    ("EXPLAIN SELECT 1", None),
    ("DO $$BEGIN RAISE NOTICE 'said'; END$$", None), ("SET work_mem = '1MB'", None),
    ("BEGIN", None), ("COMMIT", None), ("VALUES (1, 'a'), (2, 'b')", None), ("TABLE things", None),
    ("SELECT 1 / 0", None), ("SELEC 1", None), ("SELECT nothing", None),
    ("SELECT 1; SELEC 2", None),
    ("SELECT 1; SELECT 1 / 0", None), ("SELECT %s::int", ("x",)), ("SELECT %s", ()),
    ("SELECT 1", (1,)), ("SELECT %s", (1, 2)), ("SELECT %s", (object,)), ("SELECT %(a)s", (1,)),
    ("SELECT %s", {"a": 1}), ("SELECT %x", (1,)), ("SELECT '%'", ()), ("SELECT %s", ("\0",)),
    ("INSERT INTO things VALUES (1, 'a'), (1, 'b')", None),
    ("INSERT INTO things VALUES (NULL)", None),
    ("COPY things TO STDOUT", None), ("COPY things FROM STDIN", None), ("SELECT 2", None),
    ("DO $$BEGIN RAISE EXCEPTION 'own' USING ERRCODE = 'XX123', HINT = 'h'; END$$", None),
    (b"SELECT 1", None), (psycopg.sql.SQL("SELECT {}").format(1), None), ("SELECT %s", (True,)),
    ("DROP TABLE things", None),
]  # fmt: skip


@pytest.mark.shortcut("run")
@pytest.mark.parametrize("place", ["alone", "pinned", "in a transaction"])
@pytest.mark.parametrize(
    "options",
    [
        {"cursor_factory": psycopg.ClientCursor},
        {"cursor_factory": psycopg.Cursor},
        {"cursor_factory": psycopg.Cursor, "prepare_threshold": 1},
    ],
    ids=["client", "server", "prepared"],
)
def test_a_statement_has_the_same_rows_count_errors_and_messages(
    run_once: Runner, pools: Pools, options: Any, place: str
) -> None:
    def once() -> Any:
        notices: list[Any] = []

        def initialise(connection: Any) -> None:
            wire.trace(connection)
            connection.add_notice_handler(lambda notice: notices.append(notice.message_primary))

        def execute_all(execute: Callable[..., Any], connection: Any) -> Seen:
            seen: Seen = []
            for each in (*STATEMENTS, *STATEMENTS):
                if connection is not None and str(each[0]).startswith("COPY"):
                    continue  # afterwards, psycopg can do nothing with the connection
                seen.append(
                    values(error_of(lambda each=each: execute(*each, lambda adapters: None)))
                )
                if connection is not None:
                    seen.append(connection.info.transaction_status)
                    if connection.info.transaction_status.name == "INERROR":
                        connection.rollback()
            return seen

        def work() -> Seen:
            pool = pools(max_size=1, connect=options, initialise=initialise, session_reset="never")
            if place == "alone":
                return execute_all(pool.execute, None)
            with pinned(pool) as lease:
                connection = lease.connection
                connection.autocommit = place == "pinned"
                seen = execute_all(lease.execute, connection)
                connection.rollback()
            return seen

        with Wire() as wire:
            return run_once.green(work), notices, wire.messages()

    compare("run", once)


# --- Portals --------------------------------------------------------------------------------------

variable: contextvars.ContextVar[Any] = contextvars.ContextVar("variable", default="unset")
local = threading.local()


def surroundings() -> Seen:
    """Return what code sees of the greenlet that it runs in."""
    here: Any = greenlet.getcurrent()
    return [
        bridge.green() is here, bridge.current() is here, sys.exc_info(), variable.get(), here.dead,
        dict(vars(here)), decimal.getcontext().prec, vars(local), here.holding, here.pending,
        here.closing, here.found, here.on_wait, here.postponing, here.gr_frame is None,
        bridge.current_task() is asyncio.current_task(), here.thrown, here.context is not None,
    ]  # fmt: skip


async def values_of_contexts(seen: Seen) -> None:
    def work(value: str) -> Seen:
        before = surroundings()
        variable.set(value)
        decimal.setcontext(decimal.Context(prec=3 + len(value)))
        await_(asyncio.sleep(0))
        return [before, surroundings()]

    for value in ("one", "three"):
        seen.append(await green(work, value))
        seen.append(variable.get())
    tasks = [asyncio.create_task(green(work, f"task {n}")) for n in range(3)]
    seen += [await asyncio.gather(*tasks), variable.get()]
    seen.append(contextvars.copy_context().run(variable.get))


async def errors(seen: Seen) -> None:
    def fail(exc: BaseException) -> None:
        try:
            raise KeyError("first")
        except KeyError:
            with suppress(ZeroDivisionError):
                await_(asyncio.sleep(0))
                _ = 1 / 0
            raise exc  # noqa: B904 - it gets a context

    for exc in (
        ValueError("v"),
        greenlet.GreenletExit("g"),
        StopIteration(1),
        asyncio.CancelledError("c"),
    ):
        try:
            seen.append(repr(await green(fail, exc)))
        except BaseException as caught:
            seen += [caught is exc, type(caught), str(caught), type(caught.__context__)]
            seen.append(type(caught.__cause__))
        seen += [sys.exc_info(), await green(surroundings)]


async def cancellations(seen: Seen) -> None:
    def wait(begun: asyncio.Event, how: str) -> str:
        begun.set()
        try:
            await_(asyncio.sleep(30))
        except asyncio.CancelledError:
            if how == "swallows":
                return "swallowed"
            if how == "waits":
                await_(asyncio.sleep(0))
            raise
        return "never"

    for how in ("raises", "swallows", "waits"):
        begun = asyncio.Event()
        task = asyncio.create_task(green(wait, begun, how))
        await begun.wait()
        task.cancel(how)
        ended = (await asyncio.gather(task, return_exceptions=True))[0]
        seen += [type(ended), str(ended), task.cancelled(), task.cancelling()]
        seen.append(await green(surroundings))
    coro = green(wait, asyncio.Event(), "raises")
    coro.send(None)
    coro.close()
    seen.append(await green(surroundings))


async def nested(seen: Seen) -> None:
    async def inner(depth: int) -> Seen:
        await asyncio.sleep(0)
        if depth:
            return [*await green(surroundings), *await asyncio.create_task(inner(depth - 1))]
        return [bridge.green() is None]

    def work(depth: int) -> Seen:
        found = await_(inner(depth))
        return [surroundings(), found]

    for depth in (0, 1, 3):
        seen.append(await green(work, depth))
    seen.append(await bridge.portal(inner(2)))


async def marked(seen: Seen) -> None:
    """Set attributes of the greenlet and of a thread-local, which the next function sees or not."""

    def mark(n: int) -> Seen:
        before = surroundings()
        if n % 2:
            greenlet.getcurrent().mark = n  # type: ignore[attr-defined]
        local.mark = n
        return before

    for n in range(4):
        seen.append(await green(mark, n))
    vars(local).clear()


async def generators(seen: Seen) -> None:
    """Step generators of earlier functions in later ones."""

    def numbers() -> Any:
        try:
            for n in range(5):
                await_(asyncio.sleep(0))
                yield n
        finally:
            seen.append("closed")

    steps = numbers()
    for _ in range(3):
        seen.append(await green(next, steps))
    await green(steps.close)
    seen.append(await green(list, numbers()))


PORTALS: tuple[Callable[[Seen], Awaitable[None]], ...] = (
    values_of_contexts, errors, cancellations, nested, marked, generators,
)  # fmt: skip


@pytest.mark.shortcut("portals")
@pytest.mark.parametrize("work", PORTALS)
def test_code_sees_the_same_in_a_portal_that_was_used_before(
    run: Runner, work: Callable[[Seen], Awaitable[None]]
) -> None:
    async def main() -> Seen:
        seen: Seen = []
        await work(seen)
        return seen

    compare("portals", lambda: run(main()))
