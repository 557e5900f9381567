"""Compares `atomic` blocks with a shortcut and without it: statements, hooks, errors, flags, turns.

The shortcuts that are compared work on the beginning or end of a transaction, or on the statements
in it. The flags are the names of the wrapper that Django sets in a block.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from django.db import DatabaseError, connection, transaction
from django.test import override_settings
from django.test.utils import CaptureQueriesContext

import pgbackend
from tests.conftest import Runner
from tests.library.models import Book, Entry, Tag
from tests.support.both_ways import Wire, compare, error_of, told_error
from tests.support.expressions import OwnSQL
from tests.support.fixtures import pool_of_default

from .test_blocks import what_is_seen
from .test_comparisons import BY_ANOTHER_MESSAGE, empty, named, settled

Seen = list[Any]


#: Django 6.1 has renamed it.
_savepoint: Any = getattr(transaction, "savepoint_create", None) or transaction.savepoint


class Stop(Exception):
    pass


def see(seen: Seen, what: str) -> None:
    """Record the flags of the connection, and the number of its blocks and hooks."""
    flags = what_is_seen()
    counted = {name: len(flags.pop(name)) for name in ("atomic_blocks", "run_on_commit")}
    seen.append((what, flags.pop("savepoint_ids") and "in a savepoint", counted, flags))


# --- What is done in blocks -----------------------------------------------------------------------


def one_block(seen: Seen) -> None:
    see(seen, "before")
    with transaction.atomic():
        see(seen, "inside")
        Entry.objects.create(text="x")
        transaction.on_commit(lambda: see(seen, "hook"))
        see(seen, "hooked")
    see(seen, "after")


def without_a_statement(seen: Seen) -> None:
    with transaction.atomic():
        transaction.on_commit(lambda: see(seen, "hook"))
    with transaction.atomic(), transaction.atomic():
        see(seen, "inside")


def nested(seen: Seen) -> None:
    with transaction.atomic():
        transaction.on_commit(lambda: seen.append("outer"))
        with transaction.atomic():
            Entry.objects.create(text="1")
            transaction.on_commit(lambda: seen.append("inner"))
        with pytest.raises(Stop), transaction.atomic():
            Entry.objects.create(text="2")
            transaction.on_commit(lambda: seen.append("never"))
            see(seen, "inner")
            raise Stop
        with transaction.atomic(savepoint=False):
            Entry.objects.create(text="3")
        see(seen, "outer")


def rolled_back(seen: Seen) -> None:
    with pytest.raises(Stop), transaction.atomic():
        Entry.objects.create(text="1")
        transaction.on_commit(lambda: seen.append("never"))
        raise Stop
    with transaction.atomic():
        Entry.objects.create(text="2")
        transaction.set_rollback(True)
        see(seen, "to be rolled back")
    with pytest.raises(Stop), transaction.atomic(), transaction.atomic(savepoint=False):
        Entry.objects.create(text="3")
        raise Stop
    with transaction.atomic():
        seen.append(error_of(lambda: Entry.objects.create(text=None)))
        seen.append(error_of(Entry.objects.count))
        see(seen, "broken")
    see(seen, "after")


def by_hand(seen: Seen) -> None:
    with transaction.atomic():
        sid = _savepoint()
        Entry.objects.create(text="1")
        transaction.savepoint_rollback(sid)
        transaction.savepoint_commit(_savepoint())
        transaction.clean_savepoints()
        seen += [error_of(transaction.commit), error_of(transaction.rollback)]
        seen.append(error_of(lambda: transaction.set_autocommit(False)))
        see(seen, "inside")
    transaction.set_autocommit(False)
    with transaction.atomic():
        Entry.objects.create(text="2")
        see(seen, "inside")
    transaction.rollback()
    with transaction.atomic():
        Entry.objects.create(text="3")
    transaction.commit()
    transaction.set_autocommit(True)
    see(seen, "after")


def refused_commit(seen: Seen) -> None:
    def block() -> None:
        with transaction.atomic():
            Book.objects.create(title="of nobody", author_id=0)  # the constraint is deferred
            transaction.on_commit(lambda: seen.append("never"))

    seen.append(error_of(block))
    see(seen, "after")


def hooks(seen: Seen) -> None:
    def fail() -> None:
        raise Stop("in a hook")

    def again() -> None:
        seen.append("again")
        transaction.on_commit(lambda: seen.append("at once"))
        with transaction.atomic():
            Entry.objects.create(text="of a hook")
            transaction.on_commit(lambda: see(seen, "hook of a hook"))

    def block() -> None:
        with transaction.atomic():
            Entry.objects.create(text="x")
            transaction.on_commit(again)
            transaction.on_commit(fail, robust=True)
            transaction.on_commit(fail)
            transaction.on_commit(lambda: seen.append("never"))

    seen.append(error_of(block))
    see(seen, "after")
    connection.run_on_commit.clear()


def misused(seen: Seen) -> None:
    def durable() -> None:
        with transaction.atomic(), transaction.atomic(durable=True):
            seen.append("never")

    def closed() -> None:
        with transaction.atomic():
            Entry.objects.create(text="lost")
            connection.close()
            see(seen, "closed")
            Entry.objects.count()

    def closed_at_the_end() -> None:
        with transaction.atomic():
            Entry.objects.create(text="lost")
            connection.close()

    def twice() -> None:
        atomic = transaction.atomic()
        with atomic, atomic:
            Entry.objects.create(text="twice")

    for each in (durable, closed, closed_at_the_end, twice):
        seen.append(error_of(each))
        see(seen, each.__name__)


def first_statements(seen: Seen) -> None:
    """Let transactions begin with statements of many kinds."""
    for sql, params in (
        ("SELECT 1", None), ("SELECT %s", ["%s"]), ("SELECT 1; SELECT 2", None), ("", None),
        ("-- nothing", None), ("SET LOCAL work_mem = '1MB'", None), ("VACUUM", None),
        ("SELECT count(*) FROM library_tag WHERE name = %s", ["'; ROLLBACK; --"]),
        ("SAVEPOINT s", None), ("SELEC 1", None), ("SELECT 1 / 0", None), ("COMMIT", None),
        ("SELECT 1; SELEC 2", None), ("SELECT 1; SELECT 1 / 0", None), ("SELECT %s", [object]),
        ("SHOW transaction_isolation", None), ("SELECT %s", []), ("SELECT 1", [1]),
    ):  # fmt: skip

        def run(sql: Any = sql, params: Any = params) -> Any:
            with connection.cursor() as cursor:
                cursor.execute(sql, params)
                rows = cursor.fetchall() if cursor.description else None
                return rows, cursor.rowcount, cursor.statusmessage, cursor.nextset()

        def block(run: Callable[[], Any] = run, params: Any = params) -> Any:
            with transaction.atomic():
                seen.append(error_of(run))
                if params not in ([object], [], [1]):  # nothing is sent: with `begin`, not BEGIN
                    seen.append(connection.connection.info.transaction_status)
                transaction.set_rollback(True)

        seen.append(error_of(block))


def decorated(seen: Seen) -> None:
    @transaction.atomic
    def work(fail: bool) -> str:
        Tag.objects.create(name="once")
        see(seen, "inside")
        if fail:
            raise Stop
        return "returned"

    seen += [error_of(lambda: work(True)), error_of(lambda: work(False))]
    seen.append(error_of(lambda: work(False)))


def logged(seen: Seen) -> None:
    def block() -> None:
        with transaction.atomic():
            Tag.objects.create(name="a")
            with transaction.atomic():
                Tag.objects.count()
            transaction.set_rollback(True)
        with transaction.atomic():
            Tag.objects.count()

    with CaptureQueriesContext(connection) as captured:
        block()
    with override_settings(DEBUG=True):
        connection.queries_log.clear()
        block()
        logs = [[*captured.captured_queries], connection.queries]
        connection.queries_log.clear()
    seen += [[re.sub(r"s\d+_x\d+", "s", each["sql"]) for each in log] for log in logs]


BLOCKS: tuple[Callable[[Seen], None], ...] = (
    one_block, without_a_statement, nested, rolled_back, by_hand, refused_commit, hooks, misused,
    decorated, logged,
)  # fmt: skip


def all_blocks() -> Seen:
    seen: Seen = []
    for work in BLOCKS:
        seen.append(work.__name__)
        work(seen)
        seen.append([*Entry.objects.order_by("pk").values_list("text", flat=True)])
        Entry.objects.all().delete()
        Tag.objects.all().delete()
    return seen


def all_first_statements() -> Seen:
    seen: Seen = []
    first_statements(seen)
    return seen


@pytest.mark.sweep(one_in=3)
@pytest.mark.parametrize(
    ("name", "work"),
    [
        pytest.param(name, work, id=f"{name}-{work.__name__}", marks=named(name).marks)
        for work, names in {
            all_blocks: ["blocks", "begin", "statements", "run", "all"],
            all_first_statements: ["blocks", "begin", "all"],
        }.items()
        for name in names
    ],
)
def test_blocks_send_the_same_statements_and_end_alike(
    run_once: Runner, leases: list[Any], name: str, work: Callable[[], Seen]
) -> None:
    def green() -> Any:
        empty()
        connection.close()
        leases.clear()
        with Wire() as wire:
            seen = run_once.green(settled, work)
            sent = wire.statements() if name in BY_ANOTHER_MESSAGE else wire.messages()
        return (
            seen,
            sent,
            [(type(each), each.pool, getattr(each, "discarded", "")) for each in leases],
        )

    with pool_of_default(max_size=1):
        compare(name, green)


# --- Tasks that share a transaction, or wait for one another --------------------------------------


async def child_tasks(seen: Seen) -> None:
    """Let child tasks work in a block of their parent: they open blocks, and fail."""

    async def insert(n: int) -> None:
        async with transaction.atomic():
            await Entry.objects.acreate(text=str(n))
            transaction.on_commit(lambda: seen.append(f"hook {n}"))
            if n == 1:
                raise Stop
        seen.append(f"inserted {n}")

    async with transaction.atomic():
        await Entry.objects.acount()
        ended = await asyncio.gather(*map(insert, range(4)), return_exceptions=True)
        seen.append([*map(type, ended)])
        see(seen, "inside")
    seen.append(
        [text async for text in Entry.objects.order_by("pk").values_list("text", flat=True)]
    )


async def rivals(seen: Seen) -> None:
    """Let tasks wait for the only connection, each with a transaction of its own."""

    async def rival(n: int) -> None:
        async with transaction.atomic():
            transaction.on_commit(lambda: seen.append(f"hook {n}"))
            seen.append((n, await Entry.objects.acount()))
            await Entry.objects.acreate(text=str(n))
            if n == 2:
                transaction.set_rollback(True)

    await asyncio.gather(*(asyncio.create_task(rival(n)) for n in range(5)))


async def cancelled(seen: Seen) -> None:
    """Cancel a task in a statement of its block."""
    begun = asyncio.Event()

    async def sleeper() -> None:
        async with transaction.atomic():
            await Entry.objects.acreate(text="lost")
            begun.set()
            await Entry.objects.annotate(slept=OwnSQL("pg_sleep(30)", ())).afirst()

    task = asyncio.create_task(sleeper())
    await begun.wait()
    await asyncio.sleep(0.01)  # usually it waits for the server then; if not, the same is seen
    task.cancel()
    ended = (await asyncio.gather(task, return_exceptions=True))[0]
    seen += [type(ended), task.cancelled(), await Entry.objects.acount()]


async def doomed(seen: Seen) -> None:
    """Leave a block while a child task still works in it."""

    async def child(begun: asyncio.Event, go: asyncio.Event) -> None:
        await Entry.objects.acreate(text="x")
        begun.set()
        await go.wait()
        await Entry.objects.acount()

    for fails in (False, True):
        begun, go = asyncio.Event(), asyncio.Event()
        try:
            async with transaction.atomic():
                task = asyncio.create_task(child(begun, go))
                await begun.wait()
                if fails:
                    raise Stop
        except Stop:
            seen.append("stopped")
        go.set()
        seen.append(told_error((await asyncio.gather(task, return_exceptions=True))[0]))
    seen.append(await Entry.objects.acount())


async def detached(seen: Seen) -> None:
    async with transaction.atomic():
        await Entry.objects.acount()
        try:
            with pgbackend.detached():
                await Entry.objects.acreate(text="outside")
        except DatabaseError as exc:
            seen.append(told_error(exc))
        see(seen, "inside")


TASKS: tuple[Callable[[Seen], Awaitable[None]], ...] = (
    child_tasks, rivals, cancelled, doomed, detached,
)  # fmt: skip
SHORTCUTS_OF_TASKS = ("blocks", "begin", "statements", "run", "queue", "lease", "portals", "all")


@pytest.mark.parametrize("name", [named(each) for each in SHORTCUTS_OF_TASKS])
def test_tasks_that_share_a_connection_end_alike(
    run_once: Runner, leases: list[Any], name: str
) -> None:
    async def main() -> Seen:
        seen: Seen = []
        for work in TASKS:
            seen.append(work.__name__)
            await pgbackend.aio.portal(work(seen))  # type: ignore[arg-type]  # a coroutine
            await Entry.objects.all().adelete()
        numbers = pgbackend.statistics()[0]
        seen.append([numbers.requests, numbers.requests_errors, numbers.connections_made])
        return seen

    def once() -> Any:
        empty()
        connection.close()
        leases.clear()
        with Wire() as wire:
            seen = run_once(main())
            return seen, wire.statements(), [(type(each), each.pool) for each in leases]

    with pool_of_default(max_size=1):
        compare(name, once)
