"""Statistics of the pools, and hooks for what happens in them."""

from __future__ import annotations

from dataclasses import dataclass

from .driver import loops
from .driver.events import Event, Hook, Leased, Released, hooks
from .driver.pool import PoolStatistics
from .driver.unpooled import own_connections

__all__ = ["Connections", "Event", "Hook", "Leased", "PoolStatistics", "Released", "add_hook"]
__all__ += ["connections", "remove_hook", "statistics"]


@dataclass(frozen=True, slots=True)
class Connections:
    """Return how many connections this process has open, and how many it may open at most."""

    async_open: int
    """Connections of the async pools, open or being opened."""
    async_max: int
    """The sum of the async pools' `max_size`: one pool for each alias on each event loop."""
    sync_open: int
    """Connections of sync code: each thread's own, and those of Django's synchronous pools."""
    sync_max: int
    """The sum of the synchronous pools' `max_size`, plus what threads have open of their own: they
    open one for each thread and alias, without another limit."""

    @property
    def open(self) -> int:
        """All connections that are open."""
        return self.async_open + self.sync_open

    @property
    def max(self) -> int:
        """The sum over all processes must stay below the server's ``max_connections``."""
        return self.async_max + self.sync_max


def statistics(using: str | None = None) -> list[PoolStatistics]:
    """Return the statistics of this process's async pools: one record a pool.

    There is one pool for each alias on each event loop. `using` picks one alias.
    """
    return [record for record in loops.statistics() if using in (None, record.alias)]


def connections() -> Connections:
    """Return how many connections this process has open, and how many it may open."""
    from .base import DatabaseWrapper  # needs Django's apps; hooks may be added before

    records = loops.statistics()
    sync_pools = list(DatabaseWrapper._connection_pools.values())  # noqa: SLF001 - Django's name
    sync_open = own_connections()
    pooled = sum(sync_pool.get_stats().get("pool_size", 0) for sync_pool in sync_pools)
    return Connections(
        async_open=sum(record.size for record in records),
        async_max=sum(record.max_size for record in records),
        sync_open=sync_open,
        sync_max=sum(sync_pool.max_size for sync_pool in sync_pools) + max(0, sync_open - pooled),
    )


def add_hook(hook: Hook) -> None:
    """Call `hook` with each event of the pools, on the event loop's thread; it must not block."""
    hooks.append(hook)


def remove_hook(hook: Hook) -> None:
    """Undo `add_hook`."""
    hooks.remove(hook)
