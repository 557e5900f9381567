"""Objects that wrap a coroutine: to run it in a portal, or to run the rest of one that has begun.

These classes know no greenlets: the bridge passes the function that drives a portal. They follow
the protocol between asyncio and a coroutine: `send()`, `throw()` and `close()`, and the flag
``_asyncio_future_blocking`` of a future that a step yields.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any, TypeVar

T = TypeVar("T")


async def as_coroutine(awaitable: Awaitable[T]) -> T:
    """Wrap `awaitable` in a coroutine, which returns the result."""
    return await awaitable


def exception_to_throw(exc: BaseException) -> BaseException | type[BaseException]:
    """Return what to throw into a coroutine: for a cancellation its class, else `exc` itself.

    The call of `throw()` keeps its argument alive until the coroutine next waits for an awaitable,
    even if the coroutine has caught it long before. The traceback of a cancellation would keep
    frames alive as long, and the generators in them.
    """
    return asyncio.CancelledError if type(exc) is asyncio.CancelledError and not exc.args else exc


#: A seam: is given the `drive` of each new `GreenCoroutine`, and returns the one to use. None: the
#: given one is used.
around_drive: Callable[[Callable[[Any], Any]], Callable[[Any], Any]] | None = None


class GreenCoroutine(Coroutine[Any, Any, T]):
    """A coroutine object that drives another one in a portal; green tasks are made of these.

    `drive` is `bridge.drive()`: it takes no new portal if the task that takes the first step has
    one already. This is a class rather than an ``async def``, because a task that is cancelled
    before its first step must close the inner coroutine instead of leaving it "never awaited".
    """

    def __init__(
        self, coro: Coroutine[Any, Any, T], drive: Callable[[Coroutine[Any, Any, T]], Any]
    ) -> None:
        self._coro = coro
        self._drive = drive if around_drive is None else around_drive(drive)
        self._driver: Any = None
        self.__name__ = getattr(coro, "__name__", type(coro).__name__)
        self.__qualname__ = getattr(coro, "__qualname__", type(coro).__qualname__)

    def __repr__(self) -> str:
        return f"<green {self._coro!r}>"

    def send(self, value: object) -> object:
        if self._driver is None:
            self._driver = self._drive(self._coro)
        return self._driver.send(value)

    def throw(self, *args: Any) -> object:
        try:
            return (self._driver or self._coro).throw(*args)
        finally:
            del args  # the traceback of the exception refers to this frame

    def close(self) -> None:
        (self._driver or self._coro).close()

    def inner_coroutine(self) -> object:
        """Return the coroutine or generator that the next step continues."""
        return self._driver or self._coro

    def __await__(self) -> Generator[Any, Any, T]:
        return self

    def __iter__(self) -> GreenCoroutine[T]:
        return self

    def __next__(self) -> object:
        return self.send(None)

    # Asyncio and debuggers look for these attributes on a coroutine.
    @property
    def cr_frame(self) -> object:
        return getattr(self._coro, "cr_frame", None)

    @property
    def cr_running(self) -> bool:
        return bool(getattr(self._coro, "cr_running", False))

    @property
    def cr_code(self) -> object:
        return getattr(self._coro, "cr_code", None)

    @property
    def cr_await(self) -> object:
        return getattr(self._coro, "cr_await", None)


class Resumed:
    """An awaitable that runs the rest of `coro`, whose first step has yielded `waits_for`."""

    def __init__(
        self, coro: Coroutine[Any, Any, Any], waits_for: asyncio.Future[Any] | None
    ) -> None:
        self.coro = coro
        self.waits_for = waits_for

    def __await__(self) -> Generator[Any, Any, Any]:
        if self.waits_for is not None:
            self.waits_for._asyncio_future_blocking = True  # noqa: SLF001
        waits_for = self.waits_for
        try:
            while True:
                try:
                    value = yield waits_for
                except BaseException as exc:
                    waits_for = self.coro.throw(exc)
                else:
                    waits_for = self.coro.send(value)
        except StopIteration as stop:
            return stop.value


async def resume(coro: Coroutine[Any, Any, T], waits_for: asyncio.Future[Any] | None) -> T:
    """Run the rest of `coro`, whose first step was taken before and yielded `waits_for`."""
    result: T = await Resumed(coro, waits_for)
    return result


def name_of(task: asyncio.Task[Any]) -> str:
    """Return the name of `task` for messages; if it has none, the name of its function."""
    name = task.get_name()
    if name == "None":  # some releases of Python 3.13 give it to tasks of a factory
        name = getattr(task.get_coro(), "__qualname__", name)
    return name
