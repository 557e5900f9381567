"""Snapshots of the pools, as records: their statistics, who holds connections, who waits for one.

May be taken in any thread, also while the code of a loop hangs: nothing here waits, takes a lock,
or sends anything. There is no SQL in a snapshot, and no value of a variable.
"""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass
from itertools import islice
from time import monotonic
from typing import Any

from . import loops, naming, stacks
from .holding import Hold, hold_of
from .pool import Pool
from .statistics import PoolStatistics


@dataclass(frozen=True, slots=True)
class Wait:
    """A task's wait for a connection."""

    waiter: str
    """The name of the task, and the request that it serves."""
    seconds: float | None
    """The age of the wait; None if it is unknown."""
    place: str | None
    """The ``file:line`` of the user's own code in which the task is."""

    def __str__(self) -> str:
        age = "" if self.seconds is None else f" for {self.seconds:.2f} s"
        return f"{self.waiter}{age}{f' (at {self.place})' if self.place else ''}"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A pool at one moment."""

    statistics: PoolStatistics
    thread: str
    """The name of the thread that the pool's event loop runs in."""
    blocked: float
    """For how many seconds the event loop has been blocked by code; 0 if it is not."""
    outage: float
    """The age of the pool's outage, in seconds; 0 if it has none."""
    connecting: list[str]
    """Descriptions of failed attempts to connect, and of those under way."""
    holds: list[Hold]
    waits: list[Wait]


def take(most: int | None = None) -> list[Snapshot]:
    """Return a snapshot of each open pool, with at most `most` holds and waits of each."""
    return [
        Snapshot(
            statistics=pool.statistics(),
            thread=thread_name(pool.thread),
            blocked=pool.pulse.overdue(),
            outage=pool.outage_age(),
            connecting=pool.connecting(),
            holds=holds(pool, most),
            waits=waits(pool, most),
        )
        for pool in loops.open_pools()
    ]


def holds(pool: Pool, most: int | None = None) -> list[Hold]:
    """Return the holds of the pool's leases, the longest first."""
    held = sorted(pool.held(), key=lambda lease: lease.since)
    return [hold_of(lease, pool.thread) for lease in held[:most]]


def waits(pool: Pool, most: int | None = None) -> list[Wait]:
    """Return the waits of the tasks in the pool's queue, the longest first."""
    return [_wait_of(task, pool) for task in islice(pool.queued(), most)]


def _wait_of(task: asyncio.Task[Any], pool: Pool) -> Wait:
    stack = stacks.of_task(task, pool.thread)
    asked = stack.asked_at()
    return Wait(
        waiter=naming.task_and_request(task, stack.context()),
        seconds=None if asked is None else monotonic() - asked,
        place=stack.place(),
    )


def thread_name(thread: int) -> str:
    """Return the name of the thread with the identity `thread`, in quotes, or its number."""
    names = [each.name for each in threading.enumerate() if each.ident == thread]
    return f"{names[0]!r}" if names else str(thread)
