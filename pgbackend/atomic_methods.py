"""Make the methods with which `hooks` replaces those of Django's `Atomic`.

With them a block takes its turn among the tasks that share its transaction (see atomic_blocks.py),
`async with atomic()` works, and `atomic` decorates coroutine functions. For databases of other
engines they call Django's methods.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from asgiref.sync import iscoroutinefunction
from django.db import transaction

from . import atomic_blocks
from .conf import wrapper_is_ours
from .driver import bridge
from .driver.cancellation import postpone_delivery
from .protocols import Atomic


def make_enter(enter: Callable[..., None]) -> Callable[..., None]:
    """Return an `Atomic.__enter__()` that waits for the running code's turn, then calls `enter`.

    `enter` is Django's own method. See `atomic_blocks.enter()`.
    """

    @functools.wraps(enter)
    def __enter__(self: Atomic) -> None:
        connection = transaction.get_connection(self.using)
        if wrapper_is_ours(connection):
            atomic_blocks.enter(connection, self, enter)
        else:
            atomic_blocks.async_with.frame = None
            enter(self)

    return __enter__


def make_exit(leave: Callable[..., None]) -> Callable[..., None]:
    """Return an `Atomic.__exit__()` that waits for the running code's turn, then calls `leave`.

    `leave` is Django's own method. See `atomic_blocks.leave()`.
    """

    @functools.wraps(leave)
    def __exit__(self: Atomic, *exc_info: Any) -> None:
        connection = transaction.get_connection(self.using)
        if not wrapper_is_ours(connection):
            atomic_blocks.async_with.frame = None
            leave(self, *exc_info)
            return
        # No cancellation is raised during GeneratorExit: code that drops a generator could not
        # receive it.
        with postpone_delivery(deliver=exc_info[0] is not GeneratorExit):
            atomic_blocks.leave(connection, self, leave, exc_info)

    return __exit__


def make_aenter(nothing: None) -> Callable[..., Any]:
    """Return an `Atomic.__aenter__()` that calls `__enter__()` in a portal, for `async with`.

    Django has no such method, so `nothing`, the method that is replaced, is None.
    """

    async def __aenter__(self: transaction.Atomic) -> None:
        atomic_blocks.async_with.frame = sys._getframe(1)
        await bridge.run(self.__enter__)

    return __aenter__


def make_aexit(nothing: None) -> Callable[..., Any]:
    """Return an `Atomic.__aexit__()` that calls `__exit__()` in a portal, for `async with`.

    Django has no such method, so `nothing`, the method that is replaced, is None.
    """

    async def __aexit__(self: transaction.Atomic, *exc_info: Any) -> None:
        atomic_blocks.async_with.frame = sys._getframe(1)
        await bridge.run(self.__exit__, *exc_info)

    return __aexit__


def make_call(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return an `Atomic.__call__()` that also decorates coroutine functions; `call` is Django's."""

    @functools.wraps(call)
    def __call__(self: Any, func: Callable[..., Any]) -> Callable[..., Any]:
        if not iscoroutinefunction(func):
            decorated: Callable[..., Any] = call(self, func)
            return decorated

        @functools.wraps(func)
        async def inner(*args: object, **kwargs: object) -> object:
            async with self._recreate_cm():
                return await func(*args, **kwargs)

        return inner

    return __call__
