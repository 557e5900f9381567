"""Means of waiting: green code parks its greenlet, other code blocks its thread.

A `Waiter` lets one caller wait until it is woken; a `ParkingLock` is a lock whose callers wait so.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, TypeAlias

from .bridge import current, current_task

#: The running task, or None, and the identity of the running thread.
Caller: TypeAlias = tuple[Any, int]


def caller() -> Caller:
    """Return the running task, or None, and the identity of the running thread."""
    return current_task(), threading.get_ident()


class Waiter:
    """One caller that waits until another calls `wake()`; a green caller parks its greenlet.

    `wake()` may be called from any thread, and more than once.
    """

    __slots__ = ("_event", "_future", "_loop", "_portal")

    def __init__(self) -> None:
        self._portal = current()
        if self._portal is None:
            self._event = threading.Event()
        else:
            self._loop = asyncio.get_running_loop()
            self._future: asyncio.Future[bool] = self._loop.create_future()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for `wake()`; return True, or False if `timeout` seconds passed first."""
        if self._portal is None:
            return self._event.wait(timeout)
        timer = None if timeout is None else self._loop.call_later(timeout, self._set, False)
        try:
            return self._portal.wait_for(self._future)
        finally:
            if timer is not None:
                timer.cancel()

    def wake(self) -> None:
        if self._portal is None:
            self._event.set()
        elif asyncio._get_running_loop() is self._loop:
            self._set(True)
        else:
            try:
                self._loop.call_soon_threadsafe(self._set, True)
            except RuntimeError:  # the loop was closed: nobody waits any more
                pass

    def _set(self, value: bool) -> None:
        if not self._future.done():
            self._future.set_result(value)


class ParkingLock:
    """A fair lock whose waiters park their greenlet, or block their thread when not green.

    Waiters get the lock in the order of arrival. A waiter that is interrupted just after it was
    given the lock passes it on. While the lock is free, to acquire it costs little more than the
    `threading.Lock` inside, on which no thread ever blocks.
    """

    __slots__ = ("_lock", "_waiters", "on_free", "refuse")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiters: deque[Waiter] = deque()
        #: Called each time the lock becomes free, in the thread that releases it.
        self.on_free: Callable[[], None] | None = None
        #: Called before and after each wait for the lock; raises an error to refuse the caller.
        self.refuse: Callable[[], None] | None = None

    def acquire(self) -> None:
        if self._waiters or not self._lock.acquire(False):
            self._queue()

    def _queue(self) -> None:
        self._maybe_refuse()
        waiter = Waiter()
        self._waiters.append(waiter)
        if self._lock.acquire(False):  # released before the waiter was queued: wake the first
            self.release()
        try:
            waiter.wait()
            self._maybe_refuse()
        except BaseException:
            self._withdraw(waiter)
            raise

    def _maybe_refuse(self) -> None:
        if (refuse := self.refuse) is not None:
            refuse()

    def _withdraw(self, waiter: Waiter) -> None:
        try:
            self._waiters.remove(waiter)
        except ValueError:
            self.release()  # given the lock already: pass it on

    def release(self, *exc_info: object) -> None:
        waiters = self._waiters
        while True:
            if not waiters:
                self._lock.release()
                # A caller in another thread may have queued just before: it saw the lock held.
                if not waiters or not self._lock.acquire(False):
                    # Read into a variable: another thread may set it to None meanwhile.
                    if (on_free := self.on_free) is not None:
                        on_free()
                    return
            try:
                waiter = waiters.popleft()
            except IndexError:  # withdrawn by another thread, just now
                continue
            waiter.wake()
            return

    def locked(self) -> bool:
        return self._lock.locked()

    __enter__ = acquire
    __exit__ = release  # the same function, to save a call: each statement takes the lock
