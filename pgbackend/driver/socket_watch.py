"""The readiness of a socket, as one event loop sees it.

A `Watch` parks a portal until its socket can be read or written. The reader stays registered with
the loop between waits, since adding and removing it costs two system calls. Data that arrives when
nobody waits (most often the last message of a server that closes the connection) is not read; the
reader is then unregistered.

Note [Errors of a socket]
asyncio's own loops report an error of the socket (the server reset it) for as long as the socket is
registered. uvloop reports an error once, as readiness, and then ends the registration, though there
may be data to read before the error. So with uvloop, each report is followed by a poll of the
socket for errors; if there is one, the next wait registers the socket anew.

Note [Told twice]
asyncio's own loops poll the sockets again before the task that was woken can read. So they report
the same data a second time, when the task waits for more data, or no longer waits. The second
report is ignored. If it was about new data, the loop reports that once more.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
from time import monotonic
from typing import Any

from psycopg.waiting import Ready, Wait

from .bridge import Portal


class Watch:
    """One socket's registration with one event loop, by which a portal waits for the socket."""

    # fmt: off
    __slots__ = (
        "errors", "fd", "future", "loop", "reading", "ready", "since", "told", "writing",
    )
    # fmt: on

    def __init__(self, loop: asyncio.AbstractEventLoop, fd: int) -> None:
        self.loop = loop
        self.fd = fd
        self.future: asyncio.Future[Any] | None = None
        #: When the statement in flight began, or the last one ended, by `monotonic()`.
        self.since = 0.0
        self.reading = False
        self.writing = False
        self.ready = 0
        #: Whether the loop will report the same data once more; see Note [Told twice].
        self.told = False
        self.errors: select.poll | None = None
        if not isinstance(loop, asyncio.BaseEventLoop):
            self.errors = select.poll()
            self.errors.register(fd, 0)  # for errors only, which poll() always reports

    def wait(self, portal: Portal, state: int, timeout: float | None) -> int:
        """Park `portal` until the socket is ready for `state`, a `Wait`; return its `Ready` state.

        Returns 0 if `timeout` (seconds) passed first.
        """
        self.ready = 0
        if state & Wait.R and not self.reading:
            self.loop.add_reader(self.fd, self._on_readable)
            self.reading = True
        if state & Wait.W:
            self.loop.add_writer(self.fd, self._on_writable)
            self.writing = True
        self.future = future = self.loop.create_future()
        timer = None if timeout is None else self.loop.call_later(timeout, self._wake, 0)
        try:
            portal.wait_for(future)
        finally:
            self.future = None
            if timer is not None:
                timer.cancel()
            if self.writing:
                self._stop_writing()
        return self.ready

    def _stop_writing(self) -> None:
        self.writing = False
        if not self.loop.is_closed():
            self.loop.remove_writer(self.fd)

    def _wake(self, ready: int) -> None:
        self.ready |= ready
        if self.future is not None and not self.future.done():
            self.future.set_result(None)

    def _on_readable(self) -> None:
        if self.told:
            self.told = False
        elif self.future is None:
            # Nobody waits here: a thread reads this connection, or the server has closed it. The
            # next lease finds out (`AsyncConnection.is_alive`).
            self.stop()
        else:
            if self.errors is None:
                self.told = True
            elif self.errors.poll(0):  # Note [Errors of a socket]
                self.stop()
            self._wake(Ready.R)

    def _on_writable(self) -> None:
        self._wake(Ready.W)

    def leave(self) -> None:
        """Unregister, because a thread is about to wait for the socket itself, and may close it.

        From another thread, the loop is only asked to do so.
        """
        self.since = monotonic()
        if not self.reading or self.loop.is_closed():
            return
        if asyncio._get_running_loop() is self.loop:
            self.stop()
        else:
            self.loop.call_soon_threadsafe(self._stop_if_unused)

    def is_elsewhere(self) -> bool:
        """Return whether the loop runs in another thread than the caller's."""
        return asyncio._get_running_loop() is not self.loop and self.loop.is_running()

    def _stop_if_unused(self) -> None:
        if self.future is None:
            self.stop()

    def stop(self) -> None:
        """Unregister from the loop; call this before the socket is closed.

        Otherwise the registration would apply to the next socket with the same number. A task that
        still waits here, while another one closes the connection, is woken and finds it closed.
        From another thread, the loop is only asked to do so.
        """
        if self.is_elsewhere():
            if self.reading or self.future is not None:
                with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                    self.loop.call_soon_threadsafe(self.stop)
            return
        self._wake(Ready.R)
        if self.reading:
            self.reading = self.told = False
            if not self.loop.is_closed():
                self.loop.remove_reader(self.fd)
        if self.writing:
            self._stop_writing()
