"""`DatabaseOperations`: PostGIS's, compiled by pgbackend's compilers."""

from __future__ import annotations

from django.contrib.gis.db.backends.postgis.operations import PostGISOperations

from pgbackend.operations import DatabaseOperations as LeasedDatabaseOperations


class DatabaseOperations(PostGISOperations, LeasedDatabaseOperations):
    pass
