"""The connections of this process that no async pool keeps, counted for the statistics.

They belong to threads, to synchronous pools, and to copies of Django's wrappers.
"""

from __future__ import annotations

import weakref
from typing import Any

import psycopg
from psycopg.pq import TransactionStatus

_IDLE = TransactionStatus.IDLE

_unpooled: set[weakref.ref[psycopg.Connection[Any]]] = set()


def add_own_connection(connection: psycopg.Connection[Any]) -> None:
    """Count `connection` for as long as it lives and is open."""
    _unpooled.add(weakref.ref(connection, _unpooled.discard))


def own_connections() -> int:
    """Return how many connections this process has open, without those of its async pools."""
    # Copied in one step, since other threads open and drop connections meanwhile.
    opened = [ref() for ref in list(_unpooled)]
    return sum(connection is not None and not connection.closed for connection in opened)


def threads_connections() -> dict[str, list[int]]:
    """Return, for each alias, how many connections threads have open: idle ones, and used ones.

    A connection is in use from the begin of a statement or transaction to its end. Those of
    synchronous pools are not counted.
    """
    found: dict[str, list[int]] = {}
    for connection in [ref() for ref in list(_unpooled)]:
        name = getattr(connection, "thread_of", None)
        if connection is not None and name is not None and not connection.closed:
            found.setdefault(name, [0, 0])[connection.pgconn.transaction_status != _IDLE] += 1
    return found


def forget_own_connections() -> None:
    """Stop counting the connections that exist now: after a fork they are the parent's."""
    _unpooled.clear()
