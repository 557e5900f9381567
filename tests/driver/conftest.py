"""Provides fixtures of the driver's tests: pools with names of their own, a link that can fail."""

from __future__ import annotations

import itertools
import select
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from pgbackend.driver import events
from pgbackend.driver.cancellation import deliver_cancellation
from pgbackend.driver.lease import Lease
from pgbackend.driver.loops import get_pool
from pgbackend.driver.pool import Pool, PoolOptions
from tests.conftest import wait_for
from tests.support.link import Link

_numbers = itertools.count(1)


class Pools:
    """Makes the pool of a test on the running loop, and watches its sessions from outside."""

    def __init__(self, conninfo: str, admin: psycopg.Connection[Any]) -> None:
        self.name = f"pool {next(_numbers)}"
        self.conninfo = conninfo
        self.admin = admin
        self.connect: dict[str, Any] = {}

    def __call__(
        self,
        *,
        connect: dict[str, Any] | None = None,
        initialise: Callable[[Any], None] = lambda connection: None,
        session_reset: Any = "dirty",
        **pool: Any,
    ) -> Pool:
        """Return the running loop's pool, made with these options at first use."""
        server = {**conninfo_to_dict(self.conninfo), "application_name": self.name}
        options = PoolOptions(
            connect={**server, "prepare_threshold": None, **self.connect, **(connect or {})},
            pool={
                "min_size": 0,
                "max_size": 3,
                "timeout": 5.0,
                "max_idle": 60.0,
                "reconnect_timeout": 0.0,
                **pool,
            },
            initialise=initialise,
            session_reset=session_reset,
        )
        return get_pool((self.name,), self.name, lambda: options)

    def sessions(self, condition: str = "true") -> list[int]:
        """Return the server's process ids of this test's sessions."""
        rows = self.admin.execute(
            "SELECT pid FROM pg_stat_activity WHERE application_name = %s "
            "AND backend_type = 'client backend' AND " + condition.replace("%", "%%"),
            [self.name],
        )
        return [pid for (pid,) in rows]

    def terminate_sessions(self) -> int:
        """End all sessions of this test, and wait until they are gone."""
        pids = self.sessions()
        for pid in pids:
            self.admin.execute("SELECT pg_terminate_backend(%s)", [pid])
        wait_for(lambda: not set(pids) & set(self.sessions()), "sessions terminated")
        return len(pids)


@pytest.fixture
def pools(conninfo: str, admin: psycopg.Connection[Any]) -> Iterator[Pools]:
    """Make pools for this test, whose sessions must be gone when the test ends."""
    given = Pools(conninfo, admin)
    yield given
    wait_for(lambda: not given.sessions(), "the pool's sessions are gone")


def hung_up(fileno: int) -> bool:
    """Return whether the peer has closed the socket, even if data is left to read."""
    poll = select.poll()
    poll.register(fileno, getattr(select, "POLLRDHUP", select.POLLHUP))
    return bool(poll.poll(0))


def fetch(pool: Pool, sql: str, params: Any = None) -> list[Any]:
    """Send one statement on a lease of its own, green."""
    with pool.lease().connection.cursor() as cursor:
        cursor.execute(sql, params)
        return cursor.fetchall() if cursor.description else []


@contextmanager
def pinned(pool: Pool) -> Iterator[Lease]:
    """Hold one lease for a block."""
    lease = pool.lease()
    lease.pin()
    try:
        yield lease
    finally:
        lease.unpin()


@contextmanager
def atomic(pool: Pool) -> Iterator[Any]:
    """Open a transaction on a lease, and end it as the backend does."""
    with pinned(pool) as lease:
        connection = lease.connection
        connection._autocommit = False
        try:
            yield connection
        except BaseException:
            if not connection.closed:
                connection.rollback()
            raise
        connection.commit()
    deliver_cancellation()


def take_all(pool: Pool) -> int:
    """Take every connection that the pool may open, at once; return how many there were."""
    leases = [pool.lease() for _ in range(pool.statistics().max_size)]
    try:
        for number, lease in enumerate(leases):
            with lease.connection.cursor() as cursor:
                lease.pin()
                assert cursor.execute("SELECT %s::int", [number]).fetchone() == (number,)
        return len(leases)
    finally:
        for lease in leases:
            lease.end()


@pytest.fixture
def table(admin: psycopg.Connection[Any]) -> Iterator[str]:
    """Make a table with a column ``n``; yield its name."""
    name = f"things_{next(_numbers)}"
    admin.execute(f"CREATE TABLE {name} (n int PRIMARY KEY)")
    yield name
    admin.execute("SET lock_timeout = '5s'")
    admin.execute(f"DROP TABLE {name}")


@pytest.fixture
def heard() -> Iterator[list[events.Event]]:
    """Record the events that the pools report to their hooks."""
    seen: list[events.Event] = []
    hear = seen.append
    events.add_hook(hear)
    yield seen
    events.remove_hook(hear)


@pytest.fixture
def link(conninfo: str) -> Iterator[Link]:
    """Relay connections to the server by a link that the test can cut and freeze."""
    opened = Link(conninfo)
    yield opened
    opened.close()


@pytest.fixture
def pools_by_link(pools: Pools, link: Link) -> Pools:
    """Make pools whose connections go through `link`."""
    pools.connect = {"host": "localhost", "port": link.port, "gssencmode": "disable"}
    pools.connect["sslmode"] = "disable"
    return pools
