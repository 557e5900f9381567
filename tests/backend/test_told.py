"""Tests that green code sees the connection's state as sync code, and Django's own engine, do."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psycopg
import pytest
from django.core.exceptions import SynchronousOnlyOperation
from django.db import DatabaseError, IntegrityError, connection, connections, transaction
from django.db.backends.postgresql.base import Cursor
from django.db.transaction import TransactionManagementError, atomic
from django.test.utils import CaptureQueriesContext
from psycopg import IsolationLevel

import pgbackend
from pgbackend import aio
from pgbackend.driver import bridge
from tests.conftest import Runner, wait_for
from tests.library.models import Tag
from tests.support.fixtures import pool_of_default, settings_of_default
from tests.support.stock import in_thread, on_djangos


class Undo(Exception):
    pass


@pytest.fixture
def told(run: Runner) -> Callable[..., Any]:
    """Return the result of `fn` on Django's engine; on ours it must be the same, sync and green."""

    def ask(fn: Callable[[], Any]) -> Any:
        on_stock = on_djangos(fn)
        assert in_thread(fn) == on_stock, "in sync code"
        assert run.green(fn) == on_stock, "green"
        (stats,) = pgbackend.statistics() or [None]
        assert stats is None or stats.leased == 0
        return on_stock

    return ask


# --- is_usable() ----------------------------------------------------------------------------------


def terminate(pid: int, admin: psycopg.Connection[Any]) -> None:
    admin.execute("SELECT pg_terminate_backend(%s)", [pid])
    gone = "SELECT 1 FROM pg_stat_activity WHERE pid = %s"
    wait_for(lambda: not admin.execute(gone, [pid]).fetchall(), "the session has ended")


def after_a_query() -> bool:
    Tag.objects.count()
    return connection.is_usable()


def after_ensure_connection() -> bool:
    connection.ensure_connection()
    return connection.is_usable()


def in_a_block() -> list[bool]:
    with atomic():
        before = connection.is_usable()
        Tag.objects.count()
        return [before, connection.is_usable()]


def in_a_nested_block() -> list[bool]:
    with atomic(), atomic():
        return [connection.is_usable(), connection.is_usable()]


def in_a_block_that_has_failed() -> list[bool]:
    found = []
    with suppress(IntegrityError), atomic():
        Tag.objects.create(name="taken")
        with suppress(IntegrityError):
            Tag.objects.create(name="taken")
        found.append(connection.is_usable())
        raise IntegrityError
    return [*found, connection.is_usable()]


def after_close_in_a_block() -> list[bool]:
    with suppress(DatabaseError), atomic():
        Tag.objects.count()
        connection.close()
        return [connection.is_usable(), connection.is_usable()]
    raise AssertionError("not reached")


def under_an_open_cursor() -> list[bool]:
    with connection.cursor() as cursor:
        cursor.execute("SELECT generate_series(1, 3)")
        usable = connection.is_usable()
        assert len(cursor.fetchall()) == 3
    return [usable, connection.is_usable()]


def in_a_transaction_by_hand() -> list[bool]:
    transaction.set_autocommit(False)
    try:
        before = connection.is_usable()
        Tag.objects.count()
        return [before, connection.is_usable()]
    finally:
        transaction.rollback()
        transaction.set_autocommit(True)


@pytest.mark.parametrize(
    ("ask", "expected"),
    [
        (after_a_query, True),
        (after_ensure_connection, True),
        (in_a_block, [True, True]),
        (in_a_nested_block, [True, True]),
        (in_a_block_that_has_failed, [False, True]),
        (after_close_in_a_block, [False, False]),
        (under_an_open_cursor, [True, True]),
        (in_a_transaction_by_hand, [True, True]),
    ],
)
def test_a_connection_is_usable_where_it_is_on_djangos_engine(
    told: Callable[..., Any], ask: Callable[[], Any], expected: Any
) -> None:
    assert told(ask) == expected


def test_before_the_first_query_the_database_is_asked(run: Runner, leases: list[Any]) -> None:
    """No connection is held between two statements, so one is leased to ask."""

    def green() -> None:
        assert connection.is_usable() and connection.connection is None
        assert len(leases) == 2, "leased and released"

    run.green(green)


def test_what_asks_is_not_logged_and_leaves_nothing(
    told: Callable[..., Any], admin: psycopg.Connection[Any]
) -> None:
    def ask() -> Any:
        with CaptureQueriesContext(connection) as queries:
            assert connection.is_usable()
            with atomic():
                assert connection.is_usable()
        return [query["sql"] for query in queries]

    assert told(ask) == ["BEGIN", "COMMIT"]


def test_pinned_asks_the_connection_that_is_held(
    run: Runner, admin: psycopg.Connection[Any]
) -> None:
    def green() -> None:
        with pgbackend.pinned():
            assert connection.is_usable()
            held = connection.connection
            assert held is not None
            assert connection.is_usable() and connection.connection is held
            terminate(held.info.backend_pid, admin)
            assert not connection.is_usable()
            connection.close()
            assert connection.is_usable()
            assert Tag.objects.count() == 0

    run.green(green)


def test_a_session_that_was_terminated_is_not_usable_and_then_another_is(
    run: Runner, admin: psycopg.Connection[Any]
) -> None:
    def ask() -> list[bool]:
        with suppress(DatabaseError), atomic():
            Tag.objects.count()
            terminate(connection.connection.info.backend_pid, admin)
            found = [connection.is_usable(), connection.is_usable()]
        connection.close()
        Tag.objects.count()
        return [*found, connection.is_usable()]

    assert on_djangos(ask) == [False, False, True]
    assert in_thread(ask) == [False, False, True]
    assert run.green(ask) == [False, False, True]


def test_a_free_connection_that_was_terminated_is_replaced(
    run: Runner, admin: psycopg.Connection[Any], leases: list[Any]
) -> None:
    def green() -> None:
        Tag.objects.count()
        terminate(leases[0].backend_pid, admin)
        assert connection.is_usable()

    run.green(green)


def test_a_database_that_cannot_be_reached_is_not_usable(run: Runner) -> None:
    def green() -> None:
        assert [connection.is_usable(), connection.is_usable()] == [False, False]
        with atomic():
            assert not connection.is_usable()

    with settings_of_default(NAME="nowhere"):
        run.green(green)


class FailingCursor(Cursor):
    fails = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if FailingCursor.fails:
            raise psycopg.OperationalError("no cursor")
        super().__init__(*args, **kwargs)


def test_a_connection_that_gives_no_cursor_is_not_usable_and_goes_back(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def green() -> None:
        Tag.objects.count()
        monkeypatch.setattr(FailingCursor, "fails", True)
        assert not connection.is_usable()
        (stats,) = pgbackend.statistics()
        assert stats.leased == 0 and connection.connection is None

    given = connection.settings_dict["OPTIONS"]
    with settings_of_default(OPTIONS={**given, "cursor_factory": FailingCursor}):
        run.green(green)


def test_an_exhausted_pool_has_no_usable_connection(run: Runner) -> None:
    async def main() -> None:
        async with pgbackend.pinned():
            assert await aio.run(connection.is_usable)
            assert await asyncio.create_task(aio.run(connection.is_usable)) is False
        assert await aio.run(connection.is_usable)

    with pool_of_default(max_size=1, timeout=0.05):
        run(main())


def test_a_task_whose_block_has_ended_has_no_usable_connection(run: Runner) -> None:
    async def late(go: asyncio.Event) -> bool:
        await go.wait()
        return bool(await aio.run(connection.is_usable))

    async def main() -> None:
        go = asyncio.Event()
        async with atomic():
            await Tag.objects.acount()
            task = asyncio.create_task(late(go))
            await asyncio.sleep(0)
        go.set()
        assert await task is False

    run(main())


def test_is_usable_waits_for_its_turn(run: Runner) -> None:
    """A sibling's block is open and has failed: until it ends, the server would answer an error."""

    async def sibling(failed: asyncio.Event, go: asyncio.Event) -> None:
        with suppress(IntegrityError):
            async with atomic():
                try:
                    await Tag.objects.acreate(name="taken")
                finally:
                    failed.set()
                    await go.wait()

    async def main() -> None:
        failed, go = asyncio.Event(), asyncio.Event()
        async with atomic():
            await Tag.objects.acreate(name="taken")
            task = asyncio.create_task(sibling(failed, go))
            await failed.wait()
            asking = asyncio.create_task(aio.run(connection.is_usable))
            for _ in range(3):
                await asyncio.sleep(0)  # it has begun, and has sent what it may send
            go.set()
            assert await asking is True
            await task

    run(main())


def test_on_the_bare_loop_is_usable_names_the_cure(run: Runner) -> None:
    async def main() -> None:
        with pytest.raises(SynchronousOnlyOperation, match=r"is_usable\(\).*await pgbackend"):
            connection.is_usable()
        async with atomic():
            await Tag.objects.acount()
            with pytest.raises(SynchronousOnlyOperation, match=r"is_usable\(\)"):
                connection.is_usable()

    run(main())


def test_where_autocommit_is_off_the_question_begins_nothing(run: Runner) -> None:
    def green() -> None:
        assert connection.is_usable() and connection.connection is None

    with settings_of_default(AUTOCOMMIT=False):
        run.green(green)


# --- The ends of transactions, as they are logged -------------------------------------------------


def empty() -> None:
    with atomic():
        pass


def durable() -> None:
    with atomic(durable=True):
        pass


def failing() -> None:
    with atomic():
        raise Undo


def rolled_back_by_hand() -> None:
    with atomic():
        transaction.set_rollback(True)


def nested() -> None:
    with atomic(), atomic():
        pass


def nested_failing() -> None:
    with atomic(), suppress(Undo), atomic():
        raise Undo


def both_failing() -> None:
    with atomic(), atomic():
        raise Undo


def without_savepoint() -> None:
    with atomic(), atomic(savepoint=False):
        pass


def without_savepoint_failing() -> None:
    with atomic(), suppress(Undo), atomic(savepoint=False):
        raise Undo


def one_statement() -> None:
    with atomic():
        Tag.objects.count()


def one_statement_failing() -> None:
    with atomic():
        Tag.objects.count()
        raise Undo


def a_statement_in_the_nested_block() -> None:
    with atomic(), atomic():
        Tag.objects.count()


def two_in_turn() -> None:
    empty()
    one_statement()
    empty()


def by_hand() -> None:
    transaction.set_autocommit(False)
    try:
        transaction.commit()
        transaction.rollback()
        Tag.objects.count()
        transaction.commit()
        transaction.rollback()
    finally:
        transaction.set_autocommit(True)


def by_hand_with_a_block() -> None:
    transaction.set_autocommit(False)
    try:
        with atomic():
            pass
        transaction.commit()
    finally:
        transaction.set_autocommit(True)


def in_autocommit() -> None:
    Tag.objects.count()
    transaction.commit()
    transaction.rollback()


def closed_in_the_block() -> None:
    with suppress(DatabaseError), atomic():
        Tag.objects.count()
        connection.close()


BLOCKS = [
    *(empty, durable, failing, rolled_back_by_hand, nested, nested_failing, both_failing),
    *(without_savepoint, without_savepoint_failing, one_statement, one_statement_failing),
    *(a_statement_in_the_nested_block, two_in_turn, by_hand, by_hand_with_a_block),
    *(in_autocommit, closed_in_the_block),
]


@contextmanager
def logged() -> Iterator[list[str]]:
    """Record the statements that are logged by `django.db.backends`."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(str(record.sql))  # type: ignore[attr-defined]

    logger, handler = logging.getLogger("django.db.backends"), Handler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield lines
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def without_names(lines: list[str]) -> list[str]:
    return [re.sub(r'"s\d+_x\d+"', "sid", line) for line in lines]


def statements_of(block: Callable[[], None]) -> tuple[list[str], list[str]]:
    with logged() as lines, CaptureQueriesContext(connection) as queries, suppress(Undo):
        block()
    return without_names([query["sql"] for query in queries]), without_names(lines)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_is_logged_as_on_djangos_engine(
    told: Callable[..., Any], block: Callable[[], None]
) -> None:
    queries, lines = told(lambda: statements_of(block))
    assert queries and queries == lines
    assert queries[0] == "BEGIN" or block is in_autocommit


def test_an_empty_block_that_is_logged_takes_no_connection(run: Runner, leases: list[Any]) -> None:
    def green() -> None:
        connection.force_debug_cursor = True
        for block in (empty, failing, without_savepoint):
            with suppress(Undo):
                block()
        assert [query["sql"] for query in connection.queries] == [
            *("BEGIN", "COMMIT", "BEGIN", "ROLLBACK", "BEGIN", "COMMIT")
        ]

    run.green(green)
    assert not leases


# --- Why a block is doomed ------------------------------------------------------------------------


def create() -> None:
    Tag.objects.create(name="taken")


def update() -> None:
    Tag.objects.filter(name="other").update(name="taken")


def inner_block() -> None:
    with atomic(savepoint=False):
        raise Undo


def inner_block_with_an_error() -> None:
    with atomic(savepoint=False):
        create()


def by_hand_doomed() -> None:
    transaction.set_rollback(True)


def count() -> None:
    Tag.objects.count()


def raw() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")


def savepoint() -> None:
    connection.savepoint()


def stream() -> None:
    list(Tag.objects.iterator())


def reason(act: Callable[[], None]) -> str | None:
    """Return the type of the error that is the cause of `act`'s refusal."""
    with pytest.raises(TransactionManagementError, match="until the end of the 'atomic'") as caught:
        act()
    assert caught.value.__suppress_context__
    cause = caught.value.__cause__
    return None if cause is None else type(cause).__name__


@pytest.mark.sweep(one_in=3)
@pytest.mark.parametrize("act", [count, raw, savepoint, stream, create])
@pytest.mark.parametrize(
    ("doom", "expected"),
    [
        (create, "IntegrityError"),
        (update, "IntegrityError"),
        (inner_block, None),
        (inner_block_with_an_error, "IntegrityError"),
        (by_hand_doomed, None),
    ],
)
def test_a_doomed_block_says_what_has_doomed_it(
    told: Callable[..., Any], doom: Callable[[], None], act: Callable[[], None], expected: str
) -> None:
    def ask() -> str | None:
        with suppress(Undo), atomic():
            with suppress(IntegrityError, Undo):
                doom()
            why = reason(act)
            raise Undo
        return why

    Tag.objects.create(name="taken")
    Tag.objects.create(name="other")
    assert told(ask) == expected


def test_tasks_of_a_doomed_block_are_told_what_another_has_doomed_it_by(run: Runner) -> None:
    async def main() -> None:
        with pytest.raises(Undo):
            async with atomic():
                await Tag.objects.acreate(name="taken")
                with pytest.raises(IntegrityError):
                    await asyncio.create_task(Tag.objects.acreate(name="taken"))
                assert await aio.run(reason, count) == "IntegrityError"
                assert await asyncio.create_task(aio.run(reason, raw)) == "IntegrityError"
                raise Undo

    run(main())


# --- Transactions that are managed by hand --------------------------------------------------------


def doomed_by_hand() -> list[Any]:
    """Doom a transaction by a block, by hand; COMMIT does not mend it, nor does it in Django."""
    transaction.set_autocommit(False)
    with suppress(IntegrityError), atomic(savepoint=False):
        create()
    why = [reason(count)]
    transaction.commit()
    return [*why, reason(raw), connection.needs_rollback]


def then_autocommit() -> list[Any]:
    found = doomed_by_hand()
    transaction.set_autocommit(True)
    return [*found, reason(count), reason(raw), connection.needs_rollback]


def then_autocommit_and_by_hand_again() -> list[Any]:
    found = then_autocommit()
    transaction.set_autocommit(False)
    return [*found, reason(count), connection.needs_rollback]


def then_a_rollback() -> list[Any]:
    found = then_autocommit()
    transaction.rollback()
    return [*found, connection.needs_rollback, Tag.objects.count()]


def then_a_rollback_by_hand() -> list[Any]:
    found = doomed_by_hand()
    transaction.rollback()
    transaction.set_autocommit(True)
    return [*found, connection.needs_rollback, Tag.objects.count()]


def then_a_block() -> list[Any]:
    found = then_autocommit()
    with atomic():
        return [*found, connection.needs_rollback, Tag.objects.count()]


def then_closed() -> list[Any]:
    found = then_autocommit()
    connection.close()
    return [*found, Tag.objects.count(), connection.needs_rollback]


def then_closed_by_hand() -> list[Any]:
    found = doomed_by_hand()
    connection.close()
    return [*found, Tag.objects.count(), connection.needs_rollback, connection.get_autocommit()]


#: The causes of two refusals, and `needs_rollback`.
DOOMED = ["IntegrityError", "IntegrityError", True]


@pytest.mark.parametrize(
    ("ask", "expected"),
    [
        (then_autocommit, ["IntegrityError", "IntegrityError", True]),
        (
            then_autocommit_and_by_hand_again,
            [*["IntegrityError"] * 2, True, "IntegrityError", True],
        ),
        (then_a_rollback, [*["IntegrityError"] * 2, True, False, 1]),
        (then_a_rollback_by_hand, [False, 1]),
        (then_a_block, [*["IntegrityError"] * 2, True, False, 1]),
        (then_closed, [*["IntegrityError"] * 2, True, 1, False]),
        (then_closed_by_hand, [1, False, True]),
    ],
)
def test_a_doomed_transaction_by_hand_ends_as_on_djangos_engine(
    told: Callable[..., Any], ask: Callable[[], list[Any]], expected: list[Any]
) -> None:
    def restored() -> list[Any]:
        try:
            return ask()
        finally:
            connection.close()

    Tag.objects.create(name="taken")
    assert told(restored) == [*DOOMED, *expected]


def test_what_doomed_a_transaction_by_hand_is_forgotten_with_its_pin(run: Runner) -> None:
    def green() -> None:
        with pgbackend.pinned():
            then_autocommit()
            connection.close()
            assert not connection.needs_rollback
            assert Tag.objects.count() == 1
        then_autocommit()
        bridge.await_(asyncio.create_task(aio.run(others)))

    def others() -> None:
        assert not connection.needs_rollback and Tag.objects.count() == 1

    Tag.objects.create(name="taken")
    run.green(green)


# --- Questions to the wrapper ---------------------------------------------------------------------


def as_new() -> None:
    """Make Django forget the server's version and features, so that it asks again."""
    wrapper = connections["default"]
    wrapper.__dict__.pop("pg_version", None)
    for name in [name for name in wrapper.features.__dict__ if name != "connection"]:
        del wrapper.features.__dict__[name]


def version_first() -> list[Any]:
    as_new()
    with atomic():
        version = connection.pg_version
        found = [connection.needs_rollback, connection.closed_in_transaction]
        Tag.objects.create(name="kept")
    return [version > 0, *found, Tag.objects.count(), Tag.objects.all().delete()[0]]


def feature_first() -> list[Any]:
    as_new()
    with atomic(), atomic(savepoint=False):
        modern = connection.features.is_postgresql_16
        Tag.objects.create(name="kept")
    return [modern, Tag.objects.count(), Tag.objects.all().delete()[0]]


def temporary_connection_first() -> list[Any]:
    with atomic():
        transaction.on_commit(lambda: done.append("committed"))
        done: list[str] = []
        with connection.temporary_connection() as cursor:
            cursor.execute("SELECT 1")
        Tag.objects.create(name="kept")
    return [*done, Tag.objects.count(), Tag.objects.all().delete()[0]]


def version_by_hand() -> list[Any]:
    as_new()
    transaction.set_autocommit(False)
    try:
        found = [connection.pg_version > 0, connection.get_autocommit()]
        transaction.rollback()
    finally:
        transaction.set_autocommit(True)
    return found


@pytest.mark.parametrize(
    ("ask", "expected"),
    [
        (version_first, [True, False, False, 1, 1]),
        (feature_first, [True, 1, 1]),
        (temporary_connection_first, ["committed", 1, 1]),
        (version_by_hand, [True, False]),
    ],
)
def test_a_question_about_the_server_leaves_a_transaction_whole(
    told: Callable[..., Any], ask: Callable[[], list[Any]], expected: list[Any]
) -> None:
    """The question closes a connection that it has opened, but not that of a block."""
    assert told(ask) == expected


def test_a_temporary_connection_goes_back(run: Runner, leases: list[Any]) -> None:
    def green() -> None:
        with connection.temporary_connection() as cursor:
            cursor.execute("SELECT 1")
            assert connection.connection is not None
        assert connection.connection is None and len(leases) == 2
        with pgbackend.pinned():
            Tag.objects.count()
            held = connection.connection
            with connection.temporary_connection() as cursor:
                cursor.execute("SELECT 1")
            assert connection.connection is held

    run.green(green)


@pytest.mark.parametrize("level", [None, IsolationLevel.SERIALIZABLE])
def test_the_isolation_level_is_told(run: Runner, level: IsolationLevel | None) -> None:
    def ask() -> list[Any]:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
            found = [connection.isolation_level]
        Tag.objects.count()
        found.append(connection.isolation_level)
        with atomic():
            found.append(connection.isolation_level)
            Tag.objects.count()
            return [*found, connection.isolation_level]

    given = connection.settings_dict["OPTIONS"]
    changes = {} if level is None else {"isolation_level": level.value}
    with settings_of_default(OPTIONS={**given, **changes}):
        expected = on_djangos(ask)
        assert expected == [level or IsolationLevel.READ_COMMITTED] * 4
        assert in_thread(ask) == expected
        assert run.green(ask) == expected
