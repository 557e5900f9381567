"""Tests cancellation at every point where an operation of the driver waits: `support/sweep.py`."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any

import psycopg
import pytest

from pgbackend.driver import bridge
from pgbackend.driver import connection as driver_connection
from pgbackend.driver.bridge import await_
from pgbackend.driver.bridge import run as green
from pgbackend.driver.errors import LeaseEnded, OutcomeUnknown
from pgbackend.driver.pool import Pool
from pgbackend.driver.recovery import CLEANUP_BUDGET
from tests.conftest import Runner, wait_for
from tests.support.link import Link
from tests.support.sweep import (
    ABANDONING,
    AT_MOST,
    CANCELLING,
    Interrupt,
    Mode,
    Outcome,
    as_coroutine,
    close,
    drop,
    early,
    late,
    observed,
    sweep,
)
from tests.support.tags import Oops

from .conftest import Pools, atomic, fetch, pinned, take_all

# --- Operations -----------------------------------------------------------------------------------


def insert(pool: Pool, table: str) -> None:
    with atomic(pool) as connection, connection.cursor() as cursor:
        cursor.execute(f"INSERT INTO {table} SELECT coalesce(max(n), 0) + 1 FROM {table}")


def select(pool: Pool, table: str) -> None:
    assert fetch(pool, "SELECT 1, pg_sleep(0.002)") == [(1, "")]


def roll_back(pool: Pool, table: str) -> None:
    class Undo(Exception):
        pass

    try:
        with atomic(pool) as connection, connection.cursor() as cursor:
            cursor.execute(f"INSERT INTO {table} SELECT -1")
            raise Undo
    except Undo:
        pass


def iterate(pool: Pool, table: str) -> None:
    with atomic(pool) as connection, connection.cursor("c") as cursor:
        cursor.itersize = 20
        cursor.execute("SELECT generate_series(1, 100)")
        assert sum(1 for _ in cursor) == 100


def iterate_with_hold(pool: Pool, table: str) -> None:
    with pinned(pool) as lease:
        lease.connection.rollback()  # there is nothing to roll back: does not wait
        with lease.connection.cursor("c", withhold=True) as cursor:
            cursor.execute("SELECT generate_series(1, 100)")
            assert sum(1 for _ in cursor) == 100


def insert_many(pool: Pool, table: str) -> None:
    with atomic(pool) as connection, connection.cursor() as cursor:
        cursor.executemany(f"INSERT INTO {table} VALUES (%s)", [(-n,) for n in range(1, 50)])
        cursor.execute(f"DELETE FROM {table} WHERE n < 0")


def fetch_many(pool: Pool, table: str) -> None:
    with pinned(pool) as lease, lease.connection.cursor() as cursor:
        cursor.executemany("SELECT %s::int", [(n,) for n in range(5)], returning=True)
        assert [result.fetchone() for result in cursor.results()] == [(n,) for n in range(5)]


def copy_in(pool: Pool, table: str) -> None:
    with atomic(pool) as connection, connection.cursor() as cursor:
        with cursor.copy(f"COPY {table} FROM STDIN") as copy:
            for n in range(1, 20):
                copy.write_row((-n,))
        cursor.execute(f"DELETE FROM {table} WHERE n < 0")


def copy_out(pool: Pool, table: str) -> None:
    with pinned(pool) as lease, lease.connection.cursor() as cursor:
        query = "COPY (SELECT repeat('x', 10000) FROM generate_series(1, 50)) TO STDOUT"
        with cursor.copy(query) as copy:
            assert sum(1 for _ in copy) == 50


def pipeline(pool: Pool, table: str) -> None:
    with pinned(pool) as lease, lease.connection.pipeline(), ExitStack() as stack:
        cursors = [stack.enter_context(lease.connection.cursor()) for _ in range(5)]
        for n, cursor in enumerate(cursors):
            cursor.execute("SELECT %s::int", [n])
        assert [cursor.fetchone() for cursor in cursors] == [(n,) for n in range(5)]


def nested(pool: Pool, table: str) -> None:
    with pinned(pool) as lease, lease.connection.transaction():
        with lease.connection.transaction(), lease.connection.cursor() as cursor:
            cursor.execute(f"INSERT INTO {table} SELECT coalesce(max(n), 0) + 1 FROM {table}")


def leave_dirty(pool: Pool, table: str) -> None:
    with pinned(pool) as lease:
        lease.dirty = True
        lease.connection.execute("SET search_path = pg_catalog").close()
    assert fetch(pool, "SHOW search_path") == [('"$user", public',)]


def notifications(pool: Pool, table: str) -> None:
    with pinned(pool) as lease:
        lease.dirty = True
        lease.connection.execute("LISTEN channel").close()
        assert list(lease.connection.notifies(timeout=0.01)) == []


OPERATIONS = [
    select,
    insert,
    roll_back,
    iterate,
    iterate_with_hold,
    insert_many,
    fetch_many,
    copy_in,
    copy_out,
    pipeline,
    nested,
    leave_dirty,
    notifications,
]


def name_of(thing: Any) -> str:
    return str(thing.__name__).strip("_")


@pytest.mark.sweep(one_in=8)
@pytest.mark.parametrize("mode", CANCELLING, ids=name_of)
@pytest.mark.parametrize("operation", OPERATIONS, ids=name_of)
def test_an_operation_that_is_cancelled_anywhere_leaves_everything_whole(
    run: Runner,
    pools: Pools,
    table: str,
    admin: psycopg.Connection[Any],
    operation: Callable[[Pool, str], None],
    mode: Mode,
) -> None:
    async def main() -> None:
        pool = pools(max_size=2)

        async def check(outcome: Outcome) -> None:
            if not outcome.cancelled:  # only the last run is not interrupted, and succeeds
                outcome.task.result()
            assert await green(take_all, pool) == 2
            wait_for(lambda: not pools.sessions("state LIKE 'idle in%'"), "none in a transaction")
            s = pool.statistics()
            assert (s.leased, s.waiting) == (0, 0) and s.size <= 2
            rows = [n for (n,) in admin.execute(f"SELECT n FROM {table} ORDER BY n")]
            assert rows == list(range(1, len(rows) + 1))
            after.append((outcome.cancelled, len(rows)))

        after: list[tuple[bool, int]] = []
        waits = await sweep(lambda: green(operation, pool, table), mode, check)
        assert [cancelled for cancelled, _ in after] == [True] * waits + [False]
        assert waits >= 1
        if operation is insert:
            # Rows committed before the cancellation was delivered are there; others are not.
            assert after[0][1] == 0 and after[-1][1] == (after[-2][1] if waits else 0) + 1

    run(main())


def at_yield(mode: Mode, at: int, yields: list[int]) -> Interrupt:
    """Interrupt where the task yields to other tasks without waiting; record these yields."""

    def interrupt(number: int, waits_for: Any, task: asyncio.Task[Any]) -> str | None:
        if waits_for is not None:
            return None
        yields.append(number)
        return mode(at)(len(yields) - 1, waits_for, task)

    return interrupt


@pytest.mark.sweep(one_in=6)
@pytest.mark.parametrize("mode", [early, close, drop], ids=name_of)
@pytest.mark.parametrize("operation", OPERATIONS, ids=name_of)
def test_an_operation_that_is_interrupted_where_it_yields_leaves_everything_whole(
    run: Runner,
    pools: Pools,
    table: str,
    monkeypatch: pytest.MonkeyPatch,
    operation: Callable[[Pool, str], None],
    mode: Mode,
) -> None:
    """The operation yields each time, where otherwise it would do so only after a long time."""
    monkeypatch.setattr(driver_connection, "MAX_BUSY_TIME", 0.0)

    async def main() -> None:
        pool = pools(max_size=2)
        for at in range(100):
            yields: list[int] = []

            observing = observed(green(operation, pool, table), at_yield(mode, at, yields), [])
            task = asyncio.create_task(as_coroutine(observing))
            await asyncio.wait([task], timeout=AT_MOST)
            if len(yields) <= at:
                return task.result()
            assert Outcome(at, task).interrupted
            assert await green(take_all, pool) == 2
            wait_for(lambda: not pools.sessions("state LIKE 'idle in%'"), "none in a transaction")
        raise AssertionError("the operation never ends uninterrupted")

    run(main())


def test_a_lease_that_ends_while_its_holder_yields_is_refused(
    run: Runner, pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver_connection, "MAX_BUSY_TIME", 0.0)

    async def main() -> None:
        pool = pools(max_size=1)

        def hold() -> None:
            lease = pool.lease()
            lease.pin()
            with lease.connection.pipeline(), lease.connection.cursor() as cursor:
                asyncio.get_running_loop().call_soon(lease.end)
                cursor.execute("SELECT 1")

        with pytest.raises(LeaseEnded):
            await green(hold)
        assert await green(take_all, pool) == 1

    run(main())


def plainly(connection: Any) -> None:
    connection.execute("SELECT 1")


def in_a_pipeline(connection: Any) -> None:
    with connection.pipeline(), connection.cursor() as cursor:
        cursor.execute("SELECT 1")


def in_a_copy(connection: Any) -> None:
    with connection.cursor() as cursor, cursor.copy("COPY (SELECT 1) TO STDOUT") as copy:
        copy.read()


@pytest.mark.parametrize("use", [plainly, in_a_pipeline, in_a_copy], ids=name_of)
def test_what_yields_when_its_loop_is_closed_is_unwound_without_an_error_of_its_own(
    run_once: Runner, pools: Pools, monkeypatch: pytest.MonkeyPatch, use: Callable[[Any], None]
) -> None:
    """Each coroutine is closed at another yield; no running loop can be asked for a watch then."""
    left: list[Any] = []

    def hold(pool: Pool) -> None:
        with pinned(pool) as lease:
            use(lease.connection)

    async def main() -> None:
        pool = pools(max_size=9)
        monkeypatch.setattr(driver_connection, "MAX_BUSY_TIME", float("inf"))
        assert await green(take_all, pool) == 9
        monkeypatch.setattr(driver_connection, "MAX_BUSY_TIME", 0.0)
        for at in range(5):
            yields = 0
            driver_connection.Connection._kept_busy = True
            coro = green(hold, pool)
            left.append(coro)
            while yields <= at:
                try:
                    future = coro.send(None)
                except StopIteration:
                    break
                yields += future is None
                if future is not None:
                    future._asyncio_future_blocking = False
                    await asyncio.wait([future])

    run_once(main())
    for coro in left:
        coro.close()
    assert len(left) == 5


class Kept:
    """Stands for what the frames of an operation refer to."""


# Not `twice`: contextlib's generators keep an exception that is replaced by another.
@pytest.mark.parametrize("mode", [early, late], ids=name_of)
@pytest.mark.parametrize("operation", [select, insert, iterate, nested], ids=name_of)
def test_what_a_cancelled_operation_holds_is_let_go_without_the_garbage_collector(
    run: Runner,
    pools: Pools,
    table: str,
    operation: Callable[[Pool, str], None],
    mode: Mode,
) -> None:
    async def main() -> None:
        pool = pools(max_size=1)
        held: list[weakref.ref[Kept]] = []

        def hold() -> None:
            kept = Kept()
            held.append(weakref.ref(kept))
            operation(pool, table)

        async def check(outcome: Outcome) -> None:
            del outcome.task
            await asyncio.sleep(0)

        assert await green(take_all, pool) == 1  # connected
        gc.collect()
        gc.disable()
        try:
            await sweep(lambda: green(hold), mode, check)
        finally:
            gc.enable()
        assert [ref() for ref in held] == [None] * len(held)

    run(main())


def test_what_a_cancelled_green_task_holds_is_let_go_without_the_garbage_collector(
    run: Runner,
) -> None:
    async def hold(began: asyncio.Event, held: list[weakref.ref[Kept]]) -> None:
        kept = Kept()
        held.append(weakref.ref(kept))
        began.set()
        await asyncio.Event().wait()

    async def start() -> None:
        began, held = asyncio.Event(), list[weakref.ref[Kept]]()
        task = asyncio.create_task(hold(began, held))
        await began.wait()
        task.cancel()
        await asyncio.wait([task])
        del task
        await asyncio.sleep(0)
        assert [ref() for ref in held] == [None]

    async def main() -> None:
        gc.disable()
        try:
            await bridge.portal(start())
        finally:
            gc.enable()

    run(main())


def execute(pool: Pool, sql: str) -> list[Any] | None:
    """Execute a statement as the ORM's are: on a lease of its own, and without a cursor."""
    return pool.execute(sql, (), lambda adapters: None)[1]


@pytest.mark.parametrize("call", [fetch, execute], ids=name_of)
@pytest.mark.parametrize("mode", [*CANCELLING, *ABANDONING], ids=name_of)
def test_waiting_for_a_connection_can_be_interrupted_anywhere(
    run: Runner, pools: Pools, mode: Mode, call: Callable[[Pool, str], Any]
) -> None:
    """The pool is exhausted until the waiter waits; then its turn and its interruption race."""

    async def main() -> None:
        pool = pools(max_size=1, connect={"cursor_factory": psycopg.ClientCursor})

        def hold(released: asyncio.Event) -> None:
            with pinned(pool) as lease:
                lease.connection.execute("SELECT 1").close()
                await_(released.wait())

        async def contend() -> None:
            released = asyncio.Event()
            holding = asyncio.create_task(green(hold, released))
            try:
                while not pool.statistics().leased:
                    await asyncio.sleep(0)
                asyncio.get_running_loop().call_later(0.002, released.set)
                assert await green(call, pool, "SELECT 1, pg_sleep(0.002)") == [(1, "")]
            finally:
                released.set()
                others.append(holding)

        others: list[asyncio.Task[None]] = []

        async def check(outcome: Outcome) -> None:
            await asyncio.wait(others)
            others.clear()
            assert await green(take_all, pool) == 1
            assert (pool.statistics().waiting, pool.statistics().leased) == (0, 0)

        # The first waits differ in number from run to run: it suffices to have tried all.
        await sweep(contend, mode, check)

    run(main())


@pytest.mark.parametrize("mode", CANCELLING, ids=name_of)
def test_opening_the_pool_can_be_cancelled_anywhere(
    run_once: Runner, pools: Pools, mode: Mode
) -> None:
    """Each run has a pool of its own, which another task opens at the same time."""

    async def main() -> None:
        async def check(outcome: Outcome) -> None:
            for other in others:
                assert await other == [(1,)]
            others.clear()
            pool = pools()
            assert await green(take_all, pool) == 3
            pool.close()
            _forget(pools)

        async def first() -> Any:
            others.append(asyncio.create_task(green(fetch, pools(), "SELECT 1")))
            return await green(fetch, pools(), "SELECT 1")

        others: list[asyncio.Task[Any]] = []
        await sweep(first, mode, check)

    run_once(main())


def _forget(pools: Pools) -> None:
    from pgbackend.driver.loops import close_pools

    close_pools(pools.name)


# --- The statement on the server ------------------------------------------------------------------


def test_the_statement_is_cancelled_on_the_server_and_the_session_lives(
    run: Runner, pools: Pools
) -> None:
    async def main() -> None:
        pool = pools(max_size=1)
        (before,) = await green(fetch, pool, "SELECT pg_backend_pid()")
        for _ in range(10):
            task = asyncio.create_task(green(fetch, pool, "SELECT pg_sleep(20)"))
            while not pools.sessions("state = 'active'"):
                await asyncio.sleep(0.001)
            started = monotonic()
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled() and monotonic() - started < AT_MOST
            assert not pools.sessions("state = 'active'")
            assert await green(fetch, pool, "SELECT pg_backend_pid()") == [before]

    run(main())


def test_a_cancel_request_never_hits_the_next_statement(run: Runner, pools: Pools) -> None:
    """Every pool that cancels has this race: a statement follows each cancelled one, 100 times."""

    async def main() -> None:
        pool = pools(max_size=1)
        for n in range(100):
            task = asyncio.create_task(green(fetch, pool, "SELECT pg_sleep(0.002)"))
            await asyncio.sleep(0.0005 * (n % 8))
            task.cancel()
            innocent = asyncio.create_task(green(fetch, pool, "SELECT %s::int", [n]))
            await asyncio.wait([task])
            assert await innocent == [(n,)]

    run(main())


def test_a_cancel_request_that_overtakes_its_statement_is_repeated(
    run: Runner, pools_by_link: Pools, link: Link
) -> None:
    """The server ignores a request that finds its session idle: the statement would run on."""

    async def main() -> None:
        pool = pools_by_link(max_size=1)
        (before,) = await green(fetch, pool, "SELECT pg_backend_pid()")
        link.freeze(new=False)
        task = asyncio.create_task(green(fetch, pool, "SELECT pg_sleep(20)"))
        await asyncio.sleep(0.01)
        attempts = link.attempts
        task.cancel()
        while link.attempts == attempts:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)  # the request goes on its own connection, to an idle session
        link.thaw()
        await asyncio.wait([task])
        assert task.cancelled()
        assert not pools_by_link.sessions("state = 'active'")
        assert await green(fetch, pool, "SELECT pg_backend_pid()") == [before]

    run(main())


def test_a_timeout_of_asyncio_cancels_the_statement(run: Runner, pools: Pools) -> None:
    async def main() -> None:
        pool = pools(max_size=1)
        for _ in range(5):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await green(fetch, pool, "SELECT pg_sleep(20)")
            assert await green(fetch, pool, "SELECT 1") == [(1,)]

    run(main())


def test_finally_blocks_may_use_the_database(run: Runner, pools: Pools, table: str) -> None:
    async def main() -> None:
        pool = pools()

        def work() -> None:
            try:
                fetch(pool, "SELECT pg_sleep(20)")
            finally:
                fetch(pool, f"INSERT INTO {table} VALUES (1)")

        task = asyncio.create_task(green(work))
        while not pools.sessions("state = 'active'"):
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert await green(fetch, pool, f"SELECT n FROM {table}") == [(1,)]

    run(main())


def test_a_storm_of_cancellations_leaves_the_pool_whole(run: Runner, pools: Pools) -> None:
    """Clients hang up: while they wait, while they query, and while they give back."""

    async def main() -> None:
        pool = pools(max_size=3)

        async def client(n: int) -> Any:
            task = asyncio.create_task(green(fetch, pool, "SELECT %s::int, pg_sleep(0.001)", [n]))
            for _ in range(n % 23):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            return None if task.cancelled() else task.result()

        async def probe(n: int) -> None:
            async with asyncio.timeout(5):
                assert await green(fetch, pool, "SELECT %s::int", [n]) == [(n,)]

        jobs = [client(n) if n % 10 else probe(n) for n in range(400)]
        await asyncio.gather(*jobs)
        assert await green(take_all, pool) == 3
        assert pool.statistics().waiting == 0

    run(main())


# --- The end of a transaction ---------------------------------------------------------------------


def test_a_commit_is_not_torn(run: Runner, pools: Pools, admin: Any) -> None:
    """A slow COMMIT (a deferred trigger) is cancelled: it is done, then the cancellation comes."""
    admin.execute(
        """
        CREATE TABLE slow (n int);
        CREATE FUNCTION slowly() RETURNS trigger LANGUAGE plpgsql AS
          'BEGIN PERFORM pg_sleep(0.1); RETURN NULL; END';
        CREATE CONSTRAINT TRIGGER slowly AFTER INSERT ON slow DEFERRABLE INITIALLY DEFERRED
          FOR EACH ROW EXECUTE FUNCTION slowly();
        """
    )

    async def main() -> None:
        pool = pools(max_size=1)
        after: list[str] = []

        def work(n: int) -> None:
            with atomic(pool) as connection, connection.cursor() as cursor:
                cursor.execute("INSERT INTO slow VALUES (%s)", [n])
            after.append("delivered before this")

        for n, cancels in enumerate([1, 3]):
            task = asyncio.create_task(green(work, n))
            while not pools.sessions("state = 'active' AND query = 'COMMIT'"):
                await asyncio.sleep(0.001)
            for _ in range(cancels):
                task.cancel()
                await asyncio.sleep(0)
            await asyncio.wait([task])
            assert task.cancelled() and not after
            rows = admin.execute("SELECT n FROM slow ORDER BY n").fetchall()
            assert rows == [(m,) for m in range(n + 1)]

    try:
        run(main())
    finally:
        admin.execute("DROP TABLE slow; DROP FUNCTION slowly")


def test_a_commit_whose_answer_never_comes_says_that_it_does_not_know(
    run: Runner, pools_by_link: Pools, link: Link, table: str
) -> None:
    async def main() -> None:
        pool = pools_by_link(max_size=1)

        def work() -> None:
            with pinned(pool) as lease:
                connection = lease.connection
                connection._autocommit = False
                connection.execute(f"INSERT INTO {table} VALUES (1)").close()
                link.freeze()
                ready.set()
                connection.commit()

        ready = asyncio.Event()
        task = asyncio.create_task(green(work))
        await ready.wait()
        await asyncio.sleep(0.01)
        started = monotonic()
        task.cancel()
        with pytest.raises(OutcomeUnknown, match="may or may not have been committed"):
            await task
        assert CLEANUP_BUDGET / 2 < monotonic() - started < AT_MOST
        link.thaw()
        assert await green(take_all, pool) == 1

    run(main())
    wait_for(lambda: not pools_by_link.sessions(), "sessions closed")


LONG_COPY = "COPY (SELECT repeat('x', 999) FROM generate_series(1, 99999)) TO STDOUT"


@pytest.mark.sweep(one_in=4)
@pytest.mark.parametrize("how", ["left", "asked"])
def test_a_cancel_request_that_is_not_answered_does_not_block_the_loop(
    run: Runner, pools_by_link: Pools, link: Link, how: str
) -> None:
    """psycopg sends such a request where a COPY is left early, and where the user cancels."""

    async def main() -> None:
        pool = pools_by_link(max_size=1)

        def work() -> None:
            with pinned(pool) as lease, lease.connection.cursor() as cursor:
                with cursor.copy(LONG_COPY) as copy:
                    assert copy.read()
                    link.freeze()
                    begun.set()
                    if how == "asked":
                        lease.connection.cancel_safe(timeout=60)
                    raise Oops

        begun = asyncio.Event()
        task = asyncio.create_task(green(work))
        started = monotonic()
        while not begun.is_set():
            await asyncio.sleep(0)
        assert monotonic() - started < AT_MOST, "the loop was blocked"
        assert not task.done()
        task.cancel()
        await asyncio.wait([task], timeout=2 * CLEANUP_BUDGET + AT_MOST)
        assert task.cancelled()
        link.thaw()
        assert await green(take_all, pool) == 1

    run(main())
    wait_for(lambda: not pools_by_link.sessions(), "sessions closed")


def sockets_to(port: int) -> int:
    """Return how many sockets of this process are connected to a local port."""
    found = 0
    for each in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # raised for a closed or unconnected socket
            if str(each.readlink()).startswith("socket:"):
                with socket.socket(fileno=os.dup(int(each.name))) as connected:
                    found += connected.getpeername()[1:2] == (port,)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_a_cancel_request_that_is_interrupted_leaves_no_socket(
    run: Runner, pools_by_link: Pools, link: Link
) -> None:
    """The exception that has interrupted the request may be kept, with all frames."""

    async def main() -> None:
        pool = pools_by_link(max_size=1)

        def work() -> None:
            with pinned(pool) as lease, lease.connection.cursor() as cursor:
                with cursor.copy(LONG_COPY):
                    assert sockets_to(link.port) == 1
                    link.freeze()
                    begun.set()
                    try:
                        lease.connection.cancel_safe(timeout=60)
                    except asyncio.CancelledError as exc:
                        kept.append(exc)
                    assert sockets_to(link.port) == 1

        kept: list[BaseException] = []
        begun = asyncio.Event()
        task = asyncio.create_task(green(work))
        await begun.wait()
        assert sockets_to(link.port) == 2
        task.cancel()
        await asyncio.wait([task])
        assert task.exception() is None and kept
        link.thaw()

    run(main())
    wait_for(lambda: not pools_by_link.sessions(), "sessions closed")


@contextmanager
def streaming(cursor: Any, table: str) -> Iterator[None]:
    with closing(cursor.stream("SELECT repeat('x', 999) FROM generate_series(1, 99999)")) as rows:
        next(rows)
        yield


def copying_out(cursor: Any, table: str) -> Any:
    return cursor.copy(LONG_COPY)


def copying_in(cursor: Any, table: str) -> Any:
    return cursor.copy(f"COPY {table} FROM STDIN")


@pytest.mark.sweep(one_in=12)
@pytest.mark.parametrize("begin", [copying_out, copying_in, streaming])
@pytest.mark.parametrize("how", ["cancelled", "failed"])
def test_what_is_left_in_its_midst_while_the_server_is_silent_ends_soon(
    run: Runner, pools_by_link: Pools, link: Link, table: str, begin: Any, how: str
) -> None:
    async def main() -> None:
        pool = pools_by_link(max_size=1)

        def work() -> None:
            with pinned(pool) as lease, lease.connection.cursor() as cursor:
                try:
                    with begin(cursor, table):
                        link.freeze()
                        begun.set()
                        if how == "failed":
                            raise Oops
                        await_(asyncio.Event().wait())
                finally:
                    assert lease.connection.closed

        begun = asyncio.Event()
        task = asyncio.create_task(green(work))
        await begun.wait()
        task.cancel() if how == "cancelled" else None
        await asyncio.wait([task], timeout=4 * CLEANUP_BUDGET + AT_MOST)
        assert task.cancelled() if how == "cancelled" else isinstance(task.exception(), Oops)
        link.thaw()
        assert await green(take_all, pool) == 1

    run(main())
    wait_for(lambda: not pools_by_link.sessions(), "sessions closed")


def test_a_commit_of_a_connection_of_its_own_is_not_torn_either(
    run: Runner, conninfo: str, table: str, admin: psycopg.Connection[Any]
) -> None:
    from pgbackend.driver import connect

    async def main() -> None:
        def work() -> None:
            with connect(conninfo) as connection:
                connection.execute(f"INSERT INTO {table} VALUES (1)")
                task.cancel()
                connection.commit()

        task = asyncio.create_task(green(work))
        await asyncio.wait([task])
        assert task.cancelled()

    run(main())
    assert admin.execute(f"SELECT n FROM {table}").fetchall() == [(1,)]


def test_children_that_are_cancelled_with_their_group_leave_everything_whole(
    run: Runner, pools: Pools
) -> None:
    """One of a TaskGroup's green tasks fails; its siblings are cancelled in their statements."""

    async def main() -> None:
        pool = pools(max_size=4)

        async def sibling(n: int) -> None:
            fetch(pool, "SELECT pg_sleep(%s)", [0.01 if n else 20])
            if n:
                raise ZeroDivisionError

        async def group() -> None:
            async with asyncio.TaskGroup() as tasks:
                for n in (0, 0, 1, 0):
                    tasks.create_task(sibling(n))

        with pytest.raises(ExceptionGroup) as caught:
            await bridge.portal(group())
        assert len(caught.value.exceptions) == 1
        assert await green(take_all, pool) == 4

    run(main())
