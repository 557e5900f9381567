"""psycopg's transactions, `Connection.transaction()`, whose end a cancellation cannot cut short."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

import psycopg
from psycopg.abc import PQGen

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
        try:
            with hold_cancellation():
                suppressed = super().__exit__(exc_type, exc_val, exc_tb)
        except psycopg.Error as exc:
            self._conn.check_outcome(exc)
            raise
        finally:
            if not self._conn._pipeline:  # noqa: SLF001 - else COMMIT waits for the pipeline's end
                self._conn.end_to_commit()
        deliver_cancellation()
        return suppressed

    def _commit_gen(self) -> PQGen[None]:
        if self._outer_transaction:
            yield from self._conn.before_commit_gen()
        yield from super()._commit_gen()
