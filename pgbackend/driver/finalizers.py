"""Finalizers that the garbage collector runs: they cannot wait, and errors in them are reported.

Note [Finalizers]
While the garbage collector runs, it keeps lists of objects on the C stack. A switch of greenlets
would move that stack away, and the interpreter would crash. So `Portal.suspend()` refuses to wait
in a finalizer that the collector runs. Like code in a closed portal, such a finalizer can do with a
connection only what needs no wait. If the collector closes the coroutine of a portal, the portal is
unwound when the collection is over. Python 3.15's collector has then closed the coroutine that the
portal waits for, too: it looks into the frames of greenlets.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

from .errors import PortalClosed

#: The identity of the thread in which the garbage collector runs; usually empty. Do not change it.
collecting: list[int] = []

#: Functions to call when the running garbage collection is over; usually empty.
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
    """Raise `PortalClosed` if the caller is a finalizer that the garbage collector runs."""
    if collecting and is_collecting():
        raise PortalClosed(
            "a finalizer that the garbage collector runs cannot wait for the database: close the "
            "generator, or leave the 'with' statement, before the last reference is dropped"
        )


class RaisesWhenFreed:
    """An object to make and drop: its finalizer raises `error`, which `sys.unraisablehook` gets.

    It is for an error of green code that no caller would get. Only the interpreter can make the
    argument of the hook, which it does for an error that a finalizer raises.
    """

    __slots__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __del__(self) -> None:
        try:
            raise self.error
        finally:
            del self  # or the error's traceback keeps it, by this frame
