"""Coroutine objects that stand for others: made green at their first step, or begun elsewhere.

They know no greenlets: the bridge gives them the function that drives a portal. They keep the
protocol between asyncio and a coroutine: `send()`, `throw()` and `close()`, and the
``_asyncio_future_blocking`` of a future that a step yields.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any, TypeVar

T = TypeVar("T")


async def as_coroutine(awaitable: Awaitable[T]) -> T:
    """Await `awaitable`, and return its result."""
    return await awaitable


def exception_to_throw(exc: BaseException) -> BaseException | type[BaseException]:
    """Return what to throw into a coroutine for `exc`.

    An exception that is thrown lives for as long as the call does: until the coroutine waits for an
    awaitable, however many statements that takes. A cancellation which has been caught would keep
    its frames, and the generators in these. So the coroutine is given a new one.
    """
    return asyncio.CancelledError if type(exc) is asyncio.CancelledError and not exc.args else exc


class GreenCoroutine(Coroutine[Any, Any, T]):
    """A coroutine object that drives another one in a portal; green tasks are made of these.

    `drive` is `bridge.drive()`. The portal is the caller's if the first step is one of the task
    that drives that portal. This is a class rather than an ``async def``, because a task that is
    cancelled before its first step must close the inner coroutine instead of leaving it "never
    awaited".
    """

    def __init__(
        self, coro: Coroutine[Any, Any, T], drive: Callable[[Coroutine[Any, Any, T]], Any]
    ) -> None:
        self._coro = coro
        self._drive = drive
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
            del args  # the exception, whose traceback knows this frame

    def close(self) -> None:
        (self._driver or self._coro).close()

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
    """The rest of a coroutine whose first step was taken elsewhere, and yielded `waits_for`."""

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
