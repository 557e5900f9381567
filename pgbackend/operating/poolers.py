"""Finds out whether a pooler stands before the server, and whether it serves by transactions.

A pooler gives its clients a process id of its own. If two clients at the same time are served by
one server process, one after the other, the sessions are not theirs alone: a transaction pooler.
"""

from __future__ import annotations

from typing import Any

from .connecting import connected

NONE, SESSION, TRANSACTION = "none", "session", "transaction"

#: Times that a second client looks for the server processes of the first one.
_TRIES = 3


def kind_of(alias: str, wrapper: Any) -> str:
    """Return the kind of pooler before the server of `wrapper`, which is connected by `alias`."""
    if wrapper.connection.info.backend_pid == _server_process(wrapper):
        return NONE
    with connected(alias) as other:
        served = set()
        for _ in range(_TRIES):
            served.add(_server_process(wrapper))
            if _server_process(other) in served:
                return TRANSACTION
    return SESSION


def _server_process(wrapper: Any) -> int:
    with wrapper.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        return int(cursor.fetchone()[0])
