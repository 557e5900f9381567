"""Prints how many connections a load needs: ``python -m benchmarks.connections.advise``.

It takes figures of your own requests, and prints what the model of ``model.py`` says. Example, for
200 requests in flight, each with 3 statements of 4 ms and 50 ms of waits for other things:

    python -m benchmarks.connections.advise --statements 3 --statement-ms 4 --elsewhere-ms 50 \
--requests 200
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from .model import Demands, Prediction, connections_needed, predict

#: From this share of the time on, requests queue for the event loop rather than for connections.
_BUSY = 0.8


@dataclass(frozen=True)
class Site:
    """Describes the requests of a site, and its processes."""

    statements: int
    """Statements (or transactions) of a request."""
    statement: float
    """Seconds for which each holds its connection."""
    elsewhere: float
    """Seconds that a request waits for other things, all together."""
    requests: int
    """Requests in flight in a process."""
    cpu: float = 0.0
    """Seconds of the processor that a request takes in its process."""
    processes: int = 1

    def __post_init__(self) -> None:
        for name in ("statements", "processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def demands(self) -> Demands:
        each = 1 / self.statements
        return Demands(self.elsewhere * each, self.statement, self.cpu * each)


@dataclass(frozen=True)
class Advice:
    """Holds the size of the pool, and what it leads to."""

    size: int
    prediction: Prediction
    requests_a_second: float
    """The requests a second of one process."""
    response: float
    """Seconds of a request."""
    total: int
    """The connections of all processes."""


def advise(site: Site) -> Advice:
    size = connections_needed(site.demands, site.requests)
    found = predict(site.demands, site.requests, size)
    return Advice(
        size,
        found,
        found.rate / site.statements,
        found.cycle * site.statements,
        size * site.processes,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    requests = options.requests
    work = options.statements * options.statement_ms + options.elsewhere_ms + options.cpu_ms
    try:
        site = Site(
            statements=options.statements,
            statement=options.statement_ms / 1e3,
            elsewhere=options.elsewhere_ms / 1e3,
            requests=max(1, ceil(options.rate * work / 1e3)) if requests is None else requests,
            cpu=options.cpu_ms / 1e3,
            processes=options.processes,
        )
        advice = advise(site)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    print("\n".join(_lines(site, advice)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--statements", type=int, default=1, help="statements, or transactions, of a request")
    add("--statement-ms", type=float, required=True, help="how long one holds its connection")
    add("--elsewhere-ms", type=float, required=True, help="a request's waits for other things")
    add("--cpu-ms", type=float, default=0.0, help="a request's time of its process's processor")
    add("--processes", type=int, default=1)
    load = parser.add_mutually_exclusive_group(required=True)
    load.add_argument("--requests", type=int, help="requests in flight in a process")
    load.add_argument("--rate", type=float, help="requests a second that reach a process")
    return parser


def _lines(site: Site, advice: Advice) -> list[str]:
    found = advice.prediction
    busy = found.rate * site.demands.cpu
    loop = "is not counted: give --cpu-ms"
    if site.cpu:
        loop = f"is busy for {busy:.0%} of the time"
    return [
        f"requests in flight in a process: {site.requests:,}",
        f"connections in use, on average:  {found.in_use:.2f}",
        f'"max_size" of each pool:         {advice.size}',
        f"connections of all processes:    {advice.total} (keep max_connections above)",
        f"requests a second of a process:  {advice.requests_a_second:,.1f}",
        f"time of a request:               {advice.response * 1e3:,.1f} ms",
        f"the event loop {loop}{': more processes help' if busy > _BUSY else ''}",
    ]


if __name__ == "__main__":
    main()
