"""Pools: they lend connections, take them back, and tidy up between two leases.

There is one pool for each process, event loop and name (`loops.py`). Its connections are kept by
`psycopg_pool.AsyncConnectionPool`, which opens and replaces them, expires them, and queues the
tasks that wait. `Pool` adds what psycopg_pool cannot promise by itself:

- a lease ends without an await, so that no cancellation can come between a task and the return of
  its connection (`Pool.release`);
- a connection that the server has closed is noticed before a statement is sent, without a ping;
- a task that waits for a connection is told at once why none can be made (`attempts.py`), or that
  none can come free because all holders wait for each other (`deadlock.py`);
- changes that one lease makes to the server session do not reach the next (`Pool._restore`);
- the pool ends with its event loop, and does not cross a fork (`Pool.close`, `Pool.disown`).
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import threading
import weakref
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import Any, Literal, TypeAlias

import psycopg
from psycopg.abc import Params
from psycopg.pq import PipelineStatus, TransactionStatus

from . import bridge, client_checks, connecting, deadlock, errors, events, naming, session_locks
from .asking import ConnectArguments
from .connection import Connection
from .coroutines import name_of, resume
from .finalizers import check_not_collecting
from .holding import HoldBounds, Holding
from .homes import AtHome
from .lease import Adapting, Lease
from .no_pool import NoPool
from .pooled import AsyncConnection
from .psycopg_pool_adapter import (
    PsycopgPool,
    PsycopgPoolClosed,
    PsycopgPoolFull,
    PsycopgPoolTimeout,
)
from .pulse import Pulse
from .recovery import CLEANUP_BUDGET
from .statement_cursors import Result
from .statistics import PoolStatistics
from .tallies import async_tallies

logger = logging.getLogger("pgbackend.driver")

_IDLE = TransactionStatus.IDLE
_UNKNOWN = TransactionStatus.UNKNOWN

SessionReset: TypeAlias = Literal["always", "dirty", "never"]


@dataclass(frozen=True, slots=True)
class PoolOptions:
    """The options that a pool is made with."""

    connect: Mapping[str, Any]
    """Arguments of `AsyncConnection.connect()` that are the same for all connections."""
    pool: Mapping[str, Any]
    """Arguments of `psycopg_pool.AsyncConnectionPool`, by its own names."""
    initialise: Callable[[Connection], None]
    """Sets up a new connection, green; called again after each reset."""
    ask: Callable[[], Coroutine[Any, Any, Mapping[str, Any]]] | None = None
    """Returns the other arguments of `AsyncConnection.connect()`; asked for each connection."""
    raised_as_is: tuple[type[Exception], ...] = ()
    """Errors of `ask` that tasks get as they are; others become an `OptionFailed`."""
    session_reset: SessionReset = "dirty"
    """After which leases the server session is reset: see `Pool._restore`."""
    hold: HoldBounds = field(default_factory=HoldBounds)
    """How long a lease may be held without a statement: see holding.py."""
    outage_grace: float = 0.0
    """How old an outage may be, in seconds, to be waited out: see outages.py."""
    keeps_none: bool = False
    """Whether each lease opens a connection, which is closed afterwards: see no_pool.py."""
    soiled_unless_vouched: bool = False
    """Whether statements that nobody vouches for make their lease dirty (vouching.py)."""

    def __repr__(self) -> str:
        return f"<PoolOptions {dict(self.pool)!r}>"  # `connect` holds the password


class Pool(AtHome):
    """A pool of connections for one name (an alias) on one event loop.

    Only `release()` and `call_at_home()` may be called from other threads.
    """

    def __init__(
        self,
        name: str,
        options: PoolOptions,
        loop: asyncio.AbstractEventLoop,
        siblings: Mapping[Any, Pool],
    ) -> None:
        self.name = name
        self.options = options
        self.loop = loop
        #: All pools of the loop, by key; pools that are made later are added to this mapping.
        self._siblings = siblings
        self.thread = threading.get_ident()
        self.closed = False
        self._resets_all = options.session_reset == "always"
        self.soiled_unless_vouched = options.soiled_unless_vouched
        self._resets_dirty = options.session_reset != "never"
        #: The leases that have not ended, by their `id()`. The references are weak: a lease that
        #: nobody refers to any more must be collected, which gives its connection back.
        self.leases: dict[int, weakref.ref[Lease]] = {}
        #: The pool's own tasks, and the connection that each resets or puts back.
        self.tasks: dict[asyncio.Task[Any], AsyncConnection] = {}
        kept = NoPool if options.keeps_none else PsycopgPool
        self._psycopg = kept(
            self,
            outage_grace=options.outage_grace,
            kwargs=self._connect_arguments,
            **{"name": name, **options.pool},
        )
        self.tally = async_tallies.begin(name, self, self._psycopg.counters)
        self._opened: asyncio.Future[None] | None = None
        self._holding = Holding(self, options.hold, self._setting)
        self.pulse = Pulse(
            options.hold.interval(self._psycopg.timeout),
            self._holding.look,
            may_sleep=self._psycopg.is_at_rest,
        )

    async def _connect_arguments(self) -> ConnectArguments:
        """Return the arguments of `connect()`, with a limit on the time that it may take."""
        arguments = ConnectArguments(self.options.connect)
        if self.options.ask is not None:
            arguments["asked"] = asked = ConnectArguments(await self._ask(self.options.ask))
            arguments.update(asked)
        self._psycopg.changes.wants_read_only = connecting.wants_read_only(arguments)
        return connecting.arguments(arguments, self._psycopg.timeout)

    async def _ask(
        self, ask: Callable[[], Coroutine[Any, Any, Mapping[str, Any]]]
    ) -> Mapping[str, Any]:
        """Return what `ask()` returns; raise `OptionFailed` if it takes too long."""
        limit = self._limit()
        try:
            async with asyncio.timeout(limit) as timer:
                return await ask()
        except TimeoutError as exc:
            if not timer.expired():
                raise
            raise errors.OptionFailed(
                f"the functions that give options of {self.name!r} did not return within {limit:g} "
                f"s: look why they are slow, or raise 'timeout' in {self._setting()}"
            ) from exc.__cause__

    def _limit(self) -> float:
        """Return how long one step of making a connection may take, in seconds."""
        return max(2.0, self._psycopg.timeout)

    def __repr__(self) -> str:
        s = self.statistics()
        return (
            f"<Pool {self.name!r}: {s.leased} leased, {s.idle} idle, {s.waiting} waiting, "
            f"{'no limit' if s.max_size is None else f'max_size {s.max_size}'}>"
        )

    # --- Lease ---

    def lease(self) -> Lease:
        """Lease a connection; if none is free, wait for one.

        Raises `NotGreen` if none is free and the caller, not being green, cannot wait. Raises
        `PoolTimeout`, `PoolDeadlock`, `PoolQueueFull`, `PoolClosed`, or the error of the last
        attempt to connect.
        """
        check_not_collecting()
        started = monotonic()
        physical = self._psycopg.take_free(started) or self._wait(started)
        if physical is not None and not physical.is_alive():
            self._psycopg.replace(physical)
            physical = None
        if physical is None:
            physical = bridge.await_(self._get(started))
        lease = Lease(self, physical)
        if events.listeners:
            waited = lease.since - started
            self.tally.waited.add(waited)
            if events.hooks:
                events.emit(events.Leased(self.name, physical.pid(), waited))
        return lease

    def execute(self, query: str, params: Params | None, adapting: Adapting) -> Result:
        """Lease a connection for one statement, execute the statement, and fetch all its rows.

        The arguments are those of `Lease.execute()`. Raises the errors of that and of `lease()`.
        """
        lease = self.lease()
        try:
            return lease.execute(query, params, adapting)
        finally:
            lease.end()

    def _wait(self, started: float) -> AsyncConnection | None:
        """Wait for a free connection by parking; return None if the caller must await `_get()`."""
        portal = bridge.current()
        if portal is None or self.closed:
            return None
        self._psycopg.check_failure()
        try:
            return self._psycopg.wait_free(portal, self._psycopg.timeout, started)
        except PsycopgPoolTimeout:
            raise self._timed_out(monotonic() - started) from self._psycopg.attempts.failure
        except PsycopgPoolClosed:
            raise self._closed_error() from None

    async def _get(self, started: float) -> AsyncConnection:
        """Return a live connection from `getconn()`."""
        if self.closed:
            raise self._closed_error()
        self.pulse.start(self.loop)
        while not self._psycopg.is_open:  # a loop: the task that opens it may be cancelled
            await self._open()
        while True:
            self._psycopg.check_failure()
            self._psycopg.make_room()
            deadline = started + self._psycopg.timeout + self.pulse.extra_time(started)
            try:
                physical = await self._psycopg.getconn(timeout=deadline - monotonic())
            except PsycopgPoolTimeout:
                raise self._timed_out(monotonic() - started) from self._psycopg.attempts.failure
            except PsycopgPoolFull as exc:
                raise errors.PoolQueueFull(
                    f"{exc}: raise 'max_waiting' or 'max_size' in {self._setting()}"
                ) from None
            except PsycopgPoolClosed:
                raise self._closed_error() from None
            if physical.is_alive():
                return physical
            self._psycopg.replace(physical)

    async def _open(self) -> None:
        """Open psycopg_pool's pool, whose workers inherit nothing from the running task."""
        if self._opened is None:
            self._opened = self.loop.create_future()
            try:
                await self.start(self._psycopg.open())
            except BaseException:
                self._opened.set_result(None)
                self._opened = None
                raise
            self._opened.set_result(None)
        else:
            await asyncio.shield(self._opened)

    # --- Errors ---

    def _setting(self) -> str:
        return f"DATABASES[{self.name!r}]['OPTIONS']['pool']"

    def _closed_error(self) -> errors.PoolClosed:
        return errors.PoolClosed(
            f"the pool {self.name!r} is closed: its event loop ends, or close_pool() was called. "
            "Await the tasks that use the database before that; a task started later gets a new one"
        )

    def _timed_out(self, waited: float) -> errors.PoolTimeout:
        self.tally.timeouts += 1
        s = self.statistics()
        blocked = self.pulse.told(monotonic() - waited)
        where = self._setting()
        cure = f"Raise 'max_size' or 'timeout' in {where}, or hold connections for less time"
        if connecting := self._psycopg.describe_connecting():
            cure = f"No connection could be opened: {connecting}. Look whether its server answers"
            self._psycopg.outages.refused()
        return errors.PoolTimeout(
            f"couldn't get a connection of {self.name!r} after {waited:.2f} s: {s.leased}"
            f"{s.of_most()} in use, {s.waiting} waiting; held by {self._holding.text()}{blocked}. "
            f"{cure}"
        )

    # --- Holders ---

    def held(self) -> list[Lease]:
        """Return the leases that have not ended."""
        return [lease for ref in list(self.leases.values()) if (lease := ref()) is not None]

    def next_lives(self) -> bool | None:
        """Return whether the free connection that is leased next lives; None if none is free.

        Call it on the pool's loop.
        """
        return self._psycopg.next_lives()

    def is_full(self) -> bool:
        """Return whether no more connections may be opened."""
        return self._psycopg.is_full()

    def queued(self) -> list[asyncio.Task[Any]]:
        """Return the tasks that wait for a connection of this pool."""
        return self._psycopg.waiting_tasks()

    def connecting(self) -> list[str]:
        """Return what is known of failed attempts to connect, and of those under way."""
        failure = self._psycopg.attempts.failure
        return [] if failure is None else [f"the last attempt failed: {failure}"]

    def outage(self) -> Exception | None:
        """Return why the last attempt to connect failed, if it failed just now, in an outage."""
        adapted = self._psycopg
        return None if adapted.outages.since is None else adapted.attempts.recent_failure()

    def outage_age(self) -> float:
        """Return the seconds since the pool's outage began; 0 if there is none."""
        return self._psycopg.outages.age()

    def holders(self) -> list[asyncio.Task[Any] | None]:
        """Return the tasks whose leases fill the pool, with None for a lease that has no task.

        Another task gets a connection only when one of these leases ends. If the pool may still
        open a connection, the list is `[None]`. For `deadlock.find()`, a None in the list rules a
        deadlock out.
        """
        held = self.held()
        return [lease.task for lease in held] if len(held) >= self._psycopg.max_size else [None]

    def check_deadlock(self, task: asyncio.Task[Any]) -> None:
        """Raise `PoolDeadlock` if `task`, which is about to queue here, would wait for ever.

        It would if each task that holds a connection of the pool waits for another such task, or
        for `task`, be it in the queue of this pool or of another one.
        """
        if self._newest_waits_for_server():  # the usual case, and no deadlock
            return
        circle = deadlock.find(task, self.holders(), self._queued)
        if circle is None:
            return
        now = monotonic()
        holders = ", ".join(
            f"{naming.task_and_request(lease.task)} "
            f"(one of {pool.name!r} for {now - lease.since:.2f} s)"
            for pool in self._siblings.values()
            for lease in pool.held()
            if lease.task is not None and lease.task in circle
        )
        raise errors.PoolDeadlock(
            f"task {name_of(task)!r} would wait for ever for a connection of {self.name!r}: "
            f"all {self._psycopg.max_size} are held by tasks that wait for each other: {holders}. "
            f"Raise 'max_size' in {self._setting()}, or need no second connection while one is "
            "held: let the inner code take part in the transaction instead of being detached, or "
            "run it before or after the atomic block; use several databases in the same order "
            "everywhere"
        )

    def _newest_waits_for_server(self) -> bool:
        """Return whether the task with the newest lease waits for a reply of the server.

        If so, this lease will end, so there is no deadlock. The whole search would cost more.
        """
        for ref in reversed(self.leases.values()):
            lease = ref()
            return lease is not None and deadlock.waits_for(lease.task, lease.physical.watch.future)
        return False

    def _queued(self, task: asyncio.Task[Any]) -> list[asyncio.Task[Any] | None] | None:
        """Return `holders()` of the pool in whose queue `task` waits; None if it is in no queue."""
        for pool in self._siblings.values():
            if pool._psycopg.is_waiting(task):  # noqa: SLF001 - another pool's
                return pool.holders()
        return None

    # --- Release: decide, then act; nothing is awaited by the task that held the lease ---

    def release(self, lease: Lease) -> None:
        """Take back the connection of `lease`, which has ended. May be called from any thread."""
        if threading.get_ident() == self.thread and not self.loop.is_closed():
            self._release(lease)
        elif not self.call_at_home(partial(self._release, lease)):
            self.leases.pop(id(lease), None)
            lease.physical.pgconn.finish()

    def _release(self, lease: Lease) -> None:
        """Put the connection of `lease` back; if need be, start a task that restores it first."""
        if self.leases.pop(id(lease), None) is None:
            return  # two threads have ended the lease at once
        physical = lease.physical
        pgconn = physical.pgconn
        status = pgconn.transaction_status
        if events.listeners:
            held = monotonic() - lease.since
            self.tally.used.add(held)
            if events.hooks:
                events.emit(events.Released(self.name, physical.pid(), held, status == _UNKNOWN))
        if status == _IDLE and not (self._is_restored(lease) if lease.dirty else self._resets_all):
            if not self._psycopg.put_free(physical):
                self.put(physical)
        elif status == _UNKNOWN:
            self.put(physical)
        elif self.closed:  # the loop may end before a reset would
            physical.close_now()
            self.put(physical)
        else:
            resets = self._resets_dirty if lease.dirty else self._resets_all
            self.run_owned(self._restore(physical, resets, lease.locked_by), physical)

    def _is_restored(self, lease: Lease) -> bool:
        """Return whether the session of `lease`, which is dirty, is reset or looked at."""
        return self._resets_dirty or lease.locked_by is not None

    def put(self, physical: AsyncConnection) -> None:
        """Give the connection back to psycopg_pool, without waiting.

        If psycopg_pool's lock is held at the moment, a task of the pool waits for it.
        """
        put = self._psycopg.putconn(physical)
        try:
            waits_for = put.send(None)
        except StopIteration:
            return
        self.run_owned(resume(put, waits_for), physical)

    def start(self, coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Start a task that inherits nothing from the running code: no context variable, no portal.

        The tasks that the new task starts inherit nothing from that code, either.
        """
        return asyncio.Task(coro, loop=self.loop, context=contextvars.Context())

    def run_owned(self, coro: Coroutine[Any, Any, Any], physical: AsyncConnection) -> None:
        """Start a task, by `start()`, that runs `coro`, which works on `physical`."""
        task = self.start(coro)
        self.tasks[task] = physical
        task.add_done_callback(self._owned_done)

    def _owned_done(self, task: asyncio.Task[Any]) -> None:
        """Forget a task of the pool that is done; close its connection if it was cancelled."""
        physical = self.tasks.pop(task)
        if task.cancelled() and not physical.closed:
            # At its end, asyncio.run() has cancelled the task before its first step.
            physical.close_now()
            self.put(physical)

    async def _restore(self, physical: AsyncConnection, reset: bool, locked_by: str | None) -> None:
        """Roll back, reset the server session if `reset`, and put the connection back.

        ``DISCARD ALL`` undoes SET, SET ROLE, LISTEN, temporary tables, advisory locks, cursors and
        prepared statements; then the connection is set up like a new one. On failure it is closed.
        """
        try:
            async with asyncio.timeout(CLEANUP_BUDGET):
                if physical.pgconn.pipeline_status != PipelineStatus.OFF:
                    raise psycopg.InterfaceError("the connection was left in pipeline mode")
                if physical.pgconn.transaction_status == TransactionStatus.ACTIVE:
                    await physical.cancel_safe(timeout=CLEANUP_BUDGET)  # else the server goes on
                    raise psycopg.InterfaceError("the connection was left in the midst of a reply")
                await physical.rollback()
                if locked_by is not None:
                    await session_locks.warn_if_held(physical, self.name, locked_by)
                if reset:
                    await client_checks.discard_all(physical)
                    physical.facade.forget_handlers()
                    await self.configure(physical)
        except Exception as exc:
            logger.info("closing a connection of %r that could not be reset: %s", self.name, exc)
            physical.close_now()
        except BaseException:
            physical.close_now()
            raise
        finally:
            self.put(physical)

    async def configure(self, physical: AsyncConnection) -> None:
        """Set up a connection, new or reset; close it if that fails, or takes too long."""
        limit = self._limit()
        settings = physical.facade.session_settings
        settings.database = None  # what is set up is outside of all blocks that declare settings
        settings.forget()
        try:
            async with asyncio.timeout(limit):
                if settings.per_transaction:
                    physical.is_checked_on = False
                elif physical.is_checked_on is None:
                    await client_checks.begin(physical)
                await bridge.run(self.options.initialise, physical.facade)
        except TimeoutError:
            physical.close_now()
            raise psycopg.errors.ConnectionTimeout(
                f"the server did not answer within {limit:g} s while a new connection was set up: "
                f"look why it is slow, or raise 'timeout' in {self._setting()}"
            ) from None
        except BaseException:
            physical.close_now()
            raise
        settings.database = self.name

    def renew(self) -> None:
        """Replace all connections: an adapter was registered since, or the user wants it so.

        A connection that is leased now is replaced when the lease ends.
        """
        self._psycopg.renew()

    # --- End ---

    def close(self) -> None:
        """Close the pool: unused connections at once, every other one when it is given back.

        A connection is in use if it is leased, if a task of the pool is putting it back, or if the
        user's `check` runs on it. A connection that a worker of psycopg_pool is making is not in
        use: the worker is cancelled. If the loop is closed already, a leased connection is in use
        only while a thread waits for it. Tasks that wait for a connection get `PoolClosed`.
        """
        if self.closed:
            return
        self.closed = True
        self.pulse.stop()
        self._psycopg.abandon()
        gone = self.loop.is_closed()
        in_use = {id(each.physical) for each in self.held() if not gone or each.is_in_thread()}
        in_use.update(id(each) for task, each in self.tasks.items() if not task.done())
        in_use.update(map(id, self._psycopg.checking))
        for physical in list(self._psycopg.made):
            if id(physical) not in in_use:
                physical.close_now()
        for task, physical in list(self.tasks.items()):
            coro: Any = task.get_coro()
            if inspect.getcoroutinestate(coro) == inspect.CORO_CREATED:
                physical.close_now()  # cancelled before its first step, the task would not do it
            task.cancel()
        if not self.loop.is_closed():
            self._psycopg.fail_waiting_soon(self._closed_error())

    def disown(self) -> None:
        """Send nothing more on any connection: after a fork, the connections are the parent's."""
        self.closed = True
        for lease in self.held():
            lease.disown()
        for physical in list(self._psycopg.made):
            physical.disown()

    def statistics(self) -> PoolStatistics:
        """Return the counts of the pool: see `PoolStatistics`."""
        stats = self._psycopg.get_stats()
        return PoolStatistics(
            alias=self.name,
            min_size=self._psycopg.min_size,
            max_size=None if self.options.keeps_none else self._psycopg.max_size,
            size=stats["pool_size"],
            leased=len(self.leases),
            idle=stats["pool_available"],
            waiting=self._psycopg.waiting(),
            requests=stats.get("requests_num", 0),
            requests_queued=stats.get("requests_queued", 0),
            requests_wait_ms=stats.get("requests_wait_ms", 0),
            requests_errors=stats.get("requests_errors", 0),
            connections_made=stats.get("connections_num", 0),
            connections_errors=stats.get("connections_errors", 0),
            connections_lost=stats.get("connections_lost", 0),
        )
