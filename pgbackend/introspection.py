"""`DatabaseIntrospection`: PostgreSQL's own, under the name by which packages look for it."""

from __future__ import annotations

from django.db.backends.postgresql.introspection import DatabaseIntrospection

__all__ = ["DatabaseIntrospection"]
