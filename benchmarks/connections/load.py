"""Keeps a number of requests in flight on one event loop, and counts the connections in use."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pgbackend import aio, metrics

from .database import nap, until_open

T = TypeVar("T")


@dataclass(frozen=True)
class Work:
    """Describes a request: `statements` times a wait for other things, and then a statement."""

    name: str
    title: str
    statements: int
    elsewhere: float
    """Mean seconds of a wait."""
    statement: float
    """Mean seconds that the server works (sleeps) on a statement."""
    cards: int
    """In how many different times of a wait, and of a statement, the means are cut: see `deck`."""
    seconds: float
    """The least length of a measurement; one of few requests needs a longer one."""


@dataclass(frozen=True)
class Measured:
    """Holds the figures of one measurement."""

    seconds: float
    statements: int
    rate: float
    """Statements a second."""
    in_use: float
    """The mean over the time."""
    peak: int
    held: float
    """Mean seconds of a lease."""
    wait: float
    """Mean seconds for which a statement waited for its connection."""
    cycle: float
    """Mean seconds from the end of one statement of a request to that of its next."""
    cpu: float
    """Seconds of the processor that this process used in each second."""
    kept_off: float
    """The part of each second in which this process could run, and others had the processors."""


class Gauge:
    """Integrates the number of leased connections over the time: a hook of `pgbackend.metrics`."""

    def __init__(self, pool: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self.pool, self._clock = pool, clock
        self.now = self.peak = self.leases = 0
        self.area = self.held = self.waited = 0.0
        self._since = self._clock()

    def __call__(self, event: metrics.Event) -> None:
        if event.pool != self.pool:
            return
        self._advance()
        if isinstance(event, metrics.Leased):
            self.now += 1
            self.peak = max(self.peak, self.now)
            self.waited += event.waited
        else:
            self.now -= 1
            self.leases += 1
            self.held += event.held

    def begin(self) -> None:
        """Forget what was before, but for the connections that are in use now."""
        self.peak, self.leases, self.area, self.held, self.waited = self.now, 0, 0.0, 0.0, 0.0
        self._since = self._clock()

    def end(self) -> None:
        self._advance()

    def _advance(self) -> None:
        now = self._clock()
        self.area += self.now * (now - self._since)
        self._since = now


def deck(count: int) -> list[float]:
    """Return `count` numbers of mean 1 that are spread as an exponential distribution is.

    It is cut into `count` parts that are equally likely, and each part has its mean.
    """

    def upper(part: int) -> float:
        """Return the integral of x·exp(-x) from the part's beginning on."""
        if part == count:
            return 0.0
        begin = -math.log(1 - part / count)
        return (begin + 1) * math.exp(-begin)

    return [count * (upper(part) - upper(part + 1)) for part in range(count)]


def dealt(cards: Sequence[T], chance: random.Random) -> Iterator[T]:
    """Yield the cards for ever, shuffled anew each time: so a whole deck has the exact mean."""
    while True:
        yield from chance.sample(cards, len(cards))


class Flight:
    """Keeps requests in flight until enough was measured."""

    def __init__(
        self,
        work: Work,
        requests: int,
        alias: str,
        statement: Callable[[str, int], object] = nap,
        seed: int = 0,
    ) -> None:
        self.work, self.requests, self.alias = work, requests, alias
        self._statement = statement
        self.gauge = Gauge(alias)
        self._chance = random.Random(seed)  # noqa: S311 - a schedule, no secret
        self._waits = [card * work.elsewhere for card in deck(work.cards)]
        self._shuffle()
        self._done = 0
        self._cycles = 0.0
        self._begun: tuple[float, float, float] | None = None
        self._begin_at = self._end_at = math.inf
        self._result: asyncio.Future[Measured]

    def _shuffle(self) -> None:
        self._wait = dealt(self._waits, self._chance)
        self._nap = dealt(range(1, self.work.cards + 1), self._chance)

    async def measure(self, warm: float, seconds: float) -> Measured:
        """Return the figures of at least `seconds`, after `warm` seconds that do not count.

        They begin and end with the end of a statement, and a single request deals whole decks.
        """
        self._result = asyncio.get_running_loop().create_future()
        await aio.run(self._statement, self.alias, 1)
        await until_open(self.alias)
        metrics.add_hook(self.gauge)
        self._begin_at = time.perf_counter() + warm
        self._end_at = self._begin_at + seconds
        clients = [asyncio.create_task(self._client()) for _ in range(self.requests)]
        for client in clients:
            client.add_done_callback(self._failed)
        try:
            return await self._result
        finally:
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
            metrics.remove_hook(self.gauge)

    async def _client(self) -> None:
        """Make a request as soon as the last one has ended; the first one is in its first wait."""
        wait, waited = next(self._wait), 0.0
        if self.requests > 1 and self.work.elsewhere:
            # As an onlooker finds it who comes at any time: in a long wait rather than a short one.
            [wait] = self._chance.choices(self._waits, self._waits)
            waited = self._chance.uniform(0, wait)
        last = time.perf_counter() - waited
        while True:
            last = await asyncio.create_task(self._request(last, wait - waited))
            wait, waited = next(self._wait), 0.0

    async def _request(self, last: float, wait: float) -> float:
        """Make a request whose client's last statement ended at `last`; return when its own did."""
        for number in range(self.work.statements):
            await asyncio.sleep(next(self._wait) if number else wait)
            await aio.run(self._statement, self.alias, next(self._nap))
            now = time.perf_counter()
            self._count(now, now - last)
            last = now
        return last

    def _count(self, now: float, cycle: float) -> None:
        """Count a statement; begin or end the measurement if it is time."""
        self._done += 1
        self._cycles += cycle
        if self._begun is None:
            if now >= self._begin_at:
                self._begin(now)
        elif now >= self._end_at and not self._done % self.work.cards and not self._result.done():
            self._result.set_result(self._figures(now - self._begun[0]))

    def _begin(self, now: float) -> None:
        self._begun = (now, time.process_time(), _kept_off())
        self._end_at = now + self._end_at - self._begin_at
        self._done = 0
        self._cycles = 0.0
        self._shuffle()
        self.gauge.begin()

    def _figures(self, seconds: float) -> Measured:
        assert self._begun is not None
        gauge = self.gauge
        gauge.end()
        return Measured(
            seconds=seconds,
            statements=self._done,
            rate=self._done / seconds,
            in_use=gauge.area / seconds,
            peak=gauge.peak,
            held=gauge.held / max(1, gauge.leases),
            wait=gauge.waited / max(1, gauge.leases),
            cycle=self._cycles / self._done,
            cpu=(time.process_time() - self._begun[1]) / seconds,
            kept_off=(_kept_off() - self._begun[2]) / seconds,
        )

    def _failed(self, client: asyncio.Task[None]) -> None:
        if not client.cancelled() and not self._result.done():
            error = client.exception()
            assert error is not None
            self._result.set_exception(error)


def _kept_off() -> float:
    """Return the seconds for which this thread has waited for a processor; 0 if nothing tells."""
    with suppress(OSError):
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    return 0.0
