"""Tests C8 with OPTIONS["pool"] = None: each lease opens a connection, and closes it afterwards."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from django.db import OperationalError, connection, connections, transaction

import pgbackend
from pgbackend import aio, metrics
from tests.conftest import Runner, wait_for
from tests.library.models import Tag
from tests.support.fixtures import settings_of_default
from tests.support.link import Link
from tests.support.sweep import CANCELLING, Mode, Outcome, sweep


def _through(link: Link) -> dict[str, Any]:
    given = connections.settings["default"]
    options = {"sslmode": "disable", "gssencmode": "disable", "pool": None}
    return {
        "HOST": "127.0.0.1",
        "PORT": str(link.port),
        "OPTIONS": {**given["OPTIONS"], **options},
    }


@pytest.fixture
def link(conninfo: str) -> Iterator[Link]:
    """Relay to the server, and count the connections."""
    relay = Link(conninfo)
    with settings_of_default(**_through(relay)):
        connection.close()
        connections["default"].close_pool()
        yield relay
        connection.close()
        connections["default"].close_pool()
    relay.close()


def stats() -> Any:
    (record,) = pgbackend.statistics("default")
    return record


def pid() -> int:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        return int(cursor.fetchone()[0])


def test_each_lease_opens_a_connection_and_closes_it(run: Runner, link: Link) -> None:
    async def main() -> None:
        pids = {await aio.run(pid) for _ in range(5)}
        assert len(pids) == 5
        assert await Tag.objects.acount() == 0
        assert stats().connections_made == 6
        assert (stats().size, stats().leased, stats().idle) == (0, 0, 0)

    before = link.attempts
    run(main())
    assert link.attempts - before == 6


def test_a_transaction_a_pin_and_a_stream_keep_their_connection(
    run_once: Runner, link: Link
) -> None:
    def in_a_block() -> None:
        with transaction.atomic():
            assert len({pid() for _ in range(3)}) == 1
            Tag.objects.bulk_create([Tag(name=f"{n}") for n in range(9)])
        with pgbackend.pinned():
            assert len({pid() for _ in range(3)}) == 1
        before = stats().connections_made
        assert len(list(Tag.objects.iterator(chunk_size=2))) == 9
        assert stats().connections_made == before + 1

    run_once(aio.run(in_a_block))


def test_nothing_limits_the_number_of_connections(run_once: Runner, link: Link) -> None:
    async def hold(all_have: asyncio.Barrier) -> None:
        async with transaction.atomic():
            await Tag.objects.acount()
            await all_have.wait()

    async def main() -> None:
        assert await Tag.objects.acount() == 0
        all_have = asyncio.Barrier(31)
        tasks = [asyncio.create_task(hold(all_have)) for _ in range(30)]
        await wait_until(lambda: stats().leased == 30)
        record = stats()
        assert (record.size, record.max_size, record.waiting) == (30, None, 0)
        counted = metrics.connections()
        assert (counted.async_open, counted.async_max, counted.max) == (30, None, None)
        assert "30 leased" in pgbackend.dump()
        await all_have.wait()
        await asyncio.gather(*tasks)
        assert stats().size == 0

    run_once(main())


async def wait_until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


def test_sync_code_has_its_own_connection(link: Link) -> None:
    assert pid() == pid()


def test_a_refused_connection_says_why(run_once: Runner, link: Link) -> None:
    async def main() -> None:
        with pytest.raises(OperationalError, match="does not exist"):
            await Tag.objects.acount()
        assert stats().size == stats().leased == 0

    with settings_of_default(NAME="no_such_database"):
        run_once(main())


@pytest.mark.slow
def test_a_short_outage_is_waited_out(run_once: Runner, link: Link) -> None:
    async def main() -> None:
        assert await Tag.objects.acount() == 0
        link.cut()
        tasks = [asyncio.create_task(Tag.objects.acount()) for _ in range(10)]
        await wait_until(lambda: stats().connections_errors >= 1)
        link.restore()
        assert await asyncio.gather(*tasks) == [0] * 10
        assert stats().size == 0

    run_once(main())


@pytest.mark.sweep(one_in=4)
@pytest.mark.parametrize("mode", CANCELLING, ids=lambda mode: mode.__name__)
def test_a_cancellation_loses_no_connection(
    run: Runner, link: Link, mode: Mode, admin: psycopg.Connection[Any]
) -> None:
    def operation() -> None:
        with transaction.atomic():
            Tag.objects.create(name="lost")
            transaction.set_rollback(True)
        Tag.objects.count()

    async def check(outcome: Outcome) -> None:
        await wait_until(lambda: stats().size == 0)
        assert await Tag.objects.acount() == 0

    async def main() -> None:
        assert await Tag.objects.acount() == 0
        assert await sweep(lambda: aio.run(operation), mode, check) >= 4

    run(main())
    in_transaction = "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in%'"
    wait_for(lambda: admin.execute(in_transaction).fetchone() == (0,), "no transaction is left")


def test_what_is_left_at_the_end_of_a_loop_is_closed(run_once: Runner, link: Link) -> None:
    async def main() -> None:
        link.freeze()
        _left.append(asyncio.create_task(Tag.objects.acount()))
        await wait_until(lambda: pgbackend.statistics("default") and stats().waiting == 1)

    with pytest.raises(asyncio.CancelledError):
        run_once(main())
        _left.pop().result()
    link.thaw()
    gc.collect()


_left: list[asyncio.Task[int]] = []


def test_a_lease_can_end_in_a_thread_and_a_statement_be_cancelled(
    run_once: Runner, link: Link, admin: psycopg.Connection[Any]
) -> None:
    def sleep() -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_sleep(20)")

    async def in_thread() -> int:
        from asgiref.sync import sync_to_async

        async with transaction.atomic():
            assert await sync_to_async(threading.get_ident)() != threading.get_ident()
            return await sync_to_async(Tag.objects.count)()

    async def main() -> None:
        assert await in_thread() == 0
        task = asyncio.create_task(aio.run(sleep))
        asleep = "SELECT count(*) FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(20)'"
        await wait_until(lambda: admin.execute(f"{asleep} AND state = 'active'").fetchone() == (1,))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await wait_until(lambda: admin.execute(f"{asleep} AND state = 'active'").fetchone() == (0,))
        await wait_until(lambda: stats().size == 0)

    run_once(main())
