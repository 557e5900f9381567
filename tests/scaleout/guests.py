"""Plays guests who order without end, and repeat an order until they know that it was placed."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import httpx

#: How long a guest waits for an answer, and how long until the next order or attempt (seconds).
PATIENCE, PAUSE = 60.0, 0.1


@dataclass
class Placed:
    """An order that a desk has acknowledged: what the guest knows of it."""

    key: str
    way: str
    lines: list[dict[str, int]]
    answer: dict[str, object]
    began: float
    at: float
    attempts: int


@dataclass
class Log:
    """The answers that the guests of a scene have got."""

    placed: list[Placed] = field(default_factory=list)
    failures: list[tuple[float, str, str]] = field(default_factory=list)
    #: How many orders their guests could read at once, by way and place; and those they could not.
    read: Counter[tuple[str, str]] = field(default_factory=Counter)
    stale: list[str] = field(default_factory=list)

    def of(self, way: str) -> list[Placed]:
        return [placed for placed in self.placed if placed.way == way]

    def failed(self, way: str) -> int:
        return sum(1 for _, failed, _ in self.failures if failed == way)

    def places(self, way: str) -> str:
        """Return how many orders were read from the primary, and from members by their aliases."""
        return f"primary {self.read[way, 'primary']}, members {self.read[way, 'member']}"

    def first_after(self, way: str, at: float) -> float | None:
        """Return how long after a time the first order of a way was acknowledged."""
        return min((each.at - at for each in self.of(way) if each.at >= at), default=None)

    def longest(self, way: str) -> float:
        """Return the longest time without an acknowledged order."""
        times = sorted(each.at for each in self.of(way))
        return max((b - a for a, b in pairwise(times)), default=0.0)


def in_order(lines: list[dict[str, int]]) -> list[tuple[int, int]]:
    """Return the dishes of an order with their quantities, sorted."""
    return sorted((line["dish"], line["quantity"]) for line in lines)


class Guests:
    """Some guests at each desk."""

    def __init__(self, addresses: dict[str, str], dishes: list[int], at_each: int) -> None:
        self.addresses = addresses
        self.dishes = dishes
        self.at_each = at_each
        self.log = Log()
        self._closing = False

    @asynccontextmanager
    async def ordering(self) -> AsyncIterator[None]:
        """Let the guests order during the block; each finishes the order that it has begun."""
        self._closing = False
        async with asyncio.TaskGroup() as group:
            for way in self.addresses:
                for number in range(self.at_each):
                    group.create_task(self._orders(way, number))
            try:
                yield
            finally:
                self._closing = True

    async def _orders(self, way: str, number: int) -> None:
        # Each guest has cookies of its own.
        async with httpx.AsyncClient(
            base_url=self.addresses[way], trust_env=False, timeout=PATIENCE
        ) as client:
            while not self._closing:
                placed = await self._order(client, way, number)
                await self._look(client, placed)
                await asyncio.sleep(PAUSE)
                number += self.at_each

    async def _look(self, client: httpx.AsyncClient, placed: Placed) -> None:
        """Read the order that was just placed, from wherever the site reads."""
        while True:
            try:
                answer = await client.get(f"/keys/{placed.key}/")
            except httpx.TransportError as error:
                self.log.failures.append((time.monotonic(), placed.way, repr(error)))
            else:
                if answer.status_code < 500:
                    self._note_read(placed, answer)
                    return
                self.log.failures.append((time.monotonic(), placed.way, answer.text[:200]))
            await asyncio.sleep(PAUSE)

    def _note_read(self, placed: Placed, answer: httpx.Response) -> None:
        found = answer.json()
        if answer.status_code == 200 and in_order(found["lines"]) == in_order(placed.lines):
            place = "primary" if found["from"] == "default" else "member"
            self.log.read[placed.way, place] += 1
        else:
            self.log.stale.append(f"{placed.way}, attempt {placed.attempts}: {found}")

    async def _order(self, client: httpx.AsyncClient, way: str, number: int) -> Placed:
        """Place one order, in as many attempts as that takes, all with the same key."""
        key, began, attempts = uuid.uuid4().hex, time.monotonic(), 0
        lines = self._lines(number)
        order = {"table": str(number % 90 + 1), "note": key, "lines": lines}
        while True:
            attempts += 1
            try:
                headers = {"Idempotency-Key": key}
                answer = await client.post("/api/orders/", json=order, headers=headers)
            except httpx.TransportError as error:
                self.log.failures.append((time.monotonic(), way, repr(error)))
            else:
                if answer.status_code == 201:
                    seen = time.monotonic()
                    placed = Placed(key, way, lines, answer.json(), began, seen, attempts)
                    self.log.placed.append(placed)
                    return placed
                said = f"{answer.status_code} {answer.text[:200]}"
                self.log.failures.append((time.monotonic(), way, said))
            await asyncio.sleep(PAUSE)

    def _lines(self, number: int) -> list[dict[str, int]]:
        count = 1 + number % 3
        chosen = (self.dishes[(number + i) % len(self.dishes)] for i in range(count))
        return [{"dish": dish, "quantity": 1 + number % 5} for dish in chosen]

    async def have_placed(self, more: int, ways: Iterable[str] = (), seconds: float = 180) -> None:
        """Wait until each desk has acknowledged so many more orders."""
        before = {way: len(self.log.of(way)) for way in (ways or self.addresses)}
        async with asyncio.timeout(seconds):
            while any(len(self.log.of(way)) < n + more for way, n in before.items()):
                await asyncio.sleep(0.02)
