"""Names what a task works for, in messages: its own name, and the request that it serves.

`served` is set for each request; the tasks that a request starts inherit it. It holds the *scope*
of ASGI, a dictionary, so that to set it costs next to nothing; the text is made when it is needed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextvars import Context, ContextVar
from typing import Any

from .coroutines import name_of

#: The scope of the request that the running code serves.
served: ContextVar[Mapping[str, Any] | None] = ContextVar("pgbackend.served", default=None)


def described(scope: Mapping[str, Any]) -> str:
    """Return the method and the path of the request of `scope`, without its query string.

    Strangers choose the path: a line feed or an escape sequence in it is shown, and not obeyed, by
    the log and by the terminal of who reads a dump.
    """
    text = f"{scope.get('method', scope.get('type'))} {scope.get('path', '')}".rstrip()
    return text if text.isprintable() else "".join(map(_printable, text))


def _printable(char: str) -> str:
    return char if char.isprintable() else repr(char)[1:-1]


def request_of(context: Context | None) -> str | None:
    """Return the request that code in `context` serves; None if it serves none, or is unknown."""
    scope = None if context is None else context.get(served)
    return None if scope is None else described(scope)


def context_of(task: asyncio.Task[Any]) -> Context | None:
    """Return the context of `task`; None if Python 3.11 does not tell."""
    if hasattr(task, "get_context"):  # since Python 3.12
        context: Context = task.get_context()
        return context
    # The future that the task waits for is to wake it, in its context.
    waits_for = getattr(task, "_fut_waiter", None)
    for callback, context in getattr(waits_for, "_callbacks", None) or ():
        if getattr(callback, "__self__", None) is task:
            return context
    return None


def task_and_request(task: asyncio.Task[Any], context: Context | None = None) -> str:
    """Return the name of `task`, with the request that it serves, if it serves any.

    `context` is the context of `task`, if the caller knows it.
    """
    request = request_of(context or context_of(task))
    return repr(name_of(task)) if request is None else f"{name_of(task)!r} ({request})"
