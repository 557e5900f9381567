"""`DatabaseClient`: Django's class for PostgreSQL; packages import it from here by name."""

from __future__ import annotations

from django.db.backends.postgresql.client import DatabaseClient

__all__ = ["DatabaseClient"]
