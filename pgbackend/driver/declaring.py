"""A connection whose statements run with the settings that their code declares.

`PrefixingCursor` (prefix.py) sends most changes of settings in the message of the statement. This
module has the plain way, for the other statements: ``VACUUM`` and its like, which may not stand in
a message with others; statements whose parameters the server binds; COPY, `stream()`,
`executemany()`, and server-side cursors. For these, a change has a message of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import psycopg
from psycopg import errors as e
from psycopg import generators
from psycopg.abc import PQGen
from psycopg.pq import ExecStatus, Format, TransactionStatus
from psycopg.pq.abc import PGresult
from psycopg.sql import Composable

from . import through_pooler
from .session_settings import UNKNOWN, Change, SessionSettings, Statement, declared
from .shortcuts import is_psycopgs

RV = TypeVar("RV")

_IDLE = TransactionStatus.IDLE
_INTRANS = TransactionStatus.INTRANS
_INERROR = TransactionStatus.INERROR

#: The method of psycopg that a command with settings bypasses; a patch of it is called instead.
_EXEC = psycopg.Connection._exec_command  # noqa: SLF001
#: Commands of psycopg's that need settings: those that go on with a query, or run triggers.
_SETTLED = re.compile(rb"FETCH|MOVE|COMMIT(?! PREPARED)|PREPARE TRANSACTION")

_IN_PIPELINE = (
    "the settings that pgbackend.session() declares cannot change inside a pipeline: enter the "
    "session block before the pipeline, and leave it after the pipeline"
)


class DeclaringConnection(psycopg.Connection[Any]):
    """A psycopg connection that gives each statement the settings that its code declares."""

    #: The record of the server session's settings; all facades of a connection share it.
    session_settings: SessionSettings
    #: The properties of the statement that a cursor is about to send.
    next_statement: Statement = UNKNOWN

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.session_settings = SessionSettings()

    def change_due(self, statement: Statement) -> Change | None:
        """Return the change of settings that `statement` needs; None if it needs none.

        The change is meant to be sent with the statement, or in a transaction that is open.
        """
        status = self.pgconn.transaction_status
        if statement.is_neutral:
            self.session_settings.settle(status)  # before it begins another transaction
            return None
        local = status != _IDLE or not self._autocommit
        return self._change(local=local, at_once=self.is_per_statement())

    def _change(self, *, local: bool, at_once: bool = False) -> Change | None:
        change = self.session_settings.change(self.pgconn, local=local, at_once=at_once)
        if change is not None and self._pipeline:
            raise e.NotSupportedError(_IN_PIPELINE)
        return change

    def executed(self, statement: Statement) -> None:
        """Record that `statement` was executed, or is about to be."""
        self.session_settings.executed(statement, self.pgconn, autocommit=self._autocommit)

    def note_lost_values(self) -> None:
        """Let nobody use the server session after the lease: its outside values are not known.

        The message that reads them was interrupted. A connection that no pool lends is closed,
        unless a transaction is open, whose end brings the values back.
        """
        if self.pgconn.transaction_status == _IDLE and not self.session_settings.per_transaction:
            self.close()

    # --- The plain way: a message before the statement ---

    def _start_query(self) -> PQGen[None]:
        settings = self.session_settings
        if declared.get() is None and not settings.outside and not settings.base:
            return super()._start_query()
        return self._start_settled_gen()

    def begin_gen(self) -> PQGen[None]:
        """Begin a transaction if autocommit is off and none is open, as psycopg does."""
        return super()._start_query()

    def _start_settled_gen(self) -> PQGen[None]:
        statement, self.next_statement = self.next_statement, UNKNOWN
        self.session_settings.settle(self.pgconn.transaction_status)
        status = self.pgconn.transaction_status
        if not statement.is_neutral:
            begins = status == _IDLE and not self._autocommit and not self._pipeline
            if begins and self.session_settings.per_transaction:
                if psycopg.Connection._exec_command is _EXEC and is_psycopgs(_EXEC):  # noqa: SLF001
                    yield from self._begin_settled_gen(self._get_tx_start_command())
                else:  # a patch, which expects BEGIN
                    yield from self.begin_gen()
            yield from self.settle_gen()
        self.executed(statement)
        yield from self.begin_gen()

    def settle_gen(self) -> PQGen[None]:
        """Send the change of settings that the running code's next statement needs, if any."""
        is_idle = self.pgconn.transaction_status == _IDLE
        change = self._change(local=not is_idle)
        if change is not None:
            if is_idle and self.session_settings.per_transaction:
                raise e.NotSupportedError(through_pooler.NEEDS_TRANSACTION)
            yield from self._change_gen(change)

    def _change_gen(self, change: Change, then: bytes = b"") -> PQGen[list[PGresult]]:
        """Send `change`, and the command `then` in the same message; return the results of `then`.

        Raises psycopg's error if the server refuses a setting.
        """
        change.sent()
        self.pgconn.send_query(change.sql + b"; " + then if then else change.sql)
        try:
            results: list[PGresult] = yield from generators.execute(self.pgconn)
        except BaseException:
            if change.reads:
                self.note_lost_values()
            raise
        own, rest = results[: change.results], results[change.results :]
        if own[-1].status == ExecStatus.FATAL_ERROR:
            change.failed(self.pgconn.transaction_status)
            raise change.refusal(own[-1], self.pgconn)
        change.done(own, self.pgconn)
        if rest and rest[-1].status == ExecStatus.FATAL_ERROR:
            change.failed(self.pgconn.transaction_status)
        return rest

    @contextmanager
    def pipeline(self) -> Iterator[psycopg.Pipeline]:
        """Open a pipeline, as psycopg does; first give its statements the declared settings."""
        with self.lock:
            if not self._pipeline and self.is_settled():
                self.wait(self.settle_gen())
        with super().pipeline() as pipeline:
            yield pipeline

    @contextmanager
    def _pipeline_nolock(self) -> Iterator[psycopg.Pipeline]:
        if self.is_settled():
            self.wait(self.settle_gen())
        with super()._pipeline_nolock() as pipeline:
            yield pipeline

    def is_settled(self) -> bool:
        """Return whether statements need a look at settings: declared ones, or changed ones."""
        settings = self.session_settings
        return declared.get() is not None or bool(settings.outside or settings.base)

    # --- Through a transaction pooler: settings end with the transaction ---

    def is_per_statement(self) -> bool:
        """Return whether the next statement's settings must not outlive that statement."""
        return (
            self.session_settings.per_transaction
            and self._autocommit
            and self.pgconn.transaction_status == _IDLE
        )

    def _needs_own_block(self) -> bool:
        return (
            self.is_per_statement()
            and not self._pipeline
            and self.is_settled()
            and self._change(local=True, at_once=True) is not None
        )

    def _begin_settled_gen(self, begin: bytes, *, at_once: bool = False) -> PQGen[None]:
        """Begin a transaction with the settings that its code declares, in one message."""
        change = self._change(local=True, at_once=at_once)
        if change is None:
            return
        change.sent()
        self.pgconn.send_query(begin + b"; " + change.sql)
        results: list[PGresult] = yield from generators.execute(self.pgconn)
        if results[-1].status == ExecStatus.FATAL_ERROR:
            change.failed(self.pgconn.transaction_status)
            raise change.refusal(results[-1], self.pgconn)
        change.done(results[1:], self.pgconn)

    def in_own_block_gen(self, gen: PQGen[RV]) -> PQGen[RV]:
        """Run `gen`, which sends a statement, in a transaction of its own if its settings need one.

        An interruption that closes this generator leaves the transaction open, for the code that
        gets the connection back to roll it back.
        """
        if self.next_statement.is_neutral or not self._needs_own_block():
            return (yield from gen)
        try:
            yield from self._begin_settled_gen(b"BEGIN", at_once=True)
            result = yield from gen
        except Exception as exc:
            if isinstance(exc, e.ActiveSqlTransaction):
                exc.add_note(through_pooler.NEEDS_NO_TRANSACTION)
            if self.pgconn.transaction_status in (_INTRANS, _INERROR):
                yield from super()._exec_command(b"ROLLBACK")
            raise
        yield from super()._exec_command(b"COMMIT")
        return result

    @contextmanager
    def own_block(self) -> Iterator[None]:
        """Run calls in a transaction of its own if their settings need one: see above."""
        with self.lock:
            if needs := self._needs_own_block():
                self.wait(self._begin_settled_gen(b"BEGIN", at_once=True))
        if not needs:
            yield
            return
        try:
            yield
        except BaseException:
            with suppress(psycopg.Error):
                self.rollback()
            raise
        self.commit()

    def _deallocate(self, name: bytes | None) -> PQGen[None]:
        if not self.session_settings.per_transaction or through_pooler.deallocates(name):
            yield from super()._deallocate(name)

    # --- Commands of psycopg's own ---

    def _exec_command(
        self, command: Any, result_format: Format = Format.TEXT
    ) -> PQGen[PGresult | None]:
        settings = self.session_settings
        if declared.get() is None and not settings.outside and not settings.base:
            return super()._exec_command(command, result_format)
        return self._exec_settled(command, result_format)

    def _exec_settled(self, command: Any, result_format: Format) -> PQGen[PGresult | None]:
        """Execute FETCH, MOVE and commits with the declared settings, other commands as they are.

        A query that a FETCH goes on with, and a trigger that is deferred to COMMIT, may depend on
        settings.
        """
        statement, self.next_statement = self.next_statement, UNKNOWN
        text = self._as_bytes(command)
        self.session_settings.settle(self.pgconn.transaction_status)
        if _SETTLED.match(text) and not self._pipeline:
            is_plain = psycopg.Connection._exec_command is _EXEC and is_psycopgs(_EXEC)  # noqa: SLF001
            shares = result_format == Format.TEXT and is_plain
            change = self._change(local=shares or self.pgconn.transaction_status != _IDLE)
            if change is not None and shares:
                rest = yield from self._change_gen(change, text)
                if len(rest) != 1 or rest[0].status == ExecStatus.FATAL_ERROR:
                    raise e.error_from_result(rest[-1], encoding=self.pgconn._encoding)  # noqa: SLF001
                self._executed_command(text, statement)
                return rest[0]
            if change is not None:
                yield from self._change_gen(change)
        result = yield from super()._exec_command(text, result_format)
        self._executed_command(text, statement)
        return result

    def _executed_command(self, text: bytes, statement: Statement) -> None:
        self.session_settings.settle(self.pgconn.transaction_status)
        if text.startswith(b"ROLLBACK"):
            self.executed(Statement(undoes=True, keeps_settings=True))
        elif text.startswith((b"FETCH", b"MOVE")):
            self.executed(Statement(keeps_settings=statement.keeps_settings))

    def _as_bytes(self, command: Any) -> bytes:
        if isinstance(command, Composable):
            return command.as_bytes(self)
        return command.encode(self.pgconn._encoding) if isinstance(command, str) else command  # noqa: SLF001
