"""`DatabaseOperations`: Django's for PostgreSQL, with the compilers of pgbackend."""

from __future__ import annotations

from functools import lru_cache

from django.db.backends.postgresql.operations import (
    DatabaseOperations as PostgresDatabaseOperations,
)


@lru_cache(maxsize=4096)
def _quote_name(name: str) -> str:
    return PostgresDatabaseOperations.quote_name(None, name)  # type: ignore[arg-type]


class DatabaseOperations(PostgresDatabaseOperations):
    compiler_module = "pgbackend.compiler"

    #: Cached: it is called for each column of each statement, and depends on the name only.
    quote_name = staticmethod(_quote_name)
