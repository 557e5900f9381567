"""Tests the pool: leases, their ends, failures, resets, and one pool for each process and loop."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import subprocess
import sys
import textwrap
import threading
import warnings
import weakref
from pathlib import Path
from time import monotonic
from typing import Any

import psycopg
import pytest

from pgbackend.driver import bridge, events, forks, loops
from pgbackend.driver.bridge import await_
from pgbackend.driver.bridge import run as green
from pgbackend.driver.errors import LeaseEnded, PoolClosed, PoolQueueFull, PoolTimeout
from pgbackend.driver.loops import close_pools
from pgbackend.driver.pool import Pool
from pgbackend.driver.psycopg_pool_adapter import MAX_REMAKES
from tests.conftest import LOOPS, Runner, wait_for
from tests.support.link import Link

from .conftest import Pools, atomic, fetch, hung_up, pinned, take_all


async def until(condition: Any) -> None:
    """Let the loop turn until another task has made `condition` true."""
    while not condition():
        await asyncio.sleep(0.001)


async def hold_one(pool: Pool) -> tuple[asyncio.Task[None], asyncio.Event]:
    """Let another task hold a connection until the event is set; return when it does."""
    released = asyncio.Event()

    def hold() -> None:
        with pinned(pool):
            await_(released.wait())

    holding = asyncio.create_task(green(hold), name="the holder")
    await until(lambda: pool.statistics().leased or holding.done())
    if holding.done():
        holding.result()  # raises: no connection could be opened
    return holding, released


# --- Leases ---------------------------------------------------------------------------------------


def test_a_lease_ends_when_its_cursor_closes(run: Runner, pools: Pools) -> None:
    def main() -> None:
        pool = pools()
        lease = pool.lease()
        cursor = lease.connection.cursor()
        cursor.execute("SELECT 1")
        assert pool.statistics().leased == 1 and not lease.ended
        cursor.close()
        assert lease.ended and pool.statistics().leased == 0
        cursor.close()
        assert pool.statistics().idle == 1

    run.green(main)


def test_a_lease_ends_with_the_last_of_its_cursors_and_pins(run: Runner, pools: Pools) -> None:
    def main() -> None:
        lease = pools().lease()
        one, two = lease.connection.cursor(), lease.connection.cursor()
        lease.pin()
        one.close()
        two.close()
        assert not lease.ended
        lease.unpin()
        assert lease.ended
        lease.end()

    run.green(main)


def test_a_connection_is_used_again(run: Runner, pools: Pools) -> None:
    def main() -> None:
        pool = pools()
        assert len({fetch(pool, "SELECT pg_backend_pid()")[0] for _ in range(20)}) == 1
        assert pool.statistics().connections_made == 1

    run.green(main)


@pytest.mark.shortcut("lease")
def test_the_connection_that_was_used_last_is_used_next(run: Runner, pools: Pools) -> None:
    def main() -> None:
        pool = pools()
        leases = [pool.lease() for _ in range(3)]
        for lease in leases:
            lease.end()
        for _ in range(2):
            lease = pool.lease()
            assert lease.physical is leases[-1].physical
            lease.end()

    run.green(main)


@pytest.mark.shortcut("lease")
def test_a_connection_that_is_kept_is_not_left_unused_for_long(run: Runner, pools: Pools) -> None:
    def main() -> None:
        pool = pools(max_idle=60.0)
        leases = [pool.lease() for _ in range(2)]
        for lease in leases:
            lease.end()
        leases[0].physical.free_since -= 61
        used = []
        for _ in range(3):
            lease = pool.lease()
            used.append(leases[0].physical is lease.physical)
            lease.end()
        assert used == [True, True, True]
        leases[1].physical.free_since -= 61
        with pinned(pool) as lease:
            assert lease.physical is leases[1].physical

    run.green(main)


def test_ending_a_lease_twice_gives_one_connection_back(run: Runner, pools: Pools) -> None:
    def main() -> None:
        pool = pools()
        lease = pool.lease()
        lease.end()
        lease.end()
        assert pool.statistics().idle == 1
        assert take_all(pool) == 3

    run.green(main)


def test_what_was_kept_of_an_ended_lease_is_refused(run: Runner, pools: Pools) -> None:
    """No byte is sent: not even into the transaction that uses the session by now."""

    def main() -> None:
        pool = pools(max_size=1)
        lease = pool.lease()
        lease.pin()
        connection = lease.connection
        cursor = connection.cursor()
        cursor.execute("SELECT 1")
        connection.execute("BEGIN")
        named = connection.cursor("named")
        named.execute("SELECT 1")
        block = connection.transaction("spot")
        block.__enter__()
        lease.dirty = True
        lease.end()
        with atomic(pool) as next_one:
            with next_one.cursor() as mine:
                mine.execute("SELECT 42")
            uses = {
                "cursor": lambda: cursor.execute("SELECT 1"),
                "executemany": lambda: cursor.executemany("SELECT %s", [(1,), (2,)]),
                "new cursor": connection.cursor,
                "execute": lambda: connection.execute("SELECT 1"),
                "server-side cursor": named.fetchone,
                "copy": lambda: cursor.copy("COPY t FROM STDIN").__enter__(),
                "commit": connection.commit,
                "rollback": connection.rollback,
                "autocommit": lambda: connection.set_autocommit(True),
                "savepoint": lambda: block.__exit__(None, None, None),
                "pipeline": lambda: connection.pipeline().__enter__(),
                "notifies": lambda: list(connection.notifies(timeout=0)),
            }
            for name, use in uses.items():
                with pytest.raises(LeaseEnded, match=r"went back to the pool") as caught:
                    use()
                assert "pgbackend.pinned()" in str(caught.value), name
            assert connection.closed
            connection.close()
            with next_one.cursor() as mine:
                mine.execute("SELECT query FROM pg_stat_activity WHERE pid = pg_backend_pid()")
                assert "SELECT query" in mine.fetchone()[0]
        cursor.close()
        named.close()

    run.green(main)


def test_a_copy_that_was_kept_of_an_ended_lease_is_refused(run: Runner, pools: Pools) -> None:
    """The session, left in the midst of a COPY, is closed and replaced."""

    def main() -> None:
        pool = pools(max_size=1)
        lease = pool.lease()
        lease.pin()
        cursor = lease.connection.cursor()
        cursor.execute("CREATE TEMPORARY TABLE t (n int)")
        with pytest.raises(LeaseEnded), cursor.copy("COPY t FROM STDIN") as copy:
            lease.end()
            with pytest.raises(LeaseEnded):
                for n in range(100_000):
                    copy.write_row((n,))
            assert fetch(pool, "SELECT 1") == [(1,)]
        cursor.close()

    run.green(main)


def test_what_an_ended_lease_left_locked_does_not_stop_the_next(run: Runner, pools: Pools) -> None:
    """A generator of notifications holds its connection's lock for as long as it lives."""

    def main() -> None:
        pool = pools(max_size=1)
        with pinned(pool) as lease:
            lease.dirty = True
            lease.connection.execute("LISTEN one; NOTIFY one").close()
            notifications = lease.connection.notifies(timeout=1)
            next(notifications)
        assert fetch(pool, "SELECT 1") == [(1,)]
        with pytest.raises(LeaseEnded):
            list(notifications)

    run.green(main)


def test_reading_from_a_cursor_after_its_lease_needs_no_connection(
    run: Runner, pools: Pools
) -> None:
    """Rows that are in memory already may still be read: they are the cursor's."""

    def main() -> None:
        lease = pools().lease()
        cursor = lease.connection.cursor()
        cursor.execute("SELECT generate_series(1, 3)")
        lease.end()
        assert cursor.fetchall() == [(1,), (2,), (3,)]
        cursor.close()

    run.green(main)


def test_a_lease_that_nobody_holds_any_more_ends(run: Runner, pools: Pools) -> None:
    def main() -> None:
        pool = pools(max_size=1)
        lease = pool.lease()
        assert lease
        del lease
        gc.collect()
        assert take_all(pool) == 1

    run.green(main)


def test_a_forgotten_cursor_warns_with_the_place_and_gives_back(run: Runner, pools: Pools) -> None:
    def main() -> None:
        pool = pools(max_size=1)
        cursor = pool.lease().connection.cursor()
        cursor.opened_at = "views.py:12"
        cursor.execute("SELECT 1")
        with pytest.warns(ResourceWarning, match=r"opened at views\.py:12 was never closed"):
            del cursor
            gc.collect()
        assert take_all(pool) == 1

    run.green(main)


def test_a_forgotten_cursor_gives_back_also_where_warnings_are_errors(
    run: Runner, pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)

    def main() -> None:
        lease = pools(max_size=1).lease()
        cursor = lease.connection.cursor()
        cursor.opened_at = "views.py:12"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            del cursor
            gc.collect()
        assert lease.ended

    run.green(main)
    assert [type(unraisable.exc_value) for unraisable in told] == [ResourceWarning]
    told.clear()


def test_a_forgotten_server_side_cursor_gives_back_and_leaves_nothing(
    run: Runner, pools: Pools
) -> None:
    """A cursor WITH HOLD outlives its transaction; the reset closes it."""

    def main() -> None:
        pool = pools(max_size=1)
        cursor = pool.lease().connection.cursor("held", withhold=True)
        cursor.execute("SELECT generate_series(1, 1000)")
        cursor.fetchone()
        del cursor
        gc.collect()
        assert fetch(pool, "SELECT count(*) FROM pg_cursors") == [(0,)]

    run.green(main)


def test_an_abandoned_generator_gives_its_connection_back(run: Runner, pools: Pools) -> None:
    """Another task than the cursor's own collects the generator: nothing is sent there."""

    async def main() -> None:
        pool = pools(max_size=1)

        def rows() -> Any:
            lease = pool.lease()
            with lease.connection.cursor("c", withhold=True) as cursor:
                cursor.execute("SELECT generate_series(1, 1000)")
                yield from cursor

        def start() -> Any:
            generator = rows()
            assert next(generator) == (1,)
            return generator

        generator = await green(start)
        assert pool.statistics().leased == 1
        await asyncio.create_task(_close(generator))
        assert pool.statistics().leased == 0
        assert await green(fetch, pool, "SELECT count(*) FROM pg_cursors") == [(0,)]

    run(main())


async def _close(generator: Any) -> None:
    generator.close()


def test_a_coroutine_that_is_dropped_in_a_statement_loses_no_slot(
    run: Runner, pools: Pools
) -> None:
    """The connection cannot be recovered without waiting: it is closed and replaced."""

    async def main() -> None:
        pool = pools(max_size=2)
        for _ in range(5):
            await green(fetch, pool, "SELECT 1")
            coro = green(fetch, pool, "SELECT pg_sleep(1)")
            coro.send(None)
            assert pool.statistics().leased == 1
            coro.close()
            assert pool.statistics().leased == 0
        assert await green(take_all, pool) == 2

    run(main())


def test_a_lease_may_end_in_another_thread(run: Runner, pools: Pools) -> None:
    def main() -> None:
        pool = pools(max_size=1)
        for _ in range(5):
            lease = pool.lease()
            await_(asyncio.to_thread(lease.end))
            assert take_all(pool) == 1

    run.green(main)


def test_a_lease_that_ends_after_its_loop_closes_its_session(run: Runner, pools: Pools) -> None:
    lease = run.green(lambda: pools().lease())
    assert pools.sessions()
    lease.end()
    wait_for(lambda: not pools.sessions(), "session closed")


# --- Size and order -------------------------------------------------------------------------------


def test_no_more_sessions_than_max_size_under_load(run: Runner, pools: Pools) -> None:
    async def main() -> None:
        pool = pools(max_size=5)
        most = 0
        done = False

        async def watch() -> None:
            nonlocal most
            while not done:
                most = max(most, len(pools.sessions()))
                await asyncio.sleep(0.002)

        watching = asyncio.create_task(watch())
        rows = await asyncio.gather(
            *(green(fetch, pool, "SELECT %s::int, pg_sleep(0.002)", [n]) for n in range(200))
        )
        done = True
        await watching
        assert [row[0][0] for row in rows] == list(range(200))
        assert most <= 5
        s = pool.statistics()
        assert s.leased == s.waiting == 0 and s.idle == s.size <= 5

    run(main())


def test_who_waits_is_served_in_order(run: Runner, pools: Pools) -> None:
    async def main() -> None:
        pool = pools(max_size=1)
        order: list[int] = []

        def use(n: int) -> None:
            with pinned(pool) as lease, lease.connection.cursor() as cursor:
                order.append(n)
                cursor.execute("SELECT 1")

        await green(use, -1)
        await asyncio.gather(*(green(use, n) for n in range(50)))
        assert order == list(range(-1, 50))

    run(main())


@pytest.mark.parametrize("how", ["cancelled", "closed", "timed out"])
@pytest.mark.parametrize("given_first", [False, True])
def test_a_connection_given_to_who_stops_waiting_is_not_lost(
    run: Runner, pools: Pools, how: str, given_first: bool
) -> None:
    """The ends of the lease and of the wait come in one step, with no turn of the loop between."""

    async def main() -> None:
        pool = pools(max_size=1)
        lease = await green(pool.lease)
        waiting = asyncio.create_task(green(fetch, pool, "SELECT 1"))
        await until(lambda: pool.statistics().waiting)
        place = pool._psycopg._waiting[0]
        stop = {
            "cancelled": waiting.cancel,
            "closed": waiting.get_coro().close,
            "timed out": place._cond.time_out,
        }[how]
        for act in (lease.end, stop) if given_first else (stop, lease.end):
            act()
        if how == "timed out" and given_first:
            assert await waiting == [(1,)], "it had been served in time"
        elif how == "closed":
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        else:
            with pytest.raises((asyncio.CancelledError, PoolTimeout)):
                await waiting
        async with asyncio.timeout(5):
            assert await green(fetch, pool, "SELECT 1") == [(1,)]
        statistics = pool.statistics()
        assert (statistics.leased, statistics.idle, statistics.waiting) == (0, 1, 0)
        assert statistics.connections_made == 1
        assert not pool._psycopg._waiting.by_task, "the queue keeps no task that has gone"

    run(main())


def test_a_task_that_was_cancelled_while_it_waited_is_freed_at_once(
    run: Runner, pools: Pools
) -> None:
    """The traceback of the cancellation keeps the task's frames, which do not refer to the task."""

    async def main() -> None:
        pool = pools(max_size=1)
        lease = await green(pool.lease)
        waiting = asyncio.create_task(green(fetch, pool, "SELECT 1"))
        await until(lambda: pool.statistics().waiting)
        waiting.cancel()
        await asyncio.wait([waiting])
        gone = weakref.ref(waiting)
        del waiting
        await asyncio.sleep(0)  # until then the loop's own callbacks refer to the task
        assert gone() is None
        lease.end()

    gc.disable()
    try:
        run(main())
    finally:
        gc.enable()


@pytest.mark.shortcut("lease")
@pytest.mark.shortcut("queue")
def test_who_waits_is_handed_the_connection_without_psycopgs_coroutines(
    run: Runner, pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a detour")

    async def main() -> None:
        pool = pools(max_size=1)
        lease = await green(pool.lease)
        for name in ("getconn", "putconn"):
            monkeypatch.setattr(pool._psycopg, name, refuse)
        waiting = [asyncio.create_task(green(fetch, pool, "SELECT 1")) for _ in range(3)]
        await until(lambda: pool.statistics().waiting == 3)
        lease.end()
        assert await asyncio.gather(*waiting) == [[(1,)]] * 3
        statistics = pool.statistics()
        assert (statistics.requests, statistics.requests_queued) == (4, 4), "one opened the pool"

    run(main())


def test_a_connection_that_the_collector_gives_back_is_seen_by_who_begins_to_wait(
    run: Runner, pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collector may run at any step between the look at the pool and the entry in the queue."""

    def forget(pool: Pool) -> None:
        circle: list[Any] = [pool.lease()]
        circle.append(circle)

    async def main() -> None:
        pool = pools(max_size=1)
        await asyncio.create_task(green(forget, pool))
        check_deadlock = pool.check_deadlock

        def check_and_collect(task: Any) -> None:
            check_deadlock(task)
            gc.collect()

        monkeypatch.setattr(pool, "check_deadlock", check_and_collect)
        async with asyncio.timeout(5):
            assert await green(fetch, pool, "SELECT 1") == [(1,)]
        statistics = pool.statistics()
        assert (statistics.requests, statistics.waiting, statistics.idle) == (2, 0, 1)
        assert not pool._psycopg._waiting.by_task

    gc.disable()
    try:
        run(main())
    finally:
        gc.enable()


def test_who_is_served_as_he_begins_to_wait_leaves_a_free_connection_to_others(
    run: Runner, pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One connection comes back just before the waiter is in the queue, and one just after."""

    def take_both(pool: Pool) -> list[Any]:
        return [pool.lease(), pool.lease()]

    async def main() -> None:
        pool = pools(max_size=2)
        leases = await asyncio.create_task(green(take_both, pool))
        queue = pool._psycopg._waiting
        append = queue.append

        def append_between(client: Any) -> None:
            leases.pop().end()
            append(client)
            leases.pop().end()

        monkeypatch.setattr(queue, "append", append_between)
        async with asyncio.timeout(5):
            assert await green(fetch, pool, "SELECT 1") == [(1,)]
        monkeypatch.undo()
        statistics = pool.statistics()
        assert (statistics.leased, statistics.waiting, statistics.idle) == (0, 0, 2)
        assert not queue.by_task

    run(main())


def test_min_size_connections_are_opened_at_once(run: Runner, pools: Pools) -> None:
    async def main() -> None:
        pool = pools(min_size=2)
        await green(fetch, pool, "SELECT 1")
        await until(lambda: pool.statistics().idle >= 2)

    run(main())


def test_an_exhausted_pool_says_who_holds_what(run: Runner, pools: Pools) -> None:
    async def main() -> None:
        pool = pools(max_size=1, timeout=0.05)

        holding, released = await hold_one(pool)
        with pytest.raises(PoolTimeout) as caught:
            await green(fetch, pool, "SELECT 1")
        text = str(caught.value)
        assert f"connection of {pools.name!r} after 0.0" in text
        assert "1 of 1 in use, 0 waiting" in text
        assert "held by 'the holder' for 0.0" in text
        setting = f"DATABASES[{pools.name!r}]['OPTIONS']['pool']"
        assert f"'max_size' or 'timeout' in {setting}" in text
        released.set()
        await holding
        assert await green(fetch, pool, "SELECT 1") == [(1,)]

    run(main())


@pytest.mark.sweep(one_in=4)
@pytest.mark.parametrize("cancelled", [None, 0, 1, 2])
def test_who_waits_gives_up_at_a_time_of_its_own(
    run: Runner, pools: Pools, cancelled: int | None
) -> None:
    """One timer serves the whole queue; waiters ahead may be served, or go, meanwhile."""

    async def main() -> None:
        pool = pools(max_size=1, timeout=0.3)
        began: dict[int, float] = {}
        waited: dict[int, float] = {}
        holding, released = await hold_one(pool)

        def wait(number: int) -> None:
            began[number] = monotonic()
            with pytest.raises(PoolTimeout):
                pool.lease()
            waited[number] = monotonic() - began[number]

        waiting = []
        for number in range(3):
            waiting.append(asyncio.create_task(green(wait, number)))
            await until(lambda number=number: pool.statistics().waiting == number + 1)
            await asyncio.sleep(0.05)
        if cancelled is not None:
            waiting[cancelled].cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert waited.keys() == {0, 1, 2} - {cancelled}
        assert min(waited.values()) > 0.29, "nobody gives up with the one ahead"
        assert pool.statistics().waiting == 0
        released.set()
        await holding
        with_a_connection = await green(fetch, pool, "SELECT 1")
        assert with_a_connection == [(1,)]

    run(main())


@pytest.mark.shortcut("queue")
def test_the_queue_has_no_timer_when_nobody_waits(run: Runner, pools: Pools) -> None:
    async def main() -> None:
        pool = pools(max_size=1, timeout=0.2)
        await green(fetch, pool, "SELECT 1")
        queue = pool._psycopg._waiting
        for _ in range(2):  # a timer that has fired in vain is not the last
            holding, released = await hold_one(pool)
            waiting = asyncio.create_task(green(fetch, pool, "SELECT 1"))
            await until(lambda: pool.statistics().waiting)
            assert queue._timer is not None
            released.set()
            await asyncio.gather(holding, waiting)
            await until(lambda: queue._timer is None)

    run(main())


def test_more_than_max_waiting_are_refused(run: Runner, pools: Pools) -> None:
    async def main() -> None:
        pool = pools(max_size=1, max_waiting=2)
        holding, released = await hold_one(pool)
        waiting = [asyncio.create_task(green(fetch, pool, "SELECT 1")) for _ in range(2)]
        await until(lambda: pool.statistics().waiting == 2)
        with pytest.raises(PoolQueueFull, match="raise 'max_waiting' or 'max_size' in DATABASES"):
            await green(fetch, pool, "SELECT 1")
        released.set()
        await asyncio.gather(holding, *waiting)

    run(main())


def test_who_gave_up_waiting_does_not_count_as_waiting(run: Runner, pools: Pools) -> None:
    """psycopg_pool keeps the entries of such waiters; many cancellations would fill its queue."""

    async def main() -> None:
        pool = pools(max_size=1, max_waiting=3)
        holding, released = await hold_one(pool)
        for _ in range(5):
            dead = [asyncio.create_task(green(fetch, pool, "SELECT 1")) for _ in range(3)]
            await until(lambda: pool.statistics().waiting == 3)
            for task in dead:
                task.cancel()
            await asyncio.wait(dead)
            assert pool.statistics().waiting == 0
        waiting = asyncio.create_task(green(fetch, pool, "SELECT 1"))
        await until(lambda: pool.statistics().waiting == 1)
        released.set()
        await holding
        assert await waiting == [(1,)]

    run(main())


def test_a_bank_stays_whole_under_random_looking_cancellation(
    run: Runner, pools: Pools, admin: psycopg.Connection[Any]
) -> None:
    """Every fifth of 300 transfers is cancelled in some turn of the loop: the sum is constant."""
    admin.execute("DROP TABLE IF EXISTS bank")
    admin.execute("CREATE TABLE bank (id int PRIMARY KEY, amount int)")
    admin.execute("INSERT INTO bank SELECT n, 100 FROM generate_series(0, 9) n")

    async def main() -> None:
        pool = pools(max_size=4, timeout=20)

        def transfer(n: int) -> None:
            one, two = sorted({n % 10, (n * 7 + 1) % 10} | {(n + 3) % 10})[:2]
            with atomic(pool) as connection, connection.cursor() as cursor:
                update = "UPDATE bank SET amount = amount + %s WHERE id = %s"
                cursor.execute(update, [-n, one])
                cursor.execute(update, [n, two])

        async def cancelled(n: int) -> None:
            task = asyncio.create_task(green(transfer, n))
            for _ in range(n % 37):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])

        await asyncio.gather(
            *(cancelled(n) if n % 5 == 0 else green(transfer, n) for n in range(300))
        )
        assert await green(fetch, pool, "SELECT sum(amount) FROM bank") == [(1000,)]
        assert await green(take_all, pool) == 4
        assert not pools.sessions("state LIKE 'idle in%'")

    try:
        run(main())
    finally:
        admin.execute("DROP TABLE bank")


# --- Failure to connect ---------------------------------------------------------------------------


def test_a_wrong_database_fails_all_who_wait_at_once(run: Runner, pools: Pools) -> None:
    async def main() -> None:
        pool = pools(connect={"dbname": "nowhere"})
        started = monotonic()
        results = await asyncio.gather(
            *(green(fetch, pool, "SELECT 1") for _ in range(50)), return_exceptions=True
        )
        assert monotonic() - started < 1
        for error in results:
            assert type(error) is psycopg.OperationalError
            assert 'database "nowhere" does not exist' in str(error)
            assert 'database "nowhere" does not exist' in str(error.__cause__)
        assert len({id(error) for error in results}) == 50
        assert pool.statistics().connections_errors <= 2

    run(main())


def test_a_bad_option_fails_at_once(run: Runner, pools: Pools) -> None:
    async def main() -> None:
        pool = pools(connect={"no_such_option": 1})
        with pytest.raises(psycopg.ProgrammingError, match="no_such_option"):
            await green(fetch, pool, "SELECT 1")

    run(main())


def test_an_error_while_a_session_is_prepared_reaches_who_asked(run: Runner, pools: Pools) -> None:
    def initialise(connection: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT no_such_function()")

    async def main() -> None:
        pool = pools(initialise=initialise)
        with pytest.raises(psycopg.errors.UndefinedFunction):
            await green(fetch, pool, "SELECT 1")
        wait_for(lambda: not pools.sessions(), "the half-made session is closed")

    run(main())


@pytest.mark.sweep(one_in=2)
def test_a_server_that_is_down_is_asked_at_most_twice_a_second(
    run: Runner, pools_by_link: Pools, link: Link
) -> None:
    async def main() -> None:
        pool = pools_by_link()
        await green(fetch, pool, "SELECT 1")
        link.cut()
        before, started, failed = link.attempts, monotonic(), 0
        while monotonic() - started < 1.2:
            with pytest.raises(psycopg.OperationalError):
                await green(fetch, pool, "SELECT 1")
            failed += 1
            await asyncio.sleep(0.005)
        assert failed > 20
        # "localhost" may be two addresses, of which one answers.
        assert link.attempts - before <= 4
        link.restore()
        restored = monotonic()
        while True:
            try:
                assert await green(fetch, pool, "SELECT 1") == [(1,)]
                break
            except psycopg.OperationalError:
                await asyncio.sleep(0.01)
        assert monotonic() - restored < 1.0
        assert await green(take_all, pool) == 3

    run(main())


def test_who_waits_while_others_hold_connections_is_not_failed_by_a_failed_growth(
    run: Runner, pools_by_link: Pools, link: Link
) -> None:
    """The server takes no more connections, but the pool has one: the request waits for it."""

    async def main() -> None:
        pool = pools_by_link()
        released = asyncio.Event()

        def hold() -> None:
            with pinned(pool) as lease:
                lease.dirty = True
                await_(released.wait())

        holding = asyncio.create_task(green(hold))
        await until(lambda: pool.statistics().leased)
        link.down = True
        waiting = asyncio.create_task(green(fetch, pool, "SELECT 1"))
        await until(lambda: pool.statistics().connections_errors)
        released.set()
        assert await waiting == [(1,)]
        await holding
        later = [green(fetch, pool, "SELECT pg_sleep(0.01)") for _ in range(9)]
        await asyncio.gather(*later)

    run(main())


@pytest.mark.sweep(one_in=2)
def test_a_connection_that_is_being_reset_counts_as_one_to_wait_for(
    run: Runner, pools_by_link: Pools, link: Link
) -> None:
    """The connection is neither leased nor free; an attempt to open another fails meanwhile."""

    async def main() -> None:
        pool = pools_by_link(session_reset="always")
        await green(fetch, pool, "SELECT 1")
        await until(lambda: pool.statistics().idle)
        link.down = True
        rows = await asyncio.gather(*(green(fetch, pool, "SELECT %s::int", [n]) for n in range(40)))
        assert rows == [[(n,)] for n in range(40)]
        assert pool.statistics().connections_errors

    run(main())


def end_session(connection: Any) -> None:
    """End the session while it is being prepared, as an administrator or a failover may do."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")


def test_a_session_that_is_ended_while_it_is_prepared_fails_nobody(
    run: Runner, pools: Pools
) -> None:
    """The end of one session does not fail the next attempt, which is made for the waiters."""
    ended = 0

    def initialise(connection: Any) -> None:
        nonlocal ended
        if not ended:
            ended += 1
            end_session(connection)

    async def main() -> None:
        pool = pools(initialise=initialise, max_size=2)
        asked = [green(fetch, pool, "SELECT %s::int", [n]) for n in range(9)]
        assert await asyncio.gather(*asked) == [[(n,)] for n in range(9)]
        assert ended == 1

    run(main())


def test_sessions_that_are_ended_while_others_are_prepared_fail_no_later_request(
    run: Runner, pools: Pools
) -> None:
    """The pool loses all sessions at once: the open ones, and those that it is about to have."""
    slow = False
    preparing = ended = 0

    def initialise(connection: Any) -> None:
        nonlocal preparing, ended
        if slow:
            preparing += 1
            try:
                fetch_on(connection, "SELECT pg_sleep(60)")
            finally:
                ended += 1

    async def main() -> None:
        nonlocal slow
        pool = pools(initialise=initialise, max_size=6)
        await green(fetch, pool, "SELECT 1")
        slow = True
        asked = [green(fetch, pool, "SELECT pg_sleep(0.01)") for _ in range(6)]
        await asyncio.gather(*asked)
        await until(lambda: preparing)
        slow = False
        await asyncio.to_thread(pools.terminate_sessions)
        await until(lambda: ended)
        later = [green(fetch, pool, "SELECT %s::int", [n]) for n in range(9)]
        assert await asyncio.gather(*later) == [[(n,)] for n in range(9)]

    run(main())


def test_a_link_that_is_lost_while_a_session_is_prepared_fails_nobody(
    run: Runner, pools_by_link: Pools, link: Link
) -> None:
    """The session is lost without a message from the server."""
    lost = 0

    def initialise(connection: Any) -> None:
        nonlocal lost
        if not lost:
            lost += 1
            link.cut()
            link.restore()
            fetch_on(connection, "SELECT 1")

    async def main() -> None:
        pool = pools_by_link(initialise=initialise)
        assert await green(fetch, pool, "SELECT 1") == [(1,)]
        assert lost == 1

    run(main())


def fetch_on(connection: Any, sql: str) -> Any:
    with connection.cursor() as cursor:
        return cursor.execute(sql).fetchall()


@pytest.mark.sweep(one_in=2)
def test_a_server_that_ends_each_session_is_asked_at_most_twice_a_second(
    run: Runner, pools: Pools
) -> None:
    prepared: list[float] = []

    def initialise(connection: Any) -> None:
        prepared.append(monotonic())
        end_session(connection)

    async def main() -> None:
        pool = pools(initialise=initialise)
        started, failed = monotonic(), 0
        while monotonic() - started < 2.2:
            asked = monotonic()
            with pytest.raises(psycopg.errors.AdminShutdown):
                await green(fetch, pool, "SELECT 1")
            assert monotonic() - asked < 0.9
            failed += 1
            await asyncio.sleep(0.005)
        assert failed > 20
        in_each = [sum(t <= other < t + 0.95 for other in prepared) for t in prepared]
        assert max(in_each) <= 2 and len(prepared) >= 4, prepared

    run(main())


def test_sessions_that_end_in_attempts_that_overlap_are_not_passed_over_for_ever(
    run: Runner, pools: Pools
) -> None:
    """Each attempt began before the one before it had ended."""

    async def main() -> None:
        attempts = pools()._psycopg.attempts
        began = monotonic()
        for number in range(5):
            next_began = monotonic()
            try:
                raise psycopg.OperationalError("the connection is lost")
            except psycopg.OperationalError as exc:
                attempts.note_failure(exc, began)
            assert attempts.may_try_again() is (number < 2), number
            began = next_began

    run(main())


def test_an_old_failure_is_the_cause_of_nothing_after_a_success(run: Runner, pools: Pools) -> None:
    fails = True

    def initialise(connection: Any) -> None:
        if fails:
            fetch_on(connection, "SELECT no_such_function()")

    async def main() -> None:
        nonlocal fails
        pool = pools(initialise=initialise, max_size=1, timeout=0.05)
        with pytest.raises(psycopg.errors.UndefinedFunction):
            await green(fetch, pool, "SELECT 1")
        fails = False
        while True:
            try:
                await green(fetch, pool, "SELECT 1")
                break
            except psycopg.errors.UndefinedFunction:
                await asyncio.sleep(0.01)
        holding, released = await hold_one(pool)
        with pytest.raises(PoolTimeout) as caught:
            await green(fetch, pool, "SELECT 1")
        assert caught.value.__cause__ is None
        released.set()
        await holding

    run(main())


def pool_that_is_renewed(
    pools: Pools, prepared: list[int], *, times: float, by_itself: bool = False
) -> Pool:
    """Return a pool that is renewed while each of its first `times` connections is prepared.

    The preparation itself renews the pool, or other code of the loop. `prepared` collects the pids.
    """

    def initialise(connection: Any) -> None:
        prepared.append(connection.info.backend_pid)
        if len(prepared) <= times:
            if by_itself:
                pool.renew()
            else:
                asyncio.get_running_loop().call_soon(pool.renew)
            fetch_on(connection, "SELECT 1")

    pool = pools(initialise=initialise, max_size=1)
    return pool


PID = "SELECT pg_backend_pid()"


def test_a_connection_is_made_anew_as_often_as_others_renew_the_pool_meanwhile(
    run: Runner, pools: Pools
) -> None:
    prepared: list[int] = []

    async def main() -> None:
        pool = pool_that_is_renewed(pools, prepared, times=3)
        assert await green(fetch, pool, PID) == [(prepared[3],)]
        assert await green(fetch, pool, PID) == [(prepared[3],)]
        assert len(prepared) == 4 and pool.statistics().size == 1

    run(main())


def test_a_pool_that_is_renewed_without_end_serves_and_replaces_what_it_served_with(
    run: Runner, pools: Pools
) -> None:
    """Two loops do this if their connections each register something of their own."""
    prepared: list[int] = []

    async def main() -> None:
        pool = pool_that_is_renewed(pools, prepared, times=float("inf"))
        assert await green(fetch, pool, PID) == [(prepared[MAX_REMAKES],)]
        assert await green(fetch, pool, PID) == [(prepared[2 * MAX_REMAKES + 1],)]

    run(main())


def test_a_preparation_that_renews_its_pool_each_time_makes_its_connection_anew_once(
    run: Runner, pools: Pools
) -> None:
    prepared: list[int] = []

    async def main() -> None:
        pool = pool_that_is_renewed(pools, prepared, times=float("inf"), by_itself=True)
        assert await green(fetch, pool, PID) == [(prepared[1],)]
        assert len(prepared) == 2

    run(main())


# --- Connections that died ------------------------------------------------------------------------


def test_dead_idle_connections_are_noticed_before_a_statement_is_sent(
    run: Runner, pools: Pools
) -> None:
    async def main() -> None:
        pool = pools(max_size=4)
        failed = 0
        for _ in range(25):
            sleeps = "SELECT pg_sleep(0.002)"
            await asyncio.gather(*(green(fetch, pool, sleeps) for _ in range(4)))
            await green(take_all_idle, pool)
            idle = [connection.pgconn.socket for connection in pool._psycopg._pool]
            assert idle and len(idle) == pools.terminate_sessions()
            wait_for(lambda idle=idle: all(map(hung_up, idle)), "the server has hung up")
            results = await asyncio.gather(
                *(green(fetch, pool, "SELECT 1") for _ in range(4)), return_exceptions=True
            )
            failed += sum(isinstance(result, BaseException) for result in results)
        assert failed == 0
        s = pool.statistics()
        assert s.connections_lost >= 25
        assert await green(take_all, pool) == 4

    run(main())


def test_a_connection_that_dies_in_use_is_replaced(run: Runner, pools: Pools) -> None:
    async def main() -> None:
        pool = pools(max_size=1)
        for _ in range(5):
            sleeping = asyncio.create_task(green(fetch, pool, "SELECT pg_sleep(20)"))
            await until(lambda: pools.sessions("query LIKE 'SELECT pg_sleep%'"))
            pools.terminate_sessions()
            with pytest.raises(psycopg.errors.AdminShutdown):
                await sleeping
            assert await green(fetch, pool, "SELECT 1") == [(1,)]

    run(main())


@pytest.mark.parametrize("when", ["between two statements", "in a statement"])
def test_a_connection_that_dies_leaves_no_reader(run: Runner, pools: Pools, when: str) -> None:
    """libpq closes the socket by itself: whoever gets its number next must be woken."""

    def main() -> None:
        pool = pools(max_size=1)
        with pinned(pool) as lease:
            connection = lease.connection
            assert connection.execute("SELECT 1").fetchone() == (1,)
            number = connection.fileno()
            if when == "between two statements":
                pools.terminate_sessions()  # the loop has no turn before the next statement
                sql = "SELECT 2"
            else:
                sql = "SELECT pg_terminate_backend(pg_backend_pid()), pg_sleep(5)"
            with pytest.raises(psycopg.OperationalError):
                connection.execute(sql)
            assert not lease.physical.watch.reading
        with pinned(pool) as lease:
            assert lease.connection.fileno() == number, "the number is used again"
            assert lease.connection.execute("SELECT 3, pg_sleep(0.01)").fetchone() == (3, "")

    run(bridge.run(main), timeout=5)


def test_an_old_connection_is_replaced(run: Runner, pools: Pools) -> None:
    async def main() -> None:
        pool = pools(max_lifetime=0.01)
        first = await green(fetch, pool, "SELECT pg_backend_pid()")
        await asyncio.sleep(0.02)
        await green(fetch, pool, "SELECT 1")
        assert await green(fetch, pool, "SELECT pg_backend_pid()") != first

    run(main())


# --- Session reset --------------------------------------------------------------------------------

SOIL = """
SET application_name = 'soiled';
SET search_path = pg_catalog;
SELECT set_config('my.setting', 'soiled', false);
CREATE TEMPORARY TABLE soil (n int);
SELECT pg_advisory_lock(4712);
LISTEN soil;
PREPARE soil AS SELECT 1;
DECLARE soil CURSOR WITH HOLD FOR SELECT 1;
SET ROLE pg_monitor
"""
STATE = """
SELECT current_setting('search_path'), current_setting('my.setting', true), current_user,
  (SELECT count(*) FROM pg_class WHERE relname = 'soil' AND relpersistence = 't'),
  (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()),
  (SELECT count(*) FROM pg_listening_channels()),
  (SELECT count(*) FROM pg_prepared_statements), (SELECT count(*) FROM pg_cursors)
"""


def soil(pool: Pool, dirty: bool) -> int:
    with pinned(pool) as lease:
        lease.dirty = dirty
        for statement in SOIL.split(";"):
            lease.connection.execute(statement).close()
        return lease.connection.info.backend_pid


@pytest.mark.parametrize("reset, dirty", [("dirty", True), ("always", True), ("always", False)])
def test_what_a_lease_left_in_its_session_is_gone(
    run: Runner, pools: Pools, reset: str, dirty: bool
) -> None:
    def main() -> None:
        pool = pools(max_size=1, session_reset=reset)
        new = fetch(pool, STATE)
        for _ in range(3):
            pid = soil(pool, dirty)
            (now,) = fetch(pool, STATE)
            assert now[1] in (None, "")
            assert (now[0], *now[2:]) == (new[0][0], *new[0][2:])
            assert fetch(pool, "SELECT pg_backend_pid()") == [(pid,)]
            assert pools.sessions() == [pid]

    run.green(main)


def test_never_keeps_the_session_as_it_was_left(run: Runner, pools: Pools) -> None:
    def main() -> None:
        pool = pools(max_size=1, session_reset="never")
        soil(pool, True)
        assert fetch(pool, STATE)[0][1:4] == ("soiled", "pg_monitor", 1)
        with pinned(pool) as lease:
            lease.connection.execute("RESET ALL; RESET ROLE").close()

    run.green(main)


def test_a_session_is_prepared_when_it_is_new_and_again_after_a_reset(
    run: Runner, pools: Pools
) -> None:
    prepared: list[int] = []

    def initialise(connection: Any) -> None:
        prepared.append(connection.info.backend_pid)
        with connection.cursor() as cursor:
            cursor.execute("SET my.setting = 'prepared'")

    def main() -> None:
        pool = pools(max_size=1, initialise=initialise)
        assert fetch(pool, "SHOW my.setting") == [("prepared",)]
        assert len(prepared) == 1
        soil(pool, True)
        assert fetch(pool, "SHOW my.setting") == [("prepared",)]
        assert len(prepared) == 2

    run.green(main)


def test_a_prepared_statement_is_prepared_anew_after_a_reset(run: Runner, pools: Pools) -> None:
    """The client's cache of prepared statements must not outlive the server's."""

    def main() -> None:
        pool = pools(max_size=1, connect={"prepare_threshold": 0})
        for _ in range(4):
            with pinned(pool) as lease, lease.connection.cursor() as cursor:
                lease.dirty = True
                for n in range(3):
                    assert cursor.execute("SELECT %s::int", [n]).fetchone() == (n,)

    run.green(main)


@pytest.mark.parametrize("reset, statements", [("dirty", 2), ("never", 2), ("always", 4)])
def test_a_clean_lease_costs_no_round_trip(
    run: Runner, pools: Pools, reset: str, statements: int, tmp_path: Path
) -> None:
    """libpq's own trace of the connection counts the queries that were sent."""
    trace = tmp_path / "trace"

    def main() -> None:
        pool = pools(max_size=1, session_reset=reset)
        with pinned(pool) as lease:
            pgconn = lease.connection.pgconn
        take_all_idle(pool)
        with trace.open("w") as file:
            pgconn.trace(file.fileno())
            fetch(pool, "SELECT 1")
            fetch(pool, "SELECT 1")
            take_all_idle(pool)
            pgconn.untrace()

    run.green(main)
    lines = trace.read_text().splitlines()
    # A reset is a pipeline (client_checks.py), which has no message of this kind.
    sent = [line for line in lines if "\tQuery\t" in line or "DISCARD ALL" in line]
    sent = [line for line in sent if "\tF\t" in line]
    assert len(sent) == statements, sent


def take_all_idle(pool: Pool) -> None:
    """Wait until every connection is free."""
    while pool.statistics().idle < pool.statistics().size:
        await_(asyncio.sleep(0.001))


def test_an_unfinished_transaction_is_rolled_back(run: Runner, pools: Pools, table: str) -> None:
    def main() -> None:
        pool = pools(max_size=1)
        with pinned(pool) as lease:
            lease.connection.execute("BEGIN").close()
            lease.connection.execute(f"INSERT INTO {table} VALUES (1)").close()
        assert fetch(pool, f"SELECT count(*) FROM {table}") == [(0,)]
        with pinned(pool) as lease:
            lease.connection.execute("BEGIN").close()
            with pytest.raises(psycopg.errors.DivisionByZero):
                lease.connection.execute("SELECT 1/0")
        assert fetch(pool, "SELECT 1") == [(1,)]

    run.green(main)


def test_a_session_that_cannot_be_reset_is_closed_and_replaced(run: Runner, pools: Pools) -> None:
    """The session is left in pipeline mode, in a COPY, or with settings broken beyond a reset."""

    def main() -> None:
        pool = pools(max_size=1)
        with pinned(pool) as lease:
            pid = lease.connection.info.backend_pid
            lease.dirty = True
            lease.connection.pgconn.enter_pipeline_mode()
        assert fetch(pool, "SELECT pg_backend_pid()") != [(pid,)]
        with pinned(pool) as lease:
            pid = lease.connection.info.backend_pid
            lease.connection.pgconn.send_query(b"SELECT pg_sleep(0.3)")
        assert fetch(pool, "SELECT pg_backend_pid()") != [(pid,)]
        assert take_all(pool) == 1

    run.green(main)


def test_what_a_lease_set_on_its_connection_object_does_not_reach_the_next(
    run: Runner, pools: Pools
) -> None:
    def main() -> None:
        pool = pools(max_size=1)
        heard: list[Any] = []
        with pinned(pool) as lease:
            connection = lease.connection
            before = dict(vars(connection))
            connection.row_factory = psycopg.rows.dict_row
            connection.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
            connection.read_only = True
            connection.autocommit = False
            connection.cursor_factory = psycopg.ClientCursor
            connection.add_notice_handler(heard.append)
            connection.add_notify_handler(heard.append)
            lease.dirty = True
        with pinned(pool) as lease:
            connection = lease.connection
            for name in ("row_factory", "isolation_level", "read_only", "cursor_factory"):
                assert getattr(connection, name) == before.get(name, before.get(f"_{name}"))
            assert connection.autocommit is True
            connection.execute("DO $$ BEGIN RAISE NOTICE 'hear'; END $$").close()
            connection.execute("LISTEN own; NOTIFY own").close()
            lease.dirty = True
        assert not heard

    run.green(main)


def test_notifications_of_one_lease_do_not_reach_the_next(run: Runner, pools: Pools) -> None:
    def main() -> None:
        pool = pools(max_size=1)
        with pinned(pool) as lease:
            lease.dirty = True
            lease.connection.execute("LISTEN one; NOTIFY one, 'stale'").close()
        with pinned(pool) as lease:
            lease.dirty = True
            lease.connection.execute("LISTEN two; NOTIFY two, 'own'").close()
            payloads = [n.payload for n in lease.connection.notifies(timeout=0)]
        assert payloads == ["own"]

    run.green(main)


# --- Hooks and statistics -------------------------------------------------------------------------


def test_hooks_hear_of_leases_and_releases(
    run: Runner, pools: Pools, heard: list[events.Event]
) -> None:
    def main() -> int:
        pool = pools()
        with pinned(pool) as lease:
            pid = lease.connection.info.backend_pid
        with pinned(pool) as lease:
            lease.connection.close()
        return pid

    pid = run.green(main)
    leased, released, again, discarded = heard
    assert isinstance(leased, events.Leased) and isinstance(again, events.Leased)
    assert (leased.pool, leased.backend_pid) == (pools.name, pid)
    assert 0 < leased.waited < 5 and again.waited < leased.waited
    assert isinstance(released, events.Released) and isinstance(discarded, events.Released)
    assert (released.pool, released.backend_pid, released.discarded) == (pools.name, pid, False)
    assert 0 < released.held < 5
    assert discarded.discarded


def test_an_exception_in_a_hook_is_logged_and_goes_no_further(
    run: Runner, pools: Pools, caplog: pytest.LogCaptureFixture, heard: list[events.Event]
) -> None:
    def broken(event: events.Event) -> None:
        raise ZeroDivisionError

    events.hooks.insert(0, broken)
    try:
        assert run.green(lambda: fetch(pools(), "SELECT 1")) == [(1,)]
    finally:
        events.hooks.remove(broken)
    logged = [record for record in caplog.records if record.name == "pgbackend.driver"]
    assert [record.levelno for record in logged] == [logging.ERROR] * 2
    assert "error ignored in the pool hook" in logged[0].getMessage()
    assert len(heard) == 2


def test_statistics_tell_what_the_pool_does(run: Runner, pools: Pools) -> None:
    async def main() -> None:
        pool = pools(max_size=1)
        holding, released = await hold_one(pool)
        waiting = asyncio.create_task(green(fetch, pool, "SELECT 1"))
        await until(lambda: pool.statistics().waiting)
        (s,) = loops.statistics()
        assert (s.alias, s.min_size, s.max_size) == (pools.name, 0, 1)
        assert (s.size, s.leased, s.idle, s.waiting) == (1, 1, 0, 1)
        assert (s.requests, s.requests_queued, s.connections_made) == (2, 2, 1)
        assert repr(pool) == f"<Pool {pools.name!r}: 1 leased, 0 idle, 1 waiting, max_size 1>"
        released.set()
        await asyncio.gather(holding, waiting)
        s = pool.statistics()
        assert (s.leased, s.idle, s.waiting, s.requests_errors) == (0, 1, 0, 0)

    run(main())


def test_no_repr_shows_a_password(run: Runner, pools: Pools) -> None:
    def main() -> None:
        pool = pools(connect={"password": "canary"})
        with pinned(pool) as lease:
            things = [pool, pool.options, lease, lease.connection, lease.physical]
            assert "canary" not in repr([*things, pool.statistics()])
            assert repr(lease).startswith(f"<Lease of {pools.name!r} by 'Task-")

    run.green(main)


# --- Opening and closing --------------------------------------------------------------------------


def test_the_pool_closes_with_its_loop(run: Runner, pools: Pools) -> None:
    """There is no warning (warnings are errors here), and no session is left."""

    async def main() -> Pool:
        pool = pools()
        await asyncio.gather(*(green(fetch, pool, "SELECT pg_sleep(0.01)") for _ in range(5)))
        assert pools.sessions()
        return pool

    pool = run(main())
    assert pool.closed
    wait_for(lambda: not pools.sessions(), "sessions closed")
    assert not loops.statistics()


def test_a_loop_can_end_while_a_connection_is_being_opened(
    run: Runner, pools_by_link: Pools, link: Link
) -> None:
    """psycopg_pool's workers survive a cancellation while they connect; ours must not."""

    async def main() -> None:
        pool = pools_by_link()
        link.freeze()
        waiting = asyncio.create_task(green(fetch, pool, "SELECT 1"))
        await until(lambda: link.attempts)
        del waiting

    started = monotonic()
    run(main(), timeout=5)
    assert monotonic() - started < 5
    link.thaw()


def test_a_loop_can_end_while_a_session_is_being_reset(run: Runner, pools: Pools) -> None:
    async def main() -> None:
        pool = pools(max_size=1)
        await green(soil, pool, True)
        assert pool.statistics().idle == 0

    run(main(), timeout=5)


def test_a_loop_can_end_while_the_users_reset_runs(run: Runner, pools: Pools) -> None:
    async def reset(connection: Any) -> None:
        await connection.execute("SELECT pg_sleep(20)")

    async def main() -> None:
        pool = pools(max_size=1, reset=reset)
        await green(fetch, pool, "SELECT 1")
        await until(lambda: pools.sessions("query LIKE 'SELECT pg_sleep%'"))

    started = monotonic()
    run(main(), timeout=5)
    assert monotonic() - started < 5


def test_a_loop_can_end_with_leases_and_waiters(run: Runner, pools: Pools) -> None:
    async def main() -> None:
        pool = pools(max_size=2)
        tasks = [asyncio.create_task(green(fetch, pool, "SELECT pg_sleep(20)")) for _ in range(6)]
        await until(lambda: len(pools.sessions("state = 'active'")) == 2)
        assert tasks

    started = monotonic()
    run(main())
    assert monotonic() - started < 5


@pytest.mark.parametrize("turns", range(12))
def test_a_loop_can_end_in_each_turn_of_the_pools_opening(
    run: Runner, pools: Pools, turns: int
) -> None:
    """Each of the pool's tasks ends when it is cancelled, and so does the thing it waits for."""
    loop = run.factory()

    async def main() -> None:
        asked = asyncio.create_task(green(fetch, pools(), "SELECT 1"))
        for _ in range(turns):
            await asyncio.sleep(0)
        del asked

    async def end(tasks: set[asyncio.Task[Any]]) -> set[asyncio.Task[Any]]:
        for task in tasks:
            task.cancel()
        return (await asyncio.wait(tasks, timeout=5))[1] if tasks else tasks

    try:
        loop.run_until_complete(main())
        unmoved = loop.run_until_complete(end(asyncio.all_tasks(loop)))
        assert not unmoved
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def test_a_connection_on_its_way_back_is_closed_with_its_loop(run: Runner, pools: Pools) -> None:
    """The connection is in the queue of the pool's workers, cancelled together with its holder."""

    async def reset(connection: Any) -> None:
        pass

    async def hold(pool: Pool, held: asyncio.Event) -> None:
        with pinned(pool):
            held.set()
            await asyncio.Event().wait()

    async def main() -> Pool:
        pool = pools(max_size=1, reset=reset)
        held = asyncio.Event()
        task = asyncio.create_task(green(await_, hold(pool, held)))
        await held.wait()
        del task
        return pool

    pool = run(main())
    assert pool.closed
    wait_for(lambda: not pools.sessions(), "sessions closed")


def test_a_closed_pool_refuses_and_a_new_one_takes_its_place(run: Runner, pools: Pools) -> None:
    async def main() -> None:
        for opened in (True, False):
            pool = pools()
            if opened:
                await green(fetch, pool, "SELECT 1")
            close_pools(pools.name)
            with pytest.raises(PoolClosed):
                await green(fetch, pool, "SELECT 1")
            assert pools() is not pool
        assert await green(fetch, pools(), "SELECT 1") == [(1,)]

    run(main())


def test_closing_fails_who_waits_and_closes_what_is_given_back(run: Runner, pools: Pools) -> None:
    async def main() -> None:
        pool = pools(max_size=1)
        released = asyncio.Event()

        def hold() -> Any:
            with pinned(pool) as lease:
                await_(released.wait())
                return lease.connection.execute("SELECT 1").fetchone()

        holding = asyncio.create_task(green(hold))
        await until(lambda: pool.statistics().leased)
        waiting = asyncio.create_task(green(fetch, pool, "SELECT 1"))
        await until(lambda: pool.statistics().waiting)
        close_pools(pools.name)
        with pytest.raises(PoolClosed, match="is closed"):
            await waiting
        assert len(pools.sessions()) == 1
        released.set()
        assert await holding == (1,)
        await until(lambda: not pools.sessions())

    run(main())


def test_a_connection_that_has_just_been_reset_is_closed_with_its_pool(
    run_once: Runner, pools: Pools
) -> None:
    """The connection is free already, though the task that has reset it is not forgotten yet."""

    def initialise(connection: Any) -> None:
        prepared.append(connection)
        if len(prepared) == 2:
            reset.set()

    async def main() -> None:
        pool = pools(max_size=1, initialise=initialise)
        await green(soil, pool, True)
        await reset.wait()
        assert pool.statistics().idle == 1
        assert pool.tasks, "what this test is about"
        pool.close()
        await until(lambda: not pools.sessions())

    prepared: list[Any] = []
    reset = asyncio.Event()
    run_once(main(), timeout=5)


@pytest.mark.parametrize("passes", [True, False])
def test_a_connection_that_is_checked_while_the_pool_closes_is_in_use(
    run: Runner, pools: Pools, passes: bool
) -> None:
    async def check(connection: Any) -> None:
        checking.set()
        await asyncio.wait_for(closed.wait(), 5)
        await connection.execute("SELECT 1" if passes else "SELECT error")

    async def main() -> None:
        pool = pools(check=check)
        asking = asyncio.create_task(green(fetch, pool, "SELECT 1"))
        await checking.wait()
        pool.close()
        closed.set()
        if passes:
            assert await asking == [(1,)]
        else:
            with pytest.raises(PoolClosed):
                await asking

    checking, closed = asyncio.Event(), asyncio.Event()
    started = monotonic()
    run(main())
    assert monotonic() - started < 3
    wait_for(lambda: not pools.sessions(), "sessions closed")


def test_a_pool_that_a_child_disowned_gives_nothing(run: Runner, pools: Pools) -> None:
    """Code that kept the pool itself gets no connection either."""

    def main() -> None:
        pool = pools()
        fetch(pool, "SELECT 1")
        assert pool.statistics().idle == 1
        pool.closed = True  # all that `disown()` can do without using a socket
        with pytest.raises(PoolClosed):
            pool.lease()
        pool.closed = False

    run.green(main)


def test_the_first_who_asks_may_be_cancelled_while_the_pool_opens(
    run: Runner, pools: Pools
) -> None:
    async def main(turns: int) -> None:
        pool = pools()
        tasks = [asyncio.create_task(green(fetch, pool, "SELECT 1")) for _ in range(3)]
        for _ in range(turns):
            await asyncio.sleep(0)
        tasks[0].cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(done[0], asyncio.CancelledError) or done[0] == [(1,)]
        assert done[1:] == [[(1,)], [(1,)]]

    for turns in range(6):
        run(main(turns))


def test_pools_of_two_loops_in_two_threads_are_apart(pools: Pools) -> None:
    seen: dict[str, set[Any]] = {}
    barrier = threading.Barrier(2)

    def serve(name: str, loop_factory: Any) -> None:
        async def main() -> None:
            pool = pools()
            barrier.wait(5)
            rows = await asyncio.gather(
                *(green(fetch, pool, "SELECT pg_backend_pid()") for _ in range(100))
            )
            seen[name] = {pid for ((pid,),) in rows}

        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(main())

    factories = [None, LOOPS.get("uvloop")]
    threads = [
        threading.Thread(target=serve, args=(str(n), factory))
        for n, factory in enumerate(factories)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(seen) == 2 and not seen["0"] & seen["1"]
    assert all(len(pids) <= 3 for pids in seen.values())


def test_fifty_loops_that_come_and_go_leave_nothing(run_once: Runner, pools: Pools) -> None:
    before = len(os.listdir("/proc/self/fd"))

    for n in range(50):
        with asyncio.Runner(loop_factory=run_once.factory) as runner:
            assert runner.run(green(lambda n=n: fetch(pools(), "SELECT %s::int", [n]))) == [(n,)]
        assert not loops.statistics()
    wait_for(lambda: not pools.sessions(), "sessions closed")
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert len(loops._by_loop) <= 1


def test_a_loop_that_is_closed_without_farewell_is_swept(run_once: Runner, pools: Pools) -> None:
    loop = asyncio.new_event_loop()
    loop.run_until_complete(green(lambda: fetch(pools(), "SELECT 1")))
    assert pools.sessions()
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    close_pools("any")
    wait_for(lambda: not pools.sessions(), "sessions closed")


def test_close_pools_works_from_another_thread(run: Runner, pools: Pools) -> None:
    """The sessions are gone afterwards: Django calls `close_pool()` before a DROP DATABASE."""

    async def main() -> None:
        pool = pools()
        await green(fetch, pool, "SELECT 1")
        await asyncio.to_thread(close_pools, pools.name)
        assert pool.closed
        wait_for(lambda: not pools.sessions(), "sessions closed")
        assert await green(fetch, pools(), "SELECT 1") == [(1,)]

    run(main())


def test_a_closed_pool_leaves_no_task_behind(run: Runner, pools: Pools) -> None:
    async def main() -> None:
        await green(fetch, pools(), "SELECT 1")
        close_pools(pools.name)
        await asyncio.sleep(0.01)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(main())


FORK = """
import asyncio, os, sys
sys.path.insert(0, {root!r})
from psycopg.conninfo import conninfo_to_dict
from pgbackend.driver import bridge
from pgbackend.driver.loops import get_pool
from pgbackend.driver.pool import PoolOptions

options = PoolOptions(
    connect=conninfo_to_dict({conninfo!r}),
    pool=dict(min_size=0, max_size=2, timeout=5.0, reconnect_timeout=0.0),
    initialise=lambda connection: None,
)

def fetch(sql, n):
    pool = get_pool(("default",), "default", lambda: options)
    with pool.lease().connection.cursor() as cursor:
        return cursor.execute(sql, [n]).fetchone()

async def query(who):
    pids = set()
    for n in range(100):
        value, pid = await bridge.run(fetch, "SELECT %s::text, pg_backend_pid()", who + str(n))
        assert value == who + str(n), (value, who, n)
        pids.add(pid)
    return pids

async def parent():
    before = await query("parent")
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        return reader, writer, None
    after = await query("parent")
    os.close(writer)
    theirs = eval(os.read(reader, 10000).decode())
    pid, status = os.waitpid(child, 0)
    assert status == 0, status
    assert after == before, (before, after)
    assert theirs and not theirs & before, (theirs, before)
    assert await query("again") == before
    return reader, writer, before

{main}
"""

IN_CHILD = {
    "a new loop after the fork": """
def child(writer):
    os.write(writer, repr(asyncio.run(query("child"))).encode())

async def whole():
    reader, writer, before = await parent()
    if before is not None:
        print("fine")
        return
    # The child leaves the loop that it was copied in, and runs one of its own.
    import threading
    thread = threading.Thread(target=child, args=(writer,))
    thread.start()
    thread.join()
    os.{exit}(0) if "{exit}" == "_exit" else sys.exit(0)

asyncio.run(whole())
""",
}


@pytest.mark.parametrize("exit_by", ["_exit", "abort of the interpreter"])
def test_a_forked_child_opens_its_own_and_does_not_disturb_the_parent(
    conninfo: str, exit_by: str
) -> None:
    main = IN_CHILD["a new loop after the fork"].replace("{exit}", "_exit")
    if exit_by != "_exit":
        main = textwrap.dedent(
            """
            def before_fork():
                # Fork between two loops: the parent's pool belongs to a loop that is not running.
                loop = asyncio.new_event_loop()
                before = loop.run_until_complete(query("parent"))
                reader, writer = os.pipe()
                child = os.fork()
                if not child:
                    os.write(writer, repr(asyncio.run(query("child"))).encode())
                    return  # a whole exit of the interpreter, with all its destructors
                os.close(writer)
                theirs = eval(os.read(reader, 10000).decode())
                pid, status = os.waitpid(child, 0)
                assert status == 0, status
                assert theirs and not theirs & before
                assert loop.run_until_complete(query("again")) == before
                for task in asyncio.all_tasks(loop):
                    task.cancel()
                loop.run_until_complete(asyncio.sleep(0))
                loop.run_until_complete(loop.shutdown_asyncgens())
                loop.close()
                print("fine")

            before_fork()
            """
        )
    root = str(Path(__file__).parents[2])
    script = FORK.format(root=root, conninfo=conninfo, main=main)
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr
    assert "Error" not in done.stderr and "Warning" not in done.stderr, done.stderr


def test_the_pools_tasks_inherit_nothing_of_who_opened_it(run: Runner, pools: Pools) -> None:
    """The tasks inherit neither context variables nor greenness: they outlive the first request."""

    async def main() -> None:
        seen: list[Any] = []

        def initialise(connection: Any) -> None:
            seen.append(variable.get(None))

        def first() -> Any:
            variable.set("request's")
            return fetch(pools(initialise=initialise), "SELECT 1")

        await green(first)
        assert seen == [None]

    import contextvars

    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")
    run(main())
    assert bridge.current() is None


def test_prepare_threshold_is_the_lease_holders_own(run: Runner, pools: Pools) -> None:
    async def main() -> None:
        pool = pools(max_size=1)

        def change() -> int | None:
            with pinned(pool) as lease:
                before = lease.connection.prepare_threshold
                lease.connection.prepare_threshold = 0
                return before

        assert await green(change) == await green(change)

    run(main())


@pytest.mark.parametrize("served", [False, True], ids=["still queueing", "served meanwhile"])
def test_a_coroutine_that_is_closed_in_the_queue_loses_no_place(
    run: Runner, pools: Pools, served: bool
) -> None:
    """The coroutine is closed, not cancelled: psycopg_pool ignores a GeneratorExit."""

    async def main() -> None:
        pool = pools(max_size=1, timeout=5)
        await green(fetch, pool, "SELECT 1")
        lease = await asyncio.create_task(green(pool.lease))
        coro = green(fetch, pool, "SELECT 1")
        coro.send(None)
        if served:
            lease.end()
        coro.close()
        lease.end()
        assert await green(fetch, pool, "SELECT 2") == [(2,)]
        assert pool.statistics().waiting == 0

    run(main())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_forgets_the_parents_pools_whatever_else_fails(
    run_once: Runner, pools: Pools
) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    async def main() -> None:
        await green(fetch, pools(), "SELECT 1")
        forks.after_fork(fail)  # called first
        try:
            if (child := os.fork()) == 0:
                os._exit(len(loops.open_pools()))
        finally:
            forks._forgets.remove(fail)
        assert await asyncio.to_thread(os.waitpid, child, 0) == (child, 0)

    run_once(main())
