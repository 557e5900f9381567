"""Lets a forked child forget what belongs to its parent: the driver's only fork hook."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TypeVar

logger = logging.getLogger("pgbackend.driver")

_Forget = TypeVar("_Forget", bound=Callable[[], None])
_forgets: list[Callable[[], None]] = []


def after_fork(forget: _Forget) -> _Forget:
    """Register `forget`, which each forked child calls; return `forget` (a decorator).

    Functions that were registered later are called first: so each module forgets before the modules
    that it imports.
    """
    _forgets.insert(0, forget)
    return forget


def _forget_all() -> None:
    for forget in _forgets:
        try:
            forget()
        except Exception:  # whatever one cannot do, the others must not touch what is the parent's
            logger.exception("a forked child could not call %r", forget)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
