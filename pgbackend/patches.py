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
    """Return a function that looks `names` up at each call, and returns a tuple of their values.

    `names` are two or more, as ``owner.name``, with spaces between them; `owners` has the object of
    each owner. All look-ups are one call of C code, to save time.
    """
    return partial(attrgetter(*names.split()), SimpleNamespace(**owners))


def if_unpatched(function: T) -> T | None:
    """Return `function` if it is Django's own, to compare with later; None if it is patched."""
    return function if _is_djangos(function) else None


def unpatched(*functions: object) -> tuple[Any, ...]:
    """Return `functions` if all are Django's own, for later comparisons; else `NO_OTHERS`.

    Compare by ``all(map(is_, ...))``, not ``==``: proxies of tracing tools equal the function that
    they wrap. `NO_OTHERS` is never the same as functions, so the shortcut stays off. A wrapper is
    found out by its globals, which `functools.wraps()` does not copy.
    """
    return functions if all(map(_is_djangos, functions)) else NO_OTHERS


def _is_djangos(function: object) -> bool:
    # A mock has no globals; the proxy of a tracing tool shows those of the function that it wraps.
    if type(function) is not FunctionType:
        return False
    module: str = function.__globals__["__name__"]
    return module.startswith("django.")
