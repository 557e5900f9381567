"""`DatabaseCreation`: Django's for PostgreSQL; closes the pools before it makes a database.

In tests, a replica is a mirror of its primary (Django's ``TEST["MIRROR"]``), without a database of
its own; routers.py then reads from the primary, whose transactions the tests roll back.
"""

from __future__ import annotations

from typing import Any

from django.db import connections
from django.db.backends.postgresql.creation import DatabaseCreation as PostgresDatabaseCreation

from .options import REPLICA_OF
from .replica_settings import IS_MIRRORED


class DatabaseCreation(PostgresDatabaseCreation):
    def __init__(self, connection: Any) -> None:
        super().__init__(connection)
        primary = connection.settings_dict.get("OPTIONS", {}).get(REPLICA_OF)
        test = connection.settings_dict.get("TEST")
        # A wrong primary is refused elsewhere; as a mirror it would hide the alias from the tests.
        is_right = isinstance(primary, str) and primary in {*connections.settings} - {
            connection.alias
        }
        if is_right and test is not None:
            test["MIRROR"] = test.get("MIRROR") or primary

    def _execute_create_test_db(self, *args: object, **kwargs: object) -> None:
        # CREATE DATABASE fails while any connection to its template database is open.
        self.connection.close_pool()
        super()._execute_create_test_db(*args, **kwargs)

    def set_as_test_mirror(self, primary_settings_dict: Any) -> None:
        super().set_as_test_mirror(primary_settings_dict)
        self.connection.settings_dict["TEST"][IS_MIRRORED] = True

    def setup_worker_connection(self, _worker_id: Any) -> None:
        super().setup_worker_connection(_worker_id)
        if self.connection.settings_dict["TEST"].get("MIRROR"):
            self.connection.settings_dict["TEST"][IS_MIRRORED] = True
