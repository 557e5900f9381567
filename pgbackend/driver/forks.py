"""Lets a forked child forget what is its parent's: the one hook that the interpreter calls."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

_Forget = TypeVar("_Forget", bound=Callable[[], None])
_forgets: list[Callable[[], None]] = []


def after_fork(forget: _Forget) -> _Forget:
    """Let each forked child call `forget`; the last that is registered comes first.

    So a module forgets before those that it imports.
    """
    _forgets.insert(0, forget)
    return forget


def _forget_all() -> None:
    for forget in _forgets:
        forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
