"""Families: a primary and its replicas; chooses the server of a read.

Note [Choosing]
A replica is read from if its monitor has had an answer lately, if it is not too far behind, and if
it has replayed all that the running code must see: its own writes, and those of the token that it
was given (`writes.py`). In all other cases the primary is read from, which is never wrong. Nothing
of this waits, except for the first answers of the servers, when a process begins to read.

The monitors notice within a second that a server has gone. Until then the connection tells: before
a replica is chosen outside of a transaction, the running code's connection to it is opened, or
looked at, as it would be for the statement: nothing is sent. So the read goes to the primary if
that fails. If all connections of the pool are leased, nothing is tried: the statement will wait.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator
from time import monotonic
from typing import Any

from django.db import Error, connections
from psycopg import waiting
from psycopg.waiting import Wait

from pgbackend import replica_settings, state
from pgbackend.driver import bridge
from pgbackend.driver.pool import Pool

from . import writes
from .monitors import INTERVAL, PATIENCE, Monitor, monitor_of
from .on_primary import is_on_primary
from .positions import Answer, Position
from .writes import Record

logger = logging.getLogger("pgbackend.replicas")


class Family:
    """A primary and its replicas, by their aliases."""

    def __init__(self, primary: str, replicas: Iterable[str], max_lag: float) -> None:
        self.primary = primary
        self.replicas = [*replicas]
        self.max_lag = max_lag
        self._turns = itertools.count()
        #: Writes of this process before this time were not noted.
        self._since = monotonic()
        #: Why a replica is not read from, by its alias, as the log has it.
        self._told: dict[str, str | None] = {}

    def __repr__(self) -> str:
        return f"<Family of {self.primary!r}: {', '.join(self.replicas)}>"

    @property
    def monitor(self) -> Monitor:
        """Return the monitor of the primary."""
        return monitor_of(self.primary)

    # --- Choosing: see Note [Choosing] ---

    def alias_for_read(self, preferred: str | None = None) -> str:
        """Return the alias to read from; `preferred`, if it is one of the replicas, goes first."""
        primary = self.primary
        if preferred == primary or is_on_primary(primary) or is_in_transaction(primary):
            return primary
        replicas = self._replicas_to_read()
        if not replicas or not self._is_watched(replicas):
            return primary
        record = writes.current()
        if (needed := self._needed(record)) is None:
            return primary
        for alias in self._in_turn(replicas, preferred):
            if self._can_serve(alias, needed) and is_reachable(alias):
                return alias
        return primary

    def _replicas_to_read(self) -> list[str]:
        """Return the aliases of the replicas; without those that a test runner has redirected."""
        if any(map(replica_settings.is_mirrored, self.replicas)):
            return []
        return self.replicas

    def _in_turn(self, replicas: list[str], preferred: str | None) -> Iterator[str]:
        turn = next(self._turns) % len(replicas)
        if preferred in replicas:
            turn = replicas.index(preferred)
        return iter(replicas[turn:] + replicas[:turn])

    def _is_watched(self, replicas: list[str]) -> bool:
        """Return whether the servers' answers are known; wait for the first ones if that may be."""
        watched = [self.monitor, *map(monitor_of, replicas)]
        for monitor in watched:
            monitor.need()
        unknown = [each for each in watched if not _is_known(each)]
        for each in unknown:
            each.hurry()
        if unknown and bridge.current() is None and state.in_async_context():
            return False  # on the loop itself: it must not be blocked
        for each in unknown:
            if not _is_known(each):
                each.wait()
        return True

    def _needed(self, record: Record) -> list[Position] | None:
        """Return the positions that a replica must have replayed for the running code.

        Return None if they are not known yet: the primary is being asked.
        """
        alias, monitor = self.primary, self.monitor
        needed = []
        token = record.positions.get(alias)
        samples = monitor.samples
        if token is not None:
            if samples and samples[-1].position.timeline == token.timeline:
                needed.append(token)
            else:  # before a failover; or after one that the monitor has not noticed yet
                record.need_now(alias)
        moment = writes.last_write(record, alias)
        if not moment and not needed and self._was_never_reached():
            return []
        position = monitor.first_after(max(moment, self._since))
        if position is None:
            monitor.hurry(*map(monitor_of, self.replicas))
            return None
        return [*needed, position]

    def _was_never_reached(self) -> bool:
        """Return whether the primary is down, and was so since this process began to read."""
        return self.monitor.error is not None and not self.monitor.samples

    def _can_serve(self, alias: str, needed: list[Position]) -> bool:
        monitor = monitor_of(alias)
        why, answer = self.why_not(alias), monitor.answer
        if why != self._told.get(alias):
            self._told[alias] = why
            logger.info("%r is %s", alias, "read from again" if why is None else f"left out: {why}")
        if why is not None or answer is None:
            return False
        if all(answer.position.covers(each) for each in needed):
            return True
        monitor.hurry()
        return False

    # --- Which replicas are up ---

    def why_not(self, alias: str) -> str | None:
        """Return why `alias` is not read from at present; None if it is."""
        monitor = monitor_of(alias)
        answer = monitor.answer
        if monitor.is_silent():
            return "it does not answer"
        if answer is None or not monitor.is_fresh(PATIENCE + INTERVAL):
            return monitor.error or "it has not answered lately"
        if (other := self._another_cluster(answer)) is not None:
            return other
        if (lag := self.monitor.lag_of(answer)) > self.max_lag:
            behind = "at an unknown position" if lag > 1e9 else f"{lag:.1f} s behind"
            return f"it is {behind}; max_lag is {self.max_lag:g} s"
        return None

    def _another_cluster(self, answer: Answer) -> str | None:
        """Return what is wrong if `answer` is not that of a replica, or of the primary itself."""
        primary = self.monitor.answer
        if primary is not None and primary.system != answer.system:
            return f"its server is no copy of that of {self.primary!r}"
        if not answer.is_replica and (
            primary is None or primary.position.timeline != answer.position.timeline
        ):
            return "it is no replica any more: it was promoted"
        return None


def _is_known(monitor: Monitor) -> bool:
    if monitor.error is not None or monitor.is_silent():
        return True
    return monitor.is_fresh(PATIENCE + INTERVAL)


# --- The running code's connections ---------------------------------------------------------------


def is_in_transaction(alias: str) -> bool:
    """Return whether the running code is in a transaction of `alias`, an open or an ended one."""
    wrapper: Any = connections[alias]
    if state.current_block(wrapper) is not None:
        return True
    current = state.current_state(wrapper)
    return current.in_atomic_block or current.transaction is not None


def is_reachable(alias: str) -> bool:
    """Return whether the running code has, or can get, a connection to the replica `alias`.

    If not, the replica is left out until its monitor has an answer. Also if its server has closed a
    connection: it may have been replaced by another one, which has replayed less.
    """
    wrapper: Any = connections[alias]
    try:
        lost = _connect_sync(wrapper) if state.async_session(wrapper) is None else _connect(wrapper)
    except Error as exc:
        monitor_of(alias).fail(str(exc).strip())
        return False
    if lost:
        monitor_of(alias).doubt()
    return not lost


def _connect(wrapper: Any) -> bool:
    """See that green code can lease a connection; return whether a free one was found dead."""
    if bridge.current() is None:
        return False
    pool: Pool = wrapper._async_pool()  # noqa: SLF001 - ours
    lives = pool.next_lives()
    if lives is False or (lives is None and not pool.is_full()):
        wrapper.ensure_connection()
    return lives is False


def _connect_sync(wrapper: Any) -> bool:
    """Open the thread's connection; return whether the server has closed the one that it had."""
    if wrapper.in_atomic_block or state.in_async_context():
        return False
    connection = wrapper.connection
    lost = connection is not None and (connection.closed or _was_sent_unasked(connection))
    if lost:
        wrapper.close()
    wrapper.ensure_connection()
    return lost


def _was_sent_unasked(connection: Any) -> bool:
    """Return whether an idle connection has unread data: mostly, that the server closes it."""
    return bool(waiting._ready(connection.pgconn.socket, Wait.R))  # a poll(), in C
