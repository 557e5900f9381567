"""Cursors: how they are opened, each on a connection that is leased for it.

Outside of transactions, green code holds no connection between two statements: each cursor leases
one, which goes back when the cursor is closed, or has nothing more to fetch. If the cursor is used
again, it takes a new lease. In a transaction, the first statement leases the connection. Overrides
and patches of `ensure_connection()`, which may refuse to connect, are called when Django would call
them.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import FrameType
from typing import Any

from django.db import Error, InterfaceError, connections
from django.db.backends.postgresql.base import DatabaseWrapper as PostgresDatabaseWrapper

from pgbackend import frames, state, transactions
from pgbackend.attributes import of_connection
from pgbackend.driver import bridge
from pgbackend.driver.bridge import Portal
from pgbackend.driver.connection import LEASE_ENDED
from pgbackend.driver.cursors import adopt
from pgbackend.driver.errors import LeaseEnded
from pgbackend.driver.lease import Lease
from pgbackend.driver.pool import Pool
from pgbackend.driver.turns import let_take_turns
from pgbackend.driver.vouching import vouching
from pgbackend.patches import if_unpatched
from pgbackend.sessions import Session, State
from pgbackend.transactions import Transaction

from . import streams
from .transactions import Transactions

# Code that runs for each statement repeats what `bridge.green()` does: a call would cost too much.
_get_running_loop = asyncio._get_running_loop
_running = bridge.running

_DJANGOS_CURSOR = if_unpatched(PostgresDatabaseWrapper._cursor)  # type: ignore[attr-defined]
_ENSURE_CONNECTION = if_unpatched(PostgresDatabaseWrapper.ensure_connection)


class _InThePool:
    """Stands in for the connection that Django's wrapper would have, in `_ask_others()`."""

    closed = False


class Cursors(Transactions):
    """A wrapper that opens cursors, and leases a connection from the pool for each.

    The shortcut `cursors` replaces some of its methods.
    """

    # --- Opening a cursor ---

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
        if name and streams.is_apart(self):
            return streams.open_stream(self, name)
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

    # --- A connection for the cursor ---

    _asking_others = False

    def connect(self) -> None:
        """Open the wrapper's own connection; in green code, only check that one can be had.

        In green code no connection is held afterwards. If a transaction is open, its connection is
        closed, so that it is rolled back.
        """
        if self._asking_others:
            return
        current = state.current_state(self)
        if not current.pooled:
            super().connect()
            settings = getattr(self.connection, "session_settings", None)
            if settings is not None:  # the driver's own class of connections
                settings.database = self.alias
            return
        self.check_context("connect")
        if current.transaction is not None:
            # As in Django, the new connection is in no transaction.
            if current.lease is not None:
                current.lease.connection.close()
                current.lease.end()
            transactions.end(self, current)
        self.run_on_commit = []
        self.ensure_connection()

    def ensure_connection(self) -> None:
        """Guarantee that the database can be reached.

        In green code that holds no connection, one is leased and given back. In async code that is
        not green nothing is done, since each statement will lease a connection.
        """
        current = state.current_state(self)
        if self._asking_others and "ensure_connection" not in self._in_patches:
            super().ensure_connection()
        elif current.connection is not None:
            if PostgresDatabaseWrapper.ensure_connection is not _ENSURE_CONNECTION:
                self._let_patches_refuse()
        elif not current.pooled:
            super().ensure_connection()
        elif bridge.current() is not None and not current.closed_in_transaction:
            lease = self.lease_for(current, state.async_session(self))
            if lease is not None:
                lease.maybe_end()

    def lease_for(self, current: State, session: Session | None) -> Lease | None:
        """Lease a connection for the state `current`; return None if it has a connection already.

        Otherwise returns the new lease. `session` is the session of the running task.
        """
        if current.connection is not None:
            if type(self).ensure_connection is not _OWN_ENSURE_CONNECTION:
                self.ensure_connection()
            elif PostgresDatabaseWrapper.ensure_connection is not _ENSURE_CONNECTION:
                self._let_patches_refuse()
            return None
        transaction = current.transaction
        if transaction is None:
            state.check_not_ended(self)
            return self._take(current, None, session)
        assert transaction.leasing is not None
        with transaction.leasing:
            missing = current.connection is None  # another task may have leased it meanwhile
            return self._take(current, transaction, session) if missing else None

    def hold(self, current: State, session: Session | None) -> Lease | None:
        """Return the lease of `current`, pinned; lease a connection first if it has none.

        The caller must unpin it. Returns None if there is nothing to unpin: `current` is in a
        transaction, which pins the lease itself, or has a connection that is not leased.
        """
        while True:
            self.lease_for(current, session)
            lease = current.lease
            if current.transaction is not None or (
                lease is None and current.connection is not None
            ):
                return None
            if lease is not None:
                lease.pin()
                if not lease.ended:
                    return lease
                lease.pins -= 1
            # Once more: the garbage collector has freed the last holder of the lease just now.

    def acquire_pool(self) -> Pool:
        """Return the pool from which the caller leases a connection for one statement.

        Only for code outside of transactions. Calls the overrides and patches of
        `ensure_connection()` first, which may refuse.
        """
        if (
            type(self).ensure_connection is not _OWN_ENSURE_CONNECTION
            or PostgresDatabaseWrapper.ensure_connection is not _ENSURE_CONNECTION
        ):
            self._ask_others()
        return self._async_pool()

    def _take(
        self,
        current: State,
        transaction: Transaction | None,
        session: Session | None,
    ) -> Lease:
        if (
            type(self).ensure_connection is not _OWN_ENSURE_CONNECTION
            or PostgresDatabaseWrapper.ensure_connection is not _ENSURE_CONNECTION
        ):
            self._ask_others()
        with self.wrap_database_errors:
            lease = None if transaction is None else transaction.borrow()
            if lease is None:
                lease = self._get_lease(transaction)
        if transaction is not None:
            if not transaction.take(lease):
                lease.end()
                state.take_turn(self)  # raises: the block has ended while its task waited
                raise LeaseEnded(LEASE_ENDED)
            return lease
        current.take(lease)
        if session is not None:
            session.watch()
            if session.pins:
                lease.pin()
        return lease

    def _get_lease(self, transaction: Transaction | None) -> Lease:
        home = None if transaction is None else transaction.home
        running = _get_running_loop()
        if home is None or home is running:
            return self._async_pool().lease()
        # The transaction began on the loop `home`, and its first statement comes from elsewhere.
        leasing = asyncio.run_coroutine_threadsafe(bridge.run(self._lease_at_home), home)
        if running is None:
            return leasing.result()
        return bridge.await_(asyncio.wrap_future(leasing))

    def _lease_at_home(self) -> Lease:
        # A pool that is made here keeps its wrapper: so use that of the loop's thread, not `self`.
        at_home: Any = connections[self.alias]
        lender = at_home if at_home.settings_dict is self.settings_dict else self
        lease: Lease = lender._async_pool().lease()  # noqa: SLF001 - ours
        return lease

    # --- Patches and overrides that may refuse ---

    def _let_patches_refuse(self) -> None:
        """Call a patch of `ensure_connection()` although a connection is open: it may refuse.

        In async code that is not green, this does nothing: no statement is sent there, but tests
        call `ensure_connection()` when they begin to capture queries.
        """
        if bridge.current() is not None or not state.in_async_context():
            super().ensure_connection()

    def _ask_others(self) -> None:
        """Call the overrides and patches of `ensure_connection()`, which may refuse to connect.

        Test cases without a database refuse, for one. In the first call, and after `close()`, an
        override finds that `connection` is None. Later it finds a stand-in, since on Django's own
        backend the connection would be open. This neither connects nor waits: so no other code runs
        while `_asking_others` is set.
        """
        current = state.current_state(self)
        session = self.async_session()
        known = current if session is None else session.state
        self._asking_others = True
        if known.asked:
            current.connection = _InThePool()
        is_overridden = type(self).ensure_connection is not _OWN_ENSURE_CONNECTION
        try:
            if is_overridden and "ensure_connection" not in self._in_patches:
                self.ensure_connection()
            else:
                super().ensure_connection()
        finally:
            current.connection = None
            self._asking_others = False
        known.asked = True

    # --- Whether the database answers ---

    def is_usable(self) -> bool:
        """Return whether the database answers.

        Sends a statement. If green code holds no connection, one is leased for that.
        """
        current, session = state.state_and_session(self)
        if not current.pooled:
            return bool(super().is_usable())
        self.check_context("is_usable")
        try:
            state.take_turn(self)
            lease = self.lease_for(current, session)
        except Error:
            return False
        try:
            with vouching(("SELECT 1",)):
                return bool(super().is_usable())
        finally:
            if lease is not None:
                lease.maybe_end()


_OWN_ENSURE_CONNECTION = Cursors.ensure_connection

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
