"""Serves requests on the event loop: replaces methods of Django's handlers of requests.

Each request runs in a portal, so all synchronous code that its view calls is green. Each request
has its own values of `threading.local` objects (see request.py). At its end, request_signals.py
calls the receivers of its signals, and closes the response.

Each `make_...()` function is given a method of Django's, and returns the replacement: see hooks.py.
Django's own `ASGIHandler.handle()` does the rest: it reads the request, calls the view, watches
whether the client is still connected, and sends the response.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Mapping
from typing import Any

from asgiref.sync import AsyncToSync, iscoroutinefunction
from django.core.handlers.base import BaseHandler
from django.db import connections, transaction
from django.db.utils import ConnectionHandler
from django.http import HttpRequest

from . import blocking, conf, request, state, thread_locals
from .driver import bridge
from .driver.naming import described


def make_call(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `__call__()` of an ASGI application that runs each call in a portal.

    The result declares its three arguments, and not `*args`: uvicorn calls an application without
    arguments, and takes it for a factory unless that raises `TypeError`.
    """

    @functools.wraps(call)
    async def __call__(self: object, scope: Any, receive: object, send: object) -> object:
        token = request.begin(scope)
        served: Any = bridge.drive(call(self, scope, receive, send))
        try:
            if (bound := blocking.bound()) is not None:
                served = blocking.Watched(served, described(scope), bound)
            return await served
        finally:
            request.end(token)

    return __call__


def make_call_of_test_client(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return an `AsyncClientHandler.__call__()` that runs each request in a portal."""

    @functools.wraps(call)
    async def __call__(self: object, scope: Any) -> object:
        token = request.begin(scope)  # the test must not see the values that middleware sets
        try:
            return await bridge.portal(call(self, scope))
        finally:
            request.end(token)

    return __call__


def make_view_atomic(make: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `BaseHandler.make_view_atomic()` that accepts async views under `ATOMIC_REQUESTS`.

    Django's method raises an error for async views, because Django's `atomic()` cannot decorate
    them. So does the replacement if an alias with `ATOMIC_REQUESTS` has another engine.
    """

    @functools.wraps(make)
    def hooked(self: BaseHandler, view: Callable[..., Any]) -> Callable[..., Any]:
        # Not `any()`: each request pays for this, and a generator costs more than the loop.
        for settings_dict in connections.settings.values():
            if settings_dict["ATOMIC_REQUESTS"]:
                break
        else:
            return view
        if not iscoroutinefunction(view):
            made: Callable[..., Any] = make(self, view)
            return made
        exempt: set[str] = getattr(view, "_non_atomic_requests", set())
        for alias, settings_dict in connections.settings.items():
            if not settings_dict["ATOMIC_REQUESTS"] or alias in exempt:
                continue
            if not conf.engine_is_ours(settings_dict["ENGINE"]):
                refused: Callable[..., Any] = make(self, view)  # raises, as it does in Django
                return refused
            view = transaction.atomic(using=alias)(view)
        return view

    return hooked


# --- Wrapper objects ------------------------------------------------------------------------------


#: The event loops that `async_to_sync()` has started, each for a thread that waits for it.
_loops_of_threads: Mapping[Any, Any] = AsyncToSync.loop_thread_executors


def new_wrapper(create: Callable[..., Any], handler: ConnectionHandler, alias: str) -> object:
    """Call `create`, Django's method, and return the new wrapper object of `alias`.

    This is a seam, for green code that has no wrapper of the alias yet: the shortcut ``wrappers``
    replaces this function by one that returns the wrapper of an ended request, if there is one.
    """
    return create(handler, alias)


def make_create_connection(create: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `ConnectionHandler.create_connection()` that lends out a waiting thread's wrapper.

    If `async_to_sync()` has started the running loop, the thread that called it waits for the loop;
    then that thread's wrapper is returned. Otherwise a new one is returned, as in Django. See Note
    [Lent wrappers] in state.py.
    """

    @functools.wraps(create)
    def create_connection(self: ConnectionHandler, alias: str) -> object:
        if self is not connections:
            return create(self, alias)
        if asyncio._get_running_loop() in _loops_of_threads:
            wrapper = state.lent(alias)
            if wrapper is not None:
                return wrapper
        if bridge.current() is None:
            return create(self, alias)
        return new_wrapper(create, self, alias)

    return create_connection


# --- Values that packages and the project keep by thread: see thread_locals.py --------------------


def make_load_middleware(load: Callable[..., None]) -> Callable[..., None]:
    """Return a `BaseHandler.load_middleware()` that looks for `threading.local` objects afterwards.

    Django's method imports the modules of the middleware, which may make new objects. Each of these
    objects is replaced, so that each request has its own values. The setting `PGBACKEND_SLOW_STEP`,
    which is for the requests of a handler, is read again.
    """

    @functools.wraps(load)
    def load_middleware(self: BaseHandler, is_async: bool = False) -> None:
        load(self, is_async)
        blocking.read_setting()
        thread_locals.look_at_new_modules()

    return load_middleware


def make_resolve_request(resolve: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `BaseHandler.resolve_request()` that looks for `threading.local` objects afterwards.

    The first request imports the modules of the views, which may make new objects.
    """

    @functools.wraps(resolve)
    def resolve_request(self: BaseHandler, request: HttpRequest) -> object:
        match = resolve(self, request)
        thread_locals.go_on()
        return match

    return resolve_request
