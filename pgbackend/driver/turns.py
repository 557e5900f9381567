"""Turns: whether code that has acquired a connection's lock may still send its statement.

Tasks and threads may share a transaction. Each waits for its turn before it sends a statement. But
until it has the connection's lock, another thread may open or end an `atomic` block of the
transaction. The transaction, as a `Turns`, says whether that has happened. If so, the statement has
lost its turn, and is not sent: `TurnTakenError` makes the cursor wait for its turn anew.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol, Self, TypeVar

import psycopg
from psycopg.abc import PQGen, Query
from psycopg.pq import PipelineStatus

from .errors import LeaseEnded

RV = TypeVar("RV")

_TURN_TAKEN = (
    "this statement was not sent: another task or thread has opened or ended an atomic block in "
    "the same transaction just before; execute the statement again"
)


_TURN_LOST = (
    "a block that another task or thread has opened or ended in the same transaction came between "
    "two statements of one call of a cursor: the first was sent, the second was not. Let the "
    "cursor class send one statement for each call, or run the other task outside with "
    "'pgbackend.detached()'"
)


class Turns(Protocol):
    """Protocol of a transaction that several tasks or threads share: what the driver asks of it.

    `pgbackend.transactions.Transaction` implements it: the driver itself knows no blocks.
    """

    def may_send(self) -> bool:
        """Return True if it is the running code's turn to send a statement, False if it must wait.

        The caller has the connection's lock. After True it must send the statement at once: if the
        statement opens or ends a block, that block counts as opened or ended from now on.
        """

    def end_is_sent(self) -> None:
        """Record that COMMIT or ROLLBACK is about to be sent."""


class SharedConnection(Protocol):
    """Protocol of a connection that tasks and threads may share during a transaction.

    `turns` is the transaction; None while there is none: then any code may send statements.
    """

    @property
    def turns(self) -> Turns | None: ...


class TurnTakenError(LeaseEnded):
    """A statement was not sent, because an `atomic` block was opened or ended just before."""


class TurnLostError(psycopg.OperationalError):
    """A statement was not sent, and is not retried: the same call has sent another one before."""


def check_turn(connection: SharedConnection, *, has_sent: bool = False) -> None:
    """Raise `TurnTakenError` if the running code has lost its turn to send a statement.

    Raises `TurnLostError` instead if the same call of a cursor `has_sent` a statement already: then
    the call cannot be retried.
    """
    if connection.turns is not None and not connection.turns.may_send():
        raise TurnLostError(_TURN_LOST) if has_sent else TurnTakenError(_TURN_TAKEN)


def sparing(connection: Any, gen: PQGen[RV]) -> PQGen[RV]:
    """Run `gen`, which sends FETCH or CLOSE, even if another task or thread has the turn.

    A task that rolls its block back cancels the statement in flight (`Connection.cancel_others()`),
    but not this FETCH or CLOSE, because it is no statement of that block.
    """
    turns = connection.turns
    connection.spares_statement = turns is not None and not turns.may_send()
    try:
        return (yield from gen)
    finally:
        connection.spares_statement = False


def waits_for_executemany(connection: Any, exc: BaseException) -> bool:
    """Wait for the end of the `executemany()` that caused `exc`; return False if none caused it.

    After True, the caller should retry. After False, it should raise `exc`, which has another cause
    or is due to a pipeline that the user has opened. psycopg refuses server-side cursors and
    `stream()` while the connection is in a pipeline, as it is during another task's
    `executemany()`. That method holds the connection's lock to its end, and so this function waits
    for the lock; a user's pipeline does not hold it.
    """
    if not isinstance(exc, psycopg.Error) or exc.sqlstate is not None or "pipeline" not in str(exc):
        return False
    if connection.lock.locked():
        with connection.lock:
            pass
        return True
    return bool(connection.pgconn.pipeline_status == PipelineStatus.OFF)  # it has just ended


class _TurnTakingCursor:
    """Wait for the next turn when a statement has lost its turn, then retry (a mixin for cursors).

    For connections that no pool lends: while a thread waits for tasks, they may use its connection.
    The cursors of a lease do the same in another way: see cursors.py.
    """

    _conn: SharedConnection
    #: Waits for the turn of the running code; raises if its block has ended.
    take_turn: Callable[[], None]
    #: Raises if the block of the running code has ended.
    check_not_ended: Callable[[], None]
    #: Whether the running call has sent a statement: a class of the user's may send several.
    _has_sent = False

    def _start_query(self, query: Query | None = None) -> PQGen[None]:
        check_turn(self._conn, has_sent=self._has_sent)
        self._has_sent = True
        # After `check_turn()`: once the block has ended, the connection has no `turns` to refuse.
        self.check_not_ended()
        return super()._start_query(query)  # type: ignore[misc,no-any-return]

    # A server-side cursor ends with its transaction: a FETCH in the next one would make that fail.

    def _fetch_gen(self, *args: Any, **kwargs: Any) -> PQGen[Any]:
        self.check_not_ended()
        return sparing(self._conn, super()._fetch_gen(*args, **kwargs))  # type: ignore[misc]

    def _close_gen(self) -> PQGen[None]:
        try:
            self.check_not_ended()
        except Exception:  # of any type, `check_not_ended` is the backend's
            return
        yield from sparing(self._conn, super()._close_gen())  # type: ignore[misc]

    def execute(self, *args: object, **kwargs: object) -> Self:
        self._has_sent = False
        while True:
            try:
                return super().execute(*args, **kwargs)  # type: ignore[misc,no-any-return]
            except TurnTakenError:
                self.take_turn()
            except psycopg.NotSupportedError as exc:
                if not waits_for_executemany(self._conn, exc):
                    raise

    def executemany(self, *args: object, **kwargs: object) -> None:
        self._has_sent = False
        while True:
            try:
                return super().executemany(*args, **kwargs)  # type: ignore[misc,no-any-return]
            except TurnTakenError:
                self.take_turn()

    @contextlib.contextmanager
    def copy(self, *args: object, **kwargs: object) -> Iterator[Any]:
        self._has_sent = False
        with contextlib.ExitStack() as stack:
            while True:
                try:
                    copy = stack.enter_context(super().copy(*args, **kwargs))  # type: ignore[misc]
                    break
                except TurnTakenError:
                    self.take_turn()
            yield copy

    def stream(self, *args: object, **kwargs: object) -> Iterator[Any]:
        self._has_sent = False
        while True:
            try:
                yield from super().stream(*args, **kwargs)  # type: ignore[misc]
                return
            except TurnTakenError:
                self.take_turn()
            except psycopg.ProgrammingError as exc:
                if not waits_for_executemany(self._conn, exc):
                    raise


@functools.lru_cache(maxsize=64)
def _turn_taking_class(cursor_class: type[Any]) -> type[Any]:
    names = {"__module__": __name__}
    return type(cursor_class.__name__, (_TurnTakingCursor, cursor_class), names)


def let_take_turns(
    cursor: Any, take_turn: Callable[[], None], check_not_ended: Callable[[], None]
) -> None:
    """Make `cursor` retry a statement that has lost its turn, after a wait in `take_turn()`.

    `check_not_ended()` is called before each statement, and raises if the block of the running code
    has ended. Does nothing if `cursor` is a tracing tool's wrapper, or belongs to another driver.
    """
    cls: Any = type(cursor)
    if not issubclass(cls, psycopg.Cursor) or not hasattr(cursor.connection, "turns"):
        return
    if not issubclass(cls, _TurnTakingCursor):
        cursor.__class__ = _turn_taking_class(cls)
    cursor.take_turn, cursor.check_not_ended = take_turn, check_not_ended
