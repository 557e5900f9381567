"""Shortcuts of the driver: which are on, and whether what they bypass is still psycopg's own.

A shortcut does in fewer steps what psycopg or psycopg_pool does. The plain way stands beside each
shortcut, and is taken while the shortcut is switched off, or while a function that it bypasses is
patched. Used alone, the driver has all shortcuts on; with Django, `pgbackend.fast.registry` sets
the switches, and lists the functions that each shortcut bypasses.

A method that overrides one of psycopg's in a derived class is no shortcut: without
`Connection.wait()`, for one, there would be no driver.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from types import FunctionType, SimpleNamespace
from typing import Any


@dataclass(slots=True)
class Switches:
    """One switch for each shortcut, to be set before the first connection is made."""

    lease: bool = True
    """A free connection is taken, and given back, without psycopg_pool's coroutines."""
    queue: bool = True
    """Green code waits for a connection without psycopg_pool's coroutines."""
    run: bool = True
    """A statement whose rows are all fetched is run by a cursor that is kept, in fewer steps."""
    begin: bool = True
    """BEGIN is sent in one message with the first statement of a transaction."""
    cursors: bool = True
    """A cursor of a connection that no pool lends is made without psycopg's `cursor()`."""
    blocks: bool = True
    """An idle connection goes back to autocommit without a generator of psycopg's."""
    portals: bool = True
    """A greenlet in which a function has ended is kept for the next one."""


switches = Switches()

#: Stands in for the state of a shortcut that may not be taken: no state that is read matches it.
NO_OTHERS: tuple[Any, ...] = (None,)


def looking(
    name: str, names: str, **owners: object
) -> tuple[Callable[[], tuple[Any, ...]], tuple[Any, ...]]:
    """Return `read, state`: shortcut `name` may be taken while ``all(map(is_, read(), state))``.

    `names` are the functions that the shortcut bypasses, as ``owner.name``, with spaces between
    them; `owners` has the object of each owner. `read()` returns the present values of the switch
    `name` and of these functions, read in one call of C. `state` has the values that allow the
    shortcut: True, and the functions as they are now. If one of these is patched already, `state`
    is `NO_OTHERS`, which matches nothing. Do not compare by ``==``: a tracing tool's proxy equals
    the function that it wraps.
    """
    namespace = SimpleNamespace(**owners, switches=switches)
    functions = attrgetter("switches", *names.split())(namespace)[1:]
    seen = partial(attrgetter(f"switches.{name}", *names.split()), namespace)
    return seen, ((True, *functions) if all(map(is_psycopgs, functions)) else NO_OTHERS)


def is_psycopgs(function: object) -> bool:
    """Return whether `function`, or the getter of a property, is psycopg's own and no patch.

    A wrapper that is a function has the globals of another module. A tracing tool's proxy claims
    to have psycopg's globals, but is no `FunctionType`.
    """
    function = getattr(function, "fget", function)
    if type(function) is not FunctionType:
        return False
    return bool(function.__globals__["__name__"].startswith("psycopg."))
