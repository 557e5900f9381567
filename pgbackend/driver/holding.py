"""Bounds on how long a lease is held without a statement; and who holds a lease, for messages.

A lease is *idle* while no statement of it is in flight: a stream whose reader does nothing, a
transaction that waits for something else, a `pinned()` block. The pool looks at its leases from
time to time (pulse.py), so a statement costs nothing more. An idle lease is warned of once, after
`HoldBounds.warning` seconds. By choice it is ended after `HoldBounds.end` seconds: a transaction is
rolled back, and the holder's next use of the connection raises `LeaseEnded`, which says why.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Protocol

from psycopg.pq import TransactionStatus

from . import naming, stacks
from .lease import Lease

logger = logging.getLogger("pgbackend.driver")

_IN_TRANSACTION = (TransactionStatus.INTRANS, TransactionStatus.INERROR)

#: How many leases a message lists; those that are held the longest come first.
MOST_LISTED = 10

#: Seconds for which the text of the holders is used again: many waits may time out at once.
SAME_TEXT = 0.1


@dataclass(frozen=True, slots=True)
class HoldBounds:
    """After how many idle seconds a lease is warned of, and ended; None: never."""

    warning: float | None = None
    end: float | None = None

    def interval(self, timeout: float) -> float:
        """Return how often the pool looks at its leases, in seconds; `timeout` is the pool's."""
        bounds = [timeout, *(bound for bound in (self.warning, self.end) if bound)]
        return min(5.0, max(0.02, min(bounds) / 4))


class HeldPool(Protocol):
    """Protocol of the part of a pool that this module uses."""

    name: str
    thread: int

    def held(self) -> list[Lease]:
        """Return the leases that have not ended."""


def is_in_flight(lease: Lease) -> bool:
    """Return whether a statement of `lease` is in flight. May be called in any thread."""
    return lease.physical.watch.future is not None or lease.is_in_thread()


def since(lease: Lease) -> float:
    """Return when the statement in flight began, or when the lease became idle."""
    return max(lease.since, lease.physical.watch.since)


@dataclass(frozen=True, slots=True)
class Hold:
    """A task's hold on a connection, as messages tell it."""

    holder: str
    """The name of the task, and the request that it serves."""
    seconds: float
    """The age of the lease."""
    state: str
    """A text: whether a statement is in flight or what else keeps the lease, and for how long."""
    place: str | None
    """The ``file:line`` of the user's own code in which the task is."""
    opened_at: str | None
    """The place where the last cursor was opened."""
    server_process: int

    def __str__(self) -> str:
        told = [self.state]
        told += [f"at {self.place}"] if self.place is not None else []
        opened = self.opened_at
        told += [f"opened at {opened}"] if opened is not None and opened != self.place else []
        return f"{self.holder} for {self.seconds:.2f} s ({', '.join(told)})"


def hold_of(lease: Lease, thread: int) -> Hold:
    """Return who holds `lease`, for how long, what for, and where the code is.

    `thread` is that of the pool's loop. May be called in any thread.
    """
    task = lease.task  # once: another thread may end the lease meanwhile
    holder, place = "no task", None
    if task is not None:
        stack = stacks.of_task(task, thread)
        holder, place = naming.task_and_request(task, stack.context()), stack.place()
    return Hold(
        holder=holder,
        seconds=monotonic() - lease.since,
        state=_state(lease),
        place=place,
        opened_at=lease.opened_at,
        server_process=lease.physical.pid(),
    )


def _state(lease: Lease) -> str:
    age = f"{monotonic() - since(lease):.2f} s"
    if is_in_flight(lease):
        return f"in a statement for {age}"
    if lease.physical.pgconn.transaction_status in _IN_TRANSACTION:
        return f"idle in a transaction for {age}"
    if lease.cursors:
        stream = any(dict(lease.cursors).values())
        return f"idle for {age} with an open {'stream' if stream else 'cursor'}"
    return f"idle for {age}"


def described(lease: Lease, thread: int) -> str:
    """Return the text of `hold_of()`."""
    return str(hold_of(lease, thread))


class Holding:
    """Looks at the leases of one pool: who holds them, and which are held for too long."""

    def __init__(self, pool: HeldPool, bounds: HoldBounds, setting: Callable[[], str]) -> None:
        self._pool = pool
        self._bounds = bounds
        self._setting = setting
        #: Since when each lease was idle when it was warned of.
        self._warned: weakref.WeakKeyDictionary[Lease, float] = weakref.WeakKeyDictionary()
        #: When a statement of each lease was last seen in flight. (Nobody notes when those end that
        #: threads and other loops wait for.)
        self._seen: weakref.WeakKeyDictionary[Lease, float] = weakref.WeakKeyDictionary()
        self._text, self._text_made = "", 0.0

    def text(self) -> str:
        """Return a description of the leases, those that are held the longest first."""
        now = monotonic()
        if not self._text or now - self._text_made > SAME_TEXT:
            held = sorted(self._pool.held(), key=lambda lease: lease.since)
            told = [described(lease, self._pool.thread) for lease in held[:MOST_LISTED]]
            if len(held) > MOST_LISTED:
                told.append(f"and {len(held) - MOST_LISTED} more")
            self._text, self._text_made = ", ".join(told) or "nobody", now
        return self._text

    def look(self, late: float) -> None:
        """Warn of leases that are idle for too long, and end them by choice.

        Does nothing if the loop was blocked (`late`): their holders could not go on meanwhile.
        """
        warning, end = self._bounds.warning, self._bounds.end
        if late or not (warning or end):
            return
        now = monotonic()
        for lease in self._pool.held():
            if is_in_flight(lease):
                self._seen[lease] = now
            if lease.ended or is_in_flight(lease):
                continue
            idle_since = max(since(lease), self._seen.get(lease, 0.0))
            if end and now - idle_since >= end:
                self._end(lease, now - idle_since)
            elif warning and now - idle_since >= warning and self._warned.get(lease) != idle_since:
                self._warned[lease] = idle_since
                self._warn(lease)

    def _warn(self, lease: Lease) -> None:
        logger.warning(
            "a connection of %r is held, and no statement is sent on it: by %s. Nobody else can "
            "use it meanwhile: close what is open, or end the transaction, before the code waits "
            "for anything else. 'max_hold' in %s can end such a hold; 'hold_warning' says after "
            "how many seconds this warning comes",
            self._pool.name,
            described(lease, self._pool.thread),
            self._setting(),
        )

    def _end(self, lease: Lease, idle: float) -> None:
        logger.warning(
            "a connection of %r was taken back after %.2f s without a statement ('max_hold' in "
            "%s); it was held by %s",
            self._pool.name,
            idle,
            self._setting(),
            described(lease, self._pool.thread),
        )
        in_transaction = lease.physical.pgconn.transaction_status in _IN_TRANSACTION
        lease.take_back(
            f"this connection of {self._pool.name!r} was taken back, because its holder sent no "
            f"statement for {idle:.2f} s{', and its transaction was rolled back' * in_transaction}"
            f": read and close streams sooner, do not wait for other things in a transaction, or "
            f"raise 'max_hold' in {self._setting()}"
        )
