"""Makes tenants: schemas with a table of authors each, whose only row names the tenant.

`tenant()` is a query that the ORM compiles. It tells in which schema it ran.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from django.db import connection

from tests.library.models import Author

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
