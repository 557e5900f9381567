"""Watches the members from outside: since when each of them has been a primary or a standby."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg

PAUSE = 0.02


class Watch:
    """Asks a member ``pg_is_in_recovery()`` every 20 ms, in a thread, over a session of its own."""

    def __init__(self, name: str, conninfo: dict[str, Any]) -> None:
        self.name = name
        self.conninfo = conninfo
        #: The changes of its answer: time, and True (a standby), False (a primary), None (silent).
        self.seen: list[tuple[float, bool | None]] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        session: psycopg.Connection[Any] | None = None
        while not self._end.wait(PAUSE):
            try:
                if session is None:
                    session = psycopg.connect(**self.conninfo, connect_timeout=2, autocommit=True)
                row = session.execute("SELECT pg_is_in_recovery()").fetchone()
                assert row is not None
                self._note(row[0])
            except psycopg.OperationalError:
                if session is not None:
                    session.close()
                session = None
                self._note(None)
        if session is not None:
            session.close()

    def _note(self, state: bool | None) -> None:
        if not self.seen or self.seen[-1][1] != state:
            self.seen.append((time.monotonic(), state))

    def promoted_after(self, at: float) -> float | None:
        """Return when it became a primary after a time, or None."""
        return next((when for when, state in self.seen if state is False and when > at), None)


@contextmanager
def watching(layout: Any) -> Iterator[dict[str, Watch]]:
    """Watch all members for the block."""
    watches = {
        member.name: Watch(member.name, layout.conninfo(member.port, "postgres", "postgres"))
        for member in layout.members
    }
    for watch in watches.values():
        watch.start()
    try:
        yield watches
    finally:
        for watch in watches.values():
            watch.stop()
