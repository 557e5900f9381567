"""Connections whose waits yield to the event loop when there is one to yield to.

psycopg is sans-IO inside: `psycopg.Connection` and `psycopg.AsyncConnection` run the same
generators and differ in how they wait for the socket. `Connection.wait()` is the one place where
this driver decides that: green, the greenlet is parked and the loop serves others; otherwise the
thread blocks. Everything above it works unchanged in every context: psycopg's cursors, server-side
cursors, COPY, executemany and pipelines.

A `Connection` is the DB-API's connection: one of its own, or a *facade* that the pool lends with a
lease, on the socket of a pooled connection (pooled.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from operator import is_
from time import monotonic
from types import TracebackType
from typing import Any, NoReturn, Protocol, Self, TypeVar

import psycopg
from psycopg import errors as e
from psycopg.abc import PQGen
from psycopg.pq import ConnStatus, Format, TransactionStatus

from .bridge import INTERRUPTIONS, Portal, await_, check_may_wait, current, let_step_end, running
from .cancellation import deliver_cancellation, finish, hold_cancellation
from .cursors import BLOCK_ENDED, BlockEndedError, adopt, own_class
from .errors import LeaseEnded, NothingCommitted, OutcomeUnknown
from .parking import Caller, ParkingLock, caller
from .recovery import (
    CLEANUP_BUDGET,
    WAIT_INTERVAL,
    ask_to_cancel,
    cancel_while_locked,
    cut_off,
    is_at_rest,
    recover,
)
from .shortcuts import looking
from .socket_watch import Watch
from .turns import Turns
from .unpooled import add_own_connection

RV = TypeVar("RV")

#: Seconds that waits which never block may keep the loop busy (COPY, executemany).
MAX_BUSY_TIME = 0.005

_IDLE = TransactionStatus.IDLE
_BAD = ConnStatus.BAD
_OK = ConnStatus.OK

LEASE_ENDED = (
    "this connection went back to the pool and may serve another task by now: take a new cursor, "
    "or keep one connection for a block with 'with pgbackend.pinned():'"
)

_seen_for_cursors, _CURSORS = looking("cursors", "connection.cursor", connection=psycopg.Connection)
_seen_for_blocks, _BLOCKS = looking(
    "blocks",
    "its._set_autocommit its.set_autocommit its._set_autocommit_gen its._check_intrans_gen",
    its=psycopg.Connection,
)
#: Held while a connection has another `cursor_factory` than its own.
_making_cursor = threading.RLock()


class ConnectArguments(dict[str, Any]):
    """Arguments of `connect()`, whose values no traceback with local variables shows."""

    def __repr__(self) -> str:
        return f"<arguments {', '.join(self)}>"


class Physical(Protocol):
    """The pooled connection of a facade, as far as the facade knows it: see `AsyncConnection`."""

    watch: Watch
    listener: weakref.ref[Connection]

    def forget_holder(self, *, types_seen: bool) -> None:
        """Undo what the holder of a facade may have changed for all facades of this connection."""


class Connection(psycopg.Connection[Any]):
    """A psycopg connection that is green in a green context, and blocking elsewhere.

    Opened by `connect()` it is a connection of its own, like psycopg's; lent by a pool it is a
    facade, valid until `end_lease()`.
    """

    __module__ = "pgbackend.driver"

    #: The pooled connection that this one is a facade of, or None.
    physical: Physical | None = None
    #: Called when a cursor of a facade is opened and closed; see `pool.Lease`.
    lease: Any = None
    #: The `prepare_threshold` that each lease begins with.
    given_threshold: int | None = None
    #: The message of the error for using a facade whose lease is over.
    end_reason = LEASE_ENDED
    #: The cursors that were open when its lease ended, as the lease counted them.
    left_open: dict[int, bool] | None = None
    #: How many waits of a facade do without the pool's watch: waits of threads and other loops.
    waits_elsewhere = 0
    #: The class of the facades that are lent.
    lent_class: type[Connection]
    #: Whether the end of a transaction waits for the statement of another task to end.
    ends_in_turn = False
    #: The turns of the tasks and threads whose transaction it is in; None if nobody shares it.
    turns: Turns | None = None
    #: Whether the statement in flight is of a block around the one that may be rolled back.
    spares_statement = False
    #: Whether the cursor that is about to send a statement has seen whether it is vouched for.
    has_looked = False
    _lease_ended = False
    _closed_by_holder = False
    _committing = False
    #: When a wait of this process last let the loop serve others; whether one has ended since then
    #: without doing so.
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
        add_own_connection(self)
        return self

    @classmethod
    def _connect_green(cls, conninfo: str, **kwargs: Any) -> Self:
        """Let the async connection do what may block (host names too), then take its socket."""
        options = {name: kwargs.pop(name, None) for name in ("cursor_factory", "row_factory")}
        opened = await_(psycopg.AsyncConnection.connect(conninfo, **kwargs))
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
        """Return a cursor, as psycopg does; its class is derived from `cursor_factory`."""
        if self.physical is not None or name:  # a facade's factories are made once
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
        """Return a facade of this facade for `lease`: same session, an identity of its own."""
        facade: Connection = object.__new__(self.lent_class)
        facade.__dict__.update(self.__dict__)
        facade.lease = lease
        facade.lock = ParkingLock()  # type: ignore[assignment]
        facade._listen_alone()
        # A former holder may have changed it: the session has one manager of prepared statements.
        facade._prepared.prepare_threshold = self.given_threshold
        return facade

    def _listen_alone(self) -> None:
        """Give notices and notifications to this facade's handlers, and to no former holder's."""
        self._notice_handlers = [*self._notice_handlers]
        self._notify_handlers = [*self._notify_handlers]
        self._notifies_backlog = deque()
        assert self.physical is not None
        self.physical.listener = weakref.ref(self)

    def forget_handlers(self) -> None:
        """Remove all handlers, so that whoever prepares the session may add theirs anew."""
        self._notice_handlers.clear()
        self._notify_handlers.clear()

    def __del__(self) -> None:  # type: ignore[override]  # psycopg's argument is its own
        if self.physical is None:  # a facade is not reported as left open: the pool has it
            super().__del__()

    def end_lease(self) -> None:
        """Refuse, from now on, whatever the holder does with this connection."""
        assert self.physical is not None
        self.physical.forget_holder(types_seen=self.lease is None or self.lease.types_seen)
        self._lease_ended = True
        self.lease = self.turns = None  # a cycle would be left to the garbage collector

    def is_waited_for(self) -> bool:
        """Return whether somebody waits right now for the end of a statement on this facade."""
        assert self.physical is not None
        return self.waits_elsewhere > 0 or self.physical.watch.future is not None

    def refuse(self) -> NoReturn:
        """Raise the error for using a facade whose lease is over."""
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
        """Close the connection to the server; a facade whose lease is over is left alone."""
        if self._lease_ended:
            return
        self._stop_watch()
        super().close()
        self._closed_by_holder = self.physical is not None

    def close_in_turn(self) -> None:
        """Close a facade, whose lease is about to end, after the statement that another waits for.

        A caller that cannot wait has the later statements refused; the pool closes the connection.
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

        They would wait for themselves, for ever; so would statements of `beginner`, whose generator
        another task steps. Statements of other tasks wait for the end of the block.
        """
        callers = {caller(), beginner}
        lock: Any = self.lock

        def refuse() -> None:
            if caller() not in callers:
                return
            # An exception that has left it lives as long as the step of the task.
            let_step_end()
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
        interval: float = WAIT_INTERVAL,
        timeout: float | None = None,
    ) -> RV:
        """Run `gen` to its end: green, by parking the greenlet; otherwise by blocking.

        Raises `LeaseEnded` on a facade whose lease is over, before a byte is sent.
        """
        portal = running()
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
        check_may_wait(portal)  # before a byte is sent
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
            cut_off(self.pgconn, gen)
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
            if isinstance(exc, INTERRUPTIONS):
                self._recover(portal, gen, watch.stop, exc)
            elif self.pgconn.status == _BAD:
                watch.stop()
                cut_off(self.pgconn, gen)
            raise
        finally:
            Connection._last_yield, Connection._kept_busy = monotonic(), False
            if self.physical is None or watch is not self.physical.watch:
                self.waits_elsewhere -= 1
                watch.stop()

    def _find_watch(self) -> Watch:
        """Return the watch of this socket on the running loop: the pool's, or one for this wait.

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
            portal.pending = portal.pending or exc  # Note [Held cancellation] in cancellation.py
        return self._wait_held(portal, watch, state)

    def _wait_held(self, portal: Portal, watch: Watch, state: int) -> int:
        """Go on waiting for the end of a transaction whose task was cancelled, within a budget."""
        deadline = monotonic() + CLEANUP_BUDGET
        while (left := deadline - monotonic()) > 0:
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

        It does so before `gen` has begun: a statement that is interrupted then was not sent. It
        does not before the end of a transaction, which is not torn, nor in a closed portal.
        """
        if portal.closing or portal.holding:
            return
        if monotonic() - Connection._last_yield < MAX_BUSY_TIME:
            return
        try:
            portal.suspend(None)
        except INTERRUPTIONS as exc:
            self._recover(portal, gen, self._stop_watch, exc)
            raise
        finally:
            Connection._last_yield, Connection._kept_busy = monotonic(), False
        self._check_lease()  # others had their turn

    # --- Cancellation ---

    def _recover(
        self, portal: Portal, gen: PQGen[Any], stop_watch: Callable[[], None], exc: BaseException
    ) -> None:
        """Bring the connection to rest after a wait was interrupted, or close it."""
        if is_at_rest(self.pgconn):
            return
        stop_watch()
        with self._elsewhere():  # a task of its own reads what is left
            recover(self, portal, gen, exc)

    def cancel_safe(self, *, timeout: float = 30.0) -> None:
        """Ask the server to cancel the running statement, as psycopg does; green, without blocking.

        psycopg calls this, too, where a COPY is left early. `timeout` is in seconds. Raises
        `CancellationTimeout` when the server has not answered by then.
        """
        portal = running()
        if type(portal) is not Portal:
            super().cancel_safe(timeout=timeout)
            return
        check_may_wait(portal)
        if not self._should_cancel():
            return
        if portal.holding:  # in the end of a generator, say: a cancellation is raised later
            finish(ask_to_cancel(self, timeout), timeout)
        else:
            await_(ask_to_cancel(self, timeout))

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

    def _commit_gen(self) -> PQGen[None]:
        if self.turns is not None:
            self.turns.end_is_sent()
        return super()._commit_gen()

    def _rollback_gen(self) -> PQGen[None]:
        if self.turns is not None:
            self.turns.end_is_sent()
        return super()._rollback_gen()

    def back_to_autocommit(self) -> None:
        """Set ``autocommit = True``, in one step if nothing has to be waited for."""
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
        # waited for the connection would be in neither that transaction nor a block.
        if self.ends_in_turn:
            raise BlockEndedError(BLOCK_ENDED)
        return super()._get_tx_start_command()

    def cancel_others(self) -> None:
        """Cancel, before a rollback, the statement of a task that shares this connection.

        Its work is undone anyway, and the task that rolls back must not have to wait for its end.
        """
        portal = current()
        if self.ends_in_turn or portal is None or portal.closing or self.spares_statement:
            return
        if self.lock.locked():
            finish(cancel_while_locked(self), CLEANUP_BUDGET)

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
        """Open a transaction for a block, as psycopg does; its end is not torn either."""
        transaction = Transaction(self, savepoint_name, force_rollback)
        if self._pipeline:
            with self.pipeline(), transaction, self.pipeline():
                yield transaction
        else:
            with transaction:
                yield transaction


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
