"""`DatabaseSchemaEditor`: PostGIS's, with a connection at hand where values are quoted."""

from __future__ import annotations

from django.contrib.gis.db.backends.postgis.schema import PostGISSchemaEditor

from pgbackend.schema import DatabaseSchemaEditor as LeasedDatabaseSchemaEditor


class DatabaseSchemaEditor(PostGISSchemaEditor, LeasedDatabaseSchemaEditor):
    pass
