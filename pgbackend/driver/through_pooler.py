"""Statements that a transaction pooler before PostgreSQL forbids, and what is done instead.

A transaction pooler (PgBouncer's mode ``transaction``, RDS Proxy, Supavisor, Neon) may serve each
transaction of one connection by another server session. So nothing may depend on the session:

- settings are set with ``SET LOCAL``, in each transaction anew: Note [Declared settings] in
  session_settings.py;
- the time zone is a parameter of the connection, which poolers take over (time_zones.py);
- prepared statements are never dropped all at once (`deallocates()`);
- a statement that is known to change its session, or to need it afterwards, is refused with the
  cure, since the change would reach other clients, and be missing here (`check_statement()`).
"""

from __future__ import annotations

import re
from typing import Any

from psycopg import capabilities
from psycopg import errors as e
from psycopg.abc import Query

from .session_settings import text_of
from .vouching import COMMENT, is_vouched

#: The pooler's mode that this module is about, as `connect(pooler=...)` and OPTIONS name it.
TRANSACTION = "transaction"

# --- Statements ---

_START = rf"(?:\s|{COMMENT}|--[^\r\n]*\n)*"
_LOCK = (
    "it takes an advisory lock of the session: use pg_advisory_xact_lock() in a transaction, whose "
    "end releases the lock"
)
_SETTING = (
    "it changes settings of the session: declare them with pgbackend.session(), or use SET LOCAL "
    "in a transaction"
)
_PREPARED = (
    "prepared statements of SQL belong to a session: set OPTIONS['prepare_threshold'] instead"
)
_TEMPORARY = (
    "temporary objects belong to a session: create them in a transaction, and let that drop them "
    "(ON COMMIT DROP)"
)
_HOLD = (
    "a cursor WITH HOLD belongs to a session: declare it without, in a transaction, or use "
    "iterator()"
)
_LISTEN = (
    "notifications are delivered to a session: listen on a connection that goes to PostgreSQL "
    "itself"
)
_RESET = "the pooler alone resets its sessions: leave the statement out"
_LIBRARY = "it loads a library into a session: let the server load it (session_preload_libraries)"

#: Statements that act on their session, by how they begin, and their cures.
_ACTS = tuple(
    (re.compile(rf"{_START}(?:{pattern})", re.IGNORECASE | re.DOTALL), cure)
    for pattern, cure in (
        (r"SET\s+(?!LOCAL\b|TRANSACTION\b|CONSTRAINTS\b)|RESET\s", _SETTING),
        (r"SELECT\b.*?\bset_config\s*\(.*?,\s*(?:false|'f'|'false')\s*\)", _SETTING),
        (r"DISCARD\s", _RESET),
        (r"PREPARE\s+(?!TRANSACTION\b)|EXECUTE\s|DEALLOCATE\s", _PREPARED),
        (r"(?:UN)?LISTEN\s", _LISTEN),
        (r"LOAD\s", _LIBRARY),
        (r"DECLARE\b.*?\bWITH\s+HOLD\b", _HOLD),
        (r"(?:SELECT|WITH)\b.*?\bpg_(?:try_)?advisory_lock(?:_shared)?\s*\(", _LOCK),
    )
)
#: These may stand in a transaction, which can drop what they create.
_TEMPORARIES = re.compile(
    rf"{_START}CREATE\s+(?:OR\s+REPLACE\s+)?(?:(?:GLOBAL|LOCAL)\s+)?TEMP(?:ORARY)?\s",
    re.IGNORECASE,
)
#: In a text with several statements: the end of a transaction, after which settings are gone.
_ENDS_INSIDE = re.compile(
    r"(?:^|;)\s*(?:COMMIT|ROLLBACK(?!\s+TO)|ABORT)\b(?=[^;]*;\s*\S)",
    re.IGNORECASE,
)
_ENDED_INSIDE = (
    "a text has several statements, and one of them ends a transaction: through a transaction "
    "pooler, the settings that pgbackend.session() or 'assume_role' declare would not hold for the "
    "statements after it. Send the statements one by one, or use atomic()"
)


def check_statement(query: Query, connection: Any) -> None:
    """Raise `NotSupportedError` if `query` acts on the server session, as far as its text tells."""
    if is_vouched(query):
        return
    text = text_of(query, connection)
    for pattern, cure in _ACTS:
        if pattern.match(text):
            raise _refused(cure)
    if not connection.is_per_statement():
        return
    if _TEMPORARIES.match(text):
        raise _refused(_TEMPORARY)
    if connection.is_settled() and _ENDS_INSIDE.search(text):
        raise e.NotSupportedError(_ENDED_INSIDE)


def _refused(cure: str) -> e.NotSupportedError:
    return e.NotSupportedError(
        "the statement was not sent, because OPTIONS['pooler'] is 'transaction', and a pooler may "
        f"serve the next transaction by another session: {cure}"
    )


#: A note for PostgreSQL's error about statements that no transaction may contain.
NEEDS_NO_TRANSACTION = (
    "through a transaction pooler, settings that pgbackend.session() or 'assume_role' declare are "
    "set in a transaction with the statement: run VACUUM and its like outside of session(), or on "
    "a connection that goes to PostgreSQL itself"
)

#: The error for statements that would need a transaction for their settings, and cannot get one.
NEEDS_TRANSACTION = (
    "through a transaction pooler, settings that pgbackend.session() or 'assume_role' declare are "
    "set in a transaction: open one, with atomic(), around these statements"
)


# --- Prepared statements ---


def deallocates(name: bytes | None) -> bool:
    """Return whether a prepared statement may be dropped: one, and by a message of the protocol.

    Without a name, all would be; and libpq before 17 has only the SQL, which poolers pass on to
    the wrong session.
    """
    return name is not None and capabilities.has_send_close_prepared()
