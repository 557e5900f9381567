"""Sums what the connections of this process did and do, for exporters: a record for each alias.

`pgbackend.contrib` shows the records to Prometheus and OpenTelemetry. Reading them waits for
nothing, and may be done in any thread.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from .driver import events, loops
from .driver.forks import after_fork
from .driver.tallies import COUNTERS, Durations, Tally, async_tallies, sync_tallies
from .driver.unpooled import threads_connections

#: The keepers of connections: the pools of event loops, Django's synchronous pools, threads, or
#: `pgbackend.listen()`.
Kind: TypeAlias = Literal["async", "sync", "thread", "listening"]
#: The kinds whose requests wait for a connection.
QUEUES = ("async", "sync")


@dataclass(slots=True)
class Totals:
    """Holds what is known of the connections of one alias and kind, in this process."""

    alias: str
    kind: str
    used: int = 0
    """Connections that are lent; of threads: those in a statement or transaction."""
    idle: int = 0
    preparing: int = 0
    """Connections that are being opened, reset or checked."""
    waiting: int = 0
    """Requests that wait for a connection."""
    min_size: int | None = None
    max_size: int | None = None
    """The sum of the pools' limits; None without a limit, and for threads."""
    counters: dict[str, int] = field(default_factory=dict)
    """Counts of events, as in `PoolStatistics`, and `timeouts`; of threads: none."""
    waited: Durations = field(default_factory=Durations)
    used_for: Durations = field(default_factory=Durations)
    connecting: Durations = field(default_factory=Durations)

    def count(self, tally: Tally) -> None:
        """Take the counts of `tally` over."""
        self.counters = {ours: tally.stats.get(name, 0) for ours, name in COUNTERS.items()}
        if self.kind == "async":
            self.counters["timeouts"] = tally.timeouts
        self.waited, self.used_for, self.connecting = tally.waited, tally.used, tally.connecting

    def merge(self, other: Totals, *, ended: bool = False) -> None:
        """Add the counts of another process; if it has `ended`, not its connections."""
        for name, count in other.counters.items():
            self.counters[name] = self.counters.get(name, 0) + count
        self.waited.merge(other.waited)
        self.used_for.merge(other.used_for)
        self.connecting.merge(other.connecting)
        if not ended:
            for name in ("used", "idle", "preparing", "waiting"):
                setattr(self, name, getattr(self, name) + getattr(other, name))
            self.min_size = _sum(self.min_size, other.min_size)
            self.max_size = _sum(self.max_size, other.max_size)

    def to_json(self) -> dict[str, Any]:
        """Return the record as values that JSON has."""
        found = {name: getattr(self, name) for name in self.__slots__}
        for name in ("waited", "used_for", "connecting"):
            found[name] = [found[name].counts, found[name].total]
        return found

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Totals:
        """Return the record that `to_json()` has made `found` of."""
        durations = {name: Durations(*found[name]) for name in ("waited", "used_for", "connecting")}
        return cls(**{**found, **durations})


def _sum(one: int | None, other: int | None) -> int | None:
    """Return the sum of two limits, of which one process may know none."""
    return None if one is None and other is None else (one or 0) + (other or 0)


def observe(listener: object) -> None:
    """Measure how long leases are waited for and used, from now on; for `listener`."""
    events.listeners.append(listener)


def stop_observing(listener: object) -> None:
    """Undo one `observe(listener)`."""
    events.listeners.remove(listener)


def totals() -> list[Totals]:
    """Return the sums of this process, for each alias and kind of connection."""
    return [*_of_loops(), *_of_sync_pools(), *_of_threads(), *_of_hubs()]


def _of_loops() -> list[Totals]:
    records = loops.statistics()
    found = []
    for alias, tally in async_tallies.sums().items():
        each = Totals(alias, "async")
        each.count(tally)
        mine = [record for record in records if record.alias == alias]
        for record in mine:
            each.used += record.leased
            each.idle += record.idle
            each.preparing += max(0, record.size - record.leased - record.idle)
            each.waiting += record.waiting
        each.min_size = sum(record.min_size for record in mine)
        limits = [record.max_size for record in mine]
        each.max_size = None if None in limits else sum(filter(None, limits))
        found.append(each)
    return found


def _of_sync_pools() -> list[Totals]:
    pools = _sync_pools()
    for alias, pool in pools.items():
        if not sync_tallies.has(pool):
            sync_tallies.begin(alias, pool, pool._stats)  # noqa: SLF001 - outlives the pool
    found = []
    for alias, tally in sync_tallies.sums().items():
        each = Totals(alias, "sync", min_size=0, max_size=0)
        each.count(tally)
        if (pool := pools.get(alias)) is not None:
            stats = pool.get_stats()
            each.idle = stats["pool_available"]
            each.used = stats["pool_size"] - each.idle
            each.waiting = stats.get("requests_waiting", 0)
            each.min_size, each.max_size = stats["pool_min"], stats["pool_max"]
        found.append(each)
    return found


def _sync_pools() -> dict[str, Any]:
    """Return Django's synchronous pools by their aliases, without those of a parent process."""
    from .base import DatabaseWrapper  # needs Django's apps

    pools = dict(DatabaseWrapper._connection_pools)  # noqa: SLF001 - Django's name
    return {alias: pool for alias, pool in pools.items() if pool not in _inherited}


_inherited: weakref.WeakSet[Any] = weakref.WeakSet()


@after_fork
def _forget_sync_pools() -> None:
    if "pgbackend.base" in sys.modules:
        _inherited.update(_sync_pools().values())


def _of_threads() -> list[Totals]:
    return [
        Totals(alias, "thread", used=used, idle=idle)
        for alias, (idle, used) in threads_connections().items()
    ]


def _of_hubs() -> list[Totals]:
    found: dict[str, Totals] = {}
    for hub in loops.open_hubs():
        each = found.setdefault(hub.name, Totals(hub.name, "listening"))
        each.used += hub.open_connections()
    return list(found.values())
