"""Tests the pool while servers fail: on the ways that few leases take, nothing is lost."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pgbackend.driver import bridge
from pgbackend.driver.errors import NotGreen
from tests.conftest import Runner

from .conftest import Pools, fetch


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
