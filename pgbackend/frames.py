"""Frames of the running code: where the user's own begins, and what a greenlet hides of it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import FrameType

from .driver import bridge

#: The file of `contextlib`, as its frames have it.
CONTEXTLIB = contextlib.contextmanager.__code__.co_filename
#: Packages whose frames are passed over in the search for the user's own code.
_NOT_THE_USERS = frozenset(("asgiref", "asyncio", "contextlib", "django", "pgbackend"))


def stack(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield `frame`, which is the running code's, and the frames below it.

    A greenlet begins with a stack of its own: what it was started by comes next here.
    """
    parents = bridge.frames_below()
    while True:
        while frame is not None:
            yield frame
            frame = frame.f_back
        frame = next(parents, None)
        if frame is None:
            return


def of_with(frame: FrameType | None) -> FrameType | None:
    """Return the frame whose `with` has called a method that runs in `frame`, or below it.

    Methods of context managers that call each other are passed over, and what `contextlib` has in
    between.
    """
    while frame is not None and (
        frame.f_code.co_name in ENDS_OF_WITH or frame.f_code.co_filename == CONTEXTLIB
    ):
        frame = frame.f_back
    return frame


def is_of_context_manager(generator: FrameType) -> bool:
    """Return whether `generator`, which is running, is what `contextlib` makes a `with` of."""
    maker = generator.f_back
    return maker is not None and maker.f_code.co_filename == CONTEXTLIB


ENDS_OF_WITH = frozenset(("__enter__", "__exit__", "__aenter__", "__aexit__"))


def place() -> str | None:
    """Return where the user's own code stands, as ``file:line``; None if there is none."""
    for frame in stack(sys._getframe(1)):
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _NOT_THE_USERS:
            return place_of(frame)
    return None


def place_of(frame: FrameType) -> str:
    """Return where `frame` stands, as ``file:line``."""
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
