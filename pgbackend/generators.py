"""Find the blocks that generators have open from one step to the next, by the frame of the `with`.

The context tells which transaction code is in. But a generator has no context of its own: each step
runs in the context of the task that makes the step. While a generator is suspended inside an
`atomic` block, the context of another task that steps the generator does not name the block, and
the context of the task that opened it still does, even after a `break`. So the generator "carries"
the block: `carried` lists the block under the frame of the generator, until its `with` ends; and
while any block is listed, each statement checks whether it is called from such a frame (`below()`).

Note [Left by break]
A generator that nothing refers to is closed at once; an async generator is not: its loop starts a
task that closes it later. Until then, the task that has left the generator would stay in the block.
So when the first block is listed, the finalizer that the loop has set (`sys.set_asyncgen_hooks`) is
wrapped in one that calls `abandon()` of the blocks first. Async generators that began earlier know
only the loop's own finalizer: `_unhooked` has them, and weak references call `abandon()` for them.
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
    """A protocol for type checkers: an entry of `carried`, a `Block` or an open `detached()`."""

    @property
    def key(self) -> int | None:
        """Return the key of the block's database; None for a `detached()`."""

    def is_lost(self) -> bool:
        """Return whether the `with` will never end, because its event loop is closed."""

    def abandon(self) -> None:
        """Take the running code out of the block, because its generator is about to be closed."""


#: The open blocks of each generator, the innermost last; usually empty.
carried: dict[FrameType, list[Any]] = {}

#: Async generators that began before their loop's finalizer was wrapped.
_unhooked: weakref.WeakSet[Any] = weakref.WeakSet()
#: For such generators, by frame: weak references that call `_abandon()` when a generator dies.
_told: dict[FrameType, weakref.ref[Any]] = {}


def carries(frame: FrameType) -> bool:
    """Return whether `frame` is that of a generator, sync or async, which can carry a block."""
    return bool(frame.f_code.co_flags & GENERATORS)


def carry(frame: FrameType, block: Carried) -> None:
    """Add `block`, whose `with` is in the generator of `frame`, to `carried`."""
    for each in [each for each, blocks in carried.items() if all(b.is_lost() for b in blocks)]:
        _forget(each)
    carried.setdefault(frame, []).append(block)
    if frame.f_code.co_flags & inspect.CO_ASYNC_GENERATOR:
        _hook_finalizer()
        _watch_unhooked(frame)


def drop(frame: FrameType | None, block: Carried) -> None:
    """Remove `block`, whose `with` ends, from `carried`."""
    if frame is None or (blocks := carried.get(frame)) is None:
        return
    if block in blocks:
        blocks.remove(block)
    if not blocks:
        _forget(frame)


def keys() -> set[int]:
    """Return the keys of the databases that `carried` has blocks of."""
    return {block.key for blocks in carried.values() for block in blocks if block.key is not None}


def _forget(frame: FrameType) -> None:
    carried.pop(frame, None)
    _told.pop(frame, None)


def below(key: int, until: Any = None) -> Any:
    """Return the innermost block of `key` that generators among the running code's callers carry.

    Return None if there is none. Blocks outside `until`, an open `detached()`, do not count.
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
    """A finalizer of async generators that calls `abandon()` of their blocks, then the loop's own.

    `of_loop` is the finalizer that the loop has set.
    """

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
    # A thread has one finalizer at a time; the loop restores the one from before when it stops.
    sys.set_asyncgen_hooks(finalizer=_Finalizer(hooks.finalizer))
    _unhooked.update(_living_generators())


def _living_generators() -> Iterable[Any]:
    known = getattr(asyncio.get_running_loop(), "_asyncgens", None)
    if known is not None:
        return list(known)
    # uvloop does not expose its generators. This runs once for each run of a loop, at most.
    return [each for each in gc.get_objects() if type(each) is AsyncGeneratorType]


def _watch_unhooked(frame: FrameType) -> None:
    for generator in list(_unhooked):
        if generator.ag_frame is frame:
            # Python calls the weak reference's callback before the finalizer.
            _told[frame] = weakref.ref(generator, lambda _: _abandon(frame))
