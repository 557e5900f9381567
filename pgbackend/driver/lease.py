"""Leases: how a task or thread holds a pooled connection, and how the hold ends.

`Pool.lease()` makes a `Lease`, which lends a connection to one task or thread. The lease counts its
holders, and gives the connection back to the pool when there are none left.

Note [Holders]
The holders of a lease are open cursors (`Lease.cursors`), pins (`Lease.pins`), and statements in
flight. A statement is in flight as long as the connection's lock is held: psycopg acquires the lock
before it sends the first byte of a statement, and releases it after it has read the last (for a
COPY or a stream, at its end). So a cursor or an iterator that ends while a statement is in flight
(freed by the garbage collector, or closed by another task) only leaves the count; the end of the
statement then ends the lease (`ParkingLock.on_free`).

`Lease.end()` is for callers that know that nobody needs the connection any more, at the end of a
transaction or of the task. From then on, new statements are refused. A statement that another task
is waiting for goes on: the connection is given back at the end of that statement.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any, Protocol, TypeAlias

from psycopg.abc import Params

from . import bridge, errors
from .connection import LEASE_ENDED, Connection
from .coroutines import name_of
from .finalizers import is_collecting
from .pooled import AsyncConnection
from .protocols import LeasedCursor
from .session_locks import may_lock
from .statement_cursors import Result, result_of
from .vouching import vouching

#: Takes a connection's adapters; returns a function that adapts a cursor before it executes a
#: statement, or None if the cursor needs nothing.
Adapting: TypeAlias = Callable[[Any], Callable[[Any], None] | None]


class LendingPool(Protocol):
    """The part of a pool that leases and their holders use (a protocol for type checkers)."""

    name: str
    closed: bool
    thread: int
    """The identity of the thread that the pool's event loop runs in."""
    leases: dict[int, weakref.ref[Lease]]
    """The leases that have not ended, by their `id()`."""
    soiled_unless_vouched: bool
    """Whether a statement makes its lease dirty unless code vouches for it (vouching.py)."""

    def release(self, lease: Lease, /) -> None:
        """Take back the connection of `lease`. May be called from any thread."""

    def call_at_home(self, func: Callable[[], None], /) -> bool:
        """Make the pool's loop call `func` soon; return False if the loop is closed."""


class Lease:
    """One task's or thread's hold on a pooled connection, from its first statement on.

    The lease ends when its last holder does, or by `end()`: see Note [Holders].
    """

    __slots__ = (
        "__weakref__",
        "_connection",
        "_given_back",
        "cursors",
        "dirty",
        "ended",
        "heir",
        "locked_by",
        "on_end",
        "opened_at",
        "physical",
        "pins",
        "pool",
        "since",
        "task",
        "types_seen",
    )

    def __init__(self, pool: LendingPool, physical: AsyncConnection) -> None:
        self.pool = pool
        self.physical = physical
        self.since = monotonic()
        #: The task that holds the connection, and must go on before the connection can come back.
        #: None if a thread holds the connection, or nobody does any more.
        self.task = asyncio.current_task()
        self.pins = 0
        #: The open cursors by `id()`, and whether each is server-side, and so must be closed by a
        #: reset if it is left open. None until the facade is made.
        self.cursors: dict[int, bool] | None = None
        #: Whether a statement may have changed the server session, so that the pool resets it.
        self.dirty = False
        self.ended = False
        self._given_back = False
        self.on_end: Callable[[], None] | None = None
        #: The successor that takes the lease over when its task ends; the driver only stores it.
        self.heir: Any = None
        #: The place in the user's code where the last cursor was opened, for messages.
        self.opened_at: str | None = None
        #: The place that may have taken an advisory lock of the session; see session_locks.py.
        self.locked_by: str | None = None
        self._connection: Connection | None = None
        #: Whether the facade's user has read its `adapters`, and so may have registered a type.
        self.types_seen = False
        pool.leases[id(self)] = weakref.ref(self)

    @property
    def connection(self) -> Connection:
        """Return the facade that this lease lends; the first access makes it."""
        if self._connection is None:
            if self.ended:
                raise errors.LeaseEnded(LEASE_ENDED)
            self.cursors = {}
            self._connection = self.physical.facade.lend(self)
        return self._connection

    def __repr__(self) -> str:
        state = "ended" if self.ended else f"held for {monotonic() - self.since:.2f} s"
        return f"<Lease of {self.pool.name!r} by {self.holder!r}, {state}>"

    def __del__(self) -> None:
        if not self._given_back:
            self.ended = True
            self._note_streams()
            self._give_back()

    @property
    def holder(self) -> str:
        """Return the name of the task that holds the connection, or "no task", for messages."""
        return name_of(self.task) if self.task is not None else "no task"

    def execute(self, query: str, params: Params | None, adapting: Adapting) -> Result:
        """Execute a statement, fetch all its rows, and leave no cursor open.

        `adapting` says how to adapt the cursor: see `Adapting`. The caller must vouch for the
        statement (vouching.py), or have marked the lease as dirty. Raises psycopg's errors.
        """
        physical, connection = self.physical, self._connection
        if self.dirty:
            self.note_lock(query)
        adapt = adapting(physical.adapters)
        if adapt is None and physical.makes_cursors_of(connection):
            try:
                return physical.run_statement(connection, query, params)
            except BaseException:
                if physical.facade.session_settings.has_lost_values():
                    self.dirty = True
                raise
        # A cursor of a user's class may send more statements: vouch for this one only.
        with self.connection.cursor() as cursor, vouching((query,)):
            cursor.takes_turns = True
            if adapt is not None:
                adapt(cursor)
            cursor.execute(query, params)
            return result_of(cursor)

    def note_lock(self, query: object) -> None:
        """Note what sends `query`, if `query` may take an advisory lock of the session."""
        if self.locked_by is None and may_lock(query, self._connection):
            opened = self.opened_at
            self.locked_by = f"a cursor opened at {opened}" if opened else "a query of the ORM"

    def can_wait(self) -> bool:
        """Return whether the running code may send a statement and wait for the reply.

        In a portal: if the portal is not being closed, and its task holds the lease or the lease is
        pinned. Outside of portals: if no loop runs in the thread. Never in a finalizer that the
        garbage collector runs.
        """
        portal = bridge.current()
        if portal is None:
            # A finalizer may not: the collector may have interrupted another statement's code.
            return asyncio._get_running_loop() is None and not is_collecting()
        if portal.closing or is_collecting():
            return False
        return asyncio.current_task() is self.task or self.pins > 0

    def is_held_by_cursors(self) -> bool:
        """Return whether only open cursors, and no pin, keep the lease from ending."""
        return not self.ended and not self.pins

    def cursor_opened(self, cursor: LeasedCursor) -> None:
        """Count `cursor` as a holder; raise `LeaseEnded` if the lease has ended."""
        if self.cursors is None:
            raise errors.LeaseEnded(LEASE_ENDED)
        if self.ended:
            self.connection.refuse()
        self.cursors[id(cursor)] = cursor.is_on_server

    def cursor_closed(self, cursor: LeasedCursor) -> None:
        """Remove `cursor` from the holders; if there are none left, make the lease end.

        The garbage collector may call this, in any thread: the lease ends in the thread of the
        pool's loop, and not before a statement in flight has ended.
        """
        if self.cursors is not None:
            self.cursors.pop(id(cursor), None)
        if self.pins or self.cursors or self.ended:
            return
        if threading.get_ident() == self.pool.thread or not self.pool.call_at_home(
            self._maybe_give_back
        ):
            self._maybe_give_back()

    def pin(self) -> None:
        """Keep the connection until `unpin()`, also while no cursor is open."""
        self.pins += 1

    def unpin(self) -> None:
        """Undo one `pin()`, and end the lease if it has no other holder."""
        self.pins -= 1
        self.maybe_end()

    def maybe_end(self) -> None:
        """End the lease if no cursor and no pin holds it."""
        if not self.cursors and not self.pins and not self.ended:
            self.end()

    def end(self, reason: str = LEASE_ENDED) -> None:
        """End the lease; give the connection back now, or when a statement in flight ends.

        Waits for nothing; may be called from any thread; see Note [Holders]. `reason` is the
        message of the error that a later use of the connection raises.
        """
        if self.ended:
            return
        self.ended = True
        if self.cursors:
            self._note_streams()
        self.task = None  # a cancelled task keeps a traceback, whose frames refer to this lease
        if self.on_end is not None:
            self.on_end()
            self.on_end = None
        connection = self._connection
        if connection is not None:
            connection.end_reason, connection.left_open = reason, self.cursors
            if connection.waits_elsewhere or self.physical.watch.future is not None:
                lock = connection.lock
                lock.refuse = connection.refuse
                if self._waits_for_statement():
                    return
                lock.refuse = None  # or lock and connection would refer to each other
        self._give_back()

    def take_back(self, reason: str) -> None:
        """End the lease of a holder that does nothing, and give the connection back now.

        For the thread of the pool's loop. A COPY, or a stream of psycopg's, holds the connection's
        lock until its holder goes on: then the connection is closed.
        """
        connection = self.connection
        connection.taken_back = True  # type: ignore[attr-defined]  # a lent one has it
        stuck = connection.lock.locked() and not connection.is_waited_for()
        if stuck:
            self.physical.close_now()
        self.end(reason)
        if stuck and not self._given_back:
            connection.lock.on_free = None
            self._give_back()

    def end_at_home(self, reason: str = LEASE_ENDED) -> None:
        """Call `end()` in the thread of the pool's loop, where it sees each statement in flight.

        From another thread, this returns before `end()` is called.
        """
        end = partial(self.end, reason)
        if threading.get_ident() == self.pool.thread or not self.pool.call_at_home(end):
            end()

    def _note_streams(self) -> None:
        """Mark the lease dirty if a server-side cursor is still open, so that a reset closes it."""
        if self.cursors:
            self.dirty = self.dirty or any(self.cursors.values())

    def is_in_thread(self) -> bool:
        """Return whether a thread, or code on another loop, waits for a statement's reply."""
        return self._connection is not None and self._connection.waits_elsewhere > 0

    def _waits_for_statement(self) -> bool:
        """Return whether a statement is in flight; if so, make its end call `_when_free()`."""
        if self._connection is None:
            return False
        lock = self._connection.lock
        if not lock.locked():
            return False
        lock.on_free = self._when_free
        if lock.locked():
            return True
        lock.on_free = None  # another thread has just released it
        return False

    def _when_free(self) -> None:
        """Have `_maybe_give_back()` called in the loop's thread, because a statement has ended.

        The connection's lock calls this, in the thread that releases the lock.
        """
        assert self._connection is not None
        lock = self._connection.lock
        lock.on_free = None
        if self.ended:
            self._connection.end_lease()  # before another thread finds the lock free
            lock.refuse = None  # or lock and connection would refer to each other
        if threading.get_ident() == self.pool.thread or not self.pool.call_at_home(
            self._maybe_give_back
        ):
            self._maybe_give_back()

    def _maybe_give_back(self) -> None:
        """Give the connection back, after a statement or cursor has ended, if nothing needs it.

        If the lease has ended, only a statement in flight still needs the connection. If not, open
        cursors and pins do, too; without any, the lease is ended now. See Note [Holders].
        """
        held = not self.ended and (self.cursors or self.pins)
        if held or self._given_back or self._waits_for_statement():
            return
        if self.ended:
            self._give_back()
        else:
            self.end()

    def _give_back(self) -> None:
        """Hand the connection to the pool, unless a thread has just begun a statement on it.

        The end of that statement then calls this again.
        """
        connection = self._connection
        if connection is not None:
            connection.end_lease()
            # Such a thread had passed its check just before `end_lease()` began to refuse.
            if connection.waits_elsewhere and self._waits_for_statement():
                return
        self._given_back = True
        self.pool.release(self)

    def disown(self) -> None:
        """Mark the lease as ended in a forked child; leave the parent's connection alone."""
        self.ended = self._given_back = True
        if self._connection is not None:
            self._connection.end_lease()
