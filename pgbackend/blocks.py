"""The ends of an `atomic` block: whose turn it is, and what is usual in one step.

Around Django's own code, which runs unedited, the block is opened (or its turn awaited), and is
ended; see Note [Turns] in state.py.

Note [Usual blocks]
Most blocks begin where nothing is open, and end without an error. `Atomic` looks some twenty names
of the wrapper up for that, each of which stands for one of the running code's state. Where green
code opens or ends such a block, and nobody could tell the difference (`_has_djangos_ends()`), it
is done on the state itself. All others are Django's, step by step.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from operator import attrgetter
from typing import Any

from django.db import DatabaseError, Error
from django.db.backends.postgresql.base import DatabaseWrapper as PostgresDatabaseWrapper
from django.db.transaction import Atomic

from . import conf, state
from .driver import bridge
from .driver.bridge import Portal
from .patches import djangos
from .state import Block, Scope, Session, State

_get_running_loop = asyncio._get_running_loop
_running = bridge.running

#: What `Atomic` calls on a wrapper, and what that calls.
_CALLED = (
    *("_commit", "_set_autocommit", "commit", "get_autocommit", "set_autocommit"),
    *("validate_no_atomic_block", "validate_thread_sharing"),
)
_NAMES = frozenset(_CALLED)
#: These as a class of wrappers has them; and what they are in Django.
called_on: Callable[[type[Any]], tuple[Any, ...]] = attrgetter(*_CALLED)
_DJANGOS = djangos(*called_on(PostgresDatabaseWrapper))
_DJANGOS_ATOMIC = djangos(Atomic.__enter__, Atomic.__exit__)


def enter(wrapper: Any, atomic: Any, enter_djangos: Callable[[Any], None]) -> None:
    """What `Atomic.__enter__` does, which is `enter_djangos`, in its turn."""
    here = _running()
    if (
        type(here) is Portal
        and _get_running_loop() is not None
        and not atomic._from_testcase  # noqa: SLF001
        and (current := _where_nothing_is_open(here, wrapper)) is not None
    ):
        _open_outermost(wrapper, atomic, current)
        return
    wrapper.check_context("transaction.atomic")
    state.take_turn(wrapper)
    if (current := state.current_state(wrapper)).pooled:
        wrapper.begin_if_due(current)
    parent = state.current_block(wrapper)
    nested = parent is not None and parent.transaction.state.transaction is not None
    if nested:
        assert parent is not None
        block = parent.transaction.push(parent)
        state.enter_block(wrapper, block)
    try:
        enter_djangos(atomic)
    except BaseException:
        if nested:
            block.transaction.pop(block)
            state.leave_block(wrapper, parent)
        raise
    if nested:
        block.transaction.settle(block)
    if atomic._from_testcase:  # noqa: SLF001
        state.join_in_tests(wrapper, state.current_block(wrapper))


def leave(
    wrapper: Any, atomic: Any, leave_djangos: Callable[..., None], exc_info: tuple[Any, ...]
) -> None:
    """What `Atomic.__exit__` does, which is `leave_djangos`, in its turn."""
    block = state.current_block(wrapper)
    refusal = None
    try:
        if block is not None and not block.ended:
            if exc_info[0] is None and (refusal := _wait_to_leave(block)) is not None:
                exc_info = (type(refusal), refusal, refusal.__traceback__)
            if not block.ended:
                session = None if exc_info[0] is not None else _where_most_end(wrapper, block)
                if session is not None:
                    _commit_outermost(wrapper, block, session)
                    return
                _begin_to_end(wrapper, block, failed=exc_info[0] is not None)
        if block is None or not block.claimed:
            leave_djangos(atomic, *exc_info)
        elif exc_info[0] is None:
            state.check_not_ended(block)
    finally:
        if block is not None:
            _end_block(wrapper, block)
        if atomic._from_testcase:  # noqa: SLF001
            state.join_in_tests(wrapper, block.parent if block is not None else None)
    if refusal is not None:
        try:
            raise refusal
        finally:
            del refusal, exc_info  # it knows this frame by its traceback


def _wait_to_leave(block: Block) -> BaseException | None:
    """Wait until nothing is open inside `block`; return why it must be rolled back instead."""
    try:
        block.transaction.take_turn(block)
    except BaseException as exc:
        return exc
    return None


def _begin_to_end(wrapper: Any, block: Block, *, failed: bool) -> None:
    """From here on only the running code sends statements. See Note [Turns] in state.py."""
    if failed:
        block.transaction.claim(block)
    state.enter_block(wrapper, block.transaction.push(block))


def _end_block(wrapper: Any, block: Block) -> None:
    ending = block.transaction.innermost
    if ending is not None and ending.parent is block:
        block.doomed = False
        block.transaction.pop(ending)
        state.enter_block(wrapper, block)
    if block.parent is not None:
        if not block.ended:
            block.transaction.pop(block)
        state.leave_block(wrapper, block.parent)
    elif not block.transaction.state.in_atomic_block and not block.ended:
        # Autocommit was not set again: the connection was closed inside the block, or the end of
        # the block was interrupted. The pool rolls back what is open.
        ended = block.transaction.state
        if ended.commit_on_exit or ended.connection is None:
            state.end(wrapper, ended)
            if ended.lease is not None:
                ended.lease.end()


# --- Usual blocks ---------------------------------------------------------------------------------


def _where_nothing_is_open(here: Portal, wrapper: Any) -> State | None:
    """The state of code that is in no block, nor in a transaction that is managed by hand."""
    found = state.find(here, wrapper)
    current, session = found.state, found.session
    if (
        session is not None
        and current is session.state  # and so nobody else's turn
        and current.autocommit
        and _has_djangos_ends(wrapper, session.scope)
    ):
        return current
    return None


_what_counts = attrgetter(
    *("pooled", "in_atomic_block", "commit_on_exit", "needs_rollback", "closed_in_transaction"),
    "savepoint_ids",
)
_TO_BE_COMMITTED: tuple[Any, ...] = (True, True, True, False, False, [])


def _where_most_end(wrapper: Any, block: Block) -> Session | None:
    """The running task's session if `block`, which is left without an error, is just committed."""
    ending = block.transaction.state
    here = _running()
    if (
        block.parent is None
        and _what_counts(ending) == _TO_BE_COMMITTED
        and type(here) is Portal
        and _get_running_loop() is not None
        and wrapper._thread_ident == threading.get_ident()
    ):
        session = state.find(here, wrapper).session
        if session is not None and _has_djangos_ends(wrapper, session.scope):
            return session
    return None


def _has_djangos_ends(wrapper: Any, scope: Scope) -> bool:
    """Whether nobody observes how a block begins and ends, or has a say in it."""
    return bool(
        not scope.force_debug_cursor
        and called_on(type(wrapper)) == wrapper.block_calls
        and wrapper.__dict__.keys().isdisjoint(_NAMES)
        and called_on(PostgresDatabaseWrapper) == _DJANGOS
        and _DJANGOS_ATOMIC is not None
        and not conf.is_debugging()
    )


def _open_outermost(wrapper: Any, atomic: Any, current: State) -> None:
    current.commit_on_exit = True
    current.needs_rollback = False
    begun = wrapper.begin_pooled(current)
    begun.in_atomic_block = True
    begun.atomic_blocks.append(atomic)


def _commit_outermost(wrapper: Any, block: Block, session: Session) -> None:
    ending = block.transaction.state
    block_of_end = block.transaction.push(block)  # no statement of others goes with the COMMIT
    ending.atomic_blocks.pop()
    ending.in_atomic_block = False  # or nothing might be committed, nor rolled back
    try:
        try:
            wrapper.commit_pooled(ending)
        except DatabaseError:
            try:
                wrapper.rollback()
            except Error:
                wrapper.close()
            raise
    finally:
        # Nobody can have closed it inside the block meanwhile: it is no longer marked as one.
        wrapper.end_pooled(ending, block_of_end, session)
