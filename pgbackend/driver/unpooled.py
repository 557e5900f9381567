"""The connections of this process that no async pool keeps, counted for the statistics.

They are those of threads, of synchronous pools, and copies.
"""

from __future__ import annotations

import weakref
from typing import Any

import psycopg

_unpooled: set[weakref.ref[psycopg.Connection[Any]]] = set()


def add_own_connection(connection: psycopg.Connection[Any]) -> None:
    """Count `connection` for as long as it lives and is open."""
    _unpooled.add(weakref.ref(connection, _unpooled.discard))


def own_connections() -> int:
    """Return how many connections this process has open beside those of its async pools.

    Other threads open and drop theirs meanwhile: so the set is copied, in one step.
    """
    opened = [ref() for ref in list(_unpooled)]
    return sum(connection is not None and not connection.closed for connection in opened)


def forget_own_connections() -> None:
    """Stop counting the connections so far: after a fork they are the parent's."""
    _unpooled.clear()
