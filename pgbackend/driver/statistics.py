"""Defines the statistics of a pool."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """Counts of a pool: of its connections at one moment, and of events since it was opened."""

    alias: str
    """The name of the pool: the alias of the database."""
    min_size: int
    max_size: int | None
    """The limit of connections; None if there is none (OPTIONS["pool"] is None)."""
    size: int
    """Connections that are open, or being opened."""
    leased: int
    """Connections that a task holds."""
    idle: int
    """Connections that are free."""
    waiting: int
    """Tasks that wait for a connection."""
    requests: int
    """Leases asked for."""
    requests_queued: int
    """Leases that had to wait."""
    requests_wait_ms: int
    """Time spent waiting for leases, in milliseconds."""
    requests_errors: int
    """Leases that could not be given."""
    connections_made: int
    """Attempts to open a connection."""
    connections_errors: int
    """Attempts to open a connection that failed."""
    connections_lost: int
    """Connections found dead in the pool."""

    def of_most(self) -> str:
        """Return the limit of connections, for a message that counts them: "" if there is none."""
        return "" if self.max_size is None else f" of {self.max_size}"
