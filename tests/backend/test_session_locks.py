"""Tests the warning of advisory locks that end with the lease of the statement that took them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.db import connection, connections, transaction
from django.db.models.expressions import RawSQL
from psycopg import sql

import pgbackend
from pgbackend import aio
from tests.conftest import Runner
from tests.library.models import Tag
from tests.support.fixtures import pool_of_default, settings_of_default

Told = Callable[[Callable[[], Any]], list[str]]

pytestmark = pytest.mark.django_db(transaction=True)

LOCKS = [
    "SELECT pg_advisory_lock(42)",
    "SELECT PG_ADVISORY_LOCK_SHARED(42)",
    "SELECT pg_try_advisory_lock(4, 2)",
    "/* mine */ SELECT 1 FROM pg_try_advisory_lock_shared(42) -- comment",
    sql.SQL("SELECT pg_advisory_lock({})").format(42),
    b"SELECT pg_advisory_lock(42)",
]


def send(*statements: Any) -> None:
    """Send each statement by a cursor of its own."""
    for statement in statements:
        with connection.cursor() as cursor:
            cursor.execute(statement)


@pytest.fixture
def told(run_once: Runner, caplog: pytest.LogCaptureFixture) -> Iterator[Told]:
    """Run a function green, and wait until its connection is reset; return the warnings."""

    def told(function: Callable[[], Any]) -> list[str]:
        async def main() -> None:
            await aio.run(function)
            await Tag.objects.acount()  # on the pool's one connection

        with caplog.at_level(logging.WARNING, "pgbackend.driver"):
            run_once(main())
        return [record.getMessage() for record in caplog.records]

    with pool_of_default(max_size=1):
        yield told


@pytest.mark.parametrize("statement", LOCKS, ids=str)
def test_a_lock_that_ends_with_its_statement_is_told(told: Told, statement: Any) -> None:
    (message,) = told(lambda: send(statement))
    assert f"by a cursor opened at {__file__}:" in message
    assert "'default'" in message and "pgbackend.pinned()" in message


def test_a_lock_that_a_transaction_takes_for_the_session_is_told(told: Told) -> None:
    def work() -> None:
        with transaction.atomic():
            send("SELECT pg_advisory_lock(42)", "SELECT 1")
            Tag.objects.create(name="t")

    assert len(told(work)) == 1


def test_a_lock_is_told_though_the_transaction_is_rolled_back(told: Told) -> None:
    def work() -> None:
        with transaction.atomic():
            send("SET LOCAL work_mem = '4MB'", "SELECT pg_advisory_lock(42)")
            transaction.set_rollback(True)

    assert len(told(work)) == 1


def test_a_lock_that_a_function_of_the_server_takes_is_told_with_its_text(told: Told) -> None:
    assert len(told(lambda: send("DO $$ BEGIN PERFORM pg_advisory_lock(42); END $$"))) == 1


def test_a_lock_that_a_query_of_the_orm_takes_is_told(told: Told) -> None:
    Tag.objects.create(name="t")
    lock = RawSQL("pg_advisory_lock(42)::text", ())
    (message,) = told(lambda: Tag.objects.annotate(x=lock).get())
    assert "by a query of the ORM" in message


@pytest.mark.parametrize(
    "statements",
    [
        ["SELECT pg_advisory_lock(42)", "SELECT pg_advisory_unlock(42)"],
        ["SELECT pg_advisory_lock(42)", "SELECT 1", "SELECT pg_advisory_unlock_all()"],
    ],
)
def test_a_lock_that_is_released_is_not_told(told: Told, statements: list[str]) -> None:
    def pinned() -> None:
        with pgbackend.pinned():
            send(*statements)

    def one_cursor() -> None:
        with connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)

    assert told(pinned) == told(one_cursor) == []


def test_a_lock_that_was_not_given_is_not_told(told: Told) -> None:
    send("SELECT pg_advisory_lock(42)")  # in sync code
    try:
        assert told(lambda: send("SELECT pg_try_advisory_lock(42)")) == []
    finally:
        send("SELECT pg_advisory_unlock(42)")


def test_a_lock_of_a_transaction_is_not_told(told: Told) -> None:
    def work() -> None:
        with transaction.atomic():
            send("SELECT pg_advisory_xact_lock(42)", "SELECT 'pg_advisory_lock'")

    assert told(work) == []


def test_a_lock_in_sync_code_stays_and_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "pgbackend.driver"):
        send("SELECT pg_advisory_lock(42)")
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_unlock(42)")
            assert cursor.fetchone() == (True,)
    assert not caplog.records


@pytest.mark.parametrize("changed", [{"pool": None}, {"session_reset": "never"}], ids=str)
def test_a_lock_is_told_where_no_session_is_reset(
    run_once: Runner, caplog: pytest.LogCaptureFixture, changed: dict[str, Any]
) -> None:
    options = {**connections.settings["default"]["OPTIONS"], **changed}
    with (
        settings_of_default(OPTIONS=options),
        caplog.at_level(logging.WARNING, "pgbackend.driver"),
    ):

        async def main() -> None:
            await aio.run(send, "SELECT pg_advisory_lock(42)")
            while not caplog.records:
                await asyncio.sleep(0.001)

        run_once(main())
    assert len(caplog.records) == 1
