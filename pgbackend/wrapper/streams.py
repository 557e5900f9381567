"""Streams through a transaction pooler: each has a connection and a transaction of its own.

Outside of transactions, Django opens the cursor of `iterator()` WITH HOLD: the server session keeps
its rows until it is closed. Behind a transaction pooler the next FETCH may reach another session.
So the cursor is opened in a transaction, which ends when the cursor is closed. It has a connection
of its own, too: the statements of the loop's body are not part of the transaction, and each is
committed at once, as the code expects.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from django.db import DatabaseError
from psycopg.abc import PQGen
from psycopg.pq import TransactionStatus

from pgbackend import frames, state
from pgbackend.driver.cursors import adopt

if TYPE_CHECKING:
    from .cursors import Cursors

_INTRANS = TransactionStatus.INTRANS


class _Stream:
    """A mixin for server-side cursors: the end of the cursor ends its transaction."""

    _conn: Any
    #: Closes the connection; None if the cursor's lease gives it back.
    close_connection: Callable[[], None] | None = None

    def _close_gen(self) -> PQGen[None]:
        # Instead of CLOSE: COMMIT closes the cursor, too.
        if self._conn.pgconn.transaction_status == _INTRANS:
            yield from self._conn._commit_gen()  # noqa: SLF001 - psycopg's

    def close(self) -> None:
        try:
            super().close()  # type: ignore[misc]
        finally:
            if self.close_connection is not None:
                close, self.close_connection = self.close_connection, None
                close()

    def __del__(self) -> None:
        if self.close_connection is not None:  # never closed: send nothing in a finalizer
            self._conn.close()
            with suppress(DatabaseError):  # of another thread: the collector may run in any
                self.close_connection()
        super().__del__()  # type: ignore[misc]


@functools.lru_cache(maxsize=16)
def _stream_class(cursor_class: Any) -> Any:
    names = {"__module__": __name__}
    return type(cursor_class.__name__, (_Stream, cursor_class), names)


def is_apart(wrapper: Cursors) -> bool:
    """Return whether a stream that is opened now gets a connection of its own."""
    if not wrapper.is_through_pooler():
        return False
    current = state.current_state(wrapper)
    if current.pooled:
        return current.transaction is None and current.autocommit
    return wrapper.get_autocommit() and not current.in_atomic_block


def open_stream(wrapper: Cursors, name: str) -> Any:
    """Return a server-side cursor on a connection of its own, in a transaction of its own."""
    if state.current_state(wrapper).pooled:
        return _open_green(wrapper, name)
    return _open_sync(wrapper, name)


def _open_green(wrapper: Cursors, name: str) -> Any:
    with wrapper.wrap_database_errors:
        lease = wrapper.acquire_pool().lease()
    try:
        state.task_sessions().keep_lease(lease)
        lease.opened_at = frames.place()
        lease.connection.autocommit = False  # so that psycopg sends BEGIN before DECLARE
        with state.prepared(wrapper, lease.connection):
            cursor = adopt(wrapper.create_cursor(name))
    except BaseException:
        lease.end()
        raise
    cursor.__class__ = _stream_class(type(cursor))  # type: ignore[arg-type]  # has a hash
    return wrapper._prepare_cursor(cursor)  # noqa: SLF001 - Django's


def _open_sync(wrapper: Cursors, name: str) -> Any:
    other = wrapper.copy()
    other.connect()
    connection = other.connection

    def close() -> None:
        if not connection.closed and connection.pgconn.transaction_status != 0:
            connection.rollback()
        if not connection.closed:
            connection.autocommit = True  # it may go back to Django's pool
        other.close()

    try:
        connection.autocommit = False
        cursor = other.create_cursor(name)
        cursor.__class__ = _stream_class(type(cursor))  # type: ignore[arg-type]  # has a hash
        cursor.close_connection = close
    except BaseException:
        close()
        raise
    return wrapper._prepare_cursor(cursor)  # noqa: SLF001 - Django's
