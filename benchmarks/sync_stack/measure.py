"""Serves a project in one way, and measures one work."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any, Self

import psycopg

from tests.support.ports import free_port

from .projects import NAME, ROOT, Project
from .ways import Way

#: Parts of a page that differ from one answer to the next.
_DRAWN = re.compile(r'name="csrfmiddlewaretoken" value="\w+"')


@dataclass(frozen=True)
class Window:
    """For how long a work is measured, in seconds, and by how many clients it is asked for."""

    clients: int
    seconds: float
    warm: float


@dataclass(frozen=True)
class Sample:
    """Holds the figures of one round of one way at one work."""

    rate: float
    """Answers a second."""
    cpu: float
    """Microseconds of the server's processes for each answer, without those of the database."""
    p99: float
    """The 99th percentile of the time to an answer, in milliseconds."""
    threads: int
    connections: int
    memory: float
    """Megabytes of the server's processes; pages that they share are divided (PSS)."""
    load: float
    """The part of a processor that the clients took: well below 1, or they were the limit."""


def measure(project: Project, way: Way, work: str, window: Window) -> Sample:
    """Serve `project` in `way`, and return the figures of `work`."""
    with _serving(project, way) as (port, pids), _Watch(pids, project.url) as watch:
        found = _play(project, port, pids, work, window)
    return Sample(
        round(found["answered"] / found["seconds"], 1),
        round(found["cpu"] / found["answered"] * 1e6),
        round(found["p99"], 1),
        watch.threads,
        watch.connections,
        round(watch.memory, 1),
        round(found["own"], 2),
    )


def answers(project: Project, way: Way, work: str) -> list[str]:
    """Return the answers to the reads of `work`, without what differs each time."""
    with _serving(project, way) as (port, pids):
        found = _play(project, port, pids, work, Window(1, 0, 0))
    return [_DRAWN.sub("", answer) for answer in found]


def _play(project: Project, port: int, pids: list[int], work: str, window: Window) -> Any:
    """Run the clients, and return what they print."""
    told = {"work": work, "port": port, "pids": pids, "clients": window.clients}
    job = {**project.told, **told, "warm": window.warm, "seconds": window.seconds}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.sync_stack.load"],
        cwd=ROOT,
        input=json.dumps(job),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@contextmanager
def _serving(project: Project, way: Way) -> Iterator[tuple[int, list[int]]]:
    port = free_port()
    command = [sys.executable, *(each.format(port=port) for each in way.command)]
    process = subprocess.Popen(command, cwd=ROOT, env=project.environment(way))
    try:
        _wait_until_it_answers(process, port)
        yield port, [process.pid, *_children(process.pid)]
    finally:
        process.terminate()
        process.wait()


def _children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(each) for each in found]


def _wait_until_it_answers(process: subprocess.Popen[bytes], port: int) -> None:
    """Wait until a worker has answered: a master listens before its worker has loaded anything."""
    for _ in range(600):
        try:
            with socket.create_connection(("127.0.0.1", port), 5) as sock:
                sock.sendall(b"GET /no-such-page HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n")
                if sock.recv(9).startswith(b"HTTP/1."):
                    return
        except OSError:
            pass
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise SystemExit("the server did not start")


class _Watch:
    """Notes the most threads, connections and memory of a server, five times a second."""

    def __init__(self, pids: list[int], url: str) -> None:
        self.threads = self.connections = 0
        self.memory = 0.0
        self._pids = pids
        self._url = url
        self._over = Event()
        self._thread = Thread(target=self._look)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"
        with psycopg.connect(self._url, autocommit=True) as session:
            while not self._over.wait(0.2):
                (count,) = session.execute(query, [NAME]).fetchone()  # type: ignore[misc]
                self.connections = max(self.connections, count)
                self.threads = max(self.threads, *map(_threads, self._pids))
                self.memory = max(self.memory, sum(map(_memory, self._pids)))


def _threads(pid: int) -> int:
    return int(_value(Path(f"/proc/{pid}/status"), "Threads:"))


def _memory(pid: int) -> float:
    return int(_value(Path(f"/proc/{pid}/smaps_rollup"), "Pss:")) / 1024


def _value(path: Path, name: str) -> str:
    (line,) = (line for line in path.read_text().splitlines() if line.startswith(name))
    return line.split()[1]
