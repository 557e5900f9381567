"""Tests C15: declared session state, attacked by statements, transactions and code of odd kinds.

The names of `tests/support/tenants.py` tell in which schema a statement of the ORM ran; `see()`
reads a setting by raw SQL, in a text that the test chooses.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import enum
import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from django.db import connection, transaction
from django.db.backends.signals import connection_created

import pgbackend
from pgbackend import aio
from pgbackend.driver.session_settings import declared
from tests.conftest import Runner
from tests.support.fixtures import pool_of_default
from tests.support.tenants import OUTSIDE, tenant

pytestmark = [pytest.mark.usefixtures("tenants")]

TENANT = "current_setting('app.tenant', true)"


def run_sql(text: str) -> Any:
    """Execute raw SQL; return the first value of the result, None if that is empty or missing."""
    with connection.cursor() as cursor:
        cursor.execute(text)
        return (cursor.fetchone()[0] or None) if cursor.description else None


def see(text: str = f"SELECT {TENANT}") -> Any:
    return run_sql(text)


def of_tenant(value: Any) -> Any:
    return pgbackend.session(**{"app.tenant": value})


@pytest.fixture
def left_behind() -> None:
    """Leave a tenant in the server session, as a block does in autocommit: the next pays for it."""
    connection.ensure_connection()
    with of_tenant("left behind"):
        assert see() == "left behind"


@pytest.fixture
def raw_connection() -> Any:
    """Return the psycopg connection of sync code."""
    connection.ensure_connection()
    return connection.connection


# --- Several statements in one text ---


@pytest.mark.usefixtures("left_behind")
@pytest.mark.parametrize(
    "first", [*("BEGIN", "ROLLBACK", "SAVEPOINT a"), *("/* /* x */ rollback */", 'BEGIN -- "\n')]
)
def test_a_text_that_begins_with_begin_or_rollback_runs_with_the_settings(first: str) -> None:
    second = f"SELECT set_config('app.seen', {TENANT}, false)"
    begun = "BEGIN; " if first.startswith("SAVEPOINT") else ""
    separator = " " if first.startswith("/*") else "; "
    with of_tenant("inside"):
        run_sql(f'{begun}{first}{separator}{second}; COMMIT -- "')
    assert see("SELECT current_setting('app.seen')") == "inside"
    run_sql("RESET app.seen")


@pytest.mark.usefixtures("left_behind")
def test_a_rollback_at_the_end_of_a_text_brings_no_other_tenant_back() -> None:
    with pgbackend.session(search_path="two"):
        run_sql("SELECT 1; ROLLBACK")
        assert (see(), tenant()) == (None, "two")
    assert (see(), tenant()) == (None, OUTSIDE)


@pytest.mark.usefixtures("left_behind")
@pytest.mark.parametrize("end", ["COMMIT AND CHAIN", "COMMIT; BEGIN", "ROLLBACK AND CHAIN"])
def test_a_transaction_that_another_one_follows_at_once_passes_no_setting_on(end: str) -> None:
    transaction.set_autocommit(False)
    try:
        seen = [see()]
        run_sql(end)
        seen.append(see())
        with of_tenant("inside"):
            seen.append(see())
            run_sql(end)
            seen.append(see())
        seen.append(see())
    finally:
        transaction.rollback()
        transaction.set_autocommit(True)
    assert seen == [None, None, "inside", "inside", None]


@pytest.mark.usefixtures("left_behind")
def test_a_savepoint_that_is_rolled_back_in_a_text_of_several_statements_undoes_no_setting() -> (
    None
):
    with transaction.atomic():
        with of_tenant("inside"):
            see()
            run_sql("SAVEPOINT a")
        assert see() is None
        run_sql("SELECT 1; ROLLBACK TO SAVEPOINT a")
        assert see() is None


# --- Transactions that are not Django's ---


def test_each_transaction_of_psycopgs_has_the_settings(raw_connection: Any) -> None:
    seen: list[Any] = []

    def look() -> None:
        seen.append(raw_connection.execute(f"SELECT {TENANT}").fetchone()[0] or None)

    with of_tenant("one"):
        for _ in range(2):
            with raw_connection.transaction():
                look()
                with contextlib.suppress(ZeroDivisionError), raw_connection.transaction():
                    with of_tenant("two"):
                        look()
                    raise ZeroDivisionError
                look()
    with raw_connection.transaction():
        look()
    assert seen == ["one", "two", "one", "one", "two", "one", None]


def test_each_transaction_that_raw_sql_begins_has_the_settings() -> None:
    seen: list[Any] = []
    for settings in (of_tenant("one"), of_tenant("one"), of_tenant("two"), of_tenant(None)):
        with settings:
            run_sql("BEGIN")
            seen.append(see())
            run_sql("COMMIT")
    assert seen == ["one", "one", "two", None]


def test_the_isolation_of_a_transaction_may_be_set_inside_a_block(raw_connection: Any) -> None:
    with of_tenant("one"), raw_connection.transaction():
        raw_connection.execute("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
        shown = raw_connection.execute(f"SELECT current_setting('transaction_isolation'), {TENANT}")
        assert shown.fetchone() == ("serializable", "one")


def test_a_prepared_transaction_may_be_committed_inside_a_block(raw_connection: Any) -> None:
    # The server of the tests may have prepared transactions switched off: it looks for them anyway.
    with of_tenant("one"), pytest.raises(psycopg.Error) as caught:
        raw_connection.tpc_commit("no such transaction")
    assert caught.value.sqlstate == "42704"  # undefined_object


# --- Raw SQL beside declared settings ---


def test_raw_sql_may_set_a_name_that_another_block_has_declared() -> None:
    with transaction.atomic():
        with of_tenant("one"):
            see()
        with pgbackend.session(search_path="one"):
            run_sql("SET LOCAL app.tenant TO 'raw'")
            assert [see(), see()] == ["raw", "raw"]
        assert see() == "raw"


def test_a_receiver_that_sets_connections_up_runs_outside_of_the_block(
    raw_connection: Any,
) -> None:
    values = iter(("first", "second"))

    def set_up(connection: Any, **kwargs: Any) -> None:
        connection.connection.execute(f"SET app.tenant TO '{next(values)}'")

    connection.close()
    connection_created.connect(set_up)
    try:
        for value in ("first", "second"):
            with of_tenant("inside"):
                assert see() == "inside"
            assert see() == value
            run_sql("RESET app.tenant")
            connection.close()  # gives it back to the synchronous pool
    finally:
        connection_created.disconnect(set_up)


@pytest.mark.parametrize("option", ["check", "reset"])
def test_a_callback_of_the_pool_that_resets_connections_undoes_no_setting(
    run_once: Runner, option: str
) -> None:
    async def reset_all(connection: Any) -> None:
        await connection.execute("RESET ALL")

    def body() -> list[Any]:
        with pgbackend.session(search_path="one"):
            seen = [tenant(), tenant(), tenant()]
        return [*seen, tenant()]

    with pool_of_default(min_size=1, max_size=1, **{option: reset_all}):
        assert run_once.green(body) == ["one", "one", "one", OUTSIDE]


# --- Cursors of classes with their own way to send statements ---


class OwnWay(psycopg.ClientCursor[Any]):
    """A cursor as a tracing tool makes it."""

    def _execute_send(self, *args: Any, **kwargs: Any) -> None:
        super()._execute_send(*args, **kwargs)


@pytest.mark.usefixtures("left_behind")
@pytest.mark.parametrize("made", ["by the connection", "by hand"])
def test_a_savepoint_of_a_cursor_with_its_own_way_to_send_undoes_no_setting(
    raw_connection: Any, made: str
) -> None:
    if made == "by hand":
        cursor: Any = OwnWay(raw_connection)
    else:
        raw_connection.cursor_factory = OwnWay
        cursor = raw_connection.cursor()
    seen: list[Any] = []

    def look() -> None:
        seen.append(cursor.execute(f"SELECT {TENANT}").fetchone()[0] or None)

    with cursor, transaction.atomic():
        with of_tenant("inside"):
            look()
            cursor.execute("SAVEPOINT a")
        look()
        cursor.execute("ROLLBACK TO SAVEPOINT a")
        look()
    connection.close()
    assert seen == ["inside", None, None]


def test_a_patch_of_psycopgs_commands_sees_the_commit_of_a_block(
    raw_connection: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    execute = psycopg.Connection._exec_command

    def patched(connection: Any, command: Any, *args: Any) -> Any:
        seen.append(command)
        return execute(connection, command, *args)

    monkeypatch.setattr(psycopg.Connection, "_exec_command", patched)
    with transaction.atomic(), of_tenant("inside"):
        see()
    assert seen == [b"BEGIN", b"COMMIT"]


# --- Functions of all kinds ---


def test_a_coroutine_that_an_ordinary_function_returns_runs_in_the_block(run_once: Runner) -> None:
    async def coroutine_function() -> Any:
        return await aio.run(see)

    class Callee:
        async def __call__(self) -> Any:
            return await coroutine_function()

    async def main() -> Any:
        functions: list[Callable[[], Any]] = [
            lambda: asyncio.wait_for(coroutine_function(), 5),
            functools.partial(coroutine_function),
            Callee(),
        ]
        seen = [await of_tenant("inside")(each)() for each in functions]
        return [*seen, await coroutine_function()]

    assert run_once(main()) == ["inside"] * 3 + [None]


def test_a_class_cannot_be_decorated() -> None:
    with pytest.raises(TypeError, match="decorate its methods"):
        of_tenant("inside")(type("View", (), {}))


def test_tasks_that_start_each_other_in_blocks_keep_no_block_that_has_ended(
    run_once: Runner,
) -> None:
    async def step(left: int, done: asyncio.Future[int]) -> None:
        async with of_tenant(left):
            if left:
                done.task = asyncio.create_task(step(left - 1, done))  # type: ignore[attr-defined]
                return
            depth, here = 0, declared.get()
            while here is not None:
                depth, here = depth + 1, here.outer
            done.set_result(depth)

    async def main() -> int:
        done: asyncio.Future[int] = asyncio.Future()
        await step(50, done)
        return await done

    assert run_once(main()) < 4


# --- Code that was left behind ---


def test_a_generator_that_is_closed_in_other_code_does_not_end_that_codes_block() -> None:
    block = of_tenant("inside")

    @contextlib.contextmanager
    def in_block() -> Iterator[None]:
        with block:
            yield

    left = in_block()
    contextvars.copy_context().run(left.__enter__)
    with block:
        del left
        gc.collect()
        assert see() == "inside"
    assert see() is None


@pytest.mark.parametrize("decorated", [True, False])
def test_a_coroutine_that_is_closed_in_other_code_does_not_end_that_codes_block(
    decorated: bool,
) -> None:
    block = of_tenant("inside")

    async def wait() -> None:
        await asyncio.Future()

    async def wait_in_block() -> None:
        async with block:
            await wait()

    async def main() -> Any:
        left = block(wait)() if decorated else wait_in_block()
        contextvars.copy_context().run(left.send, None)
        async with block:
            left.close()
            return await aio.run(see), await block(aio.run)(see)

    assert asyncio.run(main()) == ("inside", "inside")


def test_a_stack_may_enter_a_block_in_one_coroutine_and_leave_it_in_another() -> None:
    stack = contextlib.AsyncExitStack()

    async def start() -> None:
        await stack.enter_async_context(of_tenant("inside"))

    async def main() -> list[Any]:
        await start()
        seen = [await aio.run(see)]

        async def stop() -> None:
            await stack.aclose()

        await stop()
        return [*seen, await aio.run(see)]

    assert asyncio.run(main()) == ["inside", None]


# --- Names and values ---


def test_a_member_of_an_enum_stands_for_its_value() -> None:
    class Name(str, enum.Enum):  # noqa: UP042 - a StrEnum's str() is its value already
        ONE = "one"

    class Number(int, enum.Enum):
        SEVEN = 7

    with of_tenant(Name.ONE), pgbackend.session(search_path=[Name.ONE]):
        assert (see(), tenant()) == ("one", "one")
    with of_tenant(Number.SEVEN):
        assert see() == "7"


@pytest.mark.parametrize("name", ["seed", "DateStyle", "intervalstyle", "idle_session_timeout"])
def test_settings_that_would_harm_other_statements_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        pgbackend.session(**{name: "1"})
