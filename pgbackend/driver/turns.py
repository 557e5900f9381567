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
from typing import Any, Protocol, Self

from psycopg.abc import PQGen, Query

from .errors import LeaseEnded

_TURN_TAKEN = (
    "this statement was not sent: another task or thread has opened or ended an atomic block in "
    "the same transaction just before; execute the statement again"
)


class Turns(Protocol):
    """The transaction of a connection that tasks and threads share, as the driver sees it."""

    def may_send(self) -> bool:
        """Return whether the running code, which has the connection's lock, may send a statement.

        If it may, the caller sends the statement at once.
        """

    def end_is_sent(self) -> None:
        """Record that COMMIT or ROLLBACK is about to be sent."""


class SharedConnection(Protocol):
    """A connection that tasks and threads may share."""

    @property
    def turns(self) -> Turns | None: ...


class TurnTakenError(LeaseEnded):
    """A statement was not sent, because an `atomic` block was opened or ended just before."""


def check_turn(connection: SharedConnection) -> None:
    """Raise `TurnTakenError` if it is not the turn of the running code any more."""
    if connection.turns is not None and not connection.turns.may_send():
        raise TurnTakenError(_TURN_TAKEN)


class _TurnTakingCursor:
    """Execute a statement that has lost its turn again, at its next turn (a mixin).

    It is for a connection that no pool lends, which other tasks use while its thread waits for
    them. The cursors of a lease do the same in another way: see cursors.py.
    """

    _conn: SharedConnection
    #: Waits for the turn of the running code; raises if its block has ended.
    take_turn: Callable[[], None]

    def _start_query(self, query: Query | None = None) -> PQGen[None]:
        check_turn(self._conn)
        return super()._start_query(query)  # type: ignore[misc,no-any-return]

    def execute(self, *args: object, **kwargs: object) -> Self:
        while True:
            try:
                return super().execute(*args, **kwargs)  # type: ignore[misc,no-any-return]
            except TurnTakenError:
                self.take_turn()

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


@functools.lru_cache(maxsize=64)
def _turn_taking_class(cursor_class: type[Any]) -> type[Any]:
    names = {"__module__": __name__}
    return type(cursor_class.__name__, (_TurnTakingCursor, cursor_class), names)


def let_take_turns(cursor: Any, take_turn: Callable[[], None]) -> None:
    """Make `cursor` call `take_turn()`, which waits, when one of its statements lost its turn."""
    if not isinstance(cursor, _TurnTakingCursor):
        cls: Any = type(cursor)
        cursor.__class__ = _turn_taking_class(cls)
    cursor.take_turn = take_turn
