"""`DatabaseWrapper`: PostGIS's, on connections that a task leases."""

from __future__ import annotations

from typing import Any

from django.contrib.gis.db.backends.postgis.base import DatabaseWrapper as PostGISDatabaseWrapper

from pgbackend.base import DatabaseWrapper as LeasedDatabaseWrapper

from .features import DatabaseFeatures
from .introspection import DatabaseIntrospection
from .operations import DatabaseOperations
from .schema import DatabaseSchemaEditor


class DatabaseWrapper(PostGISDatabaseWrapper, LeasedDatabaseWrapper):
    # PostGIS's comes first: what it does to a new connection, and in `prepare_database()`, calls
    # super(), and finds ours there.
    SchemaEditorClass = DatabaseSchemaEditor
    features_class = DatabaseFeatures
    introspection_class = DatabaseIntrospection
    ops_class = DatabaseOperations

    def register_geometry_adapters(self, pg_connection: Any, clear_caches: bool = False) -> None:
        super().register_geometry_adapters(pg_connection, clear_caches)
        if clear_caches:
            # The extension is new, and PostGIS's types are unknown to connections made before it.
            self.close_pool()
