"""Tests the ends of an `atomic` block that are done in one step: results are the same."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

import psycopg
import pytest
from django.core.exceptions import SynchronousOnlyOperation
from django.db import (
    DatabaseError,
    InterfaceError,
    OperationalError,
    connection,
    connections,
    transaction,
)
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.postgresql.base import DatabaseWrapper as PostgresDatabaseWrapper
from django.db.transaction import TransactionManagementError
from django.test import override_settings
from django.test.utils import CaptureQueriesContext

import pgbackend
from pgbackend import aio, atomic_blocks, base, driver
from pgbackend.fast import blocks
from tests.conftest import Runner
from tests.library.models import Book, Entry
from tests.support.fixtures import pool_of_default, settings_of_default
from tests.support.gate import Gate
from tests.support.patches import patched, patched_on_the_object
from tests.support.sweep import as_coroutine, observed


@pytest.fixture
def in_one_step(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the ends of blocks that were done in one step."""
    seen: list[str] = []

    def record(name: str) -> None:
        original = getattr(blocks, name)

        def recorded(*args: Any) -> Any:
            seen.append(name)
            return original(*args)

        monkeypatch.setattr(blocks, name, recorded)

    record("_open_outermost")
    record("_commit_outermost")
    return seen


def what_is_seen() -> dict[str, Any]:
    return {
        name: getattr(connection, name)
        for name in (
            *("autocommit", "commit_on_exit", "in_atomic_block", "needs_rollback"),
            *("closed_in_transaction", "errors_occurred", "run_commit_hooks_on_set_autocommit_on"),
            *("atomic_blocks", "run_on_commit", "savepoint_ids"),
        )
    }


def one_block(atomic: Any) -> list[dict[str, Any]]:
    """Return the values of Django's names before, in and after a block, and in a hook."""
    seen = [what_is_seen()]
    with atomic:
        seen.append(what_is_seen())
        connection.errors_occurred = True
        Entry.objects.create(text="x")
        transaction.on_commit(lambda: seen.append(what_is_seen()))
        seen.append({**what_is_seen(), "run_on_commit": len(connection.run_on_commit)})
    seen.append(what_is_seen())
    return seen


@pytest.mark.shortcut("blocks")
def test_the_names_of_django_say_what_they_say_in_a_sync_context(
    run: Runner, in_one_step: list[str]
) -> None:
    atomic = transaction.atomic()
    expected = one_block(atomic)
    assert in_one_step == []
    assert run.green(lambda: one_block(atomic)) == expected
    assert in_one_step == ["_open_outermost", "_commit_outermost"]
    assert Entry.objects.count() == 2


@pytest.mark.shortcut("blocks")
def test_a_flag_that_was_left_is_reset_as_in_sync_code(run: Runner, in_one_step: list[str]) -> None:
    def green() -> bool:
        connection.needs_rollback = True
        connection.commit_on_exit = False
        with transaction.atomic():
            Entry.objects.create(text="x")
        return connection.commit_on_exit and not connection.needs_rollback

    assert run.green(green)
    assert len(in_one_step) == 2
    assert Entry.objects.count() == 1


def test_the_plain_way_says_the_same(
    run: Runner, in_one_step: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic_blocks, "open_at_once", atomic_blocks._never_open)
    monkeypatch.setattr(atomic_blocks, "commit_at_once", atomic_blocks._never_commit)
    atomic = transaction.atomic()
    expected = one_block(atomic)
    assert run.green(lambda: one_block(atomic)) == expected
    assert in_one_step == []
    assert Entry.objects.count() == 2


# --- Unusual blocks end as in Django --------------------------------------------------------------


class _Left(Exception):
    pass


def nested() -> None:
    with transaction.atomic(), transaction.atomic():
        Entry.objects.create(text="x")


def nested_without_savepoint() -> None:
    with transaction.atomic(), transaction.atomic(savepoint=False):
        Entry.objects.create(text="x")


def rolled_back_by_hand() -> None:
    with transaction.atomic():
        Entry.objects.create(text="x")
        transaction.set_rollback(True)


def left_with_an_error() -> None:
    with pytest.raises(_Left), transaction.atomic():
        Entry.objects.create(text="x")
        raise _Left


def inside_a_transaction_by_hand() -> None:
    transaction.set_autocommit(False)
    with transaction.atomic():
        Entry.objects.create(text="x")
    transaction.rollback()
    transaction.set_autocommit(True)


def closed_inside() -> None:
    with transaction.atomic():
        Entry.objects.create(text="x")
        connection.close()


@pytest.mark.shortcut("blocks")
@pytest.mark.parametrize(
    ("block", "steps", "rows"),
    [
        (nested, ["_open_outermost", "_commit_outermost"], 1),
        (nested_without_savepoint, ["_open_outermost", "_commit_outermost"], 1),
        (rolled_back_by_hand, ["_open_outermost"], 0),
        (left_with_an_error, ["_open_outermost"], 0),
        (inside_a_transaction_by_hand, [], 0),
        (closed_inside, ["_open_outermost"], 0),
    ],
)
def test_only_the_outermost_block_that_is_committed_is_done_in_one_step(
    run: Runner, in_one_step: list[str], block: Callable[[], None], steps: list[str], rows: int
) -> None:
    def green() -> bool:
        block()
        return connection.get_autocommit() and not connection.in_atomic_block

    assert run.green(green)
    assert in_one_step == steps
    assert Entry.objects.count() == rows


def test_without_autocommit_a_block_is_djangos(run: Runner, in_one_step: list[str]) -> None:
    def green() -> int:
        with transaction.atomic():
            Entry.objects.create(text="x")
        transaction.rollback()
        return Entry.objects.count()

    settings = connections.settings["default"]
    settings["AUTOCOMMIT"] = False
    try:
        assert run.green(green) == 0
    finally:
        settings["AUTOCOMMIT"] = True
    assert in_one_step == []


def test_a_copy_of_the_wrapper_has_blocks_of_its_own(run: Runner, in_one_step: list[str]) -> None:
    def green() -> int:
        alone = connection.copy()
        connections["other"] = alone
        try:
            with transaction.atomic(using="other"):
                Entry.objects.using("other").create(text="x")
        finally:
            alone.close()
            del connections["other"]
        return Entry.objects.count()

    assert run.green(green) == 1
    assert in_one_step == []


@pytest.mark.shortcut("blocks")
def test_a_pinned_connection_is_that_of_the_block(run: Runner, in_one_step: list[str]) -> None:
    def backend() -> int:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            return int(cursor.fetchone()[0])

    def green() -> set[int]:
        with pgbackend.pinned():
            pids = {backend()}
            with transaction.atomic():
                pids.add(backend())
            return pids | {backend()}

    assert len(run.green(green)) == 1
    assert len(in_one_step) == 2


def test_others_take_part_in_a_block_of_a_test(run: Runner) -> None:
    async def another() -> int:
        return await Entry.objects.acount()

    async def main() -> list[int]:
        atomic = transaction.atomic()
        atomic._from_testcase = True  # type: ignore[attr-defined]
        async with atomic:
            await Entry.objects.acreate(text="x")
            inside = await asyncio.create_task(another(), context=contextvars.Context())
            transaction.set_rollback(True)
        return [inside, await another()]

    assert run(main()) == [1, 0]


def test_a_block_is_not_ended_on_the_bare_loop(run_once: Runner) -> None:
    async def main() -> int:
        atomic = transaction.atomic()
        await aio.run(atomic.__enter__)
        await Entry.objects.acreate(text="x")
        with pytest.raises(SynchronousOnlyOperation):
            atomic.__exit__(None, None, None)
        return await Entry.objects.acount()

    assert run_once(main()) == 0


def test_a_block_that_is_doomed_while_a_statement_waits_for_its_connection_refuses_it(
    run_once: Runner,
) -> None:
    async def holding(held: asyncio.Event, free: asyncio.Event) -> None:
        async with transaction.atomic():
            await Entry.objects.acount()
            held.set()
            await free.wait()

    async def main() -> None:
        held, free = asyncio.Event(), asyncio.Event()
        other = asyncio.create_task(holding(held, free), context=contextvars.Context())
        await held.wait()
        async with transaction.atomic():
            insert = asyncio.create_task(Entry.objects.acreate(text="x"))
            while not pgbackend.statistics()[0].waiting:
                await asyncio.sleep(0)
            transaction.set_rollback(True)
            free.set()
            with pytest.raises(TransactionManagementError):
                await insert
        await other

    options = connections.settings["default"]["OPTIONS"]
    with settings_of_default(OPTIONS={**options, "pool": {"max_size": 1}}):
        run_once(main())
    assert Entry.objects.count() == 0


# --- Observers see the ends of a block ------------------------------------------------------------


@contextmanager
def _capturing(seen: list[str]) -> Iterator[None]:
    with CaptureQueriesContext(connection) as captured:
        yield
    seen += [query["sql"] for query in captured if query["sql"] in ("BEGIN", "COMMIT")]


@contextmanager
def _debugging(seen: list[str]) -> Iterator[None]:
    with override_settings(DEBUG=True):
        connection.queries_log.clear()
        yield
        seen += [query["sql"] for query in connection.queries if query["sql"] == "COMMIT"]
        connection.queries_log.clear()


OBSERVERS: dict[str, Callable[[list[str]], Any]] = {
    "CaptureQueriesContext": _capturing,
    "DEBUG": _debugging,
    **{
        f"{owner.__module__}.{owner.__name__}.{name}": lambda seen, owner=owner, name=name: patched(
            owner, name, seen
        )
        for owner, names in {
            BaseDatabaseWrapper: ("_commit", "commit"),  # the first is Sentry's way
            PostgresDatabaseWrapper: ("_commit", "commit"),
            base.DatabaseWrapper: ("_commit", "commit", "get_autocommit", "set_autocommit"),
            driver.Connection: ("commit",),
            psycopg.Connection: ("commit",),
        }.items()
        for name in names
    },
    **{
        f"connection.{name}": lambda seen, name=name: patched_on_the_object(name, seen)
        for name in ("_commit", "commit", "get_autocommit", "set_autocommit")
    },
}


@pytest.mark.parametrize("observer", OBSERVERS)
def test_who_observes_the_ends_of_a_block_sees_them(run_once: Runner, observer: str) -> None:
    def green() -> int:
        seen: list[str] = []
        with OBSERVERS[observer](seen), transaction.atomic():
            Entry.objects.create(text="x")
        return len(seen)

    green()  # connect
    expected = green()
    assert expected > 0, "in a sync context"
    assert run_once.green(green) == expected


# --- A COMMIT that fails --------------------------------------------------------------------------


@pytest.mark.shortcut("blocks")
def test_a_commit_that_is_refused_is_rolled_back(run: Runner, in_one_step: list[str]) -> None:
    def green() -> list[Any]:
        hooks: list[str] = []
        with pytest.raises(DatabaseError, match="foreign key"), transaction.atomic():
            Book.objects.create(title="of nobody", author_id=0)  # the constraint is deferred
            transaction.on_commit(lambda: hooks.append("ran"))
        with transaction.atomic():
            Entry.objects.create(text="x")
        return [hooks, Book.objects.count(), what_is_seen()]

    expected = green()
    assert run.green(green) == expected
    assert in_one_step == ["_open_outermost", "_commit_outermost"] * 2
    assert Entry.objects.count() == 2


@pytest.mark.shortcut("blocks")
def test_a_connection_that_dies_before_the_commit_is_not_used_again(
    run: Runner, in_one_step: list[str]
) -> None:
    def green() -> int:
        with pytest.raises((OperationalError, InterfaceError)), transaction.atomic():
            Entry.objects.create(text="x")
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_backend_pid()")
                pid = cursor.fetchone()[0]
            with psycopg.connect(connection.connection.info.dsn, password=None) as other:
                other.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
        return Entry.objects.count()

    assert run.green(green) == 0
    assert in_one_step == ["_open_outermost", "_commit_outermost"]


def test_a_block_that_another_thread_ends_is_refused_as_djangos(run: Runner) -> None:
    def green() -> None:
        wrapper = connections["default"]
        with pytest.raises(DatabaseError, match="created in thread"), transaction.atomic():
            Entry.objects.create(text="x")
            inside, wrapper._thread_ident = wrapper._thread_ident, 0  # type: ignore[attr-defined]
        wrapper._thread_ident = inside  # type: ignore[attr-defined]

    run.green(green)


# --- A COMMIT without a loop to wait on, or interrupted -------------------------------------------


def leased() -> int:
    return sum(record.leased for record in pgbackend.statistics())


async def given_back() -> None:
    """Wait until no connection is held."""
    async with asyncio.timeout(5):
        while leased():
            await asyncio.sleep(0)


async def close_once(ready: asyncio.Event, coro: Any) -> None:
    """Await `coro`, green; close it at its first wait when `ready` is set."""
    await as_coroutine(
        observed(aio.portal(coro), lambda *_: "close" if ready.is_set() else None, [])
    )


def nothing() -> None:
    pass


def read() -> None:
    Entry.objects.count()


def write() -> None:
    Entry.objects.create(text="lost")


@pytest.mark.parametrize("send", [nothing, read, write])
def test_a_block_whose_coroutine_is_closed_in_it_is_never_committed(
    run: Runner, send: Callable[[], None]
) -> None:
    """The code may swallow the GeneratorExit, and so leave the block without an error."""
    ran: list[str] = []

    async def work(begun: asyncio.Event) -> None:
        with transaction.atomic():
            transaction.on_commit(lambda: ran.append("hook"))
            send()
            begun.set()
            with suppress(GeneratorExit):
                await asyncio.Event().wait()

    async def main() -> list[str]:
        begun = asyncio.Event()
        with pytest.raises(TransactionManagementError, match="where nothing can be waited for"):
            await close_once(begun, work(begun))
        assert not await aio.run(lambda: connection.in_atomic_block)
        await given_back()
        async with transaction.atomic():
            await Entry.objects.acreate(text="next")
        return [entry.text async for entry in Entry.objects.all()]

    assert run(main()) == ["next"]
    assert ran == []


def test_a_block_of_a_coroutine_that_is_being_closed_is_never_committed(run: Runner) -> None:
    ran: list[str] = []

    async def work(begun: asyncio.Event) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            with transaction.atomic():
                transaction.on_commit(lambda: ran.append("hook"))

    async def main() -> None:
        begun = asyncio.Event()
        with pytest.raises(TransactionManagementError, match="where nothing can be waited for"):
            await close_once(begun, work(begun))
        assert not await aio.run(lambda: connection.in_atomic_block)

    run(main())
    assert ran == []


@pytest.fixture
def gate() -> Iterator[Gate]:
    """Make a gate, whose statements wait until the test opens it."""
    params = connections["default"].get_connection_params()
    del params["cursor_factory"], params["context"]
    with psycopg.connect(**params, autocommit=True) as admin, closing(Gate(admin)) as made:
        yield made


class _Waiting:
    """Ends a block whose COMMIT waits for the statement of a task that was started in it."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.commits = asyncio.Event()
        self.child: asyncio.Task[None]

    async def commit(self) -> None:
        with transaction.atomic():
            self.child = asyncio.create_task(self._execute())
            await self.gate.reached()
            self.commits.set()

    async def _execute(self) -> None:
        with suppress(OperationalError), connection.cursor() as cursor:
            cursor.execute(self.gate.sql)
        with pytest.raises(TransactionManagementError, match="has ended"):
            Entry.objects.count()


async def in_a_block_of_its_own() -> None:
    assert not connection.in_atomic_block
    with transaction.atomic():
        await Entry.objects.acreate(text="next")


def test_a_commit_whose_coroutine_is_closed_ends_its_block_for_all(run: Runner, gate: Gate) -> None:
    """Tasks of the block are refused, and the connection goes back when its statement has ended."""

    async def main() -> None:
        block = _Waiting(gate)
        await close_once(block.commits, block.commit())
        gate.open()
        await block.child
        await given_back()
        await aio.portal(in_a_block_of_its_own())

    with pool_of_default(max_size=2, min_size=0, timeout=2):
        run(main())
    assert Entry.objects.count() == 1


def test_a_commit_that_is_cancelled_when_its_connection_dies_ends_its_block_for_all(
    run: Runner, gate: Gate
) -> None:
    async def commit(block: _Waiting) -> None:
        with pytest.raises(OperationalError, match="the connection is closed"):
            await block.commit()
        assert not leased()
        await in_a_block_of_its_own()

    async def main() -> None:
        block = _Waiting(gate)
        task = asyncio.create_task(aio.portal(commit(block)))
        await block.commits.wait()
        gate.admin.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_locks "
            "WHERE locktype = 'advisory' AND objid = %s AND NOT granted",
            [gate.key],
        )
        task.cancel()
        await task
        await block.child

    with pool_of_default(max_size=2, min_size=0, timeout=2):
        run(main())
    assert Entry.objects.count() == 1
