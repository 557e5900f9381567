"""The driver without Django, as docs/settings.md tells of it."""

from __future__ import annotations

import asyncio
from typing import assert_type

from pgbackend import driver
from pgbackend.driver import bridge


def one(conninfo: str) -> int:
    with driver.connect(conninfo) as connection, connection.cursor() as cursor:
        assert_type(connection, driver.Connection)
        row = cursor.execute("SELECT 1").fetchone()
        return 0 if row is None else int(row[0])


async def main() -> int:
    try:
        return await bridge.run(one, "dbname=shop")
    except driver.OperationalError:
        return 0


number: int = asyncio.run(main())
