"""Cursors that execute a statement, fetch all its rows, and keep nothing of it open.

Note [Statements without a facade]
Most statements are the ORM's own, outside of a transaction. No other code ever sees the connection
or the cursor of such a statement. So it is executed on the facade that is never lent, by one cursor
that is reset after each statement (`AsyncConnection.run_statement()`). When the cursor executes the
same SQL again, it still has the dumpers and loaders that psycopg has found for it, unless the user
of a facade has read `adapters` meanwhile, and so may have registered a type.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from operator import is_
from typing import TYPE_CHECKING, Any, TypeAlias

import psycopg
from psycopg import errors as e
from psycopg import generators
from psycopg._queries import PostgresClientQuery
from psycopg.abc import Params, PQGen, Query
from psycopg.abc import Transformer as AnyTransformer
from psycopg.adapt import AdaptersMap, Transformer
from psycopg.pq import ExecStatus, TransactionStatus
from psycopg.pq.abc import PGconn, PGresult

from .cursors import abilities
from .prefix import BEGIN, Begin, NotRunError, prefix_for, seen_for_begin
from .session_settings import Statement, declared
from .turns import check_turn

if TYPE_CHECKING:
    from .connection import Connection

_IDLE = TransactionStatus.IDLE
_TUPLES_OK = ExecStatus.TUPLES_OK

#: How many rows a statement has returned or changed, as in `Cursor.rowcount`; and the returned
#: rows, or None if the statement returns no rows.
Result: TypeAlias = tuple[int, list[tuple[Any, ...]] | None]


def result_of(cursor: Any) -> Result:
    """Return the result of the statement that `cursor` has executed, with all its rows."""
    rows = cursor.fetchall() if cursor.pgresult.status == _TUPLES_OK else None
    return cursor.rowcount, rows


class StatementCursor:
    """Execute a statement and fetch its rows, then reset the cursor for the next one (a mixin)."""

    _conn: Connection
    _reset: Callable[[], None]
    _tx: AnyTransformer
    _adapters: AdaptersMap
    _last_query: Query | None

    def run(self, query: Query, params: Params | None) -> Result:
        """Execute a statement, and return its result with all rows."""
        if self._conn.lease is not None:
            self._conn.has_looked = True  # the caller vouches for it, or the lease is dirty
        self.execute(query, params)  # type: ignore[attr-defined]  # of psycopg's
        result = result_of(self)
        self._reset()
        self._tx.set_pgresult(None)
        return result

    def _start_query(self, query: Query | None = None) -> PQGen[None]:
        check_turn(self._conn)
        return super()._start_query(query)  # type: ignore[misc,no-any-return]


class _ClientStatementCursor(StatementCursor):
    """Execute a statement in fewer steps than psycopg does (a mixin for `ClientCursor`).

    If the SQL is the same as that of the last statement, only the parameters are converted anew.
    """

    _pgconn: PGconn
    pgresult: PGresult
    _check_results: Callable[[list[PGresult]], None]
    _execute_plainly_gen: Callable[..., PQGen[None]]
    #: The last statement, parsed, into which new parameters can be merged.
    _merged: PostgresClientQuery = None  # type: ignore[assignment]

    def run(self, query: Query, params: Params | None) -> Result:
        conn = self._conn
        if conn._pipeline:  # noqa: SLF001
            return super().run(query, params)
        settings = conn.session_settings
        self._merge(query, params)
        try:
            if conn.lease is None:  # the facade that is never lent: one task at a time uses it
                if declared.get() is None and not (settings.outside or settings.base):
                    result = conn.wait(self._run_gen())
                else:
                    result = conn.wait(self._run_settled_gen(query, params))
            else:
                with conn.lock:
                    if conn.turns is not None:
                        check_turn(conn)
                    if declared.get() is None and not (settings.outside or settings.base):
                        result = conn.wait(self._run_gen_in_turn(query, params))
                    else:
                        result = conn.wait(self._run_settled_gen(query, params))
        except e._NO_TRACEBACK as exc:  # noqa: SLF001 - as psycopg does
            raise exc.with_traceback(None)  # noqa: B904 - the same error
        return self._fetch(result)

    def _merge(self, query: Query, params: Params | None) -> None:
        merged = self._merged
        if query == self._last_query and type(params) is tuple and merged._order is None:  # noqa: SLF001
            literal = self._tx.as_literal
            merged.params = tuple([b"NULL" if each is None else literal(each) for each in params])
            try:
                merged.query = merged.template % merged.params
            except TypeError:
                merged.dump(params)  # raises: there are too many parameters, or too few
            return
        self._last_query = None
        self._tx = Transformer(self)  # type: ignore[arg-type]  # a mixin
        self._merged = PostgresClientQuery(self._tx)
        self._merged.convert(query, params)
        if params is not None:  # else the query is no template, into which parameters can be merged
            self._last_query = query

    def _run_gen(self, prefix: Begin | None = None) -> PQGen[PGresult]:
        merged = self._merged
        self._pgconn.send_query(merged.query if prefix is None else prefix.write() + merged.query)
        merged.query, merged.params = b"", None  # they may contain secrets
        results: list[PGresult] = yield from generators.execute(self._pgconn)
        if prefix is not None:
            prefix.drop_results(results)
        self._check_results(results)
        yield from self._conn._prepared.maintain_gen(self._conn)  # noqa: SLF001
        return results[0]

    def _run_gen_in_turn(self, query: Query, params: Params | None) -> PQGen[PGresult]:
        conn = self._conn
        if conn._autocommit or conn.pgconn.transaction_status != _IDLE:  # noqa: SLF001
            result = yield from self._run_gen()
            return result
        if not all(map(is_, seen_for_begin(), BEGIN)):
            conn.has_looked = True
            yield from conn._start_query()  # noqa: SLF001
            result = yield from self._run_gen()
            return result
        result = yield from self._run_prefixed_gen(Begin(conn), query, params)
        return result

    def _run_settled_gen(self, query: Query, params: Params | None) -> PQGen[PGresult]:
        """Run a statement with the settings that the running code declares."""
        conn = self._conn
        # The caller vouches for the statement, or has marked the lease as dirty.
        vouched = conn.lease is None or not conn.lease.dirty
        statement = Statement(shares=True, keeps_settings=vouched)
        if (prefix := prefix_for(conn, statement)) is None:
            result = yield from conn.in_own_block_gen(self._run_plainly_gen(statement))
        else:
            if not prefix.begins:
                yield from conn.begin_gen()
            try:
                result = yield from self._run_prefixed_gen(prefix, query, params)
            finally:
                conn.executed(statement)
        return result

    def _run_plainly_gen(self, statement: Statement) -> PQGen[PGresult]:
        conn = self._conn
        conn.has_looked, conn.next_statement = True, statement
        yield from conn._start_query()  # noqa: SLF001
        result = yield from self._run_gen()
        return result

    def _run_prefixed_gen(
        self, prefix: Begin, query: Query, params: Params | None
    ) -> PQGen[PGresult]:
        try:
            result = yield from self._run_gen(prefix)
            return result
        except NotRunError:
            prefix.failed()
            self._conn.has_looked = True
        except BaseException:
            prefix.failed()
            raise
        # After the `except`, or an error of the statement would show the `NotRunError`, too.
        yield from self._conn.in_own_block_gen(self._execute_plainly_gen(query, params))
        result = self.pgresult
        self._reset()
        return result

    def _fetch(self, result: PGresult) -> Result:
        if result.status != _TUPLES_OK:
            count = result.command_tuples
            return (-1 if count is None else count), None
        count, tx = result.ntuples, self._tx
        tx.set_pgresult(result)
        rows = tx.load_rows(0, count, tuple)
        tx.set_pgresult(None)
        return count, rows


@functools.lru_cache(maxsize=64)
def statement_class(cursor_class: type[Any]) -> type[Any]:
    """Return a class derived from `cursor_class` that also has `StatementCursor.run()`."""
    on_client = issubclass(cursor_class, psycopg.ClientCursor)
    runs = _ClientStatementCursor if on_client else StatementCursor
    bases: Any = (runs, *abilities(cursor_class), cursor_class)
    return type(cursor_class.__name__, bases, {"__module__": __name__})
