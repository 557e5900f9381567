"""Finds out whether sync code is served by an alias: a thread connects as a request's thread would.

Sync code waits for its connection without a limit that a caller could set, so a thread of the
probe's own waits. Probes of an alias that run at the same time share one thread. Serves WSGI, and
aliases of other engines.
"""

from __future__ import annotations

import os
import socket
import threading
from concurrent.futures import Future
from contextlib import suppress
from time import monotonic
from typing import Any

from django.db import connections

from .driver.forks import after_fork
from .driver.probing import Finding, State

#: Seconds after which a thread that still looks is given up, and another one is started. Sync
#: connections have no limit on silence: a host that vanished may hold a thread up for hours.
GIVEN_UP = 30.0


class _Look:
    """One thread's look at an alias."""

    def __init__(self, alias: str) -> None:
        self.alias = alias
        self.began = monotonic()
        self.future: Future[Finding] = Future()
        self.future.set_running_or_notify_cancel()  # nobody who waits for it can cancel it
        self._connection: Any = None

    def start(self) -> None:
        name = f"pgbackend.health of {self.alias}"
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def _run(self) -> None:
        state, error = self._find()
        with _lock:
            if _running.get(self.alias) is self:
                del _running[self.alias]
        self.future.set_result(Finding(state, monotonic() - self.began, error))

    def _find(self) -> tuple[State, Exception | None]:
        wrapper = connections[self.alias]
        try:
            wrapper.ensure_connection()
            self._connection = wrapper.connection
            return (State.OK if wrapper.is_usable() else State.ERROR), None
        except Exception as exc:
            # A pool of psycopg_pool's, or Django's own engine's, says only that its time is over.
            return (State.TIMEOUT if "Timeout" in type(exc).__name__ else State.OUTAGE), exc
        finally:
            wrapper.close()

    def is_given_up(self) -> bool:
        """Return whether the thread has looked for too long; end its wait if so."""
        if monotonic() - self.began < GIVEN_UP:
            return False
        with suppress(Exception):  # it still connects, is closed, or is another engine's
            _shut_down(self._connection.fileno())
        return True


def _shut_down(fileno: int) -> None:
    with socket.socket(fileno=os.dup(fileno)) as link:
        link.shutdown(socket.SHUT_RDWR)


_running: dict[str, _Look] = {}
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
        look = _running.get(alias)
        if look is None or look.is_given_up():
            _running[alias] = look = _Look(alias)
            look.start()
        return look.future


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
