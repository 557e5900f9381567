"""Measures the cost of tenants: ``python benchmarks/tenants.py``.

The work of a request in green code is one statement, ten statements, or ten in a transaction. It is
done without tenants, with tenants by schema (the package django-tenants, as released, and with its
setting `TENANT_LIMIT_SET_CALLS`) and with tenants by row-level security, whose setting belongs to
a transaction: there the first two kinds of work are in one, too. Both are also done with the tenant
declared by `pgbackend.session()`; requests of two tenants take turns then, so that connections
change theirs. The output is microseconds a request, and the ratio to the same work without tenants,
from this run. The rounds take turns, and the best of them counts. The program starts a server of
its own, or uses that of ``DATABASE_URL``.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any

import django
import psycopg
from django.conf import settings

sys.path.insert(0, str(Path(__file__).parents[1]))

import pgbackend
from pgbackend import embedded

ROUNDS = 7
REQUESTS = 100
TASKS = 4
TENANT, OTHER = "tenant7", "tenant8"
#: The database and its owner. Row-level security applies to the owner; to a superuser it would not.
NAME = "pgbackend_tenants"
PREPARE = """
CREATE SCHEMA tenant7;
CREATE SCHEMA tenant8;
CREATE TABLE notes (id int PRIMARY KEY, tenant text NOT NULL, text text NOT NULL);
INSERT INTO notes SELECT number, 'tenant7', 'text' FROM generate_series(1, 100) AS number;
CREATE TABLE tenant7.notes (LIKE notes INCLUDING ALL);
INSERT INTO tenant7.notes SELECT * FROM notes;
CREATE TABLE tenant8.notes (LIKE notes INCLUDING ALL);
INSERT INTO tenant8.notes SELECT id, 'tenant8', text FROM notes;
CREATE TABLE notes_by_row (LIKE notes INCLUDING DEFAULTS, PRIMARY KEY (tenant, id));
INSERT INTO notes_by_row SELECT * FROM tenant7.notes UNION ALL SELECT * FROM tenant8.notes;
ALTER TABLE notes_by_row ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
CREATE POLICY of_tenant ON notes_by_row USING (tenant = current_setting('app.tenant', true));
"""


@contextmanager
def database(url: str) -> Iterator[str]:
    """Make a database with a row for the tenant of each way, and drop it afterwards."""
    with psycopg.connect(url, autocommit=True) as session:
        session.execute(f'DROP DATABASE IF EXISTS "{NAME}" WITH (FORCE)')
        session.execute(f'DROP ROLE IF EXISTS "{NAME}"')
        session.execute(f"CREATE ROLE \"{NAME}\" LOGIN PASSWORD '{NAME}'")
        session.execute(f'CREATE DATABASE "{NAME}" OWNER "{NAME}"')
        made = psycopg.conninfo.make_conninfo(url, dbname=NAME, user=NAME, password=NAME)
        try:
            with psycopg.connect(made, autocommit=True) as owner:
                owner.execute(PREPARE)
            yield made
        finally:
            session.execute(f'DROP DATABASE "{NAME}" WITH (FORCE)')
            session.execute(f'DROP ROLE "{NAME}"')


def configure(conninfo: str) -> None:
    given = psycopg.conninfo.conninfo_to_dict(conninfo)
    names = {"host": "HOST", "port": "PORT", "user": "USER", "password": "PASSWORD"}
    params: dict[str, Any] = {names[key]: value for key, value in given.items() if key in names}
    params |= {"NAME": NAME, "OPTIONS": {"pool": {"max_size": TASKS}}}
    settings.configure(
        DATABASES={
            "default": {**params, "ENGINE": "django_tenants.postgresql_backend"},
            "without": {**params, "ENGINE": "pgbackend"},
        },
        DATABASE_ROUTERS=["django_tenants.routers.TenantSyncRouter"],
        INSTALLED_APPS=["django_tenants", "django.contrib.contenttypes"],
        ORIGINAL_BACKEND="pgbackend",
        SHARED_APPS=["django_tenants", "django.contrib.contenttypes"],
        TENANT_APPS=["django.contrib.contenttypes"],
        TENANT_DOMAIN_MODEL="django_tenants.Domain",
        TENANT_LIMIT_SET_CALLS=False,
        TENANT_MODEL="django_tenants.Tenant",
    )
    django.setup()


def model_of(table: str) -> Any:
    from django.db import models

    def text() -> models.TextField[str, str]:
        return models.TextField()

    meta = type("Meta", (), {"app_label": "tenants", "db_table": table, "managed": False})
    fields = {"tenant": text(), "text": text(), "id": models.IntegerField(primary_key=True)}
    return type(table.title(), (models.Model,), {**fields, "Meta": meta, "__module__": __name__})


class Ways:
    """Does a request's work in each way: a number of statements, in a block or not."""

    def __init__(self) -> None:
        self.notes, self.notes_by_row = model_of("notes"), model_of("notes_by_row")
        self.tenants = itertools.cycle((TENANT, OTHER))

    def without(self, count: int, in_block: bool) -> None:
        self._read(self.notes, "without", count, in_block)

    def by_schema(self, count: int, in_block: bool) -> None:
        from django.db import connection

        connection.set_schema(TENANT)
        self._read(self.notes, "default", count, in_block)

    def by_row(self, count: int, in_block: bool) -> None:
        from django.db import connections, transaction

        with transaction.atomic("without"):
            with connections["without"].cursor() as cursor:
                cursor.execute("SELECT set_config('app.tenant', %s, true)", [TENANT])
            self._read(self.notes_by_row, "without", count, False)

    def declared_schema(self, count: int, in_block: bool) -> None:
        tenant = next(self.tenants)
        with pgbackend.session("without", search_path=tenant):
            self._read(self.notes, "without", count, in_block, tenant)

    def declared_row(self, count: int, in_block: bool) -> None:
        tenant = next(self.tenants)
        with pgbackend.session("without", **{"app.tenant": tenant}):
            self._read(self.notes_by_row, "without", count, in_block, tenant)

    def _read(
        self, model: Any, alias: str, count: int, in_block: bool, tenant: str = TENANT
    ) -> None:
        from django.db import transaction

        with transaction.atomic(alias) if in_block else nullcontext():
            for number in range(1, count + 1):
                assert model.objects.using(alias).get(pk=number).tenant == tenant


#: The package reads this setting with each cursor.
LIMITED = "by schema, TENANT_LIMIT_SET_CALLS"
WORK = {
    "one statement": (1, False),
    "ten statements": (10, False),
    "ten statements in a transaction": (10, True),
}


async def one_round(way: Callable[[int, bool], None], work: tuple[int, bool]) -> float:
    """Return the seconds that one request takes."""
    from pgbackend import aio

    async def client() -> None:
        for _ in range(REQUESTS // TASKS):
            await asyncio.create_task(aio.run(way, *work))

    started = perf_counter()
    await asyncio.gather(*(client() for _ in range(TASKS)))
    return (perf_counter() - started) / REQUESTS


async def measure(ways: dict[str, Any], work: tuple[int, bool]) -> dict[str, float]:
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(ROUNDS):
        for name, way in ways.items():
            settings.TENANT_LIMIT_SET_CALLS = name == LIMITED
            best[name] = min(best[name], await one_round(way, work))
    return best


def main() -> None:
    with embedded.server() as server, database(server.url) as conninfo:
        configure(conninfo)
        ways = Ways()
        named = {
            "no tenants": ways.without,
            "by schema, declared": ways.declared_schema,
            "by schema": ways.by_schema,
            LIMITED: ways.by_schema,
            "by row-level security, declared": ways.declared_row,
            "by row-level security": ways.by_row,
        }
        print(f"microseconds a request, {TASKS} at a time on a pool of {TASKS}")
        for title, work in WORK.items():
            best = asyncio.run(measure(named, work))
            print(f"{title}:")
            for name, seconds in best.items():
                ratio = seconds / best["no tenants"]
                print(f"  {name:34} {seconds * 1e6:6.0f} µs ({ratio:.2f})")
        from django.db import connections

        for each in connections.all():
            each.close_pool()


if __name__ == "__main__":
    main()
