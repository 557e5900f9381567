"""`listen()` and `notify()`: PostgreSQL's LISTEN and NOTIFY, for any number of listeners."""

from __future__ import annotations

import asyncio
import inspect
import logging
import weakref
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self, overload

from django.db import DEFAULT_DB_ALIAS, NotSupportedError, connections
from django.utils.connection import ConnectionDoesNotExist

from .aio import detached
from .conf import wrapper_is_ours
from .driver import bridge
from .driver.listening import Hub
from .driver.mailboxes import QUEUE_SIZE, Gap, Mailbox, Notification

__all__ = ["CallbackListener", "Gap", "Listener", "Notification", "anotify", "listen", "notify"]

logger = logging.getLogger("pgbackend")

#: Called with each item; a coroutine function is awaited.
Callback = Callable[[Notification | Gap], Awaitable[object] | object]

#: PostgreSQL's limits, in bytes.
_LONGEST_CHANNEL = 63
_LONGEST_PAYLOAD = 7999


@overload
def listen(
    *channels: str,
    callback: Callback,
    using: str = DEFAULT_DB_ALIAS,
    queue_size: int = QUEUE_SIZE,
) -> CallbackListener: ...


@overload
def listen(
    *channels: str,
    callback: None = None,
    using: str = DEFAULT_DB_ALIAS,
    queue_size: int = QUEUE_SIZE,
) -> Listener: ...


def listen(
    *channels: str,
    callback: Callback | None = None,
    using: str = DEFAULT_DB_ALIAS,
    queue_size: int = QUEUE_SIZE,
) -> Listener | CallbackListener:
    """Return a listener to `channels`, of the database `using`, for the running event loop.

    An example::

        async with pgbackend.listen("orders") as items:
            async for item in items:
                match item:
                    case pgbackend.Gap():
                        ...  # read the state anew: at the start, and after a lost connection
                    case pgbackend.Notification(payload=payload):
                        ...

    The first item is always a `Gap`. The ``async with`` may be left out. With `callback`, a
    function or a coroutine function, the items are passed to that, one after the other, while the
    ``async with`` lasts. All listeners of a loop and an alias share one connection.

    A listener that has `queue_size` items to take gets a `Gap` in the place of all of them.
    """
    if not channels:
        raise TypeError("listen() needs the name of at least one channel")
    for channel in channels:
        _check_channel(channel)
    if type(queue_size) is not int or queue_size < 1:
        raise ValueError(f"queue_size is {queue_size!r}: it must be a whole number, at least 1")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback is {callback!r}: it must be a function")
    _check_alias(using)
    listener = Listener(channels, using, queue_size)
    return listener if callback is None else CallbackListener(listener, callback)


class _Startable:
    """A base of listeners: each listens from `start()` to `aclose()`, or for an ``async with``."""

    async def start(self) -> None:
        raise NotImplementedError

    async def aclose(self) -> None:
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        await self.aclose()


class Listener(_Startable):
    """An asynchronous iterator of `Notification` and `Gap`, and a context manager; see `listen()`.

    It listens from its start: the ``async with``, or the first step of the iteration. It ends with
    `aclose()`, at the end of the ``async with``, and when it is dropped.
    """

    def __init__(self, channels: tuple[str, ...], using: str, queue_size: int) -> None:
        self.channels: tuple[str, ...] = channels
        self.using: str = using
        self._mailbox = Mailbox(channels, queue_size)
        self._hub: Hub | None = None

    async def start(self) -> None:
        """Return when LISTEN is in force: no notification of later transactions is missed.

        Raises the database's error if it cannot be, and `RuntimeError` after that or `aclose()`.
        """
        wrapper: Any = connections[self.using]
        if self._mailbox.closed:
            raise RuntimeError(
                "this listener is closed, for good: make another one by listen()"
            ) from self._mailbox.error
        if self._hub is None:
            self._hub = wrapper.listening_hub()
            # A listener that is dropped leaves, also if the garbage collector finds it elsewhere.
            weakref.finalize(self, self._hub.leave_soon, self._mailbox).atexit = False
        self._check_loop(self._hub)
        with wrapper.wrap_database_errors:
            await self._hub.join(self._mailbox)

    def _check_loop(self, hub: Hub) -> None:
        if hub.loop is not asyncio.get_running_loop():
            raise RuntimeError("this listener belongs to another event loop: make one on each loop")

    async def aclose(self) -> None:
        """Leave; a task that waits for the next item sees the end of the iteration."""
        if self._hub is not None:
            self._check_loop(self._hub)
            self._hub.leave(self._mailbox)
        else:
            self._mailbox.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Notification | Gap:
        if not self._mailbox.started and not self._mailbox.closed:
            await self.start()
        elif self._hub is not None:
            self._check_loop(self._hub)
        with connections[self.using].wrap_database_errors:
            return await self._mailbox.take()


class CallbackListener(_Startable):
    """Passes the items of a listener to a function, from `start()` to `aclose()`; see `listen()`.

    The function runs in a task of its own, in the context in which it was started but outside of
    its transactions, and green: a synchronous function may use the ORM. Its errors are logged.
    """

    def __init__(self, listener: Listener, callback: Callback) -> None:
        self.channels: tuple[str, ...] = listener.channels
        self.using: str = listener.using
        self._listener = listener
        self._callback = callback
        self._is_begun = False
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Return when LISTEN is in force, and call the function with each item from now on."""
        if self._is_begun:
            raise RuntimeError("this listener has been started already")
        self._is_begun = True
        try:
            await self._listener.start()
        except BaseException:
            self._is_begun = False  # so the next call tells why it cannot begin
            raise
        self._task = asyncio.create_task(self._run(), name=f"pgbackend listens {self._name()}")
        _tasks.add(self._task)
        self._task.add_done_callback(_tasks.discard)

    async def aclose(self) -> None:
        """Leave; return when the function has ended that is being called, if any."""
        await self._listener.aclose()
        task = self._task
        if task is not None and task is not asyncio.current_task():
            await asyncio.wait([task])

    def _name(self) -> str:
        return str(getattr(self._callback, "__qualname__", self._callback))

    async def _run(self) -> None:
        # Made in the task: it may be cancelled before its first turn.
        await bridge.portal(detached(self._pump()))

    async def _pump(self) -> None:
        try:
            async for item in self._listener:
                await self._call(item)
        except Exception:  # the connection was closed by close_pool()
            logger.exception("the callback %s gets no more notifications", self._name())
        finally:
            await self._listener.aclose()

    async def _call(self, item: Notification | Gap) -> None:
        try:
            result = self._callback(item)
            if inspect.isawaitable(result):
                await result
        except (Exception, asyncio.CancelledError) as exc:
            task = asyncio.current_task()
            if isinstance(exc, asyncio.CancelledError) and task is not None and task.cancelling():
                raise  # else the function has awaited something else that was cancelled
            logger.exception("the callback %s has failed with %r", self._name(), item)


#: The tasks that call functions: a loop keeps weak references only.
_tasks: set[asyncio.Task[None]] = set()


def notify(channel: str, payload: str = "", *, using: str = DEFAULT_DB_ALIAS) -> None:
    """Send a notification, by the connection of the running code; `anotify()` does so by `await`.

    Inside `atomic()`, it is delivered if the transaction commits, and when it does.
    """
    _check_channel(channel)
    _check_payload(payload)
    connection = connections[using]
    if connection.vendor != "postgresql":
        raise NotSupportedError(f"notify() needs PostgreSQL; {using!r} is {connection.vendor}")
    if not wrapper_is_ours(connection):
        _send(connection, channel, payload)
        return
    ours: Any = connection
    with ours.backend_statement(_NOTIFY):
        _send(ours, channel, payload)


async def anotify(channel: str, payload: str = "", *, using: str = DEFAULT_DB_ALIAS) -> None:
    """Send a notification, as `notify()` does."""
    await bridge.run(notify, channel, payload, using=using)


_NOTIFY = "SELECT pg_notify(%s, %s)"


def _send(connection: Any, channel: str, payload: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(_NOTIFY, [channel, payload])


def _check_alias(using: str) -> None:
    if using not in connections.settings:
        raise ConnectionDoesNotExist(f"The connection '{using}' doesn't exist.")  # Django's words
    if not wrapper_is_ours(connections[using]):
        raise NotSupportedError(
            f"listen() needs pgbackend: set DATABASES[{using!r}]['ENGINE'] to 'pgbackend'"
        )


def _check_channel(channel: object) -> None:
    _check_text("the channel", channel)
    size = len(str(channel).encode())
    if not 0 < size <= _LONGEST_CHANNEL:
        raise ValueError(
            f"the channel {channel!r} has {size} bytes: PostgreSQL takes 1 to {_LONGEST_CHANNEL}"
        )


def _check_payload(payload: object) -> None:
    _check_text("the payload", payload)
    size = len(str(payload).encode())
    if size > _LONGEST_PAYLOAD:
        raise ValueError(
            f"the payload has {size} bytes, and PostgreSQL takes {_LONGEST_PAYLOAD}: store the "
            "data in a table, and send its key"
        )


def _check_text(what: str, text: object) -> None:
    if not isinstance(text, str):
        raise TypeError(f"{what} is a {type(text).__name__}: it must be a text")
    if "\0" in text or (not text.isascii() and _has_surrogate(text)):
        raise ValueError(f"{what} has a character that PostgreSQL's texts cannot have")


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in text)
