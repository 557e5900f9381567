"""Plays the clients, in a process of their own: ``python -m benchmarks.sync_stack.load``.

It reads a job (JSON) from standard input. Each client keeps one connection, and sends its next
request when the last one is answered. Each answer must have the status that is expected. It prints
the number of answers within the window, how long they took, and the time of the processor that the
server took. With ``"seconds": 0`` it prints the answers to some requests that change nothing.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import uvloop

from benchmarks.web.load import body_at, cpu_seconds

CSRF = "a" * 32


class Work:
    """Makes the requests of one kind of work, in turn; each with the status of its answer."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.number = 0
        self._make = getattr(self, f"_{job['work']}")

    def next(self) -> tuple[bytes, int]:
        self.number += 1
        found: tuple[bytes, int] = self._make(
            self.number, 1 + self.number * 7919 % self.job.get("books", 1)
        )
        return found

    def first_reads(self) -> list[bytes]:
        """Return the first requests that change nothing."""
        return [each for each, _ in (self.next() for _ in range(12)) if each.startswith(b"GET")]

    def _admin(self, number: int, key: int) -> tuple[bytes, int]:
        """Make two pages of the list, two forms, and one change for each five requests."""
        kinds = (self._admin_list, self._admin_form)
        return (self._admin_save if number % 5 == 4 else kinds[number % 5 % 2])(number, key)

    def _wagtail(self, number: int, key: int) -> tuple[bytes, int]:
        """Make the home page once for each four requests, else one of the pages below it."""
        return _request("GET", f"/page-{number % 50}/" if number % 4 else "/", ""), 200

    def _admin_list(self, number: int, key: int) -> tuple[bytes, int]:
        return _request("GET", f"/admin/shop/book/?p={1 + key % 40}", self._admin_head()), 200

    def _admin_form(self, number: int, key: int) -> tuple[bytes, int]:
        return _request("GET", f"/admin/shop/book/{key}/change/", self._admin_head()), 200

    def _admin_save(self, number: int, key: int) -> tuple[bytes, int]:
        form = (
            f"csrfmiddlewaretoken={CSRF}&title=changed+{number}&author={1 + key % 200}"
            f"&price=9.50&published=2020-01-01&_save=Save"
        )
        head = f"{self._admin_head()}Content-Type: application/x-www-form-urlencoded\r\n"
        return _request("POST", f"/admin/shop/book/{key}/change/", head, form), 302

    def _admin_head(self) -> str:
        return f"Cookie: {self.job['cookie']}; csrftoken={CSRF}\r\n"

    def _api_list(self, number: int, key: int) -> tuple[bytes, int]:
        """Make a page of twenty books, each with its author nested in it."""
        head = f"Authorization: Token {self.job['token']}\r\n"
        return _request("GET", f"/api/books/?page={1 + key % 100}", head), 200

    def _api(self, number: int, key: int) -> tuple[bytes, int]:
        """Make two lists, two details, a new row and a change for each six requests."""
        head = f"Authorization: Token {self.job['token']}\r\nContent-Type: application/json\r\n"
        match number % 6:
            case 0 | 3:
                return _request("GET", f"/api/books/?page={1 + key % 100}", head), 200
            case 1 | 4:
                return _request("GET", f"/api/books/{key}/", head), 200
            case 2:
                row = {
                    "title": f"new {number}",
                    "author": 1 + key % 200,
                    "price": "9.50",
                    "published": "2020-01-01",
                }
                return _request("POST", "/api/books/", head, json.dumps(row)), 201
        change = json.dumps({"title": f"changed {number}"})
        return _request("PATCH", f"/api/books/{key}/", head, change), 200


def _request(method: str, target: str, head: str, body: str = "") -> bytes:
    length = f"Content-Length: {len(body)}\r\n" if body else ""
    return f"{method} {target} HTTP/1.1\r\nHost: 127.0.0.1\r\n{head}{length}\r\n{body}".encode()


class Clients:
    """Runs all clients until the window is over."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.work = Work(job)
        self.latencies: list[float] = []
        self.is_over = False

    async def read(self) -> list[str]:
        """Return the answers to the first requests that change nothing, one after the other."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.job["port"])
        answers = []
        for request in self.work.first_reads():
            writer.write(request)
            received = await _received(reader, request)
            status, _, _ = received.partition(b"\r\n")
            body = received[body_at(received) :]
            answers.append(f"{request!r}\n{status!r}\n{body!r}")
        writer.close()
        return answers

    async def run(self) -> dict[str, float]:
        clients = [asyncio.create_task(self._client()) for _ in range(self.job["clients"])]
        await asyncio.sleep(self.job["warm"])
        self.latencies.clear()
        began, cpu, own = time.perf_counter(), self._cpu(), time.process_time()
        await asyncio.sleep(self.job["seconds"])
        seconds, latencies = time.perf_counter() - began, sorted(self.latencies)
        found = {
            "answered": len(latencies),
            "seconds": seconds,
            "cpu": self._cpu() - cpu,
            "own": (time.process_time() - own) / seconds,
            "p99": latencies[int(len(latencies) * 0.99)] * 1e3,
        }
        self.is_over = True
        await asyncio.gather(*clients)
        return found

    async def _client(self) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.job["port"])
        while not self.is_over:
            request, status = self.work.next()
            began = time.perf_counter()
            writer.write(request)
            received = await _received(reader, request)
            if not received.startswith(b"HTTP/1.1 %d " % status):
                raise RuntimeError(f"wrong: {request!r}\n{received[:2000]!r}")
            self.latencies.append(time.perf_counter() - began)
        writer.close()

    def _cpu(self) -> float:
        """Return the time of the processor of the server and its worker, in seconds."""
        return sum(map(cpu_seconds, self.job["pids"]))


async def _received(reader: asyncio.StreamReader, request: bytes) -> bytes:
    """Return the whole response to `request`; raise `RuntimeError` if the server hangs up."""
    received = b""
    while not (received and body_at(received)):
        data = await reader.read(2**18)
        if not data:
            raise RuntimeError(f"lost: {request!r}")
        received += data
    return received


def main() -> None:
    job = json.loads(sys.stdin.read())
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        clients = Clients(job)
        found = runner.run(clients.run() if job["seconds"] else clients.read())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
