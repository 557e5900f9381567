"""Serves requests on the event loop: replaces methods of Django's handlers of requests.

Each request runs in a portal, so that everything below its view is green; and a context of its own
holds the values that follow it (see request.py). How a request ends is told in request_signals.py.

Django's own `ASGIHandler.handle()` does the rest: it reads the request, has it answered, listens
whether the client is still there, and sends the response.
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

from . import conf, request, state, thread_locals
from .driver import bridge


def make_call(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `__call__()` of an ASGI application that runs each call in a portal.

    The arguments are spelled out: uvicorn calls an application without any, to see whether it is a
    factory, and takes it for one unless that is a `TypeError`.
    """

    @functools.wraps(call)
    async def __call__(self: object, scope: object, receive: object, send: object) -> object:
        token = request.begin()
        try:
            return await bridge.drive(call(self, scope, receive, send))
        finally:
            request.end(token)

    return __call__


def make_call_of_test_client(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return an `AsyncClientHandler.__call__()` that runs each request in a portal."""

    @functools.wraps(call)
    async def __call__(self: object, scope: object) -> object:
        token = request.begin()  # what its middleware sets is not the test's
        try:
            return await bridge.portal(call(self, scope))
        finally:
            request.end(token)

    return __call__


def make_view_atomic(make: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `BaseHandler.make_view_atomic()` that takes async views.

    Django's refuses them under `ATOMIC_REQUESTS`, because its `atomic()` does.
    """

    @functools.wraps(make)
    def hooked(self: BaseHandler, view: Callable[..., Any]) -> Callable[..., Any]:
        for settings_dict in connections.settings.values():  # in each request: no generator
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


#: The loops that asgiref has made for threads which wait for them.
_loops_of_threads: Mapping[Any, Any] = AsyncToSync.loop_thread_executors


def new_wrapper(create: Callable[..., Any], handler: ConnectionHandler, alias: str) -> object:
    """Return the wrapper object of an alias for green code that has none yet: a new one.

    A seam: the shortcut ``wrappers`` returns that of a request which has ended, if there is one.
    """
    return create(handler, alias)


def make_create_connection(create: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `ConnectionHandler.create_connection()` that knows who waits for the running loop.

    On a loop that was started for a thread, which waits for it, it returns the thread's wrapper:
    see Note [Lent wrappers] in state.py.
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

    Middleware is loaded with the handler.
    """

    @functools.wraps(load)
    def load_middleware(self: BaseHandler, is_async: bool = False) -> None:
        load(self, is_async)
        thread_locals.look_at_new_modules()

    return load_middleware


def make_resolve_request(resolve: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `BaseHandler.resolve_request()` that looks for `threading.local` objects afterwards.

    Views are loaded by the first request that looks for one.
    """

    @functools.wraps(resolve)
    def resolve_request(self: BaseHandler, request: HttpRequest) -> object:
        match = resolve(self, request)
        thread_locals.go_on()
        return match

    return resolve_request
