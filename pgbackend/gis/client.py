"""pgbackend's own module, under the name by which packages look for it."""

from __future__ import annotations

from pgbackend.client import DatabaseClient

__all__ = ["DatabaseClient"]
