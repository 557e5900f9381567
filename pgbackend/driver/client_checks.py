"""Asks PostgreSQL to look whether this process still lives while it executes a statement.

Some servers of requests kill their process without giving its tasks a turn (docs/shutdown.md). The
kernel closes its sockets, but PostgreSQL looks at a socket only when it has something to send: a
statement would go on to its end, and keep the locks of its transaction. With the setting
``client_connection_check_interval`` PostgreSQL looks at the socket while it executes, and ends the
session when the socket is closed.

The setting is sent once a session is open, not as a parameter of the connection: PostgreSQL would
refuse the connection if it did not know the parameter, as PgBouncer does, or if its platform lacks
the system call. It is sent only where nobody else has set it, and where no pooler is in between:
through a pooler it would reach a session that others use.
"""

from __future__ import annotations

import logging
from time import monotonic
from typing import TYPE_CHECKING

import psycopg
from psycopg import generators
from psycopg._encodings import conn_encoding
from psycopg.abc import PQGen
from psycopg.errors import error_from_result
from psycopg.pq import ExecStatus

if TYPE_CHECKING:
    from .pooled import AsyncConnection

logger = logging.getLogger("pgbackend.driver")

_FATAL_ERROR = ExecStatus.FATAL_ERROR
_PIPELINE_SYNC = ExecStatus.PIPELINE_SYNC

#: Milliseconds between two looks. A look is one system call of the server process.
INTERVAL = 500

_SET = b"SET client_connection_check_interval = %d" % INTERVAL

# A pooler gives its clients process ids of its own making. Before PostgreSQL 14 there is no such
# row. Reading pg_settings takes longer than a millisecond: `_due` has the answers.
_SET_UNLESS_SET = """
SELECT set_config(name, %s, false) FROM pg_settings
WHERE name = 'client_connection_check_interval' AND source = 'default' AND pg_backend_pid() = %s
"""

#: Seconds for which an answer is remembered.
REMEMBERED = 60.0

#: Whether sessions of a database, user and server get the setting, and until when this is believed.
_due: dict[tuple[object, ...], tuple[bool, float]] = {}


async def begin(physical: AsyncConnection) -> None:
    """Set it in the new session of `physical`, in one round trip, if nobody else has."""
    pgconn = physical.pgconn
    key = (pgconn.host, pgconn.port, pgconn.db, pgconn.user, pgconn.options)
    is_due, until = _due.get(key, (None, 0.0))
    if monotonic() > until:
        is_due = None
    physical.is_checked_on = False
    if is_due is False:
        return
    try:
        if is_due:
            await physical.execute(_SET, prepare=False)
            physical.is_checked_on = True
        else:
            params = (str(INTERVAL), pgconn.backend_pid)
            cursor = await physical.execute(_SET_UNLESS_SET, params, prepare=False)
            physical.is_checked_on = await cursor.fetchone() is not None
    except psycopg.Error as exc:
        if physical.closed:
            raise
        logger.debug("the server does not set client_connection_check_interval: %s", exc)
    if is_due is None or not physical.is_checked_on:
        _remember(key, is_due=physical.is_checked_on)


def _remember(key: tuple[object, ...], *, is_due: bool) -> None:
    now = monotonic()
    for old, (_, until) in list(_due.items()):
        if now > until:  # users may come and go
            _due.pop(old, None)
    _due[key] = is_due, now + REMEMBERED


async def discard_all(physical: AsyncConnection) -> None:
    """Send ``DISCARD ALL``; if that undoes the setting, set it again in the same round trip."""
    if physical.is_checked_on:
        async with physical.lock:
            await physical.wait(_discard_and_set_gen(physical))
    else:
        await physical.execute("DISCARD ALL", prepare=False)  # prepared, it would forget itself


def _discard_and_set_gen(physical: AsyncConnection) -> PQGen[None]:
    """Send both in a pipeline, each in a transaction of its own; raise the server's error.

    psycopg's own pipeline would log a warning if this generator were closed before its end.
    """
    pgconn = physical.pgconn
    pgconn.enter_pipeline_mode()
    for command in (b"DISCARD ALL", _SET):
        pgconn.send_query_params(command, None)
        pgconn.pipeline_sync()
    yield from generators.send(pgconn)
    ends = 0  # without a result in between: one after each command, more if the link is lost
    syncs = 0
    while syncs < 2:
        result = yield from generators.fetch(pgconn)
        if result is None:
            ends += 1
            if ends > 1:
                raise psycopg.OperationalError("the server closed the connection")
            continue
        ends = 0
        if result.status == _FATAL_ERROR:
            raise error_from_result(result, encoding=conn_encoding(physical))
        syncs += result.status == _PIPELINE_SYNC
    pgconn.exit_pipeline_mode()
    prepared = physical._prepared  # noqa: SLF001
    if prepared._names:  # noqa: SLF001 - as psycopg does
        prepared.clear()
    prepared._to_flush.clear()  # noqa: SLF001 - the server has dropped them all
