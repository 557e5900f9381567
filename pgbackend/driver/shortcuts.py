"""Shortcuts of the driver: which are on, and whether what they bypass is still psycopg's own.

A shortcut does in fewer steps what psycopg or psycopg_pool does. The plain way stands beside it: it
is taken while the shortcut is switched off, or while a function that it bypasses is patched. Used
alone, the driver has them all on; with Django `pgbackend.fast.registry` sets them, which also lists
what each bypasses.

What replaces a method of psycopg's in a derived class is no shortcut: without `Connection.wait()`,
say, there would be no driver.
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
    """Say which shortcuts are on. They are set before the first connection is made."""

    lease: bool = True
    """A free connection is taken, and given back, without psycopg_pool's coroutines."""
    queue: bool = True
    """Green code waits for a connection without psycopg_pool's coroutines."""
    run: bool = True
    """A statement whose rows are all fetched is run by a cursor that is kept, in fewer steps."""
    begin: bool = True
    """BEGIN is sent in one message with the first statement of a transaction."""
    cursors: bool = True
    """A cursor of a connection of its own is made without psycopg's `cursor()`."""
    blocks: bool = True
    """An idle connection goes back to autocommit without a generator of psycopg's."""
    portals: bool = True
    """A greenlet in which a function has ended is kept for the next one."""


switches = Switches()

#: In the place of functions to be compared with: no function is one of these.
NO_OTHERS: tuple[Any, ...] = (None,)


def looking(
    name: str, names: str, **owners: object
) -> tuple[Callable[[], tuple[Any, ...]], tuple[Any, ...]]:
    """Return a function that looks the state of a shortcut up, and its result if that may be taken.

    It looks for the switch `name` and for the functions `names` (``owner.name``), in one call of C.
    The result is `NO_OTHERS` if one of them is not psycopg's own: somebody has patched it. Compare
    by ``all(map(is_, ...))``: the proxies of tracing tools equal what they stand for.
    """
    namespace = SimpleNamespace(**owners, switches=switches)
    functions = attrgetter("switches", *names.split())(namespace)[1:]
    seen = partial(attrgetter(f"switches.{name}", *names.split()), namespace)
    return seen, ((True, *functions) if all(map(is_psycopgs, functions)) else NO_OTHERS)


def is_psycopgs(function: object) -> bool:
    """Tell whether psycopg has made a function.

    A function that wraps one has globals of its own. A proxy, as tracing tools make them, says that
    it has those of what it stands for: its type tells.
    """
    function = getattr(function, "fget", function)
    if type(function) is not FunctionType:
        return False
    return bool(function.__globals__["__name__"].startswith("psycopg."))
