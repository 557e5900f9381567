"""Finds out whether sync code is served by an alias: a thread connects as a request's thread would.

Sync code waits for its connection without a limit that a caller could set, so a thread of the
probe's own waits. Probes of an alias that run at the same time share one thread. Serves WSGI, and
aliases of other engines.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from time import monotonic
from typing import Any

from django.db import connections

from .driver.forks import after_fork
from .driver.probing import Finding, State

_running: dict[str, Future[Finding]] = {}
_lock = threading.Lock()


@after_fork
def _forget_threads() -> None:
    """Forget the parent's threads, and a lock that one of them may have held."""
    global _lock  # noqa: PLW0603 - the parent's lock may be held for ever
    _lock = threading.Lock()
    _running.clear()


def start(alias: str) -> Future[Finding]:
    """Return a future of the finding of `alias`; start a thread for it, unless one runs."""
    with _lock:
        if (future := _running.get(alias)) is None:
            _running[alias] = future = Future()
            future.set_running_or_notify_cancel()  # nobody who waits for it can cancel it
            name = f"pgbackend.health of {alias}"
            threading.Thread(target=_look, args=(alias, future), name=name, daemon=True).start()
        return future


def _look(alias: str, future: Future[Finding]) -> None:
    began = monotonic()
    state, error = _state(alias)
    with _lock:
        _running.pop(alias, None)
    future.set_result(Finding(state, monotonic() - began, error))


def _state(alias: str) -> tuple[State, Exception | None]:
    connection = connections[alias]
    try:
        connection.ensure_connection()
        return (State.OK if connection.is_usable() else State.ERROR), None
    except Exception as exc:
        # A pool of psycopg_pool's, or Django's own engine's, says only that its time is over.
        return (State.TIMEOUT if "Timeout" in type(exc).__name__ else State.OUTAGE), exc
    finally:
        connection.close()


class Demand:
    """The demand on the synchronous pool of an alias, from now on."""

    def __init__(self, alias: str) -> None:
        pools: Any = getattr(type(connections[alias]), "_connection_pools", {})
        self._pool = pools.get(alias)
        self._served = self._count()

    def _count(self) -> int:
        if self._pool is None:
            return 0
        stats = self._pool.get_stats()
        waiting, failed = stats.get("requests_waiting", 0), stats.get("requests_errors", 0)
        return int(stats.get("requests_num", 0) - waiting - failed)

    def state(self) -> State:
        """Return why a probe had no finding within its limit."""
        stats = {} if self._pool is None else self._pool.get_stats()
        if not stats.get("requests_waiting") or stats["pool_size"] < stats["pool_max"]:
            return State.TIMEOUT
        return State.BUSY if self._count() > self._served else State.EXHAUSTED
