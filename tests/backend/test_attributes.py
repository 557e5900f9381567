"""What a derived wrapper sets on itself, while others use the same object."""

from __future__ import annotations

import asyncio
from typing import Any

from asgiref.sync import async_to_sync
from django.db import connections

from pgbackend import aio
from pgbackend.base import DatabaseWrapper
from tests.conftest import Runner


class Tenants(DatabaseWrapper):
    """Sets the tenant's schema in `_cursor()`, as packages do; `halt` lets the statement last."""

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
    """The other's is noted as being about its connection, and brought back with what was before."""

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
