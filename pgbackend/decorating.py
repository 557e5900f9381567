"""`Decorating`: lets the object of a block (a ``with``) also decorate functions of every kind.

Each call of a decorated function or coroutine function is a block. A generator's steps run in the
context of whoever makes them, so each step of a decorated generator function is a block.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from functools import partial
from typing import Any, TypeVar

from asgiref.sync import iscoroutinefunction

F = TypeVar("F", bound=Callable[..., Any])


class Decorating:
    """A mixin for a context manager; the class that uses it says how a block begins and ends."""

    #: The name that users call, for messages.
    called = "pgbackend.session"

    def begin_call(self) -> Any:
        """Begin a block, and return what `end_call()` needs to end it."""
        raise NotImplementedError

    def end_call(self, begun: Any) -> None:
        """End the block that `begun`, a result of `begin_call()`, stands for."""
        raise NotImplementedError

    def __call__(self, func: F) -> F:
        """Return `func`, wrapped so that each call of it is a block."""
        if isinstance(func, type):
            raise TypeError(
                f"{self.called}() decorates functions, not the class {func.__qualname__!r}: "
                "decorate its methods, those of a view with django.utils.decorators."
                "method_decorator()"
            )
        wrapped: Any
        if inspect.isasyncgenfunction(func):
            wrapped = self._wrap_async_generator(func)
        elif inspect.isgeneratorfunction(func):
            wrapped = self._wrap_generator(func)
        elif iscoroutinefunction(func):
            wrapped = self._wrap_coroutine(func)
        else:
            wrapped = self._wrap_function(func)
        return functools.wraps(func)(wrapped)  # type: ignore[return-value]

    def _wrap_function(self, func: Callable[..., Any]) -> Callable[..., Any]:
        def in_block(*args: Any, **kwargs: Any) -> Any:
            begun = self.begin_call()
            try:
                result = func(*args, **kwargs)
            finally:
                self.end_call(begun)
            if inspect.iscoroutine(result):  # an ordinary function around a coroutine function
                return self._wrap_coroutine(partial(_await, result))()
            return result

        return in_block

    def _wrap_coroutine(self, func: Callable[..., Any]) -> Callable[..., Any]:
        async def in_block(*args: Any, **kwargs: Any) -> Any:
            begun = self.begin_call()
            try:
                return await func(*args, **kwargs)
            finally:
                self.end_call(begun)

        return in_block

    def _wrap_generator(self, func: Callable[..., Any]) -> Callable[..., Any]:
        def in_blocks(*args: Any, **kwargs: Any) -> Any:
            return (yield from self._steps(func(*args, **kwargs)))

        return in_blocks

    def _steps(self, generator: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        step: Callable[[], Any] = partial(next, generator)
        while True:
            try:
                produced = self._wrap_function(step)()
            except StopIteration as stop:
                return stop.value
            try:
                sent = yield produced
            except GeneratorExit:
                step = generator.close
                self._wrap_function(step)()
                raise
            except BaseException as exc:
                step = partial(generator.throw, exc)
            else:
                step = partial(generator.send, sent)

    def _wrap_async_generator(self, func: Callable[..., Any]) -> Callable[..., Any]:
        async def in_blocks(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            generator = func(*args, **kwargs)
            step: Callable[[], Any] = generator.__anext__
            while True:
                try:
                    produced = await self._wrap_coroutine(step)()
                except StopAsyncIteration:
                    return
                try:
                    sent = yield produced
                except GeneratorExit:
                    step = generator.aclose
                    await self._wrap_coroutine(step)()
                    raise
                except BaseException as exc:
                    step = partial(generator.athrow, exc)
                else:
                    step = partial(generator.asend, sent)

        return in_blocks


async def _await(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return await coroutine
