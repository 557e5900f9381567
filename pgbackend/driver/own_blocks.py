"""Calls of a cursor that send several messages, in a transaction of their own if settings need one.

Through a transaction pooler, the settings that code declares end with each transaction. So
`executemany()`, COPY and `stream()` outside of a transaction get one: see `own_block()` in
declaring.py. `execute()` has its own ways (prefix.py, prepared.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from typing import TYPE_CHECKING, Any

from .through_pooler import check_statement

if TYPE_CHECKING:
    from .declaring import DeclaringConnection


class OwnBlockCursor:
    """A mixin for cursors: opens a transaction around calls that need one for their settings."""

    _conn: DeclaringConnection

    def executemany(self, query: Any, *args: Any, **kwargs: Any) -> None:
        executemany = super().executemany  # type: ignore[misc]
        if not self._conn.session_settings.per_transaction:
            executemany(query, *args, **kwargs)
            return
        check_statement(query, self._conn)
        with self._conn.own_block():
            executemany(query, *args, **kwargs)

    def copy(self, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]:
        copy: AbstractContextManager[Any] = super().copy(*args, **kwargs)  # type: ignore[misc]
        per_transaction = self._conn.session_settings.per_transaction
        return self._in_own_block(copy) if per_transaction else copy

    @contextmanager
    def _in_own_block(self, copy: AbstractContextManager[Any]) -> Iterator[Any]:
        with self._conn.own_block(), copy as copying:
            yield copying

    def stream(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        rows: Any = super().stream(*args, **kwargs)  # type: ignore[misc]
        per_transaction = self._conn.session_settings.per_transaction
        return self._stream_in_own_block(rows) if per_transaction else rows

    def _stream_in_own_block(self, rows: Any) -> Iterator[Any]:
        with self._conn.own_block(), closing(rows):
            yield from rows
