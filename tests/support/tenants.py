"""Makes tenants: schemas with a table of authors each, whose only row names the tenant.

`tenant()` is a query that the ORM compiles. It tells in which schema it ran.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.db import connection, connections, transaction

from tests.conftest import Runner
from tests.library.models import Author

Body = Callable[[], Any]

#: The tenants, and their schemas; the first name is that of no tenant.
OUTSIDE = "outside"
TENANTS = ("one", "two", "three")


def make_schema(name: str, *, row: str) -> None:
    """Make the schema `name`, with a table of authors of which the only one is called `row`."""
    with connection.cursor() as cursor:
        cursor.execute(f'CREATE SCHEMA "{name}"')
        cursor.execute(
            f'CREATE TABLE "{name}".library_author (LIKE public.library_author INCLUDING ALL)'
        )
        cursor.execute(f'INSERT INTO "{name}".library_author (id, name) VALUES (1, %s)', [row])


@pytest.fixture
def tenants(transactional_db: Any) -> Iterator[tuple[str, ...]]:
    """Make the schemas of `TENANTS`, and a row of the schema ``public``; return the tenants."""
    for name in TENANTS:
        make_schema(name, row=name)
    Author.objects.create(id=1, name=OUTSIDE)
    yield TENANTS
    with connection.cursor() as cursor:
        for name in TENANTS:
            cursor.execute(f'DROP SCHEMA "{name}" CASCADE')


def tenant() -> str:
    """Return the tenant in whose schema a query of the ORM finds its row."""
    return Author.objects.get(pk=1).name


def look(name: str = "app.tenant") -> Any:
    """Return the value of a setting; "" and None, of a name that is not set, are the same."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT current_setting(%s, true)", [name])
        return cursor.fetchone()[0] or None


@pytest.fixture(params=["sync", "green", "in atomic(), sync", "in atomic(), green", "in a thread"])
def do(request: pytest.FixtureRequest, run_once: Runner) -> Callable[[Body], Any]:
    """Return a function that calls another: in sync code, in green code, in a transaction."""

    def in_atomic(body: Body) -> Any:
        with transaction.atomic():
            return body()

    def in_thread(body: Body) -> Any:
        try:
            return body()
        finally:
            connections.close_all()

    return {
        "sync": lambda body: body(),
        "green": run_once.green,
        "in atomic(), sync": in_atomic,
        "in atomic(), green": lambda body: run_once.green(in_atomic, body),
        "in a thread": lambda body: run_once(sync_to_async(in_thread)(body)),
    }[request.param]
