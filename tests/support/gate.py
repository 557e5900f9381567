"""Makes statements wait on the server for as long as a test wants."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import psycopg

_keys = itertools.count(7_000_000)


class Gate:
    """Makes statements wait for an advisory lock of the test's own session."""

    #: The value that the statement returns.
    rows: list[Any] = [("open",)]

    def __init__(self, admin: psycopg.Connection[Any]) -> None:
        self.admin = admin
        self.key = next(_keys)
        self.sql = f"SELECT 'open' FROM pg_advisory_xact_lock_shared({self.key})"
        #: A condition for the WHERE clause of an ORM statement.
        self.condition = f"pg_advisory_xact_lock_shared({self.key})::text = ''"
        admin.execute("SELECT pg_advisory_lock(%s)", [self.key])
        self._is_open = False

    def count(self) -> int:
        """Return how many statements wait."""
        row = self.admin.execute(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = %s "
            "AND NOT granted",
            [self.key],
        ).fetchone()
        assert row is not None
        waiting: int = row[0]
        return waiting

    async def reached(self, count: int = 1) -> None:
        """Wait until `count` statements wait at the gate."""
        async with asyncio.timeout(10):
            while self.count() < count:
                await asyncio.sleep(0.001)

    def open(self) -> None:
        """Let all statements pass, those of now and later ones."""
        if not self._is_open:
            self._is_open = True
            self.admin.execute("SELECT pg_advisory_unlock(%s)", [self.key])

    def close(self) -> None:
        """Open the gate, for `contextlib.closing()`."""
        self.open()
