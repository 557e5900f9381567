"""Adapts psycopg_pool: all code that overrides or uses private parts of its async pool.

`psycopg_pool.AsyncConnectionPool` opens, expires and replaces connections, and queues the tasks
that wait for one. `PsycopgPool` is that pool with a few of its private methods overridden, each for
the reason that its docstring or comment gives:

- connections are taken, given back, and waited for without a coroutine where none is needed
  (`take_free`, `put_free`, `wait_free`: shortcuts, beside psycopg_pool's own way);
- the queue looks for deadlocks, and knows the task of each client that waits (`waiting.py`);
- the tasks that wait for a connection are told why none can be made (`_connect`, `attempts.py`);
- a cancellation is never swallowed, and never loses a slot of the pool (`waiting.py`,
  `_getconn_unchecked`, `worker`);
- connections can be replaced all at once (`renew`), and the pool ends without waiting (`abandon`).

No other module imports psycopg_pool.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from time import monotonic
from types import CodeType
from typing import Any, Protocol, Self

import psycopg_pool
from psycopg_pool.base import AttemptWithBackoff
from psycopg_pool.pool_async import (
    AddConnection,
    MaintenanceTask,
    ReturnConnection,
    StopWorker,
    WaitingClient,
)

from . import errors
from .attempts import MAX_ATTEMPTS, Attempts, Making, forget_connecting, repeat
from .bridge import Portal
from .connecting import Trial
from .outages import Outages, is_unclear, one_line
from .pooled import AsyncConnection
from .refusals import is_refusing
from .server_changes import LOOK_LIMIT, ServerChanges
from .shortcuts import switches
from .tallies import Tally
from .waiting import Alarm, QueueOwner, TimedByQueue, WaitingQueue
from .withdrawing import Withdrawing

logger = logging.getLogger("pgbackend.driver")

#: The errors of psycopg_pool, for which `Pool` raises errors of its own.
PsycopgPoolTimeout = psycopg_pool.PoolTimeout
PsycopgPoolFull = psycopg_pool.TooManyRequests
PsycopgPoolClosed = psycopg_pool.PoolClosed

#: How often at most a connection is made anew: see `_connect_up_to_date()`.
MAX_REMAKES = 4


#: The shortest limit on the user's `check`, in seconds. A task that has waited for long may have
#: less time left: but with less, the check of a sound connection would fail, and close it.
SHORTEST_CHECK = 0.5

#: Seconds between two looks at what the servers have told of themselves.
LOOK_INTERVAL = 1.0


class OwnersOptions(Protocol):
    """Protocol of the part of `PoolOptions` that a `PsycopgPool` uses."""

    @property
    def raised_as_is(self) -> tuple[type[Exception], ...]:
        """Return the errors that tasks get as they are."""
        ...


class Owner(QueueOwner, Protocol):
    """Protocol of the part of a `Pool` that its `PsycopgPool` uses."""

    closed: bool
    tally: Tally

    @property
    def options(self) -> OwnersOptions:
        """Return the options that the pool was made with."""
        ...

    async def configure(self, physical: AsyncConnection, /) -> None:
        """Set up a new connection."""

    def call_at_home(self, func: Callable[[], None], /) -> bool:
        """Make the pool's loop call `func` soon; return False if the loop is closed."""

    def put(self, physical: AsyncConnection, /) -> None:
        """Give a connection back to psycopg_pool, without waiting."""

    def start(self, coro: Coroutine[Any, Any, Any], /) -> asyncio.Task[Any]:
        """Start a task that inherits nothing from the running code."""

    def run_owned(self, coro: Coroutine[Any, Any, Any], physical: AsyncConnection, /) -> None:
        """Start a task of the pool that works on `physical`."""


class _WorkerCancelled(BaseException):
    """Stops a worker that was cancelled while it connected; no error is logged."""


class _GreenWaiter(TimedByQueue, WaitingClient[AsyncConnection]):
    """A client in the queue that waits in a greenlet.

    psycopg_pool wakes a client by its `_cond`, which is here the client itself.
    """

    __slots__ = ("deadline", "future", "since")

    conn: AsyncConnection | None

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.conn = None
        self.error = None
        self.future = loop.create_future()
        self.deadline = self.since = 0.0

    @property
    def _cond(self) -> Self:  # type: ignore[override]  # nobody sets it
        return self


class PsycopgPool(Withdrawing, psycopg_pool.AsyncConnectionPool[AsyncConnection]):
    """psycopg_pool's async pool, with some methods overridden, for the `Pool` that owns it."""

    owner: Owner
    _waiting: WaitingQueue

    def __init__(self, owner: Owner, *, outage_grace: float, **kwargs: Any) -> None:
        super().__init__(
            connection_class=AsyncConnection, configure=owner.configure, open=False, **kwargs
        )
        self.owner = owner
        #: The dictionary of psycopg_pool's counters.
        self.counters: Mapping[str, int] = self._stats
        self._waiting = WaitingQueue(owner)
        #: All connections that were made and still exist: free, leased, being checked or reset.
        self.made: weakref.WeakSet[AsyncConnection] = weakref.WeakSet()
        #: The connections that are being made, for `renew()`.
        self._being_made: set[Making] = set()
        #: The connections on which the user's `check` runs: no longer free, and not leased yet.
        self.checking: set[AsyncConnection] = set()
        #: When to look next at what the servers have told of themselves.
        self._look_at = 0.0
        self.attempts = Attempts()
        self.outages = Outages(self.name, outage_grace)
        self.changes = ServerChanges(self, look_limit=min(LOOK_LIMIT, self.timeout / 4))
        #: The attempts under way.
        self._trials: set[Trial] = set()
        #: Held by an attempt to connect while the pool has no open connection.
        self._only_attempt = asyncio.Lock()
        self._attempt_slots = asyncio.Semaphore(MAX_ATTEMPTS)
        self._regrowing: asyncio.TimerHandle | None = None
        configure: Any = owner.configure
        self._preparing: CodeType = configure.__code__

    @property
    def is_open(self) -> bool:
        """Return whether the pool was ever opened; True even if it has been closed since."""
        return self._opened

    def _start_workers(self) -> None:
        scheduler: Any = self._sched
        scheduler._event = Alarm()  # noqa: SLF001
        super()._start_workers()

    @classmethod
    async def worker(cls, q: asyncio.Queue[MaintenanceTask]) -> None:
        """Run the maintenance tasks from `q` until the pool is closed or this worker is cancelled.

        psycopg_pool's own worker goes on if it is cancelled while it connects; asyncio.run(), which
        cancels each task once and waits for its end, would then never return.
        """
        worker = asyncio.current_task()
        assert worker is not None
        while not worker.cancelling() and not isinstance(task := await q.get(), StopWorker):
            try:
                await task.run()
            except _WorkerCancelled:
                return
            except Exception as exc:
                logger.warning("pool task %s failed: %s: %s", task, type(exc).__name__, exc)

    # --- Taking a connection, and giving it back ---

    def take_free(self, now: float) -> AsyncConnection | None:
        """Take a free connection, as `getconn()` would, but without an await.

        Returns None if none is free, or if the caller must call `getconn()`: the user has set a
        `check`, psycopg_pool's lock is held, the pool is closed, or the shortcut `lease` is off.
        Takes the connection that came back last (psycopg_pool takes the one that came back first):
        the memory of its server process is still in the processor's caches. But a firewall may drop
        a connection that is silent for long; so one that has been free for more than `max_idle` is
        taken first. `now` is `monotonic()`.
        """
        free = self._pool
        if (
            not free
            or not switches.lease
            or self._check
            or self.owner.closed
            or self._lock.locked()
        ):
            return None
        self._stats[self._REQUESTS_NUM] += 1
        if now - free[0].free_since > self.max_idle:
            self.owner.pulse.start(self.owner.loop)  # see `is_at_rest()`
            connection = free.popleft()
        else:
            connection = free.pop()
        if (left := len(free)) < self._nconns_min:  # for psycopg_pool to decide when to shrink
            self._nconns_min = left
        connection._pool = self  # noqa: SLF001
        return connection

    def is_at_rest(self) -> bool:
        """Return whether all connections are free, and have been so for more than `max_idle`.

        Then the pulse sleeps: the next connection is taken by `getconn()`, or in a branch of
        `take_free()` that few leases take, so that to wake the pulse costs the others nothing.
        """
        free = self._pool
        if len(free) != self._nconns or self._waiting:
            return False
        return not free or monotonic() - free[0].free_since > self.max_idle

    def wait_free(self, portal: Portal, timeout: float, began: float) -> AsyncConnection | None:
        """Wait for a connection, as `getconn()` would, but by parking `portal`.

        Returns None at once if the caller must call `getconn()`: for example, the pool has to be
        opened or to grow, or the user has set a `check`. Raises `PsycopgPoolTimeout` after
        `timeout` seconds, or another error that the client was given. `began` is when the caller
        asked for a connection, by `monotonic()`.
        """
        if not switches.queue or not self._opened or self._closed or self._nconns < self._max_size:
            return None
        if self._check or self.max_waiting or self._pool or timeout <= 0 or self._lock.locked():
            return None
        stats, queue = self._stats, self._waiting
        stats[self._REQUESTS_NUM] += 1
        waiter = _GreenWaiter(self.owner.loop)
        queue.append(waiter)
        # The garbage collector may have given a connection back before the waiter was in the queue.
        if self._pool and queue.withdraw(waiter):
            stats[self._REQUESTS_NUM] -= 1
            return self.take_free(began)
        stats[self._REQUESTS_QUEUED] += 1
        task = asyncio.current_task()  # asked now: `finally` may run in another task
        try:
            queue.time(waiter, timeout)
            if not portal.wait_for(waiter.future):
                waiter.error = PsycopgPoolTimeout("no connection came in time")
            if waiter.error is not None:
                raise waiter.error
        except BaseException as exc:
            stats[self._REQUESTS_ERRORS] += not isinstance(exc, GeneratorExit)
            self._leave_queue(waiter)
            raise
        finally:
            queue.by_task.pop(task, None)
            stats[self._REQUESTS_WAIT_MS] += int(1000 * (monotonic() - began))
            del task  # else a cycle: task, its cancellation, the traceback, this frame
        connection = waiter.conn
        assert connection is not None
        connection._pool = self  # noqa: SLF001 - as `getconn()` does
        return connection

    async def _getconn_unchecked(self, timeout: float) -> AsyncConnection:
        if self._closed:  # since `getconn()` began: it calls this again after a failed check
            raise PsycopgPoolClosed(f"the pool {self.name!r} is closed")
        task = asyncio.current_task()
        deadline = monotonic() + timeout
        try:
            connection = await super()._getconn_unchecked(timeout)
            # A check on a silent link leaves time for another connection.
            connection.check_limit = max(SHORTEST_CHECK, (deadline - monotonic()) / 2)
            return connection
        except GeneratorExit:
            # psycopg_pool cleans up after a cancellation, but not when the coroutine is closed.
            self._leave_queue(self._waiting.by_task.get(task))
            raise
        except RuntimeError:
            # On Python 3.11, a second cancellation leaves psycopg_pool's condition broken. A task
            # that gives a connection to this client would wait for that lock for ever.
            if task is None or not task.cancelling():
                raise
            client = self._waiting.by_task.get(task)
            if client in self._waiting:
                self._waiting.remove(client)
            raise asyncio.CancelledError from None
        finally:
            self._waiting.by_task.pop(task, None)
            del task  # else a cycle: task, its cancellation, the traceback, this frame

    async def _check_connection(self, conn: AsyncConnection) -> None:
        self.checking.add(conn)
        try:
            async with asyncio.timeout(conn.check_limit if self._check else None):
                await super()._check_connection(conn)
        except TimeoutError:
            conn.close_now()
            self.changes.look_at_free()  # the link of the others is probably silent, too
            raise
        finally:
            self.checking.discard(conn)

    def _leave_queue(self, client: WaitingClient[AsyncConnection] | None) -> None:
        """Mark `client` as not waiting any more; give back a connection that it has just got."""
        if client is None:
            return
        if client.conn is not None:
            self.run_task(ReturnConnection(self, client.conn, from_getconn=True))
        client.error = client.error or errors.PoolClosed("the task that waited was closed")

    def put_free(self, connection: AsyncConnection) -> bool:
        """Take an idle connection back; return False if the caller must call `putconn()`."""
        now = monotonic()
        if self._look_at <= now and not self._closed:  # also while the shortcut is off
            self._look_at = now + LOOK_INTERVAL
            self.changes.look_at_what_was_told()
        if not switches.lease or self._reset or self._closed or self._lock.locked():
            return False
        if connection._expire_at <= now:  # noqa: SLF001
            return False
        connection._pool = None  # noqa: SLF001
        while self._waiting:
            client = self._waiting.popleft()
            if client.conn is None and client.error is None:
                client.conn = connection
                client._cond.notify_all()  # noqa: SLF001 - as psycopg_pool does
                return True
        connection.free_since = now
        self._pool.append(connection)
        return True

    def replace(self, connection: AsyncConnection) -> None:
        """Close a dead connection, count it as lost, and let psycopg_pool open another for it.

        Awaits nothing: the caller may be unable to wait, and its slot of the pool must not be lost.
        """
        connection._pool = None  # noqa: SLF001
        connection.close_now()
        self._stats[self._CONNECTIONS_LOST] += 1
        self.run_task(AddConnection(self))

    async def _return_connection(self, conn: AsyncConnection, from_getconn: bool) -> None:
        if conn.closed and not from_getconn:
            # psycopg_pool would log a warning; the code that closed the connection has told why.
            self._stats[self._RETURNS_BAD] += 1
            self.run_task(AddConnection(self))
        else:
            await super()._return_connection(conn, from_getconn)

    # --- Clients that wait ---

    def waiting(self) -> int:
        """Return how many clients wait."""
        return sum(client.error is None for client in list(self._waiting))

    def is_waiting(self, task: asyncio.Task[Any]) -> bool:
        """Return whether `task` waits for a connection of this pool."""
        return self._waiting.has(task)

    def waiting_tasks(self) -> list[asyncio.Task[Any]]:
        """Return the tasks that wait for a connection of this pool. May be called in any thread."""
        return [task for task in list(self._waiting.by_task) if task and self.is_waiting(task)]

    def make_room(self) -> None:
        """Remove the clients that have given up, if the queue has `max_waiting` clients.

        `getconn()` would count them, and refuse the next client.
        """
        if self.max_waiting and len(self._waiting) >= self.max_waiting:
            for client in [client for client in self._waiting if client.error is not None]:
                self._waiting.remove(client)

    async def _fail_waiting(self, error: Callable[[], Exception]) -> None:
        """Make each client that waits raise an error; `error()` is called to make one for each."""
        waiting = list(self._waiting)
        self._waiting.clear()
        for client in waiting:
            await client.fail(error())

    # --- Connecting ---

    def check_failure(self) -> None:
        """Raise the error of the last attempt to connect if it is too soon for another attempt.

        Does nothing if any connection is open, or if the outage may be waited out.
        """
        failure = self.attempts.recent_failure()
        if failure is None or self.outages.may_be_waited_out() or self.serves():
            return
        self.outages.refused()
        raise self._repeat(failure)

    def describe_connecting(self) -> str:
        """Return what is known of failed attempts and of those under way, or an empty string."""
        said = [str(trial) for trial in self._trials]
        if self.attempts.failure is not None:
            said.append(f"the last attempt failed ({one_line(self.attempts.failure)})")
        return "; ".join(said)

    def _repeat(self, failure: Exception) -> Exception:
        return repeat(failure, self.owner.options.raised_as_is)

    async def _connect(self, timeout: float | None = None) -> AsyncConnection:
        try:
            if self.has_connection():
                return await self._connect_once(timeout)
            async with self._only_attempt:
                return await self._connect_once(timeout)
        except asyncio.CancelledError:
            raise _WorkerCancelled from None
        except Exception as exc:
            await self._tell_waiting(exc)
            raise

    async def _connect_once(self, timeout: float | None) -> AsyncConnection:
        async with self._attempt_slots:
            # An earlier attempt may have failed while this one waited.
            if (failure := self.attempts.recent_failure()) is not None:
                raise self._repeat(failure)
            began = self.attempts.begin()
            self._trials.add(trial := Trial())
            try:
                connection = await self._connect_up_to_date(timeout)
                await self.changes.try_new(connection)
            except Exception as exc:
                forget_connecting(exc, self._preparing)
                serves = self.serves()
                asks = not serves and is_unclear(exc) and trial.params
                refuses = bool(asks) and await is_refusing(trial.params)
                self.attempts.note_failure(exc, began)
                if self.attempts.failure is not None:
                    self.outages.attempt_failed(exc, serves=serves, refuses=refuses)
                raise
            finally:
                self._trials.discard(trial)
        self.owner.tally.connecting.add(monotonic() - began)
        self.attempts.note_success()
        self.outages.connected()
        self.made.add(connection)
        connection.changes = self.changes
        self.changes.made(connection)
        return connection

    async def _connect_up_to_date(self, timeout: float | None) -> AsyncConnection:
        """Make a connection; make it anew if `renew()` is called meanwhile, for a new adapter.

        If its own set-up registers the adapter, it is made anew only once: the next set-up may
        register one again. If other code does (two loops may set up connections at once), it is
        made anew up to `MAX_REMAKES` times; if that is not enough, the last one is returned, though
        outdated, and is closed at the end of its first lease.
        """
        making = Making(id(asyncio.current_task()))
        connect = partial(super()._connect, timeout)
        self._being_made.add(making)
        try:
            connection = await self.owner.pulse.twice_if_blocked(connect)
            for remade in range(MAX_REMAKES):
                if not making.renewed_by_others and (remade or not making.renewed_by_itself):
                    break
                connection.close_now()
                making.renewed_by_others = False
                connection = await self.owner.pulse.twice_if_blocked(connect)
            if making.renewed_by_others:
                connection._expire_at = 0.0  # noqa: SLF001 - for psycopg_pool, when it comes back
        finally:
            self._being_made.discard(making)
        return connection

    async def _tell_waiting(self, exc: Exception) -> None:
        """Make the clients that wait raise `exc`, with which an attempt to connect has failed.

        If any connection is open, or if the outage may be waited out, they go on waiting instead,
        and the pool tries to connect again as soon as it may. Nothing is done after a failure that
        does not delay the next attempt (`Attempts.note_failure()`): that attempt is made at once.
        """
        if self.attempts.failure is None:
            return
        if not self.serves() and not self.outages.may_be_waited_out():
            self.outages.refused(self.waiting())
            await self._fail_waiting(lambda: self._repeat(exc))
        elif self._regrowing is None:
            delay = max(self.attempts.too_soon(), 0.001)
            self._regrowing = self.owner.loop.call_later(delay, self._grow_again)

    def _grow_again(self) -> None:
        """Start an attempt to connect if clients still wait.

        psycopg_pool itself would start one only when another client asks for a connection.
        """
        self._regrowing = None
        if not self.owner.closed and self.waiting():
            self._maybe_grow_pool()

    async def _add_connection(
        self, attempt: AttemptWithBackoff | None, growing: bool = False
    ) -> None:
        if self.reconnect_timeout:
            await super()._add_connection(attempt, growing=growing)
        else:
            await self._add_connection_once(growing)
        if self._waiting and self.attempts.may_try_again():
            self._maybe_grow_pool()

    async def _add_connection_once(self, growing: bool) -> None:
        """Make one attempt to connect, and add the connection to the pool.

        psycopg_pool would make a second attempt at once, and log two warnings for each failure.
        """
        try:
            connection = await self._connect()
        except Exception:
            async with self._lock:
                self._nconns -= 1
                self._growing = self._growing and not growing
            await self.reconnect_failed()
            return
        await self._add_to_pool(connection)
        if not growing:
            return
        async with self._lock:
            if self._nconns < self._min_size or (self._nconns < self._max_size and self._waiting):
                self._nconns += 1
                self.run_task(AddConnection(self, growing=True))
            else:
                self._growing = False

    # --- The end of connections ---

    def renew(self) -> None:
        """Make sure that later leases get connections made after this call; await nothing.

        Free connections are closed now, leased ones at the end of their lease, and connections that
        are being made are made anew (`_connect_up_to_date()`). New ones are opened on demand.
        """
        task_id = id(asyncio.current_task()) if asyncio._get_running_loop() else 0
        for making in self._being_made:
            making.note(task_id)
        for connection in self.made:
            self.expire(connection)
        for connection in self.withdraw(lambda _: True):
            self.discard(connection)
        while self._opened and not self._closed and self._nconns < self._min_size:
            self._nconns += 1
            self.run_task(AddConnection(self))

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop of the pool."""
        return self.owner.loop

    def call_at_home(self, func: Callable[[], None]) -> bool:
        """Make the pool's loop call `func` soon; return False if the loop is closed."""
        return self.owner.call_at_home(func)

    def start(self, coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Start a task of the pool."""
        return self.owner.start(coro)

    def run_owned(self, coro: Coroutine[Any, Any, Any], connection: AsyncConnection) -> None:
        """Start a task of the pool that works on `connection`, which was withdrawn."""
        self.owner.run_owned(coro, connection)

    async def replace_withdrawn(self, connection: AsyncConnection) -> None:
        """Close a connection that was withdrawn; make one attempt to open another in its place."""
        connection._pool = None  # noqa: SLF001
        connection.close_now()
        try:
            await self._add_connection_once(growing=False)
        except _WorkerCancelled:
            raise asyncio.CancelledError from None

    def abandon(self) -> None:
        """Mark the pool as closed and cancel its tasks, without waiting; close no connection."""
        self._closed = True
        self._waiting.stop_timing()
        self.changes.stop()
        self._pool.clear()
        for task in [*self._workers, self._sched_runner]:
            if task is not None and not task.get_loop().is_closed():
                task.cancel()

    def fail_waiting_soon(self, error: Exception) -> None:
        """Start a task that makes the waiting clients raise `error`; the loop must be open."""
        if self._waiting:
            self.owner.loop.create_task(self._fail_waiting(lambda: error))
