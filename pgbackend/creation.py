"""`DatabaseCreation`: Django's for PostgreSQL; closes the pools before it makes a database."""

from __future__ import annotations

from django.db.backends.postgresql.creation import DatabaseCreation as PostgresDatabaseCreation


class DatabaseCreation(PostgresDatabaseCreation):
    def _execute_create_test_db(self, *args: object, **kwargs: object) -> None:
        # CREATE DATABASE fails while any connection to its template database is open.
        self.connection.close_pool()
        super()._execute_create_test_db(*args, **kwargs)
