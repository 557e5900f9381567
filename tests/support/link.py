"""A TCP way to the server that can be cut, frozen, slowed and truncated."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from psycopg.conninfo import conninfo_to_dict


class Link:
    """A TCP way to the server, in a thread of its own, that can be cut, frozen and restored."""

    port: int
    _loop: asyncio.AbstractEventLoop
    _gates: list[asyncio.Event]
    _stopped: asyncio.Event

    def __init__(self, conninfo: str) -> None:
        given = conninfo_to_dict(conninfo)
        self._target = (str(given.get("host", "")), int(given.get("port", 5432)))
        self._writers: set[asyncio.StreamWriter] = set()
        self.attempts = 0
        """How many connections were asked for."""
        self.down = False
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(started)))
        self._thread.start()
        started.wait()

    async def _serve(self, started: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._gates = []
        self._frozen = False
        self._stopped = asyncio.Event()
        listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = listener.sockets[0].getsockname()[1]
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
        if host.startswith("/"):
            reply, send = await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
        else:
            reply, send = await asyncio.open_connection(host, port)
        self._writers.add(send)
        gate = asyncio.Event()
        self._gates.append(gate)
        if not self._frozen:
            gate.set()
        await asyncio.gather(self._pump(reader, send, gate), self._pump(reply, writer, gate))

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, gate: asyncio.Event
    ) -> None:
        try:
            while data := await reader.read(65536):
                await gate.wait()
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    def _abort(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    def _do(self, action: Callable[[], object]) -> None:
        done = threading.Event()
        self._loop.call_soon_threadsafe(lambda: (action(), done.set()))
        assert done.wait(5)

    def cut(self) -> None:
        """Break what is connected, and answer nobody any more."""
        self.down = True
        self._do(self._abort)

    def restore(self) -> None:
        self.down = False

    def freeze(self, *, new: bool = True) -> None:
        """Let nothing through, and say nothing; with ``new=False``, but on new connections."""

        def freeze() -> None:
            self._frozen = new
            for gate in self._gates:
                gate.clear()

        self._do(freeze)

    def thaw(self) -> None:
        """Let through what was held up, and what comes."""

        def thaw() -> None:
            self._frozen = False
            for gate in self._gates:
                gate.set()

        self._do(thaw)

    def close(self) -> None:
        self.thaw()
        self.down = True
        self._do(self._stopped.set)
        self._thread.join(5)
