"""Connections whose waits yield to the event loop when there is one to yield to.

psycopg is sans-IO inside: `psycopg.Connection` and `psycopg.AsyncConnection` run the same
generators and differ in who waits for the socket. `Connection.wait()` is the one place where this
driver decides it: green, the greenlet is parked and the loop serves others; otherwise the thread
blocks. Everything above it, psycopg's cursors, server-side cursors, COPY, executemany and
pipelines, works unchanged in every context.

`AsyncConnection` is what the pool opens, checks and closes. A *twin* is a `Connection` on the same
`pgconn`; the pool lends a fresh one with each lease, so that what a former holder kept of its own
(connection, cursors, COPY) is refused instead of running in somebody else's transaction.

Note [Statements without a twin]
Most statements are the ORM's own, outside of a transaction: executed, fetched, and over. Nobody
ever sees the connection or the cursor of these. So they are run on the twin that is lent to nobody,
and by one cursor, which is as new before each statement; what psycopg has looked up for the same
statement it knows still, unless a holder of a twin has looked at its types meanwhile, and so may
have registered one.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import select
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from operator import is_
from time import monotonic
from types import TracebackType
from typing import Any, NoReturn, Self, TypeAlias, TypeVar

import psycopg
from psycopg import errors as e
from psycopg import generators, waiting
from psycopg._cursor_base import BaseCursor
from psycopg._preparing import PrepareManager
from psycopg._queries import PostgresClientQuery
from psycopg.abc import PQGen
from psycopg.adapt import Transformer
from psycopg.pq import (
    ConnStatus,
    DiagnosticField,
    ExecStatus,
    Format,
    PipelineStatus,
    TransactionStatus,
)
from psycopg.rows import tuple_row
from psycopg.waiting import Ready, Wait

from . import bridge
from .bridge import Portal, current
from .cancellation import (
    deliver_cancellation,
    finish,
    hold_cancellation,
    hold_when_closed,
)
from .errors import LeaseEnded, NothingCommitted, OutcomeUnknown
from .parking import Caller, ParkingLock, caller
from .shortcuts import NO_OTHERS, looking
from .vouching import is_vouched

RV = TypeVar("RV")

logger = logging.getLogger("pgbackend.driver")

#: Seconds for all of the clean-up after a cancellation: cancel on the server, read the rest of
#: the reply, roll back. What is not done by then is cut off by closing the socket. One budget
#: instead of psycopg's 5 s + 5 s, so that a timeout of the user's holds on a silent link too.
CLEANUP_BUDGET = 0.8

#: Seconds that waits which never block may keep the loop busy (COPY, executemany).
MAX_BUSY_TIME = 0.005

_WAIT_INTERVAL = 0.1
_get_running_loop = asyncio._get_running_loop
_running = bridge.running
_CANCEL_INTERVAL = 0.2
_ACTIVE = TransactionStatus.ACTIVE
_IDLE = TransactionStatus.IDLE
_BAD = ConnStatus.BAD
_OK = ConnStatus.OK
_TUPLES_OK = ExecStatus.TUPLES_OK


class _BlockEndedError(LeaseEnded):
    """A statement has waited, and the transaction that it was to be part of has ended: see text."""


#: How many rows a statement has returned or changed, as `Cursor.rowcount`; and those it returned.
Result: TypeAlias = tuple[int, list[tuple[Any, ...]] | None]

BLOCK_ENDED = (
    "the atomic block of this statement has ended in another task, which closed the generator that "
    "the block is in, while the statement waited for the connection"
)
LEASE_ENDED = (
    "this connection went back to the pool and may serve another task by now: take a new cursor, "
    "or keep one connection for a block with 'with pgbackend.pinned():'"
)

#: The methods of a cursor's class that psycopg calls for a statement, from `cursor()` to `close()`.
_OF_A_STATEMENT = (
    *("__init__", "execute", "fetchall", "close", "_execute_gen", "_start_query", "_reset"),
    *("_convert_query", "_maybe_prepare_gen", "_get_prepared", "_execute_send", "_set_results"),
    *("_select_current_result", "_make_row_maker", "_fetch_pipeline", "_check_result_for_fetch"),
    *("_close", "rowcount"),
)
#: The methods of other classes that psycopg calls for a statement.
_FOR_A_STATEMENT = (
    "connection.cursor connection._start_query prepared.maybe_add_to_cache query.__init__ "
    "query.convert query.dump query._ensure_bytes query.validate_and_reorder_params "
    "query.is_params_sequence base.__init__"
)
_seen_for_begin, _BEGIN = looking(
    "begin",
    "connection._start_query connection._exec_command cursor._execute_send",
    connection=psycopg.Connection,
    cursor=psycopg.ClientCursor,
)
_seen_for_cursors, _CURSORS = looking("cursors", "connection.cursor", connection=psycopg.Connection)
_seen_for_blocks, _BLOCKS = looking(
    "blocks",
    "its._set_autocommit its.set_autocommit its._set_autocommit_gen its._check_intrans_gen",
    its=psycopg.Connection,
)
#: Held while a connection has another `cursor_factory` than its own.
_making_cursor = threading.RLock()

#: The connections that no async pool keeps: threads', synchronous pools', copies'.
_own: set[weakref.ref[Connection]] = set()


class ConnectArguments(dict[str, Any]):
    """Arguments of `connect()`, whose values no traceback with local variables shows."""

    def __repr__(self) -> str:
        return f"<arguments {', '.join(self)}>"


class Watch:
    """The readiness of one socket, as seen by one event loop.

    The reader stays registered between waits, since adding and removing it costs two system
    calls; data that arrives when nobody waits (the server's farewell, mostly) only unregisters it.

    Note [Errors of a socket]
    asyncio's own loops tell of an error of the socket (the server reset it) for as long as it is
    registered. uvloop tells it once, as readiness, and then ends the registration, though there
    may be data to read before the error is met. There the socket itself is asked.

    Note [Told twice]
    asyncio's own loops look at the sockets again before the task that was woken has its turn to
    read; so they tell of the same data a second time, when the task waits for the next or for
    nothing. That is passed over. If it was news, they will tell of it again.
    """

    __slots__ = ("errors", "fd", "future", "loop", "reading", "ready", "told", "writing")

    def __init__(self, loop: asyncio.AbstractEventLoop, fd: int) -> None:
        self.loop = loop
        self.fd = fd
        self.future: asyncio.Future[Any] | None = None
        self.reading = False
        self.writing = False
        self.ready = 0
        #: Whether the loop will tell once more of what it has told; see Note [Told twice].
        self.told = False
        self.errors: select.poll | None = None
        if not isinstance(loop, asyncio.BaseEventLoop):
            self.errors = select.poll()
            self.errors.register(fd, 0)  # errors are told unasked

    def wait(self, portal: Portal, state: int, timeout: float | None) -> int:
        """Park `portal` until the socket is ready for `state`; return how it is ready.

        Returns 0 when `timeout` (seconds) passed first.
        """
        self.ready = 0
        if state & Wait.R and not self.reading:
            self.loop.add_reader(self.fd, self._on_readable)
            self.reading = True
        if state & Wait.W:
            self.loop.add_writer(self.fd, self._on_writable)
            self.writing = True
        self.future = future = self.loop.create_future()
        timer = None if timeout is None else self.loop.call_later(timeout, self._wake, 0)
        try:
            portal.wait_for(future)
        finally:
            self.future = None
            if timer is not None:
                timer.cancel()
            if self.writing:
                self._stop_writing()
        return self.ready

    def _stop_writing(self) -> None:
        self.loop.remove_writer(self.fd)
        self.writing = False

    def _wake(self, ready: int) -> None:
        self.ready |= ready
        if self.future is not None and not self.future.done():
            self.future.set_result(None)

    def _on_readable(self) -> None:
        if self.told:
            self.told = False
        elif self.future is None:
            # Nobody waits here: a thread reads this connection, or the server has closed it. The
            # next lease finds out which (`AsyncConnection.is_alive`).
            self.stop()
        else:
            if self.errors is None:
                self.told = True
            elif self.errors.poll(0):  # Note [Errors of a socket]
                self.stop()
            self._wake(Ready.R)

    def _on_writable(self) -> None:
        self._wake(Ready.W)

    def leave(self) -> None:
        """Unregister, from a thread that is about to wait by itself, and may close the socket."""
        if not self.reading or self.loop.is_closed():
            return
        if asyncio._get_running_loop() is self.loop:
            self.stop()
        else:
            self.loop.call_soon_threadsafe(self._stop_if_unused)

    def _stop_if_unused(self) -> None:
        if self.future is None:
            self.stop()

    def stop(self) -> None:
        """Unregister from the loop; must come before the socket is closed.

        Otherwise the number of the socket, used again, would meet a stale registration. A task
        that still waits here, whose connection another one closes, is woken to find it closed.
        """
        self._wake(Ready.R)
        if self.reading:
            self.reading = self.told = False
            if not self.loop.is_closed():
                self.loop.remove_reader(self.fd)


def _nothing() -> PQGen[None]:
    yield from ()


class Connection(psycopg.Connection[Any]):
    """A psycopg connection that is green in a green context, and blocking elsewhere.

    Opened by `connect()` it is a connection of its own, like psycopg's; lent by a pool it is a
    twin, valid until `end_lease()`.
    """

    __module__ = "pgbackend.driver"

    #: The pooled connection that this one is a twin of, or None.
    physical: AsyncConnection | None = None
    #: Called when a cursor of a twin is opened and closed; see `pool.Lease`.
    lease: Any = None
    #: The `prepare_threshold` that each lease begins with.
    given_threshold: int | None = None
    #: What is said to who uses a twin whose lease is over.
    end_reason = LEASE_ENDED
    #: The cursors that were open when its lease ended, as the lease has counted them.
    left_open: dict[int, bool] | None = None
    #: How many waits of a twin do without the watch of the pool: those of threads and other loops.
    waits_elsewhere = 0
    #: What is lent of a twin.
    lent_class: type[Connection]
    #: Whether the end of a transaction waits for the statement of another task, not to tear it.
    ends_in_turn = False
    #: Whether the cursor that is about to send a statement has seen whether it is vouched for.
    has_looked = False
    _lease_ended = False
    _closed_by_holder = False
    _committing = False
    #: When a wait of this process last let the loop serve others; whether one has not since.
    _last_yield = 0.0
    _kept_busy = False

    def __init__(self, pgconn: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(pgconn, *args, **kwargs)
        # Tasks that take part in one transaction share its connection, one at a time, in turn.
        self.lock = ParkingLock()  # type: ignore[assignment]

    @classmethod
    def connect(cls, conninfo: str = "", **kwargs: Any) -> Self:
        """Open a connection of its own; arguments and errors are psycopg's.

        Green, the loop is not blocked while the server answers.
        """
        portal = current()
        if portal is None:
            self = super().connect(conninfo, **kwargs)
        else:
            self = cls._connect_green(conninfo, **kwargs)
        _own.add(weakref.ref(self, _own.discard))
        return self

    @classmethod
    def _connect_green(cls, conninfo: str, **kwargs: Any) -> Self:
        """Let the async connection do what may block (host names too), then take its socket."""
        options = {name: kwargs.pop(name, None) for name in ("cursor_factory", "row_factory")}
        opened = bridge.await_(psycopg.AsyncConnection.connect(conninfo, **kwargs))
        self = cls(opened.pgconn)
        self._autocommit = opened._autocommit  # noqa: SLF001
        self._adapters = opened._adapters  # noqa: SLF001
        self.prepare_threshold = opened.prepare_threshold
        for name, value in options.items():
            if value:
                setattr(self, name, value)
        # Not to be reported as left open: its socket lives on in `self`.
        opened._pool = None  # noqa: SLF001
        return self

    def cursor(
        self, name: str = "", *, binary: bool = False, row_factory: Any = None, **kwargs: Any
    ) -> Any:
        """psycopg's; of a class that is derived from `cursor_factory`, if `own_class` has one."""
        if self.physical is not None or name:  # a twin's factories are made once
            cursor = super().cursor(name, binary=binary, row_factory=row_factory, **kwargs)
            return cursor if self.lease is None else adopt(cursor)
        if self.pgconn.status != _OK:
            self._check_connection_ok()  # raises
        factory: Any = self.cursor_factory
        factory = own_class(factory, self._prepared.prepare_threshold is not None)
        if not all(map(is_, _seen_for_cursors(), _CURSORS)):
            return self._cursor_by_psycopg(
                factory, binary=binary, row_factory=row_factory, **kwargs
            )
        cursor = factory(self, row_factory=row_factory or self.row_factory)
        if binary:
            cursor.format = Format.BINARY
        return cursor

    def _cursor_by_psycopg(self, factory: Any, **kwargs: Any) -> Any:
        """Let psycopg make a cursor of the class `factory`."""
        with _making_cursor:  # of two threads, each would take the other's for the connection's own
            own, self.cursor_factory = self.cursor_factory, factory
            try:
                return super().cursor(**kwargs)
            finally:
                self.cursor_factory = own

    # --- Leases ---

    def lend(self, lease: Any) -> Connection:
        """Return a twin of this twin for `lease`: same session, an identity of its own."""
        twin: Connection = object.__new__(self.lent_class)
        twin.__dict__.update(self.__dict__)
        twin.lease = lease
        twin.lock = ParkingLock()  # type: ignore[assignment]
        twin._listen_alone()
        # A former holder may have changed it; the manager of prepared statements is the session's.
        twin._prepared.prepare_threshold = self.given_threshold
        return twin

    def _listen_alone(self) -> None:
        """Let notices and notifications reach this twin's handlers, and no former holder's."""
        self._notice_handlers = [*self._notice_handlers]
        self._notify_handlers = [*self._notify_handlers]
        self._notifies_backlog = deque()
        assert self.physical is not None
        self.physical.listener = weakref.ref(self)

    def forget_handlers(self) -> None:
        """Let who prepares the session add handlers as to a new connection's."""
        self._notice_handlers.clear()
        self._notify_handlers.clear()

    def __del__(self) -> None:  # type: ignore[override]  # psycopg's argument is its own
        if self.physical is None:  # a twin is not reported as left open: the pool has it
            super().__del__()

    def end_lease(self) -> None:
        """Refuse whatever the holder still tries to do with this connection."""
        assert self.physical is not None
        self.physical.forget_holder(types_seen=self.lease is None or self.lease.types_seen)
        self._lease_ended = True
        self.lease = None  # two that know each other would be the garbage collector's

    def is_waited_for(self) -> bool:
        """Whether somebody waits right now for the end of a statement on this twin."""
        assert self.physical is not None
        return self.waits_elsewhere > 0 or self.physical.watch.future is not None

    def refuse(self) -> NoReturn:
        """Raise what those are told who use a twin whose lease is over."""
        if self._closed_by_holder:
            raise e.OperationalError("the connection is closed")
        raise LeaseEnded(self.end_reason)

    def _check_lease(self) -> None:
        if self._lease_ended:
            self.refuse()

    def _check_connection_ok(self) -> None:
        if self._lease_ended or self._closed_by_holder:
            self.refuse()
        super()._check_connection_ok()

    @property
    def closed(self) -> bool:
        """True if the connection is closed, or its lease is over."""
        return self._lease_ended or self._closed_by_holder or self.pgconn.status == _BAD

    def close(self) -> None:
        """Close the connection to the server; a twin whose lease is over is left alone."""
        if self._lease_ended:
            return
        self._stop_watch()
        super().close()
        self._closed_by_holder = self.physical is not None

    def close_in_turn(self) -> None:
        """Close a twin, whose lease is about to end, after the statement that another waits for.

        Who cannot wait refuses what comes after that; the connection is the pool's to tidy up.
        """
        if not self.is_waited_for():
            self.close()
        elif self.lease is None or self.lease.can_wait():
            with self.lock:
                self.close()
        else:
            self._closed_by_holder = True

    def _stop_watch(self) -> None:
        if self.physical is not None:
            self.physical.watch.stop()

    @contextlib.contextmanager
    def kept_busy(self, what: str, beginner: Caller | None = None) -> Iterator[None]:
        """Refuse other statements of the caller's task in the block, in which it holds the lock.

        They would wait for themselves, for ever; those of `beginner`, whose generator another task
        steps, too. Those of other tasks wait for its end.
        """
        callers = {caller(), beginner}
        lock: Any = self.lock

        def refuse() -> None:
            if caller() not in callers:
                return
            # An exception that has left it lives as long as the step of the task.
            bridge.let_step_end()
            if lock.locked() and not self.is_waited_for():
                raise e.OperationalError(
                    f"another command is already in progress: a {what} that this task has begun. "
                    "Leave its block first, or send the statement from another connection"
                )

        before, lock.refuse = lock.refuse, refuse
        try:
            yield
        finally:
            if lock.refuse is refuse:
                lock.refuse = before

    # --- Waiting: the one switch point ---

    def wait(
        self,
        gen: PQGen[RV],
        interval: float = _WAIT_INTERVAL,
        timeout: float | None = None,
    ) -> RV:
        """Run `gen` to its end: green, by parking the greenlet; otherwise by blocking.

        Raises `LeaseEnded` on a twin whose lease is over, before a byte is sent.
        """
        portal = _running()
        if type(portal) is not Portal:
            physical = self.physical
            if physical is None:
                return super().wait(gen, interval, timeout)
            self._check_lease()
            physical.watch.leave()
            with self._elsewhere():
                self._check_lease()  # again, now that its end would see this wait
                return super().wait(gen, interval, timeout)
        if self._lease_ended:
            self._check_lease()
        bridge.check_may_wait(portal)  # before a byte is sent
        try:
            if Connection._kept_busy:
                self._maybe_yield(portal, gen)
            return self._wait_green(portal, gen, timeout)
        finally:
            if self.pgconn.status == _BAD:
                # libpq closed the socket, in the midst of anything: before its number is used again
                self._stop_watch()

    def _wait_green(self, portal: Portal, gen: PQGen[RV], timeout: float | None) -> RV:
        try:
            state = next(gen)
        except StopIteration as stop:
            Connection._kept_busy = True
            result: RV = stop.value
            return result
        if self.pgconn.status == _BAD:  # the number of its socket may be another one's by now
            self._cut_off(gen)
            raise e.OperationalError("the connection is closed")
        watch = self._find_watch()
        try:
            deadline = None if timeout is None else monotonic() + timeout
            while True:
                ready = self._wait_ready(portal, watch, state, deadline)
                state = gen.send(ready)
                if deadline is not None and monotonic() >= deadline:
                    raise e._WaitTimeout("wait timeout expired")  # noqa: SLF001 - psycopg's own
        except StopIteration as stop:
            result = stop.value
            return result
        except BaseException as exc:
            if isinstance(exc, bridge.INTERRUPTIONS):
                self._clean_up(portal, gen, watch, exc)
            elif self.pgconn.status == _BAD:
                watch.stop()
                self._cut_off(gen)
            raise
        finally:
            Connection._last_yield, Connection._kept_busy = monotonic(), False
            if self.physical is None or watch is not self.physical.watch:
                self.waits_elsewhere -= 1
                watch.stop()

    def _find_watch(self) -> Watch:
        """The watch of this socket on the running loop: the pool's, or one for this wait only.

        A transaction that was begun in a thread, or on another loop, may be waited for here.
        """
        loop = asyncio.get_running_loop()
        if self.physical is not None and self.physical.watch.loop is loop:
            return self.physical.watch
        self.waits_elsewhere += 1  # until it is stopped
        return Watch(loop, self.pgconn.socket)

    @contextlib.contextmanager
    def _elsewhere(self) -> Iterator[None]:
        self.waits_elsewhere += 1
        try:
            yield
        finally:
            self.waits_elsewhere -= 1

    def _wait_ready(self, portal: Portal, watch: Watch, state: int, deadline: float | None) -> int:
        timeout = None if deadline is None else max(0.0, deadline - monotonic())
        try:
            ready = watch.wait(portal, state, timeout)
            if self.pgconn.status == _BAD:
                # By another task meanwhile: psycopg's C code would use what is freed.
                raise e.OperationalError("the connection is closed")
            return ready
        except asyncio.CancelledError as exc:
            if not portal.holding:
                raise
            portal.pending = portal.pending or exc  # Note [Held cancellation]
        return self._wait_held(portal, watch, state)

    def _wait_held(self, portal: Portal, watch: Watch, state: int) -> int:
        """Go on waiting for the end of a transaction whose task was cancelled, within a budget."""
        cut_off = monotonic() + CLEANUP_BUDGET
        while (left := cut_off - monotonic()) > 0:
            try:
                if ready := watch.wait(portal, state, left):
                    return ready
            except asyncio.CancelledError as exc:
                portal.pending = exc
                if watch.ready:  # both came in one turn of the loop
                    return watch.ready
        watch.stop()
        self.pgconn.finish()
        silence = (
            f"the server did not answer within {CLEANUP_BUDGET} s after the task was cancelled"
        )
        if not self._committing:
            raise NothingCommitted(
                f"{silence} while it rolled back, or at a savepoint: nothing was committed; the "
                "connection was closed, and the server rolls back when it notices"
            )
        # The cancellation would hide what must be known: it is the cause of the error instead.
        cancellation, portal.pending = portal.pending, None
        raise OutcomeUnknown(
            f"{silence} while its transaction was committed: it may or may not have been "
            "committed; look before repeating it"
        ) from cancellation

    def _maybe_yield(self, portal: Portal, gen: PQGen[Any]) -> None:
        """Let the loop serve others, if waits that did not block have kept it busy for long.

        Before `gen` has begun: what is interrupted then, psycopg has not done. Not before the end
        of a transaction, which is not torn, nor in a coroutine that is being closed.
        """
        if portal.closing or portal.holding:
            return
        if monotonic() - Connection._last_yield < MAX_BUSY_TIME:
            return
        try:
            portal.suspend(None)
        except bridge.INTERRUPTIONS as exc:
            self._clean_up(portal, gen, None, exc)
            raise
        finally:
            Connection._last_yield, Connection._kept_busy = monotonic(), False
        self._check_lease()  # others had their turn

    # --- Cancellation ---

    def _clean_up(
        self, portal: Portal, gen: PQGen[Any], watch: Watch | None, exc: BaseException
    ) -> None:
        """Bring the connection to rest after a wait was interrupted, or close it.

        `watch` is what was waited for; without one it is the pool's that may be in use.
        """
        pipelined = self.pgconn.pipeline_status != PipelineStatus.OFF
        if self.pgconn.transaction_status != _ACTIVE and not pipelined:
            return
        if watch is None:
            self._stop_watch()
        else:
            watch.stop()
        if portal.closing or not isinstance(exc, asyncio.CancelledError):
            self._cut_off(gen)
            return
        held = portal.pending
        with self._elsewhere():  # a task of its own reads what is left
            finish(self._cancel_and_drain(gen), CLEANUP_BUDGET)
        # A second cancellation says what the first, which is being raised, says already.
        portal.pending = held
        if self.pgconn.transaction_status == _ACTIVE or pipelined:
            logger.info("closing a connection whose statement did not end with its cancellation")
            self._cut_off(gen)

    def _cut_off(self, gen: PQGen[Any]) -> None:
        """Close the socket, and `gen`, whose own clean-up (a pipeline's) has nothing to go by."""
        self.pgconn.finish()
        with contextlib.suppress(psycopg.Error):
            gen.close()

    async def _cancel_and_drain(self, gen: PQGen[Any]) -> None:
        """Cancel the statement and read the rest of its reply; the caller sets the budget."""
        try:
            while not await self._is_cancelled(gen):
                pass
        except e.QueryCanceled:
            pass
        except psycopg.Error as exc:
            logger.debug("error ignored in the clean-up of a cancelled statement: %s", exc)

    async def _is_cancelled(self, gen: PQGen[Any]) -> bool:
        """Ask the server once; False if the request may have come before the statement did."""
        await _ask_to_cancel(self, CLEANUP_BUDGET)
        if self.pgconn.pipeline_status != PipelineStatus.OFF:
            return True  # the rest is answered only after a Sync, which is not sent
        try:
            await waiting.wait_async(gen, self.pgconn.socket, _WAIT_INTERVAL, _CANCEL_INTERVAL)
        except e._WaitTimeout:  # noqa: SLF001 - psycopg's own
            return False
        return True

    def cancel_safe(self, *, timeout: float = 30.0) -> None:
        """Ask the server to cancel what it executes, as psycopg does; green, without blocking.

        psycopg asks, too, where a COPY is left early. `timeout` is in seconds. Raises
        `CancellationTimeout` when the server has not answered by then.
        """
        portal = bridge.running()
        if type(portal) is not Portal:
            super().cancel_safe(timeout=timeout)
            return
        bridge.check_may_wait(portal)
        if not self._should_cancel():
            return
        if portal.holding:  # in the end of a generator, say: what comes now is raised later
            finish(_ask_to_cancel(self, timeout), timeout)
        else:
            bridge.await_(_ask_to_cancel(self, timeout))

    @contextlib.contextmanager
    def cleaning_up(self) -> Iterator[None]:
        """Give psycopg's own clean-up a budget, green: it would wait for a silent server for ever.

        A connection whose statement has not ended by then is closed.
        """
        if current() is None:
            yield
            return
        patched = vars(self)  # on the object, since a look at each wait would cost the others
        patched["wait"] = functools.partial(self.wait, timeout=CLEANUP_BUDGET)
        patched["_try_cancel"] = functools.partial(self._try_cancel, timeout=CLEANUP_BUDGET)
        try:
            yield
        finally:
            del patched["wait"], patched["_try_cancel"]
            if self.pgconn.transaction_status == _ACTIVE:
                self.close()

    # --- Ends of a transaction are never torn: Note [Held cancellation] in cancellation.py ---

    def commit(self) -> None:
        """Commit; a cancellation that arrives meanwhile is raised when it is done."""
        self._committing = True
        try:
            with hold_cancellation():
                super().commit()
        finally:
            self._committing = False
        deliver_cancellation()

    def back_to_autocommit(self) -> None:
        """Do what ``autocommit = True`` does, in one step if nothing has to be waited for."""
        if (
            self.lock.locked()
            or self.pgconn.transaction_status != _IDLE
            or self._lease_ended
            or not all(map(is_, _seen_for_blocks(), _BLOCKS))
        ):
            self.autocommit = True  # waits for its turn, or refuses
        else:
            self._autocommit = True

    def rollback(self) -> None:
        """Roll back; a cancellation that arrives meanwhile is raised when it is done."""
        with hold_cancellation():
            self.cancel_others()
            super().rollback()
        deliver_cancellation()

    def _get_tx_start_command(self) -> bytes:
        # Nothing begins on a connection whose transaction is about to end: a statement that has
        # waited for the connection would be neither in that nor in a block.
        if self.ends_in_turn:
            raise _BlockEndedError(BLOCK_ENDED)
        return super()._get_tx_start_command()

    def cancel_others(self) -> None:
        """Before a rollback: cancel the statement of a task that shares this connection.

        What it does is undone anyway, and who rolls back must not have to wait for its end.
        """
        portal = current()
        if self.ends_in_turn or portal is None or portal.closing:
            return
        if self.lock.locked():
            finish(self._cancel_while_locked(), CLEANUP_BUDGET)

    async def _cancel_while_locked(self) -> None:
        with contextlib.suppress(psycopg.Error):
            while self.lock.locked() and self.pgconn.transaction_status == _ACTIVE:
                await _ask_to_cancel(self, CLEANUP_BUDGET)
                until = monotonic() + _CANCEL_INTERVAL  # it may have come before the statement did
                while self.lock.locked() and monotonic() < until:  # noqa: ASYNC110 - no event
                    await asyncio.sleep(0.001)

    @contextlib.contextmanager
    def _commits(self) -> Iterator[None]:
        self._committing = True
        try:
            yield
        finally:
            self._committing = False

    @contextlib.contextmanager
    def transaction(
        self, savepoint_name: str | None = None, force_rollback: bool = False
    ) -> Iterator[psycopg.Transaction]:
        """psycopg's context manager for a transaction, whose end is not torn either."""
        transaction = Transaction(self, savepoint_name, force_rollback)
        if self._pipeline:
            with self.pipeline(), transaction, self.pipeline():
                yield transaction
        else:
            with transaction:
                yield transaction


async def _ask_to_cancel(connection: Any, timeout: float) -> None:
    """Ask the server to cancel what `connection` executes; raise `CancellationTimeout`."""
    if not psycopg.capabilities.has_cancel_safe():
        await asyncio.to_thread(connection.cancel)
        return
    gen = connection._cancel_gen()  # noqa: SLF001 - psycopg's
    try:
        await waiting.wait_conn_async(gen, interval=_WAIT_INTERVAL, timeout=timeout)
    except e._WaitTimeout:  # noqa: SLF001 - psycopg's own
        raise e.CancellationTimeout("cancellation timeout expired") from None
    finally:
        # It has a socket of its own, which would live as long as the traceback of an interruption.
        gen.close()


class _LentConnection:
    """A twin that is lent: it tells when somebody looks at its types, who may register one.

    It also lets the session be reset after each statement that its cursor does not look at: of a
    COPY, `executemany()` and `stream()`, or on a cursor that was made without its factories.
    """

    lease: Any
    physical: AsyncConnection
    has_looked: bool

    @property
    def adapters(self) -> Any:
        if self.lease is not None:
            self.lease.types_seen = True
        else:  # a former holder's
            self.physical.forget_types()
        return super().adapters  # type: ignore[misc]

    def _start_query(self) -> PQGen[None]:
        if not self.has_looked and self.lease is not None:
            self.lease.dirty = self.lease.dirty or self.lease.pool.soiled_unless_vouched
        self.has_looked = False
        return super()._start_query()  # type: ignore[misc,no-any-return]


@functools.lru_cache(maxsize=64)
def _lent_class(twin_class: Any) -> Any:
    names = {"__module__": twin_class.__module__, "__qualname__": twin_class.__qualname__}
    return type(twin_class.__name__, (_LentConnection, twin_class), names)


class Transaction(psycopg.Transaction):
    """psycopg's transaction or savepoint, at whose end a cancellation is held back."""

    __module__ = "pgbackend.driver"

    _conn: Connection

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> bool:
        commits = self._outer_transaction and exc_val is None and not self.force_rollback
        telling = self._conn._commits() if commits else contextlib.nullcontext()  # noqa: SLF001
        with hold_cancellation(), telling:
            suppressed = super().__exit__(exc_type, exc_val, exc_tb)
        deliver_cancellation()
        return suppressed


def own_connections() -> int:
    """Return how many connections this process has open beside those of its async pools.

    Other threads open and drop theirs meanwhile: the set is copied in one step, and only looked at.
    """
    opened = [ref() for ref in list(_own)]
    return sum(connection is not None and not connection.closed for connection in opened)


def forget_own_connections() -> None:
    """Stop counting them: after a fork they are the parent's."""
    _own.clear()


class AsyncConnection(psycopg.AsyncConnection[Any]):
    """The connection that the pool keeps, and that lends its twins."""

    __module__ = "pgbackend.driver"

    watch: Watch
    #: The one that the others are made of; it is lent to nobody.
    twin: Connection
    #: The twin that hears what the server says unasked.
    listener: weakref.ref[Connection]
    #: The cursor of `run_statement()`, while no statement uses it.
    _cursor: Any = None
    #: When it was given back, by `time.monotonic()`, if that took no more than to be put away.
    free_since = 0.0
    _disowned = False

    @classmethod
    async def connect(  # type: ignore[override]  # cursors are its twins'
        cls,
        conninfo: str = "",
        *,
        cursor_factory: Any = None,
        twin_class: type[Connection] = Connection,
        **kwargs: Any,
    ) -> Self:
        """Open a connection; `cursor_factory` and `twin_class` are for its twins."""
        self = await super().connect(conninfo, **kwargs)
        self.watch = Watch(asyncio.get_running_loop(), self.pgconn.socket)
        self._grow_twin(twin_class, cursor_factory)
        return self

    def _grow_twin(self, twin_class: type[Connection], cursor_factory: Any) -> None:
        twin = twin_class(self.pgconn)
        twin.physical = self
        twin.lent_class = _lent_class(twin_class)  # type: ignore[arg-type]  # a class has a hash
        twin._autocommit = self._autocommit  # noqa: SLF001
        twin._adapters = self.adapters  # noqa: SLF001
        # One session has one set of prepared statements.
        twin._prepared = self._prepared  # noqa: SLF001
        twin.given_threshold = self.prepare_threshold
        twin._pool = None  # noqa: SLF001 - the pool closes it
        factory = cursor_factory or psycopg.Cursor
        if _Probe.is_needed():
            factory = _Probe.wrapped_factory(self.pgconn, factory)
        twin.cursor_factory = leased_class(factory)
        twin.server_cursor_factory = leased_class(psycopg.ServerCursor)
        self._cursor_class = statement_class(factory)
        self._seen_for_run, plain = looking(
            "run",
            f"{_FOR_A_STATEMENT} {' '.join(f'factory.{name}' for name in _OF_A_STATEMENT)}",
            connection=psycopg.Connection,
            prepared=PrepareManager,
            query=PostgresClientQuery,
            base=BaseCursor,
            factory=factory,
        )
        # Somebody's own class would miss being asked for a cursor.
        is_plain = (
            twin_class.cursor is Connection.cursor
            and twin.row_factory is tuple_row
            and factory.__module__.partition(".")[0] in ("psycopg", "django")
        )
        self._run = plain if is_plain else NO_OTHERS
        self.twin = twin
        self._hears_itself = self.listener = weakref.ref(twin)
        me = weakref.ref(self)  # as psycopg has it: what hears does not keep what is heard
        self.pgconn.notice_handler = functools.partial(_hear, me, twin._notice_handler)  # noqa: SLF001
        self.pgconn.notify_handler = functools.partial(_hear, me, twin._notify_handler)  # noqa: SLF001

    # --- Statements of which nothing is left but their rows: Note [Statements without a twin] ---

    def run_statement(self, connection: Connection | None, query: Any, params: Any) -> Result:
        """Execute `query` on a twin, or on the one that is lent to nobody; fetch all rows.

        For who holds the lease, and does nothing else meanwhile. Errors are psycopg's.
        """
        if connection is None:
            connection = self.twin
            connection._prepared.prepare_threshold = connection.given_threshold  # noqa: SLF001
        cursor, self._cursor = self._cursor or self._new_cursor(), None
        cursor._conn = connection  # noqa: SLF001
        if connection.lease is not None and connection.lease.types_seen:
            cursor._last_query = None  # noqa: SLF001 - its holder may have registered one meanwhile
        result: Result = cursor.run(query, params)
        cursor._conn = self.twin  # noqa: SLF001
        self._cursor = cursor
        return result

    def _new_cursor(self) -> Any:
        """The first; or one more, while a task of the same transaction executes a statement."""
        cursor = self._cursor_class(self.twin)
        cursor._adapters = self.adapters  # noqa: SLF001 - no copy: a type may be registered
        return cursor

    def makes_cursors_of(self, connection: Connection | None) -> bool:
        """Whether a cursor of a twin would be like that of `run_statement()`, and do no more."""
        return all(map(is_, self._seen_for_run(), self._run)) and (
            connection is None
            or (
                connection.cursor_factory is self.twin.cursor_factory
                and connection.row_factory is tuple_row
            )
        )

    def pid(self) -> int:
        """The process id of the server's session; 0 if the connection is lost."""
        return 0 if self.pgconn.status == _BAD else self.pgconn.backend_pid

    def forget_holder(self, *, types_seen: bool) -> None:
        """A twin goes back, whose holder may have changed what all twins have in common."""
        self.listener = self._hears_itself
        if types_seen:
            self.forget_types()

    def forget_types(self) -> None:
        """Let the next statement look up again how its values are sent and loaded."""
        if self._cursor is not None:
            self._cursor._last_query = None  # noqa: SLF001

    def is_alive(self) -> bool:
        """Whether the server has not closed the session, as far as the socket knows.

        Costs one poll of the socket, and no round trip: an idle session is silent unless it ends.
        """
        try:
            while self.pgconn.status != _BAD:
                if not waiting._ready(self.pgconn.socket, Wait.R):  # a poll(), in C
                    return True
                self.pgconn.consume_input()
                if self._read_farewell():
                    return False
        except psycopg.Error:
            pass
        return False

    def _read_farewell(self) -> bool:
        """Whether the server has said why it ends the session; the end of the file comes later."""
        read: list[bytes | None] = []
        heard = self.pgconn.notice_handler
        self.pgconn.notice_handler = lambda result: read.append(
            result.error_field(DiagnosticField.SEVERITY_NONLOCALIZED)
        )
        try:
            self.pgconn.is_busy()  # parses what was read: an error that nobody asked for, a notice
        finally:
            self.pgconn.notice_handler = heard
        return b"FATAL" in read or b"PANIC" in read

    async def wait(
        self, gen: PQGen[RV], interval: float = _WAIT_INTERVAL, timeout: float | None = None
    ) -> RV:
        """Run `gen` to its end; when that is interrupted, close the connection."""
        # psycopg registers a reader of its own for this socket, and removes it.
        self.watch.stop()
        try:
            return await waiting.wait_async(gen, self.pgconn.socket, interval, timeout)
        except asyncio.CancelledError:
            # psycopg would cancel the statement and wait for it, 5 s and 5 s on a silent link; but
            # this is the pool tidying up, within a budget, and the session is given up anyway.
            try:
                if self.pgconn.transaction_status == _ACTIVE:
                    await self._try_cancel(timeout=CLEANUP_BUDGET)
            finally:
                self.close_now()
            raise
        except bridge.INTERRUPTIONS:
            self.close_now()
            raise

    async def cancel_safe(self, *, timeout: float = 30.0) -> None:
        """Ask the server to cancel what it executes, as psycopg does."""
        if self._should_cancel():
            await _ask_to_cancel(self, timeout)

    async def close(self) -> None:
        """Close the connection to the server."""
        self.close_now()

    def close_now(self) -> None:
        """Close the connection without waiting for anything."""
        if self._disowned:
            return
        self.watch.stop()
        self._closed = True
        self.pgconn.finish()

    def disown(self) -> None:
        """Leave the socket alone from now on, and the loop that watches it: they are a parent's."""
        self._disowned = True
        self.watch.reading = self.watch.writing = False


def _hear(
    me: weakref.ref[AsyncConnection], handler: Callable[[Any, Any], None], message: Any
) -> None:
    """Give a notice or notification to who listens now."""
    if (physical := me()) is not None:
        handler(physical.listener, message)


class _Probe(psycopg.Connection[Any]):
    """What a tool that wraps `psycopg.Connection.connect` is shown of a pooled connection.

    OpenTelemetry, for one, puts a cursor factory of its own in the place of that which is given.
    The pool connects by another way; so a wrapped method is called as well, for a connection that
    is open already, and asked what has become of the factory.
    """

    _opened: Any = None

    @classmethod
    def is_needed(cls) -> bool:
        connect = vars(psycopg.Connection)["connect"]
        if type(connect) is not classmethod:
            return True
        return bool(connect.__func__.__globals__["__name__"] != "psycopg.connection")

    @classmethod
    def wrapped_factory(cls, pgconn: Any, factory: type[Any]) -> type[Any]:
        probing: type[_Probe] = type("Connection", (cls,), {"_opened": pgconn})
        wrapped: type[Any] = probing.connect(cursor_factory=factory).cursor_factory
        return wrapped

    @classmethod
    def _get_connection_params(cls, conninfo: str, **kwargs: Any) -> dict[str, Any]:
        return {"host": "/"}  # no name to resolve

    @classmethod
    def _connect_gen(cls, conninfo: str = "") -> Any:
        self = cls(cls._opened)
        self._pool = None  # not to be reported as left open
        yield from ()
        return self


# --- Cursors ------------------------------------------------------------------------------------


class _PreparingCursor:
    """A cursor that prepares a statement anew when the server no longer takes what it prepared.

    After an ``ALTER TABLE`` ("cached plan must not change result type"), or where somebody has
    deallocated the statement, it was not executed. In autocommit it is sent again, unprepared; a
    transaction is doomed by the error, but the next one has forgotten what was prepared.
    """

    _conn: Any

    def _execute_gen(
        self, query: Any, params: Any = None, *, prepare: bool | None = None, **kwargs: Any
    ) -> PQGen[None]:
        execute_gen = super()._execute_gen  # type: ignore[misc]
        try:
            yield from execute_gen(query, params, prepare=prepare, **kwargs)
            return
        except (e.FeatureNotSupported, e.InvalidSqlStatementName) as exc:
            if not self._forget_prepared(exc) or self._conn.pgconn.transaction_status != _IDLE:
                raise
        yield from execute_gen(query, params, prepare=False, **kwargs)

    def executemany(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().executemany(*args, **kwargs)  # type: ignore[misc]
        except (e.FeatureNotSupported, e.InvalidSqlStatementName) as exc:
            self._forget_prepared(exc)  # not sent again: what gives the parameters may be spent
            raise

    def _forget_prepared(self, exc: psycopg.Error) -> bool:
        """Forget what the session has prepared, if `exc` says that it is stale; whether it does."""
        # Told by where the server raises it, since its words are in the server's language.
        stale_plan = exc.diag.source_function == "RevalidateCachedQuery"
        if isinstance(exc, e.FeatureNotSupported) and not stale_plan:
            return False
        return bool(self._conn._prepared.clear())  # noqa: SLF001


class _NotBegunError(Exception):
    """Neither BEGIN nor what was sent with it has been executed, or nothing was sent with it."""


class _BeginningCursor:
    """A cursor that binds parameters itself, and sends BEGIN with a transaction's first statement.

    Both are one message of the simple protocol, and so one round trip. A statement that the server
    cannot parse keeps it from executing BEGIN too: then both are sent one after the other, so that
    the transaction is one that has failed, as it would be in psycopg. One that was cancelled while
    the server parsed it is never sent again: it has begun nothing.
    """

    _conn: Any
    _pgconn: Any
    _query: Any
    _execute_send: Callable[..., None]
    _check_results: Callable[[list[Any]], None]

    def _execute_gen(self, query: Any, params: Any = None, **kwargs: Any) -> PQGen[None]:
        conn = self._conn
        if (
            conn._autocommit  # noqa: SLF001
            or conn.pgconn.transaction_status != _IDLE
            or conn._pipeline  # noqa: SLF001
            or not all(map(is_, _seen_for_begin(), _BEGIN))
        ):
            return super()._execute_gen(query, params, **kwargs)  # type: ignore[misc,no-any-return]
        return self._begin_gen(query, params, **kwargs)

    def _begin_gen(self, query: Any, params: Any, **kwargs: Any) -> PQGen[None]:
        execute_gen = self._execute_plainly_gen
        # On the objects, since methods of the class would cost every other statement something.
        self._conn._start_query = _nothing  # noqa: SLF001
        self._execute_send, self._check_results = self._send_with_begin, self._check_with_begin
        try:
            yield from execute_gen(query, params, **kwargs)
            return
        except _NotBegunError:
            pass
        finally:
            self.__dict__.pop("_execute_send", None)
            self.__dict__.pop("_check_results", None)
            self._conn.__dict__.pop("_start_query", None)
            self._conn.has_looked = False
        yield from execute_gen(query, params, **kwargs)

    def _send_with_begin(self, query: Any, *, binary: bool | None = None, **kwargs: Any) -> None:
        del self._conn._start_query, self._execute_send  # noqa: SLF001
        if binary:
            self._execute_send(query, binary=binary, **kwargs)  # refuses that
        self._query = query
        begin = self._conn._get_tx_start_command()  # noqa: SLF001
        self._pgconn.send_query(begin + b"; " + query.query)

    def _check_with_begin(self, results: list[Any]) -> None:
        del self._check_results
        self._drop_begun(results)
        self._check_results(results)

    def _drop_begun(self, results: list[Any]) -> None:
        """Take the result of BEGIN out."""
        if len(results) > 1:
            del results[0]
        elif self._may_be_sent_again(results[0]):
            raise _NotBegunError

    def _execute_plainly_gen(self, query: Any, params: Any, **kwargs: Any) -> PQGen[None]:
        return super()._execute_gen(query, params, **kwargs)  # type: ignore[misc,no-any-return]

    def _may_be_sent_again(self, result: Any) -> bool:
        """Whether `result` says that nothing was executed; nor was it cancelled before it was."""
        if result.status != ExecStatus.FATAL_ERROR:
            return True  # that of BEGIN: there was no statement
        if self._pgconn.transaction_status != _IDLE:
            return False
        return bool(result.error_field(DiagnosticField.SQLSTATE) != b"57014")  # query_canceled


def _abilities(cursor_class: type[Any]) -> tuple[type[Any], ...]:
    """Return what `cursor_class` needs of the two above."""
    if not issubclass(cursor_class, psycopg.ClientCursor):
        return (_PreparingCursor,)
    # Somebody's own way to send is not passed over. A patch of psycopg's is looked for later.
    sends_by_itself = cursor_class._execute_send is not psycopg.ClientCursor._execute_send  # noqa: SLF001
    return () if sends_by_itself else (_BeginningCursor,)


@functools.lru_cache(maxsize=64)
def own_class(cursor_class: Any, prepares: bool) -> Any:
    """Return `cursor_class`, able to do what it needs of the two above."""
    if not prepares and not issubclass(cursor_class, psycopg.ClientCursor):
        return cursor_class
    bases = (*_abilities(cursor_class), cursor_class)
    return type(cursor_class.__name__, bases, {"__module__": __name__})


def result_of(cursor: Any) -> Result:
    """All that a statement has returned, fetched."""
    rows = cursor.fetchall() if cursor.pgresult.status == _TUPLES_OK else None
    return cursor.rowcount, rows


class _StatementCursor:
    """The cursor of `AsyncConnection.run_statement()`: nothing of a statement is left in it."""

    _conn: Any
    _reset: Callable[[], None]
    _tx: Any

    def run(self, query: Any, params: Any) -> Result:
        """Execute a statement and fetch all its rows."""
        if self._conn.lease is not None:
            self._conn.has_looked = True  # as the caller has
        self.execute(query, params)  # type: ignore[attr-defined]  # of psycopg's
        result = result_of(self)
        self._reset()
        self._tx.set_pgresult(None)
        return result


class _ClientStatementCursor(_StatementCursor):
    """One that binds parameters itself, and so needs a few of psycopg's steps only.

    Of these it repeats fewer for the statement that it has executed last, as `executemany()` does.
    """

    _conn: Any
    _pgconn: Any
    _last_query: Any
    pgresult: Any
    _check_results: Callable[[list[Any]], None]
    _drop_begun: Callable[[list[Any]], None]
    _execute_plainly_gen: Callable[..., PQGen[None]]
    #: The last statement with its parameters; it keeps how to do that.
    _merged: PostgresClientQuery = None  # type: ignore[assignment]

    def run(self, query: Any, params: Any) -> Result:
        conn = self._conn
        if conn._pipeline:  # noqa: SLF001
            return super().run(query, params)
        self._merge(query, params)
        try:
            if conn.lease is None:  # lent to nobody, it is used by one task at a time
                result = conn.wait(self._run_gen())
            else:
                with conn.lock:
                    result = conn.wait(self._run_gen_in_turn(query, params))
        except e._NO_TRACEBACK as exc:  # noqa: SLF001 - as psycopg does
            raise exc.with_traceback(None)  # noqa: B904 - it is the same
        return self._fetch(result)

    def _merge(self, query: Any, params: Any) -> None:
        merged = self._merged
        if query == self._last_query and type(params) is tuple and merged._order is None:  # noqa: SLF001
            literal = self._tx.as_literal
            merged.params = tuple([b"NULL" if each is None else literal(each) for each in params])
            try:
                merged.query = merged.template % merged.params
            except TypeError:
                merged.dump(params)  # says that they are too many, or too few
            return
        self._last_query = None
        self._tx = Transformer(self)  # type: ignore[arg-type]  # a mixin
        self._merged = PostgresClientQuery(self._tx)
        self._merged.convert(query, params)
        self._last_query = query

    def _run_gen(self, begin: bytes = b"") -> PQGen[Any]:
        merged = self._merged
        self._pgconn.send_query(begin + merged.query)
        merged.query, merged.params = b"", None  # they may be secret
        results = yield from generators.execute(self._pgconn)
        if begin:
            self._drop_begun(results)
        self._check_results(results)
        yield from self._conn._prepared.maintain_gen(self._conn)  # noqa: SLF001
        return results[0]

    def _run_gen_in_turn(self, query: Any, params: Any) -> PQGen[Any]:
        conn = self._conn
        if conn._autocommit or conn.pgconn.transaction_status != _IDLE:  # noqa: SLF001
            result = yield from self._run_gen()
            return result
        if not all(map(is_, _seen_for_begin(), _BEGIN)):
            conn.has_looked = True
            yield from conn._start_query()  # noqa: SLF001
            result = yield from self._run_gen()
            return result
        try:
            result = yield from self._run_gen(conn._get_tx_start_command() + b"; ")  # noqa: SLF001
        except _NotBegunError:
            conn.has_looked = True
            yield from self._execute_plainly_gen(query, params)
            result = self.pgresult
            self._reset()
        return result

    def _fetch(self, result: Any) -> Result:
        if result.status != _TUPLES_OK:
            count = result.command_tuples
            return (-1 if count is None else count), None
        count, tx = result.ntuples, self._tx
        tx.set_pgresult(result)
        rows = tx.load_rows(0, count, tuple)
        tx.set_pgresult(None)
        return count, rows


@functools.lru_cache(maxsize=64)
def statement_class(cursor_class: type[Any]) -> type[Any]:
    """Return `cursor_class`, with `run()`."""
    on_client = issubclass(cursor_class, psycopg.ClientCursor)
    runs = _ClientStatementCursor if on_client else _StatementCursor
    bases: Any = (runs, *_abilities(cursor_class), cursor_class)
    return type(cursor_class.__name__, bases, {"__module__": __name__})


class _LeasedCursor:
    """What a cursor of a twin does beside what its class does: it is a holder of the lease.

    It holds the connection from when it is made until it is closed or collected. But a cursor whose
    first statement fails has left nothing in the session that somebody might count on, and has no
    rows: it lets the connection go, whoever still refers to it (a traceback, a `raw()` QuerySet).
    Another statement on it takes a connection again.
    """

    _conn: Any
    _pgconn: Any
    _close: Callable[[], None]
    closed: bool
    #: Whether this is a cursor of the server's, with a name.
    is_on_server = False
    #: Whether it is a holder of the lease.
    _holds = False
    #: Whether a statement of it was about to be sent, and whether one has succeeded.
    _has_begun = False
    _has_succeeded = False
    #: Where the cursor was opened, if its being forgotten is worth a warning.
    opened_at: str | None = None
    #: Gives another connection to a cursor that has let its own go.
    renew: Callable[[Any], None] | None = None

    def __init__(self, connection: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(connection, *args, **kwargs)  # type: ignore[call-arg]  # a mixin
        if connection.lease is not None:  # a twin that is being prepared is nobody's yet
            self.hold()

    def hold(self) -> None:
        """Count as a holder of the lease of the connection that this is a cursor of."""
        self._conn.lease.cursor_opened(self)
        self._holds = True

    def let_go(self) -> None:
        """Hold the connection no longer. What is in memory may still be read."""
        if not self._holds:
            return
        self._holds = False
        if self._conn.lease is not None:
            self._conn.lease.cursor_closed(self)
        elif self._conn.left_open is not None:
            self._conn.left_open.pop(id(self), None)

    # --- Statements ---

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        if not self._holds:
            self._hold_again()
        try:
            result = super().execute(*args, **kwargs)  # type: ignore[misc]
        except BaseException as exc:
            if self._goes_elsewhere(exc):
                return self.execute(*args, **kwargs)
            raise
        self._has_succeeded = True
        return result

    def executemany(self, *args: Any, **kwargs: Any) -> None:
        if not self._holds:
            self._hold_again()
        try:
            super().executemany(*args, **kwargs)  # type: ignore[misc]
        except BaseException as exc:
            conn = self._conn
            if conn.pgconn.pipeline_status != PipelineStatus.OFF and conn._pipeline is None:  # noqa: SLF001
                conn.close()  # psycopg could not end its own: a COPY, or what came after one
            if self._goes_elsewhere(exc):
                return self.executemany(*args, **kwargs)
            raise
        self._has_succeeded = True
        return None

    @contextlib.contextmanager
    def copy(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        if not self._holds:
            self._hold_again()
        entered = False
        try:
            with (
                contextlib.ExitStack() as budget,
                hold_when_closed() as closed,
                super().copy(*args, **kwargs) as copy,  # type: ignore[misc]
                self._conn.kept_busy("COPY"),
                closed,
            ):
                entered = True
                try:
                    yield copy
                except BaseException:
                    budget.enter_context(self._conn.cleaning_up())
                    raise
        except BaseException as exc:
            if entered:
                self._statement_failed()
                raise
            if not self._goes_elsewhere(exc):
                raise
        self._has_succeeded = True
        if not entered:
            with self.copy(*args, **kwargs) as copy:
                yield copy

    def stream(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        if not self._holds:
            self._hold_again()
        beginner = caller()
        entered = goes_elsewhere = False
        try:
            with (
                contextlib.ExitStack() as budget,
                hold_when_closed() as closed,
                contextlib.closing(super().stream(*args, **kwargs)) as rows,  # type: ignore[misc]
                closed,
            ):
                for row in rows:
                    entered = True
                    with self._conn.kept_busy("stream()", beginner):
                        try:
                            yield row
                        except BaseException:
                            budget.enter_context(self._conn.cleaning_up())
                            raise
        except BaseException as exc:
            if entered:
                self._statement_failed()
                raise
            if not self._goes_elsewhere(exc):
                raise
            goes_elsewhere = True
        self._has_succeeded = True
        if goes_elsewhere:
            yield from self.stream(*args, **kwargs)

    def _goes_elsewhere(self, exc: BaseException) -> bool:
        """Let a cursor whose statement failed hold nothing; whether to send that elsewhere now.

        That is so where nothing was ever sent on the cursor, and its lease has ended: another task
        has ended the transaction while the statement waited for its turn, say. The cursor is moved
        to the connection of the code as it is now, which may be in no block.
        """
        in_vain = isinstance(exc, _BlockEndedError) or (
            isinstance(exc, LeaseEnded) and not self._has_begun and self._conn.lease is None
        )
        self._statement_failed()
        if not in_vain or self._holds or self.renew is None:
            return False
        self.renew(self)
        return True

    def _statement_failed(self) -> None:
        if not self._has_succeeded:
            self.let_go()

    def _hold_again(self) -> None:
        """Become a holder again: of the same lease, if that lives, else of another."""
        if self.closed:
            return  # psycopg refuses
        if self._conn.lease is not None:
            with contextlib.suppress(LeaseEnded):
                self.hold()
                return
        if self.renew is not None:
            self.renew(self)

    def move_to(self, connection: Connection) -> None:
        """Be a cursor of `connection` from now on, with the options that this one has."""
        me: Any = self
        self._conn, self._pgconn = connection, connection.pgconn
        self._has_begun = False
        me._reset()  # noqa: SLF001 - psycopg's
        me._last_query = None  # noqa: SLF001 - for psycopg to look its types up on the new connection
        self.hold()

    # A class of the user's may override `execute()`, and send more by it: all that comes by here.

    def _execute_gen(self, query: Any, *args: Any, **kwargs: Any) -> PQGen[None]:
        self._note(query)
        try:
            yield from super()._execute_gen(query, *args, **kwargs)  # type: ignore[misc]
        except psycopg.ProgrammingError as exc:
            self._close_if_copying(exc)
            raise

    def _note(self, query: Any) -> None:
        """Let the session be reset after what is sent now, unless somebody vouches for it."""
        self._has_begun = True
        lease = self._conn.lease
        if lease is None:
            return
        self._conn.has_looked = True
        if not lease.dirty:
            lease.dirty = lease.pool.soiled_unless_vouched and not is_vouched(query)

    def _stream_fetchone_gen(self, first: bool) -> PQGen[Any]:
        try:
            return (yield from super()._stream_fetchone_gen(first))  # type: ignore[misc]
        except psycopg.ProgrammingError as exc:
            self._close_if_copying(exc)
            raise

    def _close_if_copying(self, exc: psycopg.Error) -> None:
        """Close a connection that is in the midst of a COPY, which only `copy()` can go on with.

        Each later statement would fail: "another command is already in progress". `exc` is what
        psycopg says; the server's errors say more.
        """
        pgconn = self._pgconn
        said_by_psycopg = exc.sqlstate is None
        if (
            said_by_psycopg
            and pgconn.transaction_status == _ACTIVE
            and pgconn.pipeline_status == PipelineStatus.OFF
        ):
            self._conn.close()

    # --- The end ---

    def close(self) -> None:
        if self.closed:
            return
        try:
            if not self.is_on_server:
                super().close()  # type: ignore[misc]
            elif self._can_close_on_server():
                # A cancellation waits: the collector, for one, would swallow it.
                with hold_cancellation(), contextlib.suppress(LeaseEnded):
                    super().close()  # type: ignore[misc]
            self._close()
        finally:
            self.let_go()

    def _can_close_on_server(self) -> bool:
        """Whether CLOSE can be sent: not by the garbage collector, in somebody else's task."""
        lease = self._conn.lease
        if self._conn.closed:
            return False
        if lease is None:
            return True
        # A thread may have met it by chance, while somebody else's statement is in flight.
        is_free = _get_running_loop() is not None or not self._conn.lock.locked()
        if is_free and not lease.ended and lease.can_wait():
            return True
        lease.dirty = True
        return False

    def __del__(self) -> None:
        if getattr(self, "closed", True):
            return
        lease = self._conn.lease
        held = self._holds and lease is not None and lease.is_held_by_cursors()
        if self.is_on_server and lease is not None:
            lease.dirty = True
        self._close()
        self.let_go()
        if held and self.opened_at is not None:  # last, since a warning may be made an error
            warnings.warn(
                f"a cursor opened at {self.opened_at} was never closed, and held its connection "
                "until now: use 'with connection.cursor() as cursor:'",
                ResourceWarning,
                source=self,
                stacklevel=2,
            )


class _LeasedServerCursor(_LeasedCursor):
    """A cursor of the server's: once a statement of it has failed, there are no more rows."""

    #: Returns why the server has closed it, with the savepoint in which it was opened: whatever is
    #: sent to it then is an error, which dooms the transaction.
    why_gone: Callable[[], Exception | None] | None = None

    def _statement_failed(self) -> None:
        if self._conn.lease is not None:
            self._conn.lease.dirty = True  # it may be open on the server
        self.let_go()

    def _declare_gen(self, query: Any, *args: Any, **kwargs: Any) -> PQGen[None]:
        self._note(query)
        return super()._declare_gen(query, *args, **kwargs)  # type: ignore[misc,no-any-return]

    def _close_gen(self) -> PQGen[None]:
        if self.why_gone is None or self.why_gone() is None:
            yield from super()._close_gen()  # type: ignore[misc]

    def _fetch_gen(self, *args: Any, **kwargs: Any) -> PQGen[Any]:
        if self.why_gone is not None and (reason := self.why_gone()) is not None:
            raise reason
        fetch_gen = super()._fetch_gen(*args, **kwargs)  # type: ignore[misc]
        return self._letting_go(fetch_gen)

    def _letting_go(self, gen: PQGen[RV]) -> PQGen[RV]:
        try:
            return (yield from gen)
        except BaseException:
            self._statement_failed()
            raise


@functools.lru_cache(maxsize=64)
def leased_class(cursor_class: type[Any]) -> type[Any]:
    """Return `cursor_class`, as a holder of its lease."""
    on_server = issubclass(cursor_class, psycopg.ServerCursor)
    holder = _LeasedServerCursor if on_server else _LeasedCursor
    bases: Any = (holder, *_abilities(cursor_class), cursor_class)
    names = {"__module__": __name__, "is_on_server": on_server}
    return type(cursor_class.__name__, bases, names)


def adopt(cursor: Any) -> Any:
    """Make `cursor`, made on a twin without its factories, count as a holder of its lease."""
    if not isinstance(cursor, _LeasedCursor) and isinstance(cursor, psycopg.Cursor):
        cls: Any = leased_class(type(cursor))  # type: ignore[arg-type]  # a class has a hash
        cursor.__class__ = cls
        cls.hold(cursor)
    return cursor


def let_go(cursor: Any) -> None:
    """Let a cursor whose rows are all in memory hold its connection no longer."""
    if isinstance(cursor, _LeasedCursor):
        cursor.let_go()
