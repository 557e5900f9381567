"""Sends server-sent events: the wire format, a stream's readers, and the hub that feeds them."""

import asyncio
import json
from weakref import WeakSet

from django.http import StreamingHttpResponse

HEARTBEAT = 15  # seconds; proxies drop a connection that is silent for over a minute or so
RETRY = 2000  # milliseconds until a browser that lost the stream comes back

_watchers = WeakSet()


def event(name, data):
    """Format one event of the stream; JSON has no line break, so one ``data`` line is enough."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def end_all():
    """End the streams that this loop serves, so that the server need not wait for them to go."""
    loop = asyncio.get_running_loop()
    for watcher in [watcher for watcher in _watchers if watcher.loop is loop]:
        watcher.end()


class Watcher:
    """Queues events for one reader, up to a bound.

    A reader that falls behind gets one ``refresh`` in place of all the events it missed: the page
    then asks for the present state. Iterating yields the stream's text.
    """

    def __init__(self, *, on_close, wants=lambda data: True, size=64):
        self.loop = asyncio.get_running_loop()
        self._queue = asyncio.Queue(size)
        self._on_close = on_close
        self._wants = wants
        _watchers.add(self)

    def put(self, name, data):
        if not self._wants(data):
            return
        if self._queue.full():
            self._empty()
            name, data = "refresh", {}
        self._queue.put_nowait((name, data))

    def end(self):
        """End the stream, because the server is stopping."""
        self._empty()
        self._queue.put_nowait(None)

    def close(self):
        """Forget the reader. Django calls this too, in a thread of its own, as a last resort."""
        on_close, self._on_close = self._on_close, None
        if on_close is not None and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(on_close, self)

    async def __aiter__(self):
        try:
            yield f"retry: {RETRY}\n\n"
            while (item := await self._next()) is not None:
                yield event(*item) if item else ": still here\n\n"
        finally:
            self.close()

    async def _next(self):
        """Return the next (name, data), ``()`` at a heartbeat, ``None`` at the end."""
        try:
            async with asyncio.timeout(HEARTBEAT):
                return await self._queue.get()
        except TimeoutError:
            return ()

    def _empty(self):
        while not self._queue.empty():
            self._queue.get_nowait()


class Hub:
    """Feeds many watchers by one task, which starts with the first and stops with the last."""

    def __init__(self):
        self._watchers = set()
        self._task = None

    @property
    def watchers(self):
        return len(self._watchers)

    def watch(self, **kwargs):
        watcher = Watcher(on_close=self._leave, **kwargs)
        self._watchers.add(watcher)
        if self._task is None:
            self._task = asyncio.create_task(self._feed(), name=f"{type(self).__name__} feed")
        return watcher

    def tell(self, name, data):
        for watcher in self._watchers:
            watcher.put(name, data)

    async def aclose(self):
        task = self._task
        for watcher in list(self._watchers):
            watcher.end()
            self._leave(watcher)
        if task is not None:
            await asyncio.wait([task])

    async def _feed(self):
        """Call ``tell`` for each piece of news, until cancelled."""
        raise NotImplementedError

    def _leave(self, watcher):
        self._watchers.discard(watcher)
        if not self._watchers and self._task is not None:
            self._task.cancel()
            self._task = None


def stream(watcher):
    """Return the response that sends the events of ``watcher`` until either side hangs up."""
    response = StreamingHttpResponse(watcher, content_type="text/event-stream")
    response["Cache-Control"] = "no-store"
    response["X-Accel-Buffering"] = "no"  # else nginx collects events instead of passing them on
    return response
