"""Tests that loaders and dumpers registered on Django's template reach a project's connections."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
from django.db import connection, connections
from django.db.backends.postgresql.psycopg_any import (
    BaseTzLoader,
    get_adapters_template,
    register_tzloader,
)
from django.db.backends.signals import connection_created
from django.db.models.expressions import RawSQL
from django.db.transaction import atomic
from psycopg.adapt import AdaptersMap
from psycopg.types.numeric import IntLoader
from psycopg.types.string import StrDumper

import pgbackend
from pgbackend import aio
from tests.conftest import Runner
from tests.library.models import Tag
from tests.support.fixtures import pool_of_default, settings_of_default
from tests.support.stock import in_thread, on_djangos


class Doubling(IntLoader):
    def load(self, data: Any) -> int:
        return 2 * super().load(data)


class Tripling(IntLoader):
    def load(self, data: Any) -> int:
        return 3 * super().load(data)


class Point:
    pass


class PointDumper(StrDumper):
    def dump(self, obj: Any) -> bytes:
        return b"(1,2)"


@pytest.fixture(autouse=True)
def _template_of_its_own() -> Iterator[None]:
    get_adapters_template.cache_clear()
    Tag.objects.create(name="x")
    yield
    get_adapters_template.cache_clear()
    connection.close()


def on_threads_own(fn: Callable[[], Any]) -> Any:
    """Call `fn` in sync code without a pool, where a closed connection is really closed."""
    options = {**connections.settings["default"]["OPTIONS"]}
    del options["pool"]
    with settings_of_default(OPTIONS=options):
        return in_thread(fn)


def template() -> Any:
    return get_adapters_template(True, connection.timezone)


def orm() -> Any:
    return Tag.objects.annotate(n=RawSQL("1", ())).values_list("n", flat=True).get()


def raw() -> Any:
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
        return cursor.fetchone()[0]


def both() -> list[Any]:
    return [orm(), raw()]


def as_it_was() -> list[Any]:
    template().register_loader("int4", IntLoader)
    connection.close()
    return both()


def on_open_and_new_connections() -> list[Any]:
    found = [both()]
    template().register_loader("int4", Doubling)
    connection.close()
    found.append(both())
    template().register_loader("int4", Tripling)
    connection.close()
    return [*found, both(), as_it_was()]


def test_a_loader_reaches_the_connections_to_come(run: Runner) -> None:
    expected = on_djangos(on_open_and_new_connections)
    assert expected == [[1, 1], [2, 2], [3, 3], [1, 1]]
    assert on_threads_own(on_open_and_new_connections) == expected
    assert run.green(on_open_and_new_connections) == expected


def test_a_connection_of_a_threads_keeps_its_own() -> None:
    def ask() -> list[Any]:
        found = [both()]
        template().register_loader("int4", Doubling)
        return [*found, both(), as_it_was()]

    assert on_djangos(ask) == on_threads_own(ask) == [[1, 1], [1, 1], [1, 1]]


def test_green_the_next_lease_has_it(run: Runner) -> None:
    """Green code has no connection of its own that it could close."""

    def green() -> None:
        assert orm() == 1  # its connection is free again
        template().register_loader("int4", Doubling)
        assert both() == [2, 2]  # and this one is being reset
        template().register_dumper(Point, PointDumper)
        with connection.cursor() as cursor:
            cursor.execute("SELECT %s::text", [Point()])
            assert cursor.fetchone() == ("(1,2)",)
        (stats,) = pgbackend.statistics()
        assert stats.connections_made == 3 and stats.connections_lost == 0 and stats.size == 1

    with pool_of_default(max_size=1):
        run.green(green)


def test_a_connection_that_is_held_keeps_its_own_to_the_end(run: Runner) -> None:
    def green() -> None:
        with atomic():
            assert both() == [1, 1]
            held = connection.connection
            template().register_loader("int4", Doubling)
            assert both() == [1, 1] and connection.connection is held
        assert both() == [2, 2]
        with pgbackend.pinned():
            assert both() == [2, 2]
            template().register_loader("int4", Tripling)
            assert both() == [2, 2]
        assert both() == [3, 3]

    run.green(green)


def test_all_who_hold_and_wait_end_well(run: Runner) -> None:
    async def work(number: int) -> None:
        for step in range(5):
            if (number, step) == (3, 2):
                template().register_loader("int4", Doubling)
            assert await aio.run(orm) in (1, 2)
            with suppress(KeyError):
                async with atomic():
                    assert await aio.run(orm) in (1, 2)
                    raise KeyError

    async def main() -> None:
        await asyncio.gather(*map(work, range(12)))
        assert await asyncio.gather(*(aio.run(orm) for _ in range(8))) == [2] * 8
        (stats,) = pgbackend.statistics()
        assert stats.leased == stats.waiting == 0 and stats.size <= 3

    with pool_of_default(max_size=3):
        run(main())


def test_the_pools_of_other_loops_have_it_too(run: Runner) -> None:
    asked, registered = threading.Event(), threading.Event()

    async def elsewhere() -> list[Any]:
        before = await aio.run(both)
        asked.set()
        await asyncio.to_thread(registered.wait, 10)
        return [*before, *(await aio.run(both))]

    async def main() -> None:
        there = asyncio.create_task(asyncio.to_thread(asyncio.run, elsewhere()))
        await asyncio.to_thread(asked.wait, 10)
        template().register_loader("int4", Doubling)
        registered.set()
        assert await there == [1, 1, 2, 2]

    run(main())


def test_min_size_connections_are_kept_with_it(run: Runner) -> None:
    async def main() -> None:
        await aio.run(both)
        template().register_loader("int4", Doubling)
        assert await asyncio.gather(*(aio.run(orm) for _ in range(3))) == [2, 2, 2]
        while pgbackend.statistics()[0].idle < 2:
            await asyncio.sleep(0.001)

    with pool_of_default(min_size=2, max_size=2):
        run(main())


def test_who_registers_the_same_again_closes_nothing(run: Runner) -> None:
    def green() -> None:
        for _ in range(3):
            template().register_loader("int4", Doubling)
            template().register_dumper(Point, PointDumper)
            assert both() == [2, 2]
        (stats,) = pgbackend.statistics()
        assert stats.connections_made == 1

    with pool_of_default(max_size=1):
        run.green(green)


def test_a_connection_that_is_being_opened_has_it_too(run: Runner) -> None:
    """The connection has copied the template, and the pool does not list it yet."""
    registered = False

    def receive(**kwargs: Any) -> None:
        nonlocal registered
        if not registered:
            registered = True
            template().register_loader("int4", Doubling)

    def green() -> None:
        assert both() == [2, 2]
        assert pgbackend.statistics()[0].connections_made == 2

    connection_created.connect(receive)
    try:
        with pool_of_default(max_size=1):
            run.green(green)
    finally:
        connection_created.disconnect(receive)


def test_who_registers_on_each_connection_does_not_open_one_after_the_other(run: Runner) -> None:
    def receive(**kwargs: Any) -> None:
        class Another(Doubling):
            pass

        template().register_loader("int4", Another)

    async def main() -> None:
        assert await aio.run(orm) == 2
        for number in range(3):
            assert await aio.run(orm) == 2
            while not pgbackend.statistics()[0].idle:
                await asyncio.sleep(0.001)
            # Two for the first connection, and two for each that has gone back.
            assert pgbackend.statistics()[0].connections_made <= 2 * (number + 3)

    connection_created.connect(receive)
    try:
        with pool_of_default(min_size=1, max_size=1):
            run(main())
    finally:
        connection_created.disconnect(receive)


class Later(BaseTzLoader):
    """Loads timestamps in a project's own way."""

    timezone = UTC

    def load(self, data: Any) -> Any:
        return super().load(data).replace(year=2099)


def moment() -> int:
    at = datetime(2026, 1, 2, tzinfo=UTC)
    with connection.cursor() as cursor:
        cursor.execute("SELECT %s::timestamptz", [at])
        return int(cursor.fetchone()[0].year)


def moments() -> list[Any]:
    template().register_loader("timestamptz", Later)  # before anything has connected
    connection.close()
    found = [moment()]
    register_tzloader(UTC, template())
    connection.close()
    found.append(moment())
    template().register_loader("timestamptz", Later)
    connection.close()
    found.append(moment())
    get_adapters_template.cache_clear()
    connection.close()
    return found


def test_a_loader_of_moments_may_be_the_projects_own(run: Runner) -> None:
    assert on_djangos(moments) == [2099, 2026, 2099]
    assert on_threads_own(moments) == [2099, 2026, 2099]
    assert run.green(moments) == [2099, 2026, 2099]


def test_the_template_is_djangos_own(run: Runner) -> None:
    """A derived wrapper finds the template where Django has it, and may register on it there."""

    def green() -> None:
        params = connection.get_connection_params()
        assert params["context"] is template()
        assert connection.get_connection_params()["context"] is template()
        assert type(AdaptersMap(template())) is AdaptersMap

    run.green(green)


def test_maps_of_others_are_left_alone() -> None:
    from pgbackend.adapters import prepare_template

    for given in (AdaptersMap(template()), psycopg.adapters, AdaptersMap()):
        loaders = dict(given._loaders[0])
        prepare_template(given, UTC)
        assert type(given) is AdaptersMap and given._loaders[0] == loaders
