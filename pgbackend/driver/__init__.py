"""A PEP 249 driver for PostgreSQL: psycopg 3, whose waits yield to the event loop.

The driver knows nothing of Django. While one of its connections waits for the server, the event
loop runs other tasks if the caller is in a greenlet of the bridge; otherwise the thread blocks.
This module has all the names of `psycopg`, so a Django backend can use it as its `Database`.
"""

from __future__ import annotations

from psycopg import *  # noqa: F403 - users of psycopg find the same names here
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

from .connection import Connection  # noqa: E402 - the check comes first
from .pooled import AsyncConnection  # noqa: E402

connect = Connection.connect
