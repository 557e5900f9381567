"""The queue of tasks that wait for a connection, and the conditions by which they are woken.

psycopg_pool keeps the clients that wait (`WaitingClient`) in a deque, and wakes each by an
`asyncio.Condition`. `WaitingQueue` stands in for that deque: it looks for a deadlock before a
client waits, knows the task of each client, and has one timer for all clients that wait in a
greenlet. The conditions stand in for asyncio's, which on Python 3.11 may swallow a cancellation.
"""

from __future__ import annotations

import asyncio
from collections import deque
from time import monotonic
from typing import Any, Protocol

from .pulse import Pulse


class QueueOwner(Protocol):
    """Protocol of the part of a pool that its queue uses."""

    loop: asyncio.AbstractEventLoop

    @property
    def pulse(self) -> Pulse:
        """Return what knows for how long the loop was blocked: see pulse.py."""
        ...

    def check_deadlock(self, task: asyncio.Task[Any], /) -> None:
        """Raise `PoolDeadlock` if no connection could come back while `task` waits for one.

        That is so if `task` and all holders would then wait for each other.
        """


class Notified:
    """Base class of the stand-ins for the `asyncio.Condition` by which psycopg_pool wakes a client.

    It needs no lock, since nothing is awaited between the steps that a lock would guard. (Python
    3.11's `wait_for()`, cancelled twice, releases a lock that it does not hold; and it swallows a
    cancellation that comes together with the connection.)
    """

    __slots__ = ()

    future: asyncio.Future[bool]
    """Its result is True if the client got a connection or an error, False if its time is over."""

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, *exc_info: object) -> None:
        pass

    def notify_all(self) -> None:
        """Wake the client, because it was given a connection or an error."""
        if not self.future.done():
            self.future.set_result(True)

    def time_out(self) -> None:
        """Wake the client, because its time is over."""
        if not self.future.done():
            self.future.set_result(False)


class Condition(Notified):
    """The condition of a client that waits in a coroutine."""

    __slots__ = ("_deadline", "_pulse", "_since", "_timer", "future")

    _timer: asyncio.TimerHandle

    def __init__(self, pulse: Pulse) -> None:
        self._pulse = pulse
        self.future = asyncio.get_running_loop().create_future()

    async def wait_timeout(self, timeout: float) -> bool:
        """Wait until `notify_all()`; return True, or False if `timeout` seconds passed first.

        The client gets more time if the loop was blocked meanwhile.
        """
        self._since = monotonic()
        self._deadline = self._since + timeout
        self._time(timeout)
        try:
            return await self.future
        finally:
            self._timer.cancel()

    def _time(self, seconds: float) -> None:
        self._timer = self.future.get_loop().call_later(seconds, self._look)

    def _look(self) -> None:
        left = self._deadline + self._pulse.extra_time(self._since) - monotonic()
        if left > 0.001:  # the timers of some loops are that exact
            self._time(left)
        else:
            self.time_out()


class TimedByQueue(Notified):
    """Base class of a client that waits in a greenlet; the queue wakes it at its deadline.

    It is its own condition: psycopg_pool wakes it by calling `notify_all()` on it.
    """

    __slots__ = ()

    conn: object
    """The connection that the client was given, or None."""
    error: BaseException | None
    """The reason why the client will get no connection, or None."""
    deadline: float
    """The time until which the client waits, by the clock of the loop, if that is not blocked."""
    since: float
    """When the client began to wait, by `monotonic()`."""


class Alarm(asyncio.Event):
    """An event that wakes psycopg_pool's scheduler; used instead of psycopg_pool's own class.

    On Python 3.11 that class swallows a cancellation that comes together with the event. Then
    `asyncio.run()`, at its end, would wait for the scheduler for ever.
    """

    async def wait_timeout(self, timeout: float) -> bool:
        """Wait until the event is set; return True, or False if `timeout` seconds passed first."""
        try:
            async with asyncio.timeout(timeout):
                return await self.wait()
        except TimeoutError:
            return False


class WaitingQueue(deque[Any]):
    """A deque of the clients that wait, which also knows the task of each.

    A client that waits in a coroutine has a timer of its own; the clients that wait in a greenlet
    (`TimedByQueue`) share one timer of the queue's.
    """

    def __init__(self, owner: QueueOwner) -> None:
        super().__init__()
        self.owner = owner
        #: The client of each task that waits; it may stay here for a moment after the wait.
        self.by_task: dict[asyncio.Task[Any] | None, Any] = {}
        #: Fires at the deadline of one client; the clients behind it wait at least as long.
        self._timer: asyncio.TimerHandle | None = None

    def append(self, client: Any) -> None:
        """Add the running task's `client`; raise `PoolDeadlock` if it would wait there for ever."""
        task = asyncio.current_task()
        assert task is not None
        self.owner.check_deadlock(task)
        self.by_task[task] = client
        if not isinstance(client, TimedByQueue):
            client._cond = Condition(self.owner.pulse)  # noqa: SLF001
        super().append(client)

    def withdraw(self, client: TimedByQueue) -> bool:
        """Remove `client` from the queue; return False if it was given a connection before."""
        if client.conn is not None:
            return False
        self.remove(client)
        self.by_task.pop(asyncio.current_task(), None)
        return True

    def time(self, place: TimedByQueue, timeout: float) -> None:
        """Make the queue's timer wake the client `place` if it still waits after `timeout` s."""
        loop = self.owner.loop
        place.deadline = loop.time() + timeout  # type: ignore[misc]  # the class of it has a slot
        place.since = monotonic()  # type: ignore[misc]
        if self._timer is None:
            self._timer = loop.call_later(timeout, self._time_out)

    def stop_timing(self) -> None:
        """Cancel the timer: no client is woken at its deadline any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time_out(self) -> None:
        """Wake the clients whose deadline has passed, and set the timer to the next deadline.

        A client gets more time if the loop was blocked while it waited.
        """
        self._timer = None
        loop = self.owner.loop
        now = loop.time()
        left: list[float] = []
        for place in self:
            if isinstance(place, TimedByQueue) and place.error is None and place.conn is None:
                if place.deadline > now:
                    left.append(place.deadline - now)
                    break
                more = place.deadline + self.owner.pulse.extra_time(place.since) - now
                if more > 0:
                    left.append(more)
                else:
                    place.time_out()
        if left:
            self._timer = loop.call_later(min(left), self._time_out)

    def has(self, task: asyncio.Task[Any]) -> bool:
        """Return whether `task` waits; False once it was given a connection or an error."""
        client = self.by_task.get(task)
        return client is not None and client.conn is None and client.error is None
