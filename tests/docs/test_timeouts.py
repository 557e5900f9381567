"""Tests the table of docs/timeouts.md: each clock fires, and does what its row says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from django.db import (
    InterfaceError,
    InternalError,
    OperationalError,
    connection,
    connections,
    transaction,
)

import pgbackend
from tests.conftest import Runner
from tests.docs.shop.models import Order
from tests.docs.snippets import ROOT
from tests.docs.tables import table_after
from tests.support.fixtures import pool_of_default, settings_of_default

ROWS = {
    row["clock"]: row
    for row in table_after(ROOT / "docs/timeouts.md", "<!-- table: tests/docs/test_timeouts.py")
}

Pids = list[int]


async def _sees_itself(pids: Pids) -> None:
    """Note the server process of the next statement."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        pids.append(cursor.fetchone()[0])


def _sleep() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_sleep(30)")


async def statement_timeout(pids: Pids) -> None:
    with pgbackend.session(statement_timeout="150ms"), transaction.atomic():
        await _sees_itself(pids)
        _sleep()


@contextmanager
def _another_session() -> Iterator[psycopg.Connection[Any]]:
    entry = connection.settings_dict
    names = {"dbname": "NAME", "host": "HOST", "port": "PORT", "user": "USER"}
    names["password"] = "PASSWORD"
    given = {key: entry[name] for key, name in names.items() if entry[name]}
    with psycopg.connect(**given, autocommit=True) as session:
        yield session


async def lock_timeout(pids: Pids) -> None:
    Order.objects.create(pk=1)
    with _another_session() as other, other.transaction():
        other.execute("SELECT FROM shop_order FOR UPDATE")
        with pgbackend.session(lock_timeout="30ms"), transaction.atomic():
            await _sees_itself(pids)
            Order.objects.select_for_update().get()


async def _until_ended(pid: int) -> None:
    """Wait until PostgreSQL has ended a session."""
    query = "SELECT FROM pg_stat_activity WHERE pid = %s"
    with _another_session() as other:
        while other.execute(query, [pid]).fetchone() is not None:
            await asyncio.sleep(0.01)


async def _works_late(pids: Pids, **timeout: str) -> None:
    with pgbackend.session(**timeout), transaction.atomic():
        await _sees_itself(pids)
        await _until_ended(pids[0])
        await _sees_itself([])


async def idle_in_transaction_session_timeout(pids: Pids) -> None:
    await _works_late(pids, idle_in_transaction_session_timeout="100ms")


async def transaction_timeout(pids: Pids) -> None:
    await _works_late(pids, transaction_timeout="150ms")


async def idle_session_timeout(pids: Pids) -> None:
    await _sees_itself(pids)
    await _until_ended(pids[0])


async def the_pools_timeout(pids: Pids) -> None:
    holds, gives_up = asyncio.Event(), asyncio.Event()

    async def holder() -> None:
        with pgbackend.pinned():
            await _sees_itself([])
            holds.set()
            await gives_up.wait()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(holder())
        await holds.wait()
        with pytest.raises(OperationalError) as caught:
            await _sees_itself([])
        gives_up.set()
    raise caught.value


async def max_hold(pids: Pids) -> None:
    holds, has_got_it = asyncio.Event(), asyncio.Event()

    async def holder() -> None:
        with pgbackend.pinned():
            await _sees_itself(pids)
            holds.set()
            await has_got_it.wait()
            await _sees_itself([])

    async def waiter() -> None:
        await holds.wait()
        await _sees_itself([])
        has_got_it.set()

    results = await asyncio.gather(holder(), waiter(), return_exceptions=True)
    (error,) = [each for each in results if each is not None]
    raise error


async def asyncio_timeout(pids: Pids) -> None:
    async with asyncio.timeout(0.05):
        _sleep()


FIRES: dict[str, Callable[[Pids], Coroutine[Any, Any, None]]] = {
    "`statement_timeout`": statement_timeout,
    "`lock_timeout`": lock_timeout,
    "`idle_in_transaction_session_timeout`": idle_in_transaction_session_timeout,
    "`transaction_timeout` (PostgreSQL 17)": transaction_timeout,
    "`idle_session_timeout`": idle_session_timeout,
    "the pool's `timeout`": the_pools_timeout,
    "the pool's `max_hold`": max_hold,
    "`asyncio.timeout()`": asyncio_timeout,
}
ERRORS = (OperationalError, InternalError, InterfaceError, TimeoutError)


@contextmanager
def _configured(clock: str) -> Iterator[None]:
    """Give 'default' a pool of one connection, and the options of a clock."""
    options = {**connections.settings["default"]["OPTIONS"]}
    if clock == "`idle_session_timeout`":
        options["options"] = "-c idle_session_timeout=100ms"
    pool = {
        "max_size": 1,
        "timeout": 0.3 if clock == "the pool's `timeout`" else 10,
        "max_hold": 0.1 if clock == "the pool's `max_hold`" else None,
    }
    with settings_of_default(OPTIONS=options), pool_of_default(**pool):
        yield


async def _fire(clock: str, *, look: bool) -> tuple[BaseException | None, Pids]:
    """Return the error of a clock, and the sessions before it and, if asked to `look`, after it."""
    pids = Pids()
    error: BaseException | None = None
    try:
        await FIRES[clock](pids)
    except ERRORS as exc:
        error = exc
    if look:
        await _sees_itself(pids)
    return error, pids


def _expected(row: dict[str, str]) -> tuple[str, str]:
    """Return the name of the error that a row names, and of its cause; empty if there is none."""
    names = row["the code gets"].split("`")[1::2]
    return (names[0] if names else ""), (names[1] if len(names) > 1 else "")


@pytest.mark.parametrize("clock", ROWS)
@pytest.mark.usefixtures("transactional_db")
def test_a_clock_does_what_its_row_says(run_once: Runner, clock: str) -> None:
    if "17" in clock and connection.pg_version < 170000:
        pytest.skip("this server has no transaction_timeout")
    row = ROWS[clock]
    look = row["the connection"] in ("stays", "is replaced")
    with _configured(clock):
        error, pids = run_once(pgbackend.aio.portal(_fire(clock, look=look)))
    kind, cause = _expected(row)
    assert (type(error).__name__ if error else "") == kind
    assert not cause or type(error.__cause__).__name__ == cause
    assert getattr(getattr(error, "__cause__", None), "sqlstate", None) == (row["SQLSTATE"] or None)
    if look:
        before, after = pids
        assert (before == after) is (row["the connection"] == "stays")
