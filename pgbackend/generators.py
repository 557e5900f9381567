"""Blocks that a generator carries from one step to the next: found by the frame of their `with`.

Which transaction code is in, its context says. But a generator has no context of its
own: each step runs in the context of whoever makes it. Where a generator stands in the midst of an
`atomic` block, a second task that steps it knows nothing of that block, and the task that left it
by `break` is in the block still. So such a block is listed here under the frame of the generator,
for as long as its `with` has not ended; and as long as anything is listed, statements look whether
they are called from there (`below()`).

Note [Left by break]
A generator that nobody refers to any more is closed at once; an async generator is not: its loop
starts a task that closes it, which is sooner or later. Until then the task that has left it would
go on inside of the block. So the finalizer that the loop has set (`sys.set_asyncgen_hooks`) is
wrapped, when the first block is listed: the block is told first. Generators that have begun before
that know the loop's own finalizer only; they are told apart by `_unhooked`.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import sys
import weakref
from collections.abc import Callable, Iterable
from types import AsyncGeneratorType, FrameType
from typing import Any, Protocol

from . import frames

GENERATORS = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


class Carried(Protocol):
    """A block, as this module knows it: see `transactions.Block`."""

    @property
    def key(self) -> int | None:
        """The database that it is a block of, if it is a block."""

    def is_lost(self) -> bool:
        """Return whether nothing will ever end it, since its loop is closed."""

    def abandon(self) -> None:
        """Be told that the generator which carries it is about to be closed."""


#: The open blocks of each generator, the innermost last; usually empty.
carried: dict[FrameType, list[Any]] = {}

#: Async generators that began before their loop's finalizer was wrapped.
_unhooked: weakref.WeakSet[Any] = weakref.WeakSet()
#: What tells of their end, by their frame.
_told: dict[FrameType, weakref.ref[Any]] = {}


def carries(frame: FrameType) -> bool:
    """Return whether `frame` is that of a generator."""
    return bool(frame.f_code.co_flags & GENERATORS)


def carry(frame: FrameType, block: Carried) -> None:
    """List `block`, whose `with` is in the generator of `frame`."""
    for each in [each for each, blocks in carried.items() if all(b.is_lost() for b in blocks)]:
        _forget(each)
    carried.setdefault(frame, []).append(block)
    if frame.f_code.co_flags & inspect.CO_ASYNC_GENERATOR:
        _hook_finalizer()
        _watch_unhooked(frame)


def drop(frame: FrameType | None, block: Carried) -> None:
    """Take `block` out of the list: its `with` ends."""
    if frame is None or (blocks := carried.get(frame)) is None:
        return
    if block in blocks:
        blocks.remove(block)
    if not blocks:
        _forget(frame)


def keys() -> set[int]:
    """Return the databases that blocks are listed of."""
    return {block.key for blocks in carried.values() for block in blocks if block.key is not None}


def _forget(frame: FrameType) -> None:
    carried.pop(frame, None)
    _told.pop(frame, None)


def below(key: int, until: Any = None) -> Any:
    """Return the innermost listed block of `key` that the running code is called from, or None.

    What lies outside of `until`, which has a frame too, does not count.
    """
    for frame in frames.stack(sys._getframe(1)):
        for block in reversed(carried.get(frame, ())):
            if block is until:
                return None
            if block.key == key:
                return block
        if until is not None and frame is until.frame:
            return None
    return None


# --- Note [Left by break] -----------------------------------------------------------------------


class _Finalizer:
    """The finalizer of async generators that a loop has set, which tells their blocks first."""

    def __init__(self, of_loop: Callable[[Any], Any] | None) -> None:
        self.of_loop = of_loop

    def __call__(self, generator: Any) -> None:
        _abandon(generator.ag_frame)
        if self.of_loop is not None:
            self.of_loop(generator)


def _abandon(frame: FrameType | None) -> None:
    if frame is not None:
        for block in tuple(carried.get(frame, ())):
            block.abandon()


def _hook_finalizer() -> None:
    hooks = sys.get_asyncgen_hooks()
    if isinstance(hooks.finalizer, _Finalizer):
        return
    # A thread has one at a time, which ends with the loop's run.
    sys.set_asyncgen_hooks(finalizer=_Finalizer(hooks.finalizer))
    _unhooked.update(_living_generators())


def _living_generators() -> Iterable[Any]:
    known = getattr(asyncio.get_running_loop(), "_asyncgens", None)
    if known is not None:
        return list(known)
    # uvloop does not show its own. Once for each run of a loop that meets such a block.
    return [each for each in gc.get_objects() if type(each) is AsyncGeneratorType]


def _watch_unhooked(frame: FrameType) -> None:
    for generator in list(_unhooked):
        if generator.ag_frame is frame:
            # It is called before the finalizer is.
            _told[frame] = weakref.ref(generator, lambda _: _abandon(frame))
