"""How a request is served on the event loop: what `hooks` puts in the place of Django's.

Django's own `ASGIHandler.handle()` makes a class, a task group and a group of exceptions for each
request, and leaves them, with the request and its response, to the garbage collector. It also has
its signals' receivers called in a thread. Neither is needed where the ORM waits on the loop.

Note [Tidying up after a request]
The receivers of `request_started` and `request_finished` tidy up what a request has used, in the
thread that calls them: `close_old_connections`, `reset_queries`. A request may have used its
database green, and in a thread (a sync view or middleware). So each receiver is called once: in
the request's thread if it has one, as in Django, else in place, because no thread is worth
starting for it. In the first case Django's own are called in place too.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable, Coroutine
from contextlib import closing
from io import BytesIO
from types import MethodType, TracebackType
from typing import Any

from asgiref.sync import SyncToAsync, sync_to_async
from django.core import signals
from django.core.exceptions import RequestAborted
from django.core.handlers import asgi as _asgi
from django.core.handlers.asgi import ASGIHandler, ASGIRequest
from django.core.signals import request_finished, request_started
from django.dispatch import Signal
from django.http import HttpResponse

from . import conf, state, wrappers
from .driver import bridge
from .fast.registry import is_on
from .patches import NO_OTHERS, djangos, if_djangos
from .threads import is_all_djangos


async def handle(self: Any, scope: Any, receive: Any, send: Any) -> None:
    """`ASGIHandler.handle()`: read a request, have it answered, and send the response.

    As in Django 6.1, in every version: the view runs in the handler's own task, which is cancelled
    when the client goes.
    """
    lent = wrappers.lent()
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
            at_once = not _is_method(listen, _LISTEN)  # who has patched it expects to be called
            with _Connected(functools.partial(listen, receive), at_once=at_once):
                response = await self.run_get_response(request)
                await self.send_response(response, send)
        if response is None:
            await signals.request_finished.asend(sender=self.__class__)
        else:
            await close(response)
    wrappers.give_back(lent)


async def _read_body(handler: Any, receive: Any) -> Any:
    """What `ASGIHandler.read_body()` returns, without a file where one small message is all."""
    if not _is_method(handler.read_body, _READ_BODY):
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


def _is_method(method: Any, function: Any) -> bool:
    """Whether a method of an object is still this function: it may be derived, or patched."""
    return type(method) is MethodType and method.__func__ is function


_READ_BODY, _LISTEN = ASGIHandler.read_body, ASGIHandler.listen_for_disconnect


class _Connected:
    """While the client is there: when it goes, the task that runs the block is cancelled.

    `listen` waits for that, and raises `RequestAborted`; another error of its is raised at the end
    of the block. The cancellation ends with the block, as in `asyncio.timeout`, unless the task has
    been cancelled by others, too.

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

    # What most requests never change, here once for all of them.

    _error: BaseException | None = None
    _listening: Coroutine[Any, Any, None] | None = None
    _listener: asyncio.Task[None] | None = None
    _first_step: asyncio.Handle | None = None
    #: In which to listen; None: in the one where that is decided.
    _context: Any = None
    #: Whose code is still busy; see Note [Busy requests].
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
            waits_for = bridge.first_step(listening)
        except (RequestAborted, AssertionError) as exc:
            self._hear(exc)
        except Exception:  # if it has another reason, the task will meet that, too
            self._listen_in_task(self._listen())
        else:
            if getattr(waits_for, "_asyncio_future_blocking", False):
                waits_for._asyncio_future_blocking = False  # noqa: SLF001 - as asyncio's tasks do
                waits_for.add_done_callback(self._go_on)
                self._listening = listening
            else:  # what else a task may wait for
                self._listen_in_task(bridge.resume(listening, waits_for))

    def _go_on(self, waits_for: Any) -> None:
        listening, self._listening = self._listening, None
        if listening is not None:  # else the answer was what the server waited for
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
        """Return what has been heard in this very step."""
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
            # It has more to do, of which the request need not know.
            self._task.get_loop().create_task(bridge.portal(bridge.resume(listening, waits_for)))
            return None
        listener = self._listener
        if listener is not None:
            listener.remove_done_callback(self._heard)  # which knows the listener
            if not listener.cancel() and not listener.cancelled():
                return listener.exception()
        return None


#: Seconds that a request may wait for its databases only, before its client is listened to.
LISTEN_AFTER = 0.05


class _Busy(threading.local):
    """The requests of the thread's loop that have waited for nothing but their databases."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        #: In the order in which they came, with the time of the loop when they are listened to.
        self.requests: dict[_Connected, float] = {}
        self._timed = False

    def add(self, request: _Connected, loop: asyncio.AbstractEventLoop) -> None:
        if self.loop is not loop:
            self.loop, self.requests, self._timed = loop, {}, False
        self.requests[request] = loop.time() + LISTEN_AFTER
        if not self._timed:
            self._time(loop)

    def _time(self, loop: asyncio.AbstractEventLoop) -> None:
        """Look at them soon: one timer for all, not for each that is due a little later."""
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


# --- Signals of a request: Note [Tidying up after a request] --------------------------------------


def where_needed(receiver: Callable[..., None]) -> Callable[..., None]:
    """Call `receiver`, which tidies up all connections, where there is something to tidy up.

    After most requests on the loop there is not: each statement has given its connection back. To
    find that out, Django looks each alias up, and makes it a state.
    """

    @functools.wraps(receiver)
    def called(**kwargs: Any) -> None:
        if not _nothing_to_tidy_up():
            receiver(**kwargs)

    _tidying[id(called)] = called
    return called


#: The receivers that `where_needed()` has made, by identity: somebody's may have no hash.
_tidying: dict[int, Callable[..., None]] = {}


def _nothing_to_tidy_up() -> bool:
    return state.is_at_rest() and not conf.has_foreign_alias()


_SEND, _ASEND = Signal.send, Signal.asend
#: Whether these are Django's own; else they are left as they are.
sends_as_django = djangos(_SEND, _ASEND) is not NO_OTHERS
_LIVE = if_djangos(Signal._live_receivers) if is_on("signals") else None  # noqa: SLF001
#: By signal: what was connected to it when somebody looked, and the receivers that this stands for;
#: none if one of them may come and go, is awaited, or is not for every sender.
_known: dict[Signal, tuple[list[Any], list[Any]]] = {}


def _receivers_of(signal: Any) -> list[Any]:
    """Return the receivers of `signal`, if they are Django's own only; none if others are there."""
    connected, receivers = _known.get(signal, (None, []))
    if connected != signal.receivers:
        connected = [*signal.receivers]
        receivers, _ = signal._live_receivers(None)  # noqa: SLF001
        if len(receivers) < len(connected) or not all(map(_stays, receivers)):
            receivers = []
        _known[signal] = connected, receivers
    return receivers


def _stays(receiver: Any) -> bool:
    """Whether a receiver is a function of a module of Django's, which lives as the process does."""
    if not _is_own(receiver):
        return False
    return id(receiver) in _tidying or receiver.__globals__.get(receiver.__name__) is receiver


def _is_own(receiver: Any) -> bool:
    """Whether a receiver is a function of Django's, or stands for one."""
    return id(receiver) in _tidying or if_djangos(receiver) is not None


def send(signal: Any, sender: Any, **named: Any) -> Any:
    """Send a signal of requests, in the place of `signal.send()`."""
    how = _send if Signal.send is _SEND else Signal.send
    return how(signal, sender, **named)


def _send(signal: Any, sender: Any, **named: Any) -> Any:
    """Do what `Signal.send()` does, without a call of who tidies up if there is nothing to do."""
    if (
        Signal._live_receivers is _LIVE  # noqa: SLF001
        and "_live_receivers" not in signal.__dict__
        and (receivers := _receivers_of(signal))
        and _nothing_to_tidy_up()
    ):
        tidying = _tidying
        return [
            (each, None if id(each) in tidying else each(signal=signal, sender=sender, **named))
            for each in receivers
        ]
    return _SEND(signal, sender, **named)


async def asend(self: Any, sender: Any, **named: Any) -> Any:
    """Do what `Signal.asend()` does; the receivers of requests are told as the note says."""
    if self is not request_started and self is not request_finished:
        return await _ASEND(self, sender, **named)
    return await _tell(functools.partial(_send, self, sender, **named), self, sender, named)


async def close(response: Any) -> None:
    """Call `response.close()`, which sends `request_finished`.

    In the request's thread, if it closes what may block: what a project has made.
    """
    may_block = _closing_may_block(response)
    if not (may_block or bridge.current() is None or conf.has_foreign_alias() or _thread_in_use()):
        response.close()  # with nothing in between, as most are
        return
    sender = response._handler_class  # noqa: SLF001
    await _tell(response.close, request_finished, sender, {}, may_block=may_block)


def _closing_may_block(response: Any) -> bool:
    if not _is_method(response.close, _CLOSE_RESPONSE):
        return True
    for closer in response._resource_closers:  # noqa: SLF001 - most have one: the request's
        if not _is_method(closer, _CLOSE_REQUEST) and not is_all_djangos(closer):
            return True
    return False


_CLOSE_RESPONSE, _CLOSE_REQUEST = HttpResponse.close, ASGIRequest.close


def hop_of_response(func: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Make a `sync_to_async` that keeps its thread but for `response.close()`.

    It writes large bodies to disk, too.
    """
    if getattr(func, "__name__", "") != "close":
        return sync_to_async(func, **options)
    return functools.partial(close, func.__self__)  # type: ignore[attr-defined]


async def _tell(
    tell: Callable[[], Any],
    signal: Signal,
    sender: Any,
    named: dict[str, Any],
    *,
    may_block: bool = False,
) -> Any:
    """Call `tell`, which calls the receivers of a request's signal."""
    thread_in_use = may_block or _thread_in_use()
    if not thread_in_use and not conf.has_foreign_alias():
        return await bridge.run(tell)
    receivers = signal._live_receivers(sender)[0]  # noqa: SLF001
    own = [receiver for receiver in receivers if _is_own(receiver)]
    if not thread_in_use and len(own) == len(receivers):  # no other that may block
        return await bridge.run(tell)
    told = await sync_to_async(tell)()
    for receiver in own:
        await bridge.run(receiver, signal=signal, sender=sender, **named)
    return told


def _thread_in_use() -> bool:
    context = SyncToAsync.thread_sensitive_context.get(None)
    return context is not None and context in SyncToAsync.context_to_thread_executor
