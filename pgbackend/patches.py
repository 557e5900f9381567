"""Tells whether a function that the engine bypasses is still Django's own, or has been patched."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from types import FunctionType, SimpleNamespace
from typing import Any, TypeVar

T = TypeVar("T")

#: Stands for the functions to compare with if one of them is patched: no function is None.
NO_OTHERS: tuple[Any, ...] = (None,)


def lookup(names: str, **owners: object) -> Callable[[], tuple[Any, ...]]:
    """Return a function that returns the current values of `names` (``owner.name``, two or more).

    `owners` gives the object of each owner. All look-ups are one call of C code, to save time.
    """
    return partial(attrgetter(*names.split()), SimpleNamespace(**owners))


def if_unpatched(function: T) -> T | None:
    """Return `function`, to compare with later, if it is Django's own; else None."""
    return function if _is_djangos(function) else None


def unpatched(*functions: object) -> tuple[Any, ...]:
    """Return `functions`, to compare with later, if all are Django's own; else `NO_OTHERS`.

    A wrapper is found out by its globals, which `functools.wraps()` does not copy. Compare later by
    ``all(map(is_, ...))``, not ``==``: proxies of tracing tools equal the function that they wrap.
    """
    return functions if all(map(_is_djangos, functions)) else NO_OTHERS


def _is_djangos(function: object) -> bool:
    # A mock has no globals; the proxy of a tracing tool shows those of the function that it wraps.
    if type(function) is not FunctionType:
        return False
    module: str = function.__globals__["__name__"]
    return module.startswith("django.")
