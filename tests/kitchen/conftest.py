"""Provides fixtures of the order desk's tests: a menu, staff, the demonstration, Chromium."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from django.db import connection

from tests.conftest import Runner, wait_for
from tests.support.chromium import chromium, require_chromium, show_at

ROOT = Path(__file__).resolve().parents[2]
SERVED = "served-desk"  # the application_name of its connections


@pytest.fixture(autouse=True)
def _empty_tables_afterwards(transactional_db: None) -> None:
    """Empty the tables after each test: tests commit, because announcements are sent at commit."""


# --- Rows --------------------------------------------------------------------------------------


@pytest.fixture
def menu() -> dict[str, Any]:
    """Write three dishes, one of them not on offer; return them by name."""
    from kitchen.models import Dish, Section

    section = Section.objects.create(name="To start")
    prices = {"Broth": "6.80", "Bread": "4.50", "Oysters": "21.00"}
    return {
        name: Dish.objects.create(
            section=section, name=name, price=price, available=name != "Oysters"
        )
        for name, price in prices.items()
    }


@pytest.fixture
def order(menu: dict[str, Any]) -> Callable[..., Any]:
    """Return a function that writes an order, as if it had been placed."""
    from kitchen.models import Order

    def make(table: str = "7", *, status: str = "accepted", **fields: Any) -> Any:
        order = Order.objects.create(table=table, status=status, **fields)
        order.lines.create(dish=menu["Broth"], quantity=2, price="6.80")
        return order

    return make


@pytest.fixture
def chef() -> Any:
    """Make a superuser with the password "quince", hashed quickly, in a way each server knows."""
    from django.contrib.auth.hashers import PBKDF2PasswordHasher
    from django.contrib.auth.models import User

    chef = User(username="chef", is_staff=True, is_superuser=True)
    chef.password = PBKDF2PasswordHasher().encode("quince", "salt", iterations=1)
    chef.save()
    return chef


# --- The desk in this process ------------------------------------------------------------------


@pytest.fixture
def desk(run_once: Runner) -> Callable[[Coroutine[Any, Any, Any]], Any]:
    """Run a coroutine as a server would, and close what the desk has opened on the loop."""
    from kitchen import perloop

    async def closing(main: Coroutine[Any, Any, Any]) -> Any:
        try:
            return await main
        finally:
            await perloop.close()

    return lambda main: run_once(closing(main))


Answer = Callable[[], Awaitable[bytes]]


@asynccontextmanager
async def kitchen_service(answer: Answer) -> AsyncIterator[str]:
    """Run a kitchen service that gives this answer; yield its URL."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(re.search(rb"(?i)content-length: (\d+)", head)[1]))
        waiting = asyncio.ensure_future(answer())
        hung_up = asyncio.ensure_future(reader.read())
        await asyncio.wait([waiting, hung_up], return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            writer.write(waiting.result())
        waiting.cancel()
        hung_up.cancel()
        await asyncio.wait([waiting, hung_up])
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"


def http(body: str, status: str = "200 OK") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return (head + body).encode()


# --- The demonstration as a process ------------------------------------------------------------


def url_of(database: str) -> str:
    """Return the URL of a database beside the tests' own, which settings may not know."""
    entry = connection.settings_dict
    parts = {name.lower(): entry[name] for name in ("HOST", "PORT", "USER", "PASSWORD")}
    query = {name: value for name, value in parts.items() if value}
    return f"postgresql:///{database}?{urlencode(query)}"


class Demo:
    """Runs ``python -m proj`` as a user does, at a port of its own, with each warning an error."""

    def __init__(self, output: Path, **env: str) -> None:
        self._output = output
        given = {**os.environ, "PORT": "0", "PYTHONWARNINGS": "error", **env}
        given.pop("DJANGO_SETTINGS_MODULE", None)
        with output.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "proj"],
                cwd=ROOT,
                env=given,
                stdout=file,
                stderr=subprocess.STDOUT,
                # As in a terminal, even if the parent of the tests ignores the signal.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    def address(self) -> str:
        """Return the address that the demonstration prints."""
        wait_for(
            lambda: "Sign in as" in self.output or self.process.poll() is not None,
            f"the demonstration to open: {self.output}",
            seconds=60,
        )
        found = re.search(r"http://[\d.:]+", self.output)
        assert found, self.output
        return found[0]

    def stop(self, number: int = signal.SIGINT) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout=20)


@contextmanager
def demo_served(output: Path) -> Iterator[str]:
    """Serve the order desk on the tests' database; yield its address; see that it ends well."""
    demo = Demo(
        output,
        DATABASE_URL=f"{url_of(connection.settings_dict['NAME'])}&application_name={SERVED}",
        KITCHEN_SERVICE_SECONDS="0.2",
        POOL_SIZE="4",
    )
    try:
        yield demo.address()
    finally:
        code = demo.stop()
    assert code == 0
    assert "Traceback" not in demo.output
    assert "Warning" not in demo.output


@pytest.fixture(scope="session")
def _served(django_db_setup: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with demo_served(tmp_path_factory.mktemp("demo") / "output") as address:
        yield address


@pytest.fixture
def served(_served: str) -> str:
    """Return the address of a running order desk; empty its database, which is the tests'."""
    from django.contrib.auth.models import User

    from kitchen.models import Section

    # The rows that the demonstration has written at its start.
    User.objects.all().delete()
    for section in Section.objects.all():
        section.dishes.all().delete()
        section.delete()
    return _served


def parsed(lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the (name, data) pairs of a stream of server-sent events."""
    name = ""
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


# --- Chromium ----------------------------------------------------------------------------------


@pytest.fixture
def browse(request: pytest.FixtureRequest, served: str) -> Iterator[Callable[..., Any]]:
    """Open the desk in Chromium at a width; at the end, its console must be empty."""
    require_chromium(request.config)
    drivers = []

    def browse(path: str = "/", *, width: int = 1280, height: int = 900) -> Any:
        drivers.append(stack := chromium())
        driver = stack.__enter__()
        show_at(driver, width, height)
        driver.get(served + path)
        return driver

    try:
        yield browse
    finally:
        for stack in reversed(drivers):
            stack.__exit__(None, None, None)
