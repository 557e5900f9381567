"""Monitors: each asks one server, once in a while, how far its log goes.

Note [Monitors]
A router is asked before each query, in sync code, in green code and on the loop itself, and must
not wait. So it looks at what is in memory, and one thread for each server asks the questions, on a
connection of its own. The threads run only while reads are routed: `IDLE_LIMIT` after the last one
they close their connections and end.

The primary's answers are kept, each with the time at which it was asked for. They tell which
position a replica must have replayed to have all that was committed before some time: that of the
first answer asked for after that time (`first_after()`). They also tell by how much time a replica
is behind (`lag_of()`), and that does not grow while an idle primary writes nothing.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from time import monotonic
from typing import Any

import psycopg
from django.db import connections

from pgbackend.driver.connection import Connection
from pgbackend.driver.forks import after_fork
from pgbackend.driver.parking import Waiter

from .positions import QUERY, Answer, Position

logger = logging.getLogger("pgbackend.replicas")

#: Seconds between two questions, unless a router asks for an answer sooner.
INTERVAL = 1.0
#: Seconds between two questions at least.
GAP = 0.02
#: Seconds for which a read waits for an answer, at most, if there is none yet.
PATIENCE = 2.0
#: Seconds after which a server that has not answered a question is left out.
SILENCE = 1.0
#: Seconds for which the threads go on after the last read.
IDLE_LIMIT = 30.0
#: Seconds for which the answers of a primary are kept.
MEMORY = 60.0
#: Seconds between two of the answers that are kept, at least.
SPACING = 0.05

#: Bounds on the silence of a server, for libpq.
_BOUNDS = {
    "connect_timeout": 2,
    "keepalives_idle": 1,
    "keepalives_interval": 1,
    "keepalives_count": 2,
    "tcp_user_timeout": 3000,
}


@dataclass(slots=True)
class Sample:
    """A position of the primary, and when the first and last answers with it were asked for."""

    first: float
    last: float
    position: Position


class Monitor:
    """Asks the server of one alias how far its log goes, in a thread of its own."""

    def __init__(self, alias: str) -> None:
        self.alias = alias
        #: The last answer, and when it was asked for; None and the error if there was none.
        self.answer: Answer | None = None
        self.asked_at = -inf
        self.error: str | None = None
        #: The positions of a primary on its present timeline, the oldest first.
        self.samples: list[Sample] = []
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()
        self._waiters: list[Waiter] = []
        self._followers: tuple[Monitor, ...] = ()
        self._needed_at = self._doubted_at = -inf
        #: When the question was asked that has no answer yet.
        self._asking_since = inf
        self._stopping = False

    def __repr__(self) -> str:
        state = self.error or ("no answer yet" if self.answer is None else self.answer.position)
        return f"<Monitor of {self.alias!r}: {state}>"

    # --- What routers ask ---

    def need(self) -> None:
        """Keep the thread running; start it if need be."""
        self._needed_at = monotonic()
        if self._thread is None:
            self._start()

    def hurry(self, *followers: Monitor) -> None:
        """Have the next question asked now, and then that of `followers`; wait for nothing."""
        if followers:
            self._followers = followers
        self._wake.set()

    def is_fresh(self, within: float) -> bool:
        """Return whether the last answer was asked for in the last `within` seconds."""
        return self.answer is not None and monotonic() - self.asked_at <= within

    def is_silent(self) -> bool:
        """Return whether the server leaves a question unanswered for long."""
        return monotonic() - self._asking_since > SILENCE

    def wait(self) -> None:
        """Wait for the next answer, or for an error, but not longer than `PATIENCE`.

        Green code parks its greenlet, other code blocks its thread.
        """
        waiter = Waiter()
        self._waiters.append(waiter)
        self.hurry()
        if not waiter.wait(PATIENCE):
            self.fail(f"no answer within {PATIENCE:g} s")
        with suppress(ValueError):
            self._waiters.remove(waiter)

    def fail(self, error: str) -> None:
        """Record that the server cannot be had, until its next answer."""
        if self.error is None:
            logger.warning("the server of %r cannot be had: %s", self.alias, error)
        self.answer, self.error = None, error
        self._tell()

    def doubt(self) -> None:
        """Ignore answers that were asked for before now; the next read waits for a new one."""
        self._doubted_at = monotonic()
        self.answer = None
        self.hurry()

    def first_after(self, moment: float) -> Position | None:
        """Return the first position that was asked for after `moment`; None if there is none."""
        found = None
        for sample in reversed(self.samples):
            if sample.last < moment:
                break
            found = sample.position
        return found

    def lag_of(self, replica: Answer) -> float:
        """Return by how many seconds `replica` is behind this primary, at most.

        A primary that was never reached cannot tell: 0 is returned while it cannot be.
        """
        samples = self.samples
        if not samples:
            return 0.0 if self.error is not None else inf
        if replica.position.covers(samples[-1].position):
            return 0.0
        behind = inf if replica.behind is None else max(0.0, replica.behind)
        for sample in reversed(samples):
            if replica.position.covers(sample.position):
                return min(behind, samples[-1].last - sample.last)
        return behind

    # --- The thread ---

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                self._stopping = False
                name = f"pgbackend replicas: {self.alias}"
                self._thread = threading.Thread(target=self._run, name=name, daemon=True)
                self._thread.start()

    def stop(self) -> None:
        """End the thread, and wait for its end; but not for long, if its server is silent."""
        self._stopping = True
        self._wake.set()
        if (thread := self._thread) is not None:
            thread.join(PATIENCE)

    def _run(self) -> None:
        connection: psycopg.Connection[Any] | None = None
        try:
            while True:
                self._wake.clear()
                asked_at = self._asking_since = monotonic()
                try:
                    if connection is None:
                        connection = self._connect()
                    self._answered(asked_at, self._ask(connection))
                except Exception as exc:
                    _close(connection)
                    connection = None
                    self.fail(str(exc).strip() or type(exc).__name__)
                self._asking_since = inf
                if self._is_over(wait=GAP) or (
                    not self._wake.wait(INTERVAL) and self._is_over(wait=0)
                ):
                    return
        finally:
            self._asking_since = inf
            _close(connection)
            with self._lock:
                self._thread = None

    def _is_over(self, wait: float) -> bool:
        """Return whether the thread is to end: it is stopped, or nobody needs it any more."""
        if wait:
            threading.Event().wait(wait)
        return self._stopping or monotonic() - self._needed_at > IDLE_LIMIT

    def _connect(self) -> psycopg.Connection[Any]:
        wrapper: Any = connections[self.alias]
        params: Mapping[str, Any] = wrapper.get_connection_params()
        return Connection.connect(**{**_BOUNDS, **params, "autocommit": True})

    def _ask(self, connection: psycopg.Connection[Any]) -> Answer:
        with psycopg.ClientCursor(connection) as cursor:
            row = cursor.execute(QUERY).fetchone()
        assert row is not None
        return Answer.of_row(row)

    def _answered(self, asked_at: float, answer: Answer) -> None:
        if asked_at < self._doubted_at:
            return
        if not answer.is_replica:
            self._remember(asked_at, answer.position)
        if self.error is not None:
            logger.info("the server of %r can be had again", self.alias)
        self.asked_at, self.answer, self.error = asked_at, answer, None
        followers, self._followers = self._followers, ()
        for each in followers:
            each.hurry()
        self._tell()

    def _remember(self, asked_at: float, position: Position) -> None:
        samples, new = self.samples, Sample(asked_at, asked_at, position)
        if samples and samples[-1].position.timeline != position.timeline:
            self.samples = [new]  # after a failover: the positions before it are void
        elif samples and samples[-1].position == position:
            samples[-1].last = asked_at
        elif len(samples) > 1 and samples[-1].first - samples[-2].first < SPACING:
            samples[-1] = new
        else:
            samples.append(new)
            if samples[0].last < asked_at - 2 * MEMORY:
                self.samples = [each for each in samples if each.last > asked_at - MEMORY]

    def _tell(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter.wake()


def _close(connection: psycopg.Connection[Any] | None) -> None:
    """Close `connection`, if there is one."""
    if connection is not None:
        connection.close()


#: All monitors, by alias.
monitors: dict[str, Monitor] = {}


def monitor_of(alias: str) -> Monitor:
    """Return the monitor of `alias`, made at first use."""
    return monitors.get(alias) or monitors.setdefault(alias, Monitor(alias))


def stop_all() -> None:
    """End all threads, and forget what they have found out: for tests, and before a fork."""
    while monitors:
        monitors.popitem()[1].stop()


@after_fork
def _forget_monitors() -> None:
    """Forget the monitors of the parent process, whose threads are not in the child."""
    monitors.clear()
