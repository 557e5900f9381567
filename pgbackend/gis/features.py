"""`DatabaseFeatures`: PostGIS's, with nothing taken away."""

from __future__ import annotations

from django.contrib.gis.db.backends.postgis.features import (
    DatabaseFeatures as PostGISDatabaseFeatures,
)

from pgbackend.features import DatabaseFeatures as LeasedDatabaseFeatures


class DatabaseFeatures(PostGISDatabaseFeatures, LeasedDatabaseFeatures):
    pass
