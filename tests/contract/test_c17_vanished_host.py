"""Tests C17 with a host that vanishes, in a network namespace, while its pool is full."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import psycopg
import pytest
from django.db import DatabaseError, connection

import pgbackend
from pgbackend import aio
from tests.conftest import Runner
from tests.library.models import Tag
from tests.support.fixtures import settings_of_default
from tests.support.link import Link
from tests.support.vanishing import VanishingHost, vanishing_host

#: The settings that docs/settings.md names for a shorter silence.
SHORTER = {
    "keepalives_idle": 3,
    "keepalives_interval": 1,
    "keepalives_count": 2,
    "tcp_user_timeout": 5000,
    "connect_timeout": 2,
}


@pytest.fixture
def host() -> Iterator[VanishingHost]:
    with vanishing_host() as made:
        yield made


_SLEEPING = "query = 'SELECT pg_sleep(100)'"


def sleep() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_sleep(100)")


def test_the_shorter_settings_are_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "settings.md").read_text()
    assert str(SHORTER).replace("'", '"') in " ".join(page.split())


@pytest.mark.slow
@pytest.mark.parametrize(("options", "limit"), [({}, 35.0), (SHORTER, 10.0)], ids=["own", "short"])
def test_requests_are_served_again_after_a_host_has_vanished(
    run: Runner,
    conninfo: str,
    admin: psycopg.Connection[Any],
    host: VanishingHost,
    options: dict[str, Any],
    limit: float,
) -> None:
    """The first of two hosts vanishes with ten statements in flight, which fill the pool."""

    async def main() -> None:
        sleepers = [asyncio.create_task(aio.run(sleep)) for _ in range(10)]
        while first.attempts < 10 or pgbackend.statistics()[0].leased < 10:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        host.vanish()
        began = monotonic()
        while True:
            try:
                await Tag.objects.acount()
                break
            except DatabaseError:
                assert monotonic() - began < limit
        assert monotonic() - began < limit
        done = await asyncio.gather(*sleepers, return_exceptions=True)
        assert all(isinstance(exc, DatabaseError) for exc in done)
        assert second.attempts

    first, second = Link(conninfo, host.listen()), Link(conninfo)
    given = {"sslmode": "disable", "gssencmode": "disable", "pool": {}, **options}
    hosts = {"HOST": f"{host.address},127.0.0.1", "PORT": f"{first.port},{second.port}"}
    try:
        with settings_of_default(**hosts, OPTIONS=given):
            run(main(), timeout=60)
    finally:
        first.close()  # but its server has been told of no end
        admin.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {_SLEEPING}")
        second.close()
