"""Collects the outcome of each test of one context, and the other records of its workers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

CONTEXTS = ("stock", "sync", "green")
#: In this context requests are served by `pgbackend.get_asgi_application()`; else as in green.
WHOLE = "whole"
ON_A_LOOP = ("green", WHOLE)
#: From the best to the worst: a test that passes and then fails to clean up has an error.
OUTCOMES = ("passed", "skipped", "expected failure", "unexpected success", "failed", "error")


@dataclass
class Test:
    """Holds the outcome of one test."""

    outcome: str
    text: str = ""
    """The reason of a skip, or the traceback."""
    seconds: float = 0.0


@dataclass
class Results:
    """Holds the outcomes of one context."""

    run: str
    """The context, and which run of it, if it is not the first: ``green-2``."""
    django: str
    labels: list[str]
    versions: dict[str, str] = field(default_factory=dict)
    tests: dict[str, Test] = field(default_factory=dict)
    connections: dict[str, int] = field(default_factory=dict)
    faults: list[dict[str, str]] = field(default_factory=list)
    """Where a green run was not green (see `guard`)."""
    unraisable: list[dict[str, str]] = field(default_factory=list)
    """What could only be printed: errors in `__del__`, and in tasks that nobody awaited."""
    crashes: list[str] = field(default_factory=list)
    """Workers that did not finish, with the end of what they printed."""
    seconds: float = 0.0
    """Of all workers together."""

    @property
    def context(self) -> str:
        return self.run.partition("-")[0]

    def count(self, *outcomes: str) -> int:
        return sum(test.outcome in outcomes for test in self.tests.values())

    def summary(self) -> str:
        return (
            f"{self.run:<8} {self.count('passed', 'expected failure')} passed, "
            f"{self.count('failed', 'error', 'unexpected success')} failed, "
            f"{self.count('skipped')} skipped in {self.seconds:.0f} s"
        )

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Self:
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields["tests"] = {name: Test(**test) for name, test in fields["tests"].items()}
        return cls(**fields)


@dataclass
class Entry:
    """Holds what a worker's journal says of the worker itself."""

    job: dict[str, Any] = field(default_factory=dict)
    """What it was to do."""
    begun: list[str] = field(default_factory=list)
    """The tests that it has run, or was running."""
    running: str | None = None
    finished: bool = False


def read(journal: Path) -> Entry:
    """Read how far a worker came."""
    entry = Entry()
    for record in _records(journal):
        match record["event"]:
            case "job":
                entry.job = {
                    name: value for name, value in record.items() if name not in ("event", "test")
                }
            case "started":
                entry.running = record["test"]
                entry.begun.append(record["test"])
            case "stopped":
                entry.running = None
            case "forgotten":
                entry.begun.remove(record["test"])
                entry.running = None
            case "finished":
                entry.finished = True
    return entry


def fold(results: Results, journal: Path, log: Path) -> None:
    """Add the records of one worker to `results`."""
    finished = False
    for record in _records(journal):
        finished = _add(results, **record) or finished
    if not finished and not results.crashes:
        results.crashes.append(f"has not finished:\n{tail(log)}")


def tail(log: Path) -> str:
    """Return the last lines that a worker has printed."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-120:])


def _records(journal: Path) -> Iterator[dict[str, Any]]:
    for line in journal.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            pass  # a part of a line, of a worker that was killed


def _add(results: Results, event: str, test: str, **details: Any) -> bool:
    if event == "outcome":
        new = Test(details["outcome"], details.get("text", ""))
        old = results.tests.setdefault(test, new)
        if OUTCOMES.index(new.outcome) > OUTCOMES.index(old.outcome):
            results.tests[test] = new
    elif event == "stopped" and test in results.tests:
        results.tests[test].seconds = details["seconds"]
    elif event == "crash":
        results.crashes.append(f"in or {test}:\n{details['text']}")
    elif event == "ran":
        results.seconds += details["seconds"]
    elif event in ("fault", "unraisable"):
        entry = {"test": test, **details}
        getattr(results, "faults" if event == "fault" else "unraisable").append(entry)
    elif event == "connections":
        for kind, count in details["counts"].items():
            results.connections[kind] = results.connections.get(kind, 0) + count
    return event == "finished"
