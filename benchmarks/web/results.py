"""Keeps the results of a run in a file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from .environment import HOME


@dataclass
class Sample:
    """Measures one stack, endpoint and number of clients, once. Latencies are in seconds."""

    round: int
    stack: str
    endpoint: str
    clients: int
    seconds: float
    answered: int
    failed: int
    wrong: int
    stuck: int
    p50: float
    p99: float
    longest: float
    cpu: float
    """Seconds of the processor that the server took."""
    own_cpu: float
    """The same of the clients' process."""
    connections: int
    """PostgreSQL's sessions, the most that were seen."""
    memory: int
    """The server's resident memory in kB, the most that it was up to here."""

    @property
    def rate(self) -> float:
        return self.answered / self.seconds

    @property
    def cpu_each(self) -> float | None:
        """Return the seconds of the processor for a request; None if no request was answered."""
        return self.cpu / self.answered if self.answered else None


@dataclass
class Parked:
    """Measures many requests in flight, each between its two statements. Memory is in kB."""

    stack: str
    requests: int
    parked: int
    """How many had come as far as the wait."""
    answered: int
    failed: int
    stuck: int
    seconds: float
    """From the first request to the last answer."""
    connections: int
    memory_idle: int
    memory_connected: int
    """With a connection of HTTP for each, before any request."""
    memory_parked: int


@dataclass
class Run:
    """Records one run of the command."""

    command: str
    begun: str
    machine: dict[str, str]
    versions: dict[str, str]
    database: dict[str, str]
    """The settings of the PostgreSQL server."""
    options: dict[str, Any]
    samples: list[Sample] = field(default_factory=list)
    parked: list[Parked] = field(default_factory=list)
    cost: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """What benchmarks/cost.py says, by operation and stack: a median, in µs, and a ratio."""
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Self:
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields["samples"] = [Sample(**sample) for sample in fields["samples"]]
        fields["parked"] = [Parked(**parked) for parked in fields["parked"]]
        return cls(**fields)


def newest() -> Path | None:
    """Return the file of the last run."""
    return max(HOME.glob("results-*.json"), key=lambda path: path.stat().st_mtime, default=None)
