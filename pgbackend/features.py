"""`DatabaseFeatures`: PostgreSQL's, with nothing taken away."""

from __future__ import annotations

from django.db.backends.postgresql.features import DatabaseFeatures as PostgresDatabaseFeatures


class DatabaseFeatures(PostgresDatabaseFeatures):
    pass
