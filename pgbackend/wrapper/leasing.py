"""Leasing: how the running code comes to a connection, and how long it has it.

Green code holds no connection between two statements: the first statement of a transaction leases
one, and so does each statement outside of transactions. Code that asks whether there is a
connection (`ensure_connection()`, and patches of it that refuse) is told what Django would tell.
"""

from __future__ import annotations

import asyncio
from typing import Any

from django.db import Error, connections
from django.db.backends.postgresql.base import DatabaseWrapper as PostgresDatabaseWrapper

from pgbackend import state, transactions
from pgbackend.driver import bridge
from pgbackend.driver.connection import LEASE_ENDED
from pgbackend.driver.errors import LeaseEnded
from pgbackend.driver.lease import Lease
from pgbackend.driver.pool import Pool
from pgbackend.driver.vouching import vouching
from pgbackend.patches import if_unpatched
from pgbackend.sessions import Session, State
from pgbackend.transactions import Transaction

from .connecting import Connecting

_ENSURE_CONNECTION = if_unpatched(PostgresDatabaseWrapper.ensure_connection)


class _InThePool:
    """Stands for a connection that has not been leased yet, where a wrapper shows one."""

    closed = False


class Leasing(Connecting):
    """A wrapper that leases a connection from the pool when a statement needs one."""

    _asking_others = False

    def connect(self) -> None:
        """Connect; green, see that the database can be reached, and hold nothing afterwards."""
        if self._asking_others:
            return
        current = state.current_state(self)
        if not current.pooled:
            super().connect()
            return
        self.check_context("connect")
        if current.transaction is not None:
            # As in Django, a new connection knows nothing of what the old one was in.
            if current.lease is not None:
                current.lease.connection.close()
                current.lease.end()
            transactions.end(self, current)
        self.run_on_commit = []
        self.ensure_connection()

    def ensure_connection(self) -> None:
        """Guarantee that the database can be reached.

        Green, a connection is leased and given back. On the bare loop there is nothing to do:
        each statement will lease its own.
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
        """Give `current` a connection, if it has none; return the lease if it is new.

        `session` is the session of the running task.
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
        """Give `current` a connection, if it has none, and pin its lease; the caller unpins it.

        Returns None if there is nothing to unpin: a transaction holds the connection, which pins
        the lease itself, or the connection is not leased.
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
            # The garbage collector has freed the holder of the lease, since it was looked at.

    def acquire_pool(self) -> Pool:
        """Return the pool to lease a connection from, for one statement in no transaction."""
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
        lease = None if transaction is None else transaction.borrow()
        if lease is None:
            with self.wrap_database_errors:
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
        running = asyncio._get_running_loop()
        if home is None or home is running:
            return self._async_pool().lease()
        # A thread, or another loop, makes the first statement of a transaction of `home`.
        leasing = asyncio.run_coroutine_threadsafe(bridge.run(self._lease_at_home), home)
        if running is None:
            return leasing.result()
        return bridge.await_(asyncio.wrap_future(leasing))

    def _lease_at_home(self) -> Lease:
        # A pool that is made here outlives this thread's wrapper, which no other thread may use.
        at_home: Any = connections[self.alias]
        lender = at_home if at_home.settings_dict is self.settings_dict else self
        lease: Lease = lender._async_pool().lease()  # noqa: SLF001 - ours
        return lease

    # --- Patches and overrides that may refuse ---

    def _let_patches_refuse(self) -> None:
        """Let a patch of `ensure_connection()` refuse a connection that is open, too.

        Not on the bare loop, where no statement is sent: tests begin to capture queries there.
        """
        if bridge.current() is not None or not state.in_async_context():
            super().ensure_connection()

    def _ask_others(self) -> None:
        """Call `ensure_connection()` for a class that overrides it, or for somebody's patch.

        Both may refuse, as test cases without a database do. Nothing connects here, and so nothing
        waits: no other code sees `_asking_others`. Code that looks for a connection finds none the
        first time, and after `close()`; then it finds one, as in Django, although each statement
        takes another from the pool.
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

    # --- Trying ---

    def is_usable(self) -> bool:
        """Return whether the database answers, on the connection that is held or one of the pool's.

        Green code holds no connection between two statements, whether the database answers or not.
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


_OWN_ENSURE_CONNECTION = Leasing.ensure_connection
