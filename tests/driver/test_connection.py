"""Tests connections: all that psycopg does blocks in sync code, and yields in green code."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import psycopg
import pytest
from psycopg import errors as e
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import dict_row
from psycopg.waiting import Wait

from pgbackend.driver import AsyncConnection, Connection, bridge, connect, versions
from pgbackend.driver.bridge import await_
from pgbackend.driver.bridge import run as green
from pgbackend.driver.socket_watch import Watch
from tests.conftest import LOOPS, Runner, wait_for
from tests.support.link import Link

from .conftest import Pools, fetch, hung_up, pinned

Within = Callable[[Callable[[Any], Any]], Any]

CONTEXTS = ["sync", *(f"green on {loop}" for loop in sorted(LOOPS)), "leased"]


@pytest.fixture(params=CONTEXTS)
def within(request: pytest.FixtureRequest, conninfo: str, pools: Pools) -> Within:
    """Call a function with a connection: blocking, green, and green with a pool's."""

    def own(body: Callable[[Any], Any]) -> Any:
        with connect(conninfo, autocommit=True) as connection:
            return body(connection)

    def leased(body: Callable[[Any], Any]) -> Any:
        with pinned(pools()) as lease:
            lease.dirty = True
            return body(lease.connection)

    if request.param == "sync":
        return own
    if request.param == "leased":
        return Runner(None).green.__get__(Runner(None)) and _green(None, leased)
    return _green(LOOPS[request.param.removeprefix("green on ")], own)


def _green(loop_factory: Any, start: Callable[[Any], Any]) -> Within:
    return lambda body: Runner(loop_factory).green(start, body)


# --- Cursors --------------------------------------------------------------------------------------


def test_statements_and_results(within: Within) -> None:
    def body(connection: Connection) -> None:
        with connection.cursor() as cursor:
            assert cursor.execute("SELECT n, n * %s AS double FROM generate_series(1, 5) n", [2])
            assert cursor.rowcount == 5
            assert [column.name for column in cursor.description or ()] == ["n", "double"]
            assert cursor.fetchone() == (1, 2)
            assert cursor.fetchmany(2) == [(2, 4), (3, 6)]
            assert cursor.fetchall() == [(4, 8), (5, 10)]
            assert cursor.fetchone() is None
            cursor.execute("SELECT 1 WHERE false")
            assert cursor.fetchall() == [] and cursor.rowcount == 0
            assert list(cursor.execute("SELECT %(a)s::int", {"a": 7})) == [(7,)]
        assert cursor.closed
        with pytest.raises(psycopg.InterfaceError, match="the cursor is closed"):
            cursor.execute("SELECT 1")

    within(body)


def test_several_results_of_one_statement(within: Within) -> None:
    def body(connection: Connection) -> None:
        cursor = connection.cursor()
        cursor.execute("SELECT 1; SELECT 2")
        assert cursor.fetchall() == [(1,)]
        assert cursor.nextset()
        assert cursor.fetchall() == [(2,)]
        assert not cursor.nextset()
        cursor.close()

    within(body)


def test_executemany(within: Within) -> None:
    def body(connection: Connection) -> None:
        connection.execute("CREATE TEMPORARY TABLE t (n int)").close()
        with connection.cursor() as cursor:
            cursor.executemany("INSERT INTO t VALUES (%s)", [(n,) for n in range(500)])
            assert cursor.rowcount == 500
            cursor.executemany(
                "INSERT INTO t VALUES (%s) RETURNING n", [(1,), (2,)], returning=True
            )
            assert cursor.fetchall() == [(1,)]
            assert cursor.nextset() and cursor.fetchall() == [(2,)]
            assert cursor.execute("SELECT count(*) FROM t").fetchone() == (502,)

    within(body)


def test_errors_have_their_sqlstate_and_diagnostics(within: Within) -> None:
    def body(connection: Connection) -> None:
        with connection.cursor() as cursor:
            with pytest.raises(e.UniqueViolation) as caught:
                cursor.execute(
                    "CREATE TEMPORARY TABLE u (n int PRIMARY KEY);INSERT INTO u VALUES (1), (1)"
                )
            assert caught.value.sqlstate == "23505"
            assert caught.value.diag.constraint_name == "u_pkey"
            assert isinstance(caught.value, psycopg.IntegrityError)
            with pytest.raises(e.SyntaxError, match='syntax error at or near "SELEC"'):
                cursor.execute("SELEC 1")
            assert cursor.execute("SELECT 1").fetchone() == (1,)

    within(body)


def test_a_session_that_the_server_ends_raises_and_is_closed(
    within: Within, admin: psycopg.Connection[Any]
) -> None:
    def body(connection: Connection) -> None:
        pid = connection.info.backend_pid
        admin.execute("SELECT pg_terminate_backend(%s)", [pid])
        query = "SELECT 1 FROM pg_stat_activity WHERE pid = %s"
        wait_for(lambda: not admin.execute(query, [pid]).fetchone(), "session gone")
        with pytest.raises(psycopg.OperationalError, match="terminating connection"):
            connection.execute("SELECT 1")
        assert connection.closed and connection.broken

    within(body)


@pytest.mark.parametrize("cls", [psycopg.Cursor, psycopg.ClientCursor, psycopg.RawCursor])
def test_cursor_classes_bind_in_their_own_way(within: Within, cls: Any) -> None:
    def body(connection: Connection) -> None:
        with cls(connection) as cursor:
            mark = "$1" if cls is psycopg.RawCursor else "%s"
            cursor.execute(f"SELECT {mark}::text || 'x'", ["it's"])
            assert cursor.fetchone() == ("it'sx",)
        with cls(connection, row_factory=dict_row) as cursor:
            assert cursor.execute("SELECT 1 AS one").fetchone() == {"one": 1}
        if cls is psycopg.ClientCursor:
            assert cls(connection).mogrify("SELECT %s", ["it's"]) == "SELECT 'it''s'"

    within(body)


def test_composed_sql_and_row_factories(within: Within) -> None:
    def body(connection: Connection) -> None:
        query = sql.SQL("SELECT {} AS {}").format(sql.Literal("x"), sql.Identifier('a "b"'))
        connection.row_factory = dict_row  # type: ignore[assignment]
        with connection.cursor() as cursor:
            assert cursor.execute(query).fetchall() == [{'a "b"': "x"}]

    within(body)


def test_binary_results_and_prepared_statements(within: Within) -> None:
    def body(connection: Connection) -> None:
        connection.prepare_threshold = 5
        with connection.cursor(binary=True) as cursor:
            for _ in range(3):
                cursor.execute("SELECT %s::int8, %b::text", [2**40, "é"], prepare=True)
                assert cursor.fetchone() == (2**40, "é")
            cursor.execute("SELECT count(*) FROM pg_prepared_statements")
            assert cursor.fetchone() == (1,)

    within(body)


# --- Server-side cursors, COPY, pipelines, notifications ------------------------------------------


def test_server_side_cursors(within: Within) -> None:
    def body(connection: Connection) -> None:
        with connection.transaction(), connection.cursor("named", scrollable=True) as cursor:
            cursor.itersize = 10
            cursor.execute("SELECT generate_series(1, %s)", [95])
            assert cursor.fetchone() == (1,)
            assert cursor.fetchmany(3) == [(2,), (3,), (4,)]
            assert [n for (n,) in cursor] == list(range(5, 96))
            cursor.scroll(0, mode="absolute")
            assert len(cursor.fetchall()) == 95
        with connection.cursor() as cursor:
            assert cursor.execute("SELECT count(*) FROM pg_cursors").fetchone() == (0,)

    within(body)


def test_a_server_side_cursor_with_hold(within: Within) -> None:
    def body(connection: Connection) -> None:
        with connection.cursor("held", withhold=True, scrollable=True) as cursor:
            cursor.execute("SELECT generate_series(1, 3)")
            assert list(cursor) == [(1,), (2,), (3,)]

    within(body)


def test_copy_in_and_out(within: Within) -> None:
    def body(connection: Connection) -> None:
        with connection.cursor() as cursor:
            cursor.execute("CREATE TEMPORARY TABLE c (n int, t text)")
            with cursor.copy("COPY c FROM STDIN") as copy:
                for n in range(1000):
                    copy.write_row((n, "x" * 10))
            with cursor.copy("COPY c TO STDOUT") as copy:
                assert sum(1 for _ in copy.rows()) == 1000
            with cursor.copy("COPY c TO STDOUT (FORMAT BINARY)") as copy:
                assert bytes(copy.read()).startswith(b"PGCOPY")
                while copy.read():
                    pass

    within(body)


def test_a_copy_that_fails_in_its_block_is_undone(within: Within) -> None:
    def body(connection: Connection) -> None:
        with connection.cursor() as cursor:
            cursor.execute("CREATE TEMPORARY TABLE c (n int)")
            with pytest.raises(ZeroDivisionError), cursor.copy("COPY c FROM STDIN") as copy:
                copy.write_row((1,))
                raise ZeroDivisionError
            with pytest.raises(e.InvalidTextRepresentation):
                with cursor.copy("COPY c FROM STDIN") as copy:
                    copy.write("x\n")
            assert cursor.execute("SELECT count(*) FROM c").fetchone() == (0,)

    within(body)


def test_pipelines(within: Within) -> None:
    def body(connection: Connection) -> None:
        with connection.pipeline() as pipeline, connection.cursor() as cursor:
            cursors = [connection.execute("SELECT %s::int", [n]) for n in range(20)]
            pipeline.sync()
            assert [c.fetchone() for c in cursors] == [(n,) for n in range(20)]
            cursor.execute("SELECT 1/0")
            with pytest.raises(e.DivisionByZero):
                pipeline.sync()
            for c in cursors:
                c.close()
        with connection.cursor() as cursor:
            assert cursor.execute("SELECT 1").fetchone() == (1,)

    within(body)


def test_transaction_blocks_and_savepoints(within: Within) -> None:
    def body(connection: Connection) -> None:
        connection.execute("CREATE TEMPORARY TABLE t (n int)").close()
        with connection.transaction():
            connection.execute("INSERT INTO t VALUES (1)").close()
            with pytest.raises(ZeroDivisionError), connection.transaction("inner"):
                connection.execute("INSERT INTO t VALUES (2)").close()
                raise ZeroDivisionError
            with connection.transaction(force_rollback=True):
                connection.execute("INSERT INTO t VALUES (3)").close()
        with pytest.raises(ZeroDivisionError), connection.transaction():
            connection.execute("INSERT INTO t VALUES (4)").close()
            raise ZeroDivisionError
        with connection.cursor() as cursor:
            assert cursor.execute("SELECT n FROM t").fetchall() == [(1,)]

    within(body)


def test_commit_and_rollback(within: Within) -> None:
    def body(connection: Connection) -> None:
        connection.execute("CREATE TEMPORARY TABLE t (n int)").close()
        connection.autocommit = False
        connection.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
        with connection.cursor() as cursor:
            cursor.execute("SHOW transaction_isolation")
            assert cursor.fetchone() == ("serializable",)
            cursor.execute("INSERT INTO t VALUES (1)")
            connection.rollback()
            cursor.execute("INSERT INTO t VALUES (2)")
            connection.commit()
            assert cursor.execute("SELECT n FROM t").fetchall() == [(2,)]
        connection.rollback()
        connection.autocommit = True

    within(body)


def test_notifications_come_once_and_the_wait_for_them_times_out(within: Within) -> None:
    def body(connection: Connection) -> None:
        with connection.cursor() as cursor:
            cursor.execute("LISTEN channel")
            for n in range(3):
                cursor.execute("SELECT pg_notify('channel', %s)", [str(n)])
            notified = [notify.payload for notify in connection.notifies(timeout=0)]
            assert notified == ["0", "1", "2"]
            started = monotonic()
            assert list(connection.notifies(timeout=0.05)) == []
            assert 0.04 < monotonic() - started < 2
            cursor.execute("UNLISTEN *")

    within(body)


def test_a_notification_of_another_session_ends_the_wait(within: Within, conninfo: str) -> None:
    def notify() -> None:
        with psycopg.connect(conninfo, autocommit=True) as other:
            other.execute("NOTIFY channel, 'from afar'")

    def body(connection: Connection) -> None:
        with connection.cursor() as cursor:
            cursor.execute("LISTEN channel")
            thread = threading.Timer(0.02, notify)
            thread.start()
            got = [n.payload for n in connection.notifies(timeout=10, stop_after=1)]
            thread.join()
            assert got == ["from afar"]
            assert list(connection.notifies(timeout=0)) == []

    within(body)


def test_notice_handlers_are_called(within: Within) -> None:
    def body(connection: Connection) -> None:
        notices: list[str | None] = []
        connection.add_notice_handler(lambda diag: notices.append(diag.message_primary))
        with connection.cursor() as cursor:
            cursor.execute("DO $$ BEGIN RAISE NOTICE 'hear'; END $$")
        assert notices == ["hear"]

    within(body)


def test_a_statement_can_be_cancelled_from_elsewhere(within: Within) -> None:
    def body(connection: Connection) -> None:
        timer = threading.Timer(0.05, connection.cancel)
        timer.start()
        with connection.cursor() as cursor, pytest.raises(e.QueryCanceled):
            cursor.execute("SELECT pg_sleep(20)")
        timer.join()

    within(body)


def test_large_statements_and_results(within: Within) -> None:
    """The statement and the result are larger than the buffer of the socket."""

    def body(connection: Connection) -> None:
        text = "x" * 8_000_000
        with connection.cursor() as cursor:
            assert cursor.execute("SELECT length(%s)", [text]).fetchone() == (len(text),)
            assert cursor.execute("SELECT repeat('y', 8000000)").fetchone() == ("y" * 8_000_000,)
            cursor.execute("SELECT generate_series(1, 100000)")
            assert sum(n for (n,) in cursor) == 100_000 * 100_001 // 2

    within(body)


def test_two_phase_commit_is_refused_by_the_server_not_lost(within: Within) -> None:
    """``max_prepared_transactions`` is 0 by default: the error must reach the caller."""

    def body(connection: Connection) -> None:
        connection.autocommit = False
        connection.tpc_begin(connection.xid(1, "gtrid", "bqual"))
        connection.execute("SELECT 1").close()
        with pytest.raises(psycopg.Error):
            connection.tpc_prepare()
        connection.close()

    within(body)


# --- The loop goes on -----------------------------------------------------------------------------


async def beside(work: Callable[[], Any]) -> tuple[Any, int]:
    """Run `work` green, and count the turns that another task had meanwhile."""
    turns = 0
    done = False

    async def heart() -> None:
        nonlocal turns
        while not done:
            turns += 1
            await asyncio.sleep(0.001)

    beating = asyncio.create_task(heart())
    try:
        return await green(work), turns
    finally:
        done = True
        await beating


def test_other_tasks_are_served_while_the_server_works(run: Runner, conninfo: str) -> None:
    async def main() -> None:
        def work() -> None:
            with connect(conninfo) as connection:
                connection.execute("SELECT pg_sleep(0.2)")

        _, turns = await beside(work)
        assert turns >= 20

    run(main())


def test_a_query_ends_only_when_another_task_lets_it(run: Runner, conninfo: str) -> None:
    """The loop itself releases the lock for which the query waits: a proof without a clock."""

    async def main() -> None:
        def work() -> str:
            with connect(conninfo, autocommit=True) as connection:
                connection.execute("SELECT pg_advisory_lock(4711)")
                connection.execute("SELECT pg_advisory_unlock(4711)")
            return "got it"

        holder = await psycopg.AsyncConnection.connect(conninfo, autocommit=True)
        async with holder:
            await holder.execute("SELECT pg_advisory_lock(4711)")
            waiting = asyncio.create_task(green(work))
            blocked = "SELECT count(*) FROM pg_locks WHERE objid = 4711 AND NOT granted"
            while (await (await holder.execute(blocked)).fetchone()) != (1,):
                await asyncio.sleep(0)
            await holder.execute("SELECT pg_advisory_unlock(4711)")
            assert await waiting == "got it"

    run(main())


@pytest.mark.parametrize("pipelined", [True, False])
def test_a_long_executemany_does_not_starve_the_loop(
    run: Runner, conninfo: str, pipelined: bool
) -> None:
    async def main() -> None:
        def work() -> float:
            with connect(conninfo) as connection, connection.cursor() as cursor:
                cursor.execute("CREATE TEMPORARY TABLE t (n int)")
                started = monotonic()
                if pipelined:
                    cursor.executemany("INSERT INTO t VALUES (%s)", [(n,) for n in range(5000)])
                else:
                    for n in range(1000):
                        cursor.execute("INSERT INTO t VALUES (%s)", [n])
                return monotonic() - started

        seconds, turns = await beside(work)
        assert turns >= seconds / 0.1

    run(main())


def test_a_long_copy_does_not_starve_the_loop(run: Runner, conninfo: str) -> None:
    async def main() -> None:
        def work() -> float:
            with connect(conninfo) as connection, connection.cursor() as cursor:
                cursor.execute("CREATE TEMPORARY TABLE t (n int, t text)")
                started = monotonic()
                with cursor.copy("COPY t FROM STDIN") as copy:
                    for n in range(100_000):
                        copy.write_row((n, "text"))
                with cursor.copy("COPY t TO STDOUT") as copy:
                    assert sum(1 for _ in copy.rows()) == 100_000
                return monotonic() - started

        seconds, turns = await beside(work)
        assert turns >= seconds / 0.05

    run(main())


def test_tasks_that_share_a_connection_take_turns(run: Runner, conninfo: str) -> None:
    async def main() -> None:
        connection = await green(connect, conninfo)

        def work(n: int) -> bool:
            with connection.cursor() as cursor:
                cursor.execute("SELECT %s::int, pg_sleep(0.001)", [n])
                return bool(cursor.fetchone()[0] == n)

        assert all(await asyncio.gather(*(green(work, n) for n in range(30))))
        connection.close()

    run(main())


def test_a_connection_may_be_used_on_another_loop_and_in_a_thread(
    run: Runner, conninfo: str
) -> None:
    """One context begins a transaction, and any other can wait for its statements."""

    def select(connection: Connection) -> Any:
        with connection.cursor() as cursor:
            return cursor.execute("SELECT pg_backend_pid()").fetchone()

    with connect(conninfo) as connection:
        first = select(connection)
        assert run.green(select, connection) == first
        assert run.green(select, connection) == first

        async def main() -> None:
            assert await asyncio.to_thread(select, connection) == first
            assert await green(select, connection) == first

        run(main())
        assert select(connection) == first


def test_a_leased_connection_may_be_used_in_a_thread(run: Runner, pools: Pools) -> None:
    def select(connection: Connection) -> Any:
        with connection.cursor() as cursor:
            return cursor.execute("SELECT pg_backend_pid(), pg_sleep(0.01)").fetchone()[0]

    def main() -> None:
        with pinned(pools()) as lease:
            pid = select(lease.connection)
            for _ in range(3):
                assert await_(asyncio.to_thread(select, lease.connection)) == pid
                assert select(lease.connection) == pid

    run.green(main)


# --- Connecting -----------------------------------------------------------------------------------


@pytest.fixture(params=CONTEXTS[:-1])
def connecting(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Call `connect()`: blocking, and green; it must not take long to fail."""

    def call(conninfo: str, **kwargs: Any) -> Any:
        started = monotonic()
        try:
            if request.param == "sync":
                return connect(conninfo, **kwargs)
            loop = LOOPS[request.param.removeprefix("green on ")]
            return Runner(loop)(green(connect, conninfo, **kwargs))
        finally:
            assert monotonic() - started < 5

    return call


def test_a_cursor_may_be_made_while_another_thread_makes_one(
    conninfo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    psycopgs: Any = psycopg.Connection.cursor
    in_midst, goes_on = threading.Event(), threading.Event()

    def cursor(connection: Any, *args: Any, **kwargs: Any) -> Any:
        if not in_midst.is_set():
            in_midst.set()
            goes_on.wait(0.1)
        return psycopgs(connection, *args, **kwargs)

    monkeypatch.setattr(psycopg.Connection, "cursor", cursor)  # ours asks this one, patched
    with connect(conninfo, cursor_factory=psycopg.ClientCursor) as connection:
        thread = threading.Thread(target=connection.cursor)
        thread.start()
        assert in_midst.wait(10)
        made = connection.cursor()
        goes_on.set()
        thread.join()
        assert isinstance(made, psycopg.ClientCursor)
        assert connection.cursor_factory is psycopg.ClientCursor


def test_connect_keeps_its_arguments(connecting: Callable[..., Any], conninfo: str) -> None:
    context = psycopg.adapt.AdaptersMap(psycopg.adapters)
    connection = connecting(
        conninfo,
        autocommit=True,
        row_factory=dict_row,
        cursor_factory=psycopg.ClientCursor,
        prepare_threshold=3,
        application_name="its name",
    )
    with connection:
        assert connection.autocommit
        assert connection.prepare_threshold == 3
        cursor = connection.execute("SELECT current_setting('application_name') AS name")
        assert isinstance(cursor, psycopg.ClientCursor)
        assert connection.cursor_factory is psycopg.ClientCursor
        assert cursor.fetchone() == {"name": "its name"}
    assert connection.closed
    del context


def test_an_unknown_database_is_told_at_once(connecting: Callable[..., Any], conninfo: str) -> None:
    with pytest.raises(psycopg.OperationalError, match='database "nowhere" does not exist'):
        connecting(conninfo, dbname="nowhere")


def test_an_unknown_user_is_told_at_once(connecting: Callable[..., Any], conninfo: str) -> None:
    with pytest.raises(psycopg.OperationalError, match="nobody_at_all"):
        connecting(conninfo, user="nobody_at_all", password="canary")


@pytest.fixture
def locked_user(admin: psycopg.Connection[Any]) -> Any:
    """Make a role whose password, "right", the server asks for; return its name."""
    (path,) = admin.execute("SHOW hba_file").fetchone() or ("",)
    file = Path(path)
    try:
        before = file.read_text()
        file.write_text(f"local all locked scram-sha-256\nhost all locked all md5\n{before}")
    except OSError:
        pytest.skip("the server's pg_hba.conf is out of reach")
    admin.execute("CREATE ROLE locked LOGIN PASSWORD 'right'")
    admin.execute("SELECT pg_reload_conf()")
    loaded = "SELECT count(*) FROM pg_hba_file_rules WHERE user_name = '{locked}'"
    wait_for(lambda: admin.execute(loaded).fetchone() != (0,), "pg_hba.conf read")
    yield "locked"
    file.write_text(before)
    admin.execute("DROP ROLE locked")
    admin.execute("SELECT pg_reload_conf()")


def test_a_wrong_password_is_told_at_once_and_not_shown(
    connecting: Callable[..., Any], conninfo: str, locked_user: str
) -> None:
    def attempt() -> str:
        """Return the error of a connection; the server reloads its rules a moment later."""
        try:
            connecting(conninfo, user=locked_user, password="canary").close()
        except psycopg.OperationalError as exc:
            return str(exc)
        return ""

    message = wait_for(attempt, "the password is asked for")
    assert "password authentication failed" in message
    assert "canary" not in message
    with connecting(conninfo, user=locked_user, password="right") as connection:
        assert "right" not in repr(connection)


def test_a_bad_option_is_told_at_once(connecting: Callable[..., Any], conninfo: str) -> None:
    with pytest.raises(psycopg.ProgrammingError, match="no_such_option"):
        connecting(conninfo, no_such_option="1")


def test_host_names_are_resolved(connecting: Callable[..., Any], conninfo: str, link: Link) -> None:
    plain = {"sslmode": "disable", "gssencmode": "disable"}
    with connecting(conninfo, host="localhost", port=link.port, **plain) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
    with connecting(conninfo, host="localhost,127.0.0.1", port=link.port, **plain) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
    with pytest.raises(psycopg.OperationalError, match=r"no-such-host\.invalid"):
        connecting(conninfo, host="no-such-host.invalid", port=link.port)


def test_connecting_does_not_block_the_loop(run: Runner, conninfo: str, link: Link) -> None:
    """The link is frozen until another task of the loop thaws it."""

    async def main() -> None:
        options = {"host": "127.0.0.1", "port": link.port, "sslmode": "disable"}
        link.freeze()
        opening = asyncio.create_task(green(connect, conninfo, gssencmode="disable", **options))
        while not link.attempts:
            await asyncio.sleep(0.001)
        assert not opening.done()
        link.thaw()
        (await opening).close()

    run(main())


def test_cancelling_a_connect_leaves_no_session(
    run: Runner, conninfo: str, link: Link, admin: psycopg.Connection[Any]
) -> None:
    async def main() -> None:
        options = {"host": "127.0.0.1", "port": link.port, "sslmode": "disable"}
        link.freeze()
        opening = asyncio.create_task(
            green(connect, conninfo, gssencmode="disable", application_name="gone", **options)
        )
        while not link.attempts:
            await asyncio.sleep(0.001)
        opening.cancel()
        await asyncio.wait([opening], timeout=1)
        assert opening.cancelled()

    run(main())
    link.thaw()
    query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'gone'"
    wait_for(lambda: admin.execute(query).fetchone() == (0,), "the session is gone")


def test_a_connection_that_is_forgotten_is_warned_about(
    connecting: Callable[..., Any], conninfo: str
) -> None:
    with pytest.warns(ResourceWarning, match="was deleted while still open"):
        connecting(conninfo)


# --- The pool's own connections -------------------------------------------------------------------


def test_a_silent_link_does_not_outlast_the_clean_up_budget(
    run: Runner, pools_by_link: Pools, link: Link
) -> None:
    """The statement is cancelled while nothing answers: the socket is closed within a second."""

    async def main() -> None:
        pool = pools_by_link()

        def select(statement: str) -> Any:
            with pool.lease().connection.cursor() as cursor:
                return cursor.execute(statement).fetchone()

        await green(select, "SELECT 1")
        link.freeze()
        task = asyncio.create_task(green(select, "SELECT 2"))
        await asyncio.sleep(0.02)
        started = monotonic()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert monotonic() - started < 1.5
        link.thaw()
        assert await green(select, "SELECT 3") == (3,)

    run(main())


@pytest.mark.parametrize("noise", [False, True], ids=["silent", "notified"])
def test_is_alive_knows_what_the_socket_knows(
    run: Runner, pools: Pools, admin: psycopg.Connection[Any], noise: bool
) -> None:
    async def main() -> None:
        info = conninfo_to_dict(pools.conninfo, application_name=pools.name)
        connection = await AsyncConnection.connect(**info, autocommit=True)
        assert connection.is_alive()
        if noise:
            await connection.execute("LISTEN channel")
            admin.execute("NOTIFY channel")
            assert connection.is_alive()
        pools.terminate_sessions()
        wait_for(lambda: hung_up(connection.pgconn.socket), "the server has hung up")
        assert not connection.is_alive()
        connection.close_now()

    run(main())


def test_a_wait_that_follows_an_error_of_the_socket_ends_too(run: Runner) -> None:
    """uvloop calls a reader once for such a socket, and never again, though data came with it."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)

    def wait_twice() -> list[int]:
        watch = Watch(asyncio.get_running_loop(), ours.fileno())
        portal = bridge.current()
        assert portal is not None
        try:
            ready = [watch.wait(portal, Wait.R, 1.0)]
            assert ours.recv(100) == b"the rest will never come"
            ready.append(watch.wait(portal, Wait.R, 1.0))
        finally:
            watch.stop()
        with pytest.raises(ConnectionResetError):
            ours.recv(100)
        return ready

    with ours, theirs:
        ours.send(b"never read, so that closing is an error")
        theirs.send(b"the rest will never come")
        theirs.close()
        assert run.green(wait_twice) == [Wait.R, Wait.R]


def test_a_watch_that_was_stopped_touches_no_socket_of_the_same_number(run: Runner) -> None:
    """A connection that is closed while its task waits to write: its number is used again."""
    ours, theirs = socket.socketpair()
    others, _ = pair = socket.socketpair()
    with ours, theirs, pair[0], pair[1]:
        ours.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                ours.send(b"x" * 65536)  # until it cannot be written to

        def wait(watch: Watch) -> int:
            portal = bridge.current()
            assert portal is not None
            return watch.wait(portal, Wait.RW, None)

        async def main() -> None:
            loop = asyncio.get_running_loop()
            watch = Watch(loop, ours.fileno())
            waiting = asyncio.create_task(bridge.run(wait, watch))
            await asyncio.sleep(0)
            watch.stop()
            os.dup2(others.fileno(), ours.fileno())  # as if that number were given out again
            called = asyncio.Event()
            loop.add_writer(ours.fileno(), called.set)
            await waiting
            called.clear()
            await asyncio.wait_for(called.wait(), 5)  # unless the watch has removed the writer
            loop.remove_writer(ours.fileno())

        run(main())


def test_a_reply_wakes_the_one_who_waits_once(
    run: Runner, pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    """asyncio's loops report a reply twice: Note [Told twice]."""
    wait = Watch.wait
    waits: list[int] = []

    def counted(watch: Watch, *args: Any) -> int:
        waits.append(ready := wait(watch, *args))
        return ready

    def main() -> None:
        pool = pools()
        fetch(pool, "SELECT 1")
        monkeypatch.setattr(Watch, "wait", counted)
        with pinned(pool) as lease, lease.connection.cursor() as cursor:
            for number in range(10):
                assert cursor.execute("SELECT %s::int", [number]).fetchone() == (number,)
                assert lease.physical.watch.reading

    run.green(main)
    assert waits == [Wait.R] * 10


def test_news_that_is_taken_for_a_repetition_is_told_again(run: Runner, pools: Pools) -> None:
    def main() -> None:
        with pinned(pools()) as lease, lease.connection.cursor() as cursor:
            for _ in range(3):
                lease.physical.watch.told = True
                assert cursor.execute("SELECT pg_sleep(0.01), 1").fetchone()[1] == 1

    run.green(main)


# --- Versions of psycopg --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "version", "is_known"),
    [
        ("psycopg", "3.3.8", False),
        ("psycopg", "3.3.9", True),
        ("psycopg", "3.3.42", True),
        ("psycopg", "3.4", False),
        ("psycopg", "4.0.1", False),
        ("psycopg-pool", "3.3.2", False),
        ("psycopg-pool", "3.3.3", True),
        ("psycopg-pool", "3.4.0", False),
        ("greenlet", "3.5.2", False),
        ("greenlet", "4.0", True),
    ],
)
def test_a_version_of_psycopg_that_nobody_has_read_is_refused(
    name: str, version: str, is_known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = versions.metadata.version
    monkeypatch.setattr(
        versions.metadata, "version", lambda each: version if each == name else installed(each)
    )
    if is_known:
        versions.check()
    else:
        cure = r"pip install 'NAME(\[binary\])?>=3\.\d\.\d(,<3\.4)?'".replace("NAME", name)
        with pytest.raises(ImportError, match=rf"{name} {version}: {cure}, or install another"):
            versions.check()


def test_a_package_that_is_not_installed_is_named_with_its_cure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(versions.SUPPORTED, "no-such-pool", ((3, 3, 3), (3, 4)))
    with pytest.raises(
        ImportError, match=r"not installed: pip install 'no-such-pool>=3\.3\.3,<3\.4'"
    ):
        versions.check()
