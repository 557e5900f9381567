"""Changes of the server behind a pool: a standby where the primary was, or a server that ends.

A connection to a standby works, and so stays in its pool: writes on it fail with SQLSTATE 25006,
also when the name of the server leads to a primary again. `notice()` hears of each error of a
statement. If the session was read-only from its start, or has become a standby's, its connection is
discarded; then a task of the pool connects anew, twice a second at most, until a session can write,
and discards all that cannot. The task gives up some time after the last such error: then the pool
has read-only sessions because that is what the server has.

After an error by which a server ends a session (57P01 to 57P03), the free connections are looked
at, with a statement each, before their next use. So they are when a session's server turns out to
have become a primary, or a standby; connections to it are replaced, since the options may ask for
another one now.

A pooler that reaches no server goes on accepting connections, and refuses statements (08P01)
without having sent them anywhere. Then the pool's connections are closed, and a new one is used
only after a statement on it was answered: what fails is an attempt to connect, like any other (see
outages.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import Any, Protocol

from psycopg.errors import ConnectionTimeout
from psycopg.pq import TransactionStatus
from psycopg.pq.abc import PGconn

from .protocols import Lease
from .session_settings import declared

_READ_ONLY = "25006"
_ENDS = ("57P01", "57P02", "57P03")
_REFUSED_BY_POOLER = "08P01"
_OF_INTEREST = {_READ_ONLY, *_ENDS, _REFUSED_BY_POOLER}

#: Seconds between two attempts to get a session that can write.
PROBE_INTERVAL = 0.5
#: Seconds after the last refused write in which such attempts are made.
SUSPICION = 60.0
#: Seconds for which the free read-only connections are kept back, at most, while the first such
#: attempt is made.
KEPT_BACK = 1.0
#: Seconds within which a server must answer, at most, when a free connection is looked at.
LOOK_LIMIT = 2.0

_IDLE = TransactionStatus.IDLE


class Watched(Protocol):
    """Protocol of the part of a pooled connection that is used here."""

    pgconn: PGconn
    began_read_only: bool | None
    """The result of `is_read_only()` when the connection was made."""
    began_on_standby: bool
    """The result of `is_on_standby()` then."""
    changes: ServerChanges | None
    made_at: float

    @property
    def closed(self) -> bool: ...

    def close_now(self) -> None: ...

    def execute(self, query: Any, /, *, prepare: bool) -> Coroutine[Any, Any, Any]: ...


class WatchedPool(Protocol):
    """Protocol of the part of a pool that is used here."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop: ...

    @property
    def closed(self) -> bool: ...

    def start(self, coro: Coroutine[Any, Any, Any], /) -> asyncio.Task[Any]:
        """Start a task of the pool."""

    def call_at_home(self, func: Callable[[], None], /) -> bool: ...

    def connections(self) -> list[Any]:
        """Return all open connections."""

    def withdraw(self, condition: Callable[[Any], bool], /) -> list[Any]:
        """Take the free connections that meet `condition`, so that nobody else can take them."""

    def discard(self, connection: Any, /) -> None:
        """Close a connection that is free, or was withdrawn; others are opened on demand."""

    def expire(self, connection: Any, /) -> None:
        """Have a leased connection replaced when its lease ends."""

    def put_back(self, connection: Any, /) -> None:
        """Give a connection back that was withdrawn; discard it if it was closed meanwhile."""

    def run_owned(self, coro: Coroutine[Any, Any, Any], connection: Any, /) -> None:
        """Start a task of the pool that works on `connection`."""

    def replace_withdrawn(self, connection: Any, /) -> Coroutine[Any, Any, None]:
        """Close a withdrawn connection, and make one attempt to open another in its place."""


def is_read_only(pgconn: PGconn) -> bool | None:
    """Return whether the server has told that the session cannot write; None if it tells nothing.

    PostgreSQL reports these two settings; a pooler between may not.
    """
    told = [pgconn.parameter_status(b"in_hot_standby")]
    told.append(pgconn.parameter_status(b"default_transaction_read_only"))
    return None if told == [None, None] else b"on" in told


def is_on_standby(pgconn: PGconn) -> bool:
    """Return whether the server has last told that it is a standby."""
    return pgconn.parameter_status(b"in_hot_standby") == b"on"


def notice(connection: Any, sqlstate: str | None) -> None:
    """Take in that a statement on the facade `connection` failed. May be called in any thread."""
    if sqlstate not in _OF_INTEREST:
        return
    physical: Watched | None = connection.physical
    if physical is None or (changes := physical.changes) is None:
        return
    if sqlstate == _REFUSED_BY_POOLER:
        changes.call(changes.refused_by_pooler)
    elif sqlstate in _ENDS:
        changes.call(changes.look_at_free)
    elif not _is_read_only_by_its_user(physical, connection.lease):
        changes.call(partial(changes.refused_to_write, physical))


def _is_read_only_by_its_user(physical: Watched, lease: Lease | None) -> bool:
    """Return whether the code that uses the connection has made its transaction READ ONLY."""
    if physical.began_read_only or is_on_standby(physical.pgconn):
        return False
    if physical.pgconn.parameter_status(b"default_transaction_read_only") == b"on":
        return True  # set since the connection was made
    may_have_set = declared.get() is not None or (lease is not None and lease.dirty)
    return may_have_set or physical.pgconn.transaction_status != _IDLE


def _cannot_write(physical: Watched) -> bool:
    """Return whether a write on the connection would fail, whoever uses it."""
    return physical.began_read_only is not False or is_on_standby(physical.pgconn)


class ServerChanges:
    """Replaces the connections of one pool that lead to a server which has changed."""

    def __init__(self, pool: WatchedPool, *, look_limit: float) -> None:
        self.pool = pool
        self._look_limit = look_limit
        #: Whether the options ask for sessions that cannot write.
        self.wants_read_only = False
        #: Whether a pooler has refused a statement, and none has been answered since.
        self.pooler_refuses = False
        self._refused_at = 0.0
        self._began = 0.0
        #: The task that looks for a session that can write; and whether there is one.
        self._probing: asyncio.Task[None] | None = None
        self._over = asyncio.Event()
        self._kept_back: list[Any] = []

    def call(self, func: Callable[[], None]) -> None:
        """Call `func` in the thread of the pool's loop: now if this is it, else soon."""
        if asyncio._get_running_loop() is self.pool.loop:
            func()
        else:
            self.pool.call_at_home(func)

    def refused_to_write(self, physical: Watched) -> None:
        """Discard `physical`, which has refused a write, and all others that would do so, too."""
        if self.wants_read_only or self.pool.closed:
            return
        self._refused_at = now = monotonic()
        if self._probing is not None:
            return
        begins = now - self._began >= PROBE_INTERVAL
        if begins or physical.made_at < self._began:
            self.pool.expire(physical)
        if begins:
            self._began = now
            self._over = asyncio.Event()
            self._kept_back = self.pool.withdraw(_cannot_write)
            self._probing = self.pool.start(self._probe())

    def stop(self) -> None:
        """Cancel the task that looks for a session that can write."""
        if self._probing is not None and not self.pool.loop.is_closed():
            self._probing.cancel()

    def made(self, physical: Watched) -> None:
        """Take in that a connection was made; if it can write, discard those that cannot."""
        if self._probing is not None and not self._over.is_set() and self._shows_primary(physical):
            self._over.set()
            self._discard_read_only()

    async def _probe(self) -> None:
        """Have the pool connect anew, again and again, until a session can write: see `made()`."""
        timer = self.pool.loop.call_later(KEPT_BACK, self._put_back)
        try:
            while not self._over.is_set() and monotonic() - self._refused_at < SUSPICION:
                if not self._kept_back:
                    self._kept_back = self.pool.withdraw(_cannot_write)
                if self._kept_back:
                    await self.pool.replace_withdrawn(self._kept_back.pop())
                else:
                    self._replace_leased()
                self._put_back()
                with suppress(TimeoutError):
                    async with asyncio.timeout(PROBE_INTERVAL):
                        await self._over.wait()
        finally:
            timer.cancel()
            self._put_back()
            self._probing = None

    def _replace_leased(self) -> None:
        """Have one leased connection replaced when its lease ends, because none is free."""
        for physical in self.pool.connections():
            if _cannot_write(physical):
                self.pool.expire(physical)
                return

    def _shows_primary(self, physical: Watched) -> bool:
        """Return whether `physical`, opened since a write was refused, is a session that can write.

        A session of which nothing is known counts as one: it is new, and no better one can be had.
        """
        return (
            physical.made_at >= self._began
            and not physical.began_read_only
            and not is_on_standby(physical.pgconn)
        )

    def _discard_read_only(self) -> None:
        old = [each for each in self.pool.connections() if each.made_at < self._began]
        old += [each for each in self.pool.connections() if each.began_read_only]
        free = [*self._kept_back, *self.pool.withdraw(_cannot_write)]
        self._kept_back = []
        kept = {id(each) for each in free}
        for physical in free:
            if physical.began_read_only is None and physical.made_at >= self._began:
                self.pool.put_back(physical)
            else:
                self.pool.discard(physical)
        for physical in old:
            if id(physical) not in kept and not physical.closed and _cannot_write(physical):
                self.pool.expire(physical)

    def _put_back(self) -> None:
        kept, self._kept_back = self._kept_back, []
        for physical in kept:
            self.pool.put_back(physical)

    def refused_by_pooler(self) -> None:
        """Close all connections, leased ones when their lease ends, and try new ones: see above."""
        self.pooler_refuses = True
        for physical in self.pool.connections():
            self.pool.expire(physical)
        for physical in self.pool.withdraw(lambda _: True):
            self.pool.discard(physical)

    async def try_new(self, physical: Watched) -> None:
        """Have a statement answered on a new connection, if a pooler has refused the last one.

        Raises the error of the statement, and closes the connection then.
        """
        if not self.pooler_refuses:
            return
        try:
            async with asyncio.timeout(self._look_limit):
                await physical.execute("SELECT 1", prepare=False)
        except TimeoutError:
            physical.close_now()
            raise ConnectionTimeout("timeout expired: the pooler reaches no server") from None
        except BaseException:
            physical.close_now()
            raise
        self.pooler_refuses = False

    def look_at_what_was_told(self) -> None:
        """Replace the connections whose server has changed its part; look at the free others.

        Sends nothing on a connection whose server has told nothing of the kind.
        """

        def has_changed(physical: Watched) -> bool:
            return is_on_standby(physical.pgconn) != physical.began_on_standby

        changed = [each for each in self.pool.connections() if has_changed(each)]
        for physical in changed:
            self.pool.expire(physical)
        for physical in self.pool.withdraw(has_changed):
            self.pool.discard(physical)
        if changed:
            self.look_at_free()

    def look_at_free(self) -> None:
        """Send a statement on each free connection, and replace those that do not answer."""
        if self.pool.closed:
            return
        for physical in self.pool.withdraw(lambda _: True):
            self.pool.run_owned(self._look(physical), physical)

    async def _look(self, physical: Watched) -> None:
        try:
            async with asyncio.timeout(self._look_limit):
                await physical.execute("SELECT pg_is_in_recovery()", prepare=False)
            if is_on_standby(physical.pgconn) != physical.began_on_standby:
                physical.close_now()
        except Exception:
            physical.close_now()
        except BaseException:
            physical.close_now()
            raise
        finally:
            self.pool.put_back(physical)
