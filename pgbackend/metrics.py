"""Statistics of the pools, and hooks for what happens in them."""

from __future__ import annotations

from .driver import pool
from .driver.events import Event, Hook, Leased, Released, hooks
from .driver.pool import PoolStatistics

__all__ = ["Event", "Hook", "Leased", "PoolStatistics", "Released", "add_hook", "remove_hook"]
__all__ += ["statistics"]


def statistics(using: str | None = None) -> list[PoolStatistics]:
    """Return the statistics of this process's async pools: one record a pool.

    There is one pool for each alias on each event loop. `using` picks one alias.
    """
    return [record for record in pool.statistics() if using in (None, record.alias)]


def add_hook(hook: Hook) -> None:
    """Call `hook` with each event of the pools, on the event loop's thread; it must not block."""
    hooks.append(hook)


def remove_hook(hook: Hook) -> None:
    """Undo `add_hook`."""
    hooks.remove(hook)
