"""`DatabaseIntrospection`: PostGIS's own, under the name by which packages look for it."""

from __future__ import annotations

from django.contrib.gis.db.backends.postgis.introspection import (
    PostGISIntrospection as DatabaseIntrospection,
)

__all__ = ["DatabaseIntrospection"]
