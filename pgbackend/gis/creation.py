"""pgbackend's own module, under the name by which packages look for it."""

from __future__ import annotations

from pgbackend.creation import DatabaseCreation

__all__ = ["DatabaseCreation"]
