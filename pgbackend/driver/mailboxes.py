"""Queues what a listener gets, notifications and gaps, up to a bound."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from time import monotonic
from typing import Literal

import psycopg

#: How many items a listener may be behind, unless it asks for another number.
QUEUE_SIZE = 1000


@dataclass(frozen=True, slots=True)
class Notification:
    """A message that somebody sent with NOTIFY."""

    channel: str
    payload: str
    pid: int
    """The process of the database server whose session sent it."""


@dataclass(frozen=True, slots=True)
class Gap:
    """Tells that notifications may have been missed until now: read the state anew.

    The first item of each listener is one. It begins to listen without a past, so the same code
    reads the state at the beginning and after a lost connection.
    """

    reason: Literal["started", "reconnected", "overflow"]
    """``started``: the listener's first item. ``reconnected``: the connection was lost, and another
    one listens now. ``overflow``: the listener was too slow, and its queue was emptied."""


class Mailbox:
    """The queue of one listener, which a hub fills and one task empties.

    It holds at most `size` items. When it is full, all of them give way to one `Gap`.
    """

    def __init__(self, channels: Iterable[str], size: int = QUEUE_SIZE) -> None:
        self.channels = frozenset(channels)
        self.size = size
        self.asked_at = monotonic()
        #: Whether the server has confirmed LISTEN for all channels, on the connection of now.
        self.in_force = False
        #: Whether it ever has.
        self.started = False
        self.closed = False
        #: Why the hub has closed the mailbox; None if its listener has.
        self.error: Exception | None = None
        self._items: deque[Notification | Gap] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def begin(self) -> None:
        """Record that LISTEN is in force, and tell the gap before it."""
        gap = Gap("reconnected" if self.started else "started")
        self.started = self.in_force = True
        self._append(gap)

    def put(self, notification: Notification) -> None:
        """Add `notification`; before LISTEN is in force, the gap that will be told covers it."""
        if self.in_force:
            self._append(notification)

    def _append(self, item: Notification | Gap) -> None:
        if self.closed:
            return
        if len(self._items) >= self.size:
            self._items.clear()
            item = Gap("overflow")
        self._items.append(item)
        self._wake()

    def close(self) -> None:
        """Forget the items, because the listener leaves."""
        self._items.clear()
        self.fail(None)

    def fail(self, error: Exception | None) -> None:
        """Take nothing more; `take()` returns the items that are left, and then raises `error`."""
        if not self.closed:
            self.closed, self.error = True, error
            self._wake()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done() and not waiter.get_loop().is_closed():
            waiter.set_result(None)

    async def ready(self) -> None:
        """Wait until LISTEN was in force once; raise the error if it cannot be."""
        while not self.started:
            if self.closed:
                raise self.error or psycopg.InterfaceError("this listener is closed")
            await self._change()

    async def take(self) -> Notification | Gap:
        """Wait for the next item, and return it.

        Raises `StopAsyncIteration` after `close()`. A cancellation loses no item.
        """
        while not self._items:
            if self.closed:
                raise self.error or StopAsyncIteration
            await self._change()
        return self._items.popleft()

    async def _change(self) -> None:
        if self._waiter is not None:
            raise RuntimeError(
                "another task waits for this listener's next item: let each task listen by itself"
            )
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
