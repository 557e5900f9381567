"""Warns of advisory locks that are lost, because their connection goes back to the pool.

In sync code a lock of the session lasts until it is released, because the thread keeps its
connection. In green code outside of `pinned()` and transactions, each statement has a connection of
its own: the reset of the session (contract C9) releases the lock at once, and the code that took it
would go on as if it had it. So when a connection comes back after a statement that may have taken
such a lock, the pool looks whether the lock is still held. Other leases pay nothing for this.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from .session_settings import text_of

if TYPE_CHECKING:
    from psycopg import AsyncConnection

logger = logging.getLogger("pgbackend.driver")

# pg_locks has the locks of the whole server, but asking costs little more than the round trip.
_HELD = (
    "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted "
    "AND pid = pg_backend_pid()"
)


def may_lock(query: object, connection: object) -> bool:
    """Return whether the text of `query` may take an advisory lock of the session.

    The names of the functions that take a lock of the transaction do not contain the text.
    """
    return "_advisory_lock" in text_of(query, connection).lower()


async def warn_if_held(physical: AsyncConnection[object], pool: str, locked_by: str) -> None:
    """Log a warning if the session of `physical`, which comes back to the pool, holds such locks.

    `locked_by` says what took a lock. No transaction may be open.
    """
    cursor = await physical.execute(_HELD, prepare=False)
    found: object = await cursor.fetchone()
    if found != (0,):
        logger.warning(
            "an advisory lock is lost, because the connection that holds it goes back to the pool "
            "of %r: it was taken by %s, and not released. Green and async code "
            "keep a connection for one statement or transaction only: take and release the lock "
            "inside of 'with pgbackend.pinned():', or take it for a transaction, with "
            "pg_advisory_xact_lock()",
            pool,
            locked_by,
        )
