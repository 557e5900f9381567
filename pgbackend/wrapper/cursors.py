"""Cursors: how they are opened, on a connection that is leased for them.

Green, a cursor outside of transactions has a lease of its own: the connection goes back when the
cursor is closed, or has nothing more to fetch. If the cursor is used again, it takes a new lease.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import FrameType
from typing import Any

from django.db import InterfaceError
from django.db.backends.postgresql.base import DatabaseWrapper as PostgresDatabaseWrapper

from pgbackend import frames, state
from pgbackend.attributes import of_connection
from pgbackend.driver import bridge
from pgbackend.driver.bridge import Portal
from pgbackend.driver.connection import LEASE_ENDED
from pgbackend.driver.cursors import adopt
from pgbackend.driver.errors import LeaseEnded
from pgbackend.driver.turns import let_take_turns
from pgbackend.patches import if_unpatched
from pgbackend.sessions import Session, State

from .transactions import Transactions

# Code that runs for each statement repeats what `bridge.green()` does: a call would cost too much.
_get_running_loop = asyncio._get_running_loop
_running = bridge.running

_DJANGOS_CURSOR = if_unpatched(PostgresDatabaseWrapper._cursor)  # type: ignore[attr-defined]


class Cursors(Transactions):
    """A wrapper that opens cursors; the shortcut `cursors` replaces some of its methods."""

    def cursor(self) -> Any:
        if _get_running_loop() is not None:
            here = _running()
            if type(here) is not Portal:
                self.check_context("cursor")
            elif (cursor := self.cursor_for_compiler(here)) is not None:
                return cursor
        if type(self)._cursor is Cursors._cursor:
            return super().cursor()
        with of_connection(self):
            return super().cursor()

    def chunked_cursor(self) -> Any:
        if type(self)._cursor is Cursors._cursor:
            return super().chunked_cursor()
        with of_connection(self):
            return super().chunked_cursor()

    def cursor_for_compiler(self, here: Portal) -> Any:
        """Return None: the caller then opens an ordinary cursor.

        The shortcut `statements` replaces this method: if the caller is a compiler that fetches all
        rows, its method returns a cursor with fewer steps, else None. `here` is the portal that
        runs this code.
        """
        return None

    def _cursor(self, name: str | None = None) -> Any:
        if state.plain_state(self) is not None:
            return super()._cursor(name)
        return self._cursor_in_turn(name)

    def _cursor_in_turn(self, name: str | None) -> Any:
        """Wait for the running code's turn, then open a cursor; for blocks and async code."""
        state.take_turn(self)
        current, session = state.state_and_session(self)
        if not current.pooled:
            try:
                cursor = super()._cursor(name)
            except (AttributeError, InterfaceError):
                # The transaction may have ended meanwhile, in the thread that has begun it.
                state.check_not_ended(self)
                raise
            if self.lent or current is not self._own or _get_running_loop() is not None:
                take_turn = partial(state.take_turn, self)
                let_take_turns(cursor.cursor, take_turn, partial(state.check_not_ended, self))
            return cursor
        compiled = session is not None and session.compiled
        current = self.begin_if_due(current)
        cursor = self._lease_cursor(current, session, name, compiled)
        if session is not None and compiled:
            session.compiled, session.cursor = False, cursor.cursor
        return cursor

    def _lease_cursor(
        self, current: State, session: Session | None, name: str | None, compiled: bool
    ) -> Any:
        djangos_class: Any = PostgresDatabaseWrapper
        pinned = self.hold(current, session)
        lease = current.lease
        wrapped = None
        try:
            if djangos_class._cursor is not _DJANGOS_CURSOR:
                wrapped = super()._cursor(name)
                cursor = wrapped.cursor
            else:
                self.close_if_health_check_failed()
                with self.wrap_database_errors:
                    cursor = self.create_cursor(name)
            if lease is not None:
                if name and (block := state.current_block(self)) is not None:
                    cursor.why_gone = block.why_cursors_are_gone
                if name or not compiled:
                    lease.opened_at = frames.place()
                if not compiled:
                    cursor.opened_at = _caller()
                cursor.renew, cursor.takes_turns = self._renew, True
        except (AttributeError, InterfaceError):
            # The transaction, and its lease, may have ended meanwhile.
            state.check_not_ended(self)
            raise
        finally:
            if pinned is not None:
                pinned.unpin()
        return wrapped or self._prepare_cursor(cursor)

    def _renew(self, cursor: Any) -> None:
        """Move `cursor`, whose lease is over, to the lease that the running code has or takes."""
        state.take_turn(self)
        current, session = state.state_and_session(self)
        if not current.pooled:
            state.check_not_ended(self)
            return  # the cursor's old connection refuses the statement
        current = self.begin_if_due(current)
        lease = self.hold(current, session)
        try:
            if current.lease is None:
                current.connection._check_connection_ok()  # noqa: SLF001 - raises
                raise LeaseEnded(LEASE_ENDED)
            cursor.move_to(current.connection)
        finally:
            if lease is not None:
                lease.unpin()

    def create_cursor(self, name: str | None = None) -> Any:
        cursor = super().create_cursor(name)
        if name and state.current_state(self).lease is not None:
            adopt(cursor)  # Django makes server-side cursors without the connection's factory
        return cursor

    @contextmanager
    def temporary_connection(self) -> Iterator[Any]:
        """Yield a cursor; afterwards close the connection, if it was opened for the cursor.

        In green code nothing is closed: the cursor's own lease ends with it. In an `atomic` block
        without a statement yet, Django's method would close the connection, and so end the
        transaction that the cursor began.
        """
        if state.current_state(self).pooled:
            with self.cursor() as cursor:
                yield cursor
        else:
            with super().temporary_connection() as cursor:
                yield cursor

    def validate_no_broken_transaction(self) -> None:
        # Django calls this for every statement, right before it is sent.
        own = state.plain_state(self)
        if own is not None and not own.needs_rollback:
            return
        if own is None:
            state.take_turn(self)
        super().validate_no_broken_transaction()

    def execute_wrapper(self, wrapper: Callable[..., Any]) -> AbstractContextManager[None]:
        return self._observed_wrapper(wrapper)

    @contextmanager
    def _observed_wrapper(self, wrapper: Callable[..., Any]) -> Iterator[None]:
        with super().execute_wrapper(wrapper):
            state.observe(self)
            yield


#: Modules between the code that opens a cursor and `_caller()`.
_CURSOR_MODULES = frozenset(
    (
        *(__name__, "pgbackend.wrapper.guards", "pgbackend.fast.cursors"),
        *("django.db.backends.base.base", "django.utils.asyncio"),
    )
)


def _caller() -> str | None:
    """Return "file:line" of the code that opens a cursor, for a warning; None if it is Django."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") in _CURSOR_MODULES:
        frame = frame.f_back
    if frame is None or frame.f_globals.get("__name__", "").startswith("django."):
        return None
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
