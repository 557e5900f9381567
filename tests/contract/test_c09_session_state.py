"""C9: what one lease did to its session does not reach the next."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from django.db import connection, connections, transaction
from django.db.backends.signals import connection_created
from psycopg.pq import Trace

import pgbackend
from pgbackend import aio
from tests.conftest import Runner
from tests.library.models import Tag
from tests.support.fixtures import pool_of_default, settings_of_default
from tests.support.sweep import CANCELLING, Mode, Outcome, sweep

LOOK = """
SELECT pg_backend_pid(), current_user, session_user,
    current_setting('search_path'), nullif(current_setting('app.tenant', true), ''),
    current_setting('statement_timeout'), current_setting('work_mem'),
    current_setting('default_transaction_isolation'), current_setting('TimeZone'),
    current_setting('client_encoding'), to_regclass('scratch'),
    nullif(current_setting('plpgsql.variable_conflict', true), 'error'),
    (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()),
    (SELECT count(*) FROM pg_listening_channels()),
    (SELECT count(*) FROM pg_prepared_statements),
    (SELECT count(*) FROM pg_cursors WHERE name <> '')
"""


def look() -> Any:
    """What a tenant sees of its session."""
    with connection.cursor() as cursor:
        cursor.execute(LOOK)
        return cursor.fetchone()


#: Each act, and the part of `LOOK` that it changes as long as its lease lasts.
ACTS: dict[str, tuple[list[str], int | None]] = {
    "SET": (["SET work_mem TO '1234kB'"], 6),
    "SET LOCAL outside of a transaction": (["SET LOCAL work_mem TO '1234kB'"], None),
    "SET ROLE": (["SET ROLE tenant"], 1),
    "SET SESSION AUTHORIZATION": (["SET SESSION AUTHORIZATION tenant"], 2),
    "search_path": (["SET search_path TO pg_catalog"], 3),
    "set_config": (["SELECT set_config('app.tenant', 'one', false)"], 4),
    "statement_timeout": (["SET statement_timeout TO '5s'"], 5),
    "isolation level": (
        ["SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE"],
        7,
    ),
    "time zone": (["SET TIME ZONE 'Asia/Tokyo'"], 8),
    "client_encoding": (["SET client_encoding TO 'LATIN1'"], 9),
    "temporary table": (["CREATE TEMPORARY TABLE scratch (n int)"], 10),
    "LOAD": (["LOAD 'plpgsql'", "SET plpgsql.variable_conflict TO use_column"], 11),
    "advisory locks": (["SELECT pg_advisory_lock(42)", "SELECT pg_advisory_lock_shared(43)"], 12),
    "LISTEN": (["LISTEN news"], 13),
    "PREPARE": (["PREPARE plan AS SELECT 1"], 14),
    "an open cursor with hold": (["DECLARE kept CURSOR WITH HOLD FOR SELECT 1"], 15),
    "an open cursor without hold": (["BEGIN", "DECLARE kept CURSOR FOR SELECT 1"], 15),
    "DISCARD": (["DISCARD ALL"], None),
}


@pytest.fixture(autouse=True)
def tenant(admin: psycopg.Connection[Any]) -> Iterator[None]:
    """A role to become, and one session for all, so that the next tenant surely gets the same."""
    admin.execute("DROP ROLE IF EXISTS tenant")
    admin.execute("CREATE ROLE tenant")
    with pool_of_default(max_size=1), settings_of_default(TIME_ZONE="Europe/Paris"):
        yield
    admin.execute("DROP ROLE tenant")


@pytest.mark.parametrize("act", ACTS)
def test_no_act_on_a_session_is_seen_by_the_next_tenant(run: Runner, act: str) -> None:
    statements, changes = ACTS[act]

    def spoil() -> Any:
        with pgbackend.pinned():
            with connection.cursor() as cursor:
                for sql in statements:
                    cursor.execute(sql)
                cursor.execute(LOOK)
                return cursor.fetchone()

    async def main() -> None:
        clean = await aio.run(look)
        spoilt = await asyncio.create_task(aio.run(spoil))
        if changes is not None:
            assert spoilt[changes] != clean[changes], "the act does something"
        assert await asyncio.create_task(aio.run(look)) == clean, "the same session, like new"
        assert clean[8] == "Europe/Paris", "prepared as Django prepares it"

    run(main())


def test_an_act_in_a_transaction_is_not_seen_either(run: Runner) -> None:
    def spoil() -> None:
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute("SELECT set_config('app.tenant', 'one', false)")
            cursor.execute("SET work_mem TO '1234kB'")
            cursor.execute("SET LOCAL statement_timeout TO '5s'")
            cursor.execute("CREATE TEMPORARY TABLE scratch (n int)")

    async def main() -> None:
        clean = await aio.run(look)
        await aio.run(spoil)
        assert await aio.run(look) == clean

    run(main())


@pytest.mark.parametrize("mode", CANCELLING)
@pytest.mark.parametrize("where", ["pinned", "atomic"])
def test_no_act_is_seen_after_a_cancellation_at_any_point(
    run: Runner, mode: Mode, where: str
) -> None:
    acts = ["set_config", "SET ROLE", "temporary table", "advisory locks", "LISTEN", "PREPARE"]
    statements = [sql for act in acts if act != "SET ROLE" for sql in ACTS[act][0]]
    block: Callable[[], Any] = pgbackend.pinned if where == "pinned" else transaction.atomic

    def spoil() -> None:
        with block(), connection.cursor() as cursor:
            for sql in [*statements, "SET ROLE tenant"]:
                cursor.execute(sql)

    async def main() -> None:
        clean = await aio.run(look)

        async def check(outcome: Outcome) -> None:
            now = await aio.run(look)
            assert now[1:] == clean[1:], outcome.at

        assert await sweep(lambda: aio.run(spoil), mode, check) > len(statements)

    run(main())


# --- Row-level security -------------------------------------------------------------------------


@pytest.fixture
def documents(transactional_db: None, tenant: None) -> Iterator[None]:
    with connection.cursor() as cursor:
        cursor.execute(
            "CREATE TABLE documents (id serial, owner text);"
            "INSERT INTO documents (owner) SELECT t FROM generate_series(1, 20), "
            "unnest(ARRAY['one', 'two']) AS t;"
            "ALTER TABLE documents ENABLE ROW LEVEL SECURITY;"
            "CREATE POLICY own ON documents "
            "USING (owner = current_setting('app.tenant', true));"
            "GRANT SELECT ON documents TO tenant"
        )
    yield
    with connection.cursor() as cursor:
        cursor.execute("DROP TABLE documents")


def test_row_level_security_by_set_config_shows_no_foreign_row(
    run: Runner, documents: None
) -> None:
    foreign: list[Any] = []

    def owners() -> set[str]:
        with connection.cursor() as cursor:
            cursor.execute("SELECT owner FROM documents")
            return {owner for (owner,) in cursor.fetchall()}

    def request(number: int) -> None:
        who = ("one", "two", None)[number % 3]
        if who is None:
            seen = owners()  # of nobody
        else:
            with pgbackend.pinned() if number % 2 else transaction.atomic():
                with connection.cursor() as cursor:
                    cursor.execute("SELECT set_config('app.tenant', %s, false)", [who])
                seen = owners()
        if seen != ({who} if who else set()):
            foreign.append((number, who, seen))

    async def main() -> None:
        await asyncio.gather(*(aio.run(request, number) for number in range(2000)))

    given = connections.settings["default"]["OPTIONS"]
    options = {**given, "assume_role": "tenant", "pool": {"max_size": 3, "timeout": 60}}
    with settings_of_default(OPTIONS=options):
        run(main(), timeout=60)
    assert not foreign


# --- The three settings, and what they cost -----------------------------------------------------


@contextmanager
def messages() -> Iterator[list[str]]:
    """What is sent to the server on connections that are opened in the block, statement by one."""
    sent: list[str] = []
    with tempfile.TemporaryFile() as log:

        def trace(sender: Any, connection: Any, **kwargs: Any) -> None:
            connection.connection.pgconn.trace(log.fileno())
            connection.connection.pgconn.set_trace_flags(
                Trace.SUPPRESS_TIMESTAMPS | Trace.REGRESS_MODE
            )

        connection_created.connect(trace)
        try:
            yield sent
        finally:
            connection_created.disconnect(trace)
        log.seek(0)
        lines = log.read().decode().splitlines()
        sent += [line for line in lines if line.startswith(("F\t", "F "))]


def statements_of(run: Runner, reset: str, work: Callable[[], Any]) -> list[str]:
    """The messages of the work, when its session is new and used three times."""

    async def main() -> None:
        for _ in range(3):
            await aio.run(work)

    given = connections.settings["default"]["OPTIONS"]
    with settings_of_default(OPTIONS={**given, "session_reset": reset}), messages() as sent:
        run(main())
    return [message for message in sent if "Terminate" not in message]


def orm() -> None:
    Tag.objects.count()


def orm_in_a_transaction() -> None:
    with transaction.atomic():
        Tag.objects.create(name="t")
        with transaction.atomic():
            Tag.objects.filter(name="t").delete()


def raw() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")


@pytest.mark.parametrize("reset", ["dirty", "never"])
def test_statements_of_the_orm_pay_no_round_trip(run: Runner, reset: str) -> None:
    sent = statements_of(run, reset, orm)
    assert len(sent) == 3 and all("COUNT(*)" in message for message in sent), sent
    sent = statements_of(run, reset, orm_in_a_transaction)
    assert not [message for message in sent if "DISCARD" in message or "SET " in message]
    assert len(sent) % 3 == 0 and sum("BEGIN" in message for message in sent) == 3


def test_dirty_resets_after_raw_sql_only(run: Runner) -> None:
    sent = statements_of(run, "dirty", raw)
    assert sum("DISCARD ALL" in message for message in sent) in (2, 3), "the last may be cut short"


def test_always_resets_after_each_lease(run: Runner) -> None:
    sent = statements_of(run, "always", orm)
    assert sum("DISCARD ALL" in message for message in sent) in (2, 3)
    assert sum("COUNT(*)" in message for message in sent) == 3


def test_never_resets_nothing(run: Runner) -> None:
    sent = statements_of(run, "never", raw)
    assert len(sent) == 3 and not [message for message in sent if "DISCARD" in message]


def test_never_lets_the_next_tenant_see_what_was_left(run: Runner) -> None:
    def spoil() -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT set_config('app.tenant', 'one', false)")

    async def main() -> None:
        await aio.run(spoil)
        assert (await aio.run(look))[4] == "one"

    given = connections.settings["default"]["OPTIONS"]
    with settings_of_default(OPTIONS={**given, "session_reset": "never"}):
        run(main())
