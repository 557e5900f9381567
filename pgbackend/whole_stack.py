"""Serves a whole project on the event loop, sync views and sync middleware too, without threads.

`get_asgi_application()` takes the place of Django's function of this name. Its handler has the sync
chain of middleware that Django has under WSGI, and calls it green, in the portal of the request:
statements park the request, and the loop serves others. Async middleware and async views have their
place in that chain; they are awaited on the same loop.

So nothing in the project may block for long: no `time.sleep()`, no `requests.get()`, no long
computation. blocking.py tells which code does. Django hashes passwords in a thread here, too.

Note [Responses of sync iterators]
Under ASGI, Django's handler reads a sync iterator to its end, in a thread, before it sends the
first piece. This handler makes one step of the iterator for each piece that it sends: the iterator
may use the ORM, with `iterator()`, too; it is closed when the client hangs up; and a slow client
costs the memory of one piece. Files are read in this way as well, 64 KiB at a time: a read from the
page cache takes less time than a hop to a thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Self

import django
from asgiref.sync import async_to_sync, iscoroutinefunction
from django.core.exceptions import ImproperlyConfigured
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.base import BaseHandler
from django.db import connections
from django.http import HttpRequest, StreamingHttpResponse
from django.http.response import HttpResponseBase

from . import conf, request
from .driver import bridge


def get_asgi_application() -> GreenHandler:
    """Return an ASGI application that serves sync and async views green, on the event loop.

    Use it in ``asgi.py`` in the place of Django's function of this name. Code below it must not
    block for long; see docs/sync-views.md.
    """
    django.setup(set_prefix=False)
    if not any(map(conf.alias_is_ours, connections)):
        raise ImproperlyConfigured(
            "pgbackend.get_asgi_application() serves sync views on the event loop, which needs "
            "pgbackend's ENGINE. Set DATABASES['default']['ENGINE'] to 'pgbackend', or use "
            "django.core.asgi.get_asgi_application()."
        )
    return GreenHandler()


class GreenChain(BaseHandler):
    """A handler whose middleware is one sync chain, which it calls green."""

    def load_middleware(self, is_async: bool = False) -> None:
        super().load_middleware(is_async=False)

    def adapt_method_mode(
        self,
        is_async: bool,
        method: Any,
        method_is_async: bool | None = None,
        debug: bool = False,
        name: str | None = None,
    ) -> Any:
        """Adapt `method` as Django does; but sync code below async middleware runs green."""
        adapted = super().adapt_method_mode(is_async, method, method_is_async, debug, name)
        if method_is_async is None:
            method_is_async = iscoroutinefunction(method)
        return _green(method) if is_async and not method_is_async else adapted

    def check_response(self, response: Any, callback: Any, name: str | None = None) -> None:
        """Check `response` as Django does, which then renders it; let its `render()` be async."""
        super().check_response(response, callback, name)
        if iscoroutinefunction(getattr(response, "render", None)):
            response.render = async_to_sync(response.render)

    async def get_response_async(self, request: HttpRequest) -> HttpResponseBase:
        response: HttpResponseBase = await bridge.run(self.get_response, request)
        return response


class GreenHandler(GreenChain, ASGIHandler):
    """The ASGI application that `get_asgi_application()` returns."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with request.whole_stack():
            await super().__call__(scope, receive, send)

    async def send_response(self, response: Any, send: Any) -> None:
        """Send `response`; step its content green, if that is a sync iterator.

        See Note [Responses of sync iterators].
        """
        if response.streaming and _has_sync_content(response):
            response = _Stepped(response)
        await super().send_response(response, send)


def _green(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a coroutine function that calls the sync `method` green."""

    async def green(*args: object, **kwargs: object) -> object:
        return await bridge.run(method, *args, **kwargs)

    return green


_AITER = StreamingHttpResponse.__aiter__


def _has_sync_content(response: Any) -> bool:
    """Return whether Django would read the content of the streamed `response` in a thread."""
    return getattr(type(response), "__aiter__", None) is _AITER and not response.is_async


#: How many seconds a response may be sent from a sync iterator before other tasks have a turn: a
#: server that can send at once makes no other task wait, and an iterator need not wait either.
_AT_MOST = 0.001


class _Stepped:
    """Stands for a streamed response whose content is a sync iterator; each step of it is green.

    This is no async generator: before Python 3.13, one that waits cannot be closed.
    """

    def __init__(self, response: Any) -> None:
        self._response = response
        self._pieces = iter(response.streaming_content)
        self._since = time.monotonic()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._response, name)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        if time.monotonic() - self._since > _AT_MOST:  # the loop's own clock may stand meanwhile
            await asyncio.sleep(0)
            self._since = time.monotonic()
        piece: Any = await bridge.run(next, self._pieces, _END)
        if piece is _END:
            raise StopAsyncIteration
        return piece  # type: ignore[no-any-return]

    async def aclose(self) -> None:
        # Django shows `streaming_content` as a `map()` of the iterator, which cannot be closed.
        close = getattr(self._response._iterator, "close", None)  # noqa: SLF001
        if close is not None:
            await bridge.run(close)


_END = object()
