"""Find frames of the running code, across greenlets: its callers, a `with`, the user's own code."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import FrameType

from .driver.stacks import NOT_THE_USERS, frames_below

#: The file of `contextlib`, as its frames have it.
CONTEXTLIB = contextlib.contextmanager.__code__.co_filename


def stack(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield `frame`, a frame of the running code, and then the frames of its callers.

    The stack of a portal's greenlet ends with its first function; the frames of the code that
    switched to the portal follow.
    """
    parents = frames_below()
    while True:
        while frame is not None:
            yield frame
            frame = frame.f_back
        frame = next(parents, None)
        if frame is None:
            return


def of_with(frame: FrameType | None) -> FrameType | None:
    """Return the frame of the `with` statement whose context manager runs in `frame`.

    That is the first frame, from `frame` outwards, which is no method of a context manager
    (`ENDS_OF_WITH`) and no function of `contextlib`; it may be `frame` itself.
    """
    while frame is not None and (
        frame.f_code.co_name in ENDS_OF_WITH or frame.f_code.co_filename == CONTEXTLIB
    ):
        frame = frame.f_back
    return frame


def is_of_context_manager(generator: FrameType) -> bool:
    """Return whether `generator`, a running frame, is run by `contextlib` as a context manager."""
    maker = generator.f_back
    return maker is not None and maker.f_code.co_filename == CONTEXTLIB


ENDS_OF_WITH = frozenset(("__enter__", "__exit__", "__aenter__", "__aexit__"))


def place() -> str | None:
    """Return the ``file:line`` at which the user's own code is; None if no caller is the user's."""
    for frame in stack(sys._getframe(1)):
        if frame.f_globals.get("__name__", "").partition(".")[0] not in NOT_THE_USERS:
            return place_of(frame)
    return None


def place_of(frame: FrameType) -> str:
    """Return the ``file:line`` at which `frame` is."""
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
