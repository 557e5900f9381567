"""Tests the holders of a lease (cursors, pins, statements in flight), and their ends."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import closing
from typing import Any

import psycopg
import pytest

from pgbackend.driver import bridge
from pgbackend.driver.bridge import run as green
from pgbackend.driver.connection import Connection
from pgbackend.driver.cursors import adopt, let_go
from pgbackend.driver.errors import LeaseEnded
from pgbackend.driver.lease import Lease
from pgbackend.driver.parking import ParkingLock
from pgbackend.driver.socket_watch import Watch
from tests.conftest import Runner, wait_for
from tests.support.gate import Gate
from tests.support.sweep import Interrupt, Outcome, sweep

from .conftest import Pools, fetch, take_all


@pytest.fixture
def gate(admin: psycopg.Connection[Any]) -> Iterator[Gate]:
    """Make a gate, whose statements wait until the test opens it."""
    with closing(Gate(admin)) as made:
        yield made


def let_threads_end(gate: Gate, main: Callable[[], Coroutine[Any, Any, None]]) -> Any:
    """Run `main()`; open `gate` at its end, also if it fails: the loop waits for its threads."""

    async def run() -> None:
        with closing(gate):
            await main()

    return run()


def as_it_is(adapters: Any) -> None:
    """Prepare no cursor."""


def execute(lease: Lease, sql: str) -> list[Any]:
    """Execute a statement as the ORM does, on `lease`: with no cursor that counts as a holder."""
    _, rows = lease.execute(sql, None, as_it_is)
    assert rows is not None
    return rows


def open_cursor(lease: Lease, kind: str = "client") -> Any:
    if kind == "client":
        cursor = lease.connection.cursor()
    else:
        cursor = lease.connection.cursor("c", withhold=True)
    cursor.execute("SELECT generate_series(1, 5)")
    return cursor


async def turns(count: int = 5) -> None:
    """Let the loop turn a few times."""
    for _ in range(count):
        await asyncio.sleep(0)


async def until(condition: Callable[[], Any]) -> None:
    """Let the loop turn until a thread, or another task, has made `condition` true."""
    while not condition():
        await asyncio.sleep(0.001)


# --- The end of a lease ------------------------------------------------------------------------


@pytest.mark.parametrize("order", [*itertools.permutations(["cursor", "pin", "statement"])])
def test_a_lease_ends_with_the_last_of_its_holders(
    run: Runner, pools: Pools, gate: Gate, order: tuple[str, ...]
) -> None:
    async def main() -> None:
        pool = pools()
        lease = await green(pool.lease)
        cursor = await green(open_cursor, lease)
        lease.pin()
        statement = asyncio.create_task(green(execute, lease, gate.sql))
        await gate.reached()
        for last, holder in enumerate(order, -2):
            assert not lease.ended and pool.statistics().leased == 1
            if holder == "cursor":
                cursor.close()
            elif holder == "pin" and last < 0:
                lease.pins -= 1  # `unpin()` would end the lease of the statement in flight
                lease._maybe_give_back()
            elif holder == "pin":
                lease.unpin()
            else:
                gate.open()
                assert await statement == gate.rows
        assert lease.ended and pool.statistics().leased == 0
        assert await green(take_all, pool) == 3

    run(let_threads_end(gate, main))


# --- Ends in other tasks and threads ----------------------------------------------------------

End = Callable[[list[Any]], Awaitable[None]]


async def closed_by_another_task(left: list[Any]) -> None:
    await asyncio.create_task(green(left.pop().close))


async def closed_on_the_bare_loop(left: list[Any]) -> None:
    left.pop().close()


async def forgotten_by_another_task(left: list[Any]) -> None:
    async def forget() -> None:
        left.pop()

    await asyncio.create_task(forget())


async def collected(left: list[Any]) -> None:
    cycle = [left.pop()]
    cycle.append(cycle)
    del cycle
    gc.collect()


async def collected_in_green_code(left: list[Any]) -> None:
    await green(lambda: bridge.await_(collected(left)))


async def closed_by_a_thread(left: list[Any]) -> None:
    await asyncio.to_thread(left.pop().close)


async def forgotten_by_a_thread(left: list[Any]) -> None:
    await asyncio.to_thread(left.clear)


async def collected_in_a_thread(left: list[Any]) -> None:
    await asyncio.to_thread(lambda: asyncio.run(collected(left)))


async def let_go_of(left: list[Any]) -> None:
    let_go(left[0])


ENDS: list[End] = [
    closed_by_another_task,
    closed_on_the_bare_loop,
    forgotten_by_another_task,
    collected,
    collected_in_green_code,
    closed_by_a_thread,
    forgotten_by_a_thread,
    collected_in_a_thread,
    let_go_of,
]


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        *((end, "client") for end in ENDS),
        # A thread that closes a server-side cursor waits for its turn; no test lets go of one.
        *((end, "server") for end in ENDS if end not in (closed_by_a_thread, let_go_of)),
    ],
)
def test_what_ends_elsewhere_leaves_the_statement_in_flight_alone(
    run: Runner, pools: Pools, gate: Gate, end: End, kind: str
) -> None:
    async def main() -> None:
        pool = pools()
        lease = await green(pool.lease)
        left = [await green(open_cursor, lease, kind)]
        statement = asyncio.create_task(green(execute, lease, gate.sql))
        await gate.reached()
        await end(left)
        await turns()
        assert not lease.ended and pool.statistics().leased == 1
        gate.open()
        assert await statement == gate.rows
        assert lease.ended and pool.statistics().leased == 0
        await until(lambda: pool.statistics().idle)
        assert len(pools.sessions()) == 1 == pool.statistics().connections_made, "it was kept"
        assert await green(fetch, pool, "SELECT count(*) FROM pg_cursors") == [(0,)]

    run(let_threads_end(gate, main))


@pytest.mark.parametrize("end", ENDS)
def test_a_cursor_whose_own_statement_is_in_flight_may_end(
    run: Runner, pools: Pools, gate: Gate, end: End
) -> None:
    """Another task closes the cursor: the statement still ends by itself."""

    async def main() -> None:
        pool = pools()
        lease = await green(pool.lease)
        left = [lease.connection.cursor()]
        statement = asyncio.create_task(green(left[0].execute, gate.sql))
        await gate.reached()
        await end(left)
        await turns()
        assert not lease.ended
        gate.open()
        cursor = await statement
        cursor.close()
        assert lease.ended and pool.statistics().leased == 0
        assert len(pools.sessions()) == 1 == pool.statistics().connections_made

    run(let_threads_end(gate, main))


def test_a_statement_in_a_thread_is_left_alone(run: Runner, pools: Pools, gate: Gate) -> None:
    async def main() -> None:
        pool = pools()
        lease = await green(pool.lease)
        cursor = await green(open_cursor, lease)
        statement = asyncio.create_task(asyncio.to_thread(execute, lease, gate.sql))
        await gate.reached()
        cursor.close()
        await turns()
        assert not lease.ended
        gate.open()
        assert await statement == gate.rows
        await until(lambda: lease.ended)
        assert pool.statistics().leased == 0
        assert len(pools.sessions()) == 1 == pool.statistics().connections_made

    run(let_threads_end(gate, main))


# --- The end of a lease while a statement is in flight ------------------------------------------


def in_a_task(lease: Lease, sql: str) -> asyncio.Task[Any]:
    return asyncio.create_task(green(execute, lease, sql))


def in_a_thread(lease: Lease, sql: str) -> asyncio.Task[Any]:
    return asyncio.create_task(asyncio.to_thread(execute, lease, sql))


@pytest.mark.parametrize("end_in", ["task", "thread"])
@pytest.mark.parametrize("work", [in_a_task, in_a_thread])
def test_the_end_refuses_what_comes_after_the_statement_in_flight(
    run: Runner, pools: Pools, gate: Gate, table: str, work: Any, end_in: str
) -> None:
    async def main() -> None:
        pool = pools()
        lease = await green(pool.lease)
        cursor = await green(open_cursor, lease)
        connection = lease.connection
        statement = work(lease, gate.sql)
        await gate.reached()
        queued = [work(lease, f"INSERT INTO {table} VALUES (1) RETURNING n") for work in WORKS]
        await until(lambda: len(connection.lock._waiters) == len(queued))  # type: ignore[attr-defined]
        if end_in == "task":
            lease.end("the reason")
        else:
            await asyncio.to_thread(lease.end, "the reason")
        refused = [
            connection.cursor,
            lambda: connection.execute("SELECT 1"),
            lambda: cursor.execute("SELECT 1"),
            lambda: execute(lease, "SELECT 1"),
            connection.commit,
        ]
        for statement_after in refused:
            with pytest.raises(LeaseEnded, match="the reason"):
                await green(statement_after)
        assert pool.statistics().leased == 1, "given back with the end of the statement"
        gate.open()
        assert await statement == gate.rows
        for refusal in await asyncio.gather(*queued, return_exceptions=True):
            assert isinstance(refusal, LeaseEnded) and str(refusal) == "the reason"
        await until(lambda: pool.statistics().leased == 0 and pool.statistics().idle)
        assert await green(fetch, pool, f"SELECT count(*) FROM {table}") == [(0,)]
        assert len(pools.sessions()) == 1 == pool.statistics().connections_made

    run(let_threads_end(gate, main))


WORKS = [in_a_task, in_a_thread]


def test_the_statement_in_flight_may_take_several_waits(
    run: Runner, pools: Pools, gate: Gate
) -> None:
    """`executemany()` is one statement to its caller, and holds the lock from first to last."""

    async def main() -> None:
        pool = pools()
        lease = await green(pool.lease)
        cursor = lease.connection.cursor()
        sql = f"{gate.sql} WHERE %s::int IS NOT NULL"
        many = asyncio.create_task(green(cursor.executemany, sql, [(1,), (2,)], returning=True))
        await gate.reached()
        lease.end()
        gate.open()
        await many
        assert [result.fetchall() for result in cursor.results()] == [gate.rows] * 2
        assert pool.statistics().leased == 0
        await until(lambda: pool.statistics().idle)
        assert len(pools.sessions()) == 1 == pool.statistics().connections_made

    run(let_threads_end(gate, main))


def test_the_end_does_not_wait_for_who_does_not_wait(run: Runner, pools: Pools) -> None:
    """An abandoned stream holds the lock, but no code waits for its rows."""

    async def main() -> None:
        pool = pools()
        lease = await green(pool.lease)
        rows = lease.connection.cursor().stream("SELECT generate_series(1, 1000)")
        assert await green(next, rows) == (1,)
        lease.end()
        await until(lambda: pool.statistics().leased == 0)
        with pytest.raises(LeaseEnded):
            await green(list, rows)
        assert await green(take_all, pool) == 3

    run(main())


def test_a_thread_that_is_about_to_send_is_refused(
    run: Runner, pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease ends between the thread's check of the lease and its first byte."""
    about_to_send, ended = threading.Event(), threading.Event()

    def leave(watch: Watch) -> None:
        if threading.current_thread() is not threading.main_thread():
            about_to_send.set()
            assert ended.wait(5)

    async def main() -> None:
        pool = pools(max_size=1)
        lease = await green(pool.lease)
        cursor = await green(open_cursor, lease)
        monkeypatch.setattr(Watch, "leave", leave)
        statement = asyncio.create_task(asyncio.to_thread(execute, lease, "SELECT 1"))
        await until(about_to_send.is_set)
        lease.end()
        ended.set()
        with pytest.raises(LeaseEnded):
            await statement
        await until(lambda: pool.statistics().leased == 0)
        cursor.close()

    run(main())


def test_a_thread_that_has_just_sent_is_waited_for(
    run: Runner, pools: Pools, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The statement begins between the check for statements in flight and the end of the lease."""
    statements: list[Any] = []

    def end_lease(connection: Connection) -> None:
        if not statements:
            thread = threading.Thread(target=lambda: statements.append(rows_of(cursor, gate.sql)))
            statements.append(thread)
            thread.start()
            wait_for(gate.count, "the statement is in flight")
        original(connection)

    def rows_of(cursor: Any, sql: str) -> Any:
        return cursor.execute(sql).fetchall()

    original = Connection.end_lease
    cursor: Any

    async def main() -> None:
        nonlocal cursor
        pool = pools()
        lease = await green(pool.lease)
        cursor = await green(open_cursor, lease)
        monkeypatch.setattr(Connection, "end_lease", end_lease)
        lease.end()
        assert pool.statistics().leased == 1
        gate.open()
        await until(lambda: len(statements) == 2)
        assert statements[1] == gate.rows
        await until(lambda: pool.statistics().leased == 0)
        assert len(pools.sessions()) == 1 == pool.statistics().connections_made
        cursor.close()

    run(let_threads_end(gate, main))


def test_a_connection_is_given_back_once(run: Runner, pools: Pools) -> None:
    """Two threads may find at once that the lease has no holder any more."""

    async def main() -> None:
        pool = pools()
        lease = await green(pool.lease)
        cursor = await green(open_cursor, lease)
        cursor.close()
        lease._give_back()
        pool.release(lease)
        await asyncio.to_thread(pool.release, lease)
        await turns()
        assert pool.statistics().idle == 1
        assert await green(take_all, pool) == 3

    run(main())


def test_the_end_of_a_lease_that_is_forgotten_is_made_up_for(run: Runner, pools: Pools) -> None:
    async def main() -> None:
        pool = pools()
        lease = await green(pool.lease)
        lease.pin()
        del lease
        gc.collect()
        await turns()
        assert pool.statistics().leased == 0
        assert await green(take_all, pool) == 3

    run(main())


# --- The lock ---------------------------------------------------------------------------------


def test_a_lock_tells_when_it_has_become_free() -> None:
    told = []
    lock = ParkingLock()
    lock.on_free = lambda: told.append(lock.locked())
    with lock:
        assert not told
    assert told == [False]
    lock.on_free = None
    with lock:
        pass
    assert told == [False]


def test_a_lock_that_is_handed_on_has_not_become_free(run: Runner) -> None:
    async def main() -> None:
        lock, told = ParkingLock(), list[str]()
        lock.on_free = lambda: told.append("free")

        def take() -> None:
            with lock:
                told.append("taken")

        await green(lock.acquire)
        taking = [asyncio.create_task(green(take)) for _ in range(2)]
        await until(lambda: len(lock._waiters) == 2)
        lock.release()
        await asyncio.gather(*taking)
        assert told == ["taken", "taken", "free"]

    run(main())


def test_who_is_told_may_be_taken_back_by_another_thread() -> None:
    """The loop's thread sets `on_free` to None while another one releases the lock."""

    class Lock(ParkingLock):
        looked = 0

        @property
        def on_free(self) -> Any:  # type: ignore[override]
            self.looked += 1
            return (lambda: None) if self.looked == 1 else None

        @on_free.setter
        def on_free(self, value: Any) -> None:
            pass

    lock = Lock()
    with lock:
        pass
    assert lock.looked == 1 and not lock.locked()


# --- Cursors whose statement has failed ---------------------------------------------------------


def fails_execute(cursor: Any) -> None:
    cursor.execute("SELECT 1/0")


def fails_executemany(cursor: Any) -> None:
    cursor.executemany("SELECT 1/%s", [(1,), (0,)])


def fails_copy(cursor: Any) -> None:
    with cursor.copy("COPY (SELECT 1/0) TO STDOUT") as copy:
        list(copy)


def fails_stream(cursor: Any) -> None:
    list(cursor.stream("SELECT 1/0"))


def fails_before_it_is_sent(cursor: Any) -> None:
    cursor.execute("SELECT %s", ())


FAILURES: list[Callable[[Any], None]] = [
    fails_execute,
    fails_executemany,
    fails_copy,
    fails_stream,
    fails_before_it_is_sent,
]


@pytest.mark.parametrize("fail", FAILURES)
def test_a_cursor_whose_first_statement_has_failed_holds_nothing(
    run: Runner, pools: Pools, fail: Callable[[Any], None]
) -> None:
    async def main() -> None:
        pool = pools()
        lease = await green(pool.lease)
        cursor = lease.connection.cursor()
        with pytest.raises(psycopg.Error) as kept:
            await green(fail, cursor)
        assert lease.ended and pool.statistics().leased == 0
        with pytest.raises(LeaseEnded):
            await green(cursor.execute, "SELECT 1")
        cursor.close()
        assert await green(take_all, pool) == 3
        del kept

    run(main())


@pytest.mark.parametrize("fail", FAILURES)
def test_a_cursor_that_has_had_a_statement_holds_the_session_that_it_left(
    run: Runner, pools: Pools, fail: Callable[[Any], None]
) -> None:
    async def main() -> None:
        pool = pools()
        lease = await green(pool.lease)
        with lease.connection.cursor() as cursor:
            await green(cursor.execute, "SET application_name = 'mine'")
            with pytest.raises(psycopg.Error):
                await green(fail, cursor)
            assert not lease.ended
            await green(cursor.execute, "SHOW application_name")
            assert cursor.fetchone() == ("mine",)
            lease.dirty = True
        assert lease.ended

    run(main())


@pytest.mark.parametrize("fail", FAILURES)
def test_a_cursor_that_failed_goes_on_in_the_lease_that_others_keep(
    run: Runner, pools: Pools, fail: Callable[[Any], None]
) -> None:
    async def main() -> None:
        pool = pools()
        lease = await green(pool.lease)
        with lease.connection.cursor() as other:
            cursor = other.connection.cursor()
            with pytest.raises(psycopg.Error):
                await green(fail, cursor)
            assert not lease.ended
            await green(cursor.execute, "SELECT 1")
            other.close()
            assert not lease.ended, "it is a holder again"
            assert cursor.fetchone() == (1,)
            cursor.close()
            assert lease.ended

    run(main())


@pytest.mark.parametrize("fail", FAILURES)
@pytest.mark.parametrize("kept_by", ["nobody", "another"])
def test_a_cursor_that_failed_gets_another_connection(
    run: Runner, pools: Pools, fail: Callable[[Any], None], kept_by: str
) -> None:
    """The callback `renew` gives the cursor a connection; its format and row factory stay."""

    async def main() -> None:
        pool = pools()
        lease = await green(pool.lease)
        cursor = lease.connection.cursor(binary=True, row_factory=psycopg.rows.dict_row)
        with pytest.raises(psycopg.Error):
            await green(fail, cursor)
        assert lease.ended
        keeper = (await green(pool.lease)) if kept_by == "another" else None
        cursor.renew = lambda it: it.move_to(pool.lease().connection)
        await green(cursor.execute, "SELECT 1 AS n, pg_backend_pid() AS pid")
        row = cursor.fetchone()
        assert row["n"] == 1 and row["pid"] == cursor.connection.pgconn.backend_pid
        assert cursor.format == 1 and cursor.connection is not lease.connection
        assert pool.statistics().leased == 1 + (keeper is not None)
        cursor.close()
        if keeper is not None:
            keeper.end()
        assert pool.statistics().leased == 0

    run(main())


@pytest.mark.parametrize("how", ["the first", "a later"])
def test_a_servers_cursor_whose_statement_has_failed_holds_nothing(
    run: Runner, pools: Pools, how: str
) -> None:
    async def main() -> None:
        pool = pools()
        lease = await green(pool.lease)
        cursor = lease.connection.cursor("c", withhold=False, scrollable=False)
        at = 1 if how == "the first" else 3
        lease.pin()  # for a transaction, which a cursor without hold needs
        lease.connection._autocommit = False
        if at > 1:
            await green(cursor.execute, f"SELECT 1/({at} - n) FROM generate_series(1, 9) AS t (n)")
            assert await green(cursor.fetchone) == (0,)
            with pytest.raises(psycopg.Error):
                await green(cursor.fetchmany, 9)
        else:
            with pytest.raises(psycopg.Error):
                await green(cursor.execute, "SELECT nothing")
        assert not lease.cursors and lease.dirty
        lease.unpin()
        assert lease.ended
        await until(lambda: pool.statistics().idle)
        assert await green(fetch, pool, "SELECT count(*) FROM pg_cursors") == [(0,)]
        with pytest.raises(psycopg.Error):
            await green(cursor.fetchone)
        cursor.close()

    run(main())


@pytest.mark.parametrize("kind", ["client", "server"])
def test_a_cancelled_first_statement_holds_nothing(
    run: Runner, pools: Pools, gate: Gate, kind: str
) -> None:
    async def main() -> None:
        pool = pools()
        lease = await green(pool.lease)
        name = "c" if kind == "server" else ""
        cursor = lease.connection.cursor(name, **({"withhold": True} if name else {}))
        statement = asyncio.create_task(green(cursor.execute, gate.sql))
        await gate.reached()
        statement.cancel()
        with pytest.raises(asyncio.CancelledError):
            await statement
        assert lease.ended and pool.statistics().leased == 0, "the task keeps its traceback"
        cursor.close()

    run(let_threads_end(gate, main))


def test_a_timeout_of_one_statement_leaves_the_other_cursors(
    run: Runner, pools: Pools, gate: Gate
) -> None:
    async def main() -> None:
        pool = pools()
        lease = await green(pool.lease)
        for kind in ("client", "server"):
            with await green(open_cursor, lease, kind) as cursor:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(10) as limit:
                        statement = green(execute, lease, gate.sql)
                        asyncio.get_running_loop().call_soon(reschedule, limit)
                        await statement
                assert not lease.ended
                assert await green(cursor.fetchall) == [(n,) for n in range(1, 6)]
                lease.pins += kind == "client"
        lease.end()

    def reschedule(limit: asyncio.Timeout) -> None:
        if gate.count():
            limit.reschedule(0)
        else:
            asyncio.get_running_loop().call_later(0.001, reschedule, limit)

    run(let_threads_end(gate, main))


class _OfTheUsers(psycopg.ClientCursor[Any]):
    """Derives a class of cursors that the backend has not seen."""


@pytest.mark.filterwarnings("error::ResourceWarning")
def test_a_cursor_that_is_made_as_its_lease_ends_is_refused_and_not_left_open(
    run: Runner, pools: Pools
) -> None:
    """Another thread may end the lease between the two steps in which Django makes a cursor."""

    class OnServer(psycopg.ServerCursor[Any]):
        """Is derived from psycopg's class, as Django's is."""

    async def main() -> None:
        pool = pools()
        lease = await green(pool.lease)
        cursor = OnServer(lease.connection, "c")
        lease.end()
        with pytest.raises(LeaseEnded):
            adopt(cursor)
        assert cursor.closed

    run(main())


@pytest.mark.parametrize("where", ["on the facade", "on the lease"])
@pytest.mark.parametrize("name", ["", "c"])
def test_cursors_of_factories_of_the_users_hold_the_lease(
    run: Runner, pools: Pools, where: str, name: str
) -> None:
    class OnServer(psycopg.ServerCursor[Any]):
        pass

    async def main() -> None:
        pool = pools()
        lease = await green(pool.lease)
        connection: Any = lease.physical.facade if where == "on the facade" else lease.connection
        connection.cursor_factory, connection.server_cursor_factory = _OfTheUsers, OnServer
        cursor = lease.connection.cursor(name, **({"withhold": True} if name else {}))
        assert isinstance(cursor, OnServer if name else _OfTheUsers)
        await green(cursor.execute, "SELECT 1")
        other = await green(open_cursor, lease)
        other.close()
        assert not lease.ended, "the first is open"
        assert await green(cursor.fetchall) == [(1,)]
        await green(cursor.close)
        assert lease.ended

    run(main())


def test_execute_returns_what_the_class_of_the_cursor_returns(
    run_once: Runner, pools: Pools
) -> None:
    class Cursor(psycopg.ClientCursor[Any]):
        def execute(self, *args: Any, **kwargs: Any) -> Any:
            return super().execute(*args, **kwargs), "more"

    def main() -> None:
        pool = pools(connect={"cursor_factory": Cursor})
        with pool.lease().connection.cursor() as cursor:
            assert cursor.execute("SELECT 1") == (cursor, "more")

    run_once.green(main)


# --- COPY without copy() ----------------------------------------------------------------------

COPIES: dict[str, Callable[[Any, str], Any]] = {
    "execute": lambda cursor, sql: cursor.execute(sql),
    "executemany": lambda cursor, sql: cursor.executemany(sql, [(), ()]),
    "stream": lambda cursor, sql: list(cursor.stream(sql)),
    "connection": lambda cursor, sql: cursor.connection.execute(sql),
}


@pytest.mark.parametrize("direction", ["TO STDOUT", "FROM STDIN"])
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("succeeded_before", [False, True])
def test_a_session_is_not_left_in_the_midst_of_a_copy(
    run: Runner, pools: Pools, table: str, how: str, direction: str, succeeded_before: bool
) -> None:
    """No later statement on the connection says "another command is already in progress"."""

    async def main() -> None:
        pool = pools()
        with pinned_by_hand(await green(pool.lease)) as lease:
            cursor = lease.connection.cursor()
            if succeeded_before:
                await green(cursor.execute, "SELECT 1")
            with pytest.raises(psycopg.Error):
                await green(COPIES[how], cursor, f"COPY {table} {direction}")
            if lease.connection.closed:
                with pytest.raises(psycopg.OperationalError, match="the connection is closed"):
                    await green(lease.connection.execute, "SELECT 1")
            else:
                await green(lease.connection.execute, "SELECT 1")
            cursor.close()
        assert pool.statistics().leased == 0
        assert await green(take_all, pool) == 3

    run(main())


class pinned_by_hand:  # noqa: N801
    """Pins a lease for a block of a coroutine."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease

    def __enter__(self) -> Lease:
        self.lease.pin()
        return self.lease

    def __exit__(self, *exc_info: object) -> None:
        self.lease.unpin()


# --- Closing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize("where", ["green", "bare loop", "thread"])
def test_who_closes_a_connection_waits_for_the_statement_in_flight(
    run: Runner, pools: Pools, gate: Gate, work: Any, where: str
) -> None:
    async def main() -> None:
        pool = pools()
        lease = await green(pool.lease)
        lease.pin()
        connection = lease.connection
        statement = work(lease, gate.sql)
        await gate.reached()

        def close() -> None:
            connection.close_in_turn()
            lease.end()

        if where == "bare loop":
            close()  # cannot wait, and does not
            gate.open()
        else:
            call = green if where == "green" else asyncio.to_thread
            closing = asyncio.create_task(call(close))
            await until(lambda: connection.lock._waiters)  # type: ignore[attr-defined]
            gate.open()
            await closing
        for refused in (connection.cursor, connection.commit):
            with pytest.raises(psycopg.OperationalError, match="the connection is closed"):
                await green(refused)
        assert await statement == gate.rows
        await until(lambda: pool.statistics().leased == 0)
        assert await green(take_all, pool) == 3

    run(let_threads_end(gate, main))


# --- A loop that is closed ----------------------------------------------------------------------


def run_without_farewell(main: Coroutine[Any, Any, Any]) -> Any:
    """Run `main` on a loop that is closed without the last steps of `asyncio.run()`."""
    loop = asyncio.SelectorEventLoop()
    result = loop.run_until_complete(main)
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    return result


@pytest.mark.parametrize("kept", ["lease", "connection", "cursor", "error"])
def test_the_connections_in_use_close_with_their_loop(pools: Pools, kept: str) -> None:
    async def main() -> Any:
        pool = pools()
        lease = await green(pool.lease)
        lease.pin()
        cursor = await green(open_cursor, lease)
        with pytest.raises(psycopg.Error) as error:
            await green(fails_execute, cursor)
        return {
            "lease": lease,
            "connection": lease.connection,
            "cursor": cursor,
            "error": error.value.with_traceback(error.tb),
        }[kept]

    thing = run_without_farewell(main())

    async def look() -> None:
        pools.connect["application_name"] = "another"
        await green(take_all, pools())

    asyncio.run(look())
    wait_for(lambda: not pools.sessions(), "the sessions of the closed loop are gone")
    del thing
    gc.collect()


def test_a_thread_that_uses_a_connection_keeps_it_beyond_the_loop(pools: Pools, gate: Gate) -> None:
    rows: list[Any] = []

    async def main() -> threading.Thread:
        lease = await green(pools().lease)
        assert not lease.connection.closed, "a thread's statements are on a facade"
        thread = threading.Thread(target=lambda: rows.extend(execute(lease, gate.sql)))
        thread.start()
        await gate.reached()
        return thread

    thread = run_without_farewell(main())
    asyncio.run(green(lambda: fetch(pools(), "SELECT 1")))
    gate.open()
    thread.join(5)
    assert rows == gate.rows
    gc.collect()
    wait_for(lambda: not pools.sessions(), "the session ended with the thread's statement")


# --- Garbage, collected under the lock ------------------------------------------------------------


class Collects:
    """Makes its dumper collect garbage while it is sent as a parameter, under the lock."""


class CollectingDumper(psycopg.adapt.Dumper):
    def dump(self, obj: object) -> bytes:
        gc.collect()
        return b"1"


@pytest.mark.parametrize("kind", ["client", "server"])
@pytest.mark.parametrize("where", ["green", "thread"])
def test_garbage_may_be_collected_by_who_holds_the_lock(
    run: Runner, pools: Pools, where: str, kind: str
) -> None:
    """The finalisers must not wait for the lock: its holder is their caller."""

    def statement(lease: Lease) -> list[Any]:
        with lease.connection.cursor() as cursor:
            cursor.adapters.register_dumper(Collects, CollectingDumper)
            in_cycle(lease, kind)
            rows: list[Any] = cursor.execute("SELECT %s::int", [Collects()]).fetchall()
            return rows

    async def main() -> None:
        pool = pools()
        lease = await green(pool.lease)
        assert not lease.connection.closed
        call: Any = green if where == "green" else asyncio.to_thread
        async with asyncio.timeout(5):
            assert await call(statement, lease) == [(1,)]
        await until(lambda: pool.statistics().idle)
        assert await green(fetch, pool, "SELECT count(*) FROM pg_cursors") == [(0,)]

    gc.collect()
    gc.disable()
    try:
        run(main())
    finally:
        gc.enable()


def in_cycle(lease: Lease, kind: str) -> None:
    """Leave an iteration of a cursor to the garbage collector, which closes the cursor."""

    def iterate() -> Iterator[Any]:
        with open_cursor(lease, kind) as cursor:
            yield from cursor

    rows = iterate()
    next(rows)
    cycle: list[object] = [rows]
    cycle.append(cycle)


# --- Garbage, collected at every wait -----------------------------------------------------------


def collect(at: int) -> Interrupt:
    """Collect garbage as the task begins its wait number `at`."""

    def interrupt(number: int, waits_for: Any, task: asyncio.Task[Any]) -> None:
        if number == at:
            gc.collect()

    return interrupt


def collect_late(at: int) -> Interrupt:
    """Collect garbage after the awaited future is done, in the same turn of the loop."""

    def interrupt(number: int, waits_for: Any, task: asyncio.Task[Any]) -> None:
        if number == at and waits_for is not None:
            waits_for.add_done_callback(lambda _: gc.collect())

    return interrupt


def collect_in_a_thread(at: int) -> Interrupt:
    """Collect garbage in another thread as the task begins its wait number `at`."""

    def interrupt(number: int, waits_for: Any, task: asyncio.Task[Any]) -> None:
        if number == at:
            thread = threading.Thread(target=gc.collect)
            thread.start()
            thread.join()

    return interrupt


def do_execute(lease: Lease) -> None:
    assert execute(lease, "SELECT 1, pg_sleep(0.001)") == [(1, "")]


def do_cursor(lease: Lease) -> None:
    with lease.connection.cursor() as cursor:
        cursor.execute("SELECT 1, pg_sleep(0.001)")
        assert cursor.fetchone() == (1, "")


def do_many(lease: Lease) -> None:
    with lease.connection.cursor() as cursor:
        cursor.executemany("SELECT %s::int", [(n,) for n in range(3)], returning=True)
        assert [result.fetchone() for result in cursor.results()] == [(0,), (1,), (2,)]


def do_stream(lease: Lease) -> None:
    with lease.connection.cursor() as cursor:
        assert len(list(cursor.stream("SELECT repeat('x', 9999) FROM generate_series(1, 9)"))) == 9


def do_copy(lease: Lease) -> None:
    with lease.connection.cursor() as cursor:
        with cursor.copy(
            "COPY (SELECT repeat('x', 9999) FROM generate_series(1, 9)) TO STDOUT"
        ) as it:
            assert sum(1 for _ in it) == 9


def do_server(lease: Lease) -> None:
    with lease.connection.cursor("d", withhold=True) as cursor:
        cursor.itersize = 2
        cursor.execute("SELECT generate_series(1, 5)")
        assert len(list(cursor)) == 5


def do_transaction(lease: Lease) -> None:
    lease.pin()
    with lease.connection.transaction(), lease.connection.cursor() as cursor:
        cursor.execute("SELECT 1")
    lease.unpin()


def do_fail(lease: Lease) -> None:
    cursor = lease.connection.cursor()
    with pytest.raises(psycopg.Error):
        cursor.execute("SELECT 1/0")
    cursor.renew = lambda it: it.move_to(lease.pool.lease().connection)
    assert cursor.execute("SELECT 1").fetchone() == (1,)
    cursor.close()


@pytest.mark.sweep(one_in=8)
@pytest.mark.parametrize("mode", [collect, collect_late, collect_in_a_thread])
@pytest.mark.parametrize("kind", ["client", "server"])
@pytest.mark.parametrize(
    "work",
    [do_execute, do_cursor, do_many, do_stream, do_copy, do_server, do_transaction, do_fail],
)
def test_garbage_may_be_collected_at_any_wait(
    run: Runner, pools: Pools, work: Callable[[Lease], None], kind: str, mode: Any
) -> None:
    """A cursor is left in a cycle, on the connection of the statement."""

    def operation() -> None:
        lease = pools().lease()
        cycle = [open_cursor(lease, kind)]
        cycle.append(cycle)
        del cycle
        work(lease)

    async def check(outcome: Outcome) -> None:
        gc.collect()
        await until(lambda: not pools().statistics().leased)
        assert await green(fetch, pools(), "SELECT count(*) FROM pg_cursors") == [(0,)]
        assert pools().statistics().connections_made == 1

    async def main() -> None:
        await green(fetch, pools(max_size=1), "SELECT 1")
        assert await sweep(lambda: green(operation), mode, check) > 1

    gc.collect()
    gc.disable()
    try:
        run(main())
    finally:
        gc.enable()
