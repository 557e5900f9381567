"""Tests C17 at the end of a process: a server that is told to end leaves no session behind.

Each real server gets SIGTERM while requests hold rows in statements that would take a minute.
docs/shutdown.md says what each does then.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import psycopg
import pytest
from django.db import connection, connections, transaction
from psycopg.conninfo import conninfo_to_dict

from pgbackend import aio
from pgbackend.driver import client_checks
from tests.conftest import Runner, wait_for
from tests.contract.servers.running import Kind, Server, environment
from tests.library.models import Tag
from tests.support.fixtures import settings_of_default
from tests.support.messages import messages
from tests.support.pgbouncer import pgbouncer, program

#: Requests in flight at each server.
REQUESTS = 3
#: Seconds within which PostgreSQL must have ended the sessions of a process that is gone.
SOON = 2.0

_BIND = "--bind 127.0.0.1:{port}"
_HOST = "--host 127.0.0.1 --port {port}"
_GRACE = "--timeout-graceful-shutdown 1"
_UVICORN = f"uvicorn {_HOST} {_GRACE}"
#: Servers that end by themselves, one second after SIGTERM.
ENDING = {
    "uvicorn": Kind(f"{_UVICORN} --loop asyncio {{BARE}}"),
    "uvicorn on uvloop": Kind(f"{_UVICORN} --loop uvloop {{BARE}}"),
    "uvicorn with workers": Kind(f"{_UVICORN} --workers 2 {{BARE}}"),
    "uvicorn and an application with a lifespan": Kind(f"{_UVICORN} {{ASGI}}"),
    "uvicorn of the whole stack": Kind(f"{_UVICORN} {{GREEN}}"),
    "gunicorn with workers of uvicorn": Kind(
        f"gunicorn {_BIND} --graceful-timeout 1 -k uvicorn.workers.UvicornWorker {{BARE}}"
    ),
    "granian": Kind(f"granian --interface asgi {_HOST} --workers-kill-timeout 1 {{BARE}}"),
    "daphne": Kind("daphne -b 127.0.0.1 -p {port} --application-close-timeout 1 {BARE}"),
}
#: A server that waits for each request, however long it takes, until a supervisor kills it.
WAITING = {"hypercorn": Kind(f"hypercorn {_BIND} --graceful-timeout 1 {{BARE}}")}
KINDS = {**ENDING, **WAITING}


@pytest.fixture(scope="module")
def servers(
    django_db_setup: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Server]]:
    """Start all servers at once; yield them by name."""
    folder = tmp_path_factory.mktemp("servers")
    started = {name: Server(name, folder, kind) for name, kind in KINDS.items()}
    try:
        for server in started.values():
            wait_for(server.is_ready, f"{server.name} listens", seconds=40)
        yield started
    finally:
        for server in started.values():
            server.kill()


def sessions(admin: psycopg.Connection[Any], name: str, condition: str = "true") -> int:
    query = f"SELECT count(*) FROM pg_stat_activity WHERE application_name = %s AND {condition}"
    (count,) = admin.execute(query, [name]).fetchone()  # type: ignore[misc]
    return int(count)


def end_sessions(admin: psycopg.Connection[Any], name: str) -> None:
    """End the sessions that are left: the next test empties the tables, and would wait for them."""
    query = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s"
    admin.execute(query, [name])


def ask(server: Server, path: str) -> socket.socket:
    """Send a request, and return its connection, which stays open as a proxy's would."""
    client = socket.create_connection(("127.0.0.1", server.port))
    client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    return client


@pytest.mark.sweep(one_in=12)
@pytest.mark.parametrize("name", KINDS)
def test_sessions_are_gone_soon_after_a_server_has_ended_with_statements_in_flight(
    servers: dict[str, Server], name: str, admin: psycopg.Connection[Any]
) -> None:
    server = servers[name]
    for n in range(REQUESTS):
        Tag.objects.create(name=f"{n}")
    clients = [ask(server, f"/contract/hold/?tag={n}") for n in range(REQUESTS)]
    try:
        wait_for(
            lambda: sessions(admin, name, "query ~ 'pg_sleep' AND state = 'active'") == REQUESTS,
            f"{REQUESTS} statements are in flight",
            20,
        )
        server.tell_to_end()
        if name in WAITING:
            assert sessions(admin, name, "state = 'active'") == REQUESTS
            server.kill()
        wait_for(lambda: server.process.poll() is not None, f"{name} ends", 10)
        wait_for(lambda: not sessions(admin, name), "its sessions are gone", SOON)
    finally:
        for client in clients:
            client.close()
        end_sessions(admin, name)
    with transaction.atomic():
        assert len(Tag.objects.select_for_update(nowait=True)) == REQUESTS


# --- The setting by which PostgreSQL notices that a process is gone -------------------------------


def shown() -> tuple[str, int]:
    """Return the setting of the session, by raw SQL, after which the session is reset."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT current_setting('client_connection_check_interval'), pg_backend_pid()"
        )
        return cursor.fetchone()


async def of_two_sessions() -> list[tuple[str, int]]:
    """Return `shown()` of two sessions, new and then reset."""

    async def held(opened: asyncio.Barrier) -> tuple[str, int]:
        async with transaction.atomic():
            found = await aio.run(shown)
            await opened.wait()
            return found

    rounds = [await asyncio.gather(*map(held, [asyncio.Barrier(2)] * 2)) for _ in range(2)]
    assert {pid for _, pid in rounds[0]} == {pid for _, pid in rounds[1]}
    assert len({pid for _, pid in rounds[0]}) == 2
    return [*rounds[0], *rounds[1]]


def settings_of_sessions(run: Runner, **changes: Any) -> set[str]:
    """Return the values that `client_connection_check_interval` has in the sessions of a pool."""
    given = connections.settings["default"]["OPTIONS"]
    client_checks._due.clear()
    pool = {"max_size": 2, "timeout": 20}  # so that each waits until it has been reset
    with settings_of_default(OPTIONS={**given, "pool": pool, **changes}):
        return {value for value, _ in run(of_two_sessions())}


def test_postgresql_looks_whether_the_process_of_a_pooled_session_lives(run: Runner) -> None:
    """It looks in each session of a pool, and goes on when the session has been reset."""
    assert settings_of_sessions(run) == {"500ms"}


@pytest.mark.parametrize("value", ["0", "30s"])
def test_a_value_that_the_user_has_chosen_stays(run: Runner, value: str) -> None:
    """It may be an option of the connection, of the database or of the role, and may be 0."""
    option = f"-c client_connection_check_interval={value}"
    assert settings_of_sessions(run, options=option) == {value}
    quote = connection.ops.quote_name
    for target in (f"DATABASE {quote(connection.settings_dict['NAME'])}", "ROLE CURRENT_USER"):
        with connection.cursor() as cursor:
            cursor.execute(f"ALTER {target} SET client_connection_check_interval = '{value}'")
        try:
            assert settings_of_sessions(run) == {value}
        finally:
            with connection.cursor() as cursor:
                cursor.execute(f"ALTER {target} RESET client_connection_check_interval")


def test_sessions_behind_a_pooler_are_left_alone(run: Runner, conninfo: str) -> None:
    if program() is None:
        pytest.skip("no PgBouncer here: 'make pgbouncer' installs it")
    with pgbouncer(conninfo) as parameters:
        changes = {"sslmode": "disable", "gssencmode": "disable"}
        address = {name.upper(): parameters[name] for name in ("host", "port", "user")}
        with settings_of_default(**address, PASSWORD=""):
            assert settings_of_sessions(run, **changes) == {"0"}


@pytest.mark.parametrize("server", ["that refuses it", "that does not know it"])
def test_a_server_without_the_setting_serves_all_the_same(
    run: Runner, server: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """PostgreSQL refuses it on Windows. The process asks for it once, and again in a minute."""
    if server == "that refuses it":
        monkeypatch.setattr(client_checks, "INTERVAL", -2)
    else:
        wrong = client_checks._SET_UNLESS_SET.replace("= 'client", "= 'no such")
        monkeypatch.setattr(client_checks, "_SET_UNLESS_SET", wrong)
    monkeypatch.setattr(client_checks, "_SET", b"to be sent where it is known to be right")
    with caplog.at_level(logging.DEBUG, logger="pgbackend.driver"):
        assert settings_of_sessions(run) == {"0"}
    told = [each for each in caplog.messages if "client_connection_check_interval" in each]
    assert len(told) == (server == "that refuses it")


def test_a_reset_sets_it_without_a_round_trip_of_its_own(run: Runner) -> None:
    with messages(received=True) as exchanged:
        assert settings_of_sessions(run, session_reset="always") == {"500ms"}
    resets, sent = (
        [n for n, message in enumerate(exchanged) if message[0] == "F" and sql in message]
        for sql in ("DISCARD ALL", "SET client_connection")
    )
    assert 2 <= len(resets) == len(sent)
    for reset, setting in zip(resets, sent, strict=True):
        assert all(message[0] == "F" for message in exchanged[reset:setting])


PROCESS = "import psycopg; psycopg.connect().execute('SELECT pg_sleep(60)')"


@pytest.mark.sweep(one_in=2)
@pytest.mark.parametrize("way", ["directly", "through a pooler"])
def test_a_setting_of_the_role_ends_the_statements_of_a_killed_process(
    admin: psycopg.Connection[Any], conninfo: str, way: str
) -> None:
    if way == "through a pooler" and program() is None:
        pytest.skip("no PgBouncer here: 'make pgbouncer' installs it")
    name = "killed"
    active = "query ~ 'pg_sleep' AND state = 'active'"
    admin.execute("ALTER ROLE CURRENT_USER SET client_connection_check_interval = '500ms'")
    try:
        with pgbouncer(conninfo) if way == "through a pooler" else nullcontext() as parameters:
            variables = environment(name)
            if parameters:
                address = {name: parameters[name] for name in ("host", "port", "user")}
            else:
                found = conninfo_to_dict(conninfo)
                address = {name: found[name] for name in ("host", "port", "user") if name in found}
            address["database"] = admin.info.dbname
            variables |= {f"PG{name.upper()}": str(value) for name, value in address.items()}
            variables |= {"PGSSLMODE": "disable", "PGGSSENCMODE": "disable"}
            process = subprocess.Popen([sys.executable, "-c", PROCESS], env=variables)
            try:
                wait_for(lambda: sessions(admin, name, active), "its statement is in flight", 10)
            finally:
                process.kill()
                process.wait()
            wait_for(lambda: not sessions(admin, name, active), "it has ended", SOON)
    finally:
        end_sessions(admin, name)
        admin.execute("ALTER ROLE CURRENT_USER RESET client_connection_check_interval")
