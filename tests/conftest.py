"""What every test shares: a real server, loops that hide nothing, and a look at what is left."""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import psycopg
import pytest

from pgbackend.driver import bridge, pool
from tests.server import server
from tests.support.loops import LOOPS, LoopFactory


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-browser",
        action="store_true",
        help="where Chromium is missing, fail the tests that drive a page instead of skipping them",
    )
    parser.addoption(
        "--require-servers",
        action="store_true",
        help="where a server (PgBouncer, PostGIS) is missing, fail the tests that use it instead "
        "of skipping them",
    )
    parser.addoption(
        "--loop",
        choices=sorted(LOOPS),
        default="asyncio",
        help="the event loop of the contract's tests",
    )
    parser.addoption(
        "--seed",
        default="1",
        help="shuffles the tasks of the contract's tests; 'random' draws one",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.option.seed == "random":
        config.option.seed = str(random.randrange(1_000_000))


def pytest_report_header(config: pytest.Config) -> str:
    return f"contract: --loop {config.option.loop} --seed {config.option.seed}"


def pytest_collection_finish(session: pytest.Session) -> None:
    # Each test collects garbage, to see what it left: not the modules of the whole project too.
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    server.release()


@pytest.fixture(scope="session")
def conninfo() -> str:
    """How to reach the server's own database, beside Django's."""
    return server.url


@pytest.fixture
def admin(conninfo: str) -> Iterator[psycopg.Connection[Any]]:
    """A session that watches the others."""
    with psycopg.connect(conninfo, autocommit=True, application_name="watcher") as connection:
        yield connection


class Runner:
    """Runs coroutines on a new loop each, and fails for what the loop would only have logged."""

    def __init__(self, factory: LoopFactory) -> None:
        self.factory = factory

    def __call__(self, main: Coroutine[Any, Any, Any], *, timeout: float = 30) -> Any:
        """Run `main` as `asyncio.run()` does; `timeout` is for a test that hangs."""
        complaints: list[dict[str, Any]] = []

        async def watched() -> Any:
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(lambda loop, context: complaints.append(context))
            async with asyncio.timeout(timeout):
                return await main

        with asyncio.Runner(loop_factory=self.factory) as runner:
            result = runner.run(watched())
        gc.collect()
        assert not complaints, complaints
        return result

    def green(self, fn: Callable[..., Any], *args: Any) -> Any:
        """Run the synchronous function `fn` green on a new loop."""
        return self(bridge.run(fn, *args))


@pytest.fixture(params=sorted(LOOPS))
def run(request: pytest.FixtureRequest) -> Runner:
    """Run a coroutine: on asyncio's loop, and on uvloop's."""
    return Runner(LOOPS[request.param])


@pytest.fixture
def run_once() -> Runner:
    """Run a coroutine on asyncio's loop only."""
    return Runner(LOOPS["asyncio"])


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """After each test: no lease, greenlet, task or session of an async pool."""
    yield
    if _left_over():  # what only the garbage collector holds is not held
        gc.collect()
    left = _left_over()
    assert not left, left


def _left_over() -> list[object]:
    leases = [record for record in pool.statistics() if record.leased or record.waiting]
    # The first condition is for speed: there are a great many objects.
    found = [thing for thing in gc.get_objects() if type(thing) in _KINDS]
    things = [thing for thing in found if _is_unfinished(thing)]
    return [*leases, *things]


def all_portals() -> list[bridge.Portal]:
    """The portals of all threads, also those that have ended and are referred to still."""
    return [thing for thing in gc.get_objects() if type(thing) is bridge.Portal]


_KINDS = (bridge.Portal, asyncio.Task, pool.Lease)


def _is_unfinished(thing: object) -> bool:
    cls = type(thing)
    if cls is bridge.Portal:
        return thing.working and not thing.dead
    if cls is asyncio.Task:
        return not thing.done()
    return cls is pool.Lease and not thing.ended


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 5.0) -> Any:
    """Wait until another process has made `condition` true, and return its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.005)
    return value
