"""Tests statements that wait for a connection: results, cancellation and events are their task's.

The statements are executed as the ORM's are, on a lease of their own and without a cursor.
"""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import psycopg
import pytest

from pgbackend.driver import events
from pgbackend.driver.bridge import run as green
from pgbackend.driver.cancellation import hold_cancellation
from pgbackend.driver.errors import PoolTimeout
from pgbackend.driver.lease import Lease
from pgbackend.driver.pool import Pool
from pgbackend.driver.socket_watch import Watch
from tests.conftest import Runner, wait_for

from .conftest import Pools, fetch, hung_up
from .test_pool import until


def as_it_is(adapters: Any) -> None:
    """Prepare no cursor."""


def execute(pool: Pool, sql: str, params: Any = ()) -> list[Any] | None:
    """Execute a statement as the ORM's are, green, and return its rows."""
    return pool.execute(sql, params, as_it_is)[1]


@pytest.fixture
def one(pools: Pools) -> Callable[..., Pool]:
    """Make a pool of one connection, whose cursors bind parameters as Django's do."""
    pools.connect["cursor_factory"] = psycopg.ClientCursor
    return partial(pools, max_size=1)


async def waiting_for(
    pool: Pool, *sql: str, call: Callable[..., Any] = execute
) -> tuple[Lease, list[asyncio.Task[Any]]]:
    """Take the connection of `pool`, and let a task for each of `sql` wait for it."""
    lease = await green(pool.lease)
    tasks = [asyncio.create_task(green(call, pool, each)) for each in sql]
    await until(lambda: pool.statistics().waiting == len(sql))
    return lease, tasks


def test_statements_are_served_in_order(
    run: Runner, one: Callable[..., Pool], heard: list[events.Event]
) -> None:
    async def main() -> None:
        pool = one()
        numbers = range(50)
        lease, tasks = await waiting_for(pool, *(f"SELECT {number}" for number in numbers))
        ended: list[int] = []
        for number, task in enumerate(tasks):
            task.add_done_callback(lambda _, number=number: ended.append(number))
        lease.end()
        assert await asyncio.gather(*tasks) == [[(number,)] for number in numbers]
        await asyncio.sleep(0)
        assert ended == [*numbers]
        leased = [event for event in heard if isinstance(event, events.Leased)]
        released = [event for event in heard if isinstance(event, events.Released)]
        assert len(leased) == len(released) == 51
        assert all(event.waited > 0 for event in leased[1:])

    run(main())


def test_hooks_hear_of_a_lease_in_the_task_whose_it_is(
    run: Runner, one: Callable[..., Pool]
) -> None:
    """The lease may be interrupted; its start is reported before its end."""
    heard: list[tuple[type[events.Event], asyncio.Task[Any] | None]] = []

    def hear(event: events.Event) -> None:
        heard.append((type(event), asyncio.current_task()))

    async def main() -> None:
        pool = one()
        lease, tasks = await waiting_for(pool, "SELECT 1", "SELECT pg_sleep(10)")
        heard.clear()
        lease.end()
        await tasks[0]
        await until(lambda: [each.task for each in pool.held()] == [tasks[1]])
        tasks[1].cancel()
        await asyncio.wait(tasks)
        both = [(kind, task) for task in tasks for kind in (events.Leased, events.Released)]
        assert heard == [(events.Released, asyncio.current_task()), *both]

    events.add_hook(hear)
    try:
        run(main())
    finally:
        events.remove_hook(hear)


def test_a_thread_that_gives_the_connection_back_wakes_who_waits(
    run: Runner, one: Callable[..., Pool]
) -> None:
    async def main() -> None:
        lease, tasks = await waiting_for(one(), "SELECT 1")
        thread = threading.Thread(target=lease.end)
        thread.start()
        thread.join()
        assert await tasks[0] == [(1,)]

    run(main())


def test_the_garbage_collector_that_gives_the_connection_back_wakes_who_waits(
    run: Runner, one: Callable[..., Pool]
) -> None:
    async def main() -> None:
        lease, tasks = await waiting_for(one(), "SELECT 1")
        ring: list[Any] = [lease]
        ring.append(ring)
        del lease, ring
        gc.collect()
        assert await tasks[0] == [(1,)]

    run(main())


# --- Errors are raised in the task that waits -----------------------------------------------------


@pytest.mark.parametrize(
    ("sql", "params", "error"),
    [
        ("SELECT 1 / %s", (0,), psycopg.errors.DivisionByZero),
        ("SELEC %s", (1,), psycopg.errors.SyntaxError),
        ("SELECT %s", (), psycopg.ProgrammingError),
        ("SELECT %s", (object(),), psycopg.ProgrammingError),
        ("SELECT %s", ("\0",), psycopg.DataError),
    ],
)
def test_an_error_is_raised_where_the_statement_is_from(
    run: Runner, one: Callable[..., Pool], sql: str, params: Any, error: type[Exception]
) -> None:
    """The error is that of psycopg's cursor, text included; the next in the queue is served."""

    async def main() -> None:
        pool = one()
        lease, tasks = await waiting_for(pool, sql, call=partial(execute, params=params))
        after = asyncio.create_task(green(execute, pool, "SELECT 2"))
        await until(lambda: pool.statistics().waiting == 2)
        lease.end()
        with pytest.raises(error) as caught:
            await tasks[0]
        with pytest.raises(error) as usual:
            await green(fetch, pool, sql, params)
        assert str(caught.value) == str(usual.value)
        assert await after == [(2,)]
        assert pool.statistics().connections_made == 1

    run(main())


def test_a_connection_that_died_before_is_replaced(
    run: Runner, one: Callable[..., Pool], pools: Pools
) -> None:
    async def main() -> None:
        pool = one()
        lease, tasks = await waiting_for(pool, "SELECT 1")
        number = lease.physical.pgconn.socket
        assert pools.terminate_sessions() == 1
        wait_for(lambda: hung_up(number), "the server has hung up")
        lease.end()
        assert await tasks[0] == [(1,)]
        assert pool.statistics().connections_made == 2

    run(main())


def test_a_connection_that_dies_meanwhile_is_an_error(
    run: Runner, one: Callable[..., Pool], pools: Pools
) -> None:
    """It is unknown whether the statement was executed: it is not sent again."""

    async def main() -> None:
        pool = one()
        lease, tasks = await waiting_for(pool, "SELECT pg_sleep(10)")
        lease.end()
        await until(lambda: pools.sessions("state = 'active'"))
        assert pools.terminate_sessions() == 1
        with pytest.raises(psycopg.OperationalError):
            await tasks[0]
        assert await green(execute, pool, "SELECT 1") == [(1,)]

    run(main())


def shut_down(pgconn: Any) -> bool:
    with socket.socket(fileno=os.dup(pgconn.socket)) as same:
        same.shutdown(socket.SHUT_RDWR)
    return True


def finish(pgconn: Any) -> bool:
    pgconn.finish()
    return True


@pytest.mark.parametrize(("breaks", "words"), [(shut_down, "server closed"), (finish, "is closed")])
def test_a_connection_that_breaks_as_the_statement_is_sent_is_an_error(
    run: Runner, one: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch, breaks: Any, words: str
) -> None:
    """The next poll finds the connection broken; the one before did not."""

    async def main() -> None:
        pool = one()
        lease, tasks = await waiting_for(pool, "SELECT 1")
        physical = lease.physical
        monkeypatch.setattr(physical, "is_alive", lambda: breaks(physical.pgconn))
        lease.end()
        with pytest.raises(psycopg.OperationalError, match=words):
            await tasks[0]
        assert await green(execute, pool, "SELECT 1") == [(1,)]
        assert pool.statistics().connections_made == 2

    run(main())


def test_a_connection_that_another_task_closes_is_an_error(
    run: Runner, one: Callable[..., Pool]
) -> None:
    async def main() -> None:
        pool = one()
        lease, tasks = await waiting_for(pool, "SELECT pg_sleep(1)")
        lease.end()
        await until(lambda: lease.physical.watch.future)
        lease.physical.close_now()
        with pytest.raises(psycopg.OperationalError, match="the connection is closed"):
            await tasks[0]
        assert await green(execute, pool, "SELECT 1") == [(1,)]

    run(main())


# --- Cancellation, too, is of the task that waits -------------------------------------------------


@pytest.mark.parametrize("how", ["cancelled", "closed", "timed out"])
def test_nothing_is_sent_for_who_has_stopped_waiting(
    run: Runner, one: Callable[..., Pool], table: str, how: str
) -> None:
    """The task has stopped waiting, but has had no turn yet to leave the queue."""

    async def main() -> None:
        pool = one()
        lease, tasks = await waiting_for(pool, f"INSERT INTO {table} VALUES (1)")
        place = pool._psycopg._waiting[0]
        stop: dict[str, Callable[[], Any]] = {
            "cancelled": tasks[0].cancel,
            "closed": tasks[0].get_coro().close,  # type: ignore[union-attr]
            "timed out": place._cond.time_out,
        }
        stop[how]()
        lease.end()
        tasks[0].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert await green(execute, pool, f"SELECT * FROM {table}") == []
        assert pool.statistics().connections_made == 1

    run(main())


def test_the_time_to_wait_for_a_connection_is_over_when_it_is_there(
    run: Runner, one: Callable[..., Pool]
) -> None:
    async def main() -> None:
        pool = one(timeout=0.2)
        lease, tasks = await waiting_for(pool, "SELECT 1, pg_sleep(0.4)")
        lease.end()
        with pytest.raises(PoolTimeout):
            await green(execute, pool, "SELECT 1")
        assert await tasks[0] == [(1, "")]
        assert pool.statistics().requests_wait_ms < 400, "the statement is not part of it"

    run(main())


# --- The statements -------------------------------------------------------------------------------


def prepared(cursor: Any) -> None:
    cursor.adapters.register_loader("int4", psycopg.types.string.TextLoader)


def with_cursor_prepared(pool: Pool, sql: str) -> Any:
    return pool.execute(sql, (), lambda adapters: prepared)[1]


class Number(int):
    """Derives from int, so that a user may have registered a dumper for it."""


def with_a_value_of_ones_own(pool: Pool, sql: str) -> Any:
    return execute(pool, "SELECT %s::int", (Number(1),))


def holding_cancellation(pool: Pool, sql: str) -> Any:
    with hold_cancellation():
        return execute(pool, sql)


@pytest.mark.parametrize(
    ("call", "factory", "rows"),
    [
        (with_cursor_prepared, psycopg.ClientCursor, [("1",)]),
        (holding_cancellation, psycopg.ClientCursor, [(1,)]),
        (with_a_value_of_ones_own, psycopg.ClientCursor, [(1,)]),
        (execute, psycopg.Cursor, [(1,)]),
        (execute, type("Own", (psycopg.ClientCursor,), {}), [(1,)]),
        (fetch, psycopg.ClientCursor, [(1,)]),
    ],
)
def test_a_statement_that_has_waited_is_executed_as_any(
    run: Runner, pools: Pools, call: Any, factory: Any, rows: Any
) -> None:
    async def main() -> None:
        pool = pools(max_size=1, connect={"cursor_factory": factory})
        lease, tasks = await waiting_for(pool, "SELECT 1", call=call)
        lease.end()
        assert await tasks[0] == rows

    run(main())


def test_a_text_that_is_too_large_to_be_sent_at_once_is_sent_in_parts(
    run: Runner, one: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A wait until the socket can be written to may be over before another task is asked to look.
    writable: list[Watch] = []
    on_writable = Watch._on_writable

    def note(watch: Watch) -> None:
        writable.append(watch)
        on_writable(watch)

    monkeypatch.setattr(Watch, "_on_writable", note)

    async def main() -> None:
        text = "x" * 20_000_000
        call = partial(execute, params=(text,))
        lease, tasks = await waiting_for(one(), "SELECT %s::text", call=call)
        lease.end()
        assert await tasks[0] == [(text,)]
        assert lease.physical.watch in writable
        assert not lease.physical.watch.writing

    run(main())


def test_who_has_patched_how_cursors_execute_is_asked(
    run: Runner, one: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        seen: list[Any] = []
        original = psycopg.Cursor.execute

        def patch(self: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(query)
            return original(self, query, *args, **kwargs)

        lease, tasks = await waiting_for(one(), "SELECT 1")
        monkeypatch.setattr(psycopg.Cursor, "execute", patch)
        lease.end()
        assert await tasks[0] == [(1,)]
        assert seen == ["SELECT 1"]

    run(main())
