"""Compares three ways to serve a project of sync views: ``python -m benchmarks.sync_stack``.

The project has Django's admin, an API of the REST framework, and one sync middleware of its own. It
is served by Django's engine (stock), as ``startproject`` configures it and with a pool, by
pgbackend's `ENGINE` alone, the same two, and by `pgbackend.get_asgi_application()`; nothing else
differs. Each server is one uvicorn process. They take turns at each work, round by round, and the
best round of each counts: other work of the machine slows a process of one busy thread more than
one of many threads that mostly wait. The time of the processor for a request hardly depends on it.
The program uses the server of ``DATABASE_URL``, or starts one of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any, Self

import django
import psycopg
import rest_framework

from pgbackend import embedded
from tests.support.ports import free_port

ROOT = Path(__file__).parents[2]
NAME = "pgbackend_sync_stack"
#: The last three are the parts of the first.
WORKS = ("admin", "api", "admin_list", "admin_form", "admin_save")
STOCK = "Django's engine"


@dataclass(frozen=True)
class Way:
    """A way to serve the project."""

    name: str
    engine: str = "pgbackend"
    pool: bool = False
    """Whether sync code has a pool; async code has one in any case, of at most ten connections."""
    whole: bool = False

    @property
    def options(self) -> dict[str, Any]:
        # More than there are clients, so that no thread waits for a connection.
        return {"pool": {"min_size": 4, "max_size": 20, "timeout": 30}} if self.pool else {}


_STOCK = "django.db.backends.postgresql"
WAYS = (
    Way(STOCK, _STOCK),
    Way("Django's engine, pool", _STOCK, pool=True),
    Way("`ENGINE` alone"),
    Way("`ENGINE` alone, pool", pool=True),
    Way("the whole stack", whole=True),
)


@dataclass(frozen=True)
class Sample:
    """Holds the figures of one round of one way at one work."""

    rate: float
    cpu: float
    """Microseconds of the server's process for each request, without those of the database."""
    threads: int
    connections: int


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--warm", type=float, default=2.0)
    parser.add_argument("--works", nargs="+", choices=WORKS, default=WORKS[:2])
    options = parser.parse_args()
    samples: dict[tuple[str, str], list[Sample]] = {}
    with _server() as url, _database(url) as made:
        told = _prepare(made)
        for number in range(options.rounds):
            for work in options.works:
                # Each way is the first of as many rounds.
                first = number % len(WAYS)
                for way in (*WAYS[first:], *WAYS[:first]):
                    sample = _measure(way, work, made, told, options)
                    samples.setdefault((work, way.name), []).append(sample)
                    print(f"{number + 1} {work:10} {way.name:22} {sample}", flush=True)
    _report(samples, options)


# --- The database ---------------------------------------------------------------------------------


@contextmanager
def _server() -> Iterator[str]:
    if given := os.environ.get("DATABASE_URL"):
        yield given
        return
    with embedded.server() as server:
        yield server.url


@contextmanager
def _database(url: str) -> Iterator[str]:
    with psycopg.connect(url, autocommit=True) as session:
        session.execute(f"DROP DATABASE IF EXISTS {NAME} WITH (FORCE)")
        session.execute(f"CREATE DATABASE {NAME}")
        head, slash, rest = url.partition("?")
        try:
            yield f"{head.rpartition('/')[0]}/{NAME}{slash}{rest}"
        finally:
            session.execute(f"DROP DATABASE {NAME} WITH (FORCE)")


def _environment(way: Way, url: str) -> dict[str, str]:
    given = {
        "url": url,
        "engine": way.engine,
        "options": way.options,
        "name": NAME,
        "whole": way.whole,
    }
    return {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "benchmarks.sync_stack.shop.settings",
        "SYNC_STACK": json.dumps(given),
        "PYTHONPATH": str(ROOT),
    }


def _prepare(url: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.sync_stack.shop.prepare"],
        env=_environment(WAYS[0], url),
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# --- One measurement ------------------------------------------------------------------------------


def _measure(way: Way, work: str, url: str, told: dict[str, Any], options: Any) -> Sample:
    with _serving(way, url) as (port, pid), _Watch(pid, url) as watch:
        job = {
            **told,
            "work": work,
            "port": port,
            "pid": pid,
            "clients": options.clients,
            "warm": options.warm,
            "seconds": options.seconds,
        }
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.sync_stack.load"],
            cwd=ROOT,
            input=json.dumps(job),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    found = json.loads(done.stdout)
    answered = found["answered"]
    return Sample(
        round(answered / found["seconds"], 1),
        round(found["cpu"] / answered * 1e6),
        watch.threads,
        watch.connections,
    )


@contextmanager
def _serving(way: Way, url: str) -> Iterator[tuple[int, int]]:
    port = free_port()
    command = ["uvicorn", "--port", str(port), "--log-level", "warning", "--no-access-log"]
    process = subprocess.Popen(
        [sys.executable, "-m", *command, "benchmarks.sync_stack.shop.asgi:application"],
        cwd=ROOT,
        env=_environment(way, url),
    )
    try:
        _wait_until_it_listens(process, port)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait()


def _wait_until_it_listens(process: subprocess.Popen[bytes], port: int) -> None:
    import socket

    for _ in range(600):
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                return
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise SystemExit("the server did not start")


class _Watch:
    """Notes the most threads and connections that a server has had, ten times a second."""

    def __init__(self, pid: int, url: str) -> None:
        self.threads = self.connections = 0
        self._status = Path(f"/proc/{pid}/status")
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
            while not self._over.wait(0.1):
                (count,) = session.execute(query, [NAME]).fetchone()  # type: ignore[misc]
                self.connections = max(self.connections, count)
                (line,) = (
                    line for line in self._status.read_text().splitlines() if "Threads" in line
                )
                self.threads = max(self.threads, int(line.split()[1]))


# --- The table ------------------------------------------------------------------------------------


def _report(samples: dict[tuple[str, str], list[Sample]], options: Any) -> None:
    print(
        f"\nPython {platform.python_version()}, Django {django.__version__}, djangorestframework "
        f"{rest_framework.VERSION}, {options.clients} clients, {options.rounds} rounds\n"
    )
    print("| | requests a second | CPU for a request, µs | threads | connections |")
    print("|---|--:|--:|--:|--:|")
    for (work, name), found in samples.items():
        rate, cpu = _best(found)
        of_stock = _best(samples[work, STOCK])
        print(
            f"| {work}: {name} | {rate:,.0f} ({rate / of_stock[0]:.2f}) "
            f"| {cpu:,.0f} ({cpu / of_stock[1]:.2f}) "
            f"| {max(sample.threads for sample in found)} "
            f"| {max(sample.connections for sample in found)} |"
        )


def _best(found: list[Sample]) -> tuple[float, float]:
    """Return the highest rate of the rounds, and the least time of the processor."""
    return max(sample.rate for sample in found), min(sample.cpu for sample in found)


if __name__ == "__main__":
    main()
