"""The shortcut ``handler``: serve a request with fewer tasks and threads than Django's handler.

Django's own `ASGIHandler.handle()` makes a class, a task group and a group of exceptions for each
request, and leaves them, with the request and its response, to the garbage collector. It also calls
the receivers of its signals in a thread. Neither is needed where the ORM waits on the loop.
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
from pgbackend.hooks import Hook
from pgbackend.patches import if_unpatched
from pgbackend.request_signals import close, is_method

from .wrappers import give_back, lent


def install() -> None:
    """Let the hooks replace `ASGIHandler.handle()`; without this, Django's own serves requests."""
    hooks.HOOKS.append(
        Hook(
            "django.core.handlers.asgi:ASGIHandler",
            "handle",
            _replace_handle,
            "Each request would make tasks, and groups of exceptions for the garbage collector.",
        )
    )


def _replace_handle(djangos: Any) -> Any:
    """Return `handle()`, or what is there, if somebody has patched it."""
    if if_unpatched(djangos) is None:
        return djangos
    handle.__wrapped__ = djangos  # type: ignore[attr-defined]
    return handle


async def handle(self: Any, scope: Any, receive: Any, send: Any) -> None:
    """Read a request, have it answered, and send the response, as `ASGIHandler.handle()` does.

    As in Django 6.1, in every version: the view runs in the handler's own task, which is cancelled
    when the client goes.
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
            at_once = not is_method(listen, _LISTEN)  # a patch of it expects to be called
            with _Connected(functools.partial(listen, receive), at_once=at_once):
                response = await self.run_get_response(request)
                await self.send_response(response, send)
        if response is None:
            await signals.request_finished.asend(sender=self.__class__)
        else:
            await close(response)
    give_back(lent_before)


async def _read_body(handler: Any, receive: Any) -> Any:
    """Return what `ASGIHandler.read_body()` does, without a file if one small message is all."""
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


#: The module in which the handler looks names up, as Django's does: a test may replace one there.
_names: Any = _asgi

_READ_BODY, _LISTEN = ASGIHandler.read_body, ASGIHandler.listen_for_disconnect


class _Connected:
    """Cancel the task that runs this block when the client goes.

    `listen` waits for that, and raises `RequestAborted`; any other error that it raises is raised
    at the end of the block. The cancellation ends with the block, as in `asyncio.timeout`, unless
    the task has been cancelled by others, too.

    Note [Listening without a task]
    Most requests end while the client waits for the answer. So there is no task to listen: the
    first step of `listen` is taken in a callback of the loop, and leaves a future to wait for. A
    task goes on when that is done. Where the first step cannot be taken so (somebody has wrapped
    what the server gave, in code that uses the database, or a timeout), `listen` is begun anew in a
    task.

    Note [Busy requests]
    A request that waits for nothing but its databases has mostly ended within milliseconds, and
    would have listened for nothing. So it begins when it waits for something else, or when it has
    lasted for `LISTEN_AFTER`.
    """

    # Attributes that most requests never change: here once for all of them.

    _error: BaseException | None = None
    _listening: Coroutine[Any, Any, None] | None = None
    _listener: asyncio.Task[None] | None = None
    _first_step: asyncio.Handle | None = None
    #: The context in which to listen; None: the one in which that is decided.
    _context: Any = None
    #: The portal whose code is still busy; see Note [Busy requests].
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
        elif portal is None or portal.on_wait is not None:  # a request in a request
            self.listen_soon()
        else:
            self._portal = portal
            portal.on_wait = self.listen_soon
            self._context = state.context_here()
            _busy.add(self, task.get_loop())

    def listen_soon(self) -> None:
        """Begin to listen, in the loop's next turn."""
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
        except Exception:  # if it has another reason, the task will meet it, too
            self._listen_in_task(self._listen())
        else:
            if getattr(waits_for, "_asyncio_future_blocking", False):
                waits_for._asyncio_future_blocking = False  # noqa: SLF001 - as asyncio's tasks do
                waits_for.add_done_callback(self._go_on)
                self._listening = listening
            else:  # a bare `yield`, as of `asyncio.sleep(0)`
                self._listen_in_task(bridge.resume(listening, waits_for))

    def _go_on(self, waits_for: Any) -> None:
        listening, self._listening = self._listening, None
        if listening is not None:  # else the server has waited for the answer, which is sent
            self._listen_in_task(bridge.resume(listening, waits_for))

    def _listen_in_task(self, listening: Coroutine[Any, Any, None]) -> None:
        # Green, as all tasks of a request are.
        self._listener = self._task.get_loop().create_task(bridge.portal(listening))
        self._listener.add_done_callback(self._heard)

    def _heard(self, listener: asyncio.Task[None]) -> None:
        if not listener.cancelled():  # by a loop that ends
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
        if error is None:
            return False
        if not isinstance(error, RequestAborted):
            raise error
        return exc_type is asyncio.CancelledError and self._task.cancelling() <= self._cancelled

    def _stop_listening(self) -> BaseException | None:
        """Stop to listen; return the error that has been heard in this very step."""
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
            # `listen` has more to do, of which the request need not know.
            self._task.get_loop().create_task(bridge.portal(bridge.resume(listening, waits_for)))
            return None
        listener = self._listener
        if listener is not None:
            listener.remove_done_callback(self._heard)  # it refers to the listener: a cycle
            if not listener.cancel() and not listener.cancelled():
                return listener.exception()
        return None


#: How many seconds a request may wait for its databases only, before it listens to its client.
LISTEN_AFTER = 0.05


class _Busy(threading.local):
    """The requests of the thread's loop that have waited for nothing but their databases."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        #: In the order in which they came, with the time of the loop when they begin to listen.
        self.requests: dict[_Connected, float] = {}
        self._timed = False

    def add(self, request: _Connected, loop: asyncio.AbstractEventLoop) -> None:
        if self.loop is not loop:
            self.loop, self.requests, self._timed = loop, {}, False
        self.requests[request] = loop.time() + LISTEN_AFTER
        if not self._timed:
            self._time(loop)

    def _time(self, loop: asyncio.AbstractEventLoop) -> None:
        """Look at the requests soon: one timer for all, not for each that is due a little later."""
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
