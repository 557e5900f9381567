"""A PEP 249 driver for PostgreSQL: psycopg 3, whose waits yield to the event loop.

It knows nothing of Django. `connect()` and the connections of `pool` are green where a greenlet of
the bridge runs under an event loop, and blocking everywhere else. The names of this module are
psycopg's, so it stands in for `psycopg` as the `Database` of a Django backend.
"""

from __future__ import annotations

from psycopg import *  # noqa: F403 - this module is psycopg's PEP 249 face, and more
from psycopg import (
    BINARY,
    NUMBER,
    ROWID,
    STRING,
    Binary,
    DatabaseError,
    DataError,
    Date,
    DateFromTicks,
    Error,
    IntegrityError,
    InterfaceError,
    InternalError,
    NotSupportedError,
    OperationalError,
    ProgrammingError,
    Time,
    TimeFromTicks,
    Timestamp,
    TimestampFromTicks,
    Warning,  # noqa: A004 - PEP 249's name
    apilevel,
    paramstyle,
    threadsafety,
)

from . import versions

versions.check()

from .connection import Connection  # noqa: E402 - what is checked comes first
from .pooled import AsyncConnection  # noqa: E402

connect = Connection.connect
