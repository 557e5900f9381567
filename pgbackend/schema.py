"""`DatabaseSchemaEditor`: Django's for PostgreSQL; leases a connection to quote values."""

from __future__ import annotations

from typing import Any

from django.db.backends.postgresql.schema import DatabaseSchemaEditor as PostgresSchemaEditor


class DatabaseSchemaEditor(PostgresSchemaEditor):
    connection: Any

    def quote_value(self, value: object) -> str:
        # Django's method needs `connection.connection`, for the types that are registered on it. In
        # green code outside of a transaction that is None between statements: lease a connection.
        if self.connection.connection is not None or self.connection.async_session() is None:
            return super().quote_value(value)
        with self.connection.backend_statement(), self.connection.cursor():
            return super().quote_value(value)
