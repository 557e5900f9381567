"""Relays TCP to the server, and can be cut, frozen, half closed, slowed and truncated."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from psycopg.conninfo import conninfo_to_dict


@dataclass(eq=False)
class _Pair:
    """Holds one connection through the link: its end at the client, and its end at the server."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    gate: asyncio.Event
    #: How many bytes of the server's are still relayed; None for all.
    left: int | None = None
    #: Whether the link hides the end of the stream from the other side.
    silent: bool = False


class Link:
    """Relays TCP to the server, in a thread of its own, and can fail and be restored."""

    port: int
    _loop: asyncio.AbstractEventLoop
    _pairs: list[_Pair]
    _fault: Callable[[_Pair], None] | None
    _stopped: asyncio.Event

    def __init__(self, conninfo: str, listener: socket.socket | None = None) -> None:
        self._listener = listener or socket.create_server(("127.0.0.1", 0))
        self.lead_to(conninfo)
        self._writers: set[asyncio.StreamWriter] = set()
        self.attempts = 0
        """How many connections were asked for."""
        self.down = False
        self.delay = 0.0
        """Seconds by which all that goes through is late."""
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(started)))
        self._thread.start()
        started.wait()

    def lead_to(self, conninfo: str) -> None:
        """Relay new connections to this server; open ones stay where they are."""
        given = conninfo_to_dict(conninfo)
        self._target = (str(given.get("host", "")), int(given.get("port", 5432)))

    async def _serve(self, started: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._pairs = []
        self._fault = None
        self._stopped = asyncio.Event()
        listener = await asyncio.start_server(self._accept, sock=self._listener)
        self.port = self._listener.getsockname()[1]
        started.set()
        await self._stopped.wait()
        self._abort()
        listener.close()
        await asyncio.sleep(0)  # the aborted transports close in the loop's next turn

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.attempts += 1
        self._writers.add(writer)
        if self.down:
            writer.close()
            return
        host, port = self._target
        try:
            if host.startswith("/"):
                reply, send = await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
            else:
                reply, send = await asyncio.open_connection(host, port)
        except OSError:
            writer.close()
            return
        self._writers.add(send)
        if self._stopped.is_set():  # meanwhile: nobody aborts these two
            self._abort()
            return
        pair = _Pair(writer, send, asyncio.Event())
        pair.gate.set()
        self._pairs.append(pair)
        if self._fault is not None:
            self._fault(pair)
        await asyncio.gather(self._ask(reader, pair), self._reply(reply, pair))

    async def _ask(self, reader: asyncio.StreamReader, pair: _Pair) -> None:
        try:
            while data := await reader.read(65536):
                await self._wait(pair)
                pair.server.write(self._seen(pair, data))
                await pair.server.drain()
        except (OSError, RuntimeError):
            pass  # a half-closed connection cannot be written to
        finally:
            pair.server.close()

    def _seen(self, pair: _Pair, data: bytes) -> bytes:
        """Return what is sent on instead of `data` of a client; a subclass may record it."""
        return data

    async def _reply(self, reader: asyncio.StreamReader, pair: _Pair) -> None:
        try:
            while data := await reader.read(65536):
                await self._wait(pair)
                if pair.left is not None:
                    data, pair.left = data[: pair.left], max(0, pair.left - len(data))
                if data:
                    pair.client.write(data)
                    await pair.client.drain()
                if pair.left == 0 and not pair.silent:
                    break
        except (OSError, RuntimeError):
            pass
        finally:
            if not pair.silent:
                pair.client.close()

    async def _wait(self, pair: _Pair) -> None:
        if self.delay:
            await asyncio.sleep(self.delay)
        await pair.gate.wait()

    def _abort(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    def _do(self, action: Callable[[], object]) -> None:
        done = threading.Event()
        self._loop.call_soon_threadsafe(lambda: (action(), done.set()))
        assert done.wait(5)

    def cut(self) -> None:
        """Break all connections, and answer no new ones."""
        self.down = True
        self._do(self._abort)
        self._do(lambda: None)  # the aborted transports close in the loop's next turn

    def restore(self) -> None:
        """Relay again, for connections that have not failed yet."""
        self.down = False

        def restore() -> None:
            self._fault = None
            for pair in self._pairs:
                if pair.left and not pair.silent:
                    pair.left = None

        self._do(restore)

    def _fail(self, fault: Callable[[_Pair], None], *, new: bool) -> None:
        """Let `fault` befall every connection, and with `new` each later one."""

        def fail() -> None:
            self._fault = fault if new else None
            for pair in self._pairs:
                fault(pair)

        self._do(fail)

    def freeze(self, *, new: bool = True) -> None:
        """Relay nothing, without closing; with ``new=False``, new connections work."""
        self._fail(lambda pair: pair.gate.clear(), new=new)

    def half_close(self, towards: Literal["client", "server"]) -> None:
        """Close one direction: one side sees the end of the stream, the other sees nothing."""

        def fault(pair: _Pair) -> None:
            pair.silent = True
            writer = pair.client if towards == "client" else pair.server
            if not writer.is_closing():
                writer.write_eof()

        self._fail(fault, new=True)

    def reset(self) -> None:
        """Answer everything with a RST."""

        def fault(pair: _Pair) -> None:
            for writer in (pair.client, pair.server):
                if not writer.is_closing():
                    sock = writer.get_extra_info("socket")
                    if sock.family != socket.AF_UNIX:
                        linger = struct.pack("ii", 1, 0)
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    writer.transport.abort()

        self._fail(fault, new=True)

    def truncate(self, after: int, *, silent: bool = False, new: bool = False) -> None:
        """Relay `after` bytes of the server's, then close; with `silent`, only stop relaying."""

        def fault(pair: _Pair) -> None:
            pair.left, pair.silent = after, silent

        self._fail(fault, new=new)

    def thaw(self) -> None:
        """Relay what was held up, and what arrives on new connections."""

        def thaw() -> None:
            self._fault = None
            for pair in self._pairs:
                pair.gate.set()

        self._do(thaw)

    def close(self) -> None:
        self.thaw()
        self.down = True
        self._do(self._stopped.set)
        self._thread.join(5)
