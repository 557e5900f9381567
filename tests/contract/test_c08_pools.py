"""Tests C8: each process, loop and alias has one pool, which survives the failures around it."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import psycopg
import pytest
from asgiref.sync import sync_to_async
from django.core.exceptions import ImproperlyConfigured
from django.db import connection, connections, transaction
from django.db.backends.signals import connection_created
from django.db.utils import OperationalError

import pgbackend
from pgbackend import aio, embedded
from pgbackend.driver.errors import PoolDeadlock, PoolTimeout
from pgbackend.metrics import connections as count_connections
from tests.conftest import Runner, wait_for
from tests.library.models import Tag
from tests.support.fixtures import by_link, pool_of_default, settings_of_default
from tests.support.link import Link
from tests.support.loops import LOOPS, LoopFactory
from tests.support.passwords import make_careful_role

#: Seconds within which a certain deadlock raises. The contract says 50 ms; the rest is for a
#: machine that does other things.
AT_ONCE = 0.05 * 4


def pid() -> int:
    """Return the session that executes a statement of its own."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        return int(cursor.fetchone()[0])


@contextmanager
def named_sessions(name: str, **changes: Any) -> Iterator[None]:
    """Name the sessions of 'default' with `name`."""
    given = connections.settings["default"]["OPTIONS"]
    options = {**given, "application_name": name, **changes.pop("OPTIONS", {})}
    with settings_of_default(OPTIONS=options, **changes):
        yield


def sessions(admin: psycopg.Connection[Any], name: str) -> list[int]:
    rows = admin.execute(
        "SELECT pid FROM pg_stat_activity WHERE application_name = %s AND "
        "backend_type = 'client backend'",
        [name],
    )
    return [row[0] for row in rows]


# --- One pool for each process, loop and alias --------------------------------------------------


two_aliases = pytest.mark.django_db(transaction=True, databases=["default", "other"])


@contextmanager
def pools_of_both(**options: Any) -> Iterator[None]:
    """Change options of the pools of both aliases, for loops that start in the block."""
    other = connections.settings["other"]
    before = other["OPTIONS"]
    with pool_of_default(**options):
        other["OPTIONS"] = connections.settings["default"]["OPTIONS"]
        yield
    other["OPTIONS"] = before


@two_aliases
def test_each_alias_on_each_loop_has_one_pool_opened_at_first_use(
    run: Runner, other_alias: str
) -> None:
    async def main() -> None:
        assert pgbackend.statistics() == []
        await asyncio.gather(*(Tag.objects.acount() for _ in range(20)))
        assert [record.alias for record in pgbackend.statistics()] == ["default"]
        await asyncio.gather(*(Tag.objects.using(other_alias).acount() for _ in range(20)))
        assert [record.alias for record in pgbackend.statistics()] == ["default", other_alias]

    run(main())


def test_a_pool_closes_with_its_loop_and_leaves_no_session(
    run: Runner, admin: psycopg.Connection[Any]
) -> None:
    async def main() -> int:
        await asyncio.gather(*(Tag.objects.acount() for _ in range(20)))
        return len(sessions(admin, "closes"))

    with named_sessions("closes"):
        assert run(main()) > 0
    assert pgbackend.statistics() == []
    wait_for(lambda: not sessions(admin, "closes"), "the sessions are closed")


def test_a_loop_may_end_with_leases_waiters_and_blocks(
    run: Runner, admin: psycopg.Connection[Any]
) -> None:
    """Tasks that `asyncio.run()` cancels at its end unwind, and nothing hangs or warns."""

    async def hold(held: asyncio.Event) -> None:
        async with transaction.atomic():
            await Tag.objects.acreate(name="never")
            held.set()
            await asyncio.Event().wait()

    async def main() -> None:
        held = asyncio.Event()
        tasks = [asyncio.create_task(hold(held))]
        await held.wait()
        tasks += [asyncio.create_task(Tag.objects.acount()) for _ in range(5)]
        while pgbackend.statistics()[0].waiting < 5:
            await asyncio.sleep(0)
        kept.extend(tasks)

    kept: list[asyncio.Task[Any]] = []
    with named_sessions("ends"), pool_of_default(max_size=1):
        started = monotonic()
        run(main())
        assert monotonic() - started < 10
    assert all(task.cancelled() for task in kept)
    wait_for(lambda: not sessions(admin, "ends"), "the sessions are closed")
    assert not Tag.objects.exists()


def test_psycopg_pools_own_names_are_the_options(run: Runner) -> None:
    async def main() -> pgbackend.PoolStatistics:
        await Tag.objects.acount()
        return pgbackend.statistics()[0]

    options = {
        "min_size": 2,
        "max_size": 3,
        "timeout": 1.5,
        "max_waiting": 7,
        "max_lifetime": 60,
        "max_idle": 30,
        "reconnect_timeout": 1.0,
        "num_workers": 1,
        "name": "mine",
    }
    with pool_of_default(**options):
        stats = run(main())
    assert (stats.alias, stats.min_size, stats.max_size) == ("default", 2, 3)


def test_three_loops_in_three_threads_and_sync_code_work_at_once(
    admin: psycopg.Connection[Any],
) -> None:
    together = threading.Barrier(4)
    found: dict[str, set[int]] = {}
    failures: list[BaseException] = []

    def serve(name: str, factory: LoopFactory) -> None:
        async def work(n: int) -> int:
            async with transaction.atomic():
                await Tag.objects.acreate(name=f"{name} {n}")
                assert await Tag.objects.filter(name__startswith=name).acount() >= 1
                return await aio.run(pid)

        async def main() -> None:
            together.wait(10)
            found[name] = set(await asyncio.gather(*(work(n) for n in range(30))))

        try:
            with asyncio.Runner(loop_factory=factory) as runner:
                runner.run(main())
        except BaseException as exc:
            failures.append(exc)

    kinds = list(LOOPS.values())
    with named_sessions("threads"):
        threads = [
            threading.Thread(target=serve, args=(f"loop {n}", kinds[n % len(kinds)]))
            for n in range(3)
        ]
        for thread in threads:
            thread.start()
        mine = pid()
        together.wait(10)
        for n in range(30):
            Tag.objects.create(name=f"sync {n}")
        for thread in threads:
            thread.join(20)
    assert not failures
    pids = [*found.values(), {mine}]
    assert len(pids) == 4 and sum(map(len, pids)) == len(set().union(*pids)), "shared"
    assert Tag.objects.count() == 120
    wait_for(lambda: not sessions(admin, "threads"), "the sessions are closed")


def test_200_loops_that_come_and_go_leave_nothing(
    loop_factory: LoopFactory, admin: psycopg.Connection[Any]
) -> None:
    async def main(n: int) -> None:
        assert await Tag.objects.acount() == 0
        if n % 3 == 0:
            async with transaction.atomic():
                await Tag.objects.filter(name="none").adelete()

    def files() -> int:
        return len(os.listdir("/proc/self/fd"))

    with named_sessions("guests"):
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(main(0))
        gc.collect()
        before = files()
        for n in range(200):
            with asyncio.Runner(loop_factory=loop_factory) as runner:
                runner.run(main(n))
            assert pgbackend.statistics() == []
            assert files() <= before + 3, n
    gc.collect()
    assert files() <= before
    wait_for(lambda: not sessions(admin, "guests"), "the sessions are closed")


def test_a_loop_in_a_thread_of_a_loop_has_a_pool_of_its_own(
    run: Runner, admin: psycopg.Connection[Any], loop_factory: LoopFactory
) -> None:
    def sync_code() -> tuple[int, int]:
        """Call `asyncio.run()` inside sync code, as a library may do."""

        async def inner() -> int:
            inner_pid = await aio.run(pid)
            assert len(pgbackend.statistics()) == 2
            return inner_pid

        with asyncio.Runner(loop_factory=loop_factory) as runner:
            return runner.run(inner()), threading.get_ident()

    async def main() -> None:
        here = await aio.run(pid)
        for in_thread in (asyncio.to_thread, lambda fn: sync_to_async(fn)()):
            there, ident = await in_thread(sync_code)
            assert there != here and ident != threading.get_ident()
            assert await aio.run(pid) == here
            assert len(pgbackend.statistics()) == 1

    # One connection in each pool: otherwise timing decides which one is given back.
    with named_sessions("nested"), pool_of_default(max_size=1):
        run(main())
    wait_for(lambda: not sessions(admin, "nested"), "the sessions are closed")


@two_aliases
def test_how_many_connections_a_process_has_and_may_open_is_one_sum(
    run: Runner, other_alias: str
) -> None:
    Tag.objects.count()
    before = count_connections()
    assert (before.async_open, before.async_max) == (0, 0)
    assert before.sync_open >= 1 and before.open == before.sync_open

    in_thread, done = threading.Event(), threading.Event()

    def work() -> None:
        settings_dict = {**connections.settings["default"], "OPTIONS": {}}
        wrapper = type(connections["default"])(settings_dict, alias="a thread's")
        with wrapper.cursor() as cursor:
            cursor.execute("SELECT 1")
        in_thread.set()
        done.wait(10)
        wrapper.close()

    async def main() -> None:
        async with pgbackend.pinned():
            await Tag.objects.acount()
            async with asyncio.TaskGroup() as group:
                group.create_task(Tag.objects.acount())
        await Tag.objects.using(other_alias).acount()
        now = count_connections()
        assert now.async_max == 8, "two aliases of four each"
        assert now.async_open == sum(record.size for record in pgbackend.statistics()) == 3
        assert now.sync_open == before.sync_open + 1
        assert now.sync_max == before.sync_max + 1
        assert now.open == now.async_open + now.sync_open
        assert now.max == now.async_max + now.sync_max

    thread = threading.Thread(target=work)
    thread.start()
    in_thread.wait(10)
    run(main())
    done.set()
    thread.join(10)
    assert count_connections() == before


def test_djangos_synchronous_pool_is_in_the_sum() -> None:
    settings_dict = {**connections.settings["default"], "CONN_MAX_AGE": 0}
    settings_dict["OPTIONS"] = {**settings_dict["OPTIONS"], "pool": {"min_size": 0, "max_size": 7}}
    wrapper = type(connections["default"])(settings_dict, alias="counted")
    before = count_connections()
    try:
        with wrapper.cursor() as cursor:
            cursor.execute("SELECT 1")
        now = count_connections()
        assert now.sync_open == before.sync_open + 1
        assert now.sync_max == before.sync_max + 7
    finally:
        wrapper.close()
        wrapper.close_pool()
    assert count_connections() == before


# --- Forks, and the end of the interpreter ------------------------------------------------------

PROBES = Path(__file__).parent / "probes"
DEPRECATED = ["-W", "ignore::DeprecationWarning"]  # a fork where threads have been


def run_probe(conninfo: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "DATABASE_URL": conninfo, "PYTHONPATH": str(PROBES.parents[2])},
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


@pytest.mark.sweep(one_in=3)
@pytest.mark.parametrize("scenario", ["preload", "by_multiprocessing", "in_a_transaction"])
def test_a_forked_child_never_touches_its_parents_sockets(conninfo: str, scenario: str) -> None:
    run_probe(conninfo, *DEPRECATED, str(PROBES / "forks.py"), scenario)


@pytest.mark.slow
def test_an_interpreter_ends_without_a_message_in_every_state(
    conninfo: str, admin: psycopg.Connection[Any]
) -> None:
    said = run_probe(conninfo, "-X", "dev", *DEPRECATED, str(PROBES / "exits.py"), "exit with")
    ends = json.loads(said)
    assert len(ends) == 15
    assert {one: end for one, end in ends.items() if end != [0, ""]} == {}
    left = "SELECT application_name FROM pg_stat_activity WHERE application_name LIKE 'exit with%'"
    wait_for(lambda: not admin.execute(left).fetchall(), "the sessions are closed")


# --- Failures are raised at once, with their cause ------------------------------------------------


def failure_of_a_query(run: Runner) -> tuple[BaseException, float]:
    async def main() -> BaseException:
        try:
            await Tag.objects.acount()
        except Exception as exc:
            return exc
        raise AssertionError("no error")

    started = monotonic()
    return run(main()), monotonic() - started


def test_an_unknown_database_fails_at_once_with_the_servers_message(run: Runner) -> None:
    with settings_of_default(NAME="no_such_database"):
        exc, seconds = failure_of_a_query(run)
    assert isinstance(exc, OperationalError) and seconds < 1
    assert 'database "no_such_database" does not exist' in str(exc)


def test_a_bad_option_fails_at_once_with_its_name(run: Runner) -> None:
    with settings_of_default(OPTIONS={"conect_timeout": 1}):
        exc, seconds = failure_of_a_query(run)
    assert isinstance(exc, ImproperlyConfigured) and seconds < 1
    assert "'conect_timeout'. Did you mean 'connect_timeout'?" in str(exc)


def test_without_a_grace_a_server_that_is_not_there_fails_at_once_with_the_cause(
    run: Runner,
) -> None:
    with settings_of_default(HOST="127.0.0.1", PORT="1"), pool_of_default(outage_grace=0):
        exc, seconds = failure_of_a_query(run)
    assert isinstance(exc, OperationalError) and seconds < 1
    assert "Connection refused" in str(exc)


def test_an_exhausted_pool_says_who_holds_it_and_what_to_set(run: Runner) -> None:
    async def hold(done: asyncio.Event) -> None:
        async with pgbackend.pinned():
            await Tag.objects.acount()
            await done.wait()

    async def main() -> None:
        done = asyncio.Event()
        holders = [asyncio.create_task(hold(done), name=f"hoarder {n}") for n in range(2)]
        while not pgbackend.statistics() or pgbackend.statistics()[0].leased < 2:
            await asyncio.sleep(0)
        results = await asyncio.gather(
            *(Tag.objects.acount() for _ in range(3)), return_exceptions=True
        )
        done.set()
        await asyncio.gather(*holders)
        for exc in results:
            assert isinstance(exc, OperationalError) and isinstance(exc.__cause__, PoolTimeout)
            for part in (
                "'default'",
                "2 of 2 in use",
                "waiting",
                "'hoarder 0' for 0.",
                "'hoarder 1' for 0.",
                "DATABASES['default']['OPTIONS']['pool']",
                "'max_size'",
                "'timeout'",
            ):
                assert part in str(exc)

    with pool_of_default(max_size=2, timeout=0.1):
        run(main())


# --- The server goes, and comes back ------------------------------------------------------------


class PrivateServer:
    """Runs a server of a test's own, that can be stopped and started again."""

    def __init__(self) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="pgbackend-test-", dir="/tmp"))
        self.base.chmod(0o755)
        self.handle: embedded.Server | None = None
        self.start()

    def start(self) -> None:
        self.handle = embedded.server(self.base / "data", settings={"fsync": "off"})

    @property
    def url(self) -> str:
        assert self.handle is not None
        return self.handle.url

    def stop(self) -> None:
        """Stop the server and wait: its keeper process stops it, not its last user."""
        if self.handle is not None:
            self.handle.release()
        self.handle = None
        wait_for(lambda: not list(self.base.rglob("postmaster.pid")), "the server has stopped", 10)

    def close(self) -> None:
        self.stop()
        wait_for(self._is_removed, "nobody writes there any more")

    def _is_removed(self) -> bool:
        shutil.rmtree(self.base, ignore_errors=True)
        return not self.base.exists()


@pytest.fixture(scope="module")
def private_server() -> Iterator[PrivateServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DATABASE_URL")
        server = PrivateServer()
        yield server
        server.close()


@contextmanager
def on_private(server: PrivateServer, **changes: Any) -> Iterator[None]:
    given = embedded.database_settings(server.url)
    pool = connections.settings["default"]["OPTIONS"]["pool"]
    options = {**given.pop("OPTIONS", {}), "pool": pool}
    with settings_of_default(**{**given, "OPTIONS": options, **changes}):
        yield


async def select() -> int:
    async with transaction.atomic():
        return await aio.run(pid)


def test_a_wrong_password_fails_at_once_and_is_not_shown(
    run: Runner, private_server: PrivateServer
) -> None:
    with psycopg.connect(private_server.url, autocommit=True) as admin:
        make_careful_role(admin)
    private_server.stop()  # it must read its rules anew
    private_server.start()
    with on_private(private_server, USER="careful", PASSWORD="wr0ng"):
        exc, seconds = failure_of_a_query(run)
        assert isinstance(exc, OperationalError) and seconds < 1
        assert "password authentication failed" in str(exc)
        assert "wr0ng" not in repr(exc) + str(exc) + repr(exc.__cause__)
    with on_private(private_server, USER="careful", PASSWORD="right"):
        assert run(select())


@pytest.mark.slow
def test_a_restarted_server_is_found_again_and_no_later_request_fails(
    run: Runner, private_server: PrivateServer
) -> None:
    async def main() -> None:
        url = private_server.url
        before = {await select() for _ in range(3)}
        await asyncio.to_thread(private_server.stop)
        with pytest.raises(OperationalError) as caught:
            await select()
        assert "connection" in str(caught.value) and "failed" in str(caught.value)
        await asyncio.to_thread(private_server.start)
        assert private_server.url == url
        ready = monotonic()
        while True:
            try:
                after = await select()
                break
            except OperationalError:
                await asyncio.sleep(0.01)
        assert monotonic() - ready < 1
        assert after not in before
        await asyncio.gather(*(select() for _ in range(20)))

    with on_private(private_server):
        run(main())


def test_a_restart_between_two_requests_fails_neither(
    run: Runner, private_server: PrivateServer
) -> None:
    """A server is upgraded at night: the pool notices dead connections before it uses them."""

    async def main() -> None:
        await asyncio.gather(*(select() for _ in range(4)))
        # A connection attempt still under way would fail, and answer for half a second.
        while (statistics := pgbackend.statistics()[0]).idle < statistics.size:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(private_server.stop)
        await asyncio.to_thread(private_server.start)
        await asyncio.gather(*(select() for _ in range(20)))

    with on_private(private_server):
        run(main())


@pytest.fixture
def link(conninfo: str) -> Iterator[Link]:
    opened = Link(conninfo)
    yield opened
    opened.close()


@pytest.mark.slow
def test_an_outage_of_16_seconds_is_told_at_once_and_ends_within_a_second(
    run: Runner, link: Link
) -> None:
    async def client(down: asyncio.Event, failures: list[tuple[str, float]]) -> None:
        while down.is_set():
            started = monotonic()
            try:
                await Tag.objects.acount()
            except OperationalError as exc:
                failures.append((str(exc), monotonic() - started))
            else:
                raise AssertionError("an answer from nowhere")
            await asyncio.sleep(0.05)

    async def main() -> None:
        await asyncio.gather(*(Tag.objects.acount() for _ in range(8)))
        failures: list[tuple[str, float]] = []
        down = asyncio.Event()
        link.cut()
        before, started = link.attempts, monotonic()
        down.set()
        clients = [asyncio.create_task(client(down, failures)) for _ in range(5)]
        attempts: list[float] = []
        while monotonic() - started < 16:
            await asyncio.sleep(0.01)
            attempts += [monotonic() - started] * (link.attempts - before - len(attempts))
        down.clear()
        await asyncio.gather(*clients)
        link.restore()
        restored = monotonic()
        while True:
            try:
                await Tag.objects.acount()
                break
            except OperationalError:
                await asyncio.sleep(0.01)
        assert monotonic() - restored < 1
        in_each = [sum(t <= other < t + 0.95 for other in attempts) for t in attempts]
        assert max(in_each) <= 2 and len(attempts) > 20, attempts
        assert len(failures) > 300, "each at once"
        assert max(waited for _, waited in failures) < 0.5
        # The link may have been cut while the first requests were under way.
        causes = ("connection to server at", "server closed the connection")
        assert all(any(cause in text for cause in causes) for text, _ in failures), failures[:3]
        await asyncio.gather(*(Tag.objects.acount() for _ in range(20)))

    with by_link(link), pool_of_default(outage_grace=0):
        run(main(), timeout=40)


def test_a_hundred_idle_connections_killed_fail_no_request(
    run: Runner, admin: psycopg.Connection[Any]
) -> None:
    async def hold(all_held: asyncio.Barrier) -> None:
        async with pgbackend.pinned():
            await Tag.objects.acount()
            await all_held.wait()

    async def main() -> None:
        await asyncio.gather(*(hold(everybody) for everybody in [asyncio.Barrier(100)] * 100))
        idle = sessions(admin, "hundred")
        assert len(idle) == 100 == pgbackend.statistics()[0].idle
        admin.execute("SELECT pg_terminate_backend(pid) FROM unnest(%s::int[]) AS pid", [idle])
        while sessions(admin, "hundred"):
            await asyncio.sleep(0.01)
        assert await asyncio.gather(*(Tag.objects.acount() for _ in range(300))) == [0] * 300

    with named_sessions("hundred"), pool_of_default(max_size=100, timeout=20):
        run(main())


def test_sessions_that_end_while_others_are_opened_fail_no_later_request(
    run: Runner, admin: psycopg.Connection[Any]
) -> None:
    """The server goes on accepting; its end of other sessions does not fail the next attempt."""
    slow: list[str] = []
    preparing = asyncio.Event()

    def receive(connection: Any, **kwargs: Any) -> None:
        if slow:
            preparing.set()
            with connection.cursor() as cursor:
                cursor.execute(slow.pop())

    async def main() -> None:
        await Tag.objects.acount()
        slow.append("SELECT pg_sleep(60)")
        await asyncio.gather(*(Tag.objects.acount() for _ in range(3)))
        await preparing.wait()
        ended = sessions(admin, "ended")
        assert len(ended) == 2
        admin.execute("SELECT pg_terminate_backend(pid) FROM unnest(%s::int[]) AS pid", [ended])
        while set(ended) & set(sessions(admin, "ended")):
            await asyncio.sleep(0.001)
        for _ in range(5):  # the pool may not have noticed yet
            await asyncio.sleep(0.01)
            assert await asyncio.gather(*(Tag.objects.acount() for _ in range(20))) == [0] * 20

    connection_created.connect(receive)
    try:
        with named_sessions("ended"), pool_of_default(max_size=3):
            run(main())
    finally:
        connection_created.disconnect(receive)


def test_a_storm_that_kills_backends_harms_only_what_is_in_flight(
    run: Runner, admin: psycopg.Connection[Any]
) -> None:
    outcomes: list[str] = []
    causes: set[str] = set()

    async def client(n: int, storm: asyncio.Event) -> None:
        done = 0
        while storm.is_set():
            name = f"{n} {done}"
            done += 1
            try:
                async with transaction.atomic():
                    await Tag.objects.acreate(name=name)
                    assert await Tag.objects.filter(name=name).acount() == 1
                outcomes.append(name)
            except OperationalError as exc:
                causes.add(str(exc).strip())
                outcomes.append("failed")

    async def main() -> None:
        storm = asyncio.Event()
        storm.set()
        clients = [asyncio.create_task(client(n, storm)) for n in range(12)]
        for _ in range(20):
            await asyncio.sleep(0.05)
            for killed in sessions(admin, "storm"):
                admin.execute("SELECT pg_terminate_backend(%s)", [killed])
        storm.clear()
        await asyncio.gather(*clients)
        kept = {name async for name in Tag.objects.values_list("name", flat=True)}
        told = {name for name in outcomes if name != "failed"}
        # A commit whose answer was lost may have been done: every reported row must be there.
        assert told <= kept and len(kept - told) <= outcomes.count("failed")
        assert len(told) > 50
        assert causes and "" not in causes, "every failure names its cause"
        assert await asyncio.gather(*(select() for _ in range(12)))
        stats = pgbackend.statistics()[0]
        assert (stats.leased, stats.waiting) == (0, 0)

    with named_sessions("storm"):
        run(main())


def test_a_silent_link_is_bounded_by_the_callers_timeout(run: Runner, link: Link) -> None:
    async def main() -> None:
        await Tag.objects.acount()
        link.freeze()
        started = monotonic()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await Tag.objects.acount()
        assert monotonic() - started < 2
        link.thaw()
        assert await asyncio.gather(*(Tag.objects.acount() for _ in range(8))) == [0] * 8

    with by_link(link):
        run(main())


# --- Holders that wait for each other -----------------------------------------------------------


async def count(alias: str = "default") -> int:
    return await Tag.objects.using(alias).acount()


Story = Callable[[], Coroutine[Any, Any, Any]]


async def nested_await() -> None:
    await pgbackend.detached(count())


async def in_a_task() -> None:
    await asyncio.create_task(pgbackend.detached(count()), name="the child")


async def in_gather() -> None:
    await asyncio.gather(pgbackend.detached(count()), pgbackend.detached(count()))


async def in_a_group() -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(pgbackend.detached(count()), name="the child")


async def in_a_task_of_a_task() -> None:
    await asyncio.create_task(in_a_group())


INNER = [nested_await, in_a_task, in_gather, in_a_group, in_a_task_of_a_task]


def cause_of(exc: BaseException) -> PoolDeadlock:
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    assert isinstance(exc, OperationalError), repr(exc)
    assert isinstance(exc.__cause__, PoolDeadlock), repr(exc)
    return exc.__cause__


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("outer", ["atomic", "pinned"])
def test_a_holder_that_waits_for_a_second_connection_of_its_full_pool_is_told_at_once(
    run: Runner, inner: Story, outer: str
) -> None:
    async def parent() -> None:
        async with transaction.atomic() if outer == "atomic" else pgbackend.pinned():
            await count()
            await inner()

    async def main() -> None:
        await count()
        task = asyncio.create_task(parent(), name="the parent")
        started = monotonic()
        await asyncio.wait([task])
        if outer == "pinned" and inner is nested_await:
            assert task.result() is None, "a task shares its own pinned connection"
            return
        assert task.exception() is not None
        text = str(cause_of(task.exception()))
        assert monotonic() - started < AT_ONCE
        assert "'the parent' (one of 'default' for 0.0" in text
        if inner in (in_a_task, in_a_group):
            assert "task 'the child' would wait for ever" in text
        assert "DATABASES['default']['OPTIONS']['pool']" in text and "'max_size'" in text
        assert await count() == 0

    with pool_of_default(max_size=1, timeout=5):
        run(main())


@two_aliases
def test_two_tasks_that_wait_for_each_others_connection_are_told_at_once(
    run: Runner, other_alias: str
) -> None:
    """Each holds a connection to one database and wants one to the other; the last fails."""

    async def work(first: str, second: str, both: asyncio.Barrier) -> float:
        async with transaction.atomic(first):
            await count(first)
            await both.wait()
            started = monotonic()
            try:
                await count(second)
            except OperationalError as exc:
                exc.add_note(str(monotonic() - started))
                raise
            return monotonic() - started

    async def main() -> None:
        both = asyncio.Barrier(2)
        tasks = [
            asyncio.create_task(work("default", other_alias, both), name="north"),
            asyncio.create_task(work(other_alias, "default", both), name="south"),
        ]
        await asyncio.wait(tasks)
        errors = [task.exception() for task in tasks if task.exception() is not None]
        assert len(errors) == 1, "the other goes on"
        text = str(cause_of(errors[0]))
        assert "'north' (one of 'default'" in text and "'south' (one of 'other'" in text
        assert float(errors[0].__notes__[0]) < AT_ONCE

    with pools_of_both(max_size=1, timeout=5):
        run(main())


def test_every_one_of_many_holders_that_wait_is_part_of_the_circle(run: Runner) -> None:
    """Three parents hold all connections and await children that need one: two can be served."""

    async def parent(everybody: asyncio.Barrier) -> int:
        async with transaction.atomic():
            await count()
            await everybody.wait()
            return await asyncio.create_task(pgbackend.detached(count()))

    async def main() -> None:
        everybody = asyncio.Barrier(3)
        started = monotonic()
        results = await asyncio.gather(
            *(asyncio.create_task(parent(everybody), name=f"parent {n}") for n in range(3)),
            return_exceptions=True,
        )
        assert monotonic() - started < 1
        errors = [exc for exc in results if isinstance(exc, BaseException)]
        assert len(errors) == 1
        text = str(cause_of(errors[0]))
        assert all(f"'parent {n}' (one of 'default'" in text for n in range(3))

    with pool_of_default(max_size=3, timeout=5):
        run(main())


async def sleeps() -> None:
    await asyncio.sleep(0.05)


async def waits_for_an_event() -> None:
    event = asyncio.Event()
    asyncio.get_running_loop().call_later(0.05, event.set)
    await event.wait()


async def waits_for_the_database() -> None:
    await aio.run(lambda: connection.cursor().execute("SELECT pg_sleep(0.05)"))


async def waits_for_a_socket() -> None:
    import socket

    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        loop = asyncio.get_running_loop()
        loop.call_later(0.05, theirs.send, b"x")
        await loop.sock_recv(ours, 1)


async def waits_for_a_thread() -> None:
    await asyncio.to_thread(threading.Event().wait, 0.05)


async def waits_for_a_task_that_sleeps() -> None:
    await asyncio.create_task(sleeps())


async def waits_for_one_that_sleeps_and_one_in_the_queue() -> None:
    first = asyncio.create_task(sleeps())
    second = asyncio.create_task(pgbackend.detached(count()))
    await asyncio.wait([first, second], return_when=asyncio.FIRST_COMPLETED)
    second.cancel()


async def waits_at_most_so_long_for_one_in_the_queue() -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(pgbackend.detached(count())), 0.05)


async def is_about_to_run() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


BUSY = [
    sleeps,
    waits_for_an_event,
    waits_for_the_database,
    waits_for_a_socket,
    waits_for_a_thread,
    waits_for_a_task_that_sleeps,
    waits_for_one_that_sleeps_and_one_in_the_queue,
    waits_at_most_so_long_for_one_in_the_queue,
    is_about_to_run,
]


@pytest.mark.parametrize("busy", BUSY)
def test_a_holder_that_waits_for_anything_else_is_never_reported(run: Runner, busy: Story) -> None:
    async def hold(held: asyncio.Event) -> None:
        async with transaction.atomic():
            await count()
            held.set()
            await busy()

    async def main() -> None:
        held = asyncio.Event()
        holder = asyncio.create_task(hold(held))
        await held.wait()
        assert await asyncio.gather(*(count() for _ in range(5))) == [0] * 5
        await holder
        assert pgbackend.statistics()[0].requests_errors <= 1, "the one that was cancelled"

    with pool_of_default(max_size=1, timeout=5):
        run(main())


@two_aliases
def test_no_circle_of_queues_is_missed_and_all_others_are_served(
    run: Runner, other_alias: str, request: pytest.FixtureRequest
) -> None:
    """Each task needs random databases: it ends well or fails at once; no task times out."""
    rng = random.Random(f"{request.config.option.seed}")
    outcomes: list[str] = []

    async def work(pauses: int, aliases: list[str]) -> None:
        try:
            async with transaction.atomic(aliases[0]):
                await count(aliases[0])
                for _ in range(pauses):
                    await asyncio.sleep(0)
                async with transaction.atomic(aliases[1]):
                    await count(aliases[1])
            outcomes.append("served")
        except OperationalError as exc:
            cause_of(exc)
            outcomes.append("told")

    async def main() -> None:
        aliases = ["default", other_alias]
        await asyncio.gather(*(work(rng.randrange(4), rng.sample(aliases, 2)) for _ in range(500)))
        assert len(outcomes) == 500
        assert outcomes.count("served") > 20 and outcomes.count("told") > 5, outcomes

    with pools_of_both(max_size=2, timeout=10):
        started = monotonic()
        run(main())
        assert monotonic() - started < 9, "somebody waited for the timeout"
