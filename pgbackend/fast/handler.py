"""Serves a request with fewer tasks and threads than Django's handler: the shortcut `handler`.

Django's own `ASGIHandler.handle()` makes a class, a task group and a group of exceptions for each
request, and leaves them, with the request and its response, to the garbage collector. It also calls
the receivers of its signals in a thread. If the ORM waits on the loop, neither is needed.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable, Coroutine
from contextlib import closing
from io import BytesIO
from types import TracebackType
from typing import Any

from django.core import signals
from django.core.exceptions import RequestAborted
from django.core.handlers import asgi as _asgi
from django.core.handlers.asgi import ASGIHandler

from pgbackend import conf, hooks, state
from pgbackend.driver import bridge
from pgbackend.driver.coroutines import resume
from pgbackend.hooks import Hook
from pgbackend.patches import if_unpatched
from pgbackend.request_signals import close, is_method

from .wrappers import give_back, lent


def install() -> None:
    """Add a hook that replaces `ASGIHandler.handle()`; the plain way is Django's method."""
    hooks.HOOKS.append(
        Hook(
            "django.core.handlers.asgi:ASGIHandler",
            "handle",
            _replace_handle,
            "Each request would make tasks, and groups of exceptions for the garbage collector.",
        )
    )


def _replace_handle(djangos: Any) -> Any:
    """Return `handle()`; or `djangos` itself, if that is a patch and not Django's method."""
    if if_unpatched(djangos) is None:
        return djangos
    handle.__wrapped__ = djangos  # type: ignore[attr-defined]
    return handle


async def handle(self: Any, scope: Any, receive: Any, send: Any) -> None:
    """Read a request, call its view, and send the response, as `ASGIHandler.handle()` does.

    With every version of Django it works as in 6.1: the view runs in the handler's own task, which
    is cancelled when the client disconnects.
    """
    lent_before = lent()
    try:
        body = await _read_body(self, receive)
    except RequestAborted:
        return
    with closing(body):
        _names.set_script_prefix(_names.get_script_prefix(scope))
        await signals.request_started.asend(sender=self.__class__, scope=scope)
        request, response = self.create_request(scope, body)
        if response is not None:  # a bad request
            await self.send_response(response, send)
        else:
            listen = self.listen_for_disconnect
            at_once = not is_method(listen, _LISTEN)  # a patch expects to be called at once
            with _Connected(functools.partial(listen, receive), at_once=at_once):
                response = await self.run_get_response(request)
                await self.send_response(response, send)
        if response is None:
            await signals.request_finished.asend(sender=self.__class__)
        else:
            await close(response)
    give_back(lent_before)


async def _read_body(handler: Any, receive: Any) -> Any:
    """Return the body as a file, like Django's `read_body()`; a small one is kept in memory."""
    if not is_method(handler.read_body, _READ_BODY):
        return await handler.read_body(receive)
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body", False):
        body = message.get("body", b"")
        if not body or len(body) <= conf.most_in_memory():
            return BytesIO(body)
    received = [message]

    async def receive_again() -> Any:
        return received.pop() if received else await receive()

    return await handler.read_body(receive_again)


#: The module where Django's handler looks names up: ours does so too, since a test may patch one.
_names: Any = _asgi

_READ_BODY, _LISTEN = ASGIHandler.read_body, ASGIHandler.listen_for_disconnect


class _Connected:
    """A context manager: the task in its body is cancelled if the client disconnects.

    `listen()` returns a coroutine that waits for the disconnect, and then raises `RequestAborted`.
    If it raises another error, the `with` raises that at its end. As with `asyncio.timeout`, the
    `with` swallows the `CancelledError`, unless other code has cancelled the task, too. With
    `at_once`, a task listens from the beginning, as in Django.

    Note [Listening without a task]
    Most requests end while the client is still connected. So there is no listening task at first: a
    callback of the loop takes the first step of the coroutine, which yields a future. A task makes
    the further steps when that future is done. The first step may be impossible in a callback: if
    the `receive()` of the server is wrapped in code that uses the database, or a timeout. Then a
    task listens, from the beginning.

    Note [Busy requests]
    A request that waits only for its databases mostly ends within milliseconds; to listen to its
    client would be in vain. So listening begins when the request waits for anything else, or has
    lasted for `LISTEN_AFTER` seconds.
    """

    # On the class, because most requests never change these attributes.

    _error: BaseException | None = None
    _listening: Coroutine[Any, Any, None] | None = None
    _listener: asyncio.Task[None] | None = None
    _first_step: asyncio.Handle | None = None
    #: The contextvars context in which to listen; None: that of the caller of `listen_soon()`.
    _context: Any = None
    #: The portal of the request, until listening begins; see Note [Busy requests].
    _portal: bridge.Portal | None = None

    def __init__(
        self, listen: Callable[[], Coroutine[Any, Any, None]], *, at_once: bool = False
    ) -> None:
        self._listen = listen
        self._at_once = at_once

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._cancelled = task.cancelling()
        portal = bridge.current()
        if self._at_once:
            self._listen_in_task(self._listen())  # as in Django
        elif portal is None or portal.on_wait is not None:  # a request inside another one
            self.listen_soon()
        else:
            self._portal = portal
            portal.on_wait = self.listen_soon
            self._context = state.context_here()
            _busy.add(self, task.get_loop())

    def listen_soon(self) -> None:
        """Begin to listen in the next iteration of the loop."""
        self._no_more_busy()
        loop = self._task.get_loop()
        self._first_step = loop.call_soon(self._begin_to_listen, context=self._context)

    def _no_more_busy(self) -> None:
        portal = self._portal
        if portal is not None:
            self._portal = portal.on_wait = None
            _busy.requests.pop(self, None)

    def _begin_to_listen(self) -> None:
        listening = self._listen()
        try:
            waits_for: Any = bridge.first_step(listening)
        except (RequestAborted, AssertionError) as exc:
            self._hear(exc)
        except Exception:  # in a task: if that is no cure, the task raises the error again
            self._listen_in_task(self._listen())
        else:
            if getattr(waits_for, "_asyncio_future_blocking", False):
                waits_for._asyncio_future_blocking = False  # noqa: SLF001 - as asyncio's tasks do
                waits_for.add_done_callback(self._go_on)
                self._listening = listening
            else:  # a bare `yield`, as of `asyncio.sleep(0)`
                self._listen_in_task(resume(listening, waits_for))

    def _go_on(self, waits_for: Any) -> None:
        listening, self._listening = self._listening, None
        if listening is not None:  # None: the response was sent first
            self._listen_in_task(resume(listening, waits_for))

    def _listen_in_task(self, listening: Coroutine[Any, Any, None]) -> None:
        # In a portal, as all tasks of a request.
        self._listener = self._task.get_loop().create_task(bridge.portal(listening))
        self._listener.add_done_callback(self._heard)

    def _heard(self, listener: asyncio.Task[None]) -> None:
        if not listener.cancelled():  # the end of the loop cancels it
            error = listener.exception()
            if error is not None:
                self._hear(error)

    def _hear(self, error: BaseException) -> None:
        self._error = error
        self._task.cancel()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        error = self._error
        if error is not None:
            self._error = None
            self._task.uncancel()
        else:
            error = self._stop_listening()
        if error is None:  # a view, or the stream of its response, may raise `RequestAborted`, too
            return exc_type is not None and issubclass(exc_type, RequestAborted)
        if not isinstance(error, RequestAborted):
            raise error
        return exc_type is asyncio.CancelledError and self._task.cancelling() <= self._cancelled

    def _stop_listening(self) -> BaseException | None:
        """Stop listening; return the error that listening raised at the same moment, or None."""
        self._no_more_busy()
        if self._first_step is not None:
            self._first_step.cancel()
        if (listening := self._listening) is not None:
            self._listening = None
            try:
                waits_for = listening.throw(asyncio.CancelledError())
            except (asyncio.CancelledError, StopIteration):
                return None
            except Exception as exc:
                return exc
            # The coroutine awaits something as it ends: a task completes it, without the request.
            self._task.get_loop().create_task(bridge.portal(resume(listening, waits_for)))
            return None
        listener = self._listener
        if listener is not None:
            listener.remove_done_callback(self._heard)  # `_heard` is bound to self: a cycle
            if not listener.cancel() and not listener.cancelled():
                return listener.exception()
        return None


#: How many seconds a request that waits only for its databases lasts before it begins to listen.
LISTEN_AFTER = 0.05


class _Busy(threading.local):
    """A `threading.local` with the requests that have waited only for their databases so far."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        #: Each with the time at which it begins to listen, by the loop's clock; the oldest first.
        self.requests: dict[_Connected, float] = {}
        self._timed = False

    def add(self, request: _Connected, loop: asyncio.AbstractEventLoop) -> None:
        if self.loop is not loop:
            self.loop, self.requests, self._timed = loop, {}, False
        self.requests[request] = loop.time() + LISTEN_AFTER
        if not self._timed:
            self._time(loop)

    def _time(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the timer that calls `_look()`; one timer serves all requests of the loop."""
        self._timed = True
        loop.call_later(LISTEN_AFTER / 2, self._look, loop, context=state.no_context())

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        if self.loop is not loop:
            return
        now = loop.time()
        for request in [request for request, due in self.requests.items() if due <= now]:
            request.listen_soon()
        if self.requests:
            self._time(loop)
        else:
            self._timed = False


_busy = _Busy()
