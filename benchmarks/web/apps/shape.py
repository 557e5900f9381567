"""Defines what the stacks have in common: the shape of their answers, and the gate of `park`."""

from __future__ import annotations

import asyncio
from typing import Any

#: Seconds that the endpoints wait between two statements, by endpoint name.
WAITS = {"wait50": 0.05, "wait200": 0.2}
LIST = 100
TEN = range(10)
PAGE = 20
#: Rows that are fetched at a time from a server-side cursor; Django's default.
CHUNK = 2000


def row_json(row: Any) -> dict[str, Any]:
    """Return a row as a dict, whichever ORM has made the object."""
    return {
        "id": row.id,
        "name": row.name,
        "number": row.number,
        "price": str(row.price),
        "at": row.at.isoformat(),
    }


class Gate:
    """Parks requests until all have come: then their number is known, not guessed."""

    def __init__(self) -> None:
        self.waiting = 0
        self._opened = asyncio.Event()

    async def wait(self) -> None:
        self.waiting += 1
        await self._opened.wait()

    def open(self) -> None:
        self._opened.set()


gate = Gate()
