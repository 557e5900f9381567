"""Provides a real server, loops that hide no errors, and a check after each test for leftovers."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from _pytest.logging import caplog_records_key
from asgiref.sync import SyncToAsync
from django.db import connections

from pgbackend.conf import wrapper_is_ours
from pgbackend.driver import bridge, loops
from pgbackend.driver.lease import Lease
from pgbackend.fast.registry import is_on
from tests.server import server
from tests.support import pooler_run, slow
from tests.support.loops import LOOPS, LoopFactory
from tests.support.polling import wait_for  # noqa: F401 - tests import it from here


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
    parser.addoption(
        "--slow",
        action="store_true",
        help="run the slow tests too, and all cases of the sweeps",
    )
    parser.addoption(
        "--sweeps",
        choices=["all", "drawn"],
        default="all",
        help="with --slow: all cases of the sweeps, or those only that the seed draws",
    )

    pooler_run.add_option(parser)


def pytest_configure(config: pytest.Config) -> None:
    if config.option.seed == "random":
        config.option.seed = str(random.randrange(1_000_000))


@pytest.hookimpl(tryfirst=True)  # `-m` looks at the marks, too
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow.mark_sweeps(items, config.option.seed)
    slow.leave_out(config, items)
    pooler_run.leave_out(config, items)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if left_out := config.stash.get(slow.LEFT_OUT, 0):
        terminalreporter.write_line(
            f"{left_out} slow tests were left out: --slow runs them too (make test ARGS=--slow)"
        )
    if others := config.stash.get(pooler_run.LEFT_OUT, []):
        where = "tests/support/pooler_run.py says why"
        terminalreporter.write_line(f"{len(others)} tests do not apply behind a pooler: {where}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("shortcut"):
        (name,) = marker.args
        if not is_on(name):
            pytest.skip(f"of the shortcut {name!r}, which is off")


def pytest_report_header(config: pytest.Config) -> str:
    return f"contract: --loop {config.option.loop} --seed {config.option.seed}"


def pytest_collection_finish(session: pytest.Session) -> None:
    # Each test collects garbage, to see what it left: the modules of the project are exempted here.
    gc.collect()
    gc.freeze()
    for factory in LOOPS.values():  # the first loop opens things for the process: libuv, a pipe
        factory().close()


@pytest.fixture(scope="module", autouse=True)
def _what_is_old_is_frozen() -> None:
    """Exempt the leftovers of earlier modules from the garbage collections of a module's tests.

    The leftovers are pytest's records of their tests, and their imports: after 3,000 tests a
    collection took six times as long, and the tests of some modules make a thousand collections.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    server.release()


@pytest.fixture(scope="session")
def conninfo() -> str:
    """Return the connection string of the server's own database, beside Django's."""
    return server.url


@pytest.fixture
def admin(conninfo: str) -> Iterator[psycopg.Connection[Any]]:
    """Open a session that watches the others."""
    with psycopg.connect(conninfo, autocommit=True, application_name="watcher") as connection:
        yield connection


class Runner:
    """Runs coroutines on a new loop each, and fails for errors that the loop would only log."""

    def __init__(self, factory: LoopFactory) -> None:
        self.factory = factory

    def __call__(self, main: Coroutine[Any, Any, Any], *, timeout: float = 30) -> Any:
        """Run `main` as `asyncio.run()` does; fail a test that hangs for `timeout` seconds."""
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
    """Return a runner of coroutines: on asyncio's loop, and on uvloop's."""
    return Runner(LOOPS[request.param])


@pytest.fixture
def run_once() -> Runner:
    """Return a runner of coroutines on asyncio's loop only."""
    return Runner(LOOPS["asyncio"])


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a lease, greenlet, task or session, or a new thread or file."""
    before = _threads(), _files()
    yield
    if _left_over(*before):  # objects that only the collector or pytest refers to do not count
        for record in request.node.stash.get(caplog_records_key, {}).get("call", ()):
            record.args, record.exc_info = (), None  # errors, and the frames that they refer to
        gc.collect()
    deadline = time.monotonic() + 5.0
    # A thread of a synchronous pool may be about to open a connection, or to end.
    while (left := _left_over(*before)) and left.keys() <= {"threads", "files"}:
        if time.monotonic() > deadline:
            break
        time.sleep(0.005)
    assert not left, f"the test has left {left}"


def _left_over(threads: set[threading.Thread], files: dict[str, str]) -> dict[str, list[object]]:
    # The first condition is for speed: there are a great many objects.
    found = [thing for thing in gc.get_objects() if type(thing) in _KINDS]
    left: dict[str, list[object]] = {
        "leases": [record for record in loops.statistics() if record.leased or record.waiting],
        "unfinished": [thing for thing in found if _is_unfinished(thing)],
        "portals": _more_than_are_kept(found),
        "threads": sorted(map(str, _threads() - threads)),
        "files": [each for each in _files().items() if each[0] not in files],
    }
    return {kind: things for kind, things in left.items() if things}


def _more_than_are_kept(things: list[Any]) -> list[object]:
    """Return the portals that neither run, nor wait for work, nor have ended."""
    mine = bridge._mine
    portals = [thing for thing in things if type(thing) is bridge.Portal and not thing.dead]
    others = [portal for portal in portals if portal.dropped is not mine.dropped]
    # Each thread keeps some portals; those of an ended thread have ended too.
    left = others if len(others) > mine.MOST * (threading.active_count() - 1) else []
    return [
        *left,
        *mine.idle[mine.MOST :],
        *({*portals} - {*others} - {*mine.idle} - {each for each in portals if each.working}),
    ]


# Objects that Django and asgiref keep for the process or the thread are not leftovers: connections
# of synchronous code from one request to the next, its pools, and the thread of `sync_to_async`.


def _threads() -> set[threading.Thread]:
    """Return the threads that run, except those that Django and asgiref keep."""
    executors = {_OF_ASGIREF, SyncToAsync.single_thread_executor}  # a test replaces the attribute
    kept: set[Any] = {thread for executor in executors for thread in executor._threads}
    for sync_pool in _sync_pools():
        kept |= {*sync_pool._workers, sync_pool._sched_runner}
    return {thread for thread in threading.enumerate() if thread not in kept}


def _files() -> dict[str, str]:
    """Return the open sockets, pipes and the like, by unique name; except those that are kept."""
    wrappers = connections.all(initialized_only=True)
    kept = [wrapper._own.connection for wrapper in wrappers if wrapper_is_ours(wrapper)]
    for sync_pool in _sync_pools():
        kept += sync_pool._pool
    numbers = {str(each.fileno()) for each in kept if each is not None and not each.closed}
    found: dict[str, str] = {}
    for number in _DESCRIPTORS.iterdir() if _DESCRIPTORS.exists() else ():
        with suppress(OSError):  # raised for the descriptor of the directory itself
            link = str(number.readlink())
            if link.startswith(("socket:", "pipe:", "anon_inode:")) and number.name not in numbers:
                found[f"{number.name} {link}" if link.startswith("anon_inode:") else link] = (
                    number.name
                )
    return found


def _sync_pools() -> list[Any]:
    from pgbackend.base import DatabaseWrapper  # needs Django's apps

    return list(DatabaseWrapper._connection_pools.values())


_OF_ASGIREF = SyncToAsync.single_thread_executor
_DESCRIPTORS = Path("/proc/self/fd")


def all_portals() -> list[bridge.Portal]:
    """Return the portals of all threads, also ended ones that are still referred to."""
    return [thing for thing in gc.get_objects() if type(thing) is bridge.Portal]


_KINDS = (bridge.Portal, asyncio.Task, Lease)


def _is_unfinished(thing: object) -> bool:
    cls = type(thing)
    if cls is bridge.Portal:
        return thing.working and not thing.dead
    if cls is asyncio.Task:
        return not thing.done()
    return cls is Lease and not thing.ended
