"""Tests that timestamps are loaded as Django loads them, whatever the time zones are."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from django.db import DataError, connection, connections
from django.db.backends.postgresql.psycopg_any import BaseTzLoader, get_adapters_template
from django.db.models.expressions import RawSQL
from psycopg.postgres import types
from psycopg.pq import Format

import pgbackend
from pgbackend.adapters import prepare_template
from tests.conftest import Runner
from tests.library.models import Author

OID = types["timestamptz"].oid
MOMENTS = [
    *("2026-01-02 03:04:05.678901+00", "1999-12-31 23:59:59-08", "0001-01-02 00:00:00+00"),
    *("9999-12-31 23:59:59+00", "infinity", "-infinity", "0044-03-15 00:00:00 BC", "10000-01-01"),
]


def load(moment: str) -> Any:
    """Return a timestamp as a query of the ORM loads it, and as a raw cursor does."""
    found = []
    try:
        asked = Author.objects.annotate(at=RawSQL("%s::timestamptz", (moment,)))
        found.append(asked.get().at)
        with connection.cursor() as cursor:
            cursor.execute("SELECT %s::timestamptz", (moment,))
            found.append(cursor.fetchone()[0])
    except DataError as exc:
        return str(exc)
    assert found[0] == found[1]
    assert found[0].tzinfo is found[1].tzinfo
    return repr(found[0])


def with_djangos_loader() -> list[Any]:
    """Load the same in a sync context, with Django's own loader on the connection."""
    connection.ensure_connection()
    adapters = connection.connection.adapters
    fast = adapters.get_loader(OID, Format.TEXT)
    (djangos,) = (cls for cls in fast.__bases__ if issubclass(cls, BaseTzLoader))
    assert djangos.__module__.startswith("django.")
    adapters.register_loader("timestamptz", djangos)
    try:
        return [load(moment) for moment in MOMENTS]
    finally:
        adapters.register_loader("timestamptz", fast)


@pytest.mark.parametrize("zone", ["UTC", "Etc/UTC", "Asia/Bangkok", "America/New_York"])
def test_moments_are_djangos_whatever_the_sessions_zone(run: Runner, zone: str) -> None:
    def loaded() -> list[Any]:
        with pgbackend.pinned(), connection.cursor() as cursor:
            cursor.execute("SELECT set_config('TimeZone', %s, false)", (zone,))
            try:
                return [load(moment) for moment in MOMENTS]
            finally:
                cursor.execute("SET TIME ZONE 'UTC'")

    Author.objects.create(name="x")
    with connection.cursor() as cursor:
        cursor.execute("SELECT set_config('TimeZone', %s, false)", (zone,))
        expected = with_djangos_loader()
        cursor.execute("SET TIME ZONE 'UTC'")
    assert loaded() == expected
    assert run.green(loaded) == expected
    assert len(set(expected)) >= 5


def test_a_moment_in_utc_has_pythons_utc(run: Runner) -> None:
    Author.objects.create(name="x")
    at = datetime(2026, 1, 2, tzinfo=UTC)

    def loaded() -> datetime:
        return Author.objects.annotate(at=RawSQL("%s::timestamptz", (at,))).get().at

    for found in (loaded(), run.green(loaded)):
        assert found == at
        assert found.tzinfo is UTC


@pytest.mark.parametrize("zone", [None, ZoneInfo("UTC"), ZoneInfo("Asia/Bangkok")])
def test_elsewhere_the_loader_is_djangos(zone: Any) -> None:
    template = get_adapters_template(zone is not None, zone)
    djangos = template.get_loader(OID, Format.TEXT)
    prepare_template(template, zone)
    assert template.get_loader(OID, Format.TEXT) is djangos
    assert connections["default"].timezone is UTC
