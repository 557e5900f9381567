"""`DatabaseOperations`: PostgreSQL's, compiled by pgbackend's compilers."""

from __future__ import annotations

from django.db.backends.postgresql.operations import (
    DatabaseOperations as PostgresDatabaseOperations,
)


class DatabaseOperations(PostgresDatabaseOperations):
    compiler_module = "pgbackend.compiler"
