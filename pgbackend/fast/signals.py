"""Remembers the receivers of a request's signals while they stay the same: the shortcut `signals`.

At each request, Django asks which receivers are still alive, and calls those that tidy up, although
most have nothing to do: see Note [Tidying up after a request] in pgbackend/request_signals.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from django.core.signals import request_finished, request_started
from django.dispatch import Signal

from pgbackend import hooks, request_signals
from pgbackend.hooks import Hook
from pgbackend.patches import if_unpatched
from pgbackend.request_signals import (
    is_djangos_receiver,
    nothing_to_tidy_up,
    sends_as_django,
    tidying,
)


def install() -> None:
    """Let handlers, and all other code, send the two signals of requests by `_send()`."""
    if not sends_as_django:
        return
    request_signals.send = _send
    signals = {"request_started": request_started, "request_finished": request_finished}
    for name, signal in signals.items():
        hooks.HOOKS.append(
            Hook(
                f"django.core.signals:{name}",
                "send",
                partial(_replace_send, signal),
                "Each request would ask each receiver whether it lives, and whether it has work.",
            )
        )


def _replace_send(signal: Signal, original: Any) -> Callable[..., Any]:
    return partial(send, signal)


_SEND = Signal.send
_LIVE = if_unpatched(Signal._live_receivers)  # noqa: SLF001 - to notice a patch
#: By signal: a copy of its `receivers`, and the functions to call for every sender. There are no
#: functions if a receiver is not a function of Django's that lives as long as its module.
_known: dict[Signal, tuple[list[Any], list[Any]]] = {}


def send(signal: Any, sender: Any, **named: Any) -> Any:
    """Do what `signal.send()` does; replaces that method on the two signals of requests."""
    how = _send if Signal.send is _SEND else Signal.send
    return how(signal, sender, **named)


def _send(signal: Any, sender: Any, **named: Any) -> Any:
    """Do what `Signal.send()` does, but do not call receivers that have nothing to tidy up."""
    if (
        Signal._live_receivers is _LIVE  # noqa: SLF001
        and "_live_receivers" not in signal.__dict__
        and (receivers := _receivers_of(signal))
        and nothing_to_tidy_up()
    ):
        theirs = tidying
        return [
            (each, None if id(each) in theirs else each(signal=signal, sender=sender, **named))
            for each in receivers
        ]
    return _SEND(signal, sender, **named)


def _receivers_of(signal: Any) -> list[Any]:
    """Return the receivers of `signal`; an empty list if `_stays()` is False for one of them."""
    connected, receivers = _known.get(signal, (None, []))
    if connected != signal.receivers:
        connected = [*signal.receivers]
        receivers, _ = signal._live_receivers(None)  # noqa: SLF001
        if len(receivers) < len(connected) or not all(map(_stays, receivers)):
            receivers = []
        _known[signal] = connected, receivers
    return receivers


def _stays(receiver: Any) -> bool:
    """Return whether a receiver is a function of Django's that lives as long as its module."""
    if not is_djangos_receiver(receiver):
        return False
    return id(receiver) in tidying or receiver.__globals__.get(receiver.__name__) is receiver
