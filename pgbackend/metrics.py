"""Statistics of the pools, and hooks that are called when a connection is leased or released."""

from __future__ import annotations

from dataclasses import dataclass

from .driver import events, loops
from .driver.dump import text as text_of_process
from .driver.events import Event, Hook, Leased, Released
from .driver.statistics import PoolStatistics
from .driver.unpooled import own_connections

__all__ = ["Connections", "Event", "Hook", "Leased", "PoolStatistics", "Released", "add_hook"]
__all__ += ["connections", "dump", "remove_hook", "statistics"]


@dataclass(frozen=True, slots=True)
class Connections:
    """A count of the connections that this process has open, and may open at most."""

    async_open: int
    """Connections of the async pools, open or being opened."""
    async_max: int | None
    """The sum of the async pools' `max_size`: one pool for each alias on each event loop. None if
    one of them has no limit, because OPTIONS["pool"] is None."""
    sync_open: int
    """Connections of sync code: each thread's own, and those of Django's synchronous pools."""
    sync_max: int
    """The sum of the synchronous pools' `max_size`, plus the open connections of threads without a
    pool: each thread may open one for each alias, without another limit."""
    listening: int = 0
    """Connections of `pgbackend.listen()`: one for each alias on each event loop, in no pool."""

    @property
    def open(self) -> int:
        """The number of all open connections."""
        return self.async_open + self.sync_open + self.listening

    @property
    def max(self) -> int | None:
        """The limit of all connections; over all processes, keep it below ``max_connections``.

        None if there is no limit.
        """
        return None if self.async_max is None else self.async_max + self.sync_max + self.listening


def statistics(using: str | None = None) -> list[PoolStatistics]:
    """Return the statistics of this process's async pools: one record for each pool.

    There is one pool for each alias on each event loop. `using` limits the list to one alias.
    """
    return [record for record in loops.statistics() if using in (None, record.alias)]


def connections() -> Connections:
    """Count the connections that this process has open, and how many it may open."""
    from .base import DatabaseWrapper  # needs Django's apps; add_hook() does not

    records = loops.statistics()
    sync_pools = list(DatabaseWrapper._connection_pools.values())  # noqa: SLF001 - Django's name
    sync_open = own_connections()
    limits = [record.max_size for record in records]
    pooled = sum(sync_pool.get_stats().get("pool_size", 0) for sync_pool in sync_pools)
    return Connections(
        async_open=sum(record.size for record in records),
        async_max=None if None in limits else sum(filter(None, limits)),
        sync_open=sync_open,
        sync_max=sum(sync_pool.max_size for sync_pool in sync_pools) + max(0, sync_open - pooled),
        listening=sum(hub.open_connections() for hub in loops.open_hubs()),
    )


def dump() -> str:
    """Return a text: each pool with its leases and its queue, and each portal with its stack.

    May be called in any thread, also while the code of an event loop hangs. It waits for nothing.
    """
    return text_of_process()


def add_hook(hook: Hook) -> None:
    """Call `hook` with each event of the pools, on the event loop's thread; it must not block."""
    events.add_hook(hook)


def remove_hook(hook: Hook) -> None:
    """Undo `add_hook`."""
    events.remove_hook(hook)
