"""How psycopg turns what the server sends into what Django expects, a little sooner."""

from __future__ import annotations

import functools
from datetime import UTC, tzinfo
from typing import Any

from psycopg import adapters
from psycopg.adapt import AdaptersMap
from psycopg.postgres import types
from psycopg.pq import Format

_TIMESTAMPTZ = types["timestamptz"].oid
_PSYCOPGS: Any = adapters.get_loader(_TIMESTAMPTZ, Format.TEXT)


@functools.lru_cache
def with_fast_moments(template: AdaptersMap, timezone: tzinfo) -> AdaptersMap:
    """Return Django's `template`, with a loader of moments that does not repeat what is done.

    Django puts its `timezone` into each moment that psycopg has loaded, in Python. Where both are
    UTC it is there already, and psycopg's loader, which is C code, may do it alone.
    """
    if timezone is not UTC:
        return template
    djangos: Any = template.get_loader(_TIMESTAMPTZ, Format.TEXT)

    class UTCLoader(djangos):  # type: ignore[misc]
        def __new__(cls, oid: int, context: Any = None) -> Any:
            # The session's, which may have been set since it was prepared.
            if _timezone_of(context) == b"UTC":
                return _PSYCOPGS(oid, context)
            return djangos(oid, context)

    fast = AdaptersMap(template)
    fast.register_loader("timestamptz", UTCLoader)
    return fast


def _timezone_of(context: Any) -> bytes | None:
    connection = None if context is None else context.connection
    if connection is None:
        return None
    zone: bytes | None = connection.pgconn.parameter_status(b"TimeZone")
    return zone
