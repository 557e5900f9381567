"""Keep one task's use of its databases: sessions, their state, and what a task leaves open.

Django keeps the state of a connection on its `DatabaseWrapper`, which tasks may share. So each task
has a `Session` for each database that it uses, with a `State` (the names that Django keeps, and the
lease) and a `Scope` (the observers of its statements). state.py finds the running code's.

Note [Leases and tasks]
A task holds at most one lease of an alias: its session's, or its transaction's. A transaction that
begins while the session holds a lease (for an open cursor, or for `pinned()`) borrows the lease,
and returns it when the transaction ends. A lease changes hands in one synchronous step, with no
await between the decision and the change. When a task ends, the leases that it still holds go back
to the pool, with a warning.
"""

from __future__ import annotations

import asyncio
import contextvars
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import psycopg
from psycopg import IsolationLevel

from . import frames
from .driver.coroutines import name_of
from .driver.lease import Lease

if TYPE_CHECKING:
    from .transactions import Block, Transaction

#: Identifies a database: the `id()` of its settings dictionary.
Key: TypeAlias = int


class State:
    """The attributes that Django keeps about one connection, and the lease it comes from."""

    # fmt: off
    NAMES = (
        "atomic_blocks", "autocommit", "close_at", "closed_in_transaction", "commit_on_exit",
        "connection", "errors_occurred", "health_check_done", "health_check_enabled",
        "in_atomic_block", "isolation_level", "needs_rollback", "rollback_exc",
        "run_commit_hooks_on_set_autocommit_on", "run_on_commit", "savepoint_ids",
        "savepoint_state",
    )
    # fmt: on

    # The initial values are class attributes, because each request makes a state.

    #: Whether an override of `ensure_connection()` has let code connect; see wrapper/cursors.py.
    asked = False
    #: Whether the pool has just made the connection, which is being set up: `state.prepared()`.
    is_new = False
    lease: Lease | None = None
    transaction: Transaction | None = None
    connection: Any = None
    in_atomic_block = False
    savepoint_state = 0
    commit_on_exit = True
    needs_rollback = False
    rollback_exc: BaseException | None = None
    close_at: float | None = None
    closed_in_transaction = False
    errors_occurred = False
    health_check_enabled = False
    health_check_done = False
    run_commit_hooks_on_set_autocommit_on = False
    isolation_level: IsolationLevel | None = None

    def __init__(self, *, pooled: bool = False, autocommit: bool = False) -> None:
        self.pooled = pooled
        self.autocommit = autocommit
        self.savepoint_ids: list[str | None] = []
        self.atomic_blocks: list[Any] = []
        self.run_on_commit: list[Any] = []

    def copy(self) -> State:
        """Return another state with the same values, for `copy.copy(connection)`."""
        other = State(pooled=self.pooled)
        for name in self.NAMES:
            setattr(other, name, getattr(self, name))
        return other

    def take(self, lease: Lease) -> None:
        """Use the connection of `lease` until the lease ends."""
        self.lease = lease
        self.connection = lease.connection
        lease.on_end = self._lease_ended

    def _lease_ended(self) -> None:
        lease, self.lease = self.lease, None
        if lease is not None and lease.pins and self.connection.taken_back:
            # Code in `pinned()` needs that very session: the dead connection stays, and refuses.
            lender = None if self.transaction is None else self.transaction.lender
            if lender is not None and lender.pins:
                lender.state.connection = self.connection  # so it is after the transaction, too
        elif not self.in_atomic_block:
            # Inside a block the dead connection stays, so that it refuses further statements.
            self.connection = None


class Scope:
    """The observers of a task's statements: Django's query log and `execute_wrappers`.

    Each `DatabaseWrapper` has a scope, too: the observers of the statements of sync code.
    """

    NAMES = ("execute_wrappers", "force_debug_cursor", "queries_log")
    __slots__ = ("_limit", "execute_wrappers", "force_debug_cursor", "log")

    def __init__(self, observer: Scope | None, limit: int) -> None:
        self.force_debug_cursor: bool = observer is not None and observer.force_debug_cursor
        self.execute_wrappers: list[Any] = list(observer.execute_wrappers) if observer else []
        self._limit = limit
        #: None until it is first read: even an empty deque takes room for 64 entries.
        self.log: deque[Any] | None = None
        if observer is not None and observer.force_debug_cursor:
            self.log = observer.queries_log

    def copy(self) -> Scope:
        """Return a scope for another task, with the same observers and a log of its own."""
        return Scope(self, self._limit)

    @property
    def queries_log(self) -> deque[Any]:
        if self.log is None:
            self.log = deque(maxlen=self._limit)
        return self.log

    @queries_log.setter
    def queries_log(self, value: deque[Any]) -> None:
        self.log = value


class Session:
    """One task's use of one database, outside of transactions."""

    # fmt: off
    __slots__ = (
        "_together", "at_once", "compiled", "cursor", "key", "pinned_at", "pins", "scope", "state",
    )
    # fmt: on

    def __init__(self, together: Sessions, key: Key, scope: Scope, autocommit: bool) -> None:
        #: All sessions of the task, this one among them.
        self._together = weakref.ref(together)
        self.key = key
        self.scope = scope
        self.state = State(pooled=True, autocommit=autocommit)
        #: How many `with pinned()` statements the task is in; and where the first began.
        self.pins = 0
        self.pinned_at: str | None = None
        #: Whether the next cursor is for a statement that the ORM or the backend made.
        self.compiled = False
        #: Whether one of Django's compilers opens that cursor, to fetch all rows at once; see
        #: fast/statements.py.
        self.at_once = False
        #: The cursor of the compiled statement that is being executed.
        self.cursor: psycopg.Cursor[Any] | None = None

    def pin(self) -> None:
        """Keep the connection that the session has, or will have next, until `unpin()`."""
        self.pins += 1
        if self.pins == 1:
            self.pinned_at = frames.place()
            self._keep()
            self.watch()
            if self.state.lease is not None:
                self.state.lease.pin()

    def unpin(self) -> None:
        """Undo one `pin()`; the last gives the connection back, unless a cursor is open on it."""
        if self.pins == 0:
            return  # the task has ended meanwhile
        self.pins -= 1
        if self.pins == 0:
            self._keep()
            if self.state.lease is not None:
                self.state.lease.unpin()
            elif getattr(self.state.connection, "taken_back", False):
                self.state.connection = None  # as `State._lease_ended()` does without a pin

    def check_not_taken_back(self) -> None:
        """Raise `LeaseEnded` if the pool has taken back the connection that `pinned()` held."""
        if getattr(self.state.connection, "taken_back", False):
            self.state.connection.refuse()

    def watch(self) -> None:
        """Have the connection given back when the task ends, if the session still holds one."""
        if (together := self._together()) is not None:
            together.watch()

    def task_ended(self, task: asyncio.Task[Any]) -> Left | None:
        """End the lease that `task` holds at its end, or pass it on to `Lease.heir`.

        Return a warning; None if nothing was left open, or if the heir goes on with the lease.
        """
        pinned, self.pins = self.pins, 0
        lease = self.state.lease
        if lease is not None and lease.heir is not None and lease.cursors and not pinned:
            self.state.lease = self.state.connection = None
            lease.on_end = None
            heir, lease.heir = lease.heir, None
            if heir.inherit(self.key, lease, self.scope):
                return None
        return _end_left_over(lease, task, f"pinned() of {self.pinned_at}" if pinned else None)

    def is_at_rest(self) -> bool:
        """Return whether no connection and no transaction is open, and the query log is empty."""
        state = self.state
        return (
            state.connection is None
            and state.lease is None
            and state.transaction is None
            and not self.scope.log
        )

    def _keep(self) -> None:
        if (together := self._together()) is not None:
            together.keep()


class Sessions:
    """The sessions of one task, its `owner`, by database.

    The context variable `state.named_sessions` has them. A child task inherits its value, and makes
    sessions of its own when it finds that it is not their owner.
    """

    # fmt: off
    __slots__ = (
        "__weakref__", "blocks", "by_key", "inherited", "owner", "uses_own", "watched", "wrappers",
    )
    # fmt: on

    def __init__(self, owner: asyncio.Task[Any] | None) -> None:
        self.owner = None if owner is None else weakref.ref(owner)
        self.by_key: dict[Key, Session] = {}
        #: Whether the end of the task calls `task_ended()`.
        self.watched = False
        #: The open blocks that the task has opened, the innermost last.
        self.blocks: list[Block] = []
        #: Leases beside those of its sessions: of streams, and of ended tasks that passed them on.
        self.inherited: list[weakref.ref[Lease]] = []
        #: Whether the task has also used a wrapper's own state.
        self.uses_own = False
        #: The wrapper objects that were made for the task; see fast/wrappers.py.
        self.wrappers: list[Any] = []

    def belong_to(self, task: asyncio.Task[Any] | None) -> bool:
        """Return whether `task` owns these sessions."""
        return (None if self.owner is None else self.owner()) is task

    def are_at_rest(self) -> bool:
        """Return whether all sessions are at rest: see `Session.is_at_rest()`.

        Return False also if the task has used a wrapper's own state.
        """
        if self.uses_own:
            return False
        for session in self.by_key.values():  # noqa: SIM110 - asked in each request: no generator
            if not session.is_at_rest():
                return False
        return True

    def watch(self) -> None:
        """Have `task_ended()` called when the task ends, because it may still hold leases then."""
        if not self.watched:
            self.watched = True
            task = None if self.owner is None else self.owner()
            if task is not None:
                task.add_done_callback(self.task_ended)

    def task_ended(self, task: asyncio.Task[Any]) -> None:
        """Roll back the blocks, and end the leases, that `task` has left open; warn of them."""
        pinned_sessions.pop(task, None)
        left = [block.orphan(task) for block in tuple(self.blocks)]
        left += [session.task_ended(task) for session in self.by_key.values()]
        left += [self._end_or_pass_on(ref(), task) for ref in self.inherited]
        # Last, because a warnings filter may make it an error.
        _warn_later(tuple(filter(None, left)), task.get_loop(), _ITERATIONS_TO_CLOSE)

    def keep_lease(self, lease: Lease) -> bool:
        """Have `lease`, which no session has, end with the task at the latest.

        Return False if the task has ended already.
        """
        task = None if self.owner is None else self.owner()
        if task is None or task.done():
            return False
        self.watch()
        lease.task = task
        self.inherited = [ref for ref in self.inherited if ref() is not None]
        self.inherited.append(weakref.ref(lease))
        return True

    def _end_or_pass_on(self, lease: Lease | None, task: asyncio.Task[Any]) -> Left | None:
        if lease is not None and lease.heir is not None and lease.cursors:
            heir, lease.heir = lease.heir, None
            if heir.keep_lease(lease):
                return None
        return _end_left_over(lease, task)

    def inherit(self, key: Key, lease: Lease, scope: Scope) -> bool:
        """Take over `lease` from a task that has ended; return False if `owner` has ended, too.

        If `owner` has no session for `key` yet, one is made, with a copy of `scope`: the scope of
        the session that had the lease.
        """
        task = None if self.owner is None else self.owner()
        if task is None or task.done():
            return False
        self.watch()
        lease.task = task
        if key not in self.by_key:
            self.by_key[key] = Session(self, key, scope.copy(), autocommit=True)
        session = self.by_key[key]
        if session.state.lease is None and session.state.connection is None:
            session.state.take(lease)
            lease.pins += bool(session.pins)
        else:
            self.keep_lease(lease)
        return True

    def keep(self) -> None:
        """Add these sessions to `pinned_sessions` if one of them is pinned, else take them out.

        `state.task_sessions()` looks there, because the context of `owner` may name the sessions of
        another task: asgiref copies whole contexts, so after `sync_to_async(async_to_sync(f))` the
        calling task's context names the sessions of the task that ran `f`.
        """
        task = None if self.owner is None else self.owner()
        if task is not None and any(session.pins for session in self.by_key.values()):
            pinned_sessions[task] = self
        elif task is not None:
            pinned_sessions.pop(task, None)


#: The sessions of tasks that have pinned one; see `Sessions.keep()`.
pinned_sessions: dict[asyncio.Task[Any], Sessions] = {}

#: A warning of something left open, and a function that returns whether that is still open.
Left: TypeAlias = tuple[str, Callable[[], bool]]

#: How many iterations an event loop needs at most to close an async generator that nothing refers
#: to, and one that the generator iterates; with a margin for loops with many tasks.
_ITERATIONS_TO_CLOSE = 30


def _end_left_over(
    lease: Lease | None, task: asyncio.Task[Any], pinned: str | None = None
) -> Left | None:
    """End `lease`, which `task` holds at its end; return a warning, or None if nothing was open.

    `pinned` describes the `pinned()` that holds the lease, if one does.
    """
    if lease is None or lease.ended:
        return None
    name = f"task {name_of(task)!r}"
    left = pinned or f"a cursor or an iterator of {lease.opened_at}"
    warning = (
        f"{name} has ended with {left} open, and held its connection of {lease.pool.name!r} until "
        "now: use 'with', or 'contextlib.aclosing()'"
    )
    lease.end(
        f"this connection went back to the pool with the end of {name}, which had leased it: "
        "open, use and close a cursor, or an iterator, in one task"
    )

    def is_open() -> bool:
        return bool(lease.cursors or lease.pins) and not lease.pool.closed

    return warning, is_open


def _warn_later(left: Sequence[Left], loop: asyncio.AbstractEventLoop, iterations: int) -> None:
    """Schedule a warning of each entry of `left` that is still open after `iterations` of the loop.

    Does not wait; if the loop stops before, there is no warning. If a task has ended by leaving an
    ``async for`` early, the loop closes the generator some iterations later: that needs no warning.
    """
    left = [each for each in left if each[1]()]
    if left and iterations:
        loop.call_soon(_warn_later, left, loop, iterations - 1, context=contextvars.Context())
        return
    for warning, _ in left:
        warnings.warn(warning, ResourceWarning, stacklevel=2)
