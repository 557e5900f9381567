"""Tests C13: tools see the statements of async code as they see those of sync code.

Each tool is its real package, in a process of its own (`project/watch.py`), since tools rebind the
functions that they watch.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.db import DatabaseError, connection, connections, reset_queries, transaction
from django.db.backends.postgresql.psycopg_any import get_adapters_template
from django.db.backends.utils import CursorDebugWrapper, CursorWrapper
from django.db.models.expressions import RawSQL
from django.test.utils import CaptureQueriesContext, override_settings
from psycopg import IsolationLevel
from psycopg.types.numeric import IntLoader

import pgbackend
import pgbackend.metrics
from pgbackend import aio
from tests.conftest import Runner
from tests.library.models import Author, Tag
from tests.support.fixtures import pool_of_default, settings_of_default
from tests.support.processes import Finished, Program, run_all

PROJECT = Path(__file__).parent / "project"
TOOLS = ["sentry", "opentelemetry", "toolbar", "silk"]


@pytest.fixture(scope="module")
def watched(conninfo: str) -> Iterator[dict[str, Finished]]:
    """Run each tool, all at once; return their outputs."""
    programs = [
        Program(["watch.py", tool], PROJECT, {"SHOP_DATABASE": f"watched_by_{tool}"})
        for tool in TOOLS
    ]
    yield dict(zip(TOOLS, run_all(programs), strict=True))


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_sees_the_statements_of_async_views(watched: dict[str, Finished], tool: str) -> None:
    seen = json.loads(watched[tool].check())
    join, count = seen["async"]
    assert 'FROM "shop_sale" INNER JOIN "shop_product"' in join
    assert count.startswith("SELECT COUNT(*)")
    assert sorted(seen["together"]) == sorted([join, count] * 3), "three requests at once"
    assert seen["sync"] == [count]
    assert seen["wsgi"] == [join, count], "an async view, under WSGI"


def test_sentry_sees_the_commit_of_an_async_view(watched: dict[str, Finished]) -> None:
    """Sentry's option `db_transaction_spans` is on."""
    seen = json.loads(watched["sentry"].check())["block"]
    assert [statement.split()[0] for statement in seen] == ["SELECT", "UPDATE", "INSERT", "COMMIT"]


# --- Django's own ---------------------------------------------------------------------------------


@override_settings(DEBUG=True)
def test_connection_queries_are_those_of_the_task(run: Runner) -> None:
    async def one(name: str) -> list[str]:
        reset_queries()
        await Tag.objects.acreate(name=name)
        await Tag.objects.aget(name=name)
        return [query["sql"] for query in connection.queries]

    async def main() -> None:
        await Tag.objects.acount()  # from here on the tasks share one wrapper
        names = [f"tag {number}" for number in range(5)]
        logs = await asyncio.gather(*(aio.portal(one(name)) for name in names))
        for name, (insert, select) in zip(names, logs, strict=True):
            assert insert.startswith("INSERT") and f"'{name}'" in insert
            assert select.startswith("SELECT") and f"'{name}'" in select

    run(main())


def test_captured_queries_are_those_of_the_block_and_of_its_tasks(run: Runner) -> None:
    async def stranger(begun: asyncio.Event, done: asyncio.Event) -> None:
        await begun.wait()
        await Tag.objects.acount()
        done.set()

    async def main() -> None:
        await Tag.objects.acount()  # from here on the tasks share one wrapper
        begun, done = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(stranger(begun, done))
        with CaptureQueriesContext(connection) as captured:
            begun.set()
            await done.wait()
            await asyncio.gather(Author.objects.acount(), Author.objects.acount())
        await Tag.objects.acount()
        await task
        assert [query["sql"] for query in captured] == [
            'SELECT COUNT(*) AS "__count" FROM "library_author"'
        ] * 2

    run(main())


def test_begin_and_commit_are_logged_as_in_sync_code(run: Runner) -> None:
    def block() -> list[str]:
        with CaptureQueriesContext(connection) as captured:
            with transaction.atomic():
                Tag.objects.count()
                with transaction.atomic():
                    Tag.objects.count()
        return [query["sql"].split('"')[0].split(maxsplit=1)[0] for query in captured]

    async def main() -> list[str]:
        return await aio.run(block)

    assert run(main()) == block()


def test_execute_wrappers_see_every_statement(run: Runner) -> None:
    seen: list[tuple[str, bool]] = []

    def wrapper(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        seen.append((sql.split(maxsplit=1)[0], context["connection"].vendor == "postgresql"))
        return execute(sql, params, many, context)

    def work() -> None:
        Tag.objects.create(name="a")
        with connection.cursor() as cursor:
            cursor.execute("TABLE library_tag")
            cursor.executemany("INSERT INTO library_tag (name) VALUES (%s)", [["b"], ["c"]])
        assert len(list(Tag.objects.iterator(chunk_size=1))) == 3

    async def main() -> None:
        with connection.execute_wrapper(wrapper):
            await aio.run(work)
        await Tag.objects.acount()

    run(main())
    assert seen == [(word, True) for word in ("INSERT", "TABLE", "INSERT", "SELECT")]


def test_patched_cursor_wrappers_see_every_statement(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    for cls in (CursorWrapper, CursorDebugWrapper):
        execute = cls.execute

        def patched(self: Any, sql: str, params: Any = None, execute: Any = execute) -> Any:
            seen.append(type(self).__name__)
            return execute(self, sql, params)

        monkeypatch.setattr(cls, "execute", patched)

    async def main() -> None:
        await Tag.objects.acount()
        with CaptureQueriesContext(connection):
            await Tag.objects.acount()

    run(main())
    # The wrapper of the second statement calls its base class, which is patched as well.
    assert seen == ["CursorWrapper", "CursorDebugWrapper", "CursorDebugWrapper"]


@override_settings(DEBUG=True)
def test_statements_are_logged_to_djangos_logger(
    run: Runner, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with transaction.atomic():
            await Tag.objects.acreate(name="a")

    with caplog.at_level(logging.DEBUG, "django.db.backends"):
        run(main())
    logged = [record for record in caplog.records if record.name == "django.db.backends"]
    assert [record.sql.split()[0] for record in logged] == ["BEGIN", "INSERT", "COMMIT"]
    assert all(record.duration >= 0 and record.alias == "default" for record in logged)


def test_a_block_without_statements_is_logged_with_both_its_ends(
    run: Runner, leases: list[Any]
) -> None:
    async def main() -> None:
        connection.force_debug_cursor = True
        async with transaction.atomic():
            pass
        with pytest.raises(KeyError):
            async with transaction.atomic():
                raise KeyError
        logged = [query["sql"] for query in connection.queries]
        assert logged == ["BEGIN", "COMMIT", "BEGIN", "ROLLBACK"]

    run(main())
    assert not leases, "nothing is sent for it"


def test_who_asks_whether_the_connection_is_usable_hears_of_the_database(run: Runner) -> None:
    """A health check asks, or a worker between two jobs: green code holds no connection then."""

    def green() -> list[bool]:
        Tag.objects.count()
        found = [connection.is_usable()]
        with transaction.atomic():
            return [*found, connection.is_usable()]

    assert run.green(green) == [True, True]
    with settings_of_default(NAME="nowhere"):
        assert run.green(connection.is_usable) is False


def test_what_is_asked_about_the_server_leaves_a_transaction_whole(run: Runner) -> None:
    def green() -> None:
        vars(connections["default"]).pop("pg_version", None)  # Django caches it
        with transaction.atomic():
            assert connection.pg_version > 0
            Tag.objects.create(name="kept")
        assert connection.isolation_level is IsolationLevel.READ_COMMITTED
        assert Tag.objects.count() == 1

    run.green(green)


def test_adapters_that_a_project_registers_reach_the_next_lease(run: Runner) -> None:
    class Doubling(IntLoader):
        def load(self, data: Any) -> int:
            return 2 * super().load(data)

    def one() -> Any:
        return Tag.objects.annotate(n=RawSQL("1", ())).values_list("n", flat=True).get()

    def green() -> None:
        assert one() == 1
        get_adapters_template(True, connection.timezone).register_loader("int4", Doubling)
        assert one() == 2

    Tag.objects.create(name="x")
    try:
        run.green(green)
    finally:
        get_adapters_template.cache_clear()
        connection.close()
        connection.close_pool()


# --- Settings of sync code's connection, seen by the async code that it waits for -----------------
#
# Under WSGI, async views and middleware, and async receivers of signals, are called so.


async def count_thrice() -> None:
    """Send three statements, in the running task and in others."""
    await Tag.objects.acount()
    await asyncio.gather(Tag.objects.acount(), aio.run(Tag.objects.count))


@pytest.mark.django_db(transaction=True)
class TestAsyncCodeBelowAsyncToSync:
    def test_captured_queries(self) -> None:
        with CaptureQueriesContext(connection) as captured:
            async_to_sync(count_thrice)()
        assert len(captured) == 3

    @override_settings(DEBUG=True)
    def test_the_log_of_queries(self) -> None:
        reset_queries()
        Tag.objects.count()
        async_to_sync(count_thrice)()
        assert len(connection.queries) == 4

    def test_an_execute_wrapper(self) -> None:
        seen: list[str] = []

        def wrapper(execute: Any, sql: str, *args: Any) -> Any:
            seen.append(sql)
            return execute(sql, *args)

        with connection.execute_wrapper(wrapper):
            async_to_sync(count_thrice)()
        async_to_sync(count_thrice)()
        assert len(seen) == 3

    def test_an_execute_wrapper_that_is_put_on_the_list(self) -> None:
        """Some tools append to the list, and do not call `execute_wrapper()`."""
        seen: list[str] = []

        def wrapper(execute: Any, sql: str, *args: Any) -> Any:
            seen.append(sql)
            return execute(sql, *args)

        connection.execute_wrappers.append(wrapper)
        try:  # in a context that knows of no observer before
            contextvars.Context().run(async_to_sync(count_thrice))
        finally:
            connection.execute_wrappers.remove(wrapper)
        assert len(seen) == 3

    def test_a_patched_method(self) -> None:
        seen: list[Any] = []
        cursor = connection.cursor

        def patched() -> Any:
            seen.append(connections["default"])
            return cursor()

        connection.cursor = patched
        try:
            async_to_sync(count_thrice)()
        finally:
            del connection.cursor
        async_to_sync(count_thrice)()
        assert seen == [connections["default"]] * 3

    def test_an_attribute_also_below_threads(self) -> None:
        def tenant() -> str | None:
            return getattr(connection, "tenant", None)

        async def inside() -> list[str | None]:
            in_thread, nested = sync_to_async(tenant), sync_to_async(async_to_sync(inner))
            return [tenant(), await aio.run(tenant), await in_thread(), await nested()]

        async def inner() -> str | None:
            return tenant()

        connection.tenant = "one"
        try:
            assert async_to_sync(inside)() == ["one"] * 4
        finally:
            del connection.tenant
        assert async_to_sync(inside)() == [None] * 4

    def test_its_tasks_have_sessions_and_transactions_of_their_own(self) -> None:
        """A task sees neither the thread's session nor a sibling's uncommitted rows."""

        async def write(begun: asyncio.Event, over: asyncio.Event) -> None:
            async with transaction.atomic():
                await Tag.objects.acreate(name="of a task")
                begun.set()
                await over.wait()

        async def inside() -> tuple[int, bool]:
            begun, over = asyncio.Event(), asyncio.Event()
            writing = asyncio.create_task(write(begun, over))
            await begun.wait()
            seen = await Tag.objects.acount(), await aio.run(lambda: connection.in_atomic_block)
            over.set()
            await writing
            return seen

        Tag.objects.count()  # open the thread's connection
        assert async_to_sync(inside)() == (0, False)
        assert Tag.objects.count() == 1

    def test_it_takes_part_in_the_transaction_of_the_thread_or_steps_out_of_it(self) -> None:
        async def inside() -> list[int]:
            counts = [await Tag.objects.acount()]
            with pgbackend.detached():
                counts.append(await Tag.objects.acount())
                with CaptureQueriesContext(connection):  # Django then does the block's steps
                    async with transaction.atomic():
                        await Tag.objects.acreate(name="kept")
            return counts

        with transaction.atomic():
            Tag.objects.create(name="of the thread")
            assert async_to_sync(inside)() == [1, 0]
            transaction.set_rollback(True)
        assert Tag.objects.get().name == "kept"

    def test_it_does_not_close_the_connection_of_the_thread(self) -> None:
        Tag.objects.count()
        kept = connection.connection
        async_to_sync(aio.as_async(connection.close))()
        assert connection.connection is kept and not kept.closed

    def test_the_wrapper_is_for_its_thread_only_again(self) -> None:
        async def inside() -> Any:
            return connections["default"]

        mine = async_to_sync(inside)()
        assert mine is connections["default"] and not mine.allow_thread_sharing
        with ThreadPoolExecutor(1) as other, pytest.raises(DatabaseError, match="thread"):
            other.submit(mine.validate_thread_sharing).result()

    def test_where_sync_code_is_let_onto_the_loop_it_blocks_there_as_in_django(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def inside() -> int:
            return Tag.objects.count()

        monkeypatch.setenv("DJANGO_ALLOW_ASYNC_UNSAFE", "1")
        Tag.objects.create(name="committed")
        with CaptureQueriesContext(connection) as captured:
            assert async_to_sync(inside)() == 1
        assert len(captured) == 1

    def test_a_loop_that_nobody_waits_for_has_its_own(self) -> None:
        async def inside() -> Any:
            return connections["default"]

        assert asyncio.run(inside()) is not connections["default"]
        below = sync_to_async(lambda: asyncio.run(inside()), thread_sensitive=False)
        assert async_to_sync(below)() is not connections["default"], "a thread's of its own"

    def test_a_thread_that_had_no_connection_has_none_afterwards(self) -> None:
        """The loop's pool has served the statements."""

        def in_thread() -> Any:
            async_to_sync(count_thrice)()
            return connection.connection

        with ThreadPoolExecutor(1) as other:
            assert other.submit(in_thread).result() is None


# --- pgbackend's own ------------------------------------------------------------------------------


def test_hooks_hear_of_every_lease_and_release(run: Runner, leases: list[Any]) -> None:
    async def main() -> None:
        await Tag.objects.acount()
        async with transaction.atomic():
            await Tag.objects.acount()
            await Tag.objects.acount()

    run(main())
    leased, released = pgbackend.metrics.Leased, pgbackend.metrics.Released
    assert [type(event) for event in leases] == [leased, released] * 2
    assert {event.pool for event in leases} == {"default"}
    assert all(event.backend_pid > 0 for event in leases)
    assert all(event.waited >= 0 for event in leases[::2])
    assert all(event.held >= 0 and not event.discarded for event in leases[1::2])


def test_statistics_tell_of_every_pool(run: Runner) -> None:
    async def main() -> None:
        await asyncio.gather(*(Tag.objects.acount() for _ in range(20)))
        (statistics,) = pgbackend.statistics("default")
        assert (statistics.alias, statistics.max_size) == ("default", 3)
        assert 1 <= statistics.idle <= statistics.size <= 3
        assert (statistics.leased, statistics.waiting) == (0, 0)
        assert statistics.requests == 20
        assert statistics.connections_made >= statistics.size
        async with pgbackend.pinned():
            await Tag.objects.acount()
            assert pgbackend.statistics()[0].leased == 1

    with pool_of_default(max_size=3):
        run(main())
    assert pgbackend.statistics() == []
