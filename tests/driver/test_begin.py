"""Tests that BEGIN travels with a transaction's first statement, and that no result shows it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from psycopg import errors as e

from pgbackend.driver import Connection, connect
from tests.conftest import Runner

from .conftest import Pools, pinned

Body = Callable[[Any], Any]

STATEMENTS = [
    "SELECT 1",
    "SELECT 1; SELECT 2",
    "SELECT 1; SELEC 2",
    "SELECT 1 / 0",
    "SELEC 1",
    "SELECT nothing",
    "",
    "-- a comment",
    "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE",
    "SELECT current_setting('transaction_isolation')",
    "VACUUM",
    "COMMIT",
    "ROLLBACK",
    "BEGIN",
    "SAVEPOINT s",
    "CREATE TEMPORARY TABLE t ON COMMIT DROP AS SELECT 1",
]


def outcome(connection: Any, statement: str, params: Any = None) -> list[Any]:
    """Return a statement's results, or its error, and the state of the transaction after it."""
    seen: list[Any] = []
    with connection.cursor() as cursor:
        try:
            cursor.execute(statement, params)
            while True:
                rows = cursor.fetchall() if cursor.description else None
                seen.append((cursor.statusmessage, rows, cursor.rowcount))
                if not cursor.nextset():
                    break
        except psycopg.Error as exc:
            seen.append((type(exc), exc.sqlstate, exc.diag.message_primary))
    return [*seen, connection.info.transaction_status.name]


def story(connection: Any, statement: str) -> list[Any]:
    seen = [outcome(connection, statement), outcome(connection, "SELECT 3")]
    connection.rollback()
    seen.append(outcome(connection, "SELECT %s", ["after"]))
    connection.commit()
    return seen


@pytest.fixture(params=["sync", "green", "leased"])
def within(request: pytest.FixtureRequest, conninfo: str, pools: Pools) -> Callable[[Body], Any]:
    """Call a function with a connection that binds parameters itself, as Django's do."""

    def own(body: Body) -> Any:
        with connect(conninfo, cursor_factory=psycopg.ClientCursor) as connection:
            return body(connection)

    def leased(body: Body) -> Any:
        with pinned(pools(connect={"cursor_factory": psycopg.ClientCursor})) as lease:
            lease.connection.autocommit = False
            return body(lease.connection)

    if request.param == "sync":
        return own
    start = own if request.param == "green" else leased
    return lambda body: Runner(None).green(start, body)


@pytest.mark.parametrize("statement", STATEMENTS)
def test_a_first_statement_has_the_outcome_that_it_has_in_psycopg(
    within: Callable[[Body], Any], conninfo: str, statement: str
) -> None:
    with psycopg.connect(conninfo, cursor_factory=psycopg.ClientCursor) as connection:
        expected = story(connection, statement)
    assert within(lambda connection: story(connection, statement)) == expected


@pytest.mark.shortcut("begin")
def test_begin_is_no_message_of_its_own(within: Callable[[Body], Any], tmp_path: Any) -> None:
    def body(connection: Connection) -> list[str]:
        with (tmp_path / "trace").open("w+") as trace:
            connection.pgconn.trace(trace.fileno())
            connection.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
            outcome(connection, "SELECT %s", ["one"])
            outcome(connection, "SELECT 2")
            connection.commit()
            connection.pgconn.untrace()
            trace.seek(0)
            return re.findall(r'\tQuery\t *"(.*)"', trace.read())

    sent = within(body)
    assert [" ".join(message.split()) for message in sent] == [
        "BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT 'one'",
        "SELECT 2",
        "COMMIT",
    ]


def test_a_statement_that_cannot_be_sent_begins_nothing_and_breaks_nothing(
    within: Callable[[Body], Any],
) -> None:
    def body(connection: Connection) -> None:
        cursor = connection.cursor()
        with pytest.raises(psycopg.ProgrammingError, match="cannot adapt type 'object'"):
            cursor.execute("SELECT %s", [object()])
        with pytest.raises(e.NotSupportedError, match="binary"):
            cursor.execute("SELECT 1", binary=True)
        assert outcome(connection, "SELECT 1")[-1] == "INTRANS"
        assert cursor.execute("SELECT 2").fetchone() == (2,)

    within(body)


def test_a_statement_that_was_cancelled_before_begin_is_not_sent_again(
    within: Callable[[Body], Any], tmp_path: Any
) -> None:
    """A caller whose timeout cancelled the statement must not see it run after all."""
    long = f"SELECT {','.join(['1'] * 300_000)}"  # the timeout comes while the server parses this

    def body(connection: Connection) -> None:
        connection.execute("SET statement_timeout = 1")
        connection.commit()
        with (tmp_path / "trace").open("w+") as trace:
            connection.pgconn.trace(trace.fileno())
            with pytest.raises(e.QueryCanceled):
                connection.execute(long)
            connection.pgconn.untrace()
            trace.seek(0)
            assert trace.read().count("SELECT 1,1,1") == 1
        connection.rollback()
        connection.execute("SET statement_timeout = 0")
        assert connection.execute("SELECT 1").fetchone() == (1,)

    within(body)


def test_what_does_not_go_through_execute_begins_as_in_psycopg(
    within: Callable[[Body], Any],
) -> None:
    def body(connection: Connection) -> None:
        cursor = connection.cursor()
        cursor.executemany("SELECT %s", [[1], [2]])
        assert connection.info.transaction_status.name == "INTRANS"
        connection.rollback()
        with cursor.copy("COPY (SELECT 5) TO STDOUT") as copy:
            assert list(copy.rows()) == [("5",)]
        assert connection.info.transaction_status.name == "INTRANS"
        connection.rollback()
        with connection.pipeline():
            assert cursor.execute("SELECT 6").fetchone() == (6,)
        assert connection.info.transaction_status.name == "INTRANS"
        connection.rollback()
        assert list(cursor.stream("SELECT 7")) == [(7,)]
        connection.rollback()

    within(body)
