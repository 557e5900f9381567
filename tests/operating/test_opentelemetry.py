"""Tests that the SDK of OpenTelemetry gets the metrics of its conventions for connection pools."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import pytest
from django.db import connection, transaction
from opentelemetry import metrics
from opentelemetry.metrics import _internal
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.semconv._incubating.metrics import db_metrics
from opentelemetry.util._once import Once

from pgbackend.contrib import opentelemetry
from pgbackend.contrib.opentelemetry import instrument, spread, uninstrument
from pgbackend.driver import events
from pgbackend.driver.tallies import BOUNDS, Durations, async_tallies, sync_tallies
from tests.conftest import Runner
from tests.library.models import Tag
from tests.support.fixtures import pool_of_default, settings_of_default

PREFIX = "db.client.connection."


class Sdk:
    """Reads what a provider of the SDK collects."""

    def __init__(self) -> None:
        self.readers = [InMemoryMetricReader() for _ in range(2)]
        self.provider = MeterProvider(metric_readers=self.readers)

    def read(self, number: int = 0) -> dict[str, Any]:
        data = self.readers[number].get_metrics_data()
        scopes = [] if data is None else data.resource_metrics[0].scope_metrics
        return {
            metric.name.removeprefix(PREFIX): metric
            for scope in scopes
            for metric in scope.metrics
            if metric.data.data_points
        }


@pytest.fixture
def sdk(fresh_tables: None) -> Iterator[Sdk]:
    """Instrument for a provider of the test's own."""
    for each in (async_tallies, sync_tallies):
        each.forget()
    made = Sdk()
    instrument(made.provider)
    yield made
    uninstrument(made.provider)
    made.provider.shutdown()
    assert events.listeners == []


def points(metric: Any, pool: str = "default") -> list[Any]:
    return [
        point for point in metric.data.data_points if point.attributes[f"{PREFIX}pool.name"] == pool
    ]


def by_state(metric: Any) -> dict[str, int]:
    return {point.attributes[f"{PREFIX}state"]: point.value for point in points(metric)}


def test_the_pools_are_shown_by_the_names_of_the_conventions(run_once: Runner, sdk: Sdk) -> None:
    async def main() -> dict[str, Any]:
        async with transaction.atomic():
            await Tag.objects.acount()
            apart = contextvars.Context()  # else the task would take part in the transaction
            waiting = asyncio.create_task(Tag.objects.acount(), context=apart)
            while not points(sdk.read(1)["pending_requests"])[0].value:
                await asyncio.sleep(0.005)
            read = sdk.read()
        await waiting
        return read

    with pool_of_default(min_size=1, max_size=1):
        read = run_once(main())
    assert by_state(read["count"]) == {"idle": 0, "used": 1, "preparing": 0}
    for name, value in (("max", 1), ("idle.max", 1), ("idle.min", 1), ("pending_requests", 1)):
        assert [point.value for point in points(read[name])] == [value]
    assert [point.value for point in points(read["timeouts"])] == [0]
    assert [point.count for point in points(read["wait_time"])] == [1]
    later = sdk.read()
    assert [point.count for point in points(later["wait_time"])] == [2]
    assert [point.count for point in points(later["use_time"])] == [2]
    assert [point.count for point in points(later["create_time"])] == [1]


#: The units and instruments of the conventions, as the package that has them makes them.
MADE = {
    name: getattr(db_metrics, f"create_db_client_connection_{name.replace('.', '_')}", None)
    for name in ("count", "idle.max", "idle.min", "max", "pending_requests", "timeouts")
} | {
    name: getattr(db_metrics, f"create_db_client_connection_{name}")
    for name in ("wait_time", "use_time", "create_time")
}


def test_the_units_and_kinds_are_those_of_the_conventions(run_once: Runner, sdk: Sdk) -> None:
    run_once(Tag.objects.acount())
    read = sdk.read()
    assert set(read) == set(MADE)
    meter = MeterProvider().get_meter("conventions")
    for name, make in MADE.items():
        assert make is not None
        theirs = make(meter)
        assert read[name].unit == theirs.unit, name
        kind = type(read[name].data).__name__
        assert kind == ("Histogram" if name.endswith("_time") else "Sum"), name
        if kind == "Sum":
            assert read[name].data.is_monotonic == (name == "timeouts")


def test_each_reader_gets_every_duration(run_once: Runner, sdk: Sdk) -> None:
    async def main() -> None:
        for _ in range(20):
            await Tag.objects.acount()

    run_once(main())
    for reader in (0, 1, 0):
        (point,) = points(sdk.read(reader)["use_time"])
        assert (point.count, point.explicit_bounds) == (20, BOUNDS)
        (mine,) = async_tallies.sums().values()
        assert list(point.bucket_counts) == mine.used.counts
        assert point.sum == pytest.approx(mine.used.total)


def test_after_uninstrument_nothing_is_measured_or_shown(run_once: Runner, sdk: Sdk) -> None:
    uninstrument(sdk.provider)
    uninstrument(sdk.provider)
    assert events.listeners == []
    run_once(Tag.objects.acount())
    assert "count" not in sdk.read()
    instrument(sdk.provider)
    instrument(sdk.provider)
    assert len(events.listeners) == 1
    run_once(Tag.objects.acount())
    assert [point.count for point in points(sdk.read()["use_time"])] == [1]


def test_a_global_provider_that_is_set_up_later_is_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Until it is set, the API gives a proxy of it."""
    monkeypatch.setattr(_internal, "_METER_PROVIDER", None)
    monkeypatch.setattr(_internal, "_METER_PROVIDER_SET_ONCE", Once())
    monkeypatch.setattr(_internal, "_PROXY_METER_PROVIDER", _internal._ProxyMeterProvider())
    monkeypatch.setattr(opentelemetry, "_known", WeakKeyDictionary())
    instrument()  # in AppConfig.ready(), say
    provider = MeterProvider()
    metrics.set_meter_provider(provider)  # in a worker
    instrument()
    instrument(provider)
    assert len(events.listeners) == 1
    uninstrument()
    assert events.listeners == []
    provider.shutdown()


def test_connections_of_threads_are_a_pool_of_their_own(sdk: Sdk) -> None:
    connection.close()
    with settings_of_default(OPTIONS={}):
        Tag.objects.count()
        shown = points(sdk.read()["count"], "default (thread)")
        connection.close()
    states = {point.attributes[f"{PREFIX}state"]: point.value for point in shown}
    assert states == {"idle": 1, "used": 0}


@pytest.mark.parametrize(
    "durations",
    [
        [0.0],
        [0.00005, 0.0002, 0.0004],
        [*BOUNDS],
        [31.0, 100.0],
        [0.3] * 1000 + [35.0],
        [0.00011, 29.9, 30.1],
    ],
)
def test_what_is_recorded_has_the_buckets_and_the_sum(durations: list[float]) -> None:
    before, now, again = Durations(), Durations(), Durations()
    for seconds in (0.02, 3.0):
        before.add(seconds)
        now.add(seconds)
    for seconds in durations:
        now.add(seconds)
    for seconds, count in spread(now, before):
        for _ in range(count):
            again.add(seconds)
    again.merge(before)
    assert again.counts == now.counts
    assert again.total == pytest.approx(now.total, abs=1e-9)
