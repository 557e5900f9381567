"""The queue of tasks that wait for a connection, and the conditions by which they are woken.

psycopg_pool keeps the clients that wait in a deque, and wakes each by a condition of asyncio's.
`WaitingQueue` stands in for that deque: it looks for a deadlock before a client waits, knows which
task each client belongs to, and has one timer for all that wait in a greenlet. The conditions stand
in for asyncio's, which on Python 3.11 may swallow a cancellation.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, Protocol


class QueueOwner(Protocol):
    """The pool that a queue belongs to, as the queue knows it."""

    loop: asyncio.AbstractEventLoop

    def check_deadlock(self, task: asyncio.Task[Any], /) -> None:
        """Raise `PoolDeadlock` if `task`, which begins to wait, would wait for itself."""


class Notified:
    """Stands in for the `asyncio.Condition` by which psycopg_pool notifies a client.

    It needs no lock, since nothing is awaited between the steps that a lock would guard. (Python
    3.11's `wait_for()`, cancelled twice, would let go of a lock that it does not hold, and swallow
    a cancellation that comes together with the connection.)
    """

    __slots__ = ()

    future: asyncio.Future[bool]
    """True when the client is served, or failed; False when its time is over."""

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, *exc_info: object) -> None:
        pass

    def notify_all(self) -> None:
        """Wake the client, which has a connection or an error now."""
        if not self.future.done():
            self.future.set_result(True)

    def time_out(self) -> None:
        """Wake the client, whose time is over."""
        if not self.future.done():
            self.future.set_result(False)


class Condition(Notified):
    """The condition of a client that waits in a coroutine."""

    __slots__ = ("future",)

    def __init__(self) -> None:
        self.future = asyncio.get_running_loop().create_future()

    async def wait_timeout(self, timeout: float) -> bool:
        """Wait until the client is notified; return False if `timeout` has passed before."""
        timer = self.future.get_loop().call_later(timeout, self.time_out)
        try:
            return await self.future
        finally:
            timer.cancel()


class TimedByQueue(Notified):
    """A client that is its own condition, and lets the queue watch its time: see `WaitingQueue`."""

    __slots__ = ()

    conn: object
    """The connection that has come for the client."""
    error: BaseException | None
    """The reason why none will come."""
    deadline: float
    """The time until which the client waits, by the clock of the loop."""


class Alarm(asyncio.Event):
    """Wakes psycopg_pool's scheduler, in the place of its own subclass of `asyncio.Event`.

    Its own swallows, on Python 3.11, a cancellation which comes together with the event: the loop
    that ends would then wait for the scheduler for ever.
    """

    async def wait_timeout(self, timeout: float) -> bool:
        """Wait until the event is set; return False if `timeout` has passed before."""
        try:
            async with asyncio.timeout(timeout):
                return await self.wait()
        except TimeoutError:
            return False


class WaitingQueue(deque[Any]):
    """The clients that wait, and the task that each belongs to.

    A client that waits in a coroutine has a timer of its own; for those that wait in a greenlet
    (`TimedByQueue`), the queue has one.
    """

    def __init__(self, owner: QueueOwner) -> None:
        super().__init__()
        self.owner = owner
        #: The client of each task; those that do not wait any more are among them for a moment.
        self.by_task: dict[asyncio.Task[Any] | None, Any] = {}
        #: Rings at the deadline of one place; those behind it wait at least as long.
        self._timer: asyncio.TimerHandle | None = None

    def append(self, client: Any) -> None:
        """Let `client`, of the running task, wait. Raises `PoolDeadlock`."""
        task = asyncio.current_task()
        assert task is not None
        self.owner.check_deadlock(task)
        self.by_task[task] = client
        if not isinstance(client, TimedByQueue):
            client._cond = Condition()  # noqa: SLF001
        super().append(client)

    def withdraw(self, client: TimedByQueue) -> bool:
        """Take out a client that has just been put in; False if it has been served meanwhile."""
        if client.conn is not None:
            return False
        self.remove(client)
        self.by_task.pop(asyncio.current_task(), None)
        return True

    def time(self, place: TimedByQueue, timeout: float) -> None:
        """See that `place` waits no longer than `timeout`: one timer for the whole queue."""
        loop = self.owner.loop
        place.deadline = loop.time() + timeout  # type: ignore[misc]  # the class of it has a slot
        if self._timer is None:
            self._timer = loop.call_later(timeout, self._time_out)

    def stop_timing(self) -> None:
        """Let the timer ring no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time_out(self) -> None:
        """Wake the places whose deadline has passed, and set the timer to the next one."""
        self._timer = None
        loop = self.owner.loop
        now = loop.time()
        for place in self:
            if isinstance(place, TimedByQueue) and place.error is None and place.conn is None:
                if place.deadline > now:
                    self._timer = loop.call_later(place.deadline - now, self._time_out)
                    return
                place.time_out()

    def has(self, task: asyncio.Task[Any]) -> bool:
        """Tell whether `task` waits: it has neither been served, nor given up."""
        client = self.by_task.get(task)
        return client is not None and client.conn is None and client.error is None
