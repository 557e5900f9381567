"""Stale prepared statements: the server has dropped them, or no longer accepts them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psycopg
from psycopg import errors as e
from psycopg._preparing import Prepare
from psycopg._queries import PostgresQuery
from psycopg.abc import Params, PQGen, Query
from psycopg.pq import TransactionStatus

from .own_blocks import OwnBlockCursor
from .session_settings import UNKNOWN, Statement
from .through_pooler import check_statement

if TYPE_CHECKING:
    from .declaring import DeclaringConnection

_IDLE = TransactionStatus.IDLE


class PreparingCursor(OwnBlockCursor):
    """Send a statement again, without preparing it, if its prepared statement is stale (a mixin).

    After an ``ALTER TABLE`` ("cached plan must not change result type") or a ``DEALLOCATE``, the
    server refuses to execute the prepared statement. In autocommit the statement is sent again. In
    a transaction the error is raised, since the transaction has failed; but the next transaction
    prepares the statement anew.
    """

    _conn: DeclaringConnection

    def _execute_gen(
        self,
        query: Query,
        params: Params | None = None,
        *,
        prepare: bool | None = None,
        **kwargs: object,
    ) -> PQGen[None]:
        execute_gen = super()._execute_gen  # type: ignore[misc]
        conn = self._conn
        if conn.session_settings.per_transaction:
            check_statement(query, conn)
        if conn.is_settled():
            conn.next_statement = Statement.of(query, conn)
        try:
            gen = execute_gen(query, params, prepare=prepare, **kwargs)
            yield from conn.in_own_block_gen(gen)
            return
        except (e.FeatureNotSupported, e.InvalidSqlStatementName) as exc:
            if not self._forget_prepared(exc) or self._conn.pgconn.transaction_status != _IDLE:
                raise
        finally:
            conn.next_statement = UNKNOWN
        yield from conn.in_own_block_gen(execute_gen(query, params, prepare=False, **kwargs))

    def _get_prepared(
        self, pgq: PostgresQuery, prepare: bool | None = None
    ) -> tuple[Prepare, bytes]:
        """Prepare nothing while DEALLOCATE ALL is due: psycopg sends that after the statement.

        It is due after `_forget_prepared()`, until a statement succeeds.
        """
        due = self._conn._prepared._to_flush  # noqa: SLF001
        if due and None in due:
            return Prepare.NO, b""
        return super()._get_prepared(pgq, prepare)  # type: ignore[misc,no-any-return]

    def executemany(self, *args: object, **kwargs: object) -> None:
        try:
            super().executemany(*args, **kwargs)
        except (e.FeatureNotSupported, e.InvalidSqlStatementName) as exc:
            self._forget_prepared(exc)  # not sent again: the iterator of parameters may be spent
            raise

    def _forget_prepared(self, exc: psycopg.Error) -> bool:
        """Forget all prepared statements if `exc` says that one is stale; return True if so."""
        # Look at the name of the server's C function: the message may be in any language.
        stale_plan = exc.diag.source_function == "RevalidateCachedQuery"
        if isinstance(exc, e.FeatureNotSupported) and not stale_plan:
            return False
        return self._conn._prepared.clear()  # noqa: SLF001
