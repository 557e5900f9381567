"""Counts what pools do, for exporters: sums for each name that go on when a pool has ended.

psycopg_pool counts the requests and the connections of one pool. A `Tally` has these counts, and
what they leave out: timeouts, and how long it took to get, to use and to open connections. Only the
thread of the pool's loop writes a tally, so it needs no lock; any thread may read one. How long
leases are waited for and used is measured only while somebody listens (`events.listeners`).
"""

from __future__ import annotations

import threading
import weakref
from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

from .forks import after_fork

#: The upper bounds of the buckets of durations, in seconds; each belongs to its bucket.
BOUNDS = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0)

#: The counters of psycopg_pool that exporters show, by our names.
COUNTERS = {
    "requests": "requests_num",
    "requests_queued": "requests_queued",
    "requests_errors": "requests_errors",
    "connections_made": "connections_num",
    "connections_errors": "connections_errors",
    "connections_lost": "connections_lost",
}


class Durations:
    """A histogram of durations: how many fell in each bucket, and their sum."""

    __slots__ = ("counts", "total")

    def __init__(self, counts: list[int] | None = None, total: float = 0.0) -> None:
        #: One for each of `BOUNDS`, and one for longer durations.
        self.counts = [0] * (len(BOUNDS) + 1) if counts is None else counts
        self.total = total

    def add(self, seconds: float) -> None:
        """Count one duration."""
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.total += seconds

    def merge(self, other: Durations) -> None:
        """Add what `other` has counted."""
        self.counts = [one + more for one, more in zip(self.counts, other.counts, strict=True)]
        self.total += other.total


class Tally:
    """The counts of one pool, or the sums of several; they never become smaller."""

    __slots__ = ("connecting", "stats", "timeouts", "used", "waited")

    def __init__(self, stats: Mapping[str, int]) -> None:
        #: The mapping in which psycopg_pool counts, by its names.
        self.stats = stats
        #: Requests that got no connection in time.
        self.timeouts = 0
        self.waited = Durations()
        self.used = Durations()
        self.connecting = Durations()

    def merge(self, other: Tally) -> None:
        """Add what `other` has counted."""
        theirs = dict(other.stats)  # copied in one step, since another thread counts
        self.stats = {
            name: self.stats.get(name, 0) + theirs.get(name, 0) for name in COUNTERS.values()
        }
        self.timeouts += other.timeouts
        for mine, others in (
            (self.waited, other.waited),
            (self.used, other.used),
            (self.connecting, other.connecting),
        ):
            mine.merge(others)


class Tallies:
    """The tallies of pools of one kind, by the pools' names; a tally outlives its pool."""

    def __init__(self) -> None:
        self.forget()
        after_fork(self.forget)  # what the parent has counted is the parent's

    def forget(self) -> None:
        """Forget all tallies."""
        self._lock = threading.Lock()
        self._open: list[tuple[str, weakref.ref[Any], Tally]] = []
        #: The sums of the pools that are gone.
        self._past: dict[str, Tally] = {}
        #: The greatest counts that were told.
        self._told: dict[str, dict[str, int]] = {}

    def begin(self, name: str, owner: object, stats: Mapping[str, int]) -> Tally:
        """Return a new tally for the pool `owner`; `stats` is where psycopg_pool counts."""
        tally = Tally(stats)
        with self._lock:
            self._fold()
            self._open.append((name, weakref.ref(owner), tally))
        return tally

    def has(self, owner: object) -> bool:
        """Return whether `owner` has a tally."""
        return any(ref() is owner for _, ref, _ in list(self._open))

    def sums(self) -> dict[str, Tally]:
        """Return the sums of all pools of each name, those included that are gone."""
        with self._lock:
            self._fold()
            found: dict[str, Tally] = {}
            for name, tally in self._past.items():
                found.setdefault(name, Tally({})).merge(tally)
            for name, _, tally in self._open:
                found.setdefault(name, Tally({})).merge(tally)
            for name, tally in found.items():
                tally.stats = self._at_least_as_told(name, tally.stats)
            return found

    def _fold(self) -> None:
        """Add the tallies of pools that are gone to the past."""
        kept = []
        for name, ref, tally in self._open:
            if ref() is None:
                self._past.setdefault(name, Tally({})).merge(tally)
            else:
                kept.append((name, ref, tally))
        self._open = kept

    def _at_least_as_told(self, name: str, stats: Mapping[str, int]) -> dict[str, int]:
        """Return `stats`, with no count smaller than before.

        A pool counts a request and takes that back when it begins anew. An exporter that looked in
        between would see a counter that goes backwards, as if the process had started again.
        """
        told = self._told.get(name, {})
        self._told[name] = {key: max(count, told.get(key, 0)) for key, count in stats.items()}
        return self._told[name]


#: The tallies of the async pools of all loops.
async_tallies = Tallies()
#: The tallies of Django's synchronous pools.
sync_tallies = Tallies()
