"""Pools of connections, one for each (process, event loop, name), and the leases they give.

The connections are kept by `psycopg_pool.AsyncConnectionPool`: it opens and replaces them, expires
them, and queues who waits. The layer here adds what it cannot promise by itself:

- a lease ends without an await, so that no cancellation can come between a task and the return of
  its connection (`Pool.release`);
- a connection that the server has closed is noticed before a statement is sent, without a ping;
- why a connection could not be made reaches those who wait for it, at once;
- so does that none can come, when all holders wait for each other (`deadlock`);
- what one lease left in its session does not reach the next one (`Pool._restore`);
- the pool ends with its event loop, and does not cross a fork.
"""

from __future__ import annotations

import asyncio
import contextvars
import copy
import inspect
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Any, Literal, TypeAlias

import psycopg
import psycopg_pool
from psycopg.pq import PipelineStatus, TransactionStatus
from psycopg_pool.base import AttemptWithBackoff
from psycopg_pool.pool_async import (
    AddConnection,
    MaintenanceTask,
    ReturnConnection,
    StopWorker,
    WaitingClient,
)

from . import bridge, deadlock, errors, events
from .connection import LEASE_ENDED, ConnectArguments, Connection
from .exits import stand_still_at_exit
from .finalizers import check_not_collecting, is_collecting
from .forks import after_fork
from .pooled import AsyncConnection
from .recovery import CLEANUP_BUDGET
from .shortcuts import switches
from .statement_cursors import Result, result_of
from .unpooled import forget_own_connections
from .vouching import vouching

logger = logging.getLogger("pgbackend.driver")

#: Seconds for which a failed attempt to connect answers for the next ones, when the pool has no
#: connection at all: at most two attempts a second reach a server that is down.
FAILURE_WINDOW = 0.5

#: How many attempts to connect may be made at once, and in a second when none succeeds.
MAX_ATTEMPTS = 2

#: How often a connection is made anew because of what is registered while it is made.
MAX_REMAKES = 4

#: Seconds to wait until the thread of another loop has closed its pool.
CLOSE_TIMEOUT = 5.0

_IDLE = TransactionStatus.IDLE
_UNKNOWN = TransactionStatus.UNKNOWN

#: Says what a cursor must be prepared by, if it must be, on a connection with these adapters.
Adapting: TypeAlias = Callable[[Any], Callable[[Any], None] | None]

SessionReset: TypeAlias = Literal["always", "dirty", "never"]


@dataclass(frozen=True, slots=True)
class PoolOptions:
    """What a pool is made of."""

    connect: Mapping[str, Any]
    """Arguments of `AsyncConnection.connect()`."""
    pool: Mapping[str, Any]
    """Arguments of `psycopg_pool.AsyncConnectionPool`, by its own names."""
    initialise: Callable[[Connection], None]
    """Prepares the session of a new connection, green; called again after a reset."""
    session_reset: SessionReset = "dirty"
    """When a session is reset after a lease: see `Pool._restore`."""
    soiled_unless_vouched: bool = False
    """Whether a statement makes its lease dirty that nobody vouches for: see vouching.py."""

    def __repr__(self) -> str:
        return f"<PoolOptions {dict(self.pool)!r}>"  # what is left out holds the password


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """A pool at one moment, and its counters since it was opened."""

    alias: str
    """The name of the pool: the alias of the database."""
    min_size: int
    max_size: int
    size: int
    """Connections that are open, or being opened."""
    leased: int
    """Connections that a task holds."""
    idle: int
    """Connections that are free."""
    waiting: int
    """Tasks that wait for a connection."""
    requests: int
    """Leases asked for."""
    requests_queued: int
    """Leases that had to wait."""
    requests_wait_ms: int
    """Time spent waiting for leases, in milliseconds."""
    requests_errors: int
    """Leases that could not be given."""
    connections_made: int
    """Connections opened, or tried to."""
    connections_errors: int
    """Connections that could not be opened."""
    connections_lost: int
    """Connections found dead in the pool."""


class Lease:
    """One task's hold on a connection, from its first statement to the end of the last.

    It ends with the last of its holders: open cursors, pins, and statements in flight. See Note
    [Holders].

    Note [Holders]
    Each kind of holder is counted in one place: cursors in `cursors`, pins in `pins`. A statement
    is in flight as long as the connection's lock is held, which psycopg holds from the first byte
    that is sent to the last that is read (of a COPY or a stream, to its end). So what ends while a
    statement is in flight (a cursor that the garbage collector frees, an iterator that another task
    closes) only takes itself out of the count, and the statement's own end ends the lease
    (`ParkingLock.on_free`).

    `end()` is for who knows that nobody needs the connection any more: the end of a transaction, or
    of the task. It refuses at once whatever comes after it; but a statement that another task waits
    for right now is not touched: the connection goes back when that has ended.
    """

    __slots__ = (
        "__weakref__",
        "_connection",
        "_given_back",
        "cursors",
        "dirty",
        "ended",
        "heir",
        "on_end",
        "opened_at",
        "physical",
        "pins",
        "pool",
        "since",
        "task",
        "types_seen",
    )

    def __init__(self, pool: Pool, physical: AsyncConnection) -> None:
        self.pool = pool
        self.physical = physical
        self.since = monotonic()
        #: Who holds it: on whom it depends when it ends. None: a thread, or nobody any more.
        self.task = asyncio.current_task()
        self.pins = 0
        #: By number, whether the cursor is the server's: what is left of such a one stays in its
        #: session. None until there is a connection to make one on.
        self.cursors: dict[int, bool] | None = None
        #: Whether something may have changed the state of the session.
        self.dirty = False
        self.ended = False
        self._given_back = False
        self.on_end: Callable[[], None] | None = None
        #: To whom it passes when its task ends; the driver only keeps it.
        self.heir: Any = None
        #: Where the last cursor was opened, for messages.
        self.opened_at: str | None = None
        self._connection: Connection | None = None
        #: Whether somebody has looked at its types, and so may have registered one.
        self.types_seen = False
        pool.leases[id(self)] = weakref.ref(self)

    @property
    def connection(self) -> Connection:
        """The twin that the holder uses; made when first asked for."""
        if self._connection is None:
            if self.ended:
                raise errors.LeaseEnded(LEASE_ENDED)
            self.cursors = {}
            self._connection = self.physical.twin.lend(self)
        return self._connection

    def __repr__(self) -> str:
        state = "ended" if self.ended else f"held for {monotonic() - self.since:.2f} s"
        return f"<Lease of {self.pool.name!r} by {self.holder!r}, {state}>"

    def __del__(self) -> None:
        if not self._given_back:
            self.ended = True
            self._note_streams()
            self._give_back()

    @property
    def holder(self) -> str:
        """The name of who holds it, for messages."""
        return bridge.name_of(self.task) if self.task is not None else "no task"

    def execute(self, query: Any, params: Any, adapting: Adapting) -> Result:
        """Execute a statement, green, and fetch all its rows, with no cursor left.

        The caller vouches for it, or has marked the lease as dirty. Errors are psycopg's.
        """
        physical, connection = self.physical, self._connection
        adapt = adapting(physical.adapters)
        if adapt is None and physical.makes_cursors_of(connection):
            return physical.run_statement(connection, query, params)
        # A cursor of the user's own class may send more than this.
        with self.connection.cursor() as cursor, vouching((query,)):
            if adapt is not None:
                adapt(cursor)
            cursor.execute(query, params)
            return result_of(cursor)

    def can_wait(self) -> bool:
        """Whether the caller may send a statement: the holder, where something can wait for it."""
        portal = bridge.current()
        if portal is None:
            # Not the collector in a thread, which may be in the midst of a statement of its own.
            return asyncio._get_running_loop() is None and not is_collecting()
        if portal.closing or is_collecting():
            return False
        return asyncio.current_task() is self.task or self.pins > 0

    def is_held_by_cursors(self) -> bool:
        """Whether nothing but an open cursor keeps the lease."""
        return not self.ended and not self.pins

    def cursor_opened(self, cursor: Any) -> None:
        """Count `cursor` as a holder. Raises `LeaseEnded`."""
        if self.cursors is None:
            raise errors.LeaseEnded(LEASE_ENDED)
        if self.ended:
            self.connection.refuse()
        self.cursors[id(cursor)] = cursor.is_on_server

    def cursor_closed(self, cursor: Any) -> None:
        """Count `cursor` no longer; the caller may be the garbage collector, in any thread."""
        if self.cursors is not None:
            self.cursors.pop(id(cursor), None)
        if self.pins or self.cursors or self.ended:
            return
        if threading.get_ident() == self.pool.thread or not self.pool.call_at_home(self._go_on):
            self._go_on()

    def pin(self) -> None:
        """Keep the connection until `unpin()`, also while no cursor is open."""
        self.pins += 1

    def unpin(self) -> None:
        self.pins -= 1
        self.maybe_end()

    def maybe_end(self) -> None:
        """End if nothing holds it any more."""
        if not self.cursors and not self.pins and not self.ended:
            self.end()

    def end(self, reason: str = LEASE_ENDED) -> None:
        """Give the connection back, from any thread, without waiting; see Note [Holders].

        `reason` is what those are told who use it after that.
        """
        if self.ended:
            return
        self.ended = True
        if self.cursors:
            self._note_streams()
        self.task = None  # one that was cancelled keeps the traceback, whose frames know this lease
        if self.on_end is not None:
            self.on_end()
            self.on_end = None
        connection = self._connection
        if connection is not None:
            connection.end_reason, connection.left_open = reason, self.cursors
            if connection.waits_elsewhere or self.physical.watch.future is not None:
                connection.lock.refuse = connection.refuse  # type: ignore[attr-defined]  # as below
                if self._waits_for_statement():
                    return
                connection.lock.refuse = None  # type: ignore[attr-defined]  # they know each other
        self._give_back()

    def end_at_home(self, reason: str = LEASE_ENDED) -> None:
        """Do what `end()` does in the pool's own thread, which sees what is in flight."""
        end = partial(self.end, reason)
        if threading.get_ident() == self.pool.thread or not self.pool.call_at_home(end):
            end()

    def _note_streams(self) -> None:
        """Let the session be reset if a cursor of the server's is open in it."""
        if self.cursors:
            self.dirty = self.dirty or any(self.cursors.values())

    def is_in_thread(self) -> bool:
        """Whether a thread waits for the end of a statement on this connection."""
        return self._connection is not None and self._connection.waits_elsewhere > 0

    def _waits_for_statement(self) -> bool:
        """Whether a statement is in flight, and will look again when it ends."""
        if self._connection is None:
            return False
        lock = self._connection.lock
        if not lock.locked():
            return False
        lock.on_free = self._when_free  # type: ignore[attr-defined]  # a ParkingLock
        if lock.locked():
            return True
        lock.on_free = None  # type: ignore[attr-defined]  # another thread has just released it
        return False

    def _when_free(self) -> None:
        assert self._connection is not None
        self._connection.lock.on_free = None  # type: ignore[attr-defined]  # a ParkingLock
        if self.ended:
            self._connection.end_lease()  # before another thread finds the lock free
            self._connection.lock.refuse = None  # type: ignore[attr-defined]  # they know each other
        if threading.get_ident() == self.pool.thread or not self.pool.call_at_home(self._go_on):
            self._go_on()

    def _go_on(self) -> None:
        """End if nothing holds it any more, or else with the statement that is in flight."""
        held = not self.ended and (self.cursors or self.pins)
        if held or self._given_back or self._waits_for_statement():
            return
        if self.ended:
            self._give_back()
        else:
            self.end()

    def _give_back(self) -> None:
        connection = self._connection
        if connection is not None:
            connection.end_lease()
            # A thread may have begun a statement, when it had looked whether it still could.
            if connection.waits_elsewhere and self._waits_for_statement():
                return
        self._given_back = True
        self.pool.release(self)

    def disown(self) -> None:
        """End in a forked child: the connection is the parent's."""
        self.ended = self._given_back = True
        if self._connection is not None:
            self._connection.end_lease()


class _WorkerCancelled(BaseException):
    """The loop ends while a worker connects: not an error to log, and not one to go on after."""


def _forget_connecting(exc: Exception) -> None:
    """Take the frames that connected out of the traceback: they hold the password, and a socket.

    Those of code that prepared the session stay: it may be the user's.
    """
    traceback = exc.__traceback__
    while traceback is not None and traceback.tb_frame.f_code is not _PREPARING:
        traceback = traceback.tb_next
    if traceback is None:
        exc.__cause__ = exc.__context__ = None
    exc.__traceback__ = traceback


def _is_end_of_session(exc: Exception) -> bool:
    """Whether the server took the connection, and ended the session while it was prepared."""
    if exc.__traceback__ is None:  # `_forget_connecting()` left nothing: it was not made
        return False
    error = exc if isinstance(exc, psycopg.Error) else exc.__cause__
    if not isinstance(error, psycopg.OperationalError):
        return False
    if isinstance(error, psycopg.errors.ConnectionTimeout):
        return False
    # Without a code it is libpq's own: the link was lost without a word.
    return error.sqlstate is None or error.diag.severity_nonlocalized in ("FATAL", "PANIC")


@dataclass(slots=True, eq=False)
class _Making:
    """Notes whether the pool was renewed since a task began to make a connection."""

    task_id: int
    renewed_by_itself: bool = False
    renewed_by_others: bool = False

    def note(self, task_id: int) -> None:
        if task_id == self.task_id:
            self.renewed_by_itself = True
        else:
            self.renewed_by_others = True


class _Notified:
    """What psycopg_pool notifies its client by, in the place of an `asyncio.Condition`.

    Needs no lock, since nothing is awaited between what it guards. (Python 3.11's `wait_for()`,
    cancelled twice, would let go of a lock that it does not hold, and swallow a cancellation that
    comes together with the connection.)
    """

    __slots__ = ()

    future: asyncio.Future[bool]
    """True when the client is served, or failed; False when its time is over."""

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, *exc_info: object) -> None:
        pass

    def notify_all(self) -> None:
        if not self.future.done():
            self.future.set_result(True)

    def time_out(self) -> None:
        if not self.future.done():
            self.future.set_result(False)


class _Condition(_Notified):
    """That of a client which waits in a coroutine."""

    __slots__ = ("future",)

    def __init__(self) -> None:
        self.future = asyncio.get_running_loop().create_future()

    async def wait_timeout(self, timeout: float) -> bool:
        timer = self.future.get_loop().call_later(timeout, self.time_out)
        try:
            return await self.future
        finally:
            timer.cancel()


class _Alarm(asyncio.Event):
    """What psycopg_pool's scheduler sleeps on, in the place of its own subclass.

    That one swallows, on Python 3.11, a cancellation which comes together with the event: the loop
    that ends would then wait for the scheduler for ever.
    """

    async def wait_timeout(self, timeout: float) -> bool:
        try:
            async with asyncio.timeout(timeout):
                return await self.wait()
        except TimeoutError:
            return False


class _Place(_Notified, WaitingClient[AsyncConnection]):
    """The place in the queue of one who waits in a greenlet: the client, and its condition."""

    __slots__ = ("deadline", "future")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.conn = None
        self.error = None
        self.future = loop.create_future()
        #: Until when it waits, by the clock of the loop.
        self.deadline = 0.0

    @property
    def _cond(self) -> Any:  # type: ignore[override]  # nobody sets it
        return self


class _Queue(deque[Any]):
    """psycopg_pool's queue of those who wait, which knows what task each belongs to."""

    def __init__(self, layer: Pool) -> None:
        super().__init__()
        self.layer = layer
        self.by_task: dict[asyncio.Task[Any] | None, Any] = {}
        #: For the place that waits until then; those behind it wait at least as long.
        self._timer: asyncio.TimerHandle | None = None

    def append(self, client: Any) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.layer.check_deadlock(task)
        self.by_task[task] = client
        if type(client) is not _Place:
            client._cond = _Condition()  # noqa: SLF001
        super().append(client)

    def withdraw(self, client: Any) -> bool:
        """Take out a client that has just been put in; False if it has been served meanwhile."""
        if client.conn is not None:
            return False
        self.remove(client)
        self.by_task.pop(asyncio.current_task(), None)
        return True

    def time(self, place: _Place, timeout: float) -> None:
        """See that `place` waits no longer than `timeout`: one timer for the whole queue."""
        loop = self.layer.loop
        place.deadline = loop.time() + timeout
        if self._timer is None:
            self._timer = loop.call_later(timeout, self._time_out)

    def stop_timing(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time_out(self) -> None:
        self._timer = None
        loop = self.layer.loop
        now = loop.time()
        for place in self:
            if type(place) is not _Place or place.error is not None or place.conn is not None:
                continue
            if place.deadline > now:
                self._timer = loop.call_later(place.deadline - now, self._time_out)
                return
            place.time_out()

    def has(self, task: asyncio.Task[Any]) -> bool:
        """Whether `task` waits: it has neither been served, nor given up."""
        client = self.by_task.get(task)
        return client is not None and client.conn is None and client.error is None


class _Psycopg(psycopg_pool.AsyncConnectionPool[AsyncConnection]):
    """psycopg's pool, which tells our layer why it could not connect."""

    layer: Pool
    _waiting: _Queue

    def __init__(self, layer: Pool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.layer = layer
        self._waiting = _Queue(layer)
        #: Those on which the user's `check` runs: no longer free, and not leased yet.
        self.checking: set[AsyncConnection] = set()
        #: Held by an attempt to connect, as long as there is no connection.
        self._attempt = asyncio.Lock()
        self._attempts = asyncio.Semaphore(MAX_ATTEMPTS)

    def _start_workers(self) -> None:
        scheduler: Any = self._sched
        scheduler._event = _Alarm()  # noqa: SLF001
        super()._start_workers()

    async def _getconn_unchecked(self, timeout: float) -> AsyncConnection:
        if self._closed:  # while a connection that it had given was checked
            raise psycopg_pool.PoolClosed(f"the pool {self.name!r} is closed")
        task = asyncio.current_task()
        try:
            return await super()._getconn_unchecked(timeout)
        except GeneratorExit:
            # psycopg_pool tidies up after a cancellation, not after a coroutine that is closed.
            self._leave_queue(self._waiting.by_task.get(task))
            raise
        except RuntimeError:
            # Python 3.11: a second cancellation leaves psycopg_pool's condition in disorder. Who
            # handed a connection to this client would wait for its lock for ever.
            if task is None or not task.cancelling():
                raise
            client = self._waiting.by_task.get(task)
            if client in self._waiting:
                self._waiting.remove(client)
            raise asyncio.CancelledError from None
        finally:
            self._waiting.by_task.pop(task, None)
            del task  # which will know this frame by the traceback of its cancellation

    def take_free(self, now: float) -> AsyncConnection | None:
        """Do what `getconn()` does when it need not wait, without an await; else return None.

        Not in turn, as psycopg_pool takes them: what the last one needs is in the processors'
        caches still, here and on the server. But what lies in between may forget a connection that
        is silent for long, so each that is kept is used now and then.
        """
        free = self._pool
        if (
            not free
            or not switches.lease
            or self._check
            or self.layer.closed
            or self._lock.locked()
        ):
            return None
        self._stats[self._REQUESTS_NUM] += 1
        rested = now - free[0].free_since > self.max_idle
        connection = free.popleft() if rested else free.pop()
        if (left := len(free)) < self._nconns_min:  # what it shrinks by
            self._nconns_min = left
        connection._pool = self  # noqa: SLF001
        return connection

    def wait_free(
        self, portal: bridge.Portal, timeout: float, began: float
    ) -> AsyncConnection | None:
        """Do what `getconn()` does when it must wait, in `portal`, with no coroutine in between.

        Returns None, at once, when there is more to it: a pool to open or to grow, a user's check.
        """
        if not switches.queue or not self._opened or self._closed or self._nconns < self._max_size:
            return None
        if self._check or self.max_waiting or self._pool or timeout <= 0 or self._lock.locked():
            return None
        stats, queue = self._stats, self._waiting
        stats[self._REQUESTS_NUM] += 1
        place = _Place(self.layer.loop)
        queue.append(place)
        # The garbage collector may have given one back, before it could see this place.
        if self._pool and queue.withdraw(place):
            stats[self._REQUESTS_NUM] -= 1
            return self.take_free(began)
        stats[self._REQUESTS_QUEUED] += 1
        task = asyncio.current_task()  # who closes its coroutine may be another one
        try:
            queue.time(place, timeout)
            if not portal.wait_for(place.future):
                place.error = psycopg_pool.PoolTimeout("no connection came in time")
            if place.error is not None:
                raise place.error
        except BaseException as exc:
            stats[self._REQUESTS_ERRORS] += not isinstance(exc, GeneratorExit)
            self._leave_queue(place)
            raise
        finally:
            queue.by_task.pop(task, None)
            stats[self._REQUESTS_WAIT_MS] += int(1000 * (monotonic() - began))
            del task  # which knows this frame by the traceback of its cancellation
        connection = place.conn
        assert connection is not None
        connection._pool = self  # noqa: SLF001 - as `getconn()` does
        return connection

    def put_free(self, connection: AsyncConnection) -> bool:
        """Do what `putconn()` does with an idle connection, if there is no more to it than that."""
        if not switches.lease or self._reset or self._closed or self._lock.locked():
            return False
        now = monotonic()
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

    async def _check_connection(self, conn: AsyncConnection) -> None:
        self.checking.add(conn)
        try:
            await super()._check_connection(conn)
        finally:
            self.checking.discard(conn)

    def _leave_queue(self, client: Any) -> None:
        if client is None:
            return
        if client.conn is not None:
            self.run_task(ReturnConnection(self, client.conn, from_getconn=True))
        client.error = client.error or errors.PoolClosed("the task that waited was closed")

    @classmethod
    async def worker(cls, q: asyncio.Queue[MaintenanceTask]) -> None:
        # psycopg_pool's own goes on after a cancellation that finds it connecting; asyncio.run(),
        # which cancels once and waits, would then never return.
        worker = asyncio.current_task()
        assert worker is not None
        while not worker.cancelling() and not isinstance(task := await q.get(), StopWorker):
            try:
                await task.run()
            except _WorkerCancelled:
                return
            except Exception as exc:
                logger.warning("pool task %s failed: %s: %s", task, type(exc).__name__, exc)

    async def _connect(self, timeout: float | None = None) -> AsyncConnection:
        try:
            if self.layer.has_connection():
                return await self._connect_once(timeout)
            async with self._attempt:
                return await self._connect_once(timeout)
        except asyncio.CancelledError:
            raise _WorkerCancelled from None
        except Exception as exc:
            await self.layer.connect_failed(exc)
            raise

    async def _connect_once(self, timeout: float | None) -> AsyncConnection:
        async with self._attempts:
            self.layer.check_failure()  # of one before, which answers for those who were about to
            self.layer.attempted.append(began := monotonic())
            try:
                connection = await self._connect_up_to_date(timeout)
            except Exception as exc:
                _forget_connecting(exc)
                self.layer.attempt_failed(exc, began)
                raise
        self.layer.attempt_succeeded()
        self.layer.made.add(connection)
        return connection

    async def _connect_up_to_date(self, timeout: float | None) -> AsyncConnection:
        """Make a connection that has all that is registered when it is ready.

        Where its own preparation registers something, it is made anew once: the next preparation
        may register something again, and would without end. Others may, too (two loops whose
        connections each register something): after `MAX_REMAKES`, it serves once as it is.
        """
        making = _Making(id(asyncio.current_task()))
        self.layer.being_made.add(making)
        try:
            connection = await super()._connect(timeout)
            for remade in range(MAX_REMAKES):
                if not making.renewed_by_others and (remade or not making.renewed_by_itself):
                    break
                connection.close_now()
                making.renewed_by_others = False
                connection = await super()._connect(timeout)
            if making.renewed_by_others:
                connection._expire_at = 0.0  # noqa: SLF001 - for psycopg_pool, when it comes back
        finally:
            self.layer.being_made.discard(making)
        return connection

    async def _add_connection(
        self, attempt: AttemptWithBackoff | None, growing: bool = False
    ) -> None:
        if attempt is None and not self.reconnect_timeout:
            # One attempt, made because somebody asks; psycopg_pool would make a second at once.
            attempt = AttemptWithBackoff(timeout=0.0)
            attempt.give_up_at = 1e-9
        await super()._add_connection(attempt, growing=growing)
        if self._waiting and self.layer.may_try_again():
            self._maybe_grow_pool()

    async def _return_connection(self, conn: AsyncConnection, from_getconn: bool) -> None:
        if conn.closed and not from_getconn:
            # psycopg_pool warns; who closed it, and why, was told where it happened.
            self._stats[self._RETURNS_BAD] += 1
            self.run_task(AddConnection(self))
        else:
            await super()._return_connection(conn, from_getconn)

    def waiting(self) -> int:
        return sum(client.error is None for client in list(self._waiting))

    def make_room(self) -> None:
        """Take those who gave up waiting out of a queue that is full of them."""
        if self.max_waiting and len(self._waiting) >= self.max_waiting:
            for client in [client for client in self._waiting if client.error is not None]:
                self._waiting.remove(client)

    async def fail_waiting(self, error: Callable[[], Exception]) -> None:
        waiting = list(self._waiting)
        self._waiting.clear()
        for client in waiting:
            await client.fail(error())

    def drop_free(self) -> None:
        """Close the connections that are free; others are opened when somebody asks for them."""
        while self._pool:
            self._pool.pop().close_now()
            self._nconns -= 1

    def abandon(self) -> None:
        """End without waiting: what `close()` does, when no task can be waited for any more."""
        self._closed = True
        self._waiting.stop_timing()
        self._pool.clear()
        for task in [*self._workers, self._sched_runner]:
            if task is not None and not task.get_loop().is_closed():
                task.cancel()


class Pool:
    """The connections of one name on one event loop. Not thread-safe, except `release()`."""

    def __init__(self, name: str, options: PoolOptions, loop: asyncio.AbstractEventLoop) -> None:
        self.name = name
        self.options = options
        self.loop = loop
        self.thread = threading.get_ident()
        self.closed = False
        self._resets_all = options.session_reset == "always"
        self.soiled_unless_vouched = options.soiled_unless_vouched
        self._resets_dirty = options.session_reset != "never"
        #: By number, with a weak reference: a lease that nobody holds any more must be collected.
        self.leases: dict[int, weakref.ref[Lease]] = {}
        self._failure: tuple[float, BaseException] | None = None
        #: When the server has ended a session while it was prepared: the first since a success.
        self._session_lost: float | None = None
        #: When the last attempts to connect began.
        self.attempted: deque[float] = deque([-1.0] * MAX_ATTEMPTS, MAX_ATTEMPTS)
        self._regrowing: asyncio.TimerHandle | None = None
        #: The connections that are being made, for `renew()`.
        self.being_made: set[_Making] = set()
        #: Every connection: free, leased, or on its way between the two.
        self.made: weakref.WeakSet[AsyncConnection] = weakref.WeakSet()
        #: What the pool still does with connections that were given back.
        self._tasks: dict[asyncio.Task[Any], AsyncConnection] = {}
        self._psycopg = self._make()
        self._opened: asyncio.Future[None] | None = None

    def _make(self) -> _Psycopg:
        return _Psycopg(
            self,
            kwargs=self._connect_arguments(),
            connection_class=AsyncConnection,
            configure=self._configure,
            open=False,
            **{"name": self.name, **self.options.pool},
        )

    def _connect_arguments(self) -> ConnectArguments:
        arguments = ConnectArguments(self.options.connect, autocommit=True)
        if "PGCONNECT_TIMEOUT" not in os.environ:
            # psycopg's default is 130 s: for so long, attempts that meet a silent link would keep
            # their places in the pool, when nobody waits for them any more.
            timeout = self.options.pool.get("timeout", 30.0)
            arguments.setdefault("connect_timeout", max(2, round(timeout)))
        return arguments

    def __repr__(self) -> str:
        s = self.statistics()
        return (
            f"<Pool {self.name!r}: {s.leased} leased, {s.idle} idle, {s.waiting} waiting, "
            f"max_size {s.max_size}>"
        )

    # --- Lease ---

    def lease(self) -> Lease:
        """Take a connection, green. Raises what `errors` says of pools, or the server's error."""
        check_not_collecting()
        started = monotonic()
        physical = self._psycopg.take_free(started) or self._wait(started)
        if physical is None or not physical.is_alive():
            physical = bridge.await_(self._get(started, physical))
        lease = Lease(self, physical)
        if events.hooks:
            waited = lease.since - started
            events.emit(events.Leased(self.name, physical.pid(), waited))
        return lease

    def execute(self, query: Any, params: Any, adapting: Adapting) -> Result:
        """Execute a statement on a connection that is leased for it alone, and fetch all its rows.

        Arguments and errors are those of `Lease.execute()`, and of `lease()`.
        """
        lease = self.lease()
        try:
            return lease.execute(query, params, adapting)
        finally:
            lease.end()

    def _wait(self, started: float) -> AsyncConnection | None:
        """Wait for a connection where nothing needs to be done for it; else return None."""
        portal = bridge.current()
        if portal is None or self.closed:
            return None
        self.check_failure()
        try:
            return self._psycopg.wait_free(portal, self._psycopg.timeout, started)
        except psycopg_pool.PoolTimeout:
            raise self._timed_out(monotonic() - started) from self._cause()
        except psycopg_pool.PoolClosed:
            raise self._closed_error() from None

    async def _get(self, started: float, found: AsyncConnection | None) -> AsyncConnection:
        """Wait for a connection; `found` is a dead one that was free."""
        if found is not None:
            await self._replace(found)
        if self.closed:
            raise self._closed_error()
        while not self._psycopg._opened:  # noqa: SLF001 - who opens it may be cancelled
            await self._open()
        while True:
            self.check_failure()
            self._psycopg.make_room()
            timeout = self._psycopg.timeout - (monotonic() - started)
            try:
                physical = await self._psycopg.getconn(timeout=timeout)
            except psycopg_pool.PoolTimeout:
                raise self._timed_out(monotonic() - started) from self._cause()
            except psycopg_pool.TooManyRequests as exc:
                raise errors.PoolQueueFull(
                    f"{exc}: raise 'max_waiting' or 'max_size' in {self._setting()}"
                ) from None
            except psycopg_pool.PoolClosed:
                raise self._closed_error() from None
            if physical.is_alive():
                return physical
            await self._replace(physical)

    async def _replace(self, physical: AsyncConnection) -> None:
        """Do what psycopg_pool does with one that fails its own check: counted, and replaced."""
        physical.close_now()
        await self._psycopg._putconn(physical, from_getconn=True)  # noqa: SLF001

    async def _open(self) -> None:
        """Open psycopg's pool, with tasks that inherit nothing from the one that came first."""
        if self._opened is None:
            self._opened = self.loop.create_future()
            try:
                await _plain_task(self._psycopg.open(), self.loop)
            except BaseException:
                self._opened.set_result(None)
                self._opened = None
                raise
            self._opened.set_result(None)
        else:
            await asyncio.shield(self._opened)

    # --- Failure ---

    def attempt_failed(self, exc: Exception, began: float) -> None:
        """Remember why an attempt that `began` then has failed, to tell those who ask next.

        A session that the server has ended while it was prepared says nothing about the next
        attempt. It is made at once, for those who wait; should that end so, too, it is remembered.
        """
        now = monotonic()
        self._failure = (now, exc)
        if _is_end_of_session(exc):
            if self._session_lost is None:
                self._session_lost = now
            if began < self._session_lost:  # it was under way when the first was lost, or that one
                self._failure = None

    def attempt_succeeded(self) -> None:
        """Forget why those before have failed."""
        self._failure = self._session_lost = None

    def may_try_again(self) -> bool:
        """Whether an attempt was lost, and the next may be made for those who wait."""
        return self._failure is None and self._session_lost is not None

    async def connect_failed(self, exc: BaseException) -> None:
        """If there is no connection to wait for, fail those who wait."""
        if self._failure is None:
            return
        if not self.has_connection():
            await self._psycopg.fail_waiting(lambda: self._repeat(exc))
        elif self._regrowing is None:
            self._regrowing = self.loop.call_later(FAILURE_WINDOW, self._grow_again)

    def _grow_again(self) -> None:
        """Try again for those who still wait: psycopg_pool would, but for a new request."""
        self._regrowing = None
        if not self.closed and self._psycopg.waiting():
            self._psycopg._maybe_grow_pool()  # noqa: SLF001

    def has_connection(self) -> bool:
        return any(not connection.closed for connection in self.made)

    def check_failure(self) -> None:
        if self._failure is None:
            return
        when, exc = self._failure
        now = monotonic()
        too_soon = now - when < FAILURE_WINDOW or now - self.attempted[0] < 1.0
        if too_soon and not self.has_connection():
            raise self._repeat(exc)

    @staticmethod
    def _repeat(exc: BaseException) -> Exception:
        """The same error as `exc`, for one who asks: each gets a traceback of its own."""
        if not isinstance(exc, psycopg.Error):
            error: Exception = psycopg.OperationalError(f"could not connect: {exc}")
        else:
            error = copy.copy(exc)
        error.__cause__ = exc
        return error

    def _cause(self) -> BaseException | None:
        return self._failure[1] if self._failure else None

    def _setting(self) -> str:
        return f"DATABASES[{self.name!r}]['OPTIONS']['pool']"

    def _closed_error(self) -> errors.PoolClosed:
        return errors.PoolClosed(
            f"the pool {self.name!r} is closed: its event loop ends, or close_pool() was called. "
            "What is started afterwards gets a new one; await what uses the database before"
        )

    def _timed_out(self, waited: float) -> errors.PoolTimeout:
        s = self.statistics()
        now = monotonic()
        holders = ", ".join(
            f"{lease.holder!r} for {now - lease.since:.2f} s" for lease in self.held()
        )
        return errors.PoolTimeout(
            f"couldn't get a connection of {self.name!r} after {waited:.2f} s: {s.leased} of "
            f"{s.max_size} in use, {s.waiting} waiting; held by {holders or 'nobody'}. Raise "
            f"'max_size' or 'timeout' in {self._setting()}, or hold connections for less time"
        )

    # --- Holders ---

    def held(self) -> list[Lease]:
        """The leases that have not ended."""
        return [lease for ref in list(self.leases.values()) if (lease := ref()) is not None]

    def holders(self) -> list[asyncio.Task[Any] | None]:
        """Those of whom one must give a connection back before another task can have one."""
        held = self.held()
        return [lease.task for lease in held] if len(held) >= self._psycopg.max_size else [None]

    def check_deadlock(self, task: asyncio.Task[Any]) -> None:
        """Raise `PoolDeadlock` if `task`, which begins to wait, would wait for itself."""
        if self._newest_works():  # as it does nearly always: then nobody waits for ever
            return
        circle = deadlock.find(task, self.holders(), self._queued)
        if circle is None:
            return
        now = monotonic()
        holders = ", ".join(
            f"{lease.holder!r} (one of {pool.name!r} for {now - lease.since:.2f} s)"
            for pool in self._neighbours()
            for lease in pool.held()
            if lease.task in circle
        )
        raise errors.PoolDeadlock(
            f"task {bridge.name_of(task)!r} would wait for ever for a connection of {self.name!r}: "
            f"all {self._psycopg.max_size} are held by tasks that wait for each other: {holders}. "
            f"Raise 'max_size' in {self._setting()}, or need no second connection while one is "
            "held: let the inner code take part in the transaction instead of being detached, or "
            "run it before or after the block; take the databases in one order everywhere"
        )

    def _newest_works(self) -> bool:
        """Whether the newest lease's holder waits for the server, and for nothing else."""
        for ref in reversed(self.leases.values()):
            lease = ref()
            return lease is not None and deadlock.waits_for(lease.task, lease.physical.watch.future)
        return False

    def _queued(self, task: asyncio.Task[Any]) -> list[asyncio.Task[Any] | None] | None:
        for pool in self._neighbours():
            if pool._psycopg._waiting.has(task):  # noqa: SLF001 - another pool's
                return pool.holders()
        return None

    def _neighbours(self) -> Iterable[Pool]:
        return _by_loop[self.loop].pools.values() if self.loop in _by_loop else [self]

    # --- Release: decide, then act; nothing is awaited by the task that held the lease ---

    def release(self, lease: Lease) -> None:
        """Take back the connection of `lease`, whose end has been marked; from any thread."""
        if threading.get_ident() == self.thread and not self.loop.is_closed():
            self._release(lease)
        elif not self.call_at_home(partial(self._release, lease)):
            self.leases.pop(id(lease), None)
            lease.physical.pgconn.finish()

    def call_at_home(self, func: Callable[[], None]) -> bool:
        """Let the loop call `func`, from another thread; False if the loop is closed."""
        try:
            self.loop.call_soon_threadsafe(func)
        except RuntimeError:
            return False
        return True

    def _release(self, lease: Lease) -> None:
        if self.leases.pop(id(lease), None) is None:
            return  # two threads have found at once that nobody holds it
        physical = lease.physical
        pgconn = physical.pgconn
        status = pgconn.transaction_status
        if events.hooks:
            held = monotonic() - lease.since
            events.emit(events.Released(self.name, physical.pid(), held, status == _UNKNOWN))
        if status == _IDLE and not (self._resets_dirty if lease.dirty else self._resets_all):
            if not self._psycopg.put_free(physical):
                self._put(physical)
        elif status == _UNKNOWN:
            self._put(physical)
        elif self.closed:  # the loop may not live as long as a reset takes
            physical.close_now()
            self._put(physical)
        else:
            resets = self._resets_dirty if lease.dirty else self._resets_all
            self._own(self._restore(physical, resets), physical)

    def _put(self, physical: AsyncConnection) -> None:
        """Hand the connection to psycopg's pool in this very step, if it need not wait.

        If it must (its lock is held for a moment), a task of the pool goes on with it.
        """
        put = self._psycopg.putconn(physical)
        try:
            waits_for = put.send(None)
        except StopIteration:
            return
        self._own(bridge.resume(put, waits_for), physical)

    def _own(self, coro: Coroutine[Any, Any, Any], physical: AsyncConnection) -> None:
        """Run `coro` in a task that belongs to the pool and knows nothing of the caller's."""
        task = _plain_task(coro, self.loop)
        self._tasks[task] = physical
        task.add_done_callback(self._owned_done)

    def _owned_done(self, task: asyncio.Task[Any]) -> None:
        physical = self._tasks.pop(task)
        if task.cancelled() and not physical.closed:
            # Before its first step, by asyncio.run() which ends: nothing else would close it.
            physical.close_now()
            self._put(physical)

    async def _restore(self, physical: AsyncConnection, reset: bool) -> None:
        """Bring a session back to the state of a new one, or close it, and put it back.

        ``DISCARD ALL`` undoes SET, SET ROLE, LISTEN, temporary tables, advisory locks, cursors and
        prepared statements; then the session is prepared like a new one.
        """
        try:
            async with asyncio.timeout(CLEANUP_BUDGET):
                if physical.pgconn.pipeline_status != PipelineStatus.OFF:
                    raise psycopg.InterfaceError("the connection was left in pipeline mode")
                if physical.pgconn.transaction_status == TransactionStatus.ACTIVE:
                    await physical.cancel_safe(timeout=CLEANUP_BUDGET)  # or the server works on
                    raise psycopg.InterfaceError("the connection was left in the midst of a reply")
                await physical.rollback()
                if reset:
                    await physical.execute("DISCARD ALL")
                    physical.twin.forget_handlers()
                    await self._configure(physical)
        except Exception as exc:
            logger.info("closing a connection of %r that could not be reset: %s", self.name, exc)
            physical.close_now()
        except BaseException:
            physical.close_now()
            raise
        finally:
            self._put(physical)

    async def _configure(self, physical: AsyncConnection) -> None:
        limit = max(2.0, self._psycopg.timeout)
        try:
            async with asyncio.timeout(limit):
                await bridge.run(self.options.initialise, physical.twin)
        except TimeoutError:
            physical.close_now()
            raise psycopg.errors.ConnectionTimeout(
                f"the server did not answer within {limit:g} s while a session was prepared"
            ) from None
        except BaseException:
            physical.close_now()
            raise

    def renew(self) -> None:
        """Let nobody lease a connection that is open by now: what they are made with has changed.

        Who holds one keeps it to the end of the lease.
        """
        task_id = id(asyncio.current_task()) if asyncio._get_running_loop() else 0
        for making in self.being_made:
            making.note(task_id)
        for physical in self.made:
            physical._expire_at = 0.0  # noqa: SLF001 - for psycopg_pool, when it comes back
        self._psycopg.drop_free()

    # --- End ---

    def close(self) -> None:
        """Close the connections now, and those in use when they are given back.

        The others are free, or on their way to or from a worker, who is cancelled. Where the loop
        is closed, nobody uses one any more but a thread.
        """
        if self.closed:
            return
        self.closed = True
        self._psycopg.abandon()
        gone = self.loop.is_closed()
        in_use = {id(each.physical) for each in self.held() if not gone or each.is_in_thread()}
        in_use.update(id(each) for task, each in self._tasks.items() if not task.done())
        in_use.update(map(id, self._psycopg.checking))
        for physical in list(self.made):
            if id(physical) not in in_use:
                physical.close_now()
        for task, physical in list(self._tasks.items()):
            coro: Any = task.get_coro()
            if inspect.getcoroutinestate(coro) == inspect.CORO_CREATED:
                physical.close_now()  # a task that is cancelled before its first step does nothing
            task.cancel()
        if not self.loop.is_closed():
            error = self._closed_error()
            if self._psycopg._waiting:  # noqa: SLF001
                self.loop.create_task(self._psycopg.fail_waiting(lambda: error))

    def disown(self) -> None:
        """Leave all to the parent process: not a byte on its sockets, also if code unwinds."""
        self.closed = True
        for lease in self.held():
            lease.disown()
        for physical in list(self.made):
            physical.disown()

    def statistics(self) -> PoolStatistics:
        """Return what the pool does now, and has done since it was opened."""
        stats = self._psycopg.get_stats()
        return PoolStatistics(
            alias=self.name,
            min_size=self._psycopg.min_size,
            max_size=self._psycopg.max_size,
            size=stats["pool_size"],
            leased=len(self.leases),
            idle=stats["pool_available"],
            waiting=self._psycopg.waiting(),
            requests=stats.get("requests_num", 0),
            requests_queued=stats.get("requests_queued", 0),
            requests_wait_ms=stats.get("requests_wait_ms", 0),
            requests_errors=stats.get("requests_errors", 0),
            connections_made=stats.get("connections_num", 0),
            connections_errors=stats.get("connections_errors", 0),
            connections_lost=stats.get("connections_lost", 0),
        )


_PREPARING = Pool._configure.__code__  # noqa: SLF001


def _plain_task(
    coro: Coroutine[Any, Any, Any], loop: asyncio.AbstractEventLoop
) -> asyncio.Task[Any]:
    """Start a task that inherits nothing: no context variables, and no greenlet.

    Nor do the tasks that it starts.
    """
    return asyncio.Task(coro, loop=loop, context=contextvars.Context())


# --- Pools by loop --------------------------------------------------------------------------------


class _LoopPools:
    """The pools of one event loop, which end with it."""

    def __init__(self) -> None:
        self.pools: dict[Any, Pool] = {}
        # An event loop that ends well closes its async generators: that is how we learn of it.
        self._sentinel = self._close_with_loop()
        try:
            self._sentinel.__anext__().send(None)
        except StopIteration:
            pass

    async def _close_with_loop(self) -> AsyncGenerator[None]:
        try:
            yield
        finally:
            tasks = [task for pool in self.pools.values() for task in pool._tasks]  # noqa: SLF001
            self.close()
            if tasks and asyncio._get_running_loop() is not None:
                await asyncio.wait(tasks)  # they are cancelled: a turn of the loop or two

    def close(self) -> None:
        for pool in self.pools.values():
            pool.close()
        self.pools.clear()


_by_loop: dict[asyncio.AbstractEventLoop, _LoopPools] = {}
#: What a forked child inherited: kept, because to collect it could write to the parent's sockets.
_inherited: list[Any] = []


@after_fork
def _forget_pools() -> None:
    for loop_pools in _by_loop.values():
        for pool in loop_pools.pools.values():
            pool.disown()
    _inherited.append(dict(_by_loop))
    _by_loop.clear()
    forget_own_connections()


def get_pool(key: tuple[Any, ...], name: str, options: Callable[[], PoolOptions]) -> Pool:
    """Return the pool for `key` on the running loop; make it from `options()` at first use.

    The key begins with what `close_pools()` knows the pool by.
    """
    loop = asyncio.get_running_loop()
    try:
        return _by_loop[loop].pools[key]
    except KeyError:
        pass
    _sweep()
    if loop not in _by_loop:
        _by_loop[loop] = _LoopPools()
        stand_still_at_exit(loop)
    pool = Pool(name, options(), loop)
    return _by_loop[loop].pools.setdefault(key, pool)


def _sweep() -> None:
    """Close what loops that were closed without a farewell have left."""
    for loop in [loop for loop in _by_loop if loop.is_closed()]:
        _by_loop.pop(loop).close()


def close_pools(owner: Any) -> None:
    """Close the pools whose key begins with `owner`, on all loops; from any thread.

    When it returns, their free connections are closed.
    """
    _sweep()
    for loop, loop_pools in list(_by_loop.items()):
        for key in [key for key in loop_pools.pools if key[0] == owner]:
            _close_on(loop, loop_pools.pools.pop(key))


def _close_on(loop: asyncio.AbstractEventLoop, pool: Pool) -> None:
    if loop is asyncio._get_running_loop() or not loop.is_running():
        pool.close()
        return
    closed = threading.Event()
    loop.call_soon_threadsafe(_close_and_tell, pool, closed)
    closed.wait(CLOSE_TIMEOUT)


def _close_and_tell(pool: Pool, closed: threading.Event) -> None:
    pool.close()
    closed.set()


def renew_pools() -> None:
    """Let connections that are open be replaced, on all loops, before the next lease.

    From any thread; each loop does it in its own.
    """
    _sweep()
    for loop, loop_pools in list(_by_loop.items()):
        for pool in list(loop_pools.pools.values()):
            if loop is asyncio._get_running_loop() or not loop.is_running():
                pool.renew()
            else:
                loop.call_soon_threadsafe(pool.renew)


def statistics() -> list[PoolStatistics]:
    """Return the statistics of every pool of this process, on all its loops."""
    return [
        pool.statistics()
        for loop_pools in list(_by_loop.values())
        for pool in list(loop_pools.pools.values())
        if not pool.closed
    ]
