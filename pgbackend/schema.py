"""`DatabaseSchemaEditor`: PostgreSQL's, with a connection at hand where values are quoted."""

from __future__ import annotations

from typing import Any

from django.db.backends.postgresql.schema import DatabaseSchemaEditor as PostgresSchemaEditor


class DatabaseSchemaEditor(PostgresSchemaEditor):
    connection: Any

    def quote_value(self, value: object) -> str:
        # Django asks `connection.connection` for the types that are registered on it. Before the
        # first statement, and between two of them outside of a transaction, there is none here.
        if self.connection.connection is not None or self.connection.async_session() is None:
            return super().quote_value(value)
        with self.connection.backend_statement(), self.connection.cursor():
            return super().quote_value(value)
