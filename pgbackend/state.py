"""Lease and transaction, as the running task sees them; the only module with context variables.

Django keeps the state of a connection on its `DatabaseWrapper`. Under an event loop, tasks may
share one wrapper object, or not, depending on who touched it first; so the wrapper holds nothing
of a running query. The names that Django uses (`connection`, `in_atomic_block`, …) are descriptors
(`state_attribute`) that look up, in this order:

1. the transaction in whose block the running code is (`Block`, inherited by tasks that are started
   inside the block, and by threads that asgiref starts from it);
2. in an async context: a transaction that a test has opened (Note [Transactions of tests]), else
   the `Session` of the running task;
3. in a sync context: the wrapper's own `State`, as in Django.

Note [Looking up]
Django reads these names some thirty times for a statement. Synchronous code that is in no
transaction is told apart by two looks at the thread. Green code keeps what it has found on its
portal, until the portal's next step, for the context, the wrapper and the blocks that it was found
for: within a step and a context the task stays the same, and who changes anything else says so
(`look_again`).

Note [Leases and tasks]
A task holds at most one lease of an alias: its session's, or its transaction's. A transaction that
is begun while the session holds one (for an open cursor, or pinned) borrows it, and gives it back.
Ownership moves in one synchronous step: code here decides and acts without an await in between.

Note [Turns]
A transaction is a chain of blocks; exactly one, the innermost, is open for statements. Code runs
inside the block that its context names. While a sibling has opened a block below it, code waits
(`take_turn`); when its block has ended, its statements are refused. So savepoints of tasks that
share a transaction never overlap, and no statement slips out of the block it was written in.
A block that is being ended counts as one more, in which only the code that ends it is: what others
send meanwhile would come after the COMMIT or ROLLBACK that is on its way.
Code that leaves its block with an exception waits for nobody: what is open inside is rolled back
with it (`claim`).

Note [Transactions of tests]
A context variable alone does not reach an async test whose runner copied its context before the
fixture opened the transaction. So a transaction that Django marks as a test's is joined by every
async context of the process that is in none of its own.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from time import monotonic
from typing import Any, TypeAlias

from django.db.transaction import TransactionManagementError

from . import conf
from .driver import bridge
from .driver.bridge import Portal
from .driver.errors import PortalClosed
from .driver.pool import Lease

_get_running_loop = asyncio._get_running_loop
_running = bridge.running
_unwinding = bridge.unwinding

#: What tells one database from another: the identity of its settings.
Key: TypeAlias = int


class State:
    """What Django keeps about one connection, plus the lease that it is on."""

    # fmt: off
    NAMES = (
        "atomic_blocks", "autocommit", "close_at", "closed_in_transaction", "commit_on_exit",
        "connection", "errors_occurred", "health_check_done", "health_check_enabled",
        "in_atomic_block", "isolation_level", "needs_rollback", "rollback_exc",
        "run_commit_hooks_on_set_autocommit_on", "run_on_commit", "savepoint_ids",
        "savepoint_state",
    )
    # fmt: on

    # What a new one has, here once for all of them: each request makes one.

    #: Whether who has patched `ensure_connection()` has let a connection be made.
    asked = False
    #: Whether its connection is one that the pool has just made; see `prepared()`.
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
    isolation_level: Any = None

    def __init__(self, *, pooled: bool = False, autocommit: bool = False) -> None:
        self.pooled = pooled
        self.autocommit = autocommit
        self.savepoint_ids: list[str | None] = []
        self.atomic_blocks: list[Any] = []
        self.run_on_commit: list[Any] = []

    def copy(self) -> State:
        """Return a state of its own with the same values, as `copy.copy(connection)` has it."""
        other = State(pooled=self.pooled)
        for name in self.NAMES:
            setattr(other, name, getattr(self, name))
        return other

    def take(self, lease: Lease) -> None:
        """Put `lease` to use."""
        self.lease = lease
        self.connection = lease.connection
        lease.on_end = self._lease_ended

    def _lease_ended(self) -> None:
        self.lease = None
        if not self.in_atomic_block:
            # Inside a block the dead connection stays, so that it refuses further statements.
            self.connection = None


class Scope:
    """What observes the statements of some code: Django's query log and its wrappers."""

    NAMES = ("execute_wrappers", "force_debug_cursor", "queries_log")
    __slots__ = ("_limit", "execute_wrappers", "force_debug_cursor", "log")

    def __init__(self, observer: Scope | None, limit: int) -> None:
        self.force_debug_cursor: bool = observer is not None and observer.force_debug_cursor
        self.execute_wrappers: list[Any] = list(observer.execute_wrappers) if observer else []
        self._limit = limit
        #: None as long as nobody has looked at it: a deque has room for 64 from the start.
        self.log: deque[Any] | None = None
        if observer is not None and observer.force_debug_cursor:
            self.log = observer.queries_log

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

    __slots__ = ("_together", "at_once", "compiled", "cursor", "pins", "scope", "state")

    def __init__(self, together: _Sessions, scope: Scope, autocommit: bool) -> None:
        #: All sessions of the task, which know this one.
        self._together = weakref.ref(together)
        self.scope = scope
        self.state = State(pooled=True, autocommit=autocommit)
        #: How many `pinned()` blocks the task is in.
        self.pins = 0
        #: Whether the next cursor is for a statement that the ORM or the backend made.
        self.compiled = False
        #: Whether it is a compiler of Django's that asks for it, to fetch all rows; see
        #: statements.py.
        self.at_once = False
        #: The cursor of the compiled statement that is being executed.
        self.cursor: Any = None

    def pin(self) -> None:
        """Hold the connection that there is, or the next one, until `unpin()`."""
        self.pins += 1
        if self.pins == 1:
            self._keep()
            if self.state.lease is not None:
                self.state.lease.pin()

    def unpin(self) -> None:
        self.pins -= 1
        if self.pins == 0:
            self._keep()
            if self.state.lease is not None:
                self.state.lease.unpin()

    def is_at_rest(self) -> bool:
        """Whether nothing is open, and nothing is logged."""
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


class _Sessions:
    """The sessions of one task.

    Found through a context variable, which tasks inherit: so it knows its owner, and an heir makes
    its own.
    """

    __slots__ = ("__weakref__", "by_key", "owner", "uses_own", "wrappers")

    def __init__(self, owner: asyncio.Task[Any] | None) -> None:
        self.owner = None if owner is None else weakref.ref(owner)
        self.by_key: dict[Key, Session] = {}
        #: Whether the task has also used what a wrapper has of its own.
        self.uses_own = False
        #: The wrapper objects that were made for it; see wrappers.py.
        self.wrappers: list[Any] = []

    def belong_to(self, task: asyncio.Task[Any] | None) -> bool:
        return (None if self.owner is None else self.owner()) is task

    def are_at_rest(self) -> bool:
        """Whether nothing is open in any of them, or on a wrapper itself."""
        if self.uses_own:
            return False
        for session in self.by_key.values():  # noqa: SIM110 - asked in each request: no generator
            if not session.is_at_rest():
                return False
        return True

    def keep(self) -> None:
        """Let the owner find these again, as long as one of them is pinned.

        asgiref hands whole contexts on: after `sync_to_async(async_to_sync(f))` a task has that of
        the task which ran `f`, with its sessions in the place of these.
        """
        task = None if self.owner is None else self.owner()
        if task is not None and any(session.pins for session in self.by_key.values()):
            _pinned[task] = self
        elif task is not None:
            _pinned.pop(task, None)


_pinned: dict[asyncio.Task[Any], _Sessions] = {}
_sessions: contextvars.ContextVar[_Sessions | None] = contextvars.ContextVar(
    "pgbackend.sessions", default=None
)
_blocks: contextvars.ContextVar[Mapping[Key, Block]] = contextvars.ContextVar(
    "pgbackend.blocks",
    default={},  # noqa: B039 - a Mapping: it is replaced, never changed
)
_observers: contextvars.ContextVar[Mapping[Key, Scope]] = contextvars.ContextVar(
    "pgbackend.observers",
    default={},  # noqa: B039
)
_test_blocks: dict[Key, Block] = {}


# --- Looking up ---------------------------------------------------------------------------------


def in_async_context() -> bool:
    """Whether waits for the database must not block: a loop runs in this thread."""
    if bridge.in_greenlet():
        return True
    return _get_running_loop() is not None and not conf.allows_async_unsafe()


def current_block(wrapper: Any) -> Block | None:
    """The block that the running code is in, whether or not it is still open."""
    blocks = _blocks.get()
    if blocks and (block := blocks.get(id(wrapper.settings_dict))) is not None:
        return None if block.ended and block.is_stale_in_thread(wrapper) else block
    if _test_blocks and wrapper._key in _test_blocks and in_async_context():
        return _test_blocks[wrapper._key]
    own: State = wrapper._own
    return own.transaction.innermost if own.transaction is not None else None


class Found:
    """What has been looked up for a wrapper by code in a portal; see Note [Looking up]."""

    # fmt: off
    __slots__ = (
        "blocks", "context", "scope", "session", "sessions", "settings_dict", "state", "wrapper",
    )
    # fmt: on

    def __init__(
        self, context: Any, wrapper: Any, blocks: Mapping[Key, Block], sessions: _Sessions
    ) -> None:
        #: Another one is entered in the first step of an eager task; see bridge.py.
        self.context = context
        self.wrapper = wrapper
        self.settings_dict = wrapper.settings_dict
        self.blocks = blocks
        self.sessions = sessions
        own: State = wrapper._own
        #: None for a wrapper with a connection of its own.
        self.session: Session | None = None
        self.scope: Scope = wrapper._own_scope
        if wrapper._shared:
            self.session = session = _session_of(sessions, wrapper)
            self.scope = session.scope
            if not blocks and not _test_blocks and own.connection is own.transaction is None:
                self.state = session.state  # what `_look_up()` finds most often
                return
        self.state = _look_up(wrapper, blocks, self.session)
        if self.state is own:
            sessions.uses_own = True


def find(here: bridge.Portal, wrapper: Any) -> Found:
    """What the code in portal `here` sees. See Note [Looking up]."""
    found: Found | None = here.found
    blocks = _blocks.get()
    if found is None or found.context is not here.gr_context:
        sessions = task_sessions()
    elif found.wrapper is not wrapper or found.settings_dict is not wrapper.settings_dict:
        sessions = found.sessions
    else:
        if found.blocks is not blocks:
            found.blocks = blocks
            found.state = _look_up(wrapper, blocks, found.session)
        return found
    here.found = found = Found(here.gr_context, wrapper, blocks, sessions)
    return found


def is_at_rest() -> bool:
    """Whether the running code is green, and has nothing open and nothing logged on any database.

    What of a request's use of its databases has to be tidied up is none of that.
    """
    if type(_running()) is not Portal or _get_running_loop() is None:
        return False
    if _blocks.get() or _test_blocks or _pinned:
        return False
    observers = _observers.get()
    if observers and any(each.force_debug_cursor for each in observers.values()):
        return False
    sessions = _sessions.get()
    if sessions is None or not sessions.belong_to(asyncio.current_task()):
        return True
    return sessions.are_at_rest()


def look_again() -> None:
    """Something has changed that `find()` does not look at."""
    if (here := bridge.current()) is not None:
        here.found = None


def current_state(wrapper: Any) -> State:
    """The state that the names of `wrapper` stand for, here and now."""
    if _get_running_loop() is not None:
        if type(here := _running()) is Portal:
            return find(here, wrapper).state
    elif not _unwinding:
        blocks = _blocks.get()
        if not blocks or blocks is wrapper._own_blocks:
            own: State = wrapper._own
            return own
    return _look_up(wrapper, _blocks.get(), None)


def state_and_session(wrapper: Any) -> tuple[State, Session | None]:
    """Both `current_state()` and `async_session()`."""
    here = _running()
    if type(here) is Portal and _get_running_loop() is not None:
        found = find(here, wrapper)
        return found.state, found.session
    return current_state(wrapper), async_session(wrapper)


def _look_up(wrapper: Any, blocks: Mapping[Key, Block], known: Session | None) -> State:
    if blocks:
        block = blocks.get(id(wrapper.settings_dict))
        if block is not None and not (block.ended and block.is_stale_in_thread(wrapper)):
            return block.transaction.state
    own: State = wrapper._own
    green = type(_running()) is Portal
    if _get_running_loop() is None:
        if not green:
            return own
        # It unwinds after its loop has ended: what the thread has open is not for it.
    elif (
        own.transaction is not None
        or (not green and conf.allows_async_unsafe())
        # The wrapper of a thread, which shares its connection with us.
        or (own.connection is not None and wrapper._thread_ident != threading.get_ident())
    ):
        return own
    if not wrapper._shared:
        return own
    if _test_blocks and wrapper._key in _test_blocks:
        return _test_blocks[wrapper._key].transaction.state
    return (known or session(wrapper)).state


def plain_state(wrapper: Any) -> State | None:
    """The wrapper's own state where the running code is as in Django, else None.

    That is, where it is synchronous and in no transaction.
    """
    if _get_running_loop() is None and not _blocks.get() and not _unwinding:
        own: State = wrapper._own
        return own
    return None


def current_scope(wrapper: Any) -> Scope:
    """What observes the statements of the running code."""
    own: Scope = wrapper._own_scope
    if _get_running_loop() is None:
        return own
    here = _running()
    if type(here) is Portal:
        return find(here, wrapper).scope
    return session(wrapper).scope if wrapper._shared and in_async_context() else own


def async_session(wrapper: Any) -> Session | None:
    """The task's session, in an async context where `wrapper` stands for its alias; else None."""
    if _get_running_loop() is None:
        return None
    here = _running()
    if type(here) is Portal:
        return find(here, wrapper).session
    return session(wrapper) if wrapper._shared and in_async_context() else None


def session(wrapper: Any) -> Session:
    """The running task's session; made at first use. Only in an async context."""
    return _session_of(task_sessions(), wrapper)


def _session_of(sessions: _Sessions, wrapper: Any) -> Session:
    try:
        return sessions.by_key[id(wrapper.settings_dict)]
    except KeyError:
        settings_dict = wrapper.settings_dict
        scope = Scope(_observers.get().get(id(settings_dict)), wrapper.queries_limit)
        new = Session(sessions, scope, settings_dict["AUTOCOMMIT"])
        return sessions.by_key.setdefault(id(settings_dict), new)


def task_sessions() -> _Sessions:
    """The sessions of the running task; made at first use. Only in an async context."""
    sessions = _sessions.get()
    task = asyncio.current_task()
    if sessions is None or not sessions.belong_to(task):
        sessions = (task and _pinned.get(task)) or _Sessions(task)
        _sessions.set(sessions)
    return sessions


def wrappers_of_task() -> list[Any] | None:
    """The wrapper objects that were made for the running task, to be changed.

    None where there are none, or it has used what one has of its own.
    """
    sessions = _sessions.get()
    if sessions is None or sessions.uses_own or not sessions.belong_to(asyncio.current_task()):
        return None
    return sessions.wrappers


def observe(wrapper: Any) -> None:
    """Let tasks that are started from here on be seen by who observes this code."""
    _observers.set({**_observers.get(), wrapper._key: current_scope(wrapper)})


#: The context of the running code, for what the loop calls later on its behalf; and an empty one.
context_here = contextvars.copy_context
no_context = contextvars.Context


def state_attribute(name: str) -> property:
    """A name of Django's on the wrapper that stands for the current state's."""
    return property(_getter(name), _setter(name))


# Functions of properties, because the interpreter calls these without a detour. What is usual is
# found here, without a call: `find()` and `current_state()` know the rest.


def _getter(name: str) -> Callable[[Any], Any]:
    def get(wrapper: Any) -> Any:
        if _get_running_loop() is None:
            if not _unwinding:
                blocks = _blocks.get()
                if not blocks or blocks is wrapper._own_blocks:
                    return getattr(wrapper._own, name)
        elif type(here := _running()) is Portal:
            found = here.found
            if (
                found is not None
                and found.context is here.gr_context
                and found.wrapper is wrapper
                and found.blocks is _blocks.get()
                and found.settings_dict is wrapper.settings_dict
            ):
                return getattr(found.state, name)
        return getattr(current_state(wrapper), name)

    return get


def _setter(name: str) -> Callable[[Any, Any], None]:
    def set_(wrapper: Any, value: Any) -> None:
        if not wrapper._ready:
            # What a wrapper is made with, its state and scope have already; and it must not reset
            # those of a transaction that others are in.
            return
        if _get_running_loop() is None:
            if not _unwinding:
                blocks = _blocks.get()
                if not blocks or blocks is wrapper._own_blocks:
                    setattr(wrapper._own, name, value)
                    return
        elif type(here := _running()) is Portal:
            setattr(find(here, wrapper).state, name, value)
            return
        setattr(current_state(wrapper), name, value)

    return set_


def _doom(wrapper: Any, value: Any) -> None:
    """Set `needs_rollback`: of the running code's block, not of one that a sibling has open."""
    if not wrapper._ready:
        return
    block = current_block(wrapper)
    if block is None or block.transaction.innermost in (block, None):
        current_state(wrapper).needs_rollback = value
    elif not block.ended:
        block.doomed = value


rollback_attribute = state_attribute("needs_rollback").setter(_doom)


def scope_attribute(name: str) -> property:
    """A name of Django's on the wrapper that stands for the current scope's."""

    def get(wrapper: Any) -> Any:
        if _get_running_loop() is None:
            return getattr(wrapper._own_scope, name)
        if type(here := _running()) is Portal:
            found = here.found
            if (
                found is None
                or found.context is not here.gr_context
                or found.wrapper is not wrapper
                or found.settings_dict is not wrapper.settings_dict
            ):
                found = find(here, wrapper)
            return getattr(found.scope, name)
        return getattr(current_scope(wrapper), name)

    def set_(wrapper: Any, value: Any) -> None:
        if not wrapper._ready:
            return
        setattr(current_scope(wrapper), name, value)
        if value and name == "force_debug_cursor":
            observe(wrapper)

    return property(get, set_)


# --- Transactions -------------------------------------------------------------------------------


class Block:
    """One `atomic` block, or one stretch of manual transaction management."""

    # fmt: off
    __slots__ = (
        "claimed", "doomed", "ended", "moving", "parent", "task", "thread", "transaction",
    )
    # fmt: on

    def __init__(self, transaction: Transaction, parent: Block | None) -> None:
        self.transaction = transaction
        self.parent = parent
        self.ended = False
        #: Whether an outer block was left with an exception while this one was open.
        self.claimed = False
        #: Whether it must be rolled back, as was found while a sibling's block was open in it.
        self.doomed = False
        #: Whether a statement that opens or ends a block is on its way.
        self.moving = False
        #: The name of the task that has opened it; None: a thread has.
        task = None if _get_running_loop() is None else asyncio.current_task()
        self.task = None if task is None else bridge.name_of(task)
        self.thread = threading.get_ident()

    @property
    def owner(self) -> str:
        """Whose block it is, for messages."""
        return _name_of_thread(self.thread) if self.task is None else f"task {self.task!r}"

    def is_stale_in_thread(self, wrapper: Any) -> bool:
        """Whether this block ended long ago, in a sync context, where only the thread counts.

        A context that was copied inside a block may be used again after it, as test runners do;
        what Django promises to sync code does not depend on contexts.
        """
        return self.ended and not in_async_context()


class Transaction:
    """A transaction, and the tasks that take part in it."""

    # fmt: off
    __slots__ = (
        "home", "innermost", "leasing", "lender", "owner", "settings_dict", "state", "task",
        "waiters",
    )
    # fmt: on

    def __init__(self, state: State, settings_dict: Mapping[str, Any]) -> None:
        self.state = state
        self.settings_dict = settings_dict
        #: The session whose lease this transaction uses, if there is one.
        self.lender: Session | None = None
        self.innermost: Block | None = Block(self, None)
        #: The loop whose pool gives the connection; None for one that has its own.
        self.home = asyncio._get_running_loop() if state.pooled else None
        #: Whose block it is; None in a thread.
        self.owner = None if self.home is None else asyncio.current_task()
        #: For the first statement, which may be made by two tasks at once.
        self.leasing = bridge.ParkingLock() if state.pooled else None
        self.waiters: list[bridge.Waiter] = []
        #: The task that it ends with, if no `with` says where it ends.
        self.task: asyncio.Task[Any] | None = None

    def end_with_task(self) -> None:
        """Let a transaction that is managed by hand end, rolled back, with the task that began it.

        Nobody could end it after that.
        """
        if self.task is None:
            self.task = asyncio.current_task()
            if self.task is not None:
                self.task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        lease = self.state.lease
        self.state.transaction = None
        self.end()
        if lease is not None:
            lease.end()

    def borrow(self) -> Lease | None:
        """Take over the lease of the session that began the transaction, if it holds one."""
        if self.lender is None:
            return None
        lease, self.lender.state.lease = self.lender.state.lease, None
        self.lender.state.connection = None
        if lease is None:
            self.lender = None
        elif self.lender.pins:
            lease.pins -= 1  # the transaction pins it
        return lease

    def give_up_lease(self) -> None:
        """End the lease, also if a cursor was left open; but give back what was borrowed."""
        lease, lender = self.state.lease, self.lender
        assert lease is not None
        if lender is None:
            lease.end()
            return
        if lender.state.lease is None and (lender.pins or lease.cursors):
            self.state.lease = self.state.connection = None
            lender.state.take(lease)
            lease.pins += bool(lender.pins)
        lease.unpin()

    def take_turn(self, block: Block) -> None:
        """Wait until statements of `block` may run. See Note [Turns].

        Raises `TransactionManagementError` when the block has ended, or after the pool's `timeout`.
        """
        if self.innermost is block:
            return
        timeout = conf.pool_timeout(self.settings_dict)
        deadline = monotonic() + timeout
        while self.innermost is not block:
            check_not_ended(block)
            in_time = self._wait(max(0.0, deadline - monotonic()))
            if not in_time and self.innermost is not block:
                self._give_up(block, timeout)

    def _wait(self, timeout: float | None) -> bool:
        waiter = bridge.Waiter()
        self.waiters.append(waiter)
        try:
            return waiter.wait(timeout)
        finally:
            if waiter in self.waiters:
                self.waiters.remove(waiter)

    def _give_up(self, block: Block, timeout: float) -> None:
        check_not_ended(block)
        assert self.innermost is not None
        raise TransactionManagementError(
            f"{_name_of_task()} waited {timeout:g} s for its turn in a transaction that it "
            f"shares with {self.innermost.owner}, which has an atomic block open inside it. Let "
            "that block end first, or run the task outside with 'pgbackend.detached()'. (How long "
            "to wait is the pool's 'timeout'.)"
        )

    def push(self, parent: Block) -> Block:
        """Open a block inside `parent`, whose turn it is; decided and done in one step.

        It is moving until `settle()` or `pop()`.
        """
        self.innermost = Block(self, parent)
        self.innermost.moving = True
        return self.innermost

    def settle(self, block: Block) -> None:
        """The statement that opens `block` is done."""
        block.moving = False
        self._wake()

    def pop(self, block: Block) -> None:
        """End `block`, which is the innermost."""
        block.ended = True
        self.innermost = parent = block.parent
        if parent is not None and parent.doomed:
            parent.doomed = False
            self.state.needs_rollback = True
        if self.waiters:
            self._wake()

    def claim(self, block: Block) -> None:
        """End the blocks that are open inside `block`, which is about to be rolled back.

        Waits only for a statement that opens or ends one, whose outcome Django must write down.
        """
        while self.innermost is not block:
            inner = self.innermost
            assert inner is not None
            if inner.moving and self._wait_held():
                continue
            # What Django wrote down when it opened the block; nothing if it is being ended.
            del self.state.savepoint_ids[-1:], self.state.atomic_blocks[-1:]
            inner.claimed = True
            self.pop(inner)

    def _wait_held(self) -> bool:
        """Wait for the next change, also if cancelled; False if nothing can be waited for."""
        here = bridge.current()
        try:
            self._wait(None)
        except asyncio.CancelledError as exc:
            if here is None:
                raise
            here.pending = here.pending or exc
        except PortalClosed:
            return False
        return True

    def end(self) -> None:
        """End all blocks that are still open."""
        if self.task is not None:
            self.task.remove_done_callback(self._task_done)
        while self.innermost is not None:
            self.pop(self.innermost)
        self.owner = None

    def _wake(self) -> None:
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            waiter.wake()


def _name_of_task() -> str:
    if asyncio._get_running_loop() is not None and (task := asyncio.current_task()) is not None:
        return f"task {bridge.name_of(task)!r}"
    return _name_of_thread(threading.get_ident())


def _name_of_thread(ident: int) -> str:
    names = (thread.name for thread in threading.enumerate() if thread.ident == ident)
    return f"thread {next(names, str(ident))!r}"


def check_not_ended(block: Block) -> None:
    """Raise `TransactionManagementError` if `block` has ended."""
    if block.ended:
        raise TransactionManagementError(
            f"{_name_of_task()} was started inside an atomic block of {block.owner} that has "
            "ended: its statements would not be part of that transaction any more. Await the task "
            "inside the block, or start it with 'pgbackend.detached()'."
        )


def take_turn(wrapper: Any) -> None:
    """Wait until a statement of the running code may be sent."""
    if not _blocks.get() and not _test_blocks and wrapper._own.transaction is None:
        return  # what `current_block()` would say, for most
    block = current_block(wrapper)
    if block is not None and block.transaction.innermost is not block:
        block.transaction.take_turn(block)


def state_in_turn(wrapper: Any) -> tuple[State, Session | None]:
    """`state_and_session()`, when it is the turn of the running code."""
    here = _running()
    if type(here) is Portal and _get_running_loop() is not None:
        found = find(here, wrapper)
        block = found.blocks.get(id(wrapper.settings_dict)) if found.blocks else None
        if block is not None:
            if block.transaction.innermost is block:
                return found.state, found.session
        elif not _test_blocks and wrapper._own.transaction is None:
            return found.state, found.session  # nobody takes turns
    take_turn(wrapper)
    return state_and_session(wrapper)


def enter_block(wrapper: Any, block: Block) -> None:
    """Make `block` the one that the running code, and tasks that it starts, are in."""
    _set_blocks(wrapper, {**_blocks.get(), wrapper._key: block}, block)


def leave_block(wrapper: Any, parent: Block | None) -> None:
    """Go back to `parent`, or to no block."""
    if parent is not None:
        enter_block(wrapper, parent)
        return
    blocks = {**_blocks.get()}
    blocks.pop(wrapper._key, None)
    _set_blocks(wrapper, blocks, None)


def _set_blocks(wrapper: Any, blocks: Mapping[Key, Block], block: Block | None) -> None:
    _blocks.set(blocks)
    is_own = block is not None and block.transaction.state is wrapper._own
    # Who finds this very mapping in its context is in a block of the wrapper's own connection.
    wrapper._own_blocks = blocks if is_own else None


def begin(wrapper: Any, state: State) -> Transaction:
    """Begin a transaction on `state`, with the running code in its outermost block."""
    state.transaction = transaction = Transaction(state, wrapper.settings_dict)
    assert transaction.innermost is not None
    enter_block(wrapper, transaction.innermost)
    return transaction


def end(wrapper: Any, state: State) -> None:
    """End the transaction on `state`, if there is one: its participants are refused from now on."""
    transaction, state.transaction = state.transaction, None
    if transaction is not None:
        transaction.end()
        leave_block(wrapper, None)


def join_in_tests(wrapper: Any, block: Block | None) -> None:
    """Let async contexts that are in no transaction take part in `block` (None: no longer)."""
    if block is None:
        _test_blocks.pop(wrapper._key, None)
    else:
        _test_blocks[wrapper._key] = block
    look_again()


def _forget_after_fork() -> None:
    """A child is in no transaction of its parent's loops, and holds none of their leases."""
    blocks = _blocks.get()
    _blocks.set({key: one for key, one in blocks.items() if not one.transaction.state.pooled})
    _sessions.set(None)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)


@contextmanager
def no_blocks(keys: set[Key] | None) -> Iterator[None]:
    """Step out of the transactions of `keys` (None: of all) for the block of a `with`."""
    token = _blocks.set(
        {key: block for key, block in _blocks.get().items() if keys is not None and key not in keys}
    )
    try:
        yield
    finally:
        _blocks.reset(token)


@contextmanager
def prepared(wrapper: Any, connection: Any) -> Iterator[None]:
    """Let `connection`, which is nobody's yet, be the connection of the running code."""
    state = State(autocommit=True)
    state.connection = connection
    state.is_new = True
    begin(wrapper, state)
    state.transaction = None  # in autocommit: a block is only how the code finds the state
    try:
        yield
    finally:
        leave_block(wrapper, None)


def being_prepared(wrapper: Any) -> Any:
    """The connection that `prepared()` has put in the place of the wrapper's, or None."""
    state = current_state(wrapper)
    return state.connection if state.is_new else None
