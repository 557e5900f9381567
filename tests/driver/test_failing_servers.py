"""Tests the pool while servers fail: on the ways that few leases take, nothing is lost."""

from __future__ import annotations

import asyncio
import socket
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg.waiting import Wait

from pgbackend.driver import asking, bridge, connecting, dump, loops, outages, stacks
from pgbackend.driver.connection import Connection
from pgbackend.driver.errors import NotGreen
from pgbackend.driver.shortcuts import switches
from pgbackend.driver.socket_watch import Watch
from tests.conftest import Runner

from .conftest import Pools, fetch, pinned


def test_a_caller_that_cannot_wait_loses_no_slot_to_a_dead_connection(
    run: Runner, pools: Pools
) -> None:
    async def main() -> None:
        pool = pools(max_size=1, timeout=1.0)
        await bridge.run(fetch, pool, "SELECT 1")
        pools.terminate_sessions()
        with pytest.raises(NotGreen):
            pool.lease()
        assert await bridge.run(fetch, pool, "SELECT 1") == [(1,)]

    run(main())


def test_a_connection_that_does_not_answer_a_look_is_not_put_back(
    run: Runner, pools: Pools
) -> None:
    async def main() -> None:
        pool = pools(max_size=1)
        await bridge.run(fetch, pool, "SELECT 1")
        pools.terminate_sessions()
        pool._psycopg.changes.look_at_free()
        (looking,) = pool.tasks
        await asyncio.wait([looking])
        statistics = pool.statistics()
        assert (statistics.idle, statistics.size) == (0, 0)
        assert await bridge.run(fetch, pool, "SELECT 1") == [(1,)]

    run(main())


def test_a_check_near_the_deadline_has_time_to_succeed(run: Runner, pools: Pools) -> None:
    async def check(connection: Any) -> None:
        await asyncio.sleep(0.02)

    async def main() -> None:
        pool = pools(max_size=1, check=check)
        await bridge.run(fetch, pool, "SELECT 1")
        (made,) = pool._psycopg.made
        connection = await pool._psycopg.getconn(timeout=0.01)
        assert connection is made and not made.closed
        pool.put(connection)

    run(main())


def read_twice_in_a_transaction(connection: Any) -> None:
    with connection.transaction():
        for _ in range(2):
            assert connection.execute("SELECT 'b'").fetchone() == ("b",)


def test_statements_are_prepared_after_one_was_stale_and_could_not_be_sent_again(
    run: Runner, pools: Pools
) -> None:
    def main() -> None:
        with pinned(pools(connect={"prepare_threshold": 0})) as lease:
            connection = lease.connection
            connection.execute("CREATE TEMPORARY TABLE stale AS SELECT 1 AS n")
            connection.execute("SELECT *, 1 / n FROM stale")
            connection.pgconn.exec_(b"ALTER TABLE stale ADD m integer; UPDATE stale SET n = 0")
            with pytest.raises(psycopg.errors.DivisionByZero):
                connection.execute("SELECT *, 1 / n FROM stale")
            read_twice_in_a_transaction(connection)

    run.green(main)


def test_statements_are_prepared_after_a_reset_in_one_round_trip(run: Runner, pools: Pools) -> None:
    def main() -> None:
        pool = pools(connect={"prepare_threshold": 0}, max_size=1)
        with pinned(pool) as lease:
            assert lease.physical.is_checked_on
            lease.connection.execute("SELECT 'a'")
            lease.dirty = True
        with pinned(pool) as lease:
            read_twice_in_a_transaction(lease.connection)

    run.green(main)


def test_an_outage_that_nobody_met_for_a_minute_is_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 1000.0
    monkeypatch.setattr(outages, "monotonic", lambda: now)
    record = outages.Outages("default", 5.0)
    refused = psycopg.OperationalError("server: Connection refused")
    record.attempt_failed(refused, serves=False)
    now += 5.0
    record.attempt_failed(refused, serves=False)
    assert not record.may_be_waited_out()
    now += 3600.0
    record.attempt_failed(refused, serves=False)
    assert record.may_be_waited_out(), "the next nightly restart is another outage"
    assert [entry.getMessage().count("up to 5 s") for entry in caplog.records] == [1, 1]


def test_a_name_that_was_known_before_may_come_back() -> None:
    record = outages.Outages("default", 5.0)
    unknown = psycopg.OperationalError("failed to resolve host 'db': [Errno -2] Name ...")
    record.attempt_failed(unknown, serves=False)
    assert not record.may_be_waited_out()
    record.connected()
    record.attempt_failed(unknown, serves=False)
    assert record.may_be_waited_out()


def test_a_connection_string_keeps_its_limits() -> None:
    said = connecting.arguments({"conninfo": "connect_timeout=3 keepalives_idle=60"}, 10.0)
    assert not {"connect_timeout", "keepalives_idle"} & said.keys()
    assert said["keepalives_interval"] == connecting.KEEPALIVES["keepalives_interval"]
    assert not {"keepalives_idle"} & connecting.arguments({"conninfo": "service=db"}, 10.0).keys()


def test_tasks_may_wait_for_ever() -> None:
    assert connecting.arguments({}, float("inf"))["connect_timeout"] == 3599


def test_threads_that_cannot_be_started_do_not_count_as_hanging(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def main() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_thread)
            for _ in range(asking.MOST_OVERDUE):
                with pytest.raises(RuntimeError, match="can't start"):
                    await asking.call_in_thread("PASSWORD", str)
        assert await asking.call_in_thread("PASSWORD", lambda: "secret") == "secret"

    run(main())


class _ChangedMeanwhile(weakref.WeakSet[Any]):
    """A set to which another thread seems to add something while it is read the first time."""

    added: Any = None

    def __iter__(self) -> Iterator[Any]:
        for each in super().__iter__():
            if self.added is None:
                self.added = threading.Event()
                self.add(self.added)
            yield each


def test_the_dump_is_made_while_portals_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    things = [threading.Event() for _ in range(3)]
    made = _ChangedMeanwhile(things)
    monkeypatch.setitem(bridge.made_in, 1, made)
    assert stacks.working_portals(1) == []  # these have no `working`, like a half-made portal
    assert made.added is not None
    assert "pgbackend in process" in dump.text()


class _Closed:
    """A loop that is closed; while it is asked, another thread adds a loop, and sweeps."""

    def __init__(self, other: Any) -> None:
        self.other = other

    def is_closed(self) -> bool:
        loops._by_loop[self.other] = loops._by_loop.pop(self)  # type: ignore[index, call-overload]
        return True


def test_two_threads_sweep_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    other = asyncio.new_event_loop()
    monkeypatch.setattr(loops, "_by_loop", {})
    loops._by_loop[_Closed(other)] = loops._LoopPools()  # type: ignore[index]
    loops._sweep()
    assert [*loops._by_loop] == [other]
    other.close()
    loops._sweep()
    assert not loops._by_loop


@pytest.mark.parametrize("on_a_loop", [False, True])
def test_a_thread_that_closes_a_connection_leaves_its_loop_alone(
    run_once: Runner, pools: Pools, monkeypatch: pytest.MonkeyPatch, on_a_loop: bool
) -> None:
    removed: list[int] = []

    def close(connection: Connection) -> None:
        connection.close()
        assert connection.closed

    async def main() -> None:
        loop = asyncio.get_running_loop()
        remove_reader = loop.remove_reader

        def remove(fd: int) -> bool:
            removed.append(threading.get_ident())
            return remove_reader(fd)

        pool = pools()
        lease = await bridge.run(pool.lease)
        lease.pin()
        await bridge.run(lease.connection.execute, "SELECT 1")
        assert lease.physical.watch.reading
        monkeypatch.setattr(loop, "remove_reader", remove)
        if on_a_loop:
            closing = bridge.run(close, lease.connection)
            await asyncio.to_thread(asyncio.run, closing)
        else:
            await asyncio.to_thread(close, lease.connection)
        await asyncio.sleep(0)  # since Python 3.14 a thread that has ended is not waited for
        with pytest.raises(psycopg.OperationalError, match="the connection is closed"):
            await bridge.run(lease.connection.execute, "SELECT 1")
        lease.unpin()
        assert lease.physical.closed and not lease.physical.watch.reading
        assert set(removed) == {threading.get_ident()}

    run_once(main())


def test_a_watch_is_stopped_by_its_own_loop(run_once: Runner, pools: Pools) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        watch = Watch(loop, ours.fileno())

        def wait() -> int:
            portal = bridge.current()
            assert portal is not None
            return watch.wait(portal, Wait.R, None)

        loop.set_debug(True)  # refuses calls from other threads
        waiting = asyncio.create_task(bridge.run(wait))
        await asyncio.sleep(0)
        await asyncio.to_thread(watch.stop)
        await waiting
        assert not watch.reading
        ours.close()
        theirs.close()

    run_once(main())


@pytest.mark.parametrize("shortcut", [False, True])
def test_the_pulse_sleeps_while_the_pool_is_at_rest(
    run: Runner, pools: Pools, monkeypatch: pytest.MonkeyPatch, shortcut: bool
) -> None:
    def main() -> None:
        monkeypatch.setattr(switches, "lease", shortcut)
        pool = pools(max_size=2)
        pulse, loop = pool.pulse, pool.loop

        def sleeps() -> bool:
            pulse.stop()
            pulse._beat(loop)
            return pulse._timer is None

        with pinned(pool), pinned(pool):
            assert not sleeps()
        assert sleeps() is not shortcut, "the next lease would not wake it"
        for connection in pool._psycopg.made:
            connection.free_since = -1000.0  # long ago
        assert sleeps()
        with pinned(pool):
            assert pulse._timer is not None
            assert not sleeps()
        for connection in pool._psycopg.made:
            connection.free_since = -1000.0
        assert sleeps()
        pool._psycopg.changes.look_at_free()
        assert not sleeps(), "connections are looked at"
        bridge.await_(asyncio.wait([*pool.tasks]))
        assert pulse._timer is not None

    run.green(main)


def test_the_pulse_of_an_empty_pool_sleeps_until_a_connection_is_asked_for(
    run: Runner, pools: Pools
) -> None:
    def main() -> None:
        pool = pools()
        fetch(pool, "SELECT 1")
        pool.renew()
        pool.pulse.stop()
        pool.pulse._beat(pool.loop)
        assert pool.pulse._timer is None
        with pinned(pool):
            assert pool.pulse._timer is not None

    run.green(main)
