"""Commands in one message with the statement that they precede: one round trip for all.

psycopg sends BEGIN in a message of its own and waits for the answer. A cursor that binds parameters
on the client (`psycopg.ClientCursor`) sends its statement as plain text, with the simple query
protocol; so BEGIN can stand in front of the statement, in the same message. The same is true of the
commands that give the server session the declared settings (session_settings.py).
"""

from __future__ import annotations

from collections.abc import Callable
from operator import is_
from typing import Protocol, TypeVar

import psycopg
from psycopg import errors as e
from psycopg._queries import PostgresQuery
from psycopg.abc import Params, PQGen, Query
from psycopg.pq import DiagnosticField, ExecStatus, TransactionStatus
from psycopg.pq.abc import PGconn, PGresult

from .own_blocks import OwnBlockCursor
from .session_settings import UNKNOWN, Change, SessionSettings, Statement, declared
from .shortcuts import is_psycopgs, looking
from .through_pooler import NEEDS_NO_TRANSACTION, check_statement

RV = TypeVar("RV")

_IDLE = TransactionStatus.IDLE
_INERROR = TransactionStatus.INERROR
_FATAL_ERROR = ExecStatus.FATAL_ERROR

#: BEGIN may be sent this way if ``all(map(is_, seen_for_begin(), BEGIN))``: the shortcut is on, and
#: nobody has patched the methods of psycopg that it bypasses.
seen_for_begin, BEGIN = looking(
    "begin",
    "connection._start_query connection._exec_command cursor._execute_send",
    connection=psycopg.Connection,
    cursor=psycopg.ClientCursor,
)


#: The method of psycopg that a statement with settings bypasses; a patch of it is called instead.
_SEND = psycopg.ClientCursor._execute_send  # noqa: SLF001


def _nothing() -> PQGen[None]:
    yield from ()


class NotRunError(Exception):
    """Raised within this package: a statement was not run, and is to be sent without a prefix.

    The statement is empty, the server could not parse it, or the server has refused a setting.
    """


class PrefixedConnection(Protocol):
    """The part of a connection that a prefix uses (a protocol for type checkers)."""

    session_settings: SessionSettings
    next_statement: Statement
    _autocommit: bool

    @property
    def _pipeline(self) -> object: ...
    @property
    def pgconn(self) -> PGconn: ...

    def change_due(self, statement: Statement) -> Change | None: ...
    def begin_gen(self) -> PQGen[None]: ...
    def executed(self, statement: Statement) -> None: ...
    def is_per_statement(self) -> bool: ...
    def in_own_block_gen(self, gen: PQGen[RV]) -> PQGen[RV]: ...
    def note_lost_values(self) -> None: ...
    def _get_tx_start_command(self) -> bytes: ...


class _Connection(PrefixedConnection, Protocol):
    """The part of a connection that `PrefixingCursor` uses (a protocol for type checkers)."""

    has_looked: bool
    _start_query: Callable[[], PQGen[None]]


class Begin:
    """A prefix of one statement: BEGIN, in the same message."""

    __slots__ = ("_conn",)

    #: Whether the prefix has BEGIN.
    begins = True

    def __init__(self, connection: PrefixedConnection) -> None:
        self._conn = connection

    def write(self) -> bytes:
        """Return the commands, which the caller sends at once with the statement after them."""
        return self._conn._get_tx_start_command() + b"; "  # noqa: SLF001

    def drop_results(self, results: list[PGresult]) -> None:
        """Remove the results of the commands, and leave those of the statement.

        Raises `NotRunError` if the statement is to be sent again, and psycopg's error if the server
        has refused a setting.
        """
        if len(results) > 1:
            del results[0]
        elif self._may_be_sent_again(results[0]):
            raise NotRunError

    def _may_be_sent_again(self, result: PGresult) -> bool:
        """Return True if the last `result` says: the statement was neither run nor cancelled."""
        if result.status != _FATAL_ERROR:
            return True  # the statement is empty
        if self._conn.pgconn.transaction_status != _IDLE:
            return False
        return result.error_field(DiagnosticField.SQLSTATE) != b"57014"  # query_canceled

    def failed(self) -> None:
        """Record that the statement has failed, or was interrupted; here, there is no record."""


class Settle(Begin):
    """A prefix that changes settings, after BEGIN if `begins`."""

    __slots__ = ("_change", "_has_failed", "_is_sent", "begins")

    def __init__(self, connection: PrefixedConnection, change: Change, *, begins: bool) -> None:
        self._conn = connection
        self._change = change
        self.begins = begins
        #: Whether the message was sent; whether the server's results have come, with an error.
        self._is_sent = False
        self._has_failed: bool | None = None

    def write(self) -> bytes:
        begin = super().write() if self.begins else b""
        self._is_sent = True
        self._change.sent()
        # On lines of their own: PostgreSQL shows the line of an error in its message.
        return begin + self._change.sql + b";\n"

    def drop_results(self, results: list[PGresult]) -> None:
        begin = int(self.begins)
        own = begin + self._change.results
        self._has_failed = results[-1].status == _FATAL_ERROR
        if len(results) > own:
            self._change.done(results[begin:], self._conn.pgconn)
            del results[:own]
        elif self._may_be_sent_again(results[-1]):
            raise NotRunError
        elif len(results) > begin:
            raise self._change.refusal(results[-1], self._conn.pgconn)

    def failed(self) -> None:
        status = self._conn.pgconn.transaction_status
        if not self._is_sent:
            return
        if self._has_failed or (self._has_failed is None and status == _INERROR):
            self._change.failed(status)
        elif self._has_failed is None and self._change.reads:
            self._conn.note_lost_values()


def prefix_for(connection: PrefixedConnection, statement: Statement) -> Begin | None:
    """Return what is to be sent in one message with `statement`; None if nothing is.

    The caller has the connection's lock, and sends the statement by the simple query protocol.
    """
    if connection._pipeline:  # noqa: SLF001
        return None
    connection.session_settings.settle(connection.pgconn.transaction_status)
    begins = (
        not connection._autocommit  # noqa: SLF001
        and connection.pgconn.transaction_status == _IDLE
        and all(map(is_, seen_for_begin(), BEGIN))
    )
    change = connection.change_due(statement)
    if change is None:
        return Begin(connection) if begins else None
    is_plain = psycopg.ClientCursor._execute_send is _SEND and is_psycopgs(_SEND)  # noqa: SLF001
    # If the settings must not outlive the statement, both need one transaction anyway.
    shares = statement.shares or connection.is_per_statement()
    if shares and is_plain and not change.stands_alone():
        return Settle(connection, change, begins=begins)
    return None


class PrefixingCursor(OwnBlockCursor):
    """A mixin for `ClientCursor`: sends a prefix in one message with the statement.

    That is BEGIN with a transaction's first statement, and the change of the declared settings. If
    the statement was not run, because the server could not parse it, say, everything is sent again
    in messages of its own: so a transaction begins and fails, as it would with psycopg. But a
    statement that was cancelled while the server parsed it is not sent again, and no transaction
    has begun.
    """

    _conn: _Connection  # type: ignore[assignment]  # the part that is used here
    _pgconn: PGconn
    _query: PostgresQuery
    _prefix: Begin
    _execute_send: Callable[..., None]
    _check_results: Callable[[list[PGresult]], None]

    def _execute_gen(
        self, query: Query, params: Params | None = None, **kwargs: object
    ) -> PQGen[None]:
        conn = self._conn
        settings = conn.session_settings
        if declared.get() is not None or settings.outside or settings.per_transaction:
            return self._settled_gen(query, params, **kwargs)
        if not (
            conn._autocommit  # noqa: SLF001
            or conn.pgconn.transaction_status != _IDLE
            or conn._pipeline  # noqa: SLF001
            or not all(map(is_, seen_for_begin(), BEGIN))
        ):
            return self._prefixed_gen(Begin(conn), query, params, **kwargs)
        return super()._execute_gen(query, params, **kwargs)  # type: ignore[misc,no-any-return]

    def _settled_gen(self, query: Query, params: Params | None, **kwargs: object) -> PQGen[None]:
        """Execute `query` with the settings that the running code declares."""
        conn = self._conn
        if conn.session_settings.per_transaction:
            check_statement(query, conn)
        statement = conn.next_statement = Statement.of(query, conn)
        try:
            if (prefix := prefix_for(conn, statement)) is None:
                plainly = self._execute_plainly_gen(query, params, **kwargs)
                yield from conn.in_own_block_gen(plainly)
            else:
                try:
                    yield from self._prefixed_gen(prefix, query, params, **kwargs)
                finally:
                    conn.executed(statement)
        finally:
            conn.next_statement = UNKNOWN

    def _prefixed_gen(
        self, prefix: Begin, query: Query, params: Params | None, **kwargs: object
    ) -> PQGen[None]:
        execute_gen = self._execute_plainly_gen
        conn = self._conn
        # Set on the objects, since methods of the class would make every other statement slower.
        conn._start_query = _nothing if prefix.begins else conn.begin_gen  # noqa: SLF001
        self._prefix = prefix
        self._execute_send, self._check_results = self._send_prefixed, self._check_prefixed
        try:
            yield from execute_gen(query, params, **kwargs)
            return
        except NotRunError:
            prefix.failed()
        except BaseException as exc:
            prefix.failed()
            if isinstance(exc, e.ActiveSqlTransaction) and conn.is_per_statement():
                exc.add_note(NEEDS_NO_TRANSACTION)
            raise
        finally:
            self.__dict__.pop("_execute_send", None)
            self.__dict__.pop("_check_results", None)
            del self._prefix
            conn.__dict__.pop("_start_query", None)
            conn.has_looked = False
        yield from conn.in_own_block_gen(execute_gen(query, params, **kwargs))

    def _send_prefixed(
        self, query: PostgresQuery, *, binary: bool | None = None, **kwargs: object
    ) -> None:
        del self._conn._start_query, self._execute_send  # noqa: SLF001
        if binary:
            self._execute_send(query, binary=binary, **kwargs)  # raises: client cursors send text
        self._query = query
        self._pgconn.send_query(self._prefix.write() + query.query)

    def _check_prefixed(self, results: list[PGresult]) -> None:
        del self._check_results
        self._prefix.drop_results(results)
        self._check_results(results)

    def _execute_plainly_gen(
        self, query: Query, params: Params | None, **kwargs: object
    ) -> PQGen[None]:
        return super()._execute_gen(query, params, **kwargs)  # type: ignore[misc,no-any-return]
