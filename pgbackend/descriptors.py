"""The names of Django's on a `DatabaseWrapper` that stand for the state of the running code.

Django reads and sets `connection.in_atomic_block`, `connection.queries_log` and their like. On our
wrapper each is a property: `state_attribute()` for the names of a `State`, `scope_attribute()` for
those of a `Scope`, `rollback_attribute` for `needs_rollback`. `state` finds the object.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from . import generators
from .block_context import blocks_here, is_within
from .driver import bridge
from .driver.bridge import Portal
from .generators import carried
from .protocols import Wrapper
from .state import current_block, current_scope, current_state, find, observe

_get_running_loop = asyncio._get_running_loop
_running = bridge.running
_unwinding = bridge.unwinding


def state_attribute(name: str) -> property:
    """Return a property of the wrapper that stands for `name` of the current state."""
    return property(_getter(name), _setter(name))


# Functions of properties, because the interpreter calls these without a detour. They find the usual
# state themselves, without a call; `find()` and `current_state()` know the rest.


def _getter(name: str) -> Callable[[Any], Any]:
    def get(wrapper: Wrapper) -> object:
        if _get_running_loop() is None:
            if not _unwinding:
                blocks = blocks_here()
                if not blocks or blocks is wrapper._own_blocks:
                    return getattr(wrapper._own, name)
        elif type(here := _running()) is Portal:
            found = here.found
            if (
                found is not None
                and found.context is here.gr_context
                and found.wrapper is wrapper
                and found.blocks is blocks_here()
                and found.settings_dict is wrapper.settings_dict
            ):
                return getattr(found.state, name)
        return getattr(current_state(wrapper), name)

    return get


def _setter(name: str) -> Callable[[Any, Any], None]:
    def set_(wrapper: Wrapper, value: object) -> None:
        if not wrapper._ready:
            # `__init__()` sets what the new state and scope have already; and it must not reset
            # those of a transaction that others are in.
            return
        if _get_running_loop() is None:
            if not _unwinding:
                blocks = blocks_here()
                if not blocks or blocks is wrapper._own_blocks:
                    setattr(wrapper._own, name, value)
                    return
        elif type(here := _running()) is Portal:
            setattr(find(here, wrapper).state, name, value)
            return
        setattr(current_state(wrapper), name, value)

    return set_


_get_needs_rollback = _getter("needs_rollback")


def _is_doomed(wrapper: Wrapper) -> bool:
    """Return `needs_rollback` of the running code's block, not of one that a sibling has open."""
    if not _get_needs_rollback(wrapper):
        return False
    block = current_block(wrapper)
    return block is None or block.transaction.is_doomed(block)


def _doom(wrapper: Wrapper, value: bool) -> None:
    """Set `needs_rollback` of the running code's block, not of one that a sibling has open."""
    if not wrapper._ready:
        return
    block = current_block(wrapper)
    called_from = generators.below(wrapper._key) if carried else None
    if called_from is not None and (called_from.ended or not is_within(block, called_from)):
        return  # its code was refused, and whoever makes the step has done nothing wrong
    if block is None:
        current_state(wrapper).needs_rollback = value
    else:
        block.transaction.doom(block, value)


rollback_attribute = property(_is_doomed, _doom)


def scope_attribute(name: str) -> property:
    """Return a property of the wrapper that stands for `name` of the current scope."""

    def get(wrapper: Wrapper) -> object:
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

    def set_(wrapper: Wrapper, value: object) -> None:
        if not wrapper._ready:
            return
        setattr(current_scope(wrapper), name, value)
        if value and name == "force_debug_cursor":
            observe(wrapper)

    return property(get, set_)
