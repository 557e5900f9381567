"""Turns: whether the code that has come to a connection's lock may still send its statement.

Tasks and threads may share a transaction. Each waits for its turn before it sends a statement; but
before it has the connection's lock, a thread may have opened or ended a block of the transaction.
Whoever lends the connection says by `Turns` whether that is so. A statement that has lost its turn
is not sent: `TurnTakenError` lets the cursor wait for its turn anew.
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
    "a block that another task or thread has opened or ended in the same transaction came before "
    "this statement, which was not sent"
)


class Turns(Protocol):
    """The turns of the tasks and threads that share a connection."""

    def may_send(self) -> bool:
        """Return whether the running code, which has the connection's lock, may send a statement.

        If so, it is about to.
        """

    def end_is_sent(self) -> None:
        """Note that COMMIT or ROLLBACK is about to be sent."""


class SharedConnection(Protocol):
    """A connection that tasks and threads may share."""

    @property
    def turns(self) -> Turns | None: ...


class TurnTakenError(LeaseEnded):
    """A statement was not sent, because a block was opened or ended before it."""


def check_turn(connection: SharedConnection) -> None:
    """Raise `TurnTakenError` if it is not the turn of the running code."""
    if connection.turns is not None and not connection.turns.may_send():
        raise TurnTakenError(_TURN_TAKEN)


def sparing(connection: Any, gen: PQGen[RV]) -> PQGen[RV]:
    """Run `gen`, a FETCH or CLOSE, which takes no turns.

    A sibling whose block is open below does not cancel it when it rolls that block back.
    """
    turns = connection.turns
    connection.spares_statement = turns is not None and not turns.may_send()
    try:
        return (yield from gen)
    finally:
        connection.spares_statement = False


def waits_for_executemany(connection: Any, exc: BaseException) -> bool:
    """Wait for the `executemany()` of others for whose pipeline psycopg has raised `exc`, if any.

    psycopg refuses server-side cursors and `stream()` in a pipeline, and looks for one before it
    waits for the lock. Returns whether to try again: a pipeline of the user's does not hold the
    lock between two statements.
    """
    if not isinstance(exc, psycopg.Error) or exc.sqlstate is not None or "pipeline" not in str(exc):
        return False
    if connection.lock.locked():
        with connection.lock:
            pass
        return True
    return bool(connection.pgconn.pipeline_status == PipelineStatus.OFF)  # it has just ended


class _TurnTakingCursor:
    """Send a statement that has lost its turn when it is its turn again (a mixin).

    It is for a connection of one's own, which others use while its thread waits for them. Cursors
    of a lease have a way of their own; see cursors.py.
    """

    _conn: SharedConnection
    #: Waits for the turn of the running code; raises if its block has ended.
    take_turn: Callable[[], None]
    #: Raises if the block of the running code has ended.
    check_not_ended: Callable[[], None]

    def _start_query(self, query: Query | None = None) -> PQGen[None]:
        check_turn(self._conn)
        # In this order: the connection is in that transaction no more when the block has ended.
        self.check_not_ended()
        return super()._start_query(query)  # type: ignore[misc,no-any-return]

    # A server-side cursor ends with its transaction; in the next one it would be an error.

    def _fetch_gen(self, *args: Any, **kwargs: Any) -> PQGen[Any]:
        self.check_not_ended()
        return sparing(self._conn, super()._fetch_gen(*args, **kwargs))  # type: ignore[misc]

    def _close_gen(self) -> PQGen[None]:
        try:
            self.check_not_ended()
        except Exception:  # whichever says so
            return
        yield from sparing(self._conn, super()._close_gen())  # type: ignore[misc]

    def execute(self, *args: object, **kwargs: object) -> Self:
        while True:
            try:
                return super().execute(*args, **kwargs)  # type: ignore[misc,no-any-return]
            except TurnTakenError:
                self.take_turn()
            except psycopg.NotSupportedError as exc:
                if not waits_for_executemany(self._conn, exc):
                    raise

    def executemany(self, *args: object, **kwargs: object) -> None:
        while True:
            try:
                return super().executemany(*args, **kwargs)  # type: ignore[misc,no-any-return]
            except TurnTakenError:
                self.take_turn()

    @contextlib.contextmanager
    def copy(self, *args: object, **kwargs: object) -> Iterator[Any]:
        with contextlib.ExitStack() as stack:
            while True:
                try:
                    copy = stack.enter_context(super().copy(*args, **kwargs))  # type: ignore[misc]
                    break
                except TurnTakenError:
                    self.take_turn()
            yield copy

    def stream(self, *args: object, **kwargs: object) -> Iterator[Any]:
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
    """Let `cursor` wait by `take_turn` whenever a statement of it has lost its turn.

    `check_not_ended` raises if the block of the running code has ended. What tracing tools put
    around a cursor stays as it is, and so does a cursor of another driver's connection.
    """
    cls: Any = type(cursor)
    if not issubclass(cls, psycopg.Cursor) or not hasattr(cursor.connection, "turns"):
        return
    if not issubclass(cls, _TurnTakingCursor):
        cursor.__class__ = _turn_taking_class(cls)
    cursor.take_turn, cursor.check_not_ended = take_turn, check_not_ended
