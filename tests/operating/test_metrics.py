"""Tests that what exporters read of the connections agrees with the server, and what it costs."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from django.db import OperationalError, connection, connections, transaction

import pgbackend
from pgbackend import aio, metrics
from pgbackend.driver import events, loops
from pgbackend.driver.tallies import BOUNDS, async_tallies, sync_tallies
from pgbackend.totals import Totals, observe, stop_observing, totals
from tests.conftest import Runner
from tests.library.models import Tag
from tests.support.fixtures import settings_of_default

NAME = "watched"


@pytest.fixture(autouse=True)
def tallies(fresh_tables: None) -> Iterator[None]:
    """Begin with nothing counted."""
    for each in (async_tallies, sync_tallies):
        each.forget()
    yield


@pytest.fixture
def observed() -> Iterator[None]:
    """Measure durations."""
    observe("tests")
    yield
    stop_observing("tests")


def of(kind: str, alias: str = "default") -> Totals:
    found = [each for each in totals() if (each.alias, each.kind) == (alias, kind)]
    assert len(found) <= 1
    return found[0] if found else Totals(alias, kind)


def set_pool(pool: dict[str, Any] | None) -> Any:
    """Return a block in which the sessions of the default alias have the name `NAME`."""
    options = {**connections.settings["default"]["OPTIONS"], "pool": pool}
    return settings_of_default(OPTIONS={**options, "application_name": NAME})


def on_server(admin: psycopg.Connection[Any]) -> dict[str, int]:
    """Return how many sessions of `NAME` are in use, and how many are idle, as the server says."""
    rows = admin.execute(
        "SELECT state, count(*) FROM pg_stat_activity WHERE application_name = %s GROUP BY 1",
        [NAME],
    ).fetchall()
    counts = {"used": 0, "idle": 0}
    for state, count in rows:
        counts["idle" if state == "idle" else "used"] += count
    return counts


async def agreed(admin: psycopg.Connection[Any], kind: str, used: int) -> Totals:
    """Wait until the server has `used` sessions in use; return totals that say the same."""
    async with asyncio.timeout(20):
        while True:
            server = on_server(admin)
            mine = of(kind)
            mine_says = {"used": mine.used, "idle": mine.idle}
            if server["used"] == used and not mine.preparing and mine_says == server:
                return mine
            await asyncio.sleep(0.005)


async def hold(stop: asyncio.Event) -> None:
    async with transaction.atomic():
        await Tag.objects.acount()
        await stop.wait()


def test_the_totals_agree_with_the_server_under_load(
    run: Runner, admin: psycopg.Connection[Any]
) -> None:
    """The load stops four times: nobody, all lent, more wanted, and half given back."""

    async def main() -> None:
        stops = [asyncio.Event() for _ in range(9)]
        await Tag.objects.acount()
        await agreed(admin, "async", 0)
        tasks = [asyncio.create_task(hold(stop)) for stop in stops]
        mine = await agreed(admin, "async", 5)
        while of("async").waiting < 4:
            await asyncio.sleep(0.005)
        assert (mine.min_size, mine.max_size) == (2, 5)
        (record,) = pgbackend.statistics("default")
        assert (record.leased, record.idle, record.size, record.waiting) == (5, 0, 5, 4)
        for stop in stops[:6]:
            stop.set()
        await asyncio.wait(tasks[:6])
        mine = await agreed(admin, "async", 3)
        assert mine.waiting == 0
        for stop in stops[6:]:
            stop.set()
        await asyncio.wait(tasks)
        mine = await agreed(admin, "async", 0)
        assert (mine.idle, metrics.connections().async_open) == (5, 5)

    with set_pool({"min_size": 2, "max_size": 5}):
        run(main())
        mine = of("async")
    assert (mine.used, mine.idle, mine.waiting, mine.max_size) == (0, 0, 0, 0)
    assert mine.counters["requests"] == 10


def test_without_a_pool_the_totals_agree_with_the_server(
    run_once: Runner, admin: psycopg.Connection[Any]
) -> None:
    async def main() -> None:
        stop = asyncio.Event()
        tasks = [asyncio.create_task(hold(stop)) for _ in range(7)]
        mine = await agreed(admin, "async", 7)
        assert (mine.max_size, mine.min_size) == (None, 0)
        stop.set()
        await asyncio.wait(tasks)
        await agreed(admin, "async", 0)

    with set_pool(None):
        run_once(main())


def select_in_block(inside: threading.Event, leave: threading.Event) -> None:
    with transaction.atomic():
        Tag.objects.count()
        inside.set()
        assert leave.wait(20)


@pytest.mark.parametrize("kind", ["thread", "sync"])
def test_the_connections_of_sync_code_agree_with_the_server(
    run_once: Runner, admin: psycopg.Connection[Any], kind: str
) -> None:
    def other(inside: threading.Event, leave: threading.Event) -> None:
        try:
            select_in_block(inside, leave)
        finally:
            connection.close()

    with set_pool({"min_size": 1, "max_size": 3} if kind == "sync" else None):
        connection.close()
        connections["default"].close_pool()  # of the other options
        inside, leave = threading.Event(), threading.Event()
        with ThreadPoolExecutor(1) as executor:
            Tag.objects.count()
            if kind == "sync":
                connection.close()  # gives it back
            done = executor.submit(other, inside, leave)
            assert inside.wait(20)
            mine = run_once(agreed(admin, kind, 1))
            assert mine.used == 1
            leave.set()
            done.result()
        counts = run_once(agreed(admin, kind, 0)) if kind == "sync" else of(kind)
        assert counts.idle >= 1
        connection.close()
        connections["default"].close_pool()
        if kind == "sync":
            assert of(kind).counters["requests"] >= 2
            assert (of(kind).idle, of(kind).max_size) == (0, 0)


# --- Counters -------------------------------------------------------------------------------------


def test_counters_go_on_when_pools_end(run: Runner, observed: None) -> None:
    async def main() -> None:
        await asyncio.gather(*(Tag.objects.acount() for _ in range(4)))

    told = []
    for _ in range(5):
        run(main())
        gc.collect()
        mine = of("async")
        told.append((mine.counters["requests"], sum(mine.waited.counts), sum(mine.used_for.counts)))
    assert told == [(4 * n, 4 * n, 4 * n) for n in range(1, 6)]
    assert len(async_tallies._open) <= 1, "the tallies of pools that are gone are one sum"


def test_loops_in_several_threads_are_summed(observed: None) -> None:
    both = threading.Barrier(3)

    def work() -> None:
        async def main() -> None:
            async with transaction.atomic():
                await Tag.objects.acount()
                await asyncio.to_thread(both.wait, 20)
                await asyncio.to_thread(both.wait, 20)

        asyncio.run(main())

    with ThreadPoolExecutor(2) as executor:
        tasks = [executor.submit(work) for _ in range(2)]
        both.wait(20)
        mine = of("async")
        assert (mine.used, mine.counters["requests"]) == (2, 2)
        both.wait(20)
        for task in tasks:
            task.result()
    assert (of("async").used, sum(of("async").used_for.counts)) == (0, 2)


def test_no_counter_that_was_told_becomes_smaller(run_once: Runner) -> None:
    """A pool takes the count of a request back when the request begins anew."""

    async def main() -> None:
        await Tag.objects.acount()
        (_, ref, tally) = async_tallies._open[-1]
        assert ref() is not None and of("async").counters["requests"] == 1
        tally.stats["requests_num"] -= 1  # type: ignore[index]
        assert of("async").counters["requests"] == 1

    run_once(main())


def test_timeouts_and_failures_are_counted(run_once: Runner, observed: None) -> None:
    async def main() -> None:
        stop = asyncio.Event()
        holder = asyncio.create_task(hold(stop))
        while not of("async").used:
            await asyncio.sleep(0.005)
        with pytest.raises(OperationalError):
            await Tag.objects.acount()
        stop.set()
        await holder

    with set_pool({"min_size": 1, "max_size": 1, "timeout": 0.05}):
        run_once(main())
    mine = of("async")
    assert (mine.counters["timeouts"], mine.counters["requests_errors"]) == (1, 1)
    assert sum(mine.waited.counts) == 1, "a request that got nothing is no wait"
    assert sum(mine.connecting.counts) == mine.counters["connections_made"]


def test_nothing_is_measured_while_nobody_listens(run_once: Runner) -> None:
    run_once(Tag.objects.acount())
    assert events.listeners == []
    mine = of("async")
    assert mine.counters["requests"] == 1
    assert sum(mine.waited.counts) == sum(mine.used_for.counts) == 0


def test_a_hook_and_an_exporter_do_not_disturb_each_other(run_once: Runner, observed: None) -> None:
    seen: list[Any] = []
    pgbackend.add_hook(seen.append)
    hear = seen.append
    run_once(Tag.objects.acount())
    pgbackend.remove_hook(hear)
    run_once(Tag.objects.acount())
    assert [type(event) for event in seen] == [metrics.Leased, metrics.Released]
    assert sum(of("async").waited.counts) == 2


def test_a_duration_on_a_bound_belongs_to_the_bucket(observed: None) -> None:
    found = Totals("default", "async").waited
    for seconds in (*BOUNDS, 31.0):
        found.add(seconds)
    assert found.counts == [1] * (len(BOUNDS) + 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_begins_at_nothing(run_once: Runner) -> None:
    run_once(Tag.objects.acount())
    assert of("async").counters["requests"] == 1
    if (pid := os.fork()) == 0:  # pragma: no cover
        os._exit(len([each for each in totals() if each.kind != "thread"]))
    assert os.waitpid(pid, 0)[1] == 0


def test_other_aliases_and_green_code_are_counted(
    run_once: Runner, make_alias: Callable[[str], None]
) -> None:
    make_alias("replica")

    def work() -> None:
        Tag.objects.using("replica").count()

    run_once(aio.run(work))
    assert of("async", "replica").counters["requests"] == 1


@pytest.fixture
def make_alias() -> Iterator[Callable[[str], None]]:
    """Return a function that adds an alias of the same database."""
    made = []

    def make(alias: str) -> None:
        connections.settings[alias] = {**connections.settings["default"]}
        made.append(alias)

    yield make
    for alias in made:
        connections[alias].close()
        del connections[alias], connections.settings[alias]


def test_the_connection_that_listens_is_in_the_totals(
    run: Runner, admin: psycopg.Connection[Any]
) -> None:
    async def main() -> None:
        async with pgbackend.listen("watched"), pgbackend.listen("watched", "too"):
            assert of("listening").used == 1
            query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"
            assert admin.execute(query, [f"{NAME} (listens)"]).fetchone() == (1,)
            assert metrics.connections().listening == 1
        for hub in loops.open_hubs():
            hub.close()
        assert of("listening").used == 0

    with set_pool({"min_size": 0}):
        run(main())
