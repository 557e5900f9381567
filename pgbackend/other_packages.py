"""Replaces functions of other packages: channels, django-debug-toolbar and django-silk.

channels' consumers run in a portal, as requests do. The two tools look for statements in the thread
in which Django would execute them; but pgbackend executes an async view's statements on the loop.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from asgiref.local import Local
from asgiref.sync import SyncToAsync, sync_to_async

from . import thread_locals
from .asgi import make_call
from .driver import bridge


def make_call_of_consumer(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return an `AsyncConsumer.__call__()` that runs green, as a view does.

    A synchronous consumer still handles its messages in a thread.
    """
    call_green = make_call(call)

    @functools.wraps(call)
    async def __call__(self: object, scope: object, receive: object, send: object) -> object:
        thread_locals.go_on()  # the modules of consumers are imported late: look for new ones
        return await call_green(self, scope, receive, send)

    return __call__


def make_sync_to_async_of_consumer(original: object) -> Callable[..., Any]:
    """Return a `sync_to_async` for the `close_old_connections` that precedes each message.

    It calls the function green, for the loop's connections; and once more in the one thread that
    all synchronous consumers share, if asgiref has started that thread already.
    """

    def hop(func: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        async def call(*args: object, **kwargs: object) -> None:
            await bridge.run(func, *args, **kwargs)
            if SyncToAsync.single_thread_executor._threads:  # noqa: SLF001 - nothing else tells
                await sync_to_async(func, **options)(*args, **kwargs)

        return call

    return hop


def make_local_of_silk(by_thread: object) -> Local:
    """Return the storage of django-silk's collector, kept by context and not by thread.

    The collector expects all statements of a request in one thread: that of its synchronous
    middleware. pgbackend executes an async view's statements on the loop, among other requests'.
    """
    local = Local()
    for name, value in vars(by_thread).items():
        setattr(local, name, value)
    return local


def make_instrumentation_of_toolbar(enable: Callable[..., Any]) -> Callable[..., Any]:
    """Return an `aenable_instrumentation()`, for the toolbar, that also records on the loop.

    `enable`, the method of the toolbar's SQL panel, records only the statements of synchronous code
    in the thread of its request.
    """

    @functools.wraps(enable)
    async def aenable_instrumentation(self: Any) -> None:
        self.enable_instrumentation()
        await enable(self)

    return aenable_instrumentation
