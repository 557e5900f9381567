"""Functions for async code: `run`, `as_async`, `portal`, `pinned`, `detached`, `atomic`.

`hybrid_middleware` is of hybrid.py.

`atomic` is Django's own, `django.db.transaction.atomic`. This module declares its types, because
Django's stubs know neither its ``async with`` nor that it decorates coroutine functions.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypeVar, overload

from django.db import DEFAULT_DB_ALIAS, NotSupportedError, connections, transaction

from . import block_context, frames, state
from .driver import bridge
from .hybrid import hybrid_middleware
from .sessions import Session

__all__ = ["as_async", "atomic", "detached", "hybrid_middleware", "pinned", "portal", "run"]

P = ParamSpec("P")
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

if TYPE_CHECKING:

    class Atomic(transaction.Atomic):
        """Django's `Atomic`, for type checkers: with the methods that `hooks` adds to it."""

        def __call__(self, func: F) -> F: ...

        async def __aenter__(self) -> None: ...

        async def __aexit__(
            self,
            exc_type: type[BaseException] | None,
            exc_value: BaseException | None,
            exc_tb: TracebackType | None,
        ) -> None: ...

    @overload
    def atomic(using: F) -> F: ...

    @overload
    def atomic(
        using: str | None = None, savepoint: bool = True, durable: bool = False
    ) -> Atomic: ...

    def atomic(using: Any = None, savepoint: bool = True, durable: bool = False) -> Any:
        """Run a block in a transaction (``with``, ``async with``), or decorate any function."""

else:
    from django.db.transaction import Atomic, atomic


async def run(fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Call the synchronous function `fn` green, on the running loop, and return its result.

    ORM statements in `fn` block neither the loop nor a thread. Other blocking calls (`time.sleep`,
    `requests`) still block the loop: pass these to `asyncio.to_thread`.
    """
    return await bridge.run(fn, *args, **kwargs)


def as_async(fn: Callable[P, T], /) -> Callable[P, Coroutine[Any, Any, T]]:
    """Return a coroutine function that calls the synchronous function `fn` green, as `run` does."""

    @functools.wraps(fn)
    async def inner(*args: P.args, **kwargs: P.kwargs) -> T:
        return await bridge.run(fn, *args, **kwargs)

    return inner


def portal(coro: Coroutine[Any, Any, T], /) -> Coroutine[Any, Any, T]:
    """Return a coroutine that runs `coro` in a portal: the synchronous code that it calls is green.

    Requests that Django's ASGI handler serves, and channels' consumers, run in a portal already. A
    worker or a script needs this: ``asyncio.run(pgbackend.aio.portal(main()))``.
    """
    return bridge.portal(coro)


_NOT_THROUGH_POOLER = (
    "pinned() cannot hold a session of {0!r}, because OPTIONS['pooler'] is 'transaction': the "
    "pooler may serve the next transaction by another session. Open a transaction, with atomic(), "
    "or use another alias, which goes to PostgreSQL itself"
)


class pinned:  # noqa: N801 - reads as a statement
    """Keep one connection for all statements inside ``with pgbackend.pinned():``.

    Temporary tables, ``SET`` and session-level advisory locks need that. ``async with`` does the
    same. The connection is leased at the first statement; other tasks never use it. In a
    transaction, and in sync code, all statements have one connection anyway. Through a transaction
    pooler only a transaction keeps its session: `NotSupportedError` is raised outside of one.
    """

    def __init__(self, using: str = DEFAULT_DB_ALIAS) -> None:
        self.using = using
        self._session: Session | None = None

    def __enter__(self) -> Self:
        wrapper: Any = connections[self.using]
        if not hasattr(wrapper, "async_session"):
            return self  # another engine, which has one connection for each thread
        if wrapper.is_through_pooler() and state.current_state(wrapper).transaction is None:
            raise NotSupportedError(_NOT_THROUGH_POOLER.format(self.using))
        self._session = wrapper.async_session()
        if self._session is not None:
            self._session.pin()
        return self

    def __exit__(self, *exc_info: object) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.unpin()

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(self, *exc_info: object) -> None:
        self.__exit__(*exc_info)


class Detached:
    """A context manager: its body runs outside of the transactions around it; see `detached`."""

    def __init__(self, using: str | None = None) -> None:
        self._keys = None if using is None else {id(connections.settings[using])}
        self._contexts: list[AbstractContextManager[None]] = []

    def __enter__(self) -> Self:
        context = block_context.no_blocks(self._keys, frames.of_with(sys._getframe(1)))
        context.__enter__()
        self._contexts.append(context)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._contexts.pop().__exit__(None, None, None)

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(self, *exc_info: object) -> None:
        self.__exit__(*exc_info)


@overload
def detached(
    coro: Coroutine[Any, Any, T], *, using: str | None = None
) -> Coroutine[Any, Any, T]: ...


@overload
def detached(coro: None = None, *, using: str | None = None) -> Detached: ...


def detached(
    coro: Coroutine[Any, Any, T] | None = None, *, using: str | None = None
) -> Coroutine[Any, Any, T] | Detached:
    """Step out of the surrounding transactions, for background work.

    Without `coro`, return a context manager for ``with`` or ``async with``. With `coro`, return a
    coroutine that runs `coro` outside; start a task with it::

        with transaction.atomic():
            ...
            asyncio.create_task(pgbackend.detached(send_mail(order)))

    `using` limits this to the transaction of one database alias.
    """
    outside = Detached(using)
    return outside if coro is None else _run_in(outside, coro)


async def _run_in(outside: Detached, coro: Coroutine[Any, Any, T]) -> T:
    with outside:
        return await coro
