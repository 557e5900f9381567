"""Closing: the running code lets its connection go, and so does a wrapper with one of its own.

Green code outside of transactions holds no connection. There `close()` closes the one that
synchronous code has left open on the wrapper, in this thread or in one that shares the wrapper.
"""

from __future__ import annotations

from pgbackend import block_context, state, transactions
from pgbackend.driver import bridge

from .leasing import Leasing


class Closing(Leasing):
    """A wrapper that closes what is its own, and gives back what it has leased."""

    def close(self) -> None:
        """Close the connection; green and outside a transaction, give it back at once."""
        if state.has_joined_test(self) or state.has_outlived_block(self):
            self._close_own()  # the transaction's connection is not that code's to close
            return
        current = state.current_state(self)
        current.asked = False
        if current.pooled:
            self._close_own()
        if current.pooled and current.lease is None and not current.in_atomic_block:
            current.run_on_commit = []
        else:
            super().close()
        if current.pooled and not current.in_atomic_block:
            current.needs_rollback = False  # the next connection is a new one
        if current.transaction is not None and not current.in_atomic_block:
            # A transaction that set_autocommit(False) has begun ends with its connection.
            transactions.end(self, current)

    def close_if_unusable_or_obsolete(self) -> None:
        """Close a connection that should not serve another request, unless a test's block has it.

        Inside that block autocommit is off, which Django takes for a reason to close: on Django's
        own backend, channels' `database_sync_to_async` ends the transaction of a `TestCase` so.
        """
        if not state.is_of_test(self):
            super().close_if_unusable_or_obsolete()

    def _close(self) -> None:
        current = state.current_state(self)
        if not current.pooled:
            super()._close()
        elif current.lease is not None:
            lease = current.lease
            if current.in_atomic_block or current.transaction is not None:
                lease.connection.close_in_turn()
            lease.dirty = True
            lease.end()

    def _close_own(self) -> None:
        """Close the wrapper's own connection, which sync code has left open."""
        own = self._own
        if own.connection is None or own.in_atomic_block or own.transaction is not None:
            return
        if state.is_borrowed(self):
            return
        connection, own.connection = own.connection, None
        sync_pool = self._connection_pools.get(self.alias)
        if sync_pool is None:
            connection.close()
        else:
            sync_pool.putconn(connection)

    # --- A connection that threads share ---

    def inc_thread_sharing(self) -> None:
        """Let other threads use this wrapper's connection; from here on it has one of its own."""
        super().inc_thread_sharing()
        self._sharing = (None, False)
        block_context.look_again()
        if bridge.current() is not None:
            self.ensure_connection()

    def dec_thread_sharing(self) -> None:
        """Undo `inc_thread_sharing()`; close the connection that nobody would use again."""
        super().dec_thread_sharing()
        self._sharing = (None, False)
        block_context.look_again()
        if bridge.current() is not None and not self.allow_thread_sharing:
            self._close_own()
