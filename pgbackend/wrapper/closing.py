"""Closing: a connection of the wrapper's own is closed, a leased one is given back.

Green code outside of transactions holds no connection. If such code calls `close()`, this closes
the connection that synchronous code has left open on the wrapper, in this thread or in one that
shares the wrapper.
"""

from __future__ import annotations

from pgbackend import block_context, state, transactions
from pgbackend.driver import bridge

from .connecting import Connecting


class Closing(Connecting):
    """A wrapper that closes its own connection, and gives a leased one back."""

    def close(self) -> None:
        """Close the wrapper's own connection, and give a leased one back.

        A leased connection on which a transaction is open is closed before it is given back. If the
        leased connection belongs to other code, only `_close_own()` is called: in a test's
        transaction that another wrapper has opened, or after the end of the running code's block.
        """
        if state.has_joined_test(self) or state.has_outlived_block(self):
            self._close_own()  # the transaction's connection belongs to other code
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
        """Close a connection that should not serve another request, unless a test's block uses it.

        Django closes a connection on which autocommit is off, as it is in that block. So with
        Django's backend, `database_sync_to_async` of channels ends a `TestCase`'s transaction.
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
        """Close the connection that sync code has left open on the wrapper, unless it is in use.

        In use: in a block or transaction, or by a thread that lends the wrapper to this code. A
        connection of the synchronous pool is given back instead.
        """
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
        """Let threads share the wrapper, which from now on has a connection of its own.

        Called in green code, this opens that connection.
        """
        super().inc_thread_sharing()
        self._pool_use = (None, False)
        block_context.look_again()
        if bridge.current() is not None:
            self.ensure_connection()

    def dec_thread_sharing(self) -> None:
        """Undo `inc_thread_sharing()`; in green code, close a connection that nobody shares now."""
        super().dec_thread_sharing()
        self._pool_use = (None, False)
        block_context.look_again()
        if bridge.current() is not None and not self.allow_thread_sharing:
            self._close_own()
