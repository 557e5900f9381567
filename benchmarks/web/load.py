"""Plays the clients: a process that sends requests, and reports the answers.

``python -m benchmarks.web.load`` reads a job (JSON, one line) and prints its outcome (JSON, one
line); `Clients` starts it. Each client keeps one connection and sends a request when the last one
is answered (a closed loop). It is not `wrk`, because it counts each answer that is wrong or
missing, reports the latencies of exactly the requests that were sent in the window, reads the
server's clock at both ends of the window, and can hold 10,000 requests open; its own cost is in
every result.

# Note [Whole turns]
Warm-up and window each take some seconds, and end with the answer that makes them whole turns: as
many answers as there are clients, or twice as many, and so on. A stack that serves 64 or 2,000
requests at once brings all of them forward together, and then answers them in a burst. A window of
fixed length would see a burst more or a burst less; between one answer and the same place in a
later turn there are whole bursts, and the time that they took. The clocks are read at these two
answers.

Rate and latencies are those of the good answers that came within the window. A request that was
open for the whole window counts as stuck, so none is forgotten.
"""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
import time
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .endpoints import Endpoint
from .environment import ROOT

#: Number of requests made beforehand; their keys are spread by a prime over all keys.
_REQUESTS, _PRIME = 997, 7919
#: Connections opened at a time: fewer than a server's listen queue holds.
_AT_A_TIME = 200
_RETRY_SECONDS = 0.05
#: Seconds to wait for open requests when nothing counts any more.
_DRAIN_SECONDS = 5.0
_OK = b"HTTP/1.1 200 "
clock = time.perf_counter


@dataclass(frozen=True)
class Job:
    """Tells the clients their work."""

    port: int
    pid: int
    """The server's, whose time of the processor is read."""
    requests: list[str]
    clients: int
    warm: float
    seconds: float
    patience: float
    """How many seconds warm-up, window or flood may take at most."""


@dataclass
class Outcome:
    """Reports the answers within the window."""

    seconds: float = 0.0
    answered: int = 0
    """Good answers."""
    failed: int = 0
    """Other answers, and connections that were lost with a request."""
    wrong: int = 0
    """Answers of status 200 that differ from an earlier one to the same request.

    Those of the warm-up, too; those of the window have failed as well.
    """
    stuck: int = 0
    """Requests that were open all the time."""
    p50: float = 0.0
    p99: float = 0.0
    longest: float = 0.0
    """Also of those that are still open."""
    cpu: float = 0.0
    """Seconds of the processor that the server took."""
    own_cpu: float = 0.0
    """The same of this process."""


def requests_of(endpoint: Endpoint) -> list[str]:
    return [
        endpoint.request(1 + number * _PRIME % endpoint.keys)
        for number in range(min(_REQUESTS, endpoint.keys))
    ]


def cpu_seconds(pid: int) -> float:
    """Return user and system time of a process with all its threads, ended ones included.

    ``/proc/PID/stat`` has the same in steps of 10 ms, too coarse for a slow endpoint.
    """
    return time.clock_gettime(~pid << 3 | 2)  # what clock_getcpuclockid() returns on Linux


# --- In the process of the clients --------------------------------------------------------------


def body_at(data: bytes) -> int:
    """Return the index of the body, if this is a whole response; else 0."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return 0
    head = data[:end].lower()
    at = head.find(b"\r\ncontent-length:")
    if at < 0:
        is_whole = data.endswith(b"\r\n0\r\n\r\n")  # the last of its chunks
    else:
        line_end = head.find(b"\r\n", at + 2)
        length = int(head[at + 17 : None if line_end < 0 else line_end])
        is_whole = len(data) >= end + 4 + length
    return end + 4 if is_whole else 0


class Client(asyncio.Protocol):
    """Holds one connection, and sends its requests."""

    def __init__(self, load: Load, turn: int) -> None:
        self.load = load
        self.turn = turn
        self.received = b""
        self.sent_at = 0.0
        self.is_open = False
        """Is a request of its unanswered?"""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def send(self) -> None:
        requests = self.load.requests
        self.turn = (self.turn + 1) % len(requests)
        self.is_open = True
        self.load.open += 1
        self.sent_at = clock()
        self.transport.write(requests[self.turn])

    def data_received(self, data: bytes) -> None:
        if self.received:
            data = self.received + data
        if start := body_at(data):
            self.received = b""
            self.load.note(self, self.load.is_good(self.turn, data, start))
        else:
            self.received = data

    def connection_lost(self, exc: Exception | None) -> None:
        self.load.lose(self)


class Load:
    """Runs all clients, and records their answers."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.requests = [request.encode() for request in job.requests]
        self.clients: set[Client] = set()
        self.open = 0
        """Requests that wait for an answer."""
        self.outcome = Outcome()
        self.latencies = array("d")
        self.finished = 0
        """Answers and failures since the first request."""
        self.is_counting = self.is_over = False
        self._whole = 0
        """How many of them make whole turns."""
        self._bodies: list[bytes | None] = [None] * len(self.requests)
        self._closed, self._idle = asyncio.Event(), asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def connect(self, turn: int) -> Client:
        loop = asyncio.get_running_loop()
        while True:
            try:
                _, client = await loop.create_connection(
                    lambda: Client(self, turn), "127.0.0.1", self.job.port
                )
            except OSError:
                if self.is_over:
                    raise
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                self.clients.add(client)
                return client

    async def connect_all(self) -> None:
        for first in range(0, self.job.clients, _AT_A_TIME):
            numbers = range(first, min(first + _AT_A_TIME, self.job.clients))
            await asyncio.gather(*(self.connect(37 * number) for number in numbers))

    def is_good(self, turn: int, data: bytes, start: int) -> bool:
        """Return whether `data` is the answer that this request had before."""
        if not data.startswith(_OK):
            return False
        body, known = data[start:], self._bodies[turn]
        if known is None:
            self._bodies[turn] = body
        elif body != known:
            self.outcome.wrong += 1
            return False
        return True

    def note(self, client: Client, is_good: bool) -> None:
        """Count an answer, and send the next request."""
        client.is_open = False
        self.open -= 1
        self.finished += 1
        if self.is_counting:
            if is_good:
                self.latencies.append(clock() - client.sent_at)
            else:
                self.outcome.failed += 1
        if self.finished == self._whole:
            self._end_turn()
        if not self.is_over:
            if not client.transport.is_closing():
                client.send()
        elif not self.open:
            self._idle.set()

    def lose(self, client: Client) -> None:
        """Count a connection that the server has closed as failed, and open another."""
        self.clients.discard(client)
        if client.is_open:
            self.note(client, is_good=False)
        if not self.is_over:
            task = asyncio.ensure_future(self._replace(client))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _replace(self, client: Client) -> None:
        await asyncio.sleep(_RETRY_SECONDS)
        try:
            new = await self.connect(client.turn)
        except OSError:
            return  # the run is over
        if not self.is_over:
            new.send()

    async def run(self) -> Outcome:
        """Warm up, measure, and let the server finish what it has begun."""
        await self.connect_all()
        self._expect(self.job.warm, self._open_window)
        for client in list(self.clients):
            client.send()
        await self._closed.wait()
        await self._drain(_DRAIN_SECONDS)
        return self.outcome

    def _expect(self, seconds: float, then: Callable[[], None]) -> None:
        """Call `then` with the answer that ends a turn; see Note [Whole turns]."""
        self._whole = self.finished + self.job.clients
        self._enough = clock() + seconds
        self._then = then
        patience = max(seconds, self.job.patience)
        self._impatience = asyncio.get_running_loop().call_later(patience, then)

    def _end_turn(self) -> None:
        if clock() < self._enough:
            self._whole += self.job.clients
        else:
            self._impatience.cancel()
            self._then()

    def _open_window(self) -> None:
        self.is_counting = True
        self._begin = clock()
        self.outcome.cpu, self.outcome.own_cpu = -cpu_seconds(self.job.pid), -time.process_time()
        self._expect(self.job.seconds, self._close_window)

    def _close_window(self) -> None:
        self.is_counting, self.is_over = False, True
        self.outcome.cpu += cpu_seconds(self.job.pid)
        self.outcome.own_cpu += time.process_time()
        self._conclude(self._begin)
        self._whole = 0
        self._closed.set()

    async def flood(self) -> Outcome:
        """Let each client send one request, when a line comes on standard input."""
        await self.connect_all()
        print("connected", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        begin = clock()
        self.is_counting = True
        for client in list(self.clients):
            client.send()
        self.is_over = True
        await self._drain(self.job.patience)
        self._conclude(begin)
        return self.outcome

    async def _drain(self, seconds: float) -> None:
        if self.open:
            try:
                await asyncio.wait_for(self._idle.wait(), seconds)
            except TimeoutError:
                pass

    def _conclude(self, begin: float) -> None:
        now, outcome = clock(), self.outcome
        ordered = sorted(self.latencies)
        ages = [now - client.sent_at for client in self.clients if client.is_open]
        outcome.seconds = now - begin
        outcome.answered = len(ordered)
        outcome.stuck = sum(age >= outcome.seconds for age in ages)
        outcome.longest = max([*ordered[-1:], *ages], default=0.0)
        if ordered:
            outcome.p50 = ordered[len(ordered) // 2]
            outcome.p99 = ordered[len(ordered) * 99 // 100]


def main() -> None:
    import uvloop

    job = json.loads(sys.stdin.readline())
    work = job.pop("work")
    gc.disable()  # nothing here is garbage that matters within some seconds

    async def whole() -> Outcome:
        load = Load(Job(**job))
        return await (load.flood() if work == "flood" else load.run())

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        outcome = runner.run(whole())
        print(json.dumps(asdict(outcome)), flush=True)


# --- In the process of the harness --------------------------------------------------------------


class LoadError(RuntimeError):
    """Says that the process of the clients failed, with its output."""


class Clients:
    """Starts and controls the process of the clients, from the harness."""

    def __init__(self, python: Path, work: str, job: Job) -> None:
        self.process = subprocess.Popen(
            [str(python), "-m", __name__],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.tell(json.dumps({"work": work, **asdict(job)}))

    def tell(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        """Return the next line that the process prints."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        return line or self._fail()

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def outcome(self) -> Outcome:
        outcome = Outcome(**json.loads(self.hear()))
        self.stop()
        return outcome

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _fail(self) -> str:
        _, said = self.process.communicate()
        raise LoadError(f"the clients ended without an outcome:\n{said[-3000:]}")


if __name__ == "__main__":
    main()
