"""Transactions: how they begin and end on a connection that is leased.

Green, a transaction begins without a connection: its first statement leases one, which goes back
when the transaction ends. Until then the lease is pinned, so that BEGIN, COMMIT and all statements
between them are sent on one connection. `pgbackend.transactions` gives the tasks that take part
their turns.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from asgiref.sync import iscoroutinefunction
from django.db import OperationalError
from django.db.backends.postgresql.base import DatabaseWrapper as PostgresDatabaseWrapper
from django.db.backends.utils import debug_transaction
from psycopg.pq import TransactionStatus

from pgbackend import driver, hops, state, transactions
from pgbackend.driver.cancellation import deliver_cancellation, hold_cancellation, postpone_delivery
from pgbackend.outcomes import raise_told
from pgbackend.patches import if_unpatched
from pgbackend.sessions import Session, State
from pgbackend.transactions import Block

from .closing import Closing

if TYPE_CHECKING:
    from pgbackend.protocols import Wrapper

_GET_AUTOCOMMIT = if_unpatched(PostgresDatabaseWrapper.get_autocommit)
_SET_AUTOCOMMIT = if_unpatched(PostgresDatabaseWrapper.set_autocommit)
_SET_ON_CONNECTION = if_unpatched(PostgresDatabaseWrapper._set_autocommit)  # type: ignore[attr-defined]  # noqa: SLF001
_RUN_HOOKS = if_unpatched(PostgresDatabaseWrapper.run_and_clear_commit_hooks)
_COMMIT = if_unpatched(PostgresDatabaseWrapper._commit)  # type: ignore[attr-defined]  # noqa: SLF001


class Transactions(Closing):
    """A wrapper whose transactions lease their connection, and give it back."""

    # --- Autocommit, by which Django begins and ends transactions ---

    def get_autocommit(self) -> bool:
        current = state.current_state(self)
        if not current.pooled or PostgresDatabaseWrapper.get_autocommit is not _GET_AUTOCOMMIT:
            return super().get_autocommit()
        # Without ensure_connection(): the connection is leased at the block's first statement.
        self.check_context("get_autocommit")
        return current.autocommit

    def set_autocommit(
        self, autocommit: bool, force_begin_transaction_with_broken_autocommit: bool = False
    ) -> None:
        self.check_context("set_autocommit")
        current = state.current_state(self)
        if current.pooled:
            if not autocommit and not force_begin_transaction_with_broken_autocommit:
                state.check_not_ended(self)
            if PostgresDatabaseWrapper.set_autocommit is _SET_AUTOCOMMIT:
                self._set_autocommit_pooled(current, autocommit)
            else:  # a patch
                super().set_autocommit(autocommit, force_begin_transaction_with_broken_autocommit)
            if not autocommit and not force_begin_transaction_with_broken_autocommit:
                # Begun by the user's call: `Atomic`, which ends its transactions, sets that flag.
                transaction = state.current_state(self).transaction
                assert transaction is not None
                transaction.end_with_task()
        else:
            super().set_autocommit(autocommit, force_begin_transaction_with_broken_autocommit)
        if autocommit:
            deliver_cancellation()

    def _set_autocommit_pooled(self, current: State, autocommit: bool) -> None:
        # As Django does, without ensure_connection(): the first statement leases the connection.
        if current.in_atomic_block:
            self.validate_no_atomic_block()  # raises
        if autocommit or not self.queries_logged:
            self._set_autocommit(autocommit)
        else:
            with debug_transaction(self, "BEGIN"):
                self._set_autocommit(autocommit)
        if current.needs_rollback:  # Django keeps it set until rollback(), or a new connection
            now = state.current_state(self)
            now.needs_rollback, now.rollback_exc = True, current.rollback_exc

    def _set_autocommit(self, autocommit: bool) -> None:
        current = state.current_state(self)
        if current.pooled:
            djangos_class: Any = PostgresDatabaseWrapper
            is_patched = djangos_class._set_autocommit is not _SET_ON_CONNECTION  # noqa: SLF001
            if autocommit:
                if is_patched and current.connection is not None:
                    super()._set_autocommit(True)
                self.end_pooled(current, state.current_block(self))
                return
            begun = self.begin_pooled(current)
            if is_patched:  # the patch expects that there is a connection
                cast("Wrapper", self).lease_for(begun, state.async_session(self))
                super()._set_autocommit(False)
            return
        super()._set_autocommit(autocommit)
        current = state.current_state(self)
        if autocommit:
            transactions.end(self, current)
        elif current.transaction is None:
            current.connection.turns = transactions.begin(self, current)

    # --- On connections of the pool ---

    def begin_if_due(self, current: State) -> State:
        """Begin a transaction, without SQL, if autocommit is off and none is open.

        Return the running code's state afterwards: the new transaction's, or else `current`.
        """
        if current.transaction is not None or current.autocommit:
            return current
        self.set_autocommit(False)
        return state.current_state(self)

    def begin_pooled(self, current: State) -> State:
        """Mark a transaction as begun, unless `current` is in one; return the transaction's state.

        No statement is sent: the first one of the transaction leases a connection.
        """
        if current.transaction is not None:
            current.autocommit = False
            return current
        begun = State(pooled=True)
        transaction = transactions.begin(self, begun)
        if current.connection is not None:
            transaction.lender = state.session(self)
        return begun

    def end_pooled(
        self, current: State, block: Block | None, session: Session | None = None
    ) -> None:
        """Give the connection back, mark the transaction as ended, and run the commit hooks.

        The caller has sent COMMIT or ROLLBACK; hooks run only after COMMIT. `block` is the block
        that ends, if any; `session` is the running task's, if the caller knows it.
        """
        if current.lease is not None:
            self._end_lease(current, block)
        now = current
        if current.transaction is not None:
            transactions.end(self, current)
            # Django runs the hooks that it finds in the state of the running code: move them there.
            if session is None or current.run_on_commit:
                now = state.current_state(self)
            else:
                now = session.state
            now.run_on_commit = current.run_on_commit
            now.run_commit_hooks_on_set_autocommit_on = (
                current.run_commit_hooks_on_set_autocommit_on
            )
        now.autocommit = True
        if now.run_commit_hooks_on_set_autocommit_on:
            if (
                now.run_on_commit
                or PostgresDatabaseWrapper.run_and_clear_commit_hooks is not _RUN_HOOKS
            ):
                self.run_and_clear_commit_hooks()
            now.run_commit_hooks_on_set_autocommit_on = False

    def _end_lease(self, current: State, block: Block | None) -> None:
        assert current.lease is not None
        if current.connection.closed:
            # COMMIT or ROLLBACK was interrupted by an exception that Django does not catch.
            current.run_on_commit = []
        else:
            self._end_on_connection(current.connection, block)
        if current.transaction is None:
            current.lease.end()
        else:
            current.transaction.give_up_lease()

    def _end_on_connection(self, connection: Any, block: Block | None) -> None:
        with self.wrap_database_errors:
            if block is not None and block.moving and not _is_idle(connection):
                # COMMIT was interrupted while it waited for the statement of a child task to end.
                if not connection.lease.can_wait():  # the pool rolls back, after that statement
                    connection.close_in_turn()
                    return
                connection.rollback()
            connection.back_to_autocommit()

    # --- COMMIT and ROLLBACK ---

    def commit(self) -> None:
        with postpone_delivery():
            super().commit()

    def _commit(self) -> None:
        djangos: Any = PostgresDatabaseWrapper
        connection = self.connection or self._find_connection_for_end(state.current_state(self))
        try:
            if self.queries_logged or djangos._commit is not _COMMIT:  # noqa: SLF001
                self._log_without_connection("COMMIT")
                super()._commit()
            elif connection is not None:
                with self.wrap_database_errors:
                    connection.commit()
        except OperationalError as exc:
            raise_told(exc)
            raise

    def commit_pooled(self, current: State) -> None:
        """Send COMMIT as `commit()` does, but log nothing; fast/blocks.py calls this."""
        connection = current.connection or self._find_connection_for_end(current)
        if connection is not None:
            try:
                with self.wrap_database_errors:
                    connection.commit()
            except OperationalError as exc:
                raise_told(exc)
                raise
        current.errors_occurred = False
        current.run_commit_hooks_on_set_autocommit_on = True

    def _find_connection_for_end(self, current: State) -> Any:
        """Look again for a connection to send COMMIT or ROLLBACK on; return None if there is none.

        The caller has found none, but another thread may have leased one since. If this returns
        None, no statement of the transaction can lease a connection any more.
        """
        if current.transaction is not None:
            current.transaction.end_unleased()
        return current.connection

    def rollback(self) -> None:
        with postpone_delivery():
            super().rollback()

    def _rollback(self) -> None:
        if self.connection is None:
            self._find_connection_for_end(state.current_state(self))
        self._log_without_connection("ROLLBACK")
        super()._rollback()

    def _log_without_connection(self, end: str) -> None:
        """Log `end` (COMMIT or ROLLBACK) if the transaction has leased no connection to send it on.

        Its BEGIN has been logged, so `queries` shows the pair, as on Django's own backend.
        """
        current = state.current_state(self)
        if current.pooled and current.connection is None:
            with debug_transaction(self, end):
                pass

    # --- Savepoints ---

    def _savepoint(self, sid: str) -> None:
        with self.backend_statement(self.ops.savepoint_create_sql(sid)):
            super()._savepoint(sid)

    def _savepoint_rollback(self, sid: str) -> None:
        rollback = self.ops.savepoint_rollback_sql(sid)
        with self.backend_statement(rollback), hold_cancellation():
            if (cancel_others := getattr(self.connection, "cancel_others", None)) is not None:
                cancel_others()
            super()._savepoint_rollback(sid)
        deliver_cancellation()

    def _savepoint_commit(self, sid: str) -> None:
        commit = self.ops.savepoint_commit_sql(sid)
        with self.backend_statement(commit), hold_cancellation():
            super()._savepoint_commit(sid)
        deliver_cancellation()

    # --- Hooks on commit ---

    def on_commit(self, func: Callable[[], Any], robust: bool = False) -> None:
        """Register `func` to be called, or awaited if it is asynchronous, after the COMMIT."""
        if not callable(func):
            raise TypeError("on_commit()'s callback must be a callable.")
        super().on_commit(_awaited(func), robust)


def _is_idle(connection: driver.Connection) -> bool:
    return connection.pgconn.transaction_status == TransactionStatus.IDLE


def _awaited(func: Callable[[], Any]) -> Callable[[], Any]:
    """Return `func`, or if it is asynchronous, a synchronous function that runs it to its end."""
    if not iscoroutinefunction(inspect.unwrap(func)) and not iscoroutinefunction(
        getattr(func, "func", None)
    ):
        return func

    @functools.wraps(func)
    def call() -> object:
        return hops.run_coroutine_function(func)

    return call
