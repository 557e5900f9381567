"""Telling whether what is passed over is still Django's own: tools and tests patch it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from types import FunctionType, SimpleNamespace
from typing import Any, TypeVar

T = TypeVar("T")

#: In the place of functions to be compared with: no function is one of these.
NO_OTHERS: tuple[Any, ...] = (None,)


def lookup(names: str, **owners: object) -> Callable[[], tuple[Any, ...]]:
    """Return a function that looks `names` (``owner.name``, two at least) up, in one call of C."""
    return partial(attrgetter(*names.split()), SimpleNamespace(**owners))


def if_unpatched(function: T) -> T | None:
    """Return `function`, to be compared with later; None, like no other, if it is not Django's."""
    return function if _is_djangos(function) else None


def unpatched(*functions: object) -> tuple[Any, ...]:
    """Return functions, to be compared with later; `NO_OTHERS` if one is not Django's.

    What wraps a function has globals of its own, whatever it says of itself. Compare by
    ``all(map(is_, ...))``: the proxies of tracing tools equal what they stand for.
    """
    return functions if all(map(_is_djangos, functions)) else NO_OTHERS


def _is_djangos(function: object) -> bool:
    # A mock has no globals. A proxy, as tracing tools make them, has those of what it stands for.
    if type(function) is not FunctionType:
        return False
    module: str = function.__globals__["__name__"]
    return module.startswith("django.")
