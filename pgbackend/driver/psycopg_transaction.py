"""psycopg's transactions, `Connection.transaction()`, whose end a cancellation cannot cut short."""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import TYPE_CHECKING

import psycopg

from .cancellation import deliver_cancellation, hold_cancellation

if TYPE_CHECKING:
    from .connection import Connection


class Transaction(psycopg.Transaction):
    """psycopg's transaction or savepoint (a context manager); a cancellation cannot cut its end."""

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
