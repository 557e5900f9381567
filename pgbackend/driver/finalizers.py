"""Finalizers that the garbage collector runs: they cannot wait, and errors in them are reported.

Note [Finalizers]
The garbage collector keeps lists of objects on the C stack, which a switch of greenlets would move
away under its hands: the interpreter crashes. So `Portal.suspend()` refuses to wait in a finalizer
that the collector runs. Such a finalizer can do to a connection what code in a closed portal can
do: use synchronous means. A portal whose coroutine the collector closes is unwound when the
collection is over.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

from .errors import PortalClosed

#: The thread in which a collection runs; empty at most times. To be read only.
collecting: list[int] = []

#: Functions to be called when the running collection is over; usually empty.
after_collection: list[Callable[[], None]] = []


def _note_collection(phase: str, info: object) -> None:
    if phase == "start":
        collecting[:] = [threading.get_ident()]
    else:
        collecting.clear()
        while after_collection:
            after_collection.pop()()


gc.callbacks.append(_note_collection)


def is_collecting() -> bool:
    """Return whether the caller is a finalizer that the garbage collector runs."""
    return threading.get_ident() in collecting


def check_not_collecting() -> None:
    """Raise `PortalClosed` in a finalizer that the garbage collector runs."""
    if collecting and is_collecting():
        raise PortalClosed(
            "a finalizer that the garbage collector runs cannot wait for the database: close the "
            "generator, or leave the block, before the last reference is dropped"
        )


class RaisesWhenFreed:
    """Report an error that no code waits for to `sys.unraisablehook`: as an error of green code.

    CPython's own hook takes an argument of a type of its own, which only the interpreter can make;
    the interpreter makes one for an error that a finalizer raises.
    """

    __slots__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __del__(self) -> None:
        try:
            raise self.error
        finally:
            del self  # which this frame, and so the error's traceback, would keep
