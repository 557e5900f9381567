"""Opens and commits an outermost `atomic` block in one step each: the shortcut `blocks`.

Most blocks begin while nothing is open, and end without an error. For that, `Atomic` uses some
twenty names of the wrapper, each a descriptor that looks up the state of the running code. In green
code this shortcut works on that state directly, if no code could tell the difference
(`_has_djangos_ends()`). All other blocks are left to Django's `Atomic`: `pgbackend.atomic_blocks`
has that plain way, and the seam.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from operator import attrgetter, is_
from types import FrameType
from typing import Any

from django.db import DatabaseError, Error
from django.db.backends.postgresql.base import DatabaseWrapper as PostgresDatabaseWrapper
from django.db.transaction import Atomic

from pgbackend import atomic_blocks, conf, state
from pgbackend.atomic_blocks import end_block
from pgbackend.driver import bridge
from pgbackend.driver.bridge import Portal
from pgbackend.generators import carried
from pgbackend.patches import NO_OTHERS, unpatched
from pgbackend.sessions import Scope, Session, State
from pgbackend.state import named_sessions
from pgbackend.transactions import Block
from pgbackend.wrapper.cursors import Cursors

_get_running_loop = asyncio._get_running_loop
_running = bridge.running
_sessions_here = named_sessions.get

#: The methods that `Atomic` calls on a wrapper, and the methods that these call.
_CALLED = (
    *("_commit", "_set_autocommit", "commit", "get_autocommit", "set_autocommit"),
    *("validate_no_atomic_block", "validate_thread_sharing"),
)
_NAMES = frozenset(_CALLED)
_called_on: Callable[[type[Any]], tuple[Any, ...]] = attrgetter(*_CALLED)
#: The same methods of Django's wrapper class, and (set by `install()`) of the engine's.
_DJANGOS = unpatched(*_called_on(PostgresDatabaseWrapper))
_DJANGOS_ATOMIC = unpatched(Atomic.__enter__, Atomic.__exit__)
_engines = NO_OTHERS


def install() -> None:
    """Plug `open_at_once()` and `commit_at_once()` into the seam in `atomic_blocks`."""
    global _engines  # noqa: PLW0603 - set here, after the shortcut `cursors` has replaced methods
    _engines = _called_on(Cursors)
    atomic_blocks.open_at_once = open_at_once
    atomic_blocks.commit_at_once = commit_at_once


def open_at_once(here: Portal, wrapper: Any, atomic: Any) -> Block | None:
    """Open an outermost block, and return it; return None if Django must open the block."""
    found = state.find(here, wrapper)
    current, session = found.state, found.session
    if (
        session is not None
        and current is session.state  # not a transaction, in which others may have the turn
        and current.autocommit
        and _has_djangos_ends(wrapper, session.scope)
    ):
        return _open_outermost(wrapper, atomic, current)
    return None


def commit_at_once(wrapper: Any, atomic: Any, frame: FrameType, block: Block | None) -> bool:
    """Commit `block` and return True; send nothing and return False if Django must end it."""
    here = _running()
    if (
        block is not None
        and block.atomic is atomic
        and block.frame is frame
        and block.parent is None
        and block.transaction.innermost is block
        and type(here) is Portal
        and not here.closing
        and _state_at_end(block.transaction.state) == _TO_BE_COMMITTED
        and wrapper._thread_ident == threading.get_ident()
        and frame not in carried
        and (session := _session_of_opener(block)) is not None
        and _has_djangos_ends(wrapper, session.scope)
        # From here on no other task may send a statement: it would come after the COMMIT.
        and (block_of_end := block.transaction.push(block)) is not None
    ):
        _commit_outermost(wrapper, block, block_of_end, session)
        return True
    return False


_state_at_end = attrgetter(
    *("pooled", "in_atomic_block", "commit_on_exit", "needs_rollback", "closed_in_transaction"),
    "savepoint_ids",
)
_TO_BE_COMMITTED: tuple[Any, ...] = (True, True, True, False, False, [])


def _session_of_opener(block: Block) -> Session | None:
    """Return the session of `block`'s database if the running task opened `block`; else None."""
    sessions = _sessions_here()
    if sessions is None or sessions is not block.sessions or _get_running_loop() is None:
        return None
    if not sessions.belong_to(asyncio.current_task()):
        return None
    return sessions.by_key.get(id(block.transaction.settings_dict))


def _has_djangos_ends(wrapper: Any, scope: Scope) -> bool:
    """Return True if no method that begins or ends a block is patched, and nothing is logged."""
    if (
        scope.force_debug_cursor
        or not all(map(is_, _called_on(type(wrapper)), _engines))
        or not wrapper.__dict__.keys().isdisjoint(_NAMES)
        or not all(map(is_, _called_on(PostgresDatabaseWrapper), _DJANGOS))
        or _DJANGOS_ATOMIC is NO_OTHERS
    ):
        return False
    return not conf.is_debugging()


def _open_outermost(wrapper: Any, atomic: Any, current: State) -> Block | None:
    """Begin a transaction, and return its outermost block, which is that of `atomic`."""
    current.commit_on_exit = True
    current.needs_rollback = False
    begun = wrapper.begin_pooled(current)
    begun.in_atomic_block = True
    begun.atomic_blocks.append(atomic)
    innermost: Block | None = begun.transaction.innermost
    return innermost


def _commit_outermost(wrapper: Any, block: Block, block_of_end: Block, session: Session) -> None:
    """Commit, and end `block`, as `Atomic.__exit__()` does without an exception.

    `block_of_end` stands for the COMMIT: while it is open, other tasks must wait.
    """
    ending = block.transaction.state
    block.leaving = True
    try:
        ending.atomic_blocks.pop()
        ending.in_atomic_block = False  # in a block, the wrapper refuses to commit and roll back
        try:
            _commit_or_roll_back(wrapper, ending)
        finally:
            # `closed_in_transaction` is not checked: close() only sets it in an atomic block.
            wrapper.end_pooled(ending, block_of_end, session)
    finally:
        if not block.ended:
            end_block(wrapper, block)
        block.leave()


def _commit_or_roll_back(wrapper: Any, ending: State) -> None:
    """Commit; if that fails, roll back, and raise the error of the COMMIT."""
    try:
        wrapper.commit_pooled(ending)
    except DatabaseError:
        try:
            wrapper.rollback()
        except Error:
            wrapper.close()
        raise
