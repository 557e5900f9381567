"""Measures the stacks, which take turns, round after round."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from . import load
from .database import Database
from .endpoints import PARK, Endpoint
from .environment import HOME
from .results import Parked, Sample
from .server import Server
from .stacks import Stack

#: Seconds between two counts of a stack's connections.
_LOOK_SECONDS = 0.1
_PARK_SECONDS = 180.0


@dataclass(frozen=True)
class Plan:
    """Says how to measure: stacks, endpoints, clients, rounds and times."""

    stacks: Sequence[Stack]
    endpoints: Sequence[Endpoint]
    clients: Sequence[int]
    rounds: int
    seconds: float
    warm: float
    patience: float

    @property
    def least_seconds(self) -> float:
        pairs = sum(
            stack.can(endpoint.name) for stack in self.stacks for endpoint in self.endpoints
        )
        return self.rounds * pairs * (len(self.clients) * (self.warm + self.seconds + 0.3) + 1.5)

    def turns(self) -> Iterator[tuple[int, Endpoint, Stack]]:
        """Yield each stack once an endpoint and round; each round begins with another stack."""
        for number in range(self.rounds):
            first = number % len(self.stacks)
            for endpoint in self.endpoints:
                for stack in (*self.stacks[first:], *self.stacks[:first]):
                    if stack.can(endpoint.name):
                        yield number, endpoint, stack


class Bench:
    """Holds the interpreter and the database that all measurements share."""

    def __init__(self, python: Path, database: Database) -> None:
        self.python = python
        self.database = database
        self.logs = HOME / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)

    def server(self, stack: Stack) -> Server:
        return Server(stack, self.python, self.database.params, self.logs / f"{stack.name}.log")

    def measure(
        self, plan: Plan, done: Collection[tuple[int, str, str]] = ()
    ) -> Iterator[list[Sample]]:
        """Yield the samples of one turn after the other, except for the turns that are `done`.

        A turn has a server of its own, and goes from few clients to many: so the greatest memory
        that the server has used is due to the last number of clients.
        """
        for number, endpoint, stack in plan.turns():
            if (number, endpoint.name, stack.name) in done:
                continue
            with self.server(stack) as server:
                yield [
                    self._sample(number, server, endpoint, clients, plan)
                    for clients in sorted(plan.clients)
                    if endpoint.most_clients is None or clients <= endpoint.most_clients
                ]
            self.database.tidy()

    def _sample(
        self, number: int, server: Server, endpoint: Endpoint, clients: int, plan: Plan
    ) -> Sample:
        job = load.Job(
            server.port,
            server.pid,
            load.requests_of(endpoint),
            clients,
            plan.warm,
            plan.seconds,
            plan.patience,
        )
        running = load.Clients(self.python, "run", job)
        try:
            connections = self._most_connections(server, running)
            outcome = running.outcome()
        finally:
            running.stop()
        return Sample(
            number,
            server.stack.name,
            endpoint.name,
            clients,
            **asdict(outcome),
            connections=connections,
            memory=server.memory("VmHWM"),
        )

    def _most_connections(self, server: Server, running: load.Clients) -> int:
        most = 0
        while running.is_running:
            most = max(most, self.database.connections(server.application_name))
            time.sleep(_LOOK_SECONDS)
        return most

    def park(self, stack: Stack, count: int) -> Parked:
        """Have `count` requests wait at once, each after its first statement; then release them."""
        with self.server(stack) as server:
            for key in range(1, 101):
                server.ask(f"/one/{key}")
            idle = server.memory()
            job = load.Job(
                server.port,
                server.pid,
                load.requests_of(PARK),
                count,
                0,
                0,
                _PARK_SECONDS,
            )
            running = load.Clients(self.python, "flood", job)
            try:
                running.hear()
                connected = server.memory()
                running.tell("go")
                parked = _wait_until_parked(server, running, count)
                full = server.memory()
                connections = self.database.connections(server.application_name)
                server.ask("/gate/open", "POST")
                outcome = running.outcome()
            finally:
                running.stop()
        return Parked(
            stack.name,
            count,
            parked,
            outcome.answered,
            outcome.failed,
            outcome.stuck,
            outcome.seconds,
            connections,
            idle,
            connected,
            full,
        )


def _wait_until_parked(server: Server, running: load.Clients, count: int) -> int:
    """Wait until all requests are parked, or no more come; return how many are."""
    deadline = time.monotonic() + _PARK_SECONDS
    parked = 0
    while parked < count and time.monotonic() < deadline and running.is_running:
        time.sleep(_LOOK_SECONDS)
        parked = server.ask_json("/gate")["waiting"]
    return int(parked)
