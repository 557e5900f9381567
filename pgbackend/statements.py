"""Statements that the ORM made: executed and fetched in one step.

Django's compilers open a cursor, execute one statement, fetch all of its rows and close the cursor.
To do it as it is written is to lend a connection, to make a cursor of psycopg's and to wrap it, and
to see to the errors of the database four times. `execute()` does the same at once, and gives the
connection back before the first row is looked at. Where Django's own code asks for the cursor, it
gets a `StatementCursor`.

It is done only where nobody could tell the difference. `can_execute()` looks for who observes
statements (`connection.queries`, `execute_wrapper()`), and for who has overridden or patched what
is passed over.
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
from django.db.backends import utils
from django.db.backends.postgresql.base import DatabaseWrapper as PostgresDatabaseWrapper
from django.db.backends.postgresql.psycopg_any import register_tzloader
from psycopg.postgres import types
from psycopg.pq import Format

from . import conf, state
from .driver import bridge
from .driver.bridge import Portal
from .driver.connection import LEASE_ENDED, Result
from .driver.errors import LeaseEnded
from .driver.pool import Lease, Pool
from .driver.shortcuts import is_psycopgs
from .driver.vouching import is_vouched
from .fast.registry import is_on
from .patches import NO_OTHERS, djangos, lookup
from .sessions import Session, State

#: What a wrapper's `cursor()` calls on the wrapper.
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
_TIMESTAMPTZ: int = types["timestamptz"].oid


def _is_own(*functions: Any) -> bool:
    """Whether `functions`, the last two psycopg's, are what has been released."""
    return djangos(*functions[:-2]) is not NO_OTHERS and all(map(is_psycopgs, functions[-2:]))


#: These as a class of wrappers has them; and what they call of Django's, and that of psycopg's.
called_on: Callable[[type[Any]], tuple[Any, ...]] = attrgetter(*_CALLED)
_called = lookup(
    "its.cursor its._cursor its._prepare_cursor its.create_cursor its.make_cursor "
    "its.validate_thread_sharing its.close_if_health_check_failed "
    "utils.CursorWrapper.execute utils.CursorWrapper._execute_with_wrappers "
    "utils.CursorWrapper._execute utils.CursorWrapper.__getattr__ cursor.fetchone cursor.fetchmany",
    its=PostgresDatabaseWrapper,
    utils=utils,
    cursor=psycopg.Cursor,
)
_DJANGOS = _called() if is_on("statements") and _is_own(*_called()) else NO_OTHERS


def can_execute(wrapper: Any) -> bool:
    """Whether `execute()` does all that the next cursor of `wrapper` would do, here and now."""
    here = _running()  # without a call of `bridge.green()`
    if type(here) is not Portal or _get_running_loop() is None:
        return False
    found = state.find(here, wrapper)
    scope, current = found.scope, found.state
    if (
        not current.pooled
        or not (current.autocommit or current.transaction is not None)
        or scope.execute_wrappers
        or scope.force_debug_cursor
        or not all(map(is_, called_on(type(wrapper)), wrapper.cursor_calls))
        or not wrapper.__dict__.keys().isdisjoint(_NAMES)
        or not all(map(is_, _called(), _DJANGOS))
        or not apps.ready
    ):
        return False
    return not conf.is_debugging()


def execute(wrapper: Any, sql: Any, params: Any = None, soils: bool = False) -> Result:
    """Execute a statement, and fetch its rows. Raises what Django's cursor raises.

    `soils` says that it may change its session, which is reset then.
    """
    if wrapper._thread_ident != threading.get_ident():
        wrapper.validate_thread_sharing()  # raises, or not
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
            return _execute_on_lease(wrapper, current, session, sql, params, soils)
        pool: Pool = wrapper.pool_alone()
        return pool.execute(sql, params, partial(adapting, wrapper.timezone))


def fetched(wrapper: Any, rows: list[tuple[Any, ...]] | None) -> list[tuple[Any, ...]]:
    """The rows of a statement that returns some; raises what Django's cursor raises else."""
    if rows is None:
        with wrapper.wrap_database_errors:
            raise psycopg.ProgrammingError("the last operation didn't produce records")
    return rows


def _refuse(wrapper: Any, current: State) -> None:
    """Raise what Django's cursor raises in a transaction that must be rolled back."""
    if current.connection is not None:  # it would have been asked for a cursor before
        with wrapper.wrap_database_errors:
            current.connection._check_connection_ok()  # noqa: SLF001 - raises, if it is closed
    wrapper.validate_no_broken_transaction()


def _execute_on_lease(  # noqa: PLR0913, PLR0917 - without a call in between
    wrapper: Any, current: State, session: Session, sql: Any, params: Any, soils: bool
) -> Result:
    """Use the connection that is held already, or from here on, when it is the statement's turn."""
    here: Any = _running()  # a portal, which knows what was found until its next step
    found, missing = here.found, current.connection is None
    pinned: Lease | None = wrapper.hold(current, session)
    try:
        if missing and here.found is not found:  # it has waited, while others had their turns
            state.take_turn(wrapper)
            if current.needs_rollback:
                _refuse(wrapper, current)
        if current.lease is None:
            current.connection._check_connection_ok()  # noqa: SLF001 - raises
            raise LeaseEnded(LEASE_ENDED)
        if soils:
            current.lease.dirty = True
        return current.lease.execute(sql, params, partial(adapting, wrapper.timezone))
    except LeaseEnded:
        if (block := state.named_block(wrapper)) is not None:
            block.say_why_it_ended()
        raise
    finally:
        if pinned is not None:
            pinned.unpin()


def adapting(timezone: Any, adapters: Any) -> Callable[[Any], None] | None:
    """What a cursor must be prepared by, for moments to be loaded in `timezone`; mostly nothing."""
    loader: Any = adapters.get_loader(_TIMESTAMPTZ, Format.TEXT)
    return None if loader.timezone == timezone else partial(register_tzloader, timezone)


class StatementCursor:
    """What a compiler of Django's does with a cursor, for one statement after the other."""

    __slots__ = ("_position", "_rows", "db", "rowcount")

    def __init__(self, wrapper: Any) -> None:
        self.db = wrapper
        self._rows: list[tuple[Any, ...]] | None = None
        self._position = 0
        self.rowcount = -1

    def execute(self, sql: Any, params: Any = None) -> StatementCursor:
        """Execute a statement, and fetch its rows."""
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
