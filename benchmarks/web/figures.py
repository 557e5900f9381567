"""Computes medians, spreads and ratios from the results of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import TypeAlias

from .endpoints import ENDPOINTS, Endpoint
from .results import Run, Sample
from .stacks import REFERENCE, STACKS, Stack


@dataclass(frozen=True)
class Metric:
    """Describes a quantity that is compared."""

    name: str
    title: str
    of: Callable[[Sample], float | None]
    more_is_better: bool = False


def _latency(seconds: float) -> float | None:
    return seconds * 1e3 if seconds else None


RATE = Metric("rate", "requests a second", lambda sample: sample.rate, more_is_better=True)
CPU = Metric(
    "cpu",
    "CPU of the server process for a request, in µs",
    lambda sample: None if sample.cpu_each is None else sample.cpu_each * 1e6,
)
P50 = Metric("p50", "median latency in ms", lambda sample: _latency(sample.p50))
P99 = Metric("p99", "99th percentile of the latency in ms", lambda sample: _latency(sample.p99))
CONNECTIONS = Metric(
    "connections", "PostgreSQL connections, at most", lambda sample: float(sample.connections)
)
MEMORY = Metric(
    "memory", "memory of the server process in MiB, at most", lambda sample: sample.memory / 1024
)
METRICS = (RATE, CPU, P50, P99, CONNECTIONS, MEMORY)


Place: TypeAlias = tuple[str, int]
"""An endpoint with a number of clients."""


@dataclass(frozen=True)
class Figure:
    """Holds one metric of one stack at one endpoint with one number of clients, over the rounds."""

    values: tuple[float, ...]
    ratios: tuple[float, ...]
    """To the reference, of the same round."""

    @property
    def median(self) -> float:
        return median(self.values)

    @property
    def spread(self) -> float:
        """Return half the distance from the least to the most, as a part of the median."""
        middle = self.median
        return (max(self.values) - min(self.values)) / 2 / middle if middle else 0.0

    @property
    def ratio(self) -> float | None:
        return median(self.ratios) if self.ratios else None

    def is_better(self, other: Figure, metric: Metric) -> bool:
        """Return whether this figure's worst round is better than the best round of `other`."""
        if metric.more_is_better:
            return min(self.values) > max(other.values)
        return max(self.values) < min(other.values)


class Figures:
    """Looks up everything that a run says by stack, endpoint and clients."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._samples: dict[tuple[str, str, int], dict[int, Sample]] = {}
        for sample in run.samples:
            key = (sample.stack, sample.endpoint, sample.clients)
            self._samples.setdefault(key, {})[sample.round] = sample

    @property
    def stacks(self) -> list[Stack]:
        seen = {stack for stack, _, _ in self._samples} | {each.stack for each in self.run.parked}
        return [stack for name, stack in STACKS.items() if name in seen]

    @property
    def endpoints(self) -> list[Endpoint]:
        seen = {endpoint for _, endpoint, _ in self._samples}
        return [endpoint for name, endpoint in ENDPOINTS.items() if name in seen]

    def clients(self, endpoint: str | None = None) -> list[int]:
        return sorted({c for _, e, c in self._samples if endpoint in (e, None)})

    def endpoints_at(self, clients: int) -> list[str]:
        """Name the endpoints that were measured with that many clients."""
        return [each.name for each in self.endpoints if clients in self.clients(each.name)]

    @property
    def rounds(self) -> str:
        """Return the number of rounds, or the least and the greatest number."""
        counts = sorted({len(rounds) for rounds in self._samples.values()})
        return " to ".join(map(str, counts[:1] + counts[1:][-1:]))

    @property
    def middle(self) -> int:
        """Return the number of clients for displays of only one: 64, or the nearest to it."""
        return min(self.clients(), key=lambda count: abs(count - 64))

    def samples(self, stack: str, endpoint: str, clients: int) -> dict[int, Sample]:
        """Return the samples by round."""
        return self._samples.get((stack, endpoint, clients), {})

    def figure(self, metric: Metric, stack: str, endpoint: str, clients: int) -> Figure | None:
        values, ratios = [], []
        references = self.samples(REFERENCE, endpoint, clients)
        for number, sample in self.samples(stack, endpoint, clients).items():
            value = metric.of(sample)
            if value is not None:
                values.append(value)
                reference = metric.of(references[number]) if number in references else None
                if reference:
                    ratios.append(value / reference)
        return Figure(tuple(values), tuple(ratios)) if values else None

    def failures(self, stack: str, endpoint: str, clients: int) -> float:
        """Return the part of all requests that failed."""
        samples = self.samples(stack, endpoint, clients).values()
        failed = sum(sample.failed for sample in samples)
        return failed / (failed + sum(sample.answered for sample in samples)) if failed else 0.0

    def places(self) -> Iterator[Place]:
        """Yield each endpoint with each number of clients."""
        for endpoint in self.endpoints:
            for clients in self.clients(endpoint.name):
                yield endpoint.name, clients
