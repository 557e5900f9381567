"""Lets green code call methods of a wrapper that Django's decorator `async_unsafe` guards.

Django refuses such a method while an event loop runs in the thread, because it would block the
loop. On a wrapper of pgbackend's, green code does not block it.
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
    """Return a `get_running_loop()` that hides the loop from `async_unsafe` in green code.

    It raises `RuntimeError` then, as without a loop: so the guard lets the call through. It does so
    only for methods of pgbackend's wrappers: the guard still works for other engines, and for any
    other decorated function. pgbackend's own methods have another guard (wrapper/guards.py), but
    derived wrappers, mixins and patches may use Django's.
    """

    @functools.wraps(get_running_loop)
    def hooked() -> object:
        here = bridge.current()
        if here is not None and _guards_ours(sys._getframe(1)):
            raise RuntimeError("no event loop that this call would block")
        return get_running_loop()

    return hooked


#: The code object that all functions decorated with `async_unsafe` share: the guard.
_GUARD = async_unsafe(wrapper_is_ours).__code__


def _guards_ours(frame: FrameType) -> bool:
    """Return whether `frame` is a call of the guard, for a method of a wrapper of pgbackend's."""
    if frame.f_code is not _GUARD:
        return False
    names = frame.f_locals
    args = names["args"]
    return wrapper_is_ours(args[0] if args else getattr(names.get("func"), "__self__", None))
