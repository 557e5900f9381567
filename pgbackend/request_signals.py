"""Call the receivers of `request_started` and `request_finished`, and close the response.

Note [Tidying up after a request]
`close_old_connections` and `reset_queries`, Django's own receivers of `request_started` and
`request_finished`, tidy up the connections of the thread that calls them. A request may have used
its database both in green code and in a thread (a sync view or middleware). So the receivers are
called in the request's thread, as in Django, if the request has one; then Django's own are called
on the loop as well. If it has none, they are called on the loop only; a thread is started for them
only if they, or the end of the response, may block the loop. A request of
`pgbackend.get_asgi_application()` calls all of them on the loop; if a `sync_to_async()` of the
project's has given it a thread, Django's own receivers are called there as well.
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
from .request import is_whole_stack
from .threads import is_all_djangos

# --- The receivers of Django's that tidy up -------------------------------------------------------


def replace_receivers(receivers: list[Any]) -> list[Any]:
    """Return a copy of a signal's `receivers` in which Django's two run only if they have work.

    Their lookup keys stay the same, so that `disconnect()` finds them: Django's tests call it.
    """
    replaced = list(receivers)
    for place, (key, connected, *rest) in enumerate(receivers):
        receiver = connected() if isinstance(connected, ReferenceType) else None
        if receiver is close_old_connections or receiver is reset_queries:
            replaced[place] = (key, _where_needed(receiver), *rest)
    return replaced


def _where_needed(receiver: Callable[..., None]) -> Callable[..., None]:
    """Return a receiver that calls `receiver` only if there is something to tidy up.

    After most requests on the loop there is nothing: each statement has given its connection back.
    Django's `receiver` would look up the wrapper and make a state for each alias to find that out.
    """

    @functools.wraps(receiver)
    def called(**kwargs: object) -> None:
        if not nothing_to_tidy_up():
            receiver(**kwargs)

    tidying[id(called)] = called
    return called


#: The receivers that `_where_needed()` has made, by `id()`: other receivers may not be hashable.
tidying: dict[int, Callable[..., None]] = {}


def nothing_to_tidy_up() -> bool:
    """Return whether no database needs tidying up after the running request."""
    return state.is_at_rest() and not conf.has_foreign_alias()


def is_djangos_receiver(receiver: object) -> bool:
    """Return whether `receiver` is a function of Django's, or wraps one of Django's."""
    return id(receiver) in tidying or if_unpatched(receiver) is not None


# --- Sending --------------------------------------------------------------------------------------


_SEND, _ASEND = Signal.send, Signal.asend
#: Whether both methods are Django's own; if another package has patched one, neither is replaced.
sends_as_django = unpatched(_SEND, _ASEND) is not NO_OTHERS

#: A seam: calls the receivers of a request's signal. Django's `Signal.send()` checks each time
#: which of them are alive; the shortcut ``signals`` caches the receivers.
send: Callable[..., Any] = _SEND


def make_asend(djangos: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `Signal.asend()` that does what Note [Tidying up after a request] says.

    Return `djangos`, the method to be replaced, if another package has patched that.
    """
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
    """Call `tell`, which sends `signal`, on the loop or in a thread; return its result.

    If `may_block`, `tell` also does other things that may block, and so needs a thread. See Note
    [Tidying up after a request].
    """
    if is_whole_stack():
        told = await bridge.run(tell)
        if _thread_in_use():
            for receiver in _djangos(signal._live_receivers(sender)[0]):  # noqa: SLF001 - as below
                await sync_to_async(receiver)(signal=signal, sender=sender, **named)
        return told
    thread_in_use = may_block or _thread_in_use()
    if not thread_in_use and not conf.has_foreign_alias():
        return await bridge.run(tell)
    receivers = signal._live_receivers(sender)[0]  # noqa: SLF001 - no public method lists them
    own = _djangos(receivers)
    if not thread_in_use and len(own) == len(receivers):  # no other receiver, which may block
        return await bridge.run(tell)
    told = await sync_to_async(tell)()
    for receiver in own:
        await bridge.run(receiver, signal=signal, sender=sender, **named)
    return told


def _djangos(receivers: list[Any]) -> list[Any]:
    return [receiver for receiver in receivers if is_djangos_receiver(receiver)]


def _thread_in_use() -> bool:
    """Return whether the running request has a thread for its synchronous code, as in Django."""
    context = SyncToAsync.thread_sensitive_context.get(None)
    return context is not None and context in SyncToAsync.context_to_thread_executor


# --- Closing the response -------------------------------------------------------------------------


def make_sync_to_async(original: object) -> Callable[..., Any]:
    """Return a `sync_to_async` for Django's handlers that needs no thread for most `close()`s."""
    return _hop_of_response


def _hop_of_response(func: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Return an async `close()` if `func` closes a response; else return `sync_to_async(func)`.

    Handlers also use `sync_to_async` to write large bodies to disk, which must not block the loop.
    """
    if getattr(func, "__name__", "") != "close":
        return sync_to_async(func, **options)
    return functools.partial(close, func.__self__)  # type: ignore[attr-defined]


async def close(response: Any) -> None:
    """Call `response.close()`, which sends `request_finished`, on the loop or in a thread.

    A thread is needed if the request has used one, or if the call also closes an object of the
    project's, which may block.
    """
    may_block = not is_whole_stack() and _closing_may_block(response)
    if not (may_block or bridge.current() is None or conf.has_foreign_alias() or _thread_in_use()):
        response.close()  # directly: the usual case
        return
    sender = response._handler_class  # noqa: SLF001 - as `response.close()` does
    await _tell(response.close, request_finished, sender, {}, may_block=may_block)


def _closing_may_block(response: Any) -> bool:
    if not is_method(response.close, _CLOSE_RESPONSE):
        return True
    for closer in response._resource_closers:  # noqa: SLF001 - most have one: `request.close()`
        if not is_method(closer, _CLOSE_REQUEST) and not is_all_djangos(closer):
            return True
    return False


_CLOSE_RESPONSE, _CLOSE_REQUEST = HttpResponse.close, ASGIRequest.close


def is_method(method: object, function: object) -> bool:
    """Return whether `method` is `function`, bound to an object: neither overridden nor patched."""
    return type(method) is MethodType and method.__func__ is function
