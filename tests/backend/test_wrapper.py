"""Tests Django's wrapper in green code, as other code sees it, while no connection is held."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.core.exceptions import ImproperlyConfigured
from django.core.handlers.base import BaseHandler
from django.db import DatabaseError, connection, connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.postgresql.base import DatabaseWrapper as PostgresDatabaseWrapper
from django.db.models import Func, IntegerField
from django.db.utils import ConnectionHandler
from django.test.utils import CaptureQueriesContext
from psycopg.types.string import StrDumper

import pgbackend
from pgbackend import aio
from pgbackend.base import DatabaseWrapper
from pgbackend.driver import bridge
from pgbackend.driver.coroutines import Resumed
from tests.conftest import Runner
from tests.library.models import Tag
from tests.support.processes import Program, run_all


def test_a_wrapper_that_threads_share_keeps_one_connection(run: Runner, leases: list[Any]) -> None:
    """A live server's tests pass their wrapper on, and see it closed."""

    def in_thread(wrapper: Any) -> int:
        connections["default"] = wrapper
        pid = Tag.objects.annotate(pid=Func(function="pg_backend_pid", output_field=IntegerField()))
        found = pid.values_list("pid", flat=True).get()
        wrapper.close()
        return int(found)

    def green() -> None:
        wrapper = connections["default"]
        Tag.objects.create(name="x")
        leases.clear()
        wrapper.inc_thread_sharing()
        try:
            held = wrapper.connection
            held_pid = held.info.backend_pid
            assert Tag.objects.count() == 1 and wrapper.connection is held
            loop = asyncio.get_running_loop()
            pid = bridge.await_(loop.run_in_executor(None, in_thread, wrapper))
            assert pid == held_pid
            assert wrapper.connection is None and not leases
            assert Tag.objects.count() == 1 and wrapper.connection is not None
        finally:
            wrapper.dec_thread_sharing()
        assert wrapper._own.connection is None
        assert Tag.objects.count() == 1 and wrapper.connection is None
        assert len(leases) == 2, "leased and released"

    run.green(green)


def test_a_patch_of_ensure_connection_finds_none_once_green(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each statement has a lease: the set-up of a new connection is not repeated for it."""
    seen: list[bool] = []

    def green() -> None:
        ensure_connection = connection.ensure_connection

        def patch(wrapper: Any) -> None:
            seen.append(wrapper.connection is None)
            ensure_connection()

        patches.setattr(BaseDatabaseWrapper, "ensure_connection", patch)
        with CaptureQueriesContext(connection) as queries:
            assert Tag.objects.count() == 0
        assert len(queries) == 1 and connection.connection is None
        assert seen == [True, False]
        connection.close()
        assert Tag.objects.count() == 0
        assert seen == [True, False, True], "after close() there is none again"

    with monkeypatch.context() as patches:  # undone before the tables are emptied
        run.green(green)


def test_a_patch_that_refuses_connections_refuses_each_task(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Django's test cases that name no databases refuse where no connection is open."""

    def patch(wrapper: Any) -> None:
        if wrapper.connection is None:
            raise AssertionError("refused")

    async def main() -> None:
        assert await Tag.objects.acount() == 0
        patches.setattr(BaseDatabaseWrapper, "ensure_connection", patch)
        for _ in range(2):
            with pytest.raises(AssertionError, match="refused"):
                await asyncio.create_task(Tag.objects.aget())

    with monkeypatch.context() as patches:
        run(main())


def test_a_patch_that_refuses_the_database_refuses_one_that_is_held_too(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(wrapper: Any) -> None:
        raise AssertionError("refused")

    def green() -> None:
        for within in (transaction.atomic, pgbackend.pinned):
            with within():
                assert Tag.objects.count() == 0
                with monkeypatch.context() as patches:
                    patches.setattr(BaseDatabaseWrapper, "ensure_connection", refuse)
                    with pytest.raises(AssertionError, match="refused"):
                        Tag.objects.count()
                assert Tag.objects.count() == 0

    run.green(green)


def test_what_a_wrapper_shows_for_a_connection_of_the_pool_is_open(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def patch(wrapper: Any) -> None:
        if wrapper.connection is not None and wrapper.connection.closed:
            raise AssertionError("closed")

    def green() -> None:
        patches.setattr(BaseDatabaseWrapper, "ensure_connection", patch)
        assert [Tag.objects.count() for _ in range(3)] == [0, 0, 0]

    with monkeypatch.context() as patches:
        run.green(green)


def test_code_that_unwinds_after_its_loop_leaves_the_threads_connection_alone() -> None:
    def green() -> None:
        try:
            bridge.await_(asyncio.Event().wait())
        finally:
            Tag.objects.create(name="never")

    async def begin() -> None:
        coro.send(None)

    coro = aio.run(green)
    asyncio.run(begin())
    with transaction.atomic():
        Tag.objects.create(name="sync")
        with suppress(RuntimeError, DatabaseError):
            coro.close()
        assert Tag.objects.count() == 1
    assert Tag.objects.get().name == "sync"


def test_a_coroutine_that_another_task_goes_on_with_is_that_tasks(run: Runner) -> None:
    """The first step was taken by hand: the coroutine uses the lease of the task that steps it."""

    def pids() -> list[int]:
        found = []
        for _ in range(3):
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_backend_pid()")
                found.append(cursor.fetchone()[0])
        return found

    async def go_on(coro: Any, waits_for: Any) -> Any:
        return await Resumed(coro, waits_for)

    async def main() -> None:
        async with pgbackend.pinned():
            (mine, *_) = await aio.run(pids)
            coro = aio.run(pids)
            waits_for = coro.send(None)
            theirs = await asyncio.create_task(go_on(coro, waits_for))
            assert theirs[0] == mine, "its first statement was sent here"
            assert mine not in theirs[1:]

    run(main())


def test_without_databases_green_code_hears_what_is_missing(run: Runner) -> None:
    nothing = ConnectionHandler({})
    with pytest.raises(ImproperlyConfigured, match="supply the ENGINE value"):
        run.green(nothing["default"].cursor)


def test_a_method_that_is_adapted_green_knows_its_object(run: Runner) -> None:
    """Django names the class of a middleware whose method returned nothing."""

    class Middleware:
        async def process(self) -> str:
            return "done"

    middleware = Middleware()
    adapted = async_to_sync(middleware.process)
    assert adapted.__self__ is middleware
    assert run.green(adapted) == "done"
    handler = BaseHandler()
    for is_async, method in ((False, middleware.process), (True, connection.cursor)):
        assert handler.adapt_method_mode(is_async, method).__self__ is method.__self__


class Point:
    """Needs a dumper on its connection, to be sent."""


class PointDumper(StrDumper):
    def dump(self, obj: Any) -> bytes:
        return b"(1,2)"


class Derived(DatabaseWrapper):
    """Registers a dumper on each new connection, as the backend for PostGIS does."""

    def get_new_connection(self, conn_params: dict[str, Any]) -> Any:
        connection = super().get_new_connection(conn_params)
        assert conn_params["dbname"] == self.settings_dict["NAME"]
        connection.adapters.register_dumper(Point, PointDumper)
        return connection


def test_a_derived_wrapper_is_given_each_connection_of_the_pool(run: Runner) -> None:
    async def main() -> None:
        wrapper = Derived(connections.settings["default"], "default")

        def ask() -> Any:
            with wrapper.cursor() as cursor:
                cursor.execute("SELECT %s::text", [Point()])  # raw: the session is reset after it
                return cursor.fetchone()

        for _ in range(2):
            assert await asyncio.gather(*(aio.run(ask) for _ in range(3))) == [("(1,2)",)] * 3

    run(main())


def test_values_are_quoted_as_the_connection_knows_them(run: Runner) -> None:
    """This holds also before a schema editor's first statement, when no connection is held."""

    def green() -> None:
        wrapper = Derived(connections.settings["default"], "default")
        with wrapper.schema_editor() as editor:
            assert editor.quote_value(Point()) == "'(1,2)'"
            assert editor.quote_value(Point()) == "'(1,2)'", "inside the transaction"
        assert editor.quote_value(Point()) == "'(1,2)'"
        assert wrapper.connection is None

    run.green(green)


def test_a_reset_asks_for_no_parameters(run: Runner) -> None:
    """A derived wrapper may fetch a token in this method: for each connection, and then no more."""
    asked: list[str] = []
    made: list[int] = []

    class Asking(Derived):
        def get_connection_params(self) -> dict[str, Any]:
            asked.append(self.alias)
            return super().get_connection_params()

    def green() -> None:
        wrapper = Asking(connections.settings["default"], "default")
        for _ in range(5):
            with wrapper.cursor() as cursor:
                cursor.execute("SELECT 1")
        made.append(pgbackend.statistics()[0].connections_made)

    run.green(green)
    assert [len(asked)] == made


def test_a_wrapper_cannot_connect_for_threads_on_the_bare_loop(run: Runner) -> None:
    async def main() -> None:
        wrapper = connections["default"]
        wrapper.inc_thread_sharing()
        wrapper.dec_thread_sharing()
        assert await Tag.objects.acount() == 0

    run(main())


def test_a_new_wrapper_has_what_djangos_is_made_with() -> None:
    """No attribute is set on our wrapper while it is made; see `descriptors.state_attribute()`."""
    djangos = PostgresDatabaseWrapper(connections.settings["default"], "default")
    ours = DatabaseWrapper(connections.settings["default"], "default")
    for part in (ours._own, ours._own_scope):
        for name in set(part.NAMES) & vars(djangos).keys():
            assert getattr(part, name) == getattr(djangos, name), name
    assert ours.queries_log.maxlen == djangos.queries_log.maxlen


@pytest.mark.slow
def test_who_has_patched_a_class_before_the_backend_was_loaded_is_asked(conninfo: str) -> None:
    """Sentry patches from within the settings."""
    patched = [
        (owner, name)
        for owner, names in {
            "django.db.backends.postgresql.base:DatabaseWrapper": (
                *("_commit", "commit", "rollback", "savepoint", "savepoint_commit"),
                *("savepoint_rollback", "cursor", "create_cursor", "ensure_connection"),
                "validate_no_broken_transaction",
            ),
            "django.db.backends.utils:CursorWrapper": ("execute", "_execute_with_wrappers"),
            "django.db.models.sql.compiler:SQLCompiler": ("execute_sql",),
            "psycopg:Connection": ("commit", "rollback"),
            "psycopg:Cursor": ("execute",),
        }.items()
        for name in names
    ]
    environment = {"DATABASE_URL": conninfo}
    finished = run_all(Program([EARLY, *each], environment=environment) for each in patched)
    seen = {each: json.loads(one.check()) for each, one in zip(patched, finished, strict=True)}
    assert all(in_sync > 0 and green > 0 for in_sync, green in seen.values()), seen


EARLY = "tests/support/early.py"
