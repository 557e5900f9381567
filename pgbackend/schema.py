"""`DatabaseSchemaEditor`: PostgreSQL's own, under the name by which packages look for it."""

from __future__ import annotations

from django.db.backends.postgresql.schema import DatabaseSchemaEditor

__all__ = ["DatabaseSchemaEditor"]
