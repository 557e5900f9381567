"""Replaces the connections of pools in good order: for a switchover, or a changed setting."""

from __future__ import annotations

from django.db import connections
from django.utils.connection import ConnectionDoesNotExist

from .driver import loops


def drain(using: str | None = None) -> None:
    """Replace all connections of the pools of `using`, an alias, or of all aliases.

    Free connections are closed now; a connection that is in use goes on until it is given back,
    and is closed then. Later statements run on new connections. Returns at once; may be called in
    sync and async code and in any thread, and reaches the pools of all event loops of the process,
    and Django's synchronous pools. A connection that sync code has without a pool stays: it ends by
    `CONN_MAX_AGE`. Listeners get another connection, and are told a `Gap`. Raises Django's
    `ConnectionDoesNotExist` for an unknown alias.
    """
    if using is not None and using not in connections.settings:
        raise ConnectionDoesNotExist(f"The connection '{using}' doesn't exist.")  # Django's words
    loops.renew_pools(using)
    loops.renew_hubs(using)
    from .base import DatabaseWrapper  # needs Django's apps

    for alias, pool in list(DatabaseWrapper._connection_pools.items()):  # noqa: SLF001 - Django's
        if using in (None, alias) and hasattr(pool, "drain"):
            pool.drain()
