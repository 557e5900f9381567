"""A connection that listens: it passes notifications on, and runs short commands in between.

psycopg's own `notifies()` holds the connection while it waits, so no LISTEN could be added; and a
cancelled wait of psycopg's sends a request to cancel. So psycopg opens the connection, and this
module waits for its socket: the reader stays registered with the loop, as in socket_watch.py, whose
Note [Errors of a socket] holds here, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
from collections.abc import Callable, Generator
from typing import Any, Self

import psycopg
from psycopg import generators
from psycopg.abc import PQGenConn
from psycopg.pq import ExecStatus
from psycopg.waiting import Ready, Wait

from .asking import ConnectArguments
from .connecting import note_host

#: Seconds within which the server must answer a command; it is as good as lost otherwise.
ANSWER_LIMIT = 10.0

#: Called with the channel, the payload and the sender's process.
Heard = Callable[[str, str, int], None]


class _Opening(psycopg.AsyncConnection[Any]):
    @classmethod
    def _connect_gen(cls, conninfo: str = "", **kwargs: Any) -> PQGenConn[Self]:
        note_host(conninfo)  # psycopg calls this for one host after the other
        return super()._connect_gen(conninfo, **kwargs)


class Link:
    """An open connection that listens to `channels`."""

    def __init__(self, connection: _Opening, heard: Heard, lost: Callable[[], None]) -> None:
        self.channels: set[str] = set()
        #: Why the connection was lost; None while it serves.
        self.failure: Exception | None = None
        self._connection = connection  # psycopg warns of one that is dropped without being closed
        self._pgconn = connection.pgconn
        self.pid = self._pgconn.backend_pid
        self._heard, self._lost = heard, lost
        self._loop = asyncio.get_running_loop()
        self._fd = self._pgconn.socket
        #: The future of the command in flight, and whether there is one.
        self._waiter: asyncio.Future[int] | None = None
        self._commanding = False
        self._errors: select.poll | None = None
        if not isinstance(self._loop, asyncio.BaseEventLoop):
            self._errors = select.poll()
            self._errors.register(self._fd, 0)
        self._pgconn.notify_handler = self._pass_on
        self._loop.add_reader(self._fd, self._on_readable)
        #: Whether the loop knows the socket. libpq closes it by itself if it breaks in a command.
        self._is_reading = True

    @classmethod
    async def open(
        cls, arguments: ConnectArguments, heard: Heard, lost: Callable[[], None]
    ) -> Link:
        """Connect; `heard` is called with each notification, and `lost` when the link breaks."""
        connection = await _Opening.connect(**arguments)
        return cls(connection, heard, lost)

    @property
    def closed(self) -> bool:
        """Return whether the connection is closed, or was lost."""
        return self._connection.closed or self.failure is not None

    def close(self) -> None:
        """Close the connection, whatever it does."""
        self._stop_reading()
        self._pgconn.finish()

    def _stop_reading(self) -> None:
        """Let the loop forget the socket; only once, since another may get its number."""
        is_reading, self._is_reading = self._is_reading, False
        if is_reading and not self._loop.is_closed():
            self._loop.remove_reader(self._fd)
            self._loop.remove_writer(self._fd)

    # --- Notifications ---

    def _on_readable(self) -> None:
        if self._commanding:
            self._wake(Ready.R)
            return
        try:
            for _ in range(self._reads()):
                self._pgconn.consume_input()
            while (notify := self._pgconn.notifies()) is not None:
                self._pass_on(notify)
        except psycopg.Error as exc:
            self._break(exc)

    def _reads(self) -> int:
        """Return how often to read, lest something stays of which the loop tells nothing.

        That may be an error, which uvloop does not report again; or the rest of a TLS record of up
        to 16 kB, of which libpq reads at least 8 kB at a time.
        """
        has_error = self._errors is not None and bool(self._errors.poll(0))
        return 3 if has_error or self._pgconn.ssl_in_use else 1

    def _pass_on(self, notify: psycopg.pq.PGnotify) -> None:
        # The encoding is UTF-8; a server without one (SQL_ASCII) may send anything.
        channel, payload = notify.relname.decode(), notify.extra.decode(errors="replace")
        self._heard(channel, payload, notify.be_pid)

    def _break(self, exc: Exception) -> None:
        self.failure = exc.with_traceback(None)
        self._stop_reading()
        self._lost()

    # --- Commands ---

    async def run(self, command: str) -> None:
        """Run `command`; raise the server's error, or `TimeoutError` if it does not answer.

        The link must be closed if this is cancelled, or raises another error than the server's.
        """
        self._commanding = True
        try:
            self._pgconn.send_query(command.encode())
            async with asyncio.timeout(ANSWER_LIMIT):
                results = await self._drive(generators.execute(self._pgconn))
        finally:
            self._commanding = False
        for result in results:
            if result.status == ExecStatus.FATAL_ERROR:
                raise psycopg.errors.error_from_result(result, encoding="utf-8")

    async def _drive(self, steps: Generator[Any, Any, Any]) -> Any:
        """Run `steps`, a generator of psycopg's, and return its result."""
        try:
            state = next(steps)
            while True:
                state = steps.send(await self._wait(state))
        except StopIteration as done:
            return done.value

    async def _wait(self, state: int) -> int:
        self._waiter = self._loop.create_future()
        self._loop.add_reader(self._fd, self._on_readable)  # uvloop may have ended it
        if state & Wait.W:
            self._loop.add_writer(self._fd, self._wake, Ready.W)
        try:
            return await self._waiter
        finally:
            self._waiter = None
            if state & Wait.W:
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    self._loop.remove_writer(self._fd)

    def _wake(self, ready: int) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(ready)
