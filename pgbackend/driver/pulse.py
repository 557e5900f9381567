"""Tells for how long code has blocked a pool's event loop: one timer for each pool, which is late.

The timer sleeps while the pool is at rest, so that an idle process is not woken; the pool starts it
again when a connection is asked for.

While the loop is blocked, nobody who waits can be served. So that time does not count for those who
wait for a connection (`Pulse.extra_time()`), and the error of those who get none names it.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import TypeVar

import psycopg

T = TypeVar("T")

#: A beat that comes so many seconds late tells that the loop was blocked; less is a busy loop.
LATE = 0.1

#: What those who wait get in addition, in seconds, if the loop was blocked: all who waited go on at
#: the same time, and connections may have to be opened first.
TO_CATCH_UP = 1.0


#: Returns what is known to have blocked a loop after a time (by `monotonic()`), for messages; None:
#: nobody watches. blocking.py sets it.
blocker: Callable[[float], str | None] | None = None


class Pulse:
    """A timer that beats at an interval while its pool is open, and notes how late each beat is.

    `on_beat` is called at each beat, with how late it is, if that was a block, else 0.0. If
    `may_sleep()` is true at a beat, it is the last one until `start()`. `since`, the argument of
    some methods, is a time by `monotonic()`.
    """

    def __init__(
        self,
        interval: float,
        on_beat: Callable[[float], None],
        may_sleep: Callable[[], bool] = lambda: False,
    ) -> None:
        self.interval = interval
        self._may_sleep = may_sleep
        self._on_beat = on_beat
        self._timer: asyncio.TimerHandle | None = None
        #: When the next beat is due.
        self._due = 0.0
        #: When each of the last blocks ended, and how long the beat was late.
        self._blocks: deque[tuple[float, float]] = deque(maxlen=64)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to beat on `loop`, the running one, unless the timer beats already."""
        if self._timer is None:
            self._beat_again(loop, contextvars.Context())

    def stop(self) -> None:
        """Beat no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def overdue(self) -> float:
        """Return for how long the loop has been blocked until now; 0.0 if it is not blocked.

        May be called in any thread.
        """
        if self._timer is None:
            return 0.0
        late = monotonic() - self._due
        return late if late > LATE else 0.0

    def blocked(self, since: float) -> float:
        """Return for how many seconds the loop was blocked after `since`, at least."""
        ended = sum(min(late, end - since) for end, late in self._blocks if end > since)
        return ended + min(self.overdue(), max(0.0, monotonic() - since))

    def told(self, since: float) -> str:
        """Return a part of a sentence that says for how long the loop was blocked, or ""."""
        blocked = self.blocked(since)
        if not blocked:
            return ""
        by = None if blocker is None else blocker(since)
        cure = (
            "the setting PGBACKEND_SLOW_STEP makes the logger 'pgbackend.blocking' name the code"
            if by is None
            else f"by {by}, as the logger 'pgbackend.blocking' has told"
        )
        return f"; the event loop was blocked for {blocked:.2f} s meanwhile: {cure}"

    def extra_time(self, since: float) -> float:
        """Return how many seconds a wait that began at `since` may take beyond its timeout."""
        blocked = self.blocked(since)
        return blocked + TO_CATCH_UP if blocked else 0.0

    async def twice_if_blocked(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Return the result of `attempt()`; repeat it if it timed out because of a blocked loop."""
        began = monotonic()
        try:
            return await attempt()
        except psycopg.errors.ConnectionTimeout:
            if not self.blocked(began):
                raise
        return await attempt()

    def _beat_again(
        self, loop: asyncio.AbstractEventLoop, context: contextvars.Context | None = None
    ) -> None:
        self._due = monotonic() + self.interval
        self._timer = loop.call_later(self.interval, self._beat, loop, context=context)

    def _beat(self, loop: asyncio.AbstractEventLoop) -> None:
        late = self.overdue()
        if late:
            self._blocks.append((monotonic(), late))
        if self._may_sleep():
            self._timer = None
        else:
            self._beat_again(loop)
        self._on_beat(late)
