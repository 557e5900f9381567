"""Tests the pool while servers fail: on the ways that few leases take, nothing is lost."""

from __future__ import annotations

import asyncio
from typing import Any

import psycopg
import pytest

from pgbackend.driver import bridge
from pgbackend.driver.errors import NotGreen
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
