"""Make the properties through which a wrapper shows the state of the running code.

Django reads and sets `connection.in_atomic_block`, `connection.queries_log` and their like. On our
wrapper each is a property: `state_attribute()` for the names of a `State`, `scope_attribute()` for
those of a `Scope`, `rollback_attribute` for `needs_rollback`. state.py finds the `State` or `Scope`
of the running code.
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
    """Return a property of the wrapper for attribute `name` of the running code's `State`."""
    return property(_getter(name), _setter(name))


# The functions of a property, which the interpreter calls faster than a descriptor's methods. They
# look up the state in the usual cases without a call; `find()` and `current_state()` do the rest.


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
            # Django's `__init__()` sets the initial values, which a new state has anyway. The
            # wrapper may be made inside a transaction, whose state must not be reset.
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
    """Return `needs_rollback` of the running code's block, even while a block is open inside it."""
    if not _get_needs_rollback(wrapper):
        return False
    block = current_block(wrapper)
    return block is None or block.transaction.is_doomed(block)


def _doom(wrapper: Wrapper, value: bool) -> None:
    """Set `needs_rollback` of the running code's block, even while a block is open inside it."""
    if not wrapper._ready:
        return
    block = current_block(wrapper)
    called_from = generators.below(wrapper._key) if carried else None
    if called_from is not None and (called_from.ended or not is_within(block, called_from)):
        return  # a refused statement of the generator must not doom the block of its caller
    if block is None:
        current_state(wrapper).needs_rollback = value
    else:
        block.transaction.doom(block, value)


rollback_attribute = property(_is_doomed, _doom)


def scope_attribute(name: str) -> property:
    """Return a property of the wrapper for attribute `name` of the running code's `Scope`."""

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
