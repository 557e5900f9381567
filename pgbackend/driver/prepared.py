"""Prepared statements that the server has dropped, or no longer accepts: prepare them anew."""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg import errors as e
from psycopg.abc import Params, PQGen, Query
from psycopg.pq import TransactionStatus

_IDLE = TransactionStatus.IDLE


class PreparingCursor:
    """Send a statement once more if the server no longer accepts it as it was prepared (a mixin).

    After an ``ALTER TABLE`` ("cached plan must not change result type"), or where somebody has
    deallocated the prepared statement, it was not executed. In autocommit it is sent again,
    unprepared. In a transaction the error stays, since it has doomed the transaction; but the next
    transaction prepares anew.
    """

    _conn: psycopg.Connection[Any]

    def _execute_gen(
        self,
        query: Query,
        params: Params | None = None,
        *,
        prepare: bool | None = None,
        **kwargs: object,
    ) -> PQGen[None]:
        execute_gen = super()._execute_gen  # type: ignore[misc]
        try:
            yield from execute_gen(query, params, prepare=prepare, **kwargs)
            return
        except (e.FeatureNotSupported, e.InvalidSqlStatementName) as exc:
            if not self._forget_prepared(exc) or self._conn.pgconn.transaction_status != _IDLE:
                raise
        yield from execute_gen(query, params, prepare=False, **kwargs)

    def executemany(self, *args: object, **kwargs: object) -> None:
        try:
            super().executemany(*args, **kwargs)  # type: ignore[misc]
        except (e.FeatureNotSupported, e.InvalidSqlStatementName) as exc:
            self._forget_prepared(exc)  # not sent again: the iterator of parameters may be spent
            raise

    def _forget_prepared(self, exc: psycopg.Error) -> bool:
        """Forget all prepared statements if `exc` says that one is stale; return True if so."""
        # Recognised by the function that raises it: the message is in the server's language.
        stale_plan = exc.diag.source_function == "RevalidateCachedQuery"
        if isinstance(exc, e.FeatureNotSupported) and not stale_plan:
            return False
        return self._conn._prepared.clear()  # noqa: SLF001
