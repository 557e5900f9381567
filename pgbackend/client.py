"""`DatabaseClient`: PostgreSQL's own, under the name by which packages look for it."""

from __future__ import annotations

from django.db.backends.postgresql.client import DatabaseClient

__all__ = ["DatabaseClient"]
