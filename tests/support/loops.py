"""Event loops whose tasks take their steps in an order drawn by a seed.

asyncio steps tasks in the order in which they became ready, so tests see one schedule of the many
that a loaded server sees. A `Shuffled` loop steps, whenever a task's turn comes, any of those that
are ready. Other callbacks (transports, timers) keep their order, which asyncio promises.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections.abc import Callable
from typing import Any

LoopFactory = Callable[[], asyncio.AbstractEventLoop]

#: Each kind of loop, by name.
LOOPS: dict[str, type[Any]] = {"asyncio": asyncio.SelectorEventLoop}
try:
    import uvloop
except ImportError:
    pass
else:
    LOOPS["uvloop"] = uvloop.Loop


class Shuffled:
    """Mixed into a loop: of the tasks that are ready, any may be stepped next."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._ready_steps: list[tuple[Any, tuple[Any, ...], contextvars.Context]] = []
        self._random = random.Random()
        super().__init__(*args, **kwargs)

    def seed(self, seed: object) -> None:
        self._random.seed(repr(seed))

    def call_soon(
        self, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> Any:
        if not isinstance(getattr(callback, "__self__", None), asyncio.Task):
            return super().call_soon(callback, *args, context=context)  # type: ignore[misc]
        self._ready_steps.append((callback, args, context or contextvars.copy_context()))
        return super().call_soon(self._step_any)  # type: ignore[misc]

    def _step_any(self) -> None:
        at = self._random.randrange(len(self._ready_steps))
        callback, args, context = self._ready_steps.pop(at)
        context.run(callback, *args)


def shuffled(name: str, seed: object) -> LoopFactory:
    """Return a factory of loops of the kind `name` whose tasks are shuffled by `seed`."""
    cls = type(f"Shuffled_{name}", (Shuffled, LOOPS[name]), {})

    def make() -> asyncio.AbstractEventLoop:
        loop = cls()
        loop.seed(seed)
        return loop

    return make
