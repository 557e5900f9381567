"""Shows the pools to Prometheus, through `prometheus_client`: a collector, and a view.

Call `register()` once in each process, as in ``AppConfig.ready()``. With several processes behind
one address, a scrape reaches one of them only: set ``PROMETHEUS_MULTIPROC_DIR``, and each process
leaves its numbers in that directory for the one that is asked (snapshots.py).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from django.http import HttpRequest, HttpResponse

try:
    from prometheus_client import REGISTRY, CollectorRegistry
    from prometheus_client.exposition import choose_encoder
    from prometheus_client.metrics_core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        Metric,
    )
    from prometheus_client.multiprocess import MultiProcessCollector
    from prometheus_client.registry import Collector
except ImportError as exc:
    raise ImportError(
        "pgbackend.contrib.prometheus needs the package prometheus_client: "
        "pip install 'pgbackend[prometheus]'"
    ) from exc

from pgbackend.contrib.snapshots import Snapshots
from pgbackend.driver.tallies import BOUNDS, Durations
from pgbackend.non_atomic import never_atomic
from pgbackend.totals import QUEUES, Totals, observe, stop_observing, totals

__all__ = ["PoolCollector", "metrics", "register", "unregister"]

_P = "pgbackend_pool_"
_LABELS = ("alias", "kind")
#: The counters: the name of each, its name in `Totals.counters`, and its help.
_COUNTERS = (
    ("requests", "requests", "Connections asked for"),
    ("requests_queued", "requests_queued", "Requests that had to wait"),
    ("request_errors", "requests_errors", "Requests that got no connection"),
    ("timeouts", "timeouts", "Requests that got no connection in time"),
    ("connection_attempts", "connections_made", "Attempts to open a connection"),
    ("connection_errors", "connections_errors", "Attempts to open a connection that failed"),
    ("connections_lost", "connections_lost", "Connections found dead in the pool"),
)
_HISTOGRAMS = (
    ("wait_seconds", "waited", "How long a connection was waited for"),
    ("use_seconds", "used_for", "How long a connection was held"),
    ("connect_seconds", "connecting", "How long it took to open a connection"),
)


def register(registry: CollectorRegistry = REGISTRY) -> PoolCollector:
    """Add the pools to what `registry` shows, and begin to measure durations; return the collector.

    A registry gets one collector, also if this is called again.
    """
    _begin()
    with _lock:
        found: PoolCollector | None = getattr(registry, "_pgbackend", None)
        if found is None:
            found = PoolCollector()
            registry.register(found)
            registry._pgbackend = found  # type: ignore[attr-defined]  # noqa: SLF001 - ours
    return found


def unregister(registry: CollectorRegistry = REGISTRY) -> None:
    """Undo `register()`, and measure no durations any more."""
    global _is_begun, _snapshots
    with _lock:
        if (found := vars(registry).pop("_pgbackend", None)) is not None:
            registry.unregister(found)
        if _is_begun:
            stop_observing("prometheus")
        if _snapshots is not None:
            _snapshots.stop()
        _is_begun, _snapshots = False, None


def metrics(request: HttpRequest) -> HttpResponse:
    """Return what Prometheus scrapes, as text or in the format of OpenMetrics (a view).

    The view takes no connection of the database. Who may see it, the project decides.
    """
    encoder, content_type = choose_encoder(request.headers.get("Accept", ""))
    return HttpResponse(encoder(_registry()), content_type=content_type)


never_atomic(metrics)


class PoolCollector(Collector):
    """Reads the pools of this process, or of all that share a directory, at each scrape."""

    def describe(self) -> Iterable[Metric]:
        """Return the metrics without samples, for the registry to know their names."""
        return families([], 0)

    def collect(self) -> Iterable[Metric]:
        """Return the metrics as they are now."""
        if _snapshots is None:
            return families(totals(), 1)
        return families(*_snapshots.read())


def families(records: list[Totals], processes: int) -> Iterator[Metric]:
    """Yield the metrics that show `records`, which `processes` processes have told."""
    yield from _gauges(records)
    for name, counter, text in _COUNTERS:
        family = CounterMetricFamily(f"{_P}{name}", text, labels=_LABELS)
        for record in records:
            if counter in record.counters:
                family.add_metric((record.alias, record.kind), record.counters[counter])
        yield family
    for name, attribute, text in _HISTOGRAMS:
        histogram = HistogramMetricFamily(f"{_P}{name}", text, labels=_LABELS)
        for record in records:
            if record.kind == "async":
                buckets, total = _buckets(getattr(record, attribute))
                histogram.add_metric((record.alias, record.kind), buckets, total)
        yield histogram
    yield GaugeMetricFamily("pgbackend_processes", "Processes that these are sums of", processes)


def _gauges(records: list[Totals]) -> Iterator[Metric]:
    states = GaugeMetricFamily(f"{_P}connections", "Connections", labels=(*_LABELS, "state"))
    most = GaugeMetricFamily(f"{_P}max_connections", "Limit of connections", labels=_LABELS)
    least = GaugeMetricFamily(f"{_P}min_connections", "Connections kept open", labels=_LABELS)
    waiting = GaugeMetricFamily(f"{_P}waiting_requests", "Requests that wait", labels=_LABELS)
    for record in records:
        labels = (record.alias, record.kind)
        for state in ("used", "idle", "preparing"):
            if state != "preparing" or record.kind == "async":
                states.add_metric((*labels, state), getattr(record, state))
        if record.max_size is not None:
            most.add_metric(labels, record.max_size)
        if record.min_size is not None:
            least.add_metric(labels, record.min_size)
        if record.kind in QUEUES:
            waiting.add_metric(labels, record.waiting)
    yield from (states, most, least, waiting)


def _buckets(durations: Durations) -> tuple[list[tuple[str, float]], float]:
    """Return the buckets as Prometheus counts them, each with those below it; and the sum."""
    total, so_far, buckets = durations.total, 0, []
    for bound, count in zip((*map(str, BOUNDS), "+Inf"), list(durations.counts), strict=True):
        so_far += count
        buckets.append((bound, float(so_far)))
    return buckets, total


# --- One process, or several ---

_lock = threading.Lock()
_snapshots: Snapshots | None = None
_is_begun = False


def _folder() -> str | None:
    return os.environ.get("PROMETHEUS_MULTIPROC_DIR")


def _begin() -> None:
    """Begin to measure, and to leave snapshots if there are several processes; only once."""
    global _is_begun, _snapshots  # noqa: PLW0603 - one for each process
    with _lock:
        if _is_begun:
            return
        if (folder := _folder()) is not None:
            _snapshots = Snapshots(Path(folder), totals)
            _snapshots.start()
        observe("prometheus")
        _is_begun = True


def _registry() -> CollectorRegistry:
    """Return the registry to show: with several processes, one that reads the directory."""
    if (folder := _folder()) is None:
        register()
        return REGISTRY
    registry = CollectorRegistry()
    MultiProcessCollector(registry, folder)  # type: ignore[no-untyped-call]
    register(registry)
    return registry
