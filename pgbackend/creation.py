"""`DatabaseCreation`: PostgreSQL's; the pools let go of a database before it is dropped."""

from __future__ import annotations

from django.db.backends.postgresql.creation import DatabaseCreation as PostgresDatabaseCreation


class DatabaseCreation(PostgresDatabaseCreation):
    def _execute_create_test_db(self, *args: object, **kwargs: object) -> None:
        # CREATE DATABASE fails while anybody is connected to its template.
        self.connection.close_pool()
        super()._execute_create_test_db(*args, **kwargs)
