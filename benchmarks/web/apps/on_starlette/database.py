"""Tells each driver where the database is, in the driver's own terms."""

from __future__ import annotations

from typing import Any

from benchmarks.web.apps import given

POOL = given.stack()["pool"]


def credentials(name_of_database: str) -> dict[str, Any]:
    """Return the known ones of host, port, user, password and database."""
    told = given.database()
    found = {
        "host": told["HOST"],
        "port": int(told["PORT"]) if told["PORT"] else None,
        "user": told["USER"],
        "password": told["PASSWORD"],
        name_of_database: told["NAME"],
        **told.get("OPTIONS", {}),
    }
    return {key: value for key, value in found.items() if value}
