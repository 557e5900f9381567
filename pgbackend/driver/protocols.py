"""Protocols of connections, leases and cursors, for modules that must not import the classes.

A connection uses the lease that lends it, and a lease uses the cursors that hold it; the lower
module of each pair cannot import the higher one.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from .connection import Connection
    from .server_changes import ServerChanges
    from .socket_watch import Watch


class LeasedCursor(Protocol):
    """Protocol of a cursor that holds its connection's lease: see Note [Holders] in lease.py."""

    @property
    def is_on_server(self) -> bool:
        """Return whether this is a server-side cursor."""
        ...


class SoilingPool(Protocol):
    """Protocol of the pool that a lease belongs to."""

    @property
    def soiled_unless_vouched(self) -> bool:
        """Return whether statements that nobody vouches for make their lease dirty."""
        ...


class Lease(Protocol):
    """Protocol of the part of a lease that its facade, and the facade's cursors, use."""

    dirty: bool
    types_seen: bool

    @property
    def ended(self) -> bool: ...

    @property
    def pool(self) -> SoilingPool: ...

    def can_wait(self) -> bool: ...

    def note_lock(self, query: object, /) -> None: ...

    def is_held_by_cursors(self) -> bool: ...

    def cursor_opened(self, cursor: LeasedCursor) -> None: ...

    def cursor_closed(self, cursor: LeasedCursor) -> None: ...


class Physical(Protocol):
    """Protocol of the part of `AsyncConnection` that its facades use."""

    watch: Watch
    changes: ServerChanges | None
    listener: weakref.ref[Connection]
    asked: Mapping[str, Any]

    def close_soon(self) -> None:
        """Have the loop close the connection. May be called in any thread."""

    def forget_facade(self, *, types_seen: bool) -> None:
        """Pass no more notices to the last facade; if `types_seen`, have types looked up again.

        Called at the end of each lease; sends nothing. `types_seen` says that the facade's user may
        have registered a type: so the next statement must look its dumpers and loaders up again.
        """
