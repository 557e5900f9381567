"""Taking connections out of psycopg_pool's pool for a while, to look at them or to replace them.

A connection that is *withdrawn* is neither free nor leased. psycopg_pool still counts it: it must
be put back, discarded, or replaced.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from .pooled import AsyncConnection
from .server_changes import ServerChanges


class Withdrawing:
    """Take free connections out of the pool (a mixin for psycopg_pool's async pool)."""

    owner: Any
    changes: ServerChanges
    made: weakref.WeakSet[AsyncConnection]
    put_free: Callable[[AsyncConnection], bool]
    waiting: Callable[[], int]
    _pool: deque[AsyncConnection]
    _nconns: int
    _nconns_min: int
    _max_size: int
    _closed: bool
    _maybe_grow_pool: Callable[[], None]

    def connections(self) -> list[AsyncConnection]:
        """Return all open connections: free, leased or withdrawn."""
        return [connection for connection in self.made if not connection.closed]

    def next_lives(self) -> bool | None:
        """Return whether the connection that is leased next lives; None if none is free."""
        return self._pool[-1].is_alive() if self._pool else None

    def is_full(self) -> bool:
        """Return whether no more connections may be opened."""
        return self._nconns >= self._max_size

    def has_connection(self) -> bool:
        """Return whether any connection is open, be it free or not."""
        return any(not connection.closed for connection in self.made)

    def serves(self) -> bool:
        """Return whether any connection is open, and no pooler has refused a statement on one."""
        return self.has_connection() and not self.changes.pooler_refuses

    def withdraw(self, condition: Callable[[AsyncConnection], bool]) -> list[AsyncConnection]:
        """Take the free connections that meet `condition`, so that nobody else can take them."""
        taken = [connection for connection in self._pool if condition(connection)]
        for connection in taken:
            self._pool.remove(connection)
            connection._pool = self  # type: ignore[assignment]  # noqa: SLF001 - as `getconn()` does
        self._nconns_min = min(self._nconns_min, len(self._pool))
        return taken

    def discard(self, connection: AsyncConnection) -> None:
        """Close a connection that was withdrawn; another is opened on demand."""
        connection._pool = None  # noqa: SLF001
        connection.close_now()
        self._nconns -= 1
        if self.waiting() and not self._closed:
            self._maybe_grow_pool()

    def expire(self, connection: AsyncConnection) -> None:
        """Have a connection that is leased replaced when its lease ends."""
        connection._expire_at = 0.0  # noqa: SLF001 - for psycopg_pool

    def put_back(self, connection: AsyncConnection) -> None:
        """Give a connection back that was withdrawn; discard it if it was closed meanwhile."""
        self.owner.pulse.start(self.owner.loop)  # see `is_at_rest()`: it counts as just used
        if connection.closed:
            self.discard(connection)
        elif not self.put_free(connection):
            self.owner.put(connection)
