"""Lets green code call what Django guards by `async_unsafe`.

Django refuses such a method wherever an event loop runs, for it would block the loop. Green, a
wrapper of pgbackend's does not block it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from django.utils.asyncio import async_unsafe

from .conf import wrapper_is_ours
from .driver import bridge


def make_get_running_loop(get_running_loop: Callable[[], Any]) -> Callable[[], Any]:
    """Return a `get_running_loop()` that finds no loop where the guard of a wrapper asks, green.

    pgbackend's own methods have guards of their own (see wrapper/guards.py), but derived wrappers,
    mixins and patches carry Django's. Django's still guards other engines, and all else that it
    is put on.
    """

    @functools.wraps(get_running_loop)
    def hooked() -> object:
        here = bridge.current()
        if here is not None and _guards_ours(sys._getframe(1)):
            raise RuntimeError("no event loop that this call would block")
        return get_running_loop()

    return hooked


#: The code of the function that `async_unsafe` puts in the place of each that it guards.
_GUARD = async_unsafe(wrapper_is_ours).__code__


def _guards_ours(frame: FrameType) -> bool:
    """Return whether `frame` is the guard of a method that is called on pgbackend's wrapper."""
    if frame.f_code is not _GUARD:
        return False
    names = frame.f_locals
    args = names["args"]
    return wrapper_is_ours(args[0] if args else getattr(names.get("func"), "__self__", None))
