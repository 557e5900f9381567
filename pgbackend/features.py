"""`DatabaseFeatures`: Django's for PostgreSQL; nothing differs, for pgbackend supports them all."""

from __future__ import annotations

from django.db.backends.postgresql.features import DatabaseFeatures as PostgresDatabaseFeatures


class DatabaseFeatures(PostgresDatabaseFeatures):
    pass
