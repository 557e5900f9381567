"""Look up the state of the running code: its transaction's, its session's, or the wrapper's own.

Django keeps the state of a connection on its `DatabaseWrapper`. Under an event loop, tasks may
share one wrapper object, or not, depending on which of them used it first; so the wrapper holds
nothing of a running query. The names that Django uses (`connection`, `in_atomic_block`, …) are
descriptors (descriptors.py) that look up, in this order:

1. the transaction in whose `Block` the running code is (tasks that are started inside the block
   inherit it, and so do threads that asgiref starts from there);
2. in async code: a transaction that a test has opened (Note [Transactions of tests] in
   block_context.py), else the `Session` of the running task;
3. in sync code: the wrapper's own `State`, as in Django.

Note [Looking up]
Django reads these names some thirty times for a statement. Two quick checks find out that the code
is synchronous and in no transaction: then the state is the wrapper's own. Green code caches the
result of a lookup on its portal (`Found`), until the portal's next step, for one context, wrapper
and mapping of blocks: within a step and a context the task stays the same, and code that changes
anything else calls `look_again()`.

Note [Lent wrappers]
Synchronous code that calls `async_to_sync()` waits for a loop in another thread, where Django would
make new wrapper objects. On Django's own backend the ORM runs in the waiting thread, and so sees
everything that was set on that thread's wrapper: an attribute, a patched method, the log of its
queries. So the wrapper of the waiting thread is lent to the loop. Code on the loop does not use the
connection of the thread, nor a transaction that the context does not name: the loop's tasks have
sessions of their own.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from . import conf
from .block_context import (
    blocks_here,
    enter_block,
    find_place,
    is_of_call,
    test_blocks,
    where_left,
)
from .driver import bridge
from .driver.bridge import Portal
from .driver.connection import Connection
from .driver.forks import after_fork
from .generators import carried
from .protocols import Wrapper
from .sessions import Key, Scope, Session, Sessions, State, pinned_sessions
from .transactions import Block, begin

# Functions that run for each statement repeat the code of `bridge.green()`: a call costs too much.
_get_running_loop = asyncio._get_running_loop
_running = bridge.running
_unwinding = bridge.unwinding

#: The sessions of the running task, or of the task whose context it has inherited.
named_sessions: contextvars.ContextVar[Sessions | None] = contextvars.ContextVar(
    "pgbackend.sessions", default=None
)
#: The scopes of the code that started the running task, by database: the task's scopes copy these.
_observers: contextvars.ContextVar[Mapping[Key, Scope]] = contextvars.ContextVar(
    "pgbackend.observers",
    default={},  # noqa: B039
)
#: The wrappers of the thread that waits for the running code, by alias.
_lent: contextvars.ContextVar[Mapping[str, Wrapper]] = contextvars.ContextVar(
    "pgbackend.lent",
    default={},  # noqa: B039
)

#: `context_here()` returns a copy of the running code's context, for calls that the loop makes
#: later; `no_context()` returns an empty context.
context_here = contextvars.copy_context
no_context = contextvars.Context


def in_async_context() -> bool:
    """Return whether the running code must not block its thread, because a loop runs there.

    With `DJANGO_ALLOW_ASYNC_UNSAFE`, return True only in portals.
    """
    if bridge.current() is not None:
        return True
    return _get_running_loop() is not None and not conf.allows_async_unsafe()


# --- Blocks ---------------------------------------------------------------------------------------


def current_block(wrapper: Wrapper) -> Block | None:
    """Return the block that the running code is in, even one that has ended; None if in none."""
    blocks = blocks_here()
    if blocks and (block := blocks.get(id(wrapper.settings_dict))) is not None:
        if not block.left:
            return None if block.ended and _is_stale_in_thread(block) else block
        if (block := where_left(block)) is not None:
            return None if block.ended and _is_stale_in_thread(block) else block
    if test_blocks and wrapper._key in test_blocks and in_async_context():
        return test_blocks[wrapper._key]
    own: State = wrapper._own
    if own.transaction is None or (wrapper.lent and is_borrowed(wrapper)):
        return None
    return own.transaction.innermost


def named_block(wrapper: Wrapper) -> Block | None:
    """Return the block that the context names, if it is open, or if its opener has left it.

    Else (the context names none, or one that other code has ended inside its `with`) return
    `current_block()`. For code that ends a block: `current_block()` skips blocks that were left.
    """
    blocks = blocks_here()
    block = blocks.get(id(wrapper.settings_dict)) if blocks else None
    if block is not None and (block.left or not block.ended):
        return block
    return current_block(wrapper)


def check_not_ended(wrapper: Wrapper) -> None:
    """Raise `TransactionManagementError` if other code has ended the running code's block."""
    if (block := current_block(wrapper)) is not None and block.ended:
        block.check_not_ended()


def has_outlived_block(wrapper: Any) -> bool:
    """Return whether other code has ended the block that the running code is in."""
    block = current_block(wrapper)
    return block is not None and block.ended


def _is_stale_in_thread(block: Block) -> bool:
    """Return whether the running code is sync, and must ignore `block` because `block` has ended.

    In Django, sync code does not depend on contexts; here, a test runner may run it in a context
    that was copied inside of `block`. Returns False in a function that asgiref called in a thread
    while `block` was open: its statements are refused after the end, as those of a task are.
    """
    return block.ended and not in_async_context() and not is_of_call(block)


def take_turn(wrapper: Wrapper) -> None:
    """Wait until the running code may send a statement. See Note [Turns] in transactions.py."""
    if carried:
        find_place(wrapper._key)
    if not blocks_here() and not test_blocks and wrapper._own.transaction is None:
        return  # in no block: the usual case, without a call of `current_block()`
    block = current_block(wrapper)
    while block is not None and block.transaction.innermost is not block:
        block.transaction.take_turn(block)
        block = current_block(wrapper)


def state_in_turn(wrapper: Wrapper) -> tuple[State, Session | None]:
    """Wait for the turn of the running code; return `state_and_session()`."""
    here = _running()
    if type(here) is Portal and _get_running_loop() is not None:
        if carried:
            find_place(wrapper._key)
        found = find(here, wrapper)
        block = found.blocks.get(id(wrapper.settings_dict)) if found.blocks else None
        if block is not None:
            if block.transaction.innermost is block and not block.left:
                return found.state, found.session
        elif not test_blocks and wrapper._own.transaction is None:
            return found.state, found.session  # no transaction, so no turns
    take_turn(wrapper)
    return state_and_session(wrapper)


# --- States ---------------------------------------------------------------------------------------


class Found:
    """The result of a lookup for one wrapper, cached on a portal. See Note [Looking up]."""

    # fmt: off
    __slots__ = (
        "blocks", "context", "scope", "session", "sessions", "settings_dict", "state", "wrapper",
    )
    # fmt: on

    def __init__(
        self,
        context: contextvars.Context | None,
        wrapper: Wrapper,
        blocks: Mapping[Key, Block],
        sessions: Sessions,
    ) -> None:
        #: The portal's context; the first step of an eager task runs in another: see bridge.py.
        self.context = context
        self.wrapper = wrapper
        self.settings_dict = wrapper.settings_dict
        self.blocks = blocks
        self.sessions = sessions
        own: State = wrapper._own
        #: None if the wrapper has a connection of its own.
        self.session: Session | None = None
        self.scope: Scope = wrapper._own_scope
        if wrapper._uses_pool:
            self.session = session = _session_of(sessions, wrapper)
            self.scope = session.scope
            if not blocks and not test_blocks and own.connection is own.transaction is None:
                self.state = session.state  # the usual case, without a call of `_look_up()`
                return
        self.state = _look_up(wrapper, blocks, self.session)
        if self.state is own:
            sessions.uses_own = True


def find(here: bridge.Portal, wrapper: Wrapper) -> Found:
    """Return the lookup for `wrapper` that portal `here` has cached; if none is valid, make one.

    See Note [Looking up].
    """
    found: Found | None = here.found
    blocks = blocks_here()
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


def current_state(wrapper: Wrapper) -> State:
    """Return the running code's `State`, whose values the attributes of `wrapper` show."""
    if _get_running_loop() is not None:
        if type(here := _running()) is Portal:
            return find(here, wrapper).state
    elif not _unwinding:
        blocks = blocks_here()
        if not blocks or blocks is wrapper._own_blocks:
            own: State = wrapper._own
            return own
    return _look_up(wrapper, blocks_here(), None)


def state_and_session(wrapper: Wrapper) -> tuple[State, Session | None]:
    """Return both `current_state()` and `async_session()`."""
    here = _running()
    if type(here) is Portal and _get_running_loop() is not None:
        found = find(here, wrapper)
        return found.state, found.session
    return current_state(wrapper), async_session(wrapper)


def _look_up(wrapper: Wrapper, blocks: Mapping[Key, Block], known: Session | None) -> State:
    """Return the state of the running code, whose context names `blocks`.

    `known` is the session of the running task, if the caller has it.
    """
    if blocks:
        block = blocks.get(id(wrapper.settings_dict))
        if block is not None and block.left:
            block = where_left(block)
        if block is not None and not (block.ended and _is_stale_in_thread(block)):
            return block.transaction.state
    own: State = wrapper._own
    in_portal = bridge.current() is not None
    if _get_running_loop() is None:
        if not in_portal:
            return own
        # The portal unwinds after its loop has ended, and must not use the thread's connection.
    elif not (wrapper.lent and is_borrowed(wrapper)) and (
        own.transaction is not None
        or (not in_portal and conf.allows_async_unsafe())
        # Another thread's wrapper, which shares its connection with this thread.
        or (own.connection is not None and wrapper._thread_ident != threading.get_ident())
    ):
        return own
    if not wrapper._uses_pool:
        return own
    if test_blocks and wrapper._key in test_blocks:
        return test_blocks[wrapper._key].transaction.state
    return (known or session(wrapper)).state


def plain_state(wrapper: Wrapper) -> State | None:
    """Return the wrapper's own state if the running code is sync and in no block, else None."""
    if _get_running_loop() is None and not blocks_here() and not _unwinding:
        own: State = wrapper._own
        return own
    return None


def is_at_rest() -> bool:
    """Return whether the running code is green, and has left nothing for `request_finished` to do.

    Return False if a connection, a transaction or a `pinned()` may be open, if the query log is on,
    or if it has entries.
    """
    if bridge.green() is None:
        return False
    if blocks_here() or test_blocks or pinned_sessions:
        return False
    observers = _observers.get()
    if observers and any(each.force_debug_cursor for each in observers.values()):
        return False
    sessions = named_sessions.get()
    if sessions is None or not sessions.belong_to(asyncio.current_task()):
        return True
    return sessions.are_at_rest()


def is_of_test(wrapper: Wrapper) -> bool:
    """Return whether the running code is in a test's transaction."""
    block = test_blocks.get(wrapper._key)
    return block is not None and current_state(wrapper) is block.transaction.state


def has_joined_test(wrapper: Wrapper) -> bool:
    """Return whether the running code is in a test's transaction that another wrapper opened."""
    return is_of_test(wrapper) and current_state(wrapper) is not wrapper._own


@contextmanager
def prepared(wrapper: Wrapper, connection: Connection) -> Iterator[None]:
    """Make `connection` the wrapper's connection during this `with`, whose code sets it up.

    The pool has just made `connection`.
    """
    state = State(autocommit=True)
    state.connection = connection
    state.is_new = True
    begin(wrapper, state)
    state.transaction = None  # stay in autocommit: the block only lets the code find the state
    try:
        yield
    finally:
        enter_block(wrapper, None)


def being_prepared(wrapper: Wrapper) -> Connection | None:
    """Return the pool's new connection, if the running code is setting it up, else None.

    That code runs inside `with prepared()`.
    """
    state = current_state(wrapper)
    return state.connection if state.is_new else None


# --- Sessions and scopes --------------------------------------------------------------------------


def task_sessions() -> Sessions:
    """Return the sessions of the running task, made at first use. Call it only in async code."""
    sessions = named_sessions.get()
    task = asyncio.current_task()
    if sessions is None or not sessions.belong_to(task):
        sessions = (task and pinned_sessions.get(task)) or Sessions(task)
        named_sessions.set(sessions)
    return sessions


def wrappers_of_task() -> list[Any] | None:
    """Return the list of wrapper objects made for the running task; the caller may change it.

    Return None if the task has no sessions, or has used a wrapper's own state.
    """
    sessions = named_sessions.get()
    if sessions is None or sessions.uses_own or not sessions.belong_to(asyncio.current_task()):
        return None
    return sessions.wrappers


def leave_to(heir: Sessions, wrapper: Wrapper) -> None:
    """Record that `heir` takes the running task's lease over when the running task ends.

    `heir` are the sessions of the task that has made an iterator, of which the running task makes a
    step. The other task may make later steps, and needs the lease for them. Does nothing if `heir`
    are the running task's own sessions, or if these have no lease.
    """
    sessions = task_sessions()
    if sessions is heir:
        return
    session = sessions.by_key.get(wrapper._key)
    if session is not None and session.state.lease is not None:
        session.state.lease.heir = heir
    for ref in sessions.inherited:
        if (lease := ref()) is not None:
            lease.heir = heir


def session(wrapper: Wrapper) -> Session:
    """Return the running task's session, made at first use. Call it only in async code."""
    return _session_of(task_sessions(), wrapper)


def async_session(wrapper: Wrapper) -> Session | None:
    """Return the running task's session; None in sync code, or if `wrapper` does not use a pool."""
    if _get_running_loop() is None:
        return None
    here = _running()
    if type(here) is Portal:
        return find(here, wrapper).session
    return session(wrapper) if wrapper._uses_pool and in_async_context() else None


def _session_of(sessions: Sessions, wrapper: Wrapper) -> Session:
    """Return the session for `wrapper`'s database, made at first use."""
    try:
        return sessions.by_key[id(wrapper.settings_dict)]
    except KeyError:
        settings_dict = wrapper.settings_dict
        scope = _new_scope(wrapper, _observers.get().get(id(settings_dict)))
        new = Session(sessions, id(settings_dict), scope, settings_dict["AUTOCOMMIT"])
        return sessions.by_key.setdefault(id(settings_dict), new)


def current_scope(wrapper: Wrapper) -> Scope:
    """Return the scope of the running code: the observers of its statements."""
    own: Scope = wrapper._own_scope
    if _get_running_loop() is None:
        return own
    here = _running()
    if type(here) is Portal:
        return find(here, wrapper).scope
    return session(wrapper).scope if wrapper._uses_pool and in_async_context() else own


def _new_scope(wrapper: Wrapper, observer: Scope | None) -> Scope:
    """Return a new scope for a task, with the observers of the code that started the task.

    `observer` is the scope of that code. If it is None, a lent wrapper's own scope takes its place.
    """
    if not wrapper.lent or not is_borrowed(wrapper):
        return Scope(observer, wrapper.queries_limit)
    observer = observer or wrapper._own_scope
    scope = Scope(observer, wrapper.queries_limit)
    if conf.is_debugging():
        scope.log = observer.queries_log
    return scope


def observe(wrapper: Wrapper) -> None:
    """Let the running code's observers see the statements of tasks that it starts from now on."""
    _observers.set({**_observers.get(), wrapper._key: current_scope(wrapper)})


# --- Note [Lent wrappers] -------------------------------------------------------------------------


@contextmanager
def lending(wrappers: Mapping[str, Wrapper]) -> Iterator[None]:
    """Lend this thread's `wrappers`, by alias, to loops that are started during the `with`.

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


def lent(alias: str) -> Wrapper | None:
    """Return the wrapper for `alias` of the thread that waits for the running code, or None."""
    return _lent.get().get(alias)


def is_borrowed(wrapper: Wrapper) -> bool:
    """Return whether `wrapper` is lent to the running code by the thread that waits for it."""
    return (
        wrapper.lent > 0 and wrapper._thread_ident != threading.get_ident() and in_async_context()
    )


@after_fork
def _forget_sessions() -> None:
    """Forget the sessions of the parent process: their leases are the parent's."""
    named_sessions.set(None)
