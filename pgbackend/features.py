"""`DatabaseFeatures`: Django's for PostgreSQL; pgbackend supports all of them."""

from __future__ import annotations

from django.db.backends.postgresql.features import DatabaseFeatures as PostgresDatabaseFeatures


class DatabaseFeatures(PostgresDatabaseFeatures):
    pass
