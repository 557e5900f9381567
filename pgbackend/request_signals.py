"""Calls the receivers of `request_started` and `request_finished`, and closes the response.

Note [Tidying up after a request]
The receivers of `request_started` and `request_finished` tidy up what a request has used, in the
thread that calls them: `close_old_connections`, `reset_queries`. A request may have used its
database green, and in a thread (a sync view or middleware). So each receiver is called once: in
the request's thread if it has one, as in Django, else in place, because no thread is worth
starting for it. In the first case Django's own are called in place too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any
from weakref import ReferenceType

from asgiref.sync import SyncToAsync, sync_to_async
from django.core.handlers.asgi import ASGIRequest
from django.core.signals import request_finished, request_started
from django.db import close_old_connections, reset_queries
from django.dispatch import Signal
from django.http import HttpResponse

from . import conf, state
from .driver import bridge
from .patches import NO_OTHERS, if_unpatched, unpatched
from .threads import is_all_djangos

# --- The receivers of Django's that tidy up -------------------------------------------------------


def replace_receivers(receivers: list[Any]) -> list[Any]:
    """Return the receivers of a signal, with Django's own called only if there is work for them.

    The key of each stays: Django's tests disconnect the receiver, and connect it again.
    """
    replaced = list(receivers)
    for place, (key, connected, *rest) in enumerate(receivers):
        receiver = connected() if isinstance(connected, ReferenceType) else None
        if receiver is close_old_connections or receiver is reset_queries:
            replaced[place] = (key, _where_needed(receiver), *rest)
    return replaced


def _where_needed(receiver: Callable[..., None]) -> Callable[..., None]:
    """Call `receiver`, which tidies up all connections, where there is something to tidy up.

    After most requests on the loop there is not: each statement has given its connection back. To
    find that out, Django looks each alias up, and makes it a state.
    """

    @functools.wraps(receiver)
    def called(**kwargs: object) -> None:
        if not nothing_to_tidy_up():
            receiver(**kwargs)

    tidying[id(called)] = called
    return called


#: The receivers that `_where_needed()` has made, by identity: others may have no hash.
tidying: dict[int, Callable[..., None]] = {}


def nothing_to_tidy_up() -> bool:
    """Return whether the running request has left no database for a receiver to tidy up."""
    return state.is_at_rest() and not conf.has_foreign_alias()


def is_djangos_receiver(receiver: object) -> bool:
    """Return whether a receiver is a function of Django's, or stands for one."""
    return id(receiver) in tidying or if_unpatched(receiver) is not None


# --- Sending --------------------------------------------------------------------------------------


_SEND, _ASEND = Signal.send, Signal.asend
#: Whether these are Django's own; else they are left as they are.
sends_as_django = unpatched(_SEND, _ASEND) is not NO_OTHERS

#: Call the receivers of a signal of requests: a seam. Django's `Signal.send()` asks each whether it
#: lives; the shortcut ``signals`` remembers them.
send: Callable[..., Any] = _SEND


def make_asend(djangos: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `Signal.asend()` that calls the receivers of requests as the note says."""
    return _asend if sends_as_django else djangos


async def _asend(self: Signal, sender: object, **named: object) -> object:
    if self is not request_started and self is not request_finished:
        return await _ASEND(self, sender, **named)
    return await _tell(functools.partial(send, self, sender, **named), self, sender, named)


_asend.__wrapped__ = _ASEND  # type: ignore[attr-defined]


async def _tell(
    tell: Callable[[], Any],
    signal: Signal,
    sender: object,
    named: dict[str, Any],
    *,
    may_block: bool = False,
) -> object:
    """Call `tell`, which calls the receivers of a request's signal."""
    thread_in_use = may_block or _thread_in_use()
    if not thread_in_use and not conf.has_foreign_alias():
        return await bridge.run(tell)
    receivers = signal._live_receivers(sender)[0]  # noqa: SLF001 - `send()` does not tell them
    own = [receiver for receiver in receivers if is_djangos_receiver(receiver)]
    if not thread_in_use and len(own) == len(receivers):  # no other that may block
        return await bridge.run(tell)
    told = await sync_to_async(tell)()
    for receiver in own:
        await bridge.run(receiver, signal=signal, sender=sender, **named)
    return told


def _thread_in_use() -> bool:
    """Return whether the running request has a thread for its synchronous code, as in Django."""
    context = SyncToAsync.thread_sensitive_context.get(None)
    return context is not None and context in SyncToAsync.context_to_thread_executor


# --- Closing the response -------------------------------------------------------------------------


def make_sync_to_async(original: object) -> Callable[..., Any]:
    """Return the `sync_to_async` of a handler, which does without its thread for `close()`."""
    return _hop_of_response


def _hop_of_response(func: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Keep the thread, but for `response.close()`: a handler writes large bodies to disk, too."""
    if getattr(func, "__name__", "") != "close":
        return sync_to_async(func, **options)
    return functools.partial(close, func.__self__)  # type: ignore[attr-defined]


async def close(response: Any) -> None:
    """Call `response.close()`, which sends `request_finished`.

    In the request's thread, if it closes what may block: what a project has made.
    """
    may_block = _closing_may_block(response)
    if not (may_block or bridge.current() is None or conf.has_foreign_alias() or _thread_in_use()):
        response.close()  # with nothing in between, as most are
        return
    sender = response._handler_class  # noqa: SLF001 - as `response.close()` does
    await _tell(response.close, request_finished, sender, {}, may_block=may_block)


def _closing_may_block(response: Any) -> bool:
    if not is_method(response.close, _CLOSE_RESPONSE):
        return True
    for closer in response._resource_closers:  # noqa: SLF001 - most have one: the request's
        if not is_method(closer, _CLOSE_REQUEST) and not is_all_djangos(closer):
            return True
    return False


_CLOSE_RESPONSE, _CLOSE_REQUEST = HttpResponse.close, ASGIRequest.close


def is_method(method: object, function: object) -> bool:
    """Return whether a method is still this function: it may have been overridden, or patched."""
    return type(method) is MethodType and method.__func__ is function
