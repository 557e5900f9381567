"""Provides event loops whose tasks take their steps in an order drawn by a seed.

asyncio steps tasks in the order in which they became ready, so tests see one schedule of the many
that a loaded server sees. A `Shuffled` loop now and then puts a task whose turn comes behind the
others. Other callbacks (transports, timers) keep their order, as asyncio promises.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import random
from collections.abc import Callable
from typing import Any

LoopFactory = Callable[[], asyncio.AbstractEventLoop]

#: The classes of loops, by name.
LOOPS: dict[str, type[Any]] = {"asyncio": asyncio.SelectorEventLoop}
try:
    import uvloop
except ImportError:
    pass
else:
    LOOPS["uvloop"] = uvloop.Loop


#: How often a task that is ready may be put off.
_MOST_DELAYS = 3


class Shuffled:
    """Makes a loop, into which it is mixed, let other tasks go before one that is ready."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._random = random.Random()
        super().__init__(*args, **kwargs)

    def seed(self, seed: object) -> None:
        self._random.seed(repr(seed))

    def call_soon(
        self, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> Any:
        if isinstance(getattr(callback, "__self__", None), asyncio.Task):
            if context is None:  # an empty one is false
                context = contextvars.copy_context()
            return self._step_soon(callback, args, context, 0)
        return super().call_soon(callback, *args, context=context)  # type: ignore[misc]

    def _step_soon(
        self, callback: Any, args: Any, context: contextvars.Context, put_off: int
    ) -> Any:
        step = functools.partial(self._step, callback, args, context, put_off)
        return super().call_soon(step, context=context)  # type: ignore[misc]

    def _step(self, callback: Any, args: Any, context: contextvars.Context, put_off: int) -> None:
        # A step may come later, never earlier: all that asyncio runs before it still comes before.
        if put_off < _MOST_DELAYS and self._random.random() < 0.5:
            self._step_soon(callback, args, context, put_off + 1)
        else:
            callback(*args)


def shuffled(name: str, seed: object) -> LoopFactory:
    """Return a factory of loops of the kind `name` whose tasks are shuffled by `seed`."""
    cls = type(f"Shuffled_{name}", (Shuffled, LOOPS[name]), {})

    def make() -> asyncio.AbstractEventLoop:
        loop = cls()
        loop.seed(seed)
        return loop

    return make
