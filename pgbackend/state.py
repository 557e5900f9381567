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

Note [Blocks that are left]
A block belongs to its `with`, which remembers it (`blocks.py`), and not to the context in which
that ends. Generators may be stepped, closed and left by other tasks than the one that has opened a
block in them; so may what is kept in an `ExitStack`. Then
- code that is called from the generator takes part in its block (`find_place`), for as long as it
  is called from there; it is refused if the block has ended without it;
- the task whose block ended elsewhere, or whose generator was left by `break`, is where it was
  before the block (`_where_left`);
- a block that is still open when the task ends which has opened it is rolled back (`orphan`).

Note [Transactions of tests]
A context variable alone does not reach an async test whose runner copied its context before the
fixture opened the transaction, nor an application that asgiref's communicators run in an empty one.
So a transaction that Django marks as a test's is joined by every async context of the process that
is in none of its own, and by the threads in which asgiref runs functions for it (`in_tests`).
Whoever joins has not opened the connection, and does not close it: on Django's own backend what
closes connections after a request, or at the end of a thread, would find one of its own.

Note [Lent wrappers]
Synchronous code that calls `async_to_sync()` waits for a loop in another thread, where Django would
make wrapper objects anew. On Django's own backend the ORM comes back to the waiting thread, and to
what somebody has set on its wrapper: an attribute, a patched method, the log of its queries. So the
loop is lent the wrapper of the thread. What is the thread's alone, its connection and the
transaction that the context does not name, it does not use: its tasks have sessions of their own.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from time import monotonic
from types import FrameType
from typing import Any, TypeAlias

from django.db.transaction import TransactionManagementError

from . import conf, frames, generators
from .driver import bridge
from .driver.bridge import Portal
from .driver.errors import PortalClosed
from .driver.forks import after_fork
from .driver.lease import Lease
from .driver.parking import ParkingLock, Waiter

# Code that runs for each statement spells `bridge.green()` out: the call would cost too much.
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

    def copy(self) -> Scope:
        """Return one of another task, with the same observers and a log of its own."""
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

    def __init__(self, together: _Sessions, key: Key, scope: Scope, autocommit: bool) -> None:
        #: All sessions of the task, which know this one by its key.
        self._together = weakref.ref(together)
        self.key = key
        self.scope = scope
        self.state = State(pooled=True, autocommit=autocommit)
        #: How many `pinned()` blocks the task is in; and where the first began.
        self.pins = 0
        self.pinned_at: str | None = None
        #: Whether the next cursor is for a statement that the ORM or the backend made.
        self.compiled = False
        #: Whether it is a compiler of Django's that asks for it, to fetch all rows; see
        #: fast/statements.py.
        self.at_once = False
        #: The cursor of the compiled statement that is being executed.
        self.cursor: Any = None

    def pin(self) -> None:
        """Hold the connection that there is, or the next one, until `unpin()`."""
        self.pins += 1
        if self.pins == 1:
            self.pinned_at = frames.place()
            self._keep()
            self.watch()
            if self.state.lease is not None:
                self.state.lease.pin()

    def unpin(self) -> None:
        if self.pins == 0:
            return  # its task has ended meanwhile
        self.pins -= 1
        if self.pins == 0:
            self._keep()
            if self.state.lease is not None:
                self.state.lease.unpin()

    def watch(self) -> None:
        """Let the end of the task give back the connection that it has leased just now."""
        if (together := self._together()) is not None:
            together.watch()

    def task_ended(self, task: asyncio.Task[Any]) -> Left | None:
        """Give back what `task`, whose session this is, has left open; return what to warn of."""
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

    # fmt: off
    __slots__ = (
        "__weakref__", "blocks", "by_key", "inherited", "owner", "uses_own", "watched", "wrappers",
    )
    # fmt: on

    def __init__(self, owner: asyncio.Task[Any] | None) -> None:
        self.owner = None if owner is None else weakref.ref(owner)
        self.by_key: dict[Key, Session] = {}
        #: Whether the end of the task gives back what these still hold.
        self.watched = False
        #: The open blocks that the task has opened, the innermost last.
        self.blocks: list[Block] = []
        #: Leases that other tasks have passed on to this one, beside those of its sessions.
        self.inherited: list[weakref.ref[Lease]] = []
        #: Whether the task has also used what a wrapper has of its own.
        self.uses_own = False
        #: The wrapper objects that were made for it; see fast/wrappers.py.
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

    def watch(self) -> None:
        """Let the end of the task give back what it still holds then."""
        if not self.watched:
            self.watched = True
            task = None if self.owner is None else self.owner()
            if task is not None:
                task.add_done_callback(self.task_ended)

    def task_ended(self, task: asyncio.Task[Any]) -> None:
        """Give back what `task`, whose sessions these are, has left open."""
        _pinned.pop(task, None)
        left = [block.orphan(task) for block in tuple(self.blocks)]
        left += [session.task_ended(task) for session in self.by_key.values()]
        left += [_end_left_over(ref(), task) for ref in self.inherited]
        # Last, since a warning may be made an error.
        _warn_in_time(tuple(filter(None, left)), task.get_loop(), _TURNS_TO_CLOSE)

    def inherit(self, key: Key, lease: Lease, scope: Scope) -> bool:
        """Take over `lease`, whose task has ended; False if the owner of these has ended too.

        `scope` is that of the session which has had it.
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
            self.inherited = [ref for ref in self.inherited if ref() is not None]
            self.inherited.append(weakref.ref(lease))
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


#: A warning, and whether what it warns of is open still.
Left: TypeAlias = tuple[str, Callable[[], bool]]

#: In so many turns of the loop an async generator is closed that nobody refers to any more, and one
#: that it iterates; and some more, where tasks are many.
_TURNS_TO_CLOSE = 30


def _end_left_over(
    lease: Lease | None, task: asyncio.Task[Any], pinned: str | None = None
) -> Left | None:
    """End a lease that `task` holds at its end; return what to warn of."""
    if lease is None or lease.ended:
        return None
    name = f"task {bridge.name_of(task)!r}"
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


def _warn_in_time(left: Sequence[Left], loop: asyncio.AbstractEventLoop, turns: int) -> None:
    """Warn of what is left open, unless the loop is about to close it.

    An ``async for`` that is left before its end leaves its generator to the loop, which closes it a
    turn later: where the task ends with it, that is after its end. What ends with its loop is not
    worth a warning.
    """
    left = [each for each in left if each[1]()]
    if left and turns:
        loop.call_soon(_warn_in_time, left, loop, turns - 1, context=no_context())
        return
    for warning, _ in left:
        warnings.warn(warning, ResourceWarning, stacklevel=2)


def leave_to(heir: _Sessions, wrapper: Any) -> None:
    """Let the lease that the running task holds pass on to `heir` when the task ends.

    For an iterator that was made by one task, and is stepped by another.
    """
    sessions = task_sessions()
    session = None if sessions is heir else sessions.by_key.get(wrapper._key)
    if session is not None and session.state.lease is not None:
        session.state.lease.heir = heir


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
_lent: contextvars.ContextVar[Mapping[str, Any]] = contextvars.ContextVar(
    "pgbackend.lent",
    default={},  # noqa: B039
)
_test_blocks: dict[Key, Block] = {}
#: The same, for other modules to look whether there is any.
test_blocks: Mapping[Key, Block] = _test_blocks
_carried = generators.carried


class _Here(dict[Key, "Block"]):
    """The blocks of code that is in another place than its context would tell.

    Either it is called from a generator, in whose block it is (`adopted`), where `before` is what
    its context holds; or it has stepped out of the blocks that were `before` (`detached`).
    """

    __slots__ = ("adopted", "before", "detached", "task")

    def __init__(
        self,
        blocks: Mapping[Key, Block],
        *,
        adopted: Block | None = None,
        before: Mapping[Key, Block],
        detached: _Detachment | None = None,
        task: weakref.ref[asyncio.Task[Any]] | None = None,
    ) -> None:
        super().__init__(blocks)
        self.adopted = adopted
        self.before = before
        self.detached = detached
        #: Whose step of the generator it is; tasks that inherit this stay in the block.
        self.task = task

    def replaced(self, blocks: Mapping[Key, Block], key: Key) -> Mapping[Key, Block]:
        """Return `blocks` as those of the same place, or of the one before, if that is left."""
        adopted = self.adopted
        if adopted is not None and adopted.key == key and not _is_within(blocks.get(key), adopted):
            return self.before
        return _Here(
            blocks, adopted=adopted, before=self.before, detached=self.detached, task=self.task
        )


# --- Looking up ---------------------------------------------------------------------------------


def in_async_context() -> bool:
    """Whether waits for the database must not block: a loop runs in this thread."""
    if bridge.current() is not None:
        return True
    return _get_running_loop() is not None and not conf.allows_async_unsafe()


def current_block(wrapper: Any) -> Block | None:
    """The block that the running code is in, whether or not it is still open."""
    blocks = _blocks.get()
    if blocks and (block := blocks.get(id(wrapper.settings_dict))) is not None:
        if not block.left:
            return None if block.ended and block.is_stale_in_thread(wrapper) else block
        if (block := _where_left(block)) is not None:
            return None if block.ended and block.is_stale_in_thread(wrapper) else block
    if _test_blocks and wrapper._key in _test_blocks and in_async_context():
        return _test_blocks[wrapper._key]
    own: State = wrapper._own
    if own.transaction is None or (wrapper.lent and is_borrowed(wrapper)):
        return None
    return own.transaction.innermost


def named_block(wrapper: Any) -> Block | None:
    """The block that the context of the running code names: `current_block()`, if that is left."""
    blocks = _blocks.get()
    block = blocks.get(id(wrapper.settings_dict)) if blocks else None
    if block is not None and (block.left or not block.ended):
        return block
    return current_block(wrapper)


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
    if bridge.green() is None:
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
        if block is not None and block.left:
            block = _where_left(block)
        if block is not None and not (block.ended and block.is_stale_in_thread(wrapper)):
            return block.transaction.state
    own: State = wrapper._own
    in_portal = bridge.current() is not None
    if _get_running_loop() is None:
        if not in_portal:
            return own
        # It unwinds after its loop has ended: what the thread has open is not for it.
    elif not (wrapper.lent and is_borrowed(wrapper)) and (
        own.transaction is not None
        or (not in_portal and conf.allows_async_unsafe())
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
        scope = _new_scope(wrapper, _observers.get().get(id(settings_dict)))
        new = Session(sessions, id(settings_dict), scope, settings_dict["AUTOCOMMIT"])
        return sessions.by_key.setdefault(id(settings_dict), new)


def _new_scope(wrapper: Any, observer: Scope | None) -> Scope:
    """Return a scope for a task, with the observers of its starter, or of the waiting thread."""
    if not wrapper.lent or not is_borrowed(wrapper):
        return Scope(observer, wrapper.queries_limit)
    observer = observer or wrapper._own_scope
    scope = Scope(observer, wrapper.queries_limit)
    if conf.is_debugging():
        scope.log = observer.queries_log
    return scope


def session_of_opener(block: Block) -> Session | None:
    """Return the session of `block`'s database, if the running code is that of its opener."""
    sessions = _sessions.get()
    if sessions is None or sessions is not block.sessions or _get_running_loop() is None:
        return None
    if not sessions.belong_to(asyncio.current_task()):
        return None
    return sessions.by_key.get(id(block.transaction.settings_dict))


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


@contextmanager
def lending(wrappers: Mapping[str, Any]) -> Iterator[None]:
    """Let loops that are started from here find the wrappers of this thread, by their aliases.

    See Note [Lent wrappers].
    """
    before = _lent.get()
    _lent.set(wrappers)
    for wrapper in wrappers.values():
        wrapper.lend()
    try:
        yield
    finally:
        for wrapper in wrappers.values():
            wrapper.take_back()
        _lent.set(before)


def lent(alias: str) -> Any:
    """Return the wrapper of the thread that waits for the running code; None if there is none."""
    return _lent.get().get(alias)


def is_borrowed(wrapper: Any) -> bool:
    """Whether the running code has `wrapper` from the thread that waits for it."""
    return (
        wrapper.lent > 0 and wrapper._thread_ident != threading.get_ident() and in_async_context()
    )


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
    called_from = generators.below(wrapper._key) if _carried else None
    if called_from is not None and (called_from.ended or not _is_within(block, called_from)):
        return  # its code was refused, and whoever makes the step has done nothing wrong
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

    # What a new one has, here once for all of them.

    ended = False
    #: The task that has opened it, and its name; None: a thread has.
    opener: weakref.ref[asyncio.Task[Any]] | None = None
    task: str | None = None
    thread = 0
    #: Whether an outer block was left with an exception while this one was open.
    claimed = False
    #: Whether it must be rolled back, as was found while a sibling's block was open in it.
    doomed = False
    #: Whether a statement that opens or ends a block is on its way.
    moving = False
    #: The object of the `with` that has opened it, and the frame which that is in. None for
    #: transactions that are managed by hand, and where nobody else can meet the block.
    atomic: Any = None
    frame: FrameType | None = None
    #: Whether that frame is a generator's of which a context manager is made.
    in_context_manager = False
    #: Whether its end has begun, at least; and whether it is rolled back.
    leaving = False
    undone = False
    #: Whether its `with` has ended, or is about to: its generator was left.
    left = False
    #: The sessions of the task that has opened it, which list it.
    sessions: _Sessions | None = None
    #: Why it has ended before its `with`.
    reason: str | None = None

    def __init__(self, transaction: Transaction, parent: Block | None) -> None:
        self.transaction = transaction
        self.parent = parent
        if _get_running_loop() is not None and (task := asyncio.current_task()) is not None:
            self.task = bridge.name_of(task)
            self.opener = weakref.ref(task)
        else:
            self.thread = threading.get_ident()

    @property
    def key(self) -> Key:
        """What tells its database from others."""
        return id(self.transaction.settings_dict)

    @property
    def owner(self) -> str:
        """Whose block it is, for messages."""
        return _name_of_thread(self.thread) if self.task is None else f"task {self.task!r}"

    def remember(self, atomic: Any, frame: FrameType | None, sessions: _Sessions) -> None:
        """Note the `with` that has opened this block. See Note [Blocks that are left]."""
        self.atomic, self.frame, self.sessions = atomic, frame, sessions
        atomic.__dict__.setdefault("_pgbackend_blocks", []).append(self)
        if not sessions.watched:
            sessions.watch()
        sessions.blocks.append(self)
        if frame is None:
            return
        if frame.f_code.co_flags & generators.GENERATORS:
            self.in_context_manager = frames.is_of_context_manager(frame)
            generators.carry(frame, self)
            _settle_before_tasks()

    def leave_later(self) -> None:
        """Let a task of its own roll it back: see `blocks`, which defines it."""
        raise NotImplementedError

    def was_ended_by_others(self) -> bool:
        """Whether others have rolled it back, and Django has written that down already."""
        return self.claimed or (self.ended and self.reason is not None)

    def begin_to_leave(self) -> None:
        """The `with` ends: whatever its end does is not called from the block any more."""
        self.leaving = True
        if _carried:
            generators.drop(self.frame, self)

    def leave(self) -> None:
        """The `with` has ended."""
        self.left = True
        if self.atomic is not None:
            self.atomic._pgbackend_blocks.remove(self)  # noqa: SLF001 - ours
            self.atomic = self.frame = None

    def forget_task(self) -> None:
        """It has ended: the task that has opened it need not see to it."""
        if self.sessions is not None:
            self.sessions.blocks.remove(self)
            self.sessions = None

    def say_why_it_ended(self) -> None:
        """Raise `TransactionManagementError` if others have ended it, or a block around it."""
        block: Block | None = self
        while block is not None:
            if block.reason is not None:
                raise TransactionManagementError(block.reason) from None
            block = block.parent

    def why_cursors_are_gone(self) -> Exception | None:
        """Return why the server has closed, or closes, the cursors that were opened inside."""
        block: Block | None = self
        while block is not None:
            if block.undone or (block.parent is None and block.leaving and not block.ended):
                return TransactionManagementError(
                    block.reason
                    or "the server has closed this cursor at the end of the atomic block that it "
                    "was opened in: read its rows inside of the block"
                )
            block = block.parent
        return None

    def is_lost(self) -> bool:
        """Whether nobody will ever end it: its loop is closed."""
        home = self.transaction.home
        return home is not None and home.is_closed()

    def abandon(self) -> None:
        """Leave the block at once: its generator is about to be closed, by another task."""
        if self.left:
            return
        self.left = True
        _settle_before_tasks()
        lease = self.transaction.state.lease
        if self.parent is None and lease is not None:
            lease.task = None  # who has opened it is not whom others wait for
        if _blocks.get().get(self.key) is self:
            _blocks.set(_with_block(_blocks.get(), self.key, self.parent))
            look_again()

    def may_be_left_with_step(self) -> bool:
        """Whether it, or one around it, is in a generator that the running code has iterated."""
        block: Block | None = self
        while block is not None:
            if block.frame in _carried and not block.in_context_manager:
                return True
            block = block.parent
        return False

    def notice_end_of_opener(self) -> None:
        """See that the task which has opened it has ended, before the loop says so."""
        opener = None if self.opener is None else self.opener()
        if opener is not None and opener.done():
            self.orphan(opener)

    def orphan(self, task: asyncio.Task[Any]) -> Left | None:
        """Roll it back: `task`, which has opened it, has ended. Return what to warn of."""
        if self.ended or self.left:
            return None
        name = f"task {bridge.name_of(task)!r}"
        place = "an unknown place" if self.frame is None else frames.place_of(self.frame)
        self.reason = (
            f"an atomic block was rolled back: {name}, which had opened it in {place}, ended "
            "before the block did. Open and leave a block in one task: let one task make all the "
            "steps of a generator that holds one, and close it ('contextlib.aclosing()')"
        )
        state = self.transaction.state
        if self.parent is None and state.pooled:
            lease, state.transaction = state.lease, None
            self.transaction.end()
            if lease is not None:
                lease.end(self.reason)
        elif self.atomic is not None:
            self.leave_later()
        return self.reason, lambda: not self.left and not self.is_lost()

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
        self.leasing = ParkingLock() if state.pooled else None
        self.waiters: list[Waiter] = []
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
        Returns when the task that waits, which has opened the block, is out of it.
        """
        if self.innermost is block:
            return
        timeout = conf.pool_timeout(self.settings_dict)
        deadline = monotonic() + timeout
        while self.innermost is not block:
            if block.left and _where_left(block) is not block:
                return  # it ended meanwhile: the caller looks again where the code is
            check_not_ended(block)
            in_time = self._wait(max(0.0, deadline - monotonic()))
            if not in_time and self.innermost is not block:
                self._give_up(block, timeout)

    def _wait(self, timeout: float | None) -> bool:
        waiter = Waiter()
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
        if block.sessions is not None:
            block.forget_task()
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
        while self.innermost is not block and not block.ended:
            inner = self.innermost
            assert inner is not None  # or all have ended
            if inner.moving and self._wait_held():
                continue
            # What Django wrote down when it opened the block; nothing if it is being ended.
            del self.state.savepoint_ids[-1:], self.state.atomic_blocks[-1:]
            inner.claimed = inner.undone = True
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
    if (task := bridge.current_task()) is not None:
        return f"task {bridge.name_of(task)!r}"
    return _name_of_thread(threading.get_ident())


def _name_of_thread(ident: int) -> str:
    names = (thread.name for thread in threading.enumerate() if thread.ident == ident)
    return f"thread {next(names, str(ident))!r}"


def check_not_ended(block: Block) -> None:
    """Raise `TransactionManagementError` if `block` has ended."""
    block.say_why_it_ended()
    if block.ended:
        raise TransactionManagementError(
            f"{_name_of_task()} was started inside an atomic block of {block.owner} that has "
            "ended: its statements would not be part of that transaction any more. Await the task "
            "inside the block, or start it with 'pgbackend.detached()'."
        )


def take_turn(wrapper: Any) -> None:
    """Wait until a statement of the running code may be sent."""
    if _carried:
        find_place(wrapper._key)
    if not _blocks.get() and not _test_blocks and wrapper._own.transaction is None:
        return  # what `current_block()` would say, for most
    block = current_block(wrapper)
    while block is not None and block.transaction.innermost is not block:
        block.transaction.take_turn(block)
        block = current_block(wrapper)


def _settle_before_tasks() -> None:
    """From here on, blocks may be open in other places than contexts tell."""
    if settle not in bridge.before_task:
        bridge.before_task.append(settle)


def _is_within(block: Block | None, outer: Block) -> bool:
    """Whether `block` is `outer`, or is inside of it."""
    while block is not None and block is not outer:
        block = block.parent
    return block is outer


def _where_left(block: Block) -> Block | None:
    """Return where code is whose context names `block`, which was left elsewhere.

    The task that has opened it goes on where it was before. Those that were started inside of it
    stay inside.
    """
    found: Block | None = block
    while found is not None and found.left:
        opener = None if found.opener is None else found.opener()
        if opener is None or opener is not bridge.current_task():
            return found
        found = found.parent
    return found


def find_place(key: Key, *, may_wait: bool = True) -> None:
    """Let code that is called from a generator be in the block of `key` which that carries.

    It may wait for the next step of the task, unless `may_wait` is False. Raises
    `TransactionManagementError` where the block has ended without the generator, or another
    transaction is open.
    """
    blocks = _blocks.get()
    here = blocks if type(blocks) is _Here else None
    detached = None if here is None else here.detached
    block = generators.below(key, detached)
    if block is None:
        if here is not None and here.adopted is not None and here.adopted.key == key:
            task = None if here.task is None else here.task()
            if task is not None and task is bridge.current_task():
                _blocks.set(here.before)  # the step of the generator is over
        elif may_wait and (named := blocks.get(key)) and named.may_be_left_with_step():
            # What was thrown into the task lives as long as its step, and the generators that it
            # has left by it do.
            bridge.let_step_end()
        return
    current = blocks.get(key) or _test_blocks.get(key)
    if current is not None and current.left:
        current = _where_left(current)
    if _is_within(current, block) and not block.ended:
        return
    block.notice_end_of_opener()
    if block.ended or block.reason is not None:
        check_not_ended(block)
    if current is not None and not current.ended and not _is_within(block, current):
        raise TransactionManagementError(
            f"{_name_of_task()} is in a transaction of its own, and makes a step of a generator "
            f"that has one open too, begun by {block.owner}: its statements cannot be part of "
            "both. Let one task make all the steps, or step out by 'pgbackend.detached()'"
        )
    before = here.before if here is not None and here.adopted is not None else blocks
    adopting = bridge.current_task()
    _blocks.set(
        _Here(
            {**blocks, key: block},
            adopted=block,
            before=before,
            detached=detached,
            task=None if adopting is None else weakref.ref(adopting),
        )
    )


def settle() -> None:
    """Let the context of the running code name the blocks that it is in, for who inherits it."""
    blocks = _blocks.get()
    for key, block in blocks.items():
        if block.left and (now := _where_left(block)) is not block:
            _blocks.set(_with_block(blocks, key, now))
            return settle()
    for key in generators.keys() if _carried else ():
        with suppress(TransactionManagementError):  # its statements will meet that
            find_place(key, may_wait=False)  # who starts a task does not expect to wait
    return None


def state_in_turn(wrapper: Any) -> tuple[State, Session | None]:
    """`state_and_session()`, when it is the turn of the running code."""
    here = _running()
    if type(here) is Portal and _get_running_loop() is not None:
        if _carried:
            find_place(wrapper._key)
        found = find(here, wrapper)
        block = found.blocks.get(id(wrapper.settings_dict)) if found.blocks else None
        if block is not None:
            if block.transaction.innermost is block and not block.left:
                return found.state, found.session
        elif not _test_blocks and wrapper._own.transaction is None:
            return found.state, found.session  # nobody takes turns
    take_turn(wrapper)
    return state_and_session(wrapper)


def enter_block(wrapper: Any, block: Block | None) -> None:
    """Make `block` the one that the running code, and tasks that it starts, are in; or none."""
    blocks, key = _blocks.get(), id(wrapper.settings_dict)
    if type(blocks) is _Here or len(blocks) > (key in blocks):
        blocks = _with_block(blocks, key, block)
    else:  # no other database has a block here
        blocks = {} if block is None else {key: block}
    _blocks.set(blocks)
    is_own = block is not None and block.transaction.state is wrapper._own
    # Code that finds this very mapping in its context is in a block of the wrapper's own.
    wrapper.__dict__["_own_blocks"] = blocks if is_own else None


def _with_block(before: Mapping[Key, Block], key: Key, block: Block | None) -> Mapping[Key, Block]:
    """Return what a context names that has named `before`, and now names `block` for `key`."""
    if block is not None:
        blocks = {**before, key: block}
    else:
        blocks = {**before}
        blocks.pop(key, None)
    return before.replaced(blocks, key) if type(before) is _Here else blocks


@contextmanager
def inside(wrapper: Any, block: Block) -> Iterator[None]:
    """Let the running code be in `block` for a while, wherever it is."""
    before = _blocks.get()
    _settle_before_tasks()
    enter_block(wrapper, block)
    try:
        yield
    finally:
        _blocks.set(before)
        look_again()


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
        enter_block(wrapper, None)


def join_in_tests(wrapper: Any, block: Block | None) -> None:
    """Let async contexts that are in no transaction take part in `block` (None: no longer)."""
    if block is None:
        _test_blocks.pop(wrapper._key, None)
    else:
        _test_blocks[wrapper._key] = block
    look_again()


@contextmanager
def in_tests() -> Iterator[None]:
    """Name the transactions of tests in the context, for a thread that inherits it.

    Afterwards the context names none of them: a task may live longer than the test.
    """
    before = named = _blocks.get()
    for key, block in _test_blocks.items():
        if key not in before:
            named = _with_block(named, key, block)
    _blocks.set(named)
    try:
        yield
    finally:
        blocks = _blocks.get()  # asgiref hands the context of the thread back
        for key in named.keys() - before.keys():
            if blocks.get(key) is named[key]:
                blocks = _with_block(blocks, key, None)
        _blocks.set(blocks)


def is_of_test(wrapper: Any) -> bool:
    """Whether the running code is in a transaction of a test."""
    block = _test_blocks.get(wrapper._key)
    return block is not None and current_state(wrapper) is block.transaction.state


def has_joined_test(wrapper: Any) -> bool:
    """Whether the running code is in a transaction of a test that another wrapper has opened."""
    return is_of_test(wrapper) and current_state(wrapper) is not wrapper._own


@after_fork
def _forget_transactions() -> None:
    """Leave the transactions of the parent's loops, and what its tasks hold."""
    blocks = _blocks.get()
    _blocks.set({key: one for key, one in blocks.items() if not one.transaction.state.pooled})
    _sessions.set(None)


@contextmanager
def no_blocks(keys: set[Key] | None, frame: FrameType | None) -> Iterator[None]:
    """Step out of the transactions of `keys` (None: of all), for a `with` in `frame`."""
    before = _blocks.get()
    kept = {key: block for key, block in before.items() if keys is not None and key not in keys}
    detached = _Detachment(frame)
    _blocks.set(_Here(kept, before=before, detached=detached))
    if frame is not None and generators.carries(frame):
        generators.carry(frame, detached)
    try:
        yield
    finally:
        generators.drop(frame, detached)
        detached.abandon()


class _Detachment:
    """A block of `detached()`, as a generator carries it."""

    #: It hides blocks from the code that is called from there, and is none itself.
    key = None

    def __init__(self, frame: FrameType | None) -> None:
        #: Code that is called from there is in none of the blocks that frames below it carry.
        self.frame = frame
        self._home = _get_running_loop()

    def is_lost(self) -> bool:
        return self._home is not None and self._home.is_closed()

    def abandon(self) -> None:
        """Step back into what was there before, in the context that is in this place."""
        here = _blocks.get()
        if type(here) is _Here and here.detached is self:
            _blocks.set(here.before)
            look_again()


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
        enter_block(wrapper, None)


def being_prepared(wrapper: Any) -> Any:
    """The connection that `prepared()` has put in the place of the wrapper's, or None."""
    state = current_state(wrapper)
    return state.connection if state.is_new else None
