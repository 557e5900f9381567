"""BEGIN in one message with the first statement of a transaction: one round trip for both.

psycopg sends BEGIN in a message of its own and waits for the answer. A cursor that binds parameters
on the client (`psycopg.ClientCursor`) sends its statement as plain text, with the simple query
protocol; so BEGIN can stand in front of the statement, in the same message.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import is_
from typing import Protocol

import psycopg
from psycopg._queries import PostgresQuery
from psycopg.abc import Params, PQGen, Query
from psycopg.pq import DiagnosticField, ExecStatus, TransactionStatus
from psycopg.pq.abc import PGconn, PGresult

from .shortcuts import looking

_IDLE = TransactionStatus.IDLE

#: BEGIN may be sent this way if ``all(map(is_, seen_for_begin(), BEGIN))``: the shortcut is on, and
#: nobody has patched the methods of psycopg that it bypasses.
seen_for_begin, BEGIN = looking(
    "begin",
    "connection._start_query connection._exec_command cursor._execute_send",
    connection=psycopg.Connection,
    cursor=psycopg.ClientCursor,
)


def _nothing() -> PQGen[None]:
    yield from ()


class NotBegunError(Exception):
    """Raised within this module: the statement sent with BEGIN is empty, or cannot be parsed."""


class _Connection(Protocol):
    """The part of a connection that `BeginningCursor` uses (a protocol for type checkers)."""

    has_looked: bool
    _autocommit: bool
    _pipeline: object
    _start_query: Callable[[], PQGen[None]]

    @property
    def pgconn(self) -> PGconn: ...

    def _get_tx_start_command(self) -> bytes: ...


class BeginningCursor:
    """A mixin for `ClientCursor`: sends BEGIN in one message with a transaction's first statement.

    If the server cannot parse the statement, it does not execute BEGIN either. Then BEGIN and the
    statement are sent again, one after the other, so that a transaction begins and fails, as it
    would with psycopg. But a statement that was cancelled while the server parsed it is not sent
    again, and no transaction has begun.
    """

    _conn: _Connection
    _pgconn: PGconn
    _query: PostgresQuery
    _execute_send: Callable[..., None]
    _check_results: Callable[[list[PGresult]], None]

    def _execute_gen(
        self, query: Query, params: Params | None = None, **kwargs: object
    ) -> PQGen[None]:
        conn = self._conn
        if (
            conn._autocommit  # noqa: SLF001
            or conn.pgconn.transaction_status != _IDLE
            or conn._pipeline  # noqa: SLF001
            or not all(map(is_, seen_for_begin(), BEGIN))
        ):
            return super()._execute_gen(query, params, **kwargs)  # type: ignore[misc,no-any-return]
        return self._begin_gen(query, params, **kwargs)

    def _begin_gen(self, query: Query, params: Params | None, **kwargs: object) -> PQGen[None]:
        execute_gen = self._execute_plainly_gen
        # Set on the objects, since methods of the class would make every other statement slower.
        self._conn._start_query = _nothing  # noqa: SLF001
        self._execute_send, self._check_results = self._send_with_begin, self._check_with_begin
        try:
            yield from execute_gen(query, params, **kwargs)
            return
        except NotBegunError:
            pass
        finally:
            self.__dict__.pop("_execute_send", None)
            self.__dict__.pop("_check_results", None)
            self._conn.__dict__.pop("_start_query", None)
            self._conn.has_looked = False
        yield from execute_gen(query, params, **kwargs)

    def _send_with_begin(
        self, query: PostgresQuery, *, binary: bool | None = None, **kwargs: object
    ) -> None:
        del self._conn._start_query, self._execute_send  # noqa: SLF001
        if binary:
            self._execute_send(query, binary=binary, **kwargs)  # raises: client cursors send text
        self._query = query
        begin = self._conn._get_tx_start_command()  # noqa: SLF001
        self._pgconn.send_query(begin + b"; " + query.query)

    def _check_with_begin(self, results: list[PGresult]) -> None:
        del self._check_results
        self._drop_begun(results)
        self._check_results(results)

    def _drop_begun(self, results: list[PGresult]) -> None:
        """Remove BEGIN's result; raise `NotBegunError` if the statement is to be sent again."""
        if len(results) > 1:
            del results[0]
        elif self._may_be_sent_again(results[0]):
            raise NotBegunError

    def _execute_plainly_gen(
        self, query: Query, params: Params | None, **kwargs: object
    ) -> PQGen[None]:
        return super()._execute_gen(query, params, **kwargs)  # type: ignore[misc,no-any-return]

    def _may_be_sent_again(self, result: PGresult) -> bool:
        """Return True if `result` shows that the statement was neither executed nor cancelled.

        `result` is the only one that the server has sent for BEGIN and the statement.
        """
        if result.status != ExecStatus.FATAL_ERROR:
            return True  # BEGIN's own result: the statement is empty
        if self._pgconn.transaction_status != _IDLE:
            return False
        return result.error_field(DiagnosticField.SQLSTATE) != b"57014"  # query_canceled
