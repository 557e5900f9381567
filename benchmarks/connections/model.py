"""Predicts connections in use, throughput and waits, by a closed network of queues.

A fixed number of requests is in flight. Each is in one of three places: it waits for other things
than the database (nobody queues there), it has or wants one of the pool's connections (as many
servers as the pool has connections, one queue), or it has or wants the event loop (one server).
Without the event loop this is the machine repairman's model, M/M/c//N. With it, the network has a
product form, whose sums `predict` computes without approximation (Buzen's convolution), as
logarithms: with 10,000 requests the terms are outside the range of floats.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Demands:
    """Holds the seconds that one statement of a request takes, on average, in each place."""

    elsewhere: float
    """Waits for other things than the database or the event loop, before the statement."""
    held: float
    """How long the statement (or the transaction) holds its connection."""
    cpu: float = 0.0
    """The time of the event loop; of that which falls in the lease, `held` has its part, too."""
    cpu_held: float = 0.5
    """The share of the time on the event loop that falls in the lease."""

    def __post_init__(self) -> None:
        for name in ("elsewhere", "held"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be more than 0 s, not {getattr(self, name)!r}")
        if self.cpu < 0:
            raise ValueError(f"cpu must not be less than 0 s, it is {self.cpu!r}")
        if not 0 <= self.cpu_held <= 1:
            raise ValueError(f"cpu_held must be a share from 0 to 1, not {self.cpu_held!r}")


@dataclass(frozen=True)
class Prediction:
    """Holds the means that the model predicts."""

    rate: float
    """Statements a second."""
    in_use: float
    """Connections in use: Little's law, rate × time that a statement holds its connection."""
    cycle: float
    """Seconds from the end of one statement of a request to that of its next."""
    queued: float
    """The part of `cycle` that a request waits for a connection or for the event loop."""


def predict(demands: Demands, requests: int, servers: int | None) -> Prediction:
    """Return the means for a number of requests in flight, and of connections (None: no bound)."""
    if requests < 1 or (servers is not None and servers < 1):
        raise ValueError("there must be at least one request and one connection")
    sums = _with_cpu(_with_pool(demands, requests, servers), demands.cpu)
    rate = math.exp(sums[-2] - sums[-1])
    # A statement that waits for the event loop while it has its connection keeps it for longer.
    queue_at_cpu = max(0.0, _at_cpu(sums, demands.cpu) - rate * demands.cpu)
    in_use = rate * demands.held + demands.cpu_held * queue_at_cpu
    cycle = requests / rate
    queued = max(0.0, cycle - demands.elsewhere - demands.held - demands.cpu)
    return Prediction(rate, min(in_use, servers or requests), cycle, queued)


def connections_needed(demands: Demands, requests: int, slower: float = 0.01) -> int:
    """Return the least size of a pool that makes requests slower by a share of at most `slower`."""
    enough = predict(demands, requests, None).rate / (1 + slower)
    low, high = 0, 1
    while high < requests and predict(demands, requests, high).rate < enough:
        low, high = high, min(2 * high, requests)
    while high - low > 1:
        middle = (low + high) // 2
        if predict(demands, requests, middle).rate < enough:
            low = middle
        else:
            high = middle
    return high


def _with_pool(demands: Demands, requests: int, servers: int | None) -> list[float]:
    """Return the logarithms of the sums for 0 to `requests` requests, without the event loop."""
    if servers is None:
        return _delays(demands.elsewhere + demands.held, requests)
    elsewhere, held = _delays(demands.elsewhere, requests), math.log(demands.held)
    # With k requests at the pool, min(k, servers) are served: for fewer than `servers` the terms
    # are those of a delay; from there on each is the one before, times held / servers.
    few = _delays(demands.held, servers)
    ratio, tail, sums = held - math.log(servers), -math.inf, []
    for count in range(requests + 1):
        terms = [few[k] + elsewhere[count - k] for k in range(min(count + 1, servers))]
        if count >= servers:
            tail = _log_sum((few[servers] + elsewhere[count - servers], ratio + tail))
        sums.append(_log_sum((*terms, tail)))
    return sums


def _delays(seconds: float, requests: int) -> list[float]:
    """Return log(seconds ** n / n!) for each n."""
    return [n * math.log(seconds) - math.lgamma(n + 1) for n in range(requests + 1)]


def _with_cpu(sums: list[float], cpu: float) -> list[float]:
    """Return the sums of the network with one more station, of a single server."""
    if not cpu:
        return sums
    found, last = [], -math.inf
    for each in sums:
        last = _log_sum((each, math.log(cpu) + last))
        found.append(last)
    return found


def _at_cpu(sums: list[float], cpu: float) -> float:
    """Return the mean number of requests that have or want the event loop."""
    if not cpu:
        return 0.0
    last = len(sums) - 1
    return sum(
        math.exp(n * math.log(cpu) + sums[last - n] - sums[last]) for n in range(1, last + 1)
    )


def _log_sum(logarithms: Iterable[float]) -> float:
    """Return the logarithm of a sum whose terms are given by their logarithms."""
    terms = tuple(logarithms)
    most = max(terms)
    return most if most == -math.inf else most + math.log(sum(math.exp(x - most) for x in terms))
