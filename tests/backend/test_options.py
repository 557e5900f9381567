"""Tests that a wrong setting fails at once, and that the error says what to set."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.db.utils import OperationalError

import pgbackend
from pgbackend import aio, embedded
from tests.conftest import Runner, wait_for
from tests.library.models import Tag
from tests.support.fixtures import settings_of_default
from tests.support.passwords import make_careful_role


def failure(run: Runner, **changes: Any) -> tuple[BaseException, float]:
    """Return the exception of a first query under these settings, and its time in seconds."""

    async def main() -> BaseException:
        try:
            await Tag.objects.acount()
        except Exception as exc:
            return exc
        raise AssertionError("no error")

    with settings_of_default(**changes):
        started = time.monotonic()
        exc = run(main())
        return exc, time.monotonic() - started


def test_an_unknown_database_fails_with_the_servers_message(run: Runner) -> None:
    exc, seconds = failure(run, NAME="no_such_database")
    assert isinstance(exc, OperationalError)
    assert 'database "no_such_database" does not exist' in str(exc)
    assert exc.__cause__ is not None
    assert seconds < 1


@pytest.mark.sweep(one_in=2)
def test_a_wrong_password_fails_with_the_servers_message(run: Runner, password_server: str) -> None:
    given = embedded.database_settings(password_server)
    exc, seconds = failure(run, **{**given, "PASSWORD": "wr0ng"})
    assert isinstance(exc, OperationalError)
    assert "password authentication failed" in str(exc)
    assert "wr0ng" not in repr(exc) + str(exc) + repr(exc.__cause__)
    assert seconds < 1


@pytest.fixture
def password_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Start a server of this test's own, with a role that must give a password."""
    monkeypatch.delenv("DATABASE_URL")
    with embedded.server() as server, psycopg.connect(server.url, autocommit=True) as admin:
        make_careful_role(admin)
        before = _load_time(server.url)
        admin.execute("SELECT pg_reload_conf()")
        wait_for(lambda: _load_time(server.url) != before, "the postmaster has read its rules")
        url = urlsplit(server.url)
        yield urlunsplit(url._replace(netloc=f"careful:right@{url.netloc.rpartition('@')[2]}"))


def _load_time(url: str) -> Any:
    """Return when the postmaster last read its files, as a new session has it."""
    with psycopg.connect(url) as connection:
        return connection.execute("SELECT pg_conf_load_time()").fetchone()


def test_a_misspelt_option_of_libpq_fails_with_its_name(run: Runner) -> None:
    exc, seconds = failure(run, OPTIONS={"conect_timeout": 3})
    assert isinstance(exc, ImproperlyConfigured)
    assert "'conect_timeout'. Did you mean 'connect_timeout'?" in str(exc)
    assert seconds < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": {"max_sise": 3}}, r"no option 'max_sise'. Did you mean 'max_size'\?"),
        ({"pool": {"max_size": "3"}}, r"\['max_size'\] is '3'. Set it to a whole number"),
        ({"pool": {"max_size": -1}}, "not negative"),
        ({"pool": {"min_size": 5, "max_size": 2}}, "at least min_size"),
        ({"pool": {"num_workers": 0}}, "at least 1"),
        ({"pool": {"timeout": None}}, "a number of seconds"),
        ({"pool": {"configure": print}}, "no option 'configure'"),
        ({"pool": 3}, "Set it to True, or to a dictionary"),
        ({"pool": {"connection_class": int}}, "pgbackend.driver.Connection"),
        ({"session_reset": "sometimes"}, "'always', 'dirty', 'never'"),
        ({"isolation_level": 999}, "Invalid transaction isolation level 999"),
    ],
)
def test_wrong_options_name_the_setting_and_the_cure(
    run_once: Runner, options: dict[str, Any], message: str
) -> None:
    given = connections.settings["default"]["OPTIONS"]
    exc, seconds = failure(run_once, OPTIONS={**given, "pool": {}, **options})
    assert seconds < 1
    assert isinstance(exc, ImproperlyConfigured), repr(exc)
    with pytest.raises(ImproperlyConfigured, match=message):
        raise exc


def test_no_pool_option_is_needed(run: Runner) -> None:
    given = {k: v for k, v in connections.settings["default"]["OPTIONS"].items() if k != "pool"}

    async def main() -> pgbackend.PoolStatistics:
        await Tag.objects.acount()
        return pgbackend.statistics()[0]

    with settings_of_default(OPTIONS=given):
        stats = run(main())
    assert (stats.min_size, stats.max_size) == (0, 10)


def test_an_exhausted_pool_names_the_holders_and_the_setting(run: Runner) -> None:
    given = connections.settings["default"]["OPTIONS"]

    async def hold(held: asyncio.Event, done: asyncio.Event) -> None:
        async with pgbackend.pinned():
            await Tag.objects.acount()
            held.set()
            await done.wait()

    async def main() -> None:
        held, done = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(hold(held, done), name="the hoarder")
        await held.wait()
        with pytest.raises(OperationalError) as caught:
            await Tag.objects.acount()
        done.set()
        await task
        for part in ("'default'", "1 of 1 in use", "the hoarder", "max_size", "DATABASES"):
            assert part in str(caught.value)
        assert await Tag.objects.acount() == 0

    with settings_of_default(OPTIONS={**given, "pool": {"max_size": 1, "timeout": 0.1}}):
        run(main())


def test_other_options_are_those_of_djangos_backend(run: Runner, admin: Any) -> None:
    from django.db import connection

    admin.execute("DROP ROLE IF EXISTS assumed")
    admin.execute("CREATE ROLE assumed")
    given = connections.settings["default"]["OPTIONS"]
    options = {
        **given,
        "isolation_level": 4,  # psycopg.IsolationLevel.SERIALIZABLE
        "assume_role": "assumed",
        "server_side_binding": True,
        "prepare_threshold": 0,
    }

    def look() -> None:
        from django.db import transaction

        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute("SELECT current_user, current_setting('transaction_isolation')")
            assert cursor.fetchone() == ("assumed", "serializable")
            cursor.execute("SELECT count(*) FROM pg_prepared_statements")
            assert cursor.fetchone()[0] > 0
        with connection.cursor() as cursor:
            cursor.execute("SELECT current_user, current_setting('TimeZone')")
            assert cursor.fetchone() == ("assumed", "UTC"), "a reset session is prepared again"

    try:
        with settings_of_default(OPTIONS=options):
            run(aio.run(look))
    finally:
        admin.execute("DROP ROLE assumed")
