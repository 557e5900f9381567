"""Tests C17: errors and a dump that name who holds connections, and bounds on how long."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psycopg
import pytest
from asgiref.sync import async_to_sync
from django.core.exceptions import ImproperlyConfigured
from django.db import InterfaceError, OperationalError, connection, connections, transaction
from django.http import HttpRequest, HttpResponse
from django.urls import path, re_path

import pgbackend
from pgbackend import aio, blocking, conf, dump_signal
from pgbackend.driver import dump, loops
from tests.conftest import Runner, wait_for
from tests.library.models import Tag
from tests.support.exchange import Exchange
from tests.support.fixtures import pool_of_default
from tests.support.processes import Program, run_all

HERE = re.escape(__file__)
SECRET = "a-value-that-nobody-may-see"


@contextmanager
def pool(**options: Any) -> Iterator[None]:
    """Give the default alias a pool of one connection, for loops that start in the block."""
    with pool_of_default(**{"max_size": 1, "timeout": 0.3, **options}):
        yield


@contextmanager
def no_watch_left() -> Iterator[None]:
    try:
        yield
    finally:
        blocking.stop()
        blocking._bound = None


def line_of(function: Any, offset: int) -> str:
    return f"{HERE}:{function.__code__.co_firstlineno + offset}"


def sleep(seconds: float = 30) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_sleep(%s), %s", [seconds, SECRET])


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def leases() -> list[Any]:
    return [lease for each in loops.open_pools() for lease in each.held()]


def waiting() -> int:
    return sum(record.waiting for record in pgbackend.statistics())


async def is_in_flight() -> None:
    """Wait until a statement of the pool's only lease is in flight."""
    await until(lambda: any(lease.physical.watch.future for lease in leases()))


async def error_of_another() -> str:
    with pytest.raises(OperationalError) as caught:
        await Tag.objects.acount()
    return str(caught.value)


@contextmanager
def served(settings: Any, view: Any, **more: Any) -> Iterator[Exchange]:
    """Let `view` answer requests for ``/reports/7``; yield such a request."""

    class urls:  # noqa: N801 - a module
        urlpatterns = [path("reports/<int:number>", view)]

    settings.MIDDLEWARE, settings.ROOT_URLCONF = [], urls
    exchange = Exchange()
    exchange.scope |= {"path": "/reports/7", "query_string": f"key={SECRET}".encode(), **more}
    yield exchange


async def cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.wait([task])


# --- Errors that name the holders ---------------------------------------------------------------


async def report(request: HttpRequest, number: int) -> HttpResponse:
    await aio.run(sleep)
    return HttpResponse()


async def report_of_a_task(request: HttpRequest, number: int) -> HttpResponse:
    await asyncio.gather(aio.run(sleep))
    return HttpResponse()


@pytest.mark.parametrize("view", [report, report_of_a_task])
def test_a_timeout_names_the_holder_by_its_request_and_the_place_and_age_of_its_statement(
    run: Runner, settings: Any, view: Any
) -> None:
    async def main() -> str:
        with served(settings, view) as exchange:
            request = asyncio.create_task(exchange.serve(), name="the request")
            await is_in_flight()
            error = await error_of_another()
            await cancel(request)
            return error

    with pool():
        error = run(main())
    assert "GET /reports/7" in error
    assert view is not report or "'the request' (GET /reports/7)" in error
    assert re.search(rf"in a statement for 0\.\d\d s, at {line_of(sleep, 2)}", error), error
    assert "opened at" in error
    assert SECRET not in error


def test_a_timeout_names_a_holder_that_does_nothing(run: Runner) -> None:
    async def hold(held: asyncio.Event) -> None:
        async with transaction.atomic():
            await Tag.objects.acreate(name=SECRET)
            held.set()
            await asyncio.sleep(30)

    async def main() -> str:
        held = asyncio.Event()
        holder = asyncio.create_task(hold(held), name="the holder")
        await held.wait()
        error = await error_of_another()
        await cancel(holder)
        return error

    with pool():
        error = run(main())
    assert "held by 'the holder' for 0." in error
    assert re.search(rf"idle in a transaction for \d\.\d\d s, at {line_of(hold, 4)}", error), error


def test_a_timeout_names_a_stream_that_nobody_reads(run: Runner) -> None:
    async def hold(held: asyncio.Event) -> None:
        async for _ in Tag.objects.aiterator(chunk_size=1):
            held.set()
            await asyncio.sleep(30)

    async def main() -> str:
        await Tag.objects.abulk_create(Tag(name=f"{number}") for number in range(5))
        held = asyncio.Event()
        holder = asyncio.create_task(hold(held))
        await held.wait()
        error = await error_of_another()
        await cancel(holder)
        return error

    with pool():
        error = run(main())
    assert re.search(r"idle for \d\.\d\d s with an open stream", error), error
    assert re.search(line_of(hold, 3), error), error


def test_a_timeout_lists_the_oldest_holders_of_a_large_pool(run: Runner) -> None:
    async def main() -> str:
        holders = [asyncio.create_task(aio.run(sleep)) for _ in range(12)]
        await until(lambda: len(leases()) == 12)
        error = await error_of_another()
        await asyncio.gather(*map(cancel, holders))
        return error

    with pool(max_size=12):
        error = run(main())
    assert error.count("in a statement for") == 10
    assert "and 2 more" in error


# --- A loop that was blocked --------------------------------------------------------------------


async def block(seconds: float) -> None:
    time.sleep(seconds)  # noqa: ASYNC251 - the point


@pytest.mark.sweep(one_in=2)
@pytest.mark.parametrize("pool_is_open", [False, True])
def test_who_waits_while_the_loop_is_blocked_is_served_afterwards(
    run: Runner, pool_is_open: bool
) -> None:
    async def main() -> list[int]:
        if pool_is_open:
            await Tag.objects.acount()
        readers = [asyncio.create_task(Tag.objects.acount()) for _ in range(10)]
        await asyncio.gather(asyncio.create_task(block(1.0)), *readers)
        return [reader.result() for reader in readers]

    with pool(timeout=0.5):
        assert run(main()) == [0] * 10


@pytest.mark.slow
def test_a_timeout_names_the_loop_that_was_blocked(run: Runner) -> None:
    async def main() -> tuple[str, float]:
        holder = asyncio.create_task(aio.run(sleep))
        await is_in_flight()
        began = time.monotonic()
        reader = asyncio.create_task(error_of_another())
        await until(waiting)
        await block(1.0)
        error = await reader
        waited = time.monotonic() - began
        await cancel(holder)
        return error, waited

    with pool():
        error, waited = run(main())
    assert re.search(r"the event loop was blocked for [01]\.\d\d s", error), error
    assert "PGBACKEND_SLOW_STEP" in error
    assert waited > 1.5, "it gets more time, in which connections could come free"


@pytest.mark.slow
def test_a_timeout_names_the_request_that_blocked_the_loop_if_requests_are_watched(
    run: Runner, settings: Any
) -> None:
    async def view(request: HttpRequest, number: int) -> HttpResponse:
        await block(1.0)
        return HttpResponse()

    async def main() -> str:
        with served(settings, view) as exchange:
            holder = asyncio.create_task(aio.run(sleep))
            await is_in_flight()
            reader = asyncio.create_task(error_of_another())
            await until(waiting)
            await exchange.serve()
            error = await reader
            await cancel(holder)
            return error

    settings.PGBACKEND_SLOW_STEP = 0.1
    with pool(), no_watch_left():
        error = run(main())
    assert re.search(r"blocked for [01]\.\d\d s meanwhile: by GET /reports/7,", error), error


# --- The dump -----------------------------------------------------------------------------------


@pytest.mark.parametrize("watched", [0, 20])
def test_the_dump_shows_leases_queues_and_the_stack_of_each_portal(
    run: Runner, settings: Any, watched: int
) -> None:
    settings.PGBACKEND_SLOW_STEP = watched

    async def main() -> str:
        with served(settings, report) as exchange:
            request = asyncio.create_task(exchange.serve(), name="the request")
            await is_in_flight()
            reader = asyncio.create_task(Tag.objects.acount(), name="the reader")
            await until(waiting)
            text = pgbackend.dump()
            await cancel(request)
            await reader
            return text

    with pool(timeout=10), no_watch_left():
        text = run(main())
    assert re.search(r"Pool 'default' in thread 'MainThread': 1 of 1 leased, .* 1 waiting", text)
    assert re.search(r"Leased, server process \d+: 'the request' \(GET /reports/7\) for 0\.", text)
    assert re.search(r"Waiting: 'the reader' for \d\.\d\d s", text), text
    stack = text.partition("Portal of 'the request' (GET /reports/7)")[2]
    assert re.match(r" in thread 'MainThread': waits for the server's reply for 0\.", stack), text
    stack = stack.partition("\n\n")[0]
    first, second = report.__code__.co_firstlineno + 1, sleep.__code__.co_firstlineno + 2
    assert re.search(rf'{HERE}", line {first}, in report\n(.*\n)+?.*line {second}, in sleep', stack)
    assert SECRET not in text
    assert "Portal of 'the reader'" in text
    assert "waits for a connection of 'default'" in text


def test_a_path_that_a_stranger_chose_cannot_forge_lines_or_steer_a_terminal(
    run: Runner, settings: Any
) -> None:
    async def any_path(request: HttpRequest) -> HttpResponse:
        await aio.run(sleep)
        return HttpResponse()

    async def main() -> str:
        with served(settings, any_path, path="/\u00fc\x1b[2J\nPool 'forged'") as exchange:
            settings.ROOT_URLCONF.urlpatterns = [re_path(r"(?s:.*)", any_path)]
            request = asyncio.create_task(exchange.serve(), name="the request")
            await is_in_flight()
            text = pgbackend.dump()
            await cancel(request)
            return text

    with pool():
        text = run(main())
    assert "(GET /\u00fc\\x1b[2J\\nPool 'forged')" in text
    assert "\x1b" not in text


def test_the_dump_works_from_a_thread_while_the_code_of_a_portal_hangs(run: Runner) -> None:
    go_on = threading.Event()
    texts: list[str] = []

    def hang() -> None:
        Tag.objects.count()
        go_on.wait(20)

    def watch() -> None:
        wait_for(lambda: "has been blocked for" in pgbackend.dump(), "the block is noticed")
        texts.append(pgbackend.dump())
        go_on.set()

    async def main() -> None:
        await Tag.objects.acount()
        watcher = threading.Thread(target=watch)
        watcher.start()
        await asyncio.create_task(aio.run(hang), name="the culprit")
        watcher.join()

    with pool(timeout=1):
        run(main())
    stack = texts[0].partition("Portal of 'the culprit' in thread 'MainThread': runs\n")[2]
    line = hang.__code__.co_firstlineno + 2
    assert f"line {line}, in hang\n" in stack, texts[0]
    assert "in wait\n" in stack, "the innermost frame is there, too"


def test_the_dump_shows_what_coroutines_iterators_and_portals_inside_each_other_await(
    run: Runner,
) -> None:
    started = asyncio.Event()

    async def innermost(stop: asyncio.Event) -> None:
        started.set()
        await stop.wait()

    async def rows(stop: asyncio.Event) -> Any:
        await innermost(stop)
        yield 1

    async def reads(stop: asyncio.Event) -> None:
        async for _ in rows(stop):
            pass

    async def main() -> str:
        stop = asyncio.Event()
        task = asyncio.create_task(aio.run(async_to_sync(reads), stop), name="nested")
        await started.wait()
        text = pgbackend.dump()
        stop.set()
        await task
        return text

    text = run(main())
    stack = text.partition("Portal of 'nested'")[2].partition("\n\n")[0]
    found = [stack.find(f"in {name}\n") for name in ("reads", "rows", "innermost", "wait")]
    assert -1 not in found and found == sorted(found), text


def test_the_dump_is_empty_where_nothing_runs() -> None:
    assert pgbackend.dump().startswith("pgbackend in process ")
    assert "Portal" not in pgbackend.dump()


PROGRAM = """
import asyncio, os, signal, time
import django
from django.conf import settings

settings.configure(
    DATABASES={"default": {"ENGINE": "pgbackend", "NAME": "postgres"}},
    PGBACKEND_DUMP_SIGNAL="SIGUSR1",
)
django.setup()
from django.db import connection
from pgbackend import aio, conf

def hangs():
    os.kill(os.getpid(), signal.SIGUSR1)
    while not os.fstat(2).st_size:  # standard error is a file
        time.sleep(0.01)

connection.vendor
asyncio.run(aio.run(hangs))
"""


def test_a_signal_prints_the_dump_while_the_loop_hangs() -> None:
    (done,) = run_all([Program(["-c", PROGRAM])], timeout=60)
    text = done.errors
    assert done.returncode == 0, text
    assert re.search(r"Portal of '.*' in thread 'MainThread': runs\n", text), text
    assert "in hangs\n" in text


def test_a_dump_that_fails_does_not_end_the_thread_that_prints_it(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fails() -> str:
        raise RuntimeError("a bug")

    monkeypatch.setattr(dump, "text", fails)
    dump_signal._print_once()
    assert "RuntimeError: a bug" in capfd.readouterr().err
    monkeypatch.undo()
    dump_signal._print_once()
    assert capfd.readouterr().err.startswith("pgbackend in process")


# --- Bounds on holding --------------------------------------------------------------------------


async def stalled_stream() -> None:
    async for _ in Tag.objects.aiterator(chunk_size=1):
        await until_taken_back()


async def idle_transaction() -> None:
    async with transaction.atomic():
        await Tag.objects.acreate(name="never")
        await until_taken_back()


async def idle_transaction_with_another_statement() -> None:
    async with transaction.atomic():
        await Tag.objects.acreate(name="never")
        await until_taken_back()
        await Tag.objects.acount()


async def pinned() -> None:
    async with pgbackend.pinned():
        await Tag.objects.acount()
        await until_taken_back()
        await Tag.objects.acount()


async def pinned_before_a_block() -> None:
    async with pgbackend.pinned():
        await Tag.objects.acount()
        await until_taken_back()
        async with transaction.atomic():
            await Tag.objects.acount()


async def pinned_around_an_idle_transaction() -> None:
    async with pgbackend.pinned():
        await Tag.objects.acount()
        with suppress(InterfaceError):
            await idle_transaction()
        await Tag.objects.acount()


async def open_cursor() -> None:
    def hold() -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
            wait_until_taken_back()
            cursor.execute("SELECT 1")

    wait_until_taken_back = async_to_sync(until_taken_back)
    await aio.run(hold)


async def until_taken_back() -> None:
    """Wait until nobody holds the only connection."""
    await until(lambda: not leases())


async def idle_nested_transaction() -> None:
    async with transaction.atomic():
        transaction.on_commit(lambda: pytest.fail("it was rolled back"))
        async with transaction.atomic():
            await Tag.objects.acreate(name="never")
            await until_taken_back()


async def stalled_copy() -> None:
    def copy() -> None:
        with connection.cursor() as cursor:
            with cursor.copy("COPY (SELECT generate_series(1, 100000)) TO STDOUT") as rows:
                wait_until_taken_back()
                list(rows)

    wait_until_taken_back = async_to_sync(until_taken_back)
    await aio.run(copy)


async def stalled_stream_of_psycopgs() -> None:
    def stream() -> None:
        with connection.cursor() as cursor:
            for _ in cursor.stream("SELECT generate_series(1, 100000)"):
                wait_until_taken_back()

    wait_until_taken_back = async_to_sync(until_taken_back)
    await aio.run(stream)


HOLDS = [
    *(idle_transaction, idle_transaction_with_another_statement, idle_nested_transaction),
    *(stalled_stream, stalled_copy, stalled_stream_of_psycopgs, open_cursor),
    *(pinned, pinned_before_a_block, pinned_around_an_idle_transaction),
]


@pytest.mark.sweep(one_in=4)
@pytest.mark.parametrize("hold", HOLDS)
def test_by_choice_a_hold_that_is_too_long_ends_with_an_error_that_says_why(
    run: Runner, hold: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> str:
        with pytest.raises((InterfaceError, psycopg.InterfaceError)) as caught:
            await hold()
        assert await Tag.objects.acount() == 2, "the task goes on with another connection"
        return str(caught.value)

    Tag.objects.bulk_create([Tag(name="1"), Tag(name="2")])
    with pool(timeout=10, max_hold=0.2):
        error = run(main())
    assert "was taken back, because its holder sent no statement for 0." in error
    assert "'max_hold'" in error
    assert ("rolled back" in error) == ("transaction" in hold.__name__)
    (told,) = [record.getMessage() for record in caplog.records]
    assert "was taken back after 0." in told and __file__ in told


def test_a_statement_is_no_idle_hold_however_long_it_takes(run: Runner) -> None:
    def long() -> int:
        with transaction.atomic():
            sleep(0.6)
            return Tag.objects.count()

    with pool(timeout=10, max_hold=0.1):
        assert run.green(long) == 0


def test_a_hold_is_warned_of_once_with_its_place_and_age(
    run: Runner, caplog: pytest.LogCaptureFixture
) -> None:
    async def hold() -> None:
        async with transaction.atomic():
            await Tag.objects.acreate(name="kept")
            await until(lambda: caplog.records)
            await asyncio.sleep(0.1)

    with pool(hold_warning=0.1, max_hold=None):
        run(hold())
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("pgbackend.driver", logging.WARNING)
    assert re.search(rf"idle in a transaction for 0\.\d\d s, at {HERE}:\d+", record.getMessage()), (
        record.getMessage()
    )
    assert Tag.objects.get().name == "kept"


def test_the_warning_is_on_by_default_and_the_end_is_not(run: Runner) -> None:
    async def main() -> Any:
        await Tag.objects.acount()
        (found,) = loops.open_pools()
        return found.options.hold

    bounds = run(main())
    assert (bounds.warning, bounds.end) == (30.0, None)


def test_time_in_which_the_loop_is_blocked_does_not_count_as_a_hold(run: Runner) -> None:
    async def main() -> None:
        async with transaction.atomic():
            await Tag.objects.acreate(name="kept")
            await block(0.6)

    with pool(timeout=10, max_hold=0.3):
        run(main())
    assert Tag.objects.count() == 1


def test_a_statement_sets_no_timer_for_its_hold(run: Runner) -> None:
    async def main() -> int:
        await Tag.objects.acount()
        loop: Any = asyncio.get_running_loop()
        timers: list[Any] = []
        call_later = loop.call_later

        def counted(delay: float, callback: Any, *args: Any, **kwargs: Any) -> Any:
            timers.append(callback)
            return call_later(delay, callback, *args, **kwargs)

        loop.call_later = counted
        try:
            for _ in range(20):
                await Tag.objects.acount()
        finally:
            del loop.call_later
        return len(timers)

    with pool(max_hold=60, timeout=60):  # it beats every 5 s
        assert asyncio.run(main()) == 0


def test_sync_code_with_a_pool_takes_the_options_of_holding(admin: psycopg.Connection[Any]) -> None:
    connection.close()
    with pool(max_hold=60, timeout=10, min_size=0):
        wrapper: Any = connections["default"]
        try:
            assert Tag.objects.count() == 0
        finally:
            wrapper.close()
            wrapper.close_pool()


@pytest.mark.parametrize("name", ["SIGNOTHING", "SIGKILL", 10])
def test_a_wrong_name_of_a_signal_is_refused(settings: Any, name: object) -> None:
    settings.PGBACKEND_DUMP_SIGNAL = name
    with pytest.raises(ImproperlyConfigured, match="PGBACKEND_DUMP_SIGNAL"):
        conf.dump_signal()
