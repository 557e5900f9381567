"""A pool that keeps no connection: each lease opens one, and its end closes it.

For a pooler beside the process, which keeps the connections already. `NoPool` has the methods that
`Pool` calls on its `PsycopgPool`, and none of psycopg_pool's workers and queues. Nothing limits the
number of connections but the code that asks for them; a task that asks waits only until one is
open.

A connection is opened by a task of the pool's, which inherits nothing from the task that asks. If
that one is cancelled meanwhile, the connection is closed as soon as it is open.
"""

from __future__ import annotations

import asyncio
from typing import Any

from .pooled import AsyncConnection
from .psycopg_pool_adapter import PsycopgPool, PsycopgPoolClosed, PsycopgPoolTimeout

#: How many attempts to connect may be under way at a time, while none fails.
MAX_ATTEMPTS = 16

#: psycopg_pool's `max_size` for no limit.
_NO_LIMIT = 2**31


class NoPool(PsycopgPool):
    """Opens a connection for each lease, and closes it afterwards."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "min_size": 0, "max_size": _NO_LIMIT})
        self._attempt_slots = asyncio.Semaphore(MAX_ATTEMPTS)
        #: The tasks that wait for a connection, and those that open one for them.
        self._waiters: dict[asyncio.Task[AsyncConnection], asyncio.Task[Any] | None] = {}

    async def open(self, wait: bool = False, timeout: float = 30.0) -> None:
        """Mark the pool as open; there is nothing to start."""
        self._opened, self._closed = True, False

    # --- Opening a connection ---

    async def getconn(self, timeout: float | None = None) -> AsyncConnection:
        """Open a connection; raise the reason why none could be opened within `timeout` seconds."""
        if self._closed:
            raise PsycopgPoolClosed(f"the pool {self.name!r} is closed")
        stats = self._stats
        stats[self._REQUESTS_NUM] += 1
        opening = self.owner.start(self._open_one())
        self._waiters[opening] = asyncio.current_task()
        opening.add_done_callback(self._count)
        self._nconns += 1
        began = self.loop.time()
        try:
            await asyncio.wait([opening], timeout=timeout)
            return self._result_of(opening)
        except BaseException as exc:
            stats[self._REQUESTS_ERRORS] += not isinstance(exc, GeneratorExit)
            opening.cancel()
            if opening.done():
                self._close_unused(opening)
            else:
                opening.add_done_callback(self._close_unused)
            raise
        finally:
            stats[self._REQUESTS_WAIT_MS] += int(1000 * (self.loop.time() - began))
            del opening  # else a cycle: its error, the traceback, this frame

    def _result_of(self, opening: asyncio.Task[AsyncConnection]) -> AsyncConnection:
        if not opening.done():
            raise PsycopgPoolTimeout("no connection was opened in time")
        if opening.cancelled() or self._closed:
            raise PsycopgPoolClosed(f"the pool {self.name!r} is closed")
        return opening.result()

    def _count(self, opening: asyncio.Task[AsyncConnection]) -> None:
        """Forget a task that opens a connection; count none if it has failed."""
        self._waiters.pop(opening, None)
        if opening.cancelled() or opening.exception() is not None:
            self._nconns -= 1

    def _close_unused(self, opening: asyncio.Task[AsyncConnection]) -> None:
        """Close the connection that was opened for a task which does not wait for it any more."""
        if not opening.cancelled() and opening.exception() is None:
            self._drop(opening.result())

    async def _open_one(self) -> AsyncConnection:
        """Open a connection; wait an outage out for as long as it may be waited out."""
        while True:
            try:
                return await self._attempt()
            except Exception as exc:
                if self.attempts.may_try_again():
                    continue
                if not self.outages.may_be_waited_out():
                    self.outages.refused()
                    raise self._repeat(exc) from exc.__cause__
            await asyncio.sleep(max(self.attempts.too_soon(), 0.001))

    async def _attempt(self) -> AsyncConnection:
        """Make an attempt to connect; after a failure, only one at a time."""
        if self.attempts.failure is not None:
            async with self._only_attempt:
                if self.attempts.failure is not None:
                    return await self._connect_once(None)
        return await self._connect_once(None)

    # --- The end of a connection ---

    def put_free(self, connection: AsyncConnection) -> bool:
        """Close a connection whose lease is over."""
        self._drop(connection)
        return True

    async def putconn(self, conn: AsyncConnection) -> None:
        """Close a connection whose lease is over."""
        self._drop(conn)

    def replace(self, connection: AsyncConnection) -> None:
        """Close a dead connection, and count it as lost."""
        self._stats[self._CONNECTIONS_LOST] += 1
        self._drop(connection)

    def _drop(self, connection: AsyncConnection) -> None:
        if connection in self.made:
            self.made.discard(connection)
            self._nconns -= 1
        connection.close_now()

    # --- Those who wait ---

    def waiting(self) -> int:
        """Return how many tasks wait for a connection."""
        return len(self._waiters)

    def waiting_tasks(self) -> list[asyncio.Task[Any]]:
        """Return the tasks that wait for a connection. May be called in any thread."""
        return [task for task in list(self._waiters.values()) if task is not None]

    def is_waiting(self, task: asyncio.Task[Any]) -> bool:
        """Return False: no task waits for another one's connection."""
        return False

    def renew(self) -> None:
        """Do nothing: each lease opens a connection anyway."""

    def abandon(self) -> None:
        """Mark the pool as closed, and cancel the attempts that are under way."""
        super().abandon()
        for opening in list(self._waiters):
            if not opening.get_loop().is_closed():
                opening.cancel()
