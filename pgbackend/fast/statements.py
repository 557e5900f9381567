"""Executes a statement of the ORM, and fetches its rows, in one step: the shortcut `statements`.

Django's compilers open a cursor, execute one statement, fetch all of its rows and close the cursor.
The plain way for that leases a connection, makes a cursor of psycopg's, wraps it, and translates
database errors at four places. `execute()` does all this in one step, and gives the connection back
before the caller sees the first row. If Django's own code needs a cursor, it gets a
`StatementCursor`.

The shortcut is taken only if no code could tell the difference. `can_execute()` looks for observers
of statements (`connection.queries`, `execute_wrapper()`), and for overridden or patched methods of
the wrapper; `is_executed_by_django()` looks for those of compilers.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from operator import attrgetter, is_
from typing import Any, Self

import psycopg
from django.apps import apps
from django.core.exceptions import EmptyResultSet
from django.db.backends import utils
from django.db.backends.postgresql.base import DatabaseWrapper as PostgresDatabaseWrapper
from django.db.models.sql import compiler as sql_compiler
from django.db.models.sql.constants import (
    CURSOR,
    GET_ITERATOR_CHUNK_SIZE,
    MULTI,
    ROW_COUNT,
    SINGLE,
)

from pgbackend import conf, expressions, state
from pgbackend.adapters import adapting
from pgbackend.compiler import (
    COMPILERS,
    CompiledStatement,
    CompiledUpdate,
    SQLAggregateCompiler,
    SQLCompiler,
    SQLDeleteCompiler,
    SQLInsertCompiler,
    SQLUpdateCompiler,
    put_before,
)
from pgbackend.driver import bridge
from pgbackend.driver.bridge import Portal
from pgbackend.driver.connection import LEASE_ENDED
from pgbackend.driver.errors import LeaseEnded
from pgbackend.driver.lease import Lease
from pgbackend.driver.pool import Pool
from pgbackend.driver.session_settings import declared
from pgbackend.driver.shortcuts import is_psycopgs
from pgbackend.driver.statement_cursors import Result
from pgbackend.driver.turns import TurnTakenError
from pgbackend.driver.vouching import is_vouched
from pgbackend.patches import NO_OTHERS, lookup, unpatched
from pgbackend.sessions import Session, State
from pgbackend.wrapper.cursors import Cursors

from .registry import is_on
from .written_values import are_returned_rows_djangos

#: The methods that a wrapper's `cursor()` calls.
_CALLED = (
    *(
        "cursor",
        "_cursor",
        "_prepare_cursor",
        "create_cursor",
        "ensure_connection",
        "get_new_connection",
    ),
    *("make_cursor", "validate_no_broken_transaction", "validate_thread_sharing"),
)
_NAMES = frozenset(_CALLED)
_get_running_loop = asyncio._get_running_loop
_running = bridge.running


def _is_own(*functions: Any) -> bool:
    """Return whether no function is patched; the last two are psycopg's, the others Django's."""
    return unpatched(*functions[:-2]) is not NO_OTHERS and all(map(is_psycopgs, functions[-2:]))


#: Return the methods `_CALLED` of a class; the functions of Django and psycopg that they call.
_called_on: Callable[[type[Any]], tuple[Any, ...]] = attrgetter(*_CALLED)
_called = lookup(
    "its.cursor its._cursor its._prepare_cursor its.create_cursor its.make_cursor "
    "its.validate_thread_sharing its.close_if_health_check_failed "
    "utils.CursorWrapper.execute utils.CursorWrapper._execute_with_wrappers "
    "utils.CursorWrapper._execute utils.CursorWrapper.__getattr__ cursor.fetchone cursor.fetchmany",
    its=PostgresDatabaseWrapper,
    utils=utils,
    cursor=psycopg.Cursor,
)
#: The methods `_CALLED` of the engine's own wrapper class; `install()` sets them.
_engines: tuple[Any, ...] = NO_OTHERS
# With the shortcut off, `can_execute()` must return False: `insert.py` calls it, too.
_DJANGOS = _called() if is_on("statements") and _is_own(*_called()) else NO_OTHERS
#: The bypassed functions of compilers: the shortcut is taken while they are the same as at import.
_for_executing = lookup(
    "sql.SQLCompiler.execute_sql sql.SQLInsertCompiler.execute_sql "
    "sql.SQLUpdateCompiler.execute_sql sql.cursor_iter",
    sql=sql_compiler,
)
_EXECUTE = unpatched(*_for_executing()) if is_on("statements") else NO_OTHERS
_COMPILERS = frozenset(COMPILERS)


def is_executed_by_django(made_by: Any) -> bool:
    """Return whether the compiler `made_by` is not derived, and its execution is not patched."""
    return type(made_by) in _COMPILERS and all(map(is_, _for_executing(), _EXECUTE))


def can_execute(wrapper: Any) -> bool:
    """Return True if the caller is green, and no code could tell `execute()` from a cursor."""
    here = _running()  # not `bridge.green()`: each statement would pay for the call
    if type(here) is not Portal or _get_running_loop() is None:
        return False
    found = state.find(here, wrapper)
    scope, current = found.scope, found.state
    if (
        not current.pooled
        or not (current.autocommit or current.transaction is not None)
        or scope.execute_wrappers
        or scope.force_debug_cursor
        or not all(map(is_, _called_on(type(wrapper)), _engines))
        or not wrapper.__dict__.keys().isdisjoint(_NAMES)
        or not all(map(is_, _called(), _DJANGOS))
        or not apps.ready
    ):
        return False
    return not conf.is_debugging()


def execute(wrapper: Any, sql: Any, params: Any = None, soils: bool = False) -> Result:
    """Execute a statement; return its row count and all its rows (None: it has no result set).

    Raises the same errors as Django's cursor. If `soils` is true, the statement may change the
    server session: the lease becomes dirty.
    """
    if wrapper._thread_ident != threading.get_ident():
        wrapper.validate_thread_sharing()  # raises, unless sharing is allowed
    while True:  # a statement may lose its turn any number of times
        current, session = state.state_in_turn(wrapper)
        assert session is not None
        if current.needs_rollback:
            _refuse(wrapper, current)
        with wrapper.wrap_database_errors:
            if (
                soils
                or current.transaction is not None
                or current.connection is not None
                or session.pins
            ):
                result = _execute_on_lease(wrapper, current, session, sql, params, soils)
                if result is not None:
                    return result
            else:
                pool: Pool = wrapper.acquire_pool()
                return pool.execute(sql, params, partial(adapting, wrapper.timezone))


def fetched(wrapper: Any, rows: list[tuple[Any, ...]] | None) -> list[tuple[Any, ...]]:
    """Return `rows`, the result of a statement; raise Django's error if it has no result set."""
    if rows is None:
        with wrapper.wrap_database_errors:
            raise psycopg.ProgrammingError("the last operation didn't produce records")
    return rows


def _refuse(wrapper: Any, current: State) -> None:
    """Raise the error that Django's cursor raises in a transaction that must be rolled back."""
    if current.connection is not None:  # Django makes the cursor first: that fails if it is closed
        with wrapper.wrap_database_errors:
            current.connection._check_connection_ok()  # noqa: SLF001 - raises, if it is closed
    wrapper.validate_no_broken_transaction()


def _execute_on_lease(  # noqa: PLR0913, PLR0917 - packing the arguments would cost time
    wrapper: Any, current: State, session: Session, sql: Any, params: Any, soils: bool
) -> Result | None:
    """Execute a statement on the connection of `current`, or on one that is leased for it now.

    Returns None if the statement was not sent, because it had lost its turn.
    """
    missing = current.connection is None
    pinned: Lease | None = wrapper.hold(current, session)
    try:
        if missing and current.needs_rollback:  # set by another task while this one waited
            _refuse(wrapper, current)
        if current.lease is None:
            current.connection._check_connection_ok()  # noqa: SLF001 - raises
            raise LeaseEnded(LEASE_ENDED)
        if soils:
            current.lease.dirty = True
        return current.lease.execute(sql, params, partial(adapting, wrapper.timezone))
    except TurnTakenError:
        return None
    except LeaseEnded:
        if (block := state.named_block(wrapper)) is not None:
            block.say_why_it_ended()
        raise
    finally:
        if pinned is not None:
            pinned.unpin()


class StatementCursor:
    """A cursor for compilers that execute a statement and fetch all its rows."""

    __slots__ = ("_position", "_rows", "db", "rowcount")

    def __init__(self, wrapper: Any) -> None:
        self.db = wrapper
        self._rows: list[tuple[Any, ...]] | None = None
        self._position = 0
        self.rowcount = -1

    def execute(self, sql: Any, params: Any = None) -> StatementCursor:
        """Execute a statement and fetch all rows; if not vouched for, it makes the lease dirty."""
        self.rowcount, self._rows = execute(self.db, sql, params, not is_vouched(sql))
        self._position = 0
        return self

    def fetchone(self) -> Any:
        rows = self.fetchmany(1)
        return rows[0] if rows else None

    def fetchmany(self, size: int = 1) -> list[tuple[Any, ...]]:
        rows, position = fetched(self.db, self._rows), self._position
        self._position = position + size
        return rows[position : position + size]

    def fetchall(self) -> list[tuple[Any, ...]]:
        return self.fetchmany(len(fetched(self.db, self._rows)))

    def close(self) -> None:
        self._rows = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class FetchesAtOnce(CompiledStatement):
    """A base of compilers: executes statements and fetches all their rows in one step."""

    def execute_sql(self, result_type: Any = MULTI, *args: Any, **kwargs: Any) -> Any:
        if _get_running_loop() is None and declared.get() is None:
            return super(CompiledStatement, self).execute_sql(result_type, *args, **kwargs)  # type: ignore[misc]
        if (
            args
            or kwargs.get("chunked_fetch")
            or result_type == CURSOR
            or _get_running_loop() is None
            or not is_executed_by_django(self)
            or not can_execute(self.connection)
        ):
            return super().execute_sql(result_type, *args, **kwargs)
        return self._execute_at_once(result_type, kwargs.get("chunk_size", GET_ITERATOR_CHUNK_SIZE))

    def _execute_at_once(self: Any, result_type: Any, chunk_size: int) -> Any:
        """Do what Django's `execute_sql()` does, by `execute()`."""
        noted = expressions.noted
        try:
            sql, params = self.as_sql()
            if not sql:
                raise EmptyResultSet
        except EmptyResultSet:
            return iter([]) if result_type == MULTI else None
        count, rows = execute(self.connection, sql, params, expressions.noted is not noted)
        if result_type == ROW_COUNT:
            return count
        if not result_type:
            return None
        rows = fetched(self.connection, rows)
        if result_type == SINGLE:
            return rows[0][: self.col_count] if rows else None
        if self.has_extra_select:
            rows = [row[: self.col_count] for row in rows]
        if len(rows) <= chunk_size:
            return [rows] if rows else []
        return [rows[n : n + chunk_size] for n in range(0, len(rows), chunk_size)]


class UpdatesAtOnce(FetchesAtOnce, CompiledUpdate):
    """A base of the UPDATE compiler: executes an UPDATE and fetches its rows in one step."""

    def _execute_at_once(self: Any, result_type: Any, chunk_size: int) -> Any:
        if self.query.related_updates:  # further UPDATEs, of parents' tables
            return super(FetchesAtOnce, self).execute_sql(result_type)
        return super()._execute_at_once(result_type, chunk_size) or 0

    def fetches_returned_at_once(self) -> bool:
        return is_executed_by_django(self) and are_returned_rows_djangos(self.connection)


class InsertsAtOnce(CompiledStatement):
    """A base of the INSERT compiler: INSERTs that fetch rows use a `StatementCursor`."""

    def fetches_at_once(self) -> bool:
        return is_executed_by_django(self) and are_returned_rows_djangos(self.connection)


def cursor_for_compiler(wrapper: Any, here: Portal) -> StatementCursor | None:
    """Return a `StatementCursor` if the caller is a compiler that fetches all rows.

    Otherwise returns None, and the wrapper opens an ordinary cursor.
    """
    session = state.find(here, wrapper).session
    if session is None or not session.at_once:
        return None
    session.at_once = False
    if not can_execute(wrapper):
        return None
    session.compiled = False
    return StatementCursor(wrapper)


def install() -> None:
    """Plug the shortcut into the compilers, and into `DatabaseWrapper.cursor()`."""
    global _engines  # noqa: PLW0603 - set here, after the shortcut `cursors` has replaced methods
    Cursors.cursor_for_compiler = cursor_for_compiler  # type: ignore[method-assign, assignment]
    _engines = _called_on(Cursors)
    for kind in (SQLCompiler, SQLDeleteCompiler, SQLAggregateCompiler):
        put_before(kind, FetchesAtOnce)
    put_before(SQLUpdateCompiler, UpdatesAtOnce)
    put_before(SQLInsertCompiler, InsertsAtOnce)
