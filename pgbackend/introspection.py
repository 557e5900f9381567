"""`DatabaseIntrospection`: Django's class for PostgreSQL; packages import it from here."""

from __future__ import annotations

from django.db.backends.postgresql.introspection import DatabaseIntrospection

__all__ = ["DatabaseIntrospection"]
