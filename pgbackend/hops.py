"""Replaces Django's hops between the event loop and threads: `sync_to_async`, `async_to_sync`.

hooks.py lists the modules of Django in which they are replaced. A call "runs in place" if it runs
green on the loop, and "keeps its thread" if asgiref calls it in a thread, as in Django. The rule:

- the ORM's a-methods run their synchronous method in place, if its alias uses pgbackend;
- code that Django itself defines and that does not block (its middleware, its views, rendering, the
  receivers of signals) runs in place, if every alias of the project uses pgbackend;
- code that users define (sync views, sync middleware) always keeps its thread, because it may
  block. threads.py tells users' code from Django's.

Password hashing keeps its thread too: it is work, not waiting, and would stop the loop.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from typing import Any, TypeAlias

from asgiref.sync import AsyncToSync, async_to_sync, sync_to_async
from django.db import connections, router

from . import block_context, conf, generators, request, state
from .driver import bridge

#: A policy returns whether a call of a function, with these arguments, runs in place.
Policy: TypeAlias = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], bool]


# --- In Django's modules --------------------------------------------------------------------------


def make_sync_to_async(policy: Policy) -> Callable[[Any], Callable[..., Any]]:
    """Return a `Hook.replace`: it returns a `sync_to_async` that asks `policy` at each call."""
    return lambda original: _hop(policy)


def _hop(policy: Policy) -> Callable[..., Any]:
    def hop(func: Callable[..., Any] | None = None, **options: Any) -> object:
        if func is None:
            return functools.partial(hop, **options)
        if policy is of_the_orm and not conf.has_foreign_alias():
            return functools.partial(bridge.run, func)  # `policy` allows it with any arguments

        async def call(*args: object, **kwargs: object) -> object:
            if policy(func, args, kwargs):
                return await bridge.run(func, *args, **kwargs)
            return await sync_to_async(func, **options)(*args, **kwargs)

        return _bound_like(func, call)

    return hop


def make_async_to_sync(original: object) -> Callable[..., Any]:
    """Return an `async_to_sync` that runs its coroutines in a portal, on any loop."""
    return _green_async_to_sync


def _green_async_to_sync(func: Callable[..., Awaitable[Any]]) -> Callable[..., Any]:
    @functools.wraps(func)
    async def green(*args: object, **kwargs: object) -> object:
        return await bridge.portal(func(*args, **kwargs))  # type: ignore[arg-type]

    return async_to_sync(_bound_like(func, green))


def _bound_like(method: Any, function: Any) -> Any:
    """Return `function` with the `__self__` of `method`, if any, as in asgiref: Django reads it."""
    if hasattr(method, "__self__"):
        function.__self__ = method.__self__
    return function


def make_hashing(work: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that hashes a password in a thread, if sync code calls it on the loop.

    That is so in requests of `pgbackend.get_asgi_application()`: the caller waits green.
    """

    @functools.wraps(work)
    def hooked(*args: object, **kwargs: object) -> object:
        if request.is_whole_stack() and bridge.green() is not None:
            return bridge.await_(sync_to_async(work, thread_sensitive=False)(*args, **kwargs))
        return work(*args, **kwargs)

    return hooked


def run_coroutine_function(func: Callable[[], Awaitable[Any]]) -> object:
    """Call the coroutine function `func`, wait for its result, and return it.

    The caller is synchronous code, green or not.
    """
    if bridge.current() is not None:
        return bridge.await_(func())
    return _green_async_to_sync(func)()


# --- Policies -------------------------------------------------------------------------------------


def of_the_orm(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether `func`, a method of the ORM, uses a database whose engine is pgbackend.

    If the project has other engines, too, and the call does not tell its alias, returns False.
    """
    if not conf.has_foreign_alias():
        return True
    alias = kwargs.get("using") or next(
        filter(None, map(_alias_of, (getattr(func, "__self__", None), *args))), None
    )
    return alias is not None and conf.alias_is_ours(alias)


def _alias_of(subject: Any) -> str | None:
    """Return the alias of the database that `subject` uses; None if that cannot be told.

    `subject` is a QuerySet, a manager, an instance or a session store; or a list of these, of which
    the first is asked.
    """
    if isinstance(subject, list | tuple):
        return _alias_of(subject[0]) if subject else None
    if hasattr(subject, "_state"):
        used: str | None = subject._state.db  # noqa: SLF001 - documented by Django
        return used or router.db_for_write(type(subject), instance=subject)
    alias = getattr(subject, "db", None)
    if isinstance(alias, str):
        return alias
    model = getattr(subject, "model", None)
    return router.db_for_write(model) if inspect.isclass(model) else None  # type: ignore[arg-type]


def of_receivers(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether the receivers of a signal run in place: if every alias uses pgbackend.

    In a request of `pgbackend.get_asgi_application()` they do so in any case.
    """
    return request.is_whole_stack() or not conf.has_foreign_alias()


# --- In asgiref -----------------------------------------------------------------------------------


def make_call_of_async_to_sync(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return an `AsyncToSync.__call__()` that green code can call: it waits in its portal.

    asgiref's own raises an error while a loop runs in the thread. Code that is not green still
    calls it, and the coroutine then uses the wrapper objects of the calling thread: see Note [Lent
    wrappers] in state.py.
    """

    @functools.wraps(call)
    def __call__(self: AsyncToSync[..., Any], *args: object, **kwargs: object) -> object:
        if bridge.current() is not None:
            return bridge.await_(self.awaitable(*args, **kwargs))
        ours: dict[str, Any] = {
            alias: connections[alias] for alias in connections if conf.alias_is_ours(alias)
        }
        with state.lending(ours), request.lend():
            return call(self, *args, **kwargs)

    return __call__


def make_call_of_sync_to_async(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `SyncToAsync.__call__()` whose thread takes part in the caller's `atomic` blocks.

    asgiref calls the function in a copy of the task's context. If a generator makes the call, or a
    test has opened a block, that context may not name the block; so it is added.

    A call is a wait, also if the function has ended before asyncio can wait for it: since Python
    3.14 its future is done then, and the task goes on at once. A request begins to listen to its
    client when it first waits (`Portal.on_wait`), so it would not notice that the client has gone.
    """

    @functools.wraps(call)
    async def __call__(self: object, *args: object, **kwargs: object) -> object:
        if generators.carried:
            block_context.settle()
        request.follow()
        in_tests = block_context.in_tests() if block_context.test_blocks else nullcontext()
        try:
            with in_tests, block_context.calling_thread():
                return await call(self, *args, **kwargs)
        finally:
            portal = bridge.current()
            if portal is not None and portal.on_wait is not None:
                await asyncio.sleep(0)

    return __call__
