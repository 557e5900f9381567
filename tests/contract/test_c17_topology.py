"""Tests C17: the pool goes on when the server behind it changes, restarts or falls silent."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any

import psycopg
import pytest
from asgiref.sync import sync_to_async
from django.db import DatabaseError, OperationalError, connection, connections, transaction
from django.utils.connection import ConnectionDoesNotExist
from psycopg.conninfo import conninfo_to_dict

import pgbackend
from pgbackend import aio, options
from pgbackend.driver import connecting, loops, outages, refusals
from pgbackend.driver.errors import PoolTimeout
from tests.conftest import Runner
from tests.library.models import Tag
from tests.support.fixtures import by_link, pool_of_default, settings_of_default
from tests.support.link import Link


@pytest.fixture
def link(conninfo: str) -> Iterator[Link]:
    opened = Link(conninfo)
    yield opened
    opened.close()


async def until(condition: Callable[[], object]) -> None:
    """Wait until a condition holds; the runner fails a test that waits for too long."""
    while not condition():
        await asyncio.sleep(0.001)


def pid() -> int:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        return int(cursor.fetchone()[0])


def pool_statistics() -> pgbackend.PoolStatistics:
    (statistics,) = pgbackend.statistics()
    return statistics


def pid_unasked() -> int:
    """Return the session that the transaction has, without a statement that makes it dirty."""
    connection.ensure_connection()
    return int(connection.connection.info.backend_pid)


async def sessions(number: int) -> list[int]:
    """Fill the pool with `number` connections; return the sessions, without making one dirty."""
    barrier = asyncio.Barrier(number)

    async def one() -> int:
        async with transaction.atomic():
            found = await aio.run(pid_unasked)
            await barrier.wait()
        return int(found)

    return sorted(await asyncio.gather(*(one() for _ in range(number))))


# --- A standby in the primary's place -----------------------------------------------------------


@pytest.fixture
def stand_in(admin: psycopg.Connection[Any]) -> Iterator[Callable[[bool], None]]:
    """Return a function that makes new sessions read-only, as on a standby, or writable again."""
    name = connections.settings["default"]["NAME"]

    def set_read_only(on: bool) -> None:
        change = "SET default_transaction_read_only = on" if on else "RESET ALL"
        admin.execute(f'ALTER DATABASE "{name}" {change}')

    yield set_read_only
    set_read_only(False)


async def outcome_of_a_write() -> str:
    try:
        await Tag.objects.acreate(name="tag")
    except DatabaseError as exc:
        return str(exc)
    return "written"


def test_sessions_that_cannot_write_are_replaced_when_the_server_can_be_written_to(
    run: Runner, stand_in: Callable[[bool], None]
) -> None:
    async def main() -> None:
        stand_in(True)
        on_standby = await sessions(4)
        with pytest.raises(DatabaseError, match="read-only transaction"):
            await Tag.objects.acreate(name="refused")
        stand_in(False)
        await until(lambda: pool_statistics().connections_made > 5)  # one was made meanwhile
        ready = monotonic()
        while await outcome_of_a_write() != "written":
            await asyncio.sleep(0.01)
        assert monotonic() - ready < 1
        names = [f"tag {number}" for number in range(40)]
        await asyncio.gather(*(Tag.objects.acreate(name=name) for name in names))
        assert not set(on_standby) & set(await sessions(4))

    run(main())


def test_they_are_replaced_also_while_no_connection_is_ever_free(
    run: Runner, stand_in: Callable[[bool], None]
) -> None:
    async def main() -> None:
        stand_in(True)
        await sessions(2)
        written = asyncio.Event()

        async def write_on() -> None:
            while await outcome_of_a_write() != "written":
                await asyncio.sleep(0)
            written.set()

        async def read_on() -> None:
            while not written.is_set():
                await Tag.objects.acount()

        async with asyncio.TaskGroup() as group:
            for _ in range(10):
                group.create_task(read_on())
            group.create_task(write_on())
            await until(lambda: pool_statistics().connections_made > 3)
            stand_in(False)
            async with asyncio.timeout(1):
                await written.wait()

    with pool_of_default(max_size=2):
        run(main())


def test_reads_go_on_while_sessions_cannot_write(
    run: Runner, stand_in: Callable[[bool], None]
) -> None:
    async def main() -> None:
        stand_in(True)
        await sessions(4)
        for _ in range(3):
            with pytest.raises(DatabaseError, match="read-only transaction"):
                await Tag.objects.acreate(name="refused")
            assert await asyncio.gather(*(Tag.objects.acount() for _ in range(12))) == [0] * 12
        assert pool_statistics().connections_made < 8, "not one for each refused write"

    run(main())


def _by_statement() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SET TRANSACTION READ ONLY")


def _by_the_session() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SET default_transaction_read_only = on")


@pytest.mark.parametrize("make_read_only", [_by_statement, _by_the_session])
def test_a_transaction_that_its_user_made_read_only_costs_no_connection(
    run: Runner, make_read_only: Callable[[], None]
) -> None:
    async def refused() -> None:
        with pytest.raises(DatabaseError, match="read-only transaction"):
            if make_read_only is _by_statement:
                async with transaction.atomic():
                    await aio.run(make_read_only)
                    await Tag.objects.acreate(name="refused")
            else:
                async with pgbackend.pinned():
                    await aio.run(make_read_only)
                    await Tag.objects.acreate(name="refused")

    async def main() -> None:
        before = await sessions(2)
        await refused()
        await until(lambda: pool_statistics().idle == 2)
        assert await sessions(2) == before
        await Tag.objects.acreate(name="written")

    with pool_of_default(max_size=2):
        run(main())


def test_where_the_options_ask_for_read_only_sessions_a_refused_write_costs_none(
    run: Runner,
) -> None:
    async def main() -> None:
        before = await sessions(2)
        with pytest.raises(DatabaseError, match="read-only transaction"):
            await Tag.objects.acreate(name="refused")
        assert await sessions(2) == before

    given = connections.settings["default"]["OPTIONS"]
    with settings_of_default(OPTIONS={**given, "options": "-c default_transaction_read_only=on"}):
        run(main())


def test_the_end_of_one_session_has_the_free_ones_looked_at(
    run: Runner, admin: psycopg.Connection[Any]
) -> None:
    async def main() -> None:
        before = await sessions(3)

        async def ended() -> None:
            with pytest.raises(OperationalError, match="terminating connection"):
                async with transaction.atomic():
                    victim = await aio.run(pid)
                    admin.execute("SELECT pg_terminate_backend(%s, 1000)", [victim])
                    await Tag.objects.acount()

        await ended()
        count = "SELECT count(*) FROM pg_stat_activity WHERE pid = ANY(%s)"
        looked_at = f"{count} AND query = 'SELECT pg_is_in_recovery()'"
        await until(lambda: admin.execute(looked_at, [before]).fetchone() == (2,))
        await until(lambda: pool_statistics().idle >= 2)
        await sessions(2)  # which may have the one that was opened for the victim
        assert admin.execute(count, [before]).fetchone() == (2,), "the free ones are kept"

    run(main())


def test_connections_whose_server_has_become_a_primary_are_replaced(run: Runner) -> None:
    """The server tells so with the reply to a statement; here it seems to have been a standby."""

    async def main() -> None:
        before = await sessions(3)
        (pool,) = [pool for each in loops._by_loop.values() for pool in each.pools.values()]
        for physical in pool._psycopg.made:
            physical.began_on_standby = True
        pool._psycopg._look_at = 0.0
        assert await Tag.objects.acount() == 0
        assert not set(before) & set(await sessions(3))

    run(main())


# --- Draining -----------------------------------------------------------------------------------


def test_drain_replaces_all_connections_and_interrupts_nobody(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(connections.settings, "another alias", connections.settings["default"])

    async def main() -> None:
        before = await sessions(3)
        async with transaction.atomic():
            mine = await aio.run(pid)
            await sync_to_async(pgbackend.drain, thread_sensitive=False)()
            assert await aio.run(pid) == mine, "a transaction goes on"
            await until(lambda: pool_statistics().size == 1)
            assert await asyncio.create_task(Tag.objects.acount()) == 0
        await until(lambda: pool_statistics().leased == 0)
        assert not set(before) & set(await sessions(3))
        pgbackend.drain("another alias")
        assert (again := await sessions(3)) == await sessions(3)
        pgbackend.drain("default")
        assert not set(again) & set(await sessions(3))

    with pool_of_default(max_size=3):  # with another one, any three of four would be leased
        run(main())


def test_a_drained_pool_keeps_its_smallest_size(run: Runner) -> None:
    async def main() -> None:
        before = await sessions(2)
        pgbackend.drain()
        await until(lambda: pool_statistics().idle == 2)
        assert not set(before) & set(await sessions(2))

    with pool_of_default(min_size=2, max_size=2):
        run(main())


def test_drain_of_an_unknown_alias_is_an_error() -> None:
    with pytest.raises(ConnectionDoesNotExist, match="'no such alias'"):
        pgbackend.drain("no such alias")


def test_drain_reaches_djangos_synchronous_pool() -> None:
    def backend_pid() -> int:
        try:
            return pid()
        finally:
            connection.close()

    with pool_of_default(min_size=1, max_size=1):
        connection.close()
        connection.close_pool()  # of other options
        try:
            before = backend_pid()
            assert backend_pid() == before
            pgbackend.drain()
            assert backend_pid() != before
        finally:
            connection.close_pool()


# --- Outages ------------------------------------------------------------------------------------


def test_a_short_outage_fails_no_request(run: Runner, link: Link) -> None:
    async def main() -> None:
        await sessions(3)
        link.cut()
        before = link.attempts
        requests = [asyncio.create_task(Tag.objects.acount()) for _ in range(20)]
        await until(lambda: link.attempts > before)
        await until(lambda: pool_statistics().waiting == 20)
        link.restore()
        assert await asyncio.gather(*requests) == [0] * 20

    with by_link(link):
        run(main())


class GermanServer(Link):
    """Refuses sessions as a server does that speaks German, until `sqlstate` is None."""

    sqlstate: bytes | None = b"57P03"

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.sqlstate is None:
            await super()._accept(reader, writer)
            return
        self.attempts += 1
        _, code = struct.unpack("!ii", await reader.readexactly(8))
        if code == 80877103:  # TLS is asked for
            writer.write(b"N")
            await reader.readexactly(8)
        text = (
            b"SFATAL\0VFATAL\0C" + self.sqlstate + b"\0MDas Datenbanksystem wird hochgefahren.\0\0"
        )
        writer.write(b"E" + struct.pack("!i", len(text) + 4) + text)
        writer.close()


@pytest.fixture
def german_server(conninfo: str) -> Iterator[GermanServer]:
    opened = GermanServer(conninfo)
    yield opened
    opened.close()


@pytest.mark.slow
def test_a_server_that_starts_is_waited_for_in_any_language(
    run: Runner, german_server: GermanServer
) -> None:
    async def main() -> None:
        requests = [asyncio.create_task(Tag.objects.acount()) for _ in range(3)]
        await until(lambda: german_server.attempts >= 3 or requests[0].done())
        german_server.sqlstate = None
        assert await asyncio.gather(*requests) == [0, 0, 0]

    with by_link(german_server):
        run(main())


def test_a_refusal_that_a_wait_cannot_cure_is_told_at_once_in_any_language(
    run: Runner, german_server: GermanServer
) -> None:
    async def main() -> None:
        with pytest.raises(OperationalError, match="Das Datenbanksystem"):
            await Tag.objects.acount()
        assert german_server.attempts == 2, "one by libpq, and one that asks for the SQLSTATE"

    german_server.sqlstate = b"28P01"
    with by_link(german_server):
        run(main())


def test_a_server_that_serves_or_is_gone_is_told_apart(conninfo: str, run_once: Runner) -> None:
    params = conninfo_to_dict(conninfo)
    assert not run_once(refusals.is_refusing(params))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert run_once(refusals.is_refusing({**params, "host": "127.0.0.1", "port": str(port)}))
    assert run_once(refusals.is_refusing({**params, "host": "/nowhere"}))
    assert not run_once(refusals.is_refusing({}))


def test_a_long_outage_is_told_at_once_until_it_ends(run: Runner, link: Link) -> None:
    async def fails() -> float:
        began = monotonic()
        with pytest.raises(OperationalError, match="connection to server at"):
            await Tag.objects.acount()
        return monotonic() - began

    async def main() -> None:
        link.cut()
        assert min(await asyncio.gather(*(fails() for _ in range(5)))) > 0.4
        attempts = link.attempts
        waited = [await fails() for _ in range(10)]
        assert link.attempts <= attempts + 1 and min(waited) < 0.1
        link.restore()
        await until(lambda: not outage_lasts())
        assert await asyncio.gather(*(Tag.objects.acount() for _ in range(20))) == [0] * 20

    def outage_lasts() -> bool:
        task = asyncio.ensure_future(Tag.objects.acount())
        tried.append(task)
        return not any(each.done() and each.exception() is None for each in tried)

    tried: list[asyncio.Task[int]] = []
    with by_link(link), pool_of_default(outage_grace=0.4):
        run(main())


def test_the_default_grace_is_five_seconds_and_zero_tells_at_once(run: Runner, link: Link) -> None:
    async def main() -> None:
        link.cut()
        began = monotonic()
        with pytest.raises(OperationalError, match="connection to server at"):
            await Tag.objects.acount()
        assert monotonic() - began < 0.4

    assert options.POOL_DEFAULTS["outage_grace"] == 5.0
    with by_link(link), pool_of_default(outage_grace=0):
        run(main())


_CURABLE = [
    'connection to server at "127.0.0.1", port 1 failed: Connection refused\n\tIs the server ...',
    'connection to server at "::1", port 5432 failed: FATAL:  the database system is starting up',
    'connection to server at "h", port 5432 failed: FATAL:  the database system is shutting down',
    "FATAL:  the database system is not yet accepting connections",
    'connection to server at "10.0.0.1", port 5432 failed: session is read-only',
    'connection to server at "10.0.0.1", port 5432 failed: server is in hot standby mode',
    "failed: No such file or directory\n\tIs the server running locally and accepting ...",
    "connection failed: FATAL:  sorry, too many clients already",
    "connection to server failed: server closed the connection unexpectedly",
]
_INCURABLE = [
    'connection failed: FATAL:  password authentication failed for user "u"',
    'connection failed: FATAL:  database "d" does not exist',
    'connection failed: FATAL:  no pg_hba.conf entry for host "10.0.0.1", user "u", database "d"',
    "connection failed: SSL error: certificate verify failed",
    "failed to resolve host 'nowhere': [Errno -2] Name or service not known",
    "- host: 'a': Connection refused\n- host: 'b': FATAL:  password authentication failed",
]


@pytest.mark.parametrize("text", [*_CURABLE, *_INCURABLE])
def test_what_a_wait_can_cure_is_waited_out_and_nothing_else(text: str) -> None:
    assert outages.is_curable(psycopg.OperationalError(text)) == (text in _CURABLE)


def test_an_outage_that_begins_with_the_end_of_the_last_connection_is_waited_out() -> None:
    record = outages.Outages("default", 5.0)
    record.attempt_failed(psycopg.OperationalError("server: Connection refused"), serves=True)
    assert record.may_be_waited_out(), "the connection that was open then may be closed by now"
    record.attempt_failed(psycopg.OperationalError("certificate"), serves=False)
    assert not record.may_be_waited_out()


def test_an_outage_is_three_kinds_of_lines_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 1000.0
    monkeypatch.setattr(outages, "monotonic", lambda: now)
    record = outages.Outages("default", 5.0)
    for _ in range(300):  # for 150 s, twice a second
        record.attempt_failed(psycopg.OperationalError("server:\nConnection refused"), serves=False)
        record.refused(2)
        now += 0.5
    record.connected()
    record.connected()
    lines = [(entry.levelno, entry.getMessage()) for entry in caplog.records]
    assert {level for level, _ in lines} == {logging.WARNING}
    first, *minutes, last = [text for _, text in lines]
    assert "server: Connection refused" in first and "up to 5 s" in first
    assert len(minutes) == 2
    assert "121 attempts and 240 requests" in minutes[0]
    assert "120 attempts and 240 requests" in minutes[1]
    assert "again after 150.0 s: 59 attempts and 120 requests" in last


@pytest.mark.slow
def test_the_log_of_a_real_outage_has_two_lines(
    run: Runner, link: Link, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        await sessions(3)
        link.cut()
        before = link.attempts
        requests = [asyncio.create_task(Tag.objects.acount()) for _ in range(20)]
        await until(lambda: link.attempts >= before + 3)
        link.restore()
        await asyncio.gather(*requests)

    with by_link(link), caplog.at_level(logging.WARNING):
        run(main())
    begins, ends = [entry.getMessage() for entry in caplog.records]
    assert "cannot open a connection" in begins and "opens connections again" in ends


# --- Silent links -------------------------------------------------------------------------------


def options_of_socket() -> dict[str, int]:
    connection.ensure_connection()
    with socket.socket(fileno=socket.dup(connection.connection.fileno())) as copy:
        return {
            "keepalives": copy.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
            "keepalives_idle": copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
            "keepalives_interval": copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
            "keepalives_count": copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
            "tcp_user_timeout": copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
        }


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"keepalives_idle": 7, "tcp_user_timeout": 9000},
        {"keepalives": 0, "tcp_user_timeout": 0},
    ],
)
def test_a_silent_link_is_given_up_by_default_after_25_s_or_as_the_options_say(
    run: Runner, link: Link, given: dict[str, int]
) -> None:
    async def main() -> None:
        async with transaction.atomic():
            seen = await aio.run(options_of_socket)
        expected = {"keepalives": 1, **connecting.KEEPALIVES, **given}
        if not expected["keepalives"]:
            expected = given
        assert {name: seen[name] for name in expected} == expected

    idle, interval, count = [*connecting.KEEPALIVES.values()][:3]
    assert idle + interval * count == 25
    with by_link(link, **given):
        run(main())


def test_a_check_of_a_silent_connection_ends_within_the_timeout_of_the_pool(
    run: Runner, link: Link
) -> None:
    async def main() -> None:
        await sessions(4)
        await until(lambda: pool_statistics().idle == 4)
        link.freeze(new=False)
        began = monotonic()
        assert await asyncio.gather(*(Tag.objects.acount() for _ in range(8))) == [0] * 8
        assert monotonic() - began < 3

    with by_link(link), pool_of_default(timeout=2), settings_of_default(CONN_HEALTH_CHECKS=True):
        run(main())


@contextlib.contextmanager
def _deaf_host() -> Iterator[int]:
    """Listen, and never answer."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.mark.slow
def test_there_is_time_for_each_host_of_a_list(run: Runner, link: Link) -> None:
    hosts = {"host": "a,b,c"}
    for timeout, given, limit in [
        (10.0, {}, 9),
        (10.0, hosts, 3),
        (30.0, hosts, 9),
        (3.0, hosts, 2),
        (10.0, {**hosts, "connect_timeout": 7}, 7),
    ]:
        assert connecting.arguments(given, timeout)["connect_timeout"] == limit

    async def main() -> None:
        assert await Tag.objects.acount() == 0

    with _deaf_host() as deaf, by_link(link), pool_of_default(timeout=5):
        with settings_of_default(HOST="127.0.0.1,127.0.0.1", PORT=f"{deaf},{link.port}"):
            run(main())


def test_the_error_names_the_host_that_is_being_tried(run: Runner) -> None:
    async def main() -> None:
        with pytest.raises(OperationalError) as caught:
            await Tag.objects.acount()
        assert isinstance(caught.value.__cause__, PoolTimeout)
        assert f"host 127.0.0.1, hostaddr 127.0.0.1, port {deaf} has been tried" in str(
            caught.value
        )
        assert "max_size" not in str(caught.value)

    with _deaf_host() as deaf, pool_of_default(timeout=0.5):
        with settings_of_default(HOST="127.0.0.1", PORT=str(deaf)):
            run(main())


@pytest.mark.slow
def test_attempts_are_two_a_second_at_most_while_a_connection_lives(
    run: Runner, link: Link
) -> None:
    async def main() -> None:
        async with transaction.atomic():
            await Tag.objects.acount()
            link.down = True  # for new connections only
            attempts: list[float] = []
            before, began = link.attempts, monotonic()
            waiting = [asyncio.create_task(detached_count()) for _ in range(8)]
            while monotonic() - began < 2.2:
                await asyncio.sleep(0.005)
                attempts += [monotonic()] * (link.attempts - before - len(attempts))
            link.restore()
        assert await asyncio.gather(*waiting) == [0] * 8
        in_each = [sum(t <= other < t + 0.95 for other in attempts) for t in attempts]
        assert max(in_each) <= 2 and len(attempts) >= 3, attempts

    async def detached_count() -> int:
        return await pgbackend.detached(Tag.objects.acount())

    with by_link(link):
        run(main())


def test_a_thread_that_meets_a_read_only_session_has_it_replaced_too(
    run: Runner, stand_in: Callable[[bool], None]
) -> None:
    async def main() -> None:
        stand_in(True)
        before = await sessions(2)
        stand_in(False)
        with pytest.raises(DatabaseError, match="read-only transaction"):
            async with transaction.atomic():
                await sync_to_async(Tag.objects.create)(name="refused")
        await until(lambda: pool_statistics().connections_made > 2)
        assert not set(before) & set(await sessions(2))

    with pool_of_default(max_size=2):
        run(main())
