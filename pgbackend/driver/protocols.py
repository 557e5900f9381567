"""Protocols: a lease and a cursor, for modules below those that define them.

A connection knows the lease that lends it, and a lease the cursors that hold it; neither may import
the other's module.
"""

from __future__ import annotations

from typing import Protocol


class LeasedCursor(Protocol):
    """A cursor that holds the lease of its connection while it is open."""

    @property
    def is_on_server(self) -> bool:
        """Return whether the server keeps a cursor for it."""
        ...


class SoilingPool(Protocol):
    """The pool that a lease belongs to."""

    @property
    def soiled_unless_vouched(self) -> bool:
        """Return whether a statement that nobody vouches for makes the session dirty."""
        ...


class Lease(Protocol):
    """A lease, as the connection that it lends and the cursors of that see it."""

    dirty: bool
    types_seen: bool

    @property
    def ended(self) -> bool: ...

    @property
    def pool(self) -> SoilingPool: ...

    def can_wait(self) -> bool: ...

    def is_held_by_cursors(self) -> bool: ...

    def cursor_opened(self, cursor: LeasedCursor) -> None: ...

    def cursor_closed(self, cursor: LeasedCursor) -> None: ...
