"""Makes statements whose time on the server is known, and the pools to measure with."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import django
import psycopg
from django.conf import settings

from pgbackend import embedded, metrics

#: A view, so that an ordinary statement of the ORM sleeps.
_PREPARE = """
DROP SCHEMA IF EXISTS pgbackend_connections CASCADE;
CREATE SCHEMA pgbackend_connections;
CREATE TABLE pgbackend_connections.durations (id int PRIMARY KEY, seconds float8 NOT NULL);
CREATE VIEW pgbackend_connections.naps AS
    SELECT id, seconds, pg_sleep(seconds)::text AS slept FROM pgbackend_connections.durations;
"""


@contextmanager
def prepared(url: str) -> Iterator[str]:
    """Make the view in a schema of its own; yield the server's version; drop the schema."""
    with psycopg.connect(url, autocommit=True) as session:
        session.execute(_PREPARE)
        try:
            yield str(session.info.parameter_status("server_version"))
        finally:
            session.execute("DROP SCHEMA pgbackend_connections CASCADE")


def set_durations(url: str, seconds: Sequence[float]) -> None:
    """Make the statements, numbered from 1, take these times on the server."""
    with psycopg.connect(url, autocommit=True) as session, session.cursor() as cursor:
        cursor.execute("TRUNCATE pgbackend_connections.durations")
        cursor.executemany(
            "INSERT INTO pgbackend_connections.durations VALUES (%s, %s)", enumerate(seconds, 1)
        )


def alias_of(size: int) -> str:
    return f"pool{size}"


def configure(url: str, sizes: Iterable[int]) -> None:
    """Configure Django with a database alias for each size of a pool."""
    given = embedded.database_settings(url)
    options = given.pop("OPTIONS", {})

    def database(size: int) -> dict[str, Any]:
        pool = {"min_size": size, "max_size": size, "timeout": 600}
        return {**given, "ENGINE": "pgbackend", "OPTIONS": {**options, "pool": pool}}

    databases = {alias_of(size): database(size) for size in sizes}
    settings.configure(DATABASES={"default": database(1), **databases}, INSTALLED_APPS=[])
    django.setup()


@functools.cache
def model() -> Any:
    """Return the model of the view."""
    from django.db import models

    class Nap(models.Model):
        id = models.IntegerField(primary_key=True)
        seconds = models.FloatField()
        slept = models.TextField()

        class Meta:
            app_label = "connections"
            managed = False
            db_table = '"pgbackend_connections"."naps"'

        def __str__(self) -> str:
            return str(self.seconds)

    return Nap


def nap(alias: str, number: int) -> None:
    """Run the statement of this number."""
    model().objects.using(alias).get(pk=number)


async def until_open(alias: str) -> None:
    """Wait until the pool has opened the connections that it began to open."""
    while any(  # noqa: ASYNC110 - the pool tells nobody when it opens a connection
        pool.size - pool.leased - pool.idle for pool in metrics.statistics(alias)
    ):
        await asyncio.sleep(0.01)
