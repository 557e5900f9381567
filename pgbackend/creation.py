"""`DatabaseCreation`: PostgreSQL's; the pools let go of a database before it is dropped."""

from __future__ import annotations

import gc
from typing import Any

from django.db.backends.postgresql.creation import DatabaseCreation as PostgresDatabaseCreation


class DatabaseCreation(PostgresDatabaseCreation):
    def _execute_create_test_db(self, *args: Any, **kwargs: Any) -> None:
        # CREATE DATABASE fails while anybody is connected to its template.
        self.connection.close_pool()
        super()._execute_create_test_db(*args, **kwargs)

    def _destroy_test_db(self, *args: Any, **kwargs: Any) -> None:
        # A task that a test has left behind, with its cursor in a cycle of references, holds its
        # connection for as long as that is not collected; nor can a database be dropped then.
        gc.collect()
        super()._destroy_test_db(*args, **kwargs)
