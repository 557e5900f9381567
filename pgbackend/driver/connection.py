"""Connections whose waits yield to the event loop when there is one to yield to.

psycopg is sans-IO inside: `psycopg.Connection` and `psycopg.AsyncConnection` run the same
generators and differ in how they wait for the socket. `Connection.wait()` is the one place where
this driver decides that: in green code the greenlet is parked and the loop serves other tasks;
elsewhere the thread blocks. Everything above `wait()` works unchanged in both cases: psycopg's
cursors, server-side cursors, COPY, executemany and pipelines.

A `Connection` is the connection of the DB-API. Either it has a socket of its own, or it is a
*facade*, which the pool lends with a lease, on the socket of a pooled connection (pooled.py).
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
from typing import Any, NoReturn, TypeVar

import psycopg
from psycopg import errors as e
from psycopg.abc import PQGen
from psycopg.pq import ConnStatus, Format, TransactionStatus
from psycopg.pq.abc import PGconn

from .bridge import INTERRUPTIONS, Portal, await_, check_may_wait, current, let_step_end, running
from .cancellation import deliver_cancellation, finish, hold_cancellation
from .committing import CommittingConnection
from .cursors import BLOCK_ENDED, BlockEndedError, adopt, own_class
from .errors import LeaseEnded, NothingCommitted
from .parking import Caller, ParkingLock, caller
from .protocols import Lease, Physical
from .psycopg_transaction import Transaction
from .recovery import (
    CLEANUP_BUDGET,
    WAIT_INTERVAL,
    ask_to_cancel,
    cancel_while_locked,
    cut_off,
    is_at_rest,
    recover,
)
from .server_changes import notice
from .session_settings import declared
from .shortcuts import looking
from .socket_watch import Watch

RV = TypeVar("RV")

#: Seconds for which statements that need not wait (in COPY, executemany) may keep the loop busy.
MAX_BUSY_TIME = 0.005

_IDLE = TransactionStatus.IDLE
_BAD = ConnStatus.BAD
_OK = ConnStatus.OK

LEASE_ENDED = (
    "this connection went back to the pool and may serve another task by now: take a new cursor, "
    "or keep one connection for several statements with 'with pgbackend.pinned():'"
)

_seen_for_cursors, _CURSORS = looking("cursors", "connection.cursor", connection=psycopg.Connection)
_seen_for_blocks, _BLOCKS = looking(
    "blocks",
    "its._set_autocommit its.set_autocommit its._set_autocommit_gen its._check_intrans_gen",
    its=psycopg.Connection,
)
#: Held while another `cursor_factory` stands in the place of a connection's own.
_making_cursor = threading.RLock()


class Connection(CommittingConnection):
    """A psycopg connection: to wait, a green caller parks its greenlet, another blocks its thread.

    `connect()` opens one with a socket of its own, as psycopg does; a pool lends facades, each of
    which is valid until its `end_lease()`.
    """

    __module__ = "pgbackend.driver"

    #: Held while a statement is in flight, from its first byte to the last byte of its result.
    lock: ParkingLock  # type: ignore[assignment]  # not psycopg's kind
    #: The pooled connection that this one is a facade of, or None.
    physical: Physical | None = None
    #: The lease that a facade is lent for (see lease.py); it counts the facade's open cursors.
    lease: Lease | None = None
    #: The `prepare_threshold` of a facade when it is lent.
    given_threshold: int | None = None
    #: The message of the error for using a facade whose lease is over.
    end_reason = LEASE_ENDED
    #: The `Lease.cursors` of a lease that has ended: the cursors that are still open.
    left_open: dict[int, bool] | None = None
    #: How many waits for a facade run in threads or on other loops, without `Physical.watch`.
    waits_elsewhere = 0
    #: The class of the facades that are lent.
    lent_class: type[Connection]
    #: Whether a block is ending that waits for other tasks' statements, and does not cancel them.
    ends_in_turn = False
    #: Whether the statement in flight belongs to a block around the one that may be rolled back.
    spares_statement = False
    #: Whether it is already known if the statement to be sent is vouched for; see vouching.py.
    has_looked = False
    _lease_ended = False
    _closed_by_user = False
    #: When a wait in this process last let a loop serve other tasks; whether a wait has ended since
    #: then that did not.
    _last_yield = 0.0
    _kept_busy = False

    def __init__(self, pgconn: PGconn, *args: Any, **kwargs: Any) -> None:
        super().__init__(pgconn, *args, **kwargs)
        # Tasks that take part in one transaction share its connection, one at a time, in turn.
        self.lock = ParkingLock()

    def cursor(
        self, name: str = "", *, binary: bool = False, row_factory: Any = None, **kwargs: Any
    ) -> Any:
        """Return a cursor, as psycopg does, with the mixins of cursors.py where it needs them."""
        if self.physical is not None or name:  # a facade's factory adds the mixins
            cursor = super().cursor(name, binary=binary, row_factory=row_factory, **kwargs)
            return cursor if self.lease is None else adopt(cursor)
        if self.pgconn.status != _OK:
            self._check_connection_ok()  # raises
        factory: Any = self.cursor_factory
        is_told = (
            self._prepared.prepare_threshold is not None
            or declared.get() is not None
            or self.session_settings.per_transaction
        )
        factory = own_class(factory, is_told)
        if not all(map(is_, _seen_for_cursors(), _CURSORS)):
            return self._cursor_by_psycopg(
                factory, binary=binary, row_factory=row_factory, **kwargs
            )
        cursor = factory(self, row_factory=row_factory or self.row_factory)
        if binary:
            cursor.format = Format.BINARY
        return cursor

    def _cursor_by_psycopg(self, factory: Any, **kwargs: Any) -> Any:
        """Return a cursor of the class `factory`, made by psycopg's own `cursor()`."""
        with _making_cursor:  # or a second thread would take `factory` for the own one
            own, self.cursor_factory = self.cursor_factory, factory
            try:
                return super().cursor(**kwargs)
            finally:
                self.cursor_factory = own

    # --- Leases ---

    def lend(self, lease: Lease) -> Connection:
        """Return a copy of this facade for `lease`: a new object on the same server connection."""
        facade: Connection = object.__new__(self.lent_class)
        facade.__dict__.update(self.__dict__)
        facade.lease = lease
        facade.lock = ParkingLock()
        facade._listen_alone()
        # All facades share the manager of prepared statements: an earlier user may have changed it.
        facade._prepared.prepare_threshold = self.given_threshold
        return facade

    def _listen_alone(self) -> None:
        """Make notices and notifications go to this facade's handlers, not to earlier facades'."""
        self._notice_handlers = [*self._notice_handlers]
        self._notify_handlers = [*self._notify_handlers]
        self._notifies_backlog = deque()
        assert self.physical is not None
        self.physical.listener = weakref.ref(self)

    def forget_handlers(self) -> None:
        """Remove all handlers of notices and notifications, before the connection is set up anew.

        The code that sets it up adds its own handlers again.
        """
        self._notice_handlers.clear()
        self._notify_handlers.clear()

    def __del__(self) -> None:  # type: ignore[override]  # psycopg's argument is its own
        if self.physical is None:  # psycopg would report a facade as left open
            super().__del__()

    def note_lost_values(self) -> None:
        """Close a connection of one's own, as the base does; make the pool reset one of its own."""
        if self.physical is None:
            super().note_lost_values()
        elif self.lease is not None:
            self.lease.dirty = True

    def end_lease(self) -> None:
        """Make this facade refuse all further use, because its lease is over; send nothing."""
        assert self.physical is not None
        self.physical.forget_facade(types_seen=self.lease is None or self.lease.types_seen)
        self._lease_ended = True
        self.lease = self.turns = None  # lease and facade must not refer to each other

    def is_waited_for(self) -> bool:
        """Return whether a task or thread waits right now for the server's reply on this facade."""
        assert self.physical is not None
        return self.waits_elsewhere > 0 or self.physical.watch.future is not None

    def refuse(self) -> NoReturn:
        """Raise the error for using a facade that was closed, or whose lease is over."""
        if self._closed_by_user:
            raise e.OperationalError("the connection is closed")
        raise LeaseEnded(self.end_reason)

    def _check_lease(self) -> None:
        if self._lease_ended:
            self.refuse()

    def _check_connection_ok(self) -> None:
        if self._lease_ended or self._closed_by_user:
            self.refuse()
        super()._check_connection_ok()

    @property
    def closed(self) -> bool:
        """True if the connection is closed, or its lease is over."""
        return self._lease_ended or self._closed_by_user or self.pgconn.status == _BAD

    def close(self) -> None:
        """Close the connection to the server; do nothing on a facade whose lease is over."""
        if self._lease_ended:
            return
        if self.physical is not None and self.physical.watch.is_elsewhere():
            self.physical.close_soon()  # its loop has registered the socket
        else:
            self._stop_watch()
            super().close()
        self._closed_by_user = self.physical is not None

    def close_in_turn(self) -> None:
        """Close the connection to the server; first wait for another task's statement to end.

        For a facade whose lease is about to end. If the caller cannot wait for that statement, the
        connection is not closed here: statements that follow are refused, and the pool cleans up.
        """
        if not self.is_waited_for():
            self.close()
        elif self.lease is None or self.lease.can_wait():
            with self.lock:
                self.close()
        else:
            self._closed_by_user = True

    def _stop_watch(self) -> None:
        if self.physical is not None:
            self.physical.watch.stop()

    @contextlib.contextmanager
    def kept_busy(self, what: str, beginner: Caller | None = None) -> Iterator[None]:
        """Refuse statements of the caller while its COPY or stream holds the connection's lock.

        A context manager, around the COPY or stream. The caller would wait for the lock for ever.
        So would `beginner`, the task or thread that began the stream, if the caller continues it:
        its statements are refused, too. Statements of other tasks wait for the lock. `what` names
        the COPY or stream, for the error message.
        """
        callers = {caller(), beginner}
        lock = self.lock

        def refuse() -> None:
            if caller() not in callers:
                return
            # An exception that has left the COPY or stream keeps it alive until this step ends.
            let_step_end()
            if lock.locked() and not self.is_waited_for():
                raise e.OperationalError(
                    f"another command is already in progress: a {what} that this task has begun. "
                    "Leave its 'with' statement or loop first, or use another connection"
                )

        before, lock.refuse = lock.refuse, refuse
        try:
            yield
        finally:
            if lock.refuse is refuse:
                lock.refuse = before

    # --- Waiting: the one switch point ---

    def wait(
        self, gen: PQGen[RV], interval: float = WAIT_INTERVAL, timeout: float | None = None
    ) -> RV:
        """Run `gen` to its end, and return its result.

        While `gen` waits for the socket, a green caller parks its greenlet; any other caller blocks
        its thread. Raises `LeaseEnded` on a facade whose lease is over, before a byte is sent.
        """
        portal = running()
        if type(portal) is not Portal:
            physical = self.physical
            if physical is None:
                return super().wait(gen, interval, timeout)
            self._check_lease()
            physical.watch.leave()
            with self._elsewhere():
                self._check_lease()  # again: an end of the lease sees this wait now
                return super().wait(gen, interval, timeout)
        if self._lease_ended:
            self._check_lease()
        check_may_wait(portal)  # before a byte is sent
        try:
            if Connection._kept_busy:
                self._maybe_yield(portal, gen)
            return self._wait_green(portal, gen, timeout)
        except e.Error as exc:
            notice(self, exc.sqlstate)
            raise
        finally:
            if self.pgconn.status == _BAD:
                # libpq has closed the socket: stop before another socket gets its number
                self._stop_watch()

    def _wait_green(self, portal: Portal, gen: PQGen[RV], timeout: float | None) -> RV:
        try:
            state = next(gen)
        except StopIteration as stop:
            Connection._kept_busy = True
            result: RV = stop.value
            return result
        if self.pgconn.status == _BAD:  # another socket may have its number by now
            cut_off(self.pgconn, gen)
            raise e.OperationalError("the connection is closed")
        watch = self._find_watch()
        watch.since = monotonic()
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
            Connection._last_yield = watch.since = monotonic()
            Connection._kept_busy = False
            if self.physical is None or watch is not self.physical.watch:
                self.waits_elsewhere -= 1
                watch.stop()

    def _find_watch(self) -> Watch:
        """Return the watch of this socket on the running loop: `Physical.watch`, or a new one.

        A new one serves this wait only. It is needed for a connection that no pool keeps, and for
        code on another loop than the pool's, which may take part in a transaction.
        """
        loop = asyncio.get_running_loop()
        if self.physical is not None and self.physical.watch.loop is loop:
            return self.physical.watch
        if self.physical is not None:
            self.physical.watch.leave()
        self.waits_elsewhere += 1  # until `_wait_green()` stops the new watch
        return Watch(loop, self.pgconn.socket)

    @contextlib.contextmanager
    def _elsewhere(self) -> Iterator[None]:
        self.waits_elsewhere += 1
        try:
            yield
        except e.Error as exc:
            notice(self, exc.sqlstate)
            raise
        finally:
            self.waits_elsewhere -= 1

    def _wait_ready(self, portal: Portal, watch: Watch, state: int, deadline: float | None) -> int:
        timeout = None if deadline is None else max(0.0, deadline - monotonic())
        try:
            ready = watch.wait(portal, state, timeout)
            if self.pgconn.status == _BAD:
                # Another task has closed it meanwhile: psycopg's C code would use freed memory.
                raise e.OperationalError("the connection is closed")
            return ready
        except asyncio.CancelledError as exc:
            if not portal.holding:
                raise
            portal.pending = portal.pending or exc  # Note [Held cancellation] in cancellation.py
        return self._wait_held(portal, watch, state)

    def _wait_held(self, portal: Portal, watch: Watch, state: int) -> int:
        """Go on waiting, for `CLEANUP_BUDGET` seconds at most, although the task was cancelled.

        The cancellation is held back. Returns the readiness of the socket. If it is not ready in
        time, closes the connection, and raises `OutcomeUnknown` during COMMIT, else
        `NothingCommitted`.
        """
        deadline = monotonic() + CLEANUP_BUDGET
        while (left := deadline - monotonic()) > 0:
            try:
                if ready := watch.wait(portal, state, left):
                    return ready
            except asyncio.CancelledError as exc:
                portal.pending = exc
                if watch.ready:  # reply and cancellation came in one turn of the loop
                    return watch.ready
        watch.stop()
        self.pgconn.finish()
        silence = (
            f"the server did not answer within {CLEANUP_BUDGET} s after the task was cancelled"
        )
        if not self.may_commit():
            raise NothingCommitted(
                f"{silence} while it rolled back, or at a savepoint, or before COMMIT was sent: "
                "nothing was committed; the connection was closed, and the server rolls back when "
                "it notices"
            )
        # A cancellation that is raised later would hide this error: it becomes the cause instead.
        cancellation, portal.pending = portal.pending, None
        raise self.outcome_unknown(silence) from cancellation

    def _maybe_yield(self, portal: Portal, gen: PQGen[Any]) -> None:
        """Let the loop serve other tasks, if no wait has done so for `MAX_BUSY_TIME` seconds.

        Called before `gen` has begun, so a statement that is interrupted here was not sent. Does
        nothing in a closed portal, and while a cancellation would be held back, as for COMMIT.
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
        self._check_lease()  # another task may have ended it meanwhile

    # --- Cancellation ---

    def _recover(
        self, portal: Portal, gen: PQGen[Any], stop_watch: Callable[[], None], exc: BaseException
    ) -> None:
        """Cancel the statement whose wait `exc` interrupted; if that fails, close the connection.

        Does nothing if no statement is in flight.
        """
        if is_at_rest(self.pgconn):
            return
        stop_watch()
        with self._elsewhere():  # a new task reads the rest of the reply
            recover(self, portal, gen, exc)

    def cancel_safe(self, *, timeout: float = 30.0) -> None:
        """Ask the server to cancel the running statement, as psycopg does; do not block the loop.

        psycopg itself calls this when a COPY is left early. Raises `CancellationTimeout` if the
        server has not answered after `timeout` seconds.
        """
        portal = running()
        if type(portal) is not Portal:
            super().cancel_safe(timeout=timeout)
            return
        check_may_wait(portal)
        if not self._should_cancel():
            return
        if portal.holding:  # at the end of a generator, say: a cancellation must wait
            finish(ask_to_cancel(self, timeout), timeout)
        else:
            await_(ask_to_cancel(self, timeout))

    # --- The end of a transaction is not interrupted: Note [Held cancellation], cancellation.py ---

    def _rollback_gen(self) -> PQGen[None]:
        if self.turns is not None:
            self.turns.end_is_sent()
        return super()._rollback_gen()

    def back_to_autocommit(self) -> None:
        """Set ``autocommit = True``, which sends nothing; skip psycopg's steps where it may.

        The steps may be skipped on an idle connection, if nobody has patched them.
        """
        if (
            self.lock.locked()
            or self.pgconn.transaction_status != _IDLE
            or self._lease_ended
            or not all(map(is_, _seen_for_blocks(), _BLOCKS))
        ):
            self.autocommit = True  # waits for the lock, or raises
        else:
            self._autocommit = True

    def rollback(self) -> None:
        """Roll back, after `cancel_others()`; a cancellation of the caller is raised afterwards."""
        with hold_cancellation():
            self.cancel_others()
            super().rollback()
        deliver_cancellation()

    def _get_tx_start_command(self) -> bytes:
        # No transaction begins while a block ends in another task: a statement that has waited for
        # the connection would begin a new transaction, which belongs to no block.
        if self.ends_in_turn:
            raise BlockEndedError(BLOCK_ENDED)
        return super()._get_tx_start_command()

    def cancel_others(self) -> None:
        """Cancel, on the server, the statement that another task runs on this connection.

        Called before a rollback, which undoes the work of that statement anyway. Waits for the end
        of the statement, for `CLEANUP_BUDGET` seconds at most. Does nothing if the rollback must
        wait for the statement (`ends_in_turn`), if the rollback does not undo the statement
        (`spares_statement`), or if the caller is in no portal, or in a closed one.
        """
        portal = current()
        if self.ends_in_turn or portal is None or portal.closing or self.spares_statement:
            return
        if self.lock.locked():
            finish(cancel_while_locked(self), CLEANUP_BUDGET)

    @contextlib.contextmanager
    def transaction(
        self, savepoint_name: str | None = None, force_rollback: bool = False
    ) -> Iterator[psycopg.Transaction]:
        """Open a transaction in a `with` statement, as psycopg does; its end is not interrupted."""
        transaction = Transaction(self, savepoint_name, force_rollback)
        if self._pipeline:
            try:
                with self.pipeline(), transaction, self.pipeline():
                    yield transaction
            except e.Error as exc:
                self.check_outcome(exc)
                raise
            finally:
                self.end_to_commit()
        else:
            with transaction:
                yield transaction
