"""The cursors of this driver: psycopg's classes, with mixins for what this driver adds.

Each cursor class gets the mixin that fits it (`abilities()`): to send BEGIN with a transaction's
first statement, or to send a statement again whose prepared form is stale. A cursor on a leased
connection also holds the lease: the task keeps the connection as long as the cursor is open.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Self, TypeVar

import psycopg
from psycopg.abc import PQGen, Query
from psycopg.pq import PipelineStatus, TransactionStatus
from psycopg.pq.abc import PGconn

from .cancellation import hold_cancellation, hold_when_closed
from .errors import LeaseEnded
from .parking import caller
from .prefix import PrefixingCursor
from .prepared import PreparingCursor
from .recovery import limit_clean_up
from .session_settings import UNKNOWN, Statement
from .turns import TurnTakenError, check_turn, sparing, waits_for_executemany
from .vouching import is_vouched

if TYPE_CHECKING:
    from .connection import Connection

RV = TypeVar("RV")
T = TypeVar("T")

_get_running_loop = asyncio._get_running_loop
_ACTIVE = TransactionStatus.ACTIVE


class BlockEndedError(LeaseEnded):
    """The transaction of a statement ended while the statement waited for the connection."""


BLOCK_ENDED = (
    "the atomic block of this statement has ended in another task, which closed the generator that "
    "the block is in, while the statement waited for the connection: let the statements of a "
    "generator end before you close it"
)


def abilities(cursor_class: type[Any]) -> tuple[type[Any], ...]:
    """Return the mixin for `cursor_class`, in a tuple.

    The mixin is `PrefixingCursor` for psycopg's client cursors, `PreparingCursor` for other
    cursors, and for client cursors whose class has its own way to send statements.
    """
    if not issubclass(cursor_class, psycopg.ClientCursor):
        return (PreparingCursor,)
    # A class with an `_execute_send()` of its own keeps that; `PrefixingCursor` checks for patches.
    sends_by_itself = cursor_class._execute_send is not psycopg.ClientCursor._execute_send  # noqa: SLF001
    return (PreparingCursor,) if sends_by_itself else (PrefixingCursor,)


@functools.lru_cache(maxsize=64)
def own_class(cursor_class: Any, is_told: bool) -> Any:
    """Return a subclass of `cursor_class` with its `abilities()`; for connections without a pool.

    Returns `cursor_class` itself in two cases. It has its abilities already: another thread, which
    is making a cursor, has just put it in the place of the connection's own class. Or its ability
    would be `PreparingCursor`, and `is_told` is False: the connection prepares no statements, and
    the running code declares no settings.
    """
    if issubclass(cursor_class, PrefixingCursor | PreparingCursor):
        return cursor_class
    if not is_told and not issubclass(cursor_class, psycopg.ClientCursor):
        return cursor_class
    bases = (*abilities(cursor_class), cursor_class)
    return type(cursor_class.__name__, bases, {"__module__": __name__})


class _LeasedCursor:
    """A mixin for the cursors of a facade: each is a holder of the facade's lease.

    The cursor holds the connection from when it is made until it is closed or garbage-collected.
    But if its first statement fails, it lets the connection go, even if it stays alive itself (in a
    traceback, or a `raw()` QuerySet): it has no rows, and has left nothing on the server that later
    statements could need. Its next statement takes a connection again.
    """

    _conn: Connection
    _pgconn: PGconn
    _close: Callable[[], None]
    closed: bool
    #: Whether this is a server-side cursor, which has a name.
    is_on_server = False
    #: Whether this cursor counts as a holder of the lease; see Note [Holders] in lease.py.
    _holds = False
    #: Whether this cursor was about to send a statement; whether a statement has succeeded.
    _has_begun = False
    _has_succeeded = False
    #: The place where the cursor was opened, for a warning if it is never closed; None: no warning.
    opened_at: str | None = None
    #: Waits for the caller's turn, then moves this cursor to the connection that the caller has.
    renew: Callable[[_LeasedCursor], None] | None = None
    #: Whether each statement, right before it is sent, is checked to have its turn; see turns.py.
    takes_turns = False
    #: Whether the running call has sent a statement: a class of the user's may send several.
    _has_sent = False

    def __init__(self, connection: Connection, *args: object, **kwargs: object) -> None:
        super().__init__(connection, *args, **kwargs)  # type: ignore[call-arg]  # a mixin
        if connection.lease is not None:  # none during the set-up of the connection
            self.hold()

    def hold(self) -> None:
        """Become a holder of the connection's lease; raise `LeaseEnded` if the lease is over."""
        lease = self._conn.lease
        if lease is None:
            self._conn.refuse()
        lease.cursor_opened(self)
        self._holds = True

    def let_go(self) -> None:
        """Stop being a holder of the lease; rows that are in memory can still be read."""
        if not self._holds:
            return
        self._holds = False
        # Read into variables: another thread may end the lease meanwhile.
        lease, left_open = self._conn.lease, self._conn.left_open
        if lease is not None:
            lease.cursor_closed(self)
        elif left_open is not None:
            left_open.pop(id(self), None)

    # --- Statements ---

    # A statement may lose its turn any number of times: so loops, not recursion.

    def execute(self, *args: object, **kwargs: object) -> Self:
        while True:
            self._begin_call()
            try:
                result: Self = super().execute(*args, **kwargs)  # type: ignore[misc]
            except BaseException as exc:
                if not self._prepare_retry(exc):
                    raise
            else:
                self._has_succeeded = True
                return result

    def executemany(self, *args: object, **kwargs: object) -> None:
        while True:
            self._begin_call()
            try:
                super().executemany(*args, **kwargs)  # type: ignore[misc]
            except BaseException as exc:
                conn = self._conn
                if conn.pgconn.pipeline_status != PipelineStatus.OFF and conn._pipeline is None:  # noqa: SLF001
                    conn.close()  # psycopg could not end its own pipeline, due to a COPY
                if not self._prepare_retry(exc):
                    raise
            else:
                self._has_succeeded = True
                return

    @contextlib.contextmanager
    def copy(self, *args: object, **kwargs: object) -> Iterator[Any]:
        while True:
            self._begin_call()
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
                        budget.enter_context(limit_clean_up(self._conn))
                        raise
            except BaseException as exc:
                if not self._prepare_retry(exc, in_use=entered):
                    raise
            else:
                self._has_succeeded = True
                return

    def stream(self, *args: object, **kwargs: object) -> Iterator[Any]:
        beginner = caller()
        while True:
            self._begin_call()
            entered = False
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
                                budget.enter_context(limit_clean_up(self._conn))
                                raise
            except BaseException as exc:
                if not self._prepare_retry(exc, in_use=entered) and (
                    entered or not waits_for_executemany(self._conn, exc)
                ):
                    raise
            else:
                self._has_succeeded = True
                return

    def _begin_call(self) -> None:
        """Make the cursor a holder of its lease, for a call that may send statements."""
        self._has_sent = False
        if not self._holds:
            self._hold_again()

    def _prepare_retry(self, exc: BaseException, *, in_use: bool = False) -> bool:
        """Return whether to repeat a call that raised `exc`; if so, make the cursor ready for it.

        In any case, the cursor lets its lease go if none of its statements has succeeded. Returns
        True only if the cursor has a `renew()`, and the call's statement was not sent, because
        - it had lost its turn; or
        - its lease or its block had ended while it waited (another task ended the transaction, for
          example), unless the cursor still holds its lease.
        Returns False if the user's code already uses the COPY or the rows of the stream (`in_use`).
        Before it returns True, it calls `renew()`, which waits for the caller's turn, and moves the
        cursor to the connection that the caller has now, perhaps outside of any block.
        """
        in_vain = isinstance(exc, BlockEndedError) or (
            isinstance(exc, LeaseEnded) and not self._has_begun and self._conn.lease is None
        )
        lost_turn = isinstance(exc, TurnTakenError)
        self._statement_failed()
        if in_use or self.renew is None or not (lost_turn or (in_vain and not self._holds)):
            return False
        self.renew(self)
        return True

    def _statement_failed(self) -> None:
        if not self._has_succeeded:
            self.let_go()

    def _hold_again(self) -> None:
        """Hold the lease again after `let_go()`; if it is over, move to the caller's connection."""
        if self.closed:
            return  # psycopg will raise
        if self._conn.lease is not None:
            with contextlib.suppress(LeaseEnded):
                self.hold()
                return
        if self.renew is not None:
            self.renew(self)

    def move_to(self, connection: Connection) -> None:
        """Make this a cursor of `connection`, and a holder of its lease; keep the options."""
        me: Any = self
        self._conn, self._pgconn = connection, connection.pgconn
        self._has_begun = False
        me._reset()  # noqa: SLF001 - psycopg's
        me._last_query = None  # noqa: SLF001 - psycopg looks types up on the new connection
        self.hold()

    # All statements come through these methods, also those that a user's own `execute()` adds.

    def _start_query(self, query: Query | None = None) -> PQGen[None]:
        if self.takes_turns:
            check_turn(self._conn, has_sent=self._has_sent)
            self._has_sent = True
        return super()._start_query(query)  # type: ignore[misc,no-any-return]

    def _execute_gen(self, query: Query, *args: object, **kwargs: object) -> PQGen[None]:
        self._note(query)
        try:
            yield from super()._execute_gen(query, *args, **kwargs)  # type: ignore[misc]
        except psycopg.ProgrammingError as exc:
            self._close_if_copying(exc)
            raise

    def _note(self, query: Query) -> None:
        """Mark the lease as dirty if `query`, which is about to be sent, is not vouched for.

        The pool resets the server session after a dirty lease; see vouching.py. In a pool without
        `soiled_unless_vouched`, no statement makes its lease dirty here.
        """
        self._has_begun = True
        lease = self._conn.lease
        if lease is None:
            return
        self._conn.has_looked = True
        if lease.dirty or (lease.pool.soiled_unless_vouched and not is_vouched(query)):
            lease.dirty = True
            lease.note_lock(query)

    def _stream_fetchone_gen(self, first: bool) -> PQGen[Any]:
        try:
            return (yield from super()._stream_fetchone_gen(first))  # type: ignore[misc]
        except psycopg.ProgrammingError as exc:
            self._close_if_copying(exc)
            raise

    def _close_if_copying(self, exc: psycopg.Error) -> None:
        """Close the connection if `exc` is due to a COPY that was begun without `copy()`.

        Nothing can continue that COPY, and each later statement would fail: "another command is
        already in progress". psycopg's own error for such a COPY has no SQLSTATE; an error with one
        is the server's own.
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
                # Hold a cancellation back: a finalizer that calls this would swallow it.
                with hold_cancellation(), contextlib.suppress(LeaseEnded):
                    super().close()  # type: ignore[misc]
            self._close()
        finally:
            self.let_go()

    def _can_close_on_server(self) -> bool:
        """Return whether the caller can send CLOSE for the cursor; if not, mark the lease as dirty.

        The reset after a dirty lease closes the cursor. But if the connection is closed, or its
        lease is over, return False and mark nothing.
        """
        lease = self._conn.lease
        if self._conn.closed:
            return False
        if lease is None:
            return True
        # The garbage collector may call this in any thread, during another task's statement.
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
        if held and self.opened_at is not None:  # last: a filter may make the warning an error
            warnings.warn(
                f"a cursor opened at {self.opened_at} was never closed, and held its connection "
                "until now: use 'with connection.cursor() as cursor:'",
                ResourceWarning,
                source=self,
                stacklevel=2,
            )


class _LeasedServerCursor(_LeasedCursor):
    """The mixin for server-side cursors: after any failed statement, the cursor lets the lease go.

    The lease is marked as dirty then, because the server may keep the cursor open.
    """

    #: Returns an error if the server has closed this cursor, at the end of the block that it was
    #: opened in. A statement for this cursor would fail on the server and break the transaction.
    why_gone: Callable[[], Exception | None] | None = None
    #: The properties of the query that the cursor was declared for.
    _statement = UNKNOWN

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        while True:
            try:
                return super().execute(*args, **kwargs)
            except psycopg.NotSupportedError as exc:
                if not waits_for_executemany(self._conn, exc):
                    raise

    def _statement_failed(self) -> None:
        lease = self._conn.lease
        if lease is not None:
            lease.dirty = True  # the server may keep this cursor open
        self.let_go()

    def _declare_gen(self, query: Query, *args: object, **kwargs: object) -> PQGen[None]:
        self._note(query)
        self._statement = Statement(keeps_settings=is_vouched(query))
        return self._with_settings(super()._declare_gen(query, *args, **kwargs))  # type: ignore[misc]

    def _with_settings(self, gen: PQGen[RV]) -> PQGen[RV]:
        """Run `gen`, which sends DECLARE or FETCH: neither knows if the query is vouched for."""
        conn = self._conn
        conn.next_statement = self._statement
        try:
            return (yield from gen)
        finally:
            conn.next_statement = UNKNOWN

    def _close_gen(self) -> PQGen[None]:
        if self.why_gone is None or self.why_gone() is None:
            yield from sparing(self._conn, super()._close_gen())  # type: ignore[misc]

    def _fetch_gen(self, *args: object, **kwargs: object) -> PQGen[Any]:
        if self.why_gone is not None and (reason := self.why_gone()) is not None:
            raise reason
        fetch_gen = sparing(self._conn, super()._fetch_gen(*args, **kwargs))  # type: ignore[misc]
        if self._conn.is_settled():
            fetch_gen = self._with_settings(fetch_gen)
        return self._letting_go(fetch_gen)

    def _letting_go(self, gen: PQGen[RV]) -> PQGen[RV]:
        try:
            return (yield from gen)
        except BaseException:
            self._statement_failed()
            raise


@functools.lru_cache(maxsize=64)
def leased_class(cursor_class: type[Any]) -> type[Any]:
    """Return a subclass of `cursor_class` whose cursors are holders of their facade's lease."""
    on_server = issubclass(cursor_class, psycopg.ServerCursor)
    holder = _LeasedServerCursor if on_server else _LeasedCursor
    bases: Any = (holder, *abilities(cursor_class), cursor_class)
    names = {"__module__": __name__, "is_on_server": on_server}
    return type(cursor_class.__name__, bases, names)


def adopt(cursor: T) -> T:
    """Make `cursor` a holder of its facade's lease, unless it already is one; return `cursor`.

    The cursors that the facade's factories make are holders already. A cursor of another class is
    not: Django, for example, makes server-side cursors of its own class. Raises `LeaseEnded` if the
    lease is over.
    """
    if not isinstance(cursor, _LeasedCursor) and isinstance(cursor, psycopg.Cursor):
        cls: Any = leased_class(type(cursor))  # type: ignore[arg-type]  # a class has a hash
        cursor.__class__ = cls
        try:
            cls.hold(cursor)
        except LeaseEnded:
            cls._close(cursor)  # psycopg would warn of a cursor that is left open
            raise
    return cursor


def let_go(cursor: object) -> None:
    """Make `cursor`, whose rows are all in memory, stop being a holder of a lease."""
    if isinstance(cursor, _LeasedCursor):
        cursor.let_go()
