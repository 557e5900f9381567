"""Leases: who holds a pooled connection, by what, and how the hold ends.

`Pool.lease()` makes a `Lease`, which lends a connection to one task or thread. The lease counts
what holds the connection, and gives it back to its pool when nothing does any more.

Note [Holders]
A lease ends with the last of its holders: open cursors, pins, and statements in flight. Each kind
is counted in one place: cursors in `Lease.cursors`, pins in `Lease.pins`. A statement is in flight
as long as the connection's lock is held, which psycopg holds from the first byte that is sent to
the last that is read (of a COPY or a stream, to its end). So a cursor or an iterator that ends
while a statement is in flight (freed by the garbage collector, or closed by another task) only
takes itself out of the count, and the end of the statement ends the lease (`ParkingLock.on_free`).

`Lease.end()` is for callers that know that nobody needs the connection any more: at the end of a
transaction, or of the task. It refuses at once every use that comes after it; but a statement that
another task waits for right now is not touched: the connection goes back when that has ended.
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
from .finalizers import is_collecting
from .pooled import AsyncConnection
from .protocols import LeasedCursor
from .statement_cursors import Result, result_of
from .vouching import vouching

#: Returns what prepares a cursor on a connection with these adapters; None if nothing need.
Adapting: TypeAlias = Callable[[Any], Callable[[Any], None] | None]


class LendingPool(Protocol):
    """The pool of a lease, as leases and the code that has one know it."""

    name: str
    closed: bool
    thread: int
    """The identity of the thread that the pool's event loop runs in."""
    leases: dict[int, weakref.ref[Lease]]
    """The leases that have not ended, by number."""
    soiled_unless_vouched: bool
    """Whether a statement that nobody vouches for makes its lease dirty."""

    def release(self, lease: Lease, /) -> None:
        """Take the connection of `lease` back; from any thread."""

    def call_at_home(self, func: Callable[[], None], /) -> bool:
        """Let the pool's loop call `func`, from another thread; False if the loop is closed."""


class Lease:
    """One task's hold on a connection, from its first statement to the end of the last.

    It ends with the last of its holders: see Note [Holders].
    """

    __slots__ = (
        "__weakref__",
        "_connection",
        "_given_back",
        "cursors",
        "dirty",
        "ended",
        "heir",
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
        #: The task that holds the connection, on which its return depends. None: a thread holds it,
        #: or nobody any more.
        self.task = asyncio.current_task()
        self.pins = 0
        #: The open cursors by number, and whether each is on the server, whose session keeps what
        #: is left of it. None until there is a connection to make a cursor on.
        self.cursors: dict[int, bool] | None = None
        #: Whether a statement may have changed the state of the session.
        self.dirty = False
        self.ended = False
        self._given_back = False
        self.on_end: Callable[[], None] | None = None
        #: The one to whom the lease passes when its task ends; the driver only keeps it.
        self.heir: Any = None
        #: The place in the user's code where the last cursor was opened, for messages.
        self.opened_at: str | None = None
        self._connection: Connection | None = None
        #: Whether the holder has looked at the connection's types, and so may have registered one.
        self.types_seen = False
        pool.leases[id(self)] = weakref.ref(self)

    @property
    def connection(self) -> Connection:
        """Return the facade that the holder uses; it is made when first asked for."""
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
        """Name the task that holds the connection, for messages."""
        return bridge.name_of(self.task) if self.task is not None else "no task"

    def execute(self, query: str, params: Params | None, adapting: Adapting) -> Result:
        """Execute a statement, green, fetch all its rows, and leave no cursor open.

        The caller vouches for the statement, or has marked the lease as dirty. Errors are
        psycopg's.
        """
        physical, connection = self.physical, self._connection
        adapt = adapting(physical.adapters)
        if adapt is None and physical.makes_cursors_of(connection):
            return physical.run_statement(connection, query, params)
        # A cursor of the user's own class may send more than this statement: vouch for it alone.
        with self.connection.cursor() as cursor, vouching((query,)):
            cursor.takes_turns = True
            if adapt is not None:
                adapt(cursor)
            cursor.execute(query, params)
            return result_of(cursor)

    def can_wait(self) -> bool:
        """Tell whether the caller may send a statement.

        It may if it holds the lease, and runs where something can wait for the reply.
        """
        portal = bridge.current()
        if portal is None:
            # Not the garbage collector: its thread may be in the midst of another statement.
            return asyncio._get_running_loop() is None and not is_collecting()
        if portal.closing or is_collecting():
            return False
        return asyncio.current_task() is self.task or self.pins > 0

    def is_held_by_cursors(self) -> bool:
        """Tell whether nothing but open cursors keeps the lease."""
        return not self.ended and not self.pins

    def cursor_opened(self, cursor: LeasedCursor) -> None:
        """Count `cursor` as a holder. Raises `LeaseEnded`."""
        if self.cursors is None:
            raise errors.LeaseEnded(LEASE_ENDED)
        if self.ended:
            self.connection.refuse()
        self.cursors[id(cursor)] = cursor.is_on_server

    def cursor_closed(self, cursor: LeasedCursor) -> None:
        """Count `cursor` no longer; the caller may be the garbage collector, in any thread."""
        if self.cursors is not None:
            self.cursors.pop(id(cursor), None)
        if self.pins or self.cursors or self.ended:
            return
        if threading.get_ident() == self.pool.thread or not self.pool.call_at_home(self._go_on):
            self._go_on()

    def pin(self) -> None:
        """Keep the connection until `unpin()`, also while no cursor is open."""
        self.pins += 1

    def unpin(self) -> None:
        """Take one `pin()` back, and end if it was the last holder."""
        self.pins -= 1
        self.maybe_end()

    def maybe_end(self) -> None:
        """End if nothing holds the connection any more."""
        if not self.cursors and not self.pins and not self.ended:
            self.end()

    def end(self, reason: str = LEASE_ENDED) -> None:
        """Give the connection back, from any thread, without waiting; see Note [Holders].

        `reason` is the message of the error that a later use of the connection raises.
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

    def end_at_home(self, reason: str = LEASE_ENDED) -> None:
        """Call `end()` in the pool's own thread, which sees the statement in flight."""
        end = partial(self.end, reason)
        if threading.get_ident() == self.pool.thread or not self.pool.call_at_home(end):
            end()

    def _note_streams(self) -> None:
        """Let the session be reset if a server-side cursor is open in it."""
        if self.cursors:
            self.dirty = self.dirty or any(self.cursors.values())

    def is_in_thread(self) -> bool:
        """Tell whether a thread waits for the end of a statement on this connection."""
        return self._connection is not None and self._connection.waits_elsewhere > 0

    def _waits_for_statement(self) -> bool:
        """Tell whether a statement is in flight, whose end will then go on with the lease's."""
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
        """Go on when a statement has ended; called by whoever releases the connection's lock."""
        assert self._connection is not None
        lock = self._connection.lock
        lock.on_free = None
        if self.ended:
            self._connection.end_lease()  # before another thread finds the lock free
            lock.refuse = None  # or lock and connection would refer to each other
        if threading.get_ident() == self.pool.thread or not self.pool.call_at_home(self._go_on):
            self._go_on()

    def _go_on(self) -> None:
        """End if nothing holds the connection any more, or else with the statement in flight."""
        held = not self.ended and (self.cursors or self.pins)
        if held or self._given_back or self._waits_for_statement():
            return
        if self.ended:
            self._give_back()
        else:
            self.end()

    def _give_back(self) -> None:
        """Hand the connection to the pool, unless a thread has just begun a statement on it."""
        connection = self._connection
        if connection is not None:
            connection.end_lease()
            # The thread had looked whether it still could before `end_lease()` refused it.
            if connection.waits_elsewhere and self._waits_for_statement():
                return
        self._given_back = True
        self.pool.release(self)

    def disown(self) -> None:
        """End in a forked child, without touching the connection, which is the parent's."""
        self.ended = self._given_back = True
        if self._connection is not None:
            self._connection.end_lease()
