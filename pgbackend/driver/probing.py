"""Finds out whether a pool serves: it is asked for one statement, within a limit of time.

Probes of a pool that run at the same time share one statement. A probe does not sit an outage out:
it tells of the outage as soon as an attempt to connect has failed. It makes that attempt itself if
nobody else does, because an outage ends with a connection, and a pool that gets no other requests,
since a load balancer has heard of the outage, would never make one.

A full pool is no failure. If the probe gets no connection within its limit, it looks whether other
tasks have got one meanwhile: then the pool is busy, and works. If nobody has, it is exhausted.
"""

from __future__ import annotations

import asyncio
import weakref
from dataclasses import dataclass
from enum import StrEnum
from time import monotonic
from typing import Any

from . import bridge, errors
from .pool import Pool

STATEMENT = "SELECT 1"

#: Seconds between two looks at a probe that waits: whether an attempt to connect has failed.
LOOK_INTERVAL = 0.05

#: Seconds beyond its limit that a probe has to withdraw its request for a connection.
SLACK = 0.1


class State(StrEnum):
    """The states in which a probe may find a database."""

    OK = "ok"
    """The statement was executed."""
    BUSY = "busy"
    """All connections are in use; others got one while the probe waited."""
    EXHAUSTED = "exhausted"
    """All connections are in use, and nobody got one; or the queue of the pool is full."""
    OUTAGE = "outage"
    """No connection is open, and none can be made."""
    TIMEOUT = "timeout"
    """The server has not answered within the limit."""
    CLOSED = "closed"
    """The pool is closed: its event loop ends."""
    ERROR = "error"
    """The statement has failed."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A state of a database, the seconds that it took to find, and the error, if there is one."""

    state: State
    seconds: float
    error: BaseException | None = None


#: The probes that run, for each pool by their limits.
_running: weakref.WeakKeyDictionary[Pool, dict[float, asyncio.Task[Finding]]] = (
    weakref.WeakKeyDictionary()
)


async def probe(pool: Pool, limit: float) -> Finding:
    """Return in what state `pool`, a pool of the running loop, is; take `limit` seconds at most."""
    if pool.closed:
        return Finding(State.CLOSED, 0.0)
    running = _running.setdefault(pool, {})
    if (task := running.get(limit)) is None:
        running[limit] = task = pool.start(_probe(pool, limit))
        task.add_done_callback(lambda _: running.pop(limit))
    await asyncio.wait([task], timeout=limit + SLACK)
    if not task.done():  # the statement is being cancelled, on a link that is silent
        return Finding(State.TIMEOUT, limit)
    return Finding(State.CLOSED, 0.0) if task.cancelled() else task.result()


async def _probe(pool: Pool, limit: float) -> Finding:
    began = monotonic()
    before = set(pool.leases)
    statement = pool.start(bridge.run(_execute, pool))
    statement.set_name("pgbackend.health")  # for those who see who holds connections
    try:
        while not statement.done() and (left := began + limit - monotonic()) > 0:
            if (failure := pool.outage()) is not None:
                return Finding(State.OUTAGE, monotonic() - began, failure)
            await asyncio.wait([statement], timeout=min(left, LOOK_INTERVAL))
        state, error = _state(pool, statement, before, began)
        return Finding(state, monotonic() - began, error)
    finally:
        statement.cancel()
        await asyncio.wait([statement])
        if not statement.cancelled():
            statement.exception()  # asked for, so that the loop does not log it


def _execute(pool: Pool) -> None:
    pool.execute(STATEMENT, None, lambda _: None)  # which changes nothing in the server session


def _state(
    pool: Pool, statement: asyncio.Task[None], before: set[int], began: float
) -> tuple[State, BaseException | None]:
    """Return the state of `pool`, and the error of `statement`, whose time may be over."""
    error = None
    if statement.done():
        error = asyncio.CancelledError() if statement.cancelled() else statement.exception()
        if error is None:
            return State.OK, None
        if isinstance(error, errors.PoolClosed | asyncio.CancelledError):
            return State.CLOSED, error
        if isinstance(error, errors.PoolQueueFull | errors.PoolDeadlock):
            return State.EXHAUSTED, error
    if (failure := pool.outage()) is not None:
        return State.OUTAGE, failure
    if pool.is_full() and (_waits(pool, statement) or isinstance(error, errors.PoolTimeout)):
        return (State.BUSY if _has_lent(pool, before, began) else State.EXHAUSTED), error
    return (State.TIMEOUT if error is None else State.ERROR), error


def _waits(pool: Pool, statement: asyncio.Task[Any]) -> bool:
    return statement in pool.queued()


def _has_lent(pool: Pool, before: set[int], began: float) -> bool:
    """Return whether a lease has ended, or one was made, since the time `began`."""
    return not before <= pool.leases.keys() or any(lease.since > began for lease in pool.held())
