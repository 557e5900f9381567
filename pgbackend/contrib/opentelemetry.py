"""Shows the pools to OpenTelemetry, by the names of its conventions for database client pools.

Call `instrument()` once in each process. Only `opentelemetry-api` is imported; the SDK that the
project has set up decides where the numbers go.

The numbers of connections, and the counters, are read when the SDK collects. OpenTelemetry has no
histogram that can be read, so the durations since the last collection are recorded then, one by
one, in the thread that collects: not by the code that uses the database.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

try:
    from opentelemetry.metrics import (
        CallbackOptions,
        Meter,
        MeterProvider,
        Observation,
        get_meter_provider,
    )
except ImportError as exc:
    raise ImportError(
        "pgbackend.contrib.opentelemetry needs the package opentelemetry-api: "
        "pip install 'pgbackend[opentelemetry]'"
    ) from exc

from pgbackend import __version__
from pgbackend.driver.tallies import BOUNDS, Durations
from pgbackend.totals import QUEUES, Totals, observe, stop_observing, totals

__all__ = ["instrument", "uninstrument"]

_PREFIX = "db.client.connection."


def instrument(meter_provider: MeterProvider | None = None) -> None:
    """Report the pools of this process to `meter_provider`, by default the global one.

    Does nothing if it reports already.
    """
    key = _key(meter_provider)
    if key not in _known:
        _known[key] = _Reporter(get_meter_provider() if meter_provider is None else meter_provider)
    _known[key].start()


def uninstrument(meter_provider: MeterProvider | None = None) -> None:
    """Undo `instrument()`: report nothing any more, and measure no durations."""
    if (key := _key(meter_provider)) in _known:
        _known[key].stop()


class _Global:
    """Stands for the global provider: before that is set, the API gives a proxy of it."""


def _key(meter_provider: MeterProvider | None) -> object:
    """Return what `_known` knows `meter_provider` by."""
    is_global = meter_provider is None or meter_provider is get_meter_provider()
    return _Global if is_global else meter_provider


def pool_name(record: Totals) -> str:
    """Return the name of a pool: the alias, with what else keeps its connections."""
    return record.alias if record.kind == "async" else f"{record.alias} ({record.kind})"


class _Reporter:
    """The instruments of one provider. They are made once, since the API can remove none."""

    def __init__(self, provider: MeterProvider) -> None:
        self.is_on = False
        #: The durations recorded in each histogram: by its name and the pool's.
        self._recorded: dict[tuple[str, str], Durations] = {}
        meter = provider.get_meter("pgbackend", __version__)
        self._make_observed(meter)
        self._histograms = {
            name: meter.create_histogram(
                f"{_PREFIX}{name}",
                unit="s",
                description=description,
                explicit_bucket_boundaries_advisory=BOUNDS,
            )
            for name, description in (
                ("wait_time", "The time it took to obtain an open connection from the pool"),
                ("use_time", "The time between borrowing a connection and returning it"),
                ("create_time", "The time it took to create a new connection"),
            )
        }

    def start(self) -> None:
        """Report from now on."""
        if self.is_on:
            return
        self.is_on = True
        observe(self)
        for name, pool, durations in _durations(totals()):
            self._recorded[name, pool] = durations

    def stop(self) -> None:
        """Report nothing any more."""
        if self.is_on:
            self.is_on = False
            stop_observing(self)

    def _make_observed(self, meter: Meter) -> None:
        def up_down(name: str, unit: str, description: str, read: _Read) -> None:
            meter.create_observable_up_down_counter(
                f"{_PREFIX}{name}", [self._callback(read)], unit=unit, description=description
            )

        up_down("count", "{connection}", "The number of connections in a state", _states)
        up_down("idle.max", "{connection}", "The most idle connections allowed", _max_size)
        up_down("idle.min", "{connection}", "The least idle connections allowed", _min_size)
        up_down("max", "{connection}", "The most open connections allowed", _max_size)
        up_down("pending_requests", "{request}", "Requests that wait for a connection", _waiting)
        meter.create_observable_counter(
            f"{_PREFIX}timeouts",
            [self._callback(_timeouts)],
            unit="{timeout}",
            description="Requests that got no connection in time",
        )

    def _callback(self, read: _Read) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def callback(options: CallbackOptions) -> Iterable[Observation]:
            if not self.is_on:
                return
            records = totals()
            if read is _states:  # once in a collection
                self._record(records)
            for record in records:
                attributes = {f"{_PREFIX}pool.name": pool_name(record)}
                for value, more in read(record):
                    yield Observation(value, {**attributes, **more})

        return callback

    def _record(self, records: list[Totals]) -> None:
        """Record the durations that were measured since the last time."""
        for name, pool, durations in _durations(records):
            before = self._recorded.get((name, pool))
            self._recorded[name, pool] = durations
            attributes = {f"{_PREFIX}pool.name": pool}
            for seconds, count in spread(durations, before):
                for _ in range(count):
                    self._histograms[name].record(seconds, attributes)


#: Returns the observations of one record: values, with their attributes beside the pool's name.
_Read = Callable[[Totals], list[tuple[int, dict[str, str]]]]
_known: weakref.WeakKeyDictionary[Any, _Reporter] = weakref.WeakKeyDictionary()


def _states(record: Totals) -> list[tuple[int, dict[str, str]]]:
    return [
        (getattr(record, state), {f"{_PREFIX}state": state})
        for state in ("idle", "used", "preparing")
        if record.kind == "async" or state != "preparing"
    ]


def _max_size(record: Totals) -> list[tuple[int, dict[str, str]]]:
    return [] if record.max_size is None else [(record.max_size, {})]


def _min_size(record: Totals) -> list[tuple[int, dict[str, str]]]:
    return [] if record.min_size is None else [(record.min_size, {})]


def _waiting(record: Totals) -> list[tuple[int, dict[str, str]]]:
    return [(record.waiting, {})] if record.kind in QUEUES else []


def _timeouts(record: Totals) -> list[tuple[int, dict[str, str]]]:
    count = record.counters.get("timeouts")
    return [] if count is None else [(count, {})]


def _durations(records: list[Totals]) -> Iterator[tuple[str, str, Durations]]:
    for record in records:
        if record.kind == "async":
            yield "wait_time", pool_name(record), record.waited
            yield "use_time", pool_name(record), record.used_for
            yield "create_time", pool_name(record), record.connecting


def spread(now: Durations, before: Durations | None) -> Iterator[tuple[float, int]]:
    """Yield durations, with how many there were, that give the buckets and the sum since `before`.

    Within its bucket, a single duration is not known: all lie at the same part of their buckets'
    width, which is chosen so that their sum is right.
    """
    if before is None:
        before = Durations()
    counts = [new - old for new, old in zip(now.counts, before.counts, strict=True)]
    total = now.total - before.total
    lows = (0.0, *BOUNDS)
    widths = (*(high - low for low, high in zip(lows, BOUNDS, strict=False)), 0.0)
    least = _product(counts, lows)
    width = _product(counts, widths)
    part = min(1.0, max(0.0, (total - least) / width)) if width else 0.0
    beyond = max(0.0, total - least - width) / counts[-1] if counts[-1] else 0.0
    for low, wide, count in zip(lows, widths, counts, strict=True):
        if count:
            seconds = min(low + wide * part, low + wide) if wide else low + beyond
            yield max(seconds, math.nextafter(low, math.inf)), count  # `low` is of the bucket below


def _product(counts: Iterable[int], values: Iterable[float]) -> float:
    return sum(count * value for count, value in zip(counts, values, strict=True))
