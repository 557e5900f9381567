"""Tests attributes that a derived wrapper sets on itself, or that others set on it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

from asgiref.sync import ThreadSensitiveContext, async_to_sync, sync_to_async
from django.db import connections, transaction

import pgbackend
from pgbackend import aio
from pgbackend.base import DatabaseWrapper
from tests.conftest import Runner


class Tenants(DatabaseWrapper):
    """Sets the tenant's schema in `_cursor()`, as packages do; `halt` pauses a statement there."""

    halt: Any = None

    def __init__(self, *args: Any) -> None:
        self.tenant = "public"
        super().__init__(*args)

    def _cursor(self, name: str | None = None) -> Any:
        cursor = super()._cursor(name)
        halt, Tenants.halt = Tenants.halt, None
        if halt is not None:
            async_to_sync(halt)()
        self.is_set = self.tenant
        return cursor


def test_what_is_set_while_another_tasks_cursor_is_made_stays_with_the_task(run: Runner) -> None:
    """The second task sets its tenant while the first task's `_cursor()` is still running."""

    async def main() -> None:
        connections["default"] = connection = Tenants(connections.settings["default"], "default")
        inside, go_on = asyncio.Event(), asyncio.Event()

        async def halt() -> None:
            inside.set()
            await go_on.wait()

        def query() -> None:
            with connections["default"].cursor() as cursor:
                cursor.execute("SELECT 1")

        async def first() -> list[str]:
            connection.tenant = "first"
            Tenants.halt = halt
            seen = [connection.tenant]
            await aio.run(query)
            return [*seen, connection.tenant]

        async def second() -> list[str]:
            await inside.wait()
            connection.tenant = "second"
            seen = [connection.tenant]
            await aio.run(query)
            seen.append(connection.tenant)
            go_on.set()
            return seen

        seen = await asyncio.gather(first(), second())
        assert seen == [["first"] * 2, ["second"] * 2]
        assert connection.tenant == "public"
        assert not connection._noted

    run(main())


class SetsOnce(DatabaseWrapper):
    """Sets something in each new session, and notes on itself that it has."""

    #: The sessions in which the value was set.
    sessions: list[int] = []
    actor = "nobody"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.is_set = False

    def greeting(self) -> str:
        return "hello"

    def _cursor(self, name: str | None = None) -> Any:
        cursor = super()._cursor(name)
        if not self.is_set:
            SetsOnce.sessions.append(self.connection.info.backend_pid)
            self.is_set = True
        return cursor


def _query() -> None:
    with connections["default"].cursor() as cursor:
        cursor.execute("SELECT 1")


def test_what_it_notes_of_a_connection_is_in_force_on_that_one_only(run: Runner) -> None:
    async def main() -> None:
        SetsOnce.sessions.clear()
        connections["default"] = connection = SetsOnce(connections.settings["default"], "default")

        def statements() -> None:
            _query()
            assert connection.is_set is False, "the lease has ended with the cursor"
            _query()
            assert len(SetsOnce.sessions) == 2, "it was set for each lease"
            with transaction.atomic():
                _query()
                assert connection.is_set is True
                _query()
            assert len(SetsOnce.sessions) == 3, "and once in a transaction"
            assert connection.is_set is False

        await aio.run(statements)
        async with transaction.atomic():
            await aio.run(_query)
            assert connection.is_set is True
            outside = asyncio.create_task(pgbackend.detached(aio.run(_query)))
            await outside
        assert len(SetsOnce.sessions) == 5
        assert len(set(SetsOnce.sessions[-2:])) == 2, "in the session of each"

    run(main())


def test_the_connection_of_a_thread_and_those_of_the_loop_are_told_apart(run: Runner) -> None:
    def in_the_thread() -> bool:
        if not isinstance(connections["default"], SetsOnce):
            connections["default"] = SetsOnce(connections.settings["default"], "default")
        _query()
        _query()
        return connections["default"].is_set

    async def main() -> None:
        SetsOnce.sessions.clear()
        connections["default"] = connection = SetsOnce(connections.settings["default"], "default")
        async with ThreadSensitiveContext():
            try:
                assert await sync_to_async(in_the_thread)() is True
                assert len(SetsOnce.sessions) == 1, "it is kept, as the connection is"
                assert connection.is_set is False
                await aio.run(_query)
                assert len(SetsOnce.sessions) == 2
            finally:
                await sync_to_async(connections.close_all)()

    run(main())


def test_an_attribute_of_its_class_is_the_default_of_each_request(run: Runner) -> None:
    async def main() -> None:
        connections["default"] = connection = SetsOnce(connections.settings["default"], "default")

        async def child(actor: str) -> str:
            assert connection.actor == "parent"
            connection.actor = actor
            await asyncio.sleep(0)
            return connection.actor

        assert connection.actor == "nobody"
        connection.actor = "parent"
        assert await asyncio.gather(child("ann"), child("bob")) == ["ann", "bob"]
        assert connection.actor == "parent"
        del connection.actor
        assert connection.actor == "nobody"

    run(main())
    assert SetsOnce.actor == "nobody"


def test_a_method_that_is_replaced_is_that_objects_for_all(run: Runner) -> None:
    async def main() -> None:
        connections["default"] = connection = SetsOnce(connections.settings["default"], "default")

        async def patch() -> None:
            connection.cursor = lambda: "patched"
            connection.greeting = lambda: "of a mock"

        await asyncio.create_task(patch())
        assert connection.cursor() == "patched"
        assert connection.greeting() == "of a mock"
        del connection.cursor, connection.greeting
        assert connection.greeting() == "hello"

    run(main())


def test_the_backend_may_be_imported_on_a_running_loop() -> None:
    """The first request imports the backend if all models of a project name their own tables."""
    script = (
        "import asyncio\n"
        "async def main():\n"
        "    from pgbackend.base import DatabaseWrapper\n"
        "    assert {'alias', 'settings_dict', 'ops'} <= DatabaseWrapper.own_names\n"
        "    assert not DatabaseWrapper.follows_request\n"
        "asyncio.run(main())\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
