"""Compares what was found at a server with the settings, and advises, with reasons."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pgbackend import options

from . import poolers
from .findings import ERROR, NOTE, OK, WARNING, Finding
from .server import FIRST, LAST, Server


def of_server(alias: str, settings_dict: Mapping[str, Any], server: Server) -> Iterator[Finding]:
    """Yield what is worth knowing of the server of `alias`."""
    yield _version(server)
    yield from _writes(alias, settings_dict, server)
    yield from _texts(server)
    yield from _isolation(alias, settings_dict, server)
    yield from _timeouts(settings_dict, server)
    if server.is_superuser:
        yield Finding(
            NOTE,
            "The role is a superuser: it bypasses permissions and row-level security, and may use "
            "the connections that are kept for emergencies.",
            "Let the project connect as a role of its own, which owns its tables.",
        )


def _version(server: Server) -> Finding:
    text = f"The server is PostgreSQL {server.version}."
    if server.major < FIRST:
        cure = f"Upgrade the server to one of PostgreSQL {FIRST} to {LAST}."
        return Finding(ERROR, f"{text} It is too old.", cure)
    if server.major > LAST:
        cure = f"pgbackend is tested with {FIRST} to {LAST}: run your tests on this one."
        return Finding(WARNING, f"{text} It is newer than pgbackend knows.", cure)
    return Finding(OK, f"{text} pgbackend supports {FIRST} to {LAST}.")


def _writes(alias: str, settings_dict: Mapping[str, Any], server: Server) -> Iterator[Finding]:
    is_replica = bool(settings_dict["OPTIONS"].get(options.REPLICA_OF))
    if is_replica and not server.is_standby:
        yield Finding(
            NOTE,
            "The alias is a replica by OPTIONS['replica_of'], and its server is no standby.",
            "That is right during a failover only; else set HOST to the standby.",
        )
    elif is_replica:
        yield Finding(OK, "The server is a standby, as OPTIONS['replica_of'] says.")
    elif server.is_standby:
        yield Finding(
            WARNING,
            "The server is a standby: each write of this alias will fail.",
            "Set HOST to the primary, or to all hosts with OPTIONS['target_session_attrs'] = "
            f"'read-write'; or make {alias!r} a replica by OPTIONS['replica_of'].",
        )
    elif server.is_read_only:
        yield Finding(
            WARNING,
            "Transactions are read-only (default_transaction_read_only): writes will fail.",
            "Look at ALTER ROLE and ALTER DATABASE ... SET, and at OPTIONS['options'].",
        )


def _texts(server: Server) -> Iterator[Finding]:
    encoding = server.settings.get("server_encoding", "UTF8")
    if encoding != "UTF8":
        yield Finding(
            WARNING,
            f"The database stores text as {encoding}: characters that it lacks raise an error.",
            "Make the database anew with ENCODING 'UTF8'.",
        )
    if server.settings.get("standard_conforming_strings") == "off":
        yield Finding(
            WARNING,
            "standard_conforming_strings is off: a backslash in a literal of SQL is an escape.",
            "Set it to on, its default, for this role.",
        )


def _isolation(alias: str, settings_dict: Mapping[str, Any], server: Server) -> Iterator[Finding]:
    level = server.settings.get("default_transaction_isolation", "read committed")
    if level != "read committed" and not settings_dict["OPTIONS"].get("isolation_level"):
        yield Finding(
            NOTE,
            f"Transactions are {level} by default: Django is written for read committed, and "
            "get_or_create() among others may fail with a serialization error.",
            f"Set DATABASES[{alias!r}]['OPTIONS']['isolation_level'], or the default of the role.",
        )


def _timeouts(settings_dict: Mapping[str, Any], server: Server) -> Iterator[Finding]:
    pool = settings_dict["OPTIONS"].get("pool")
    given = {**options.POOL_DEFAULTS, **(pool if isinstance(pool, Mapping) else {})}
    idle = server.numbers.get("idle_session_timeout", 0)
    if 0 < idle <= given["max_idle"]:
        yield Finding(
            WARNING,
            f"The server ends sessions that are idle for {idle:g} s (idle_session_timeout), before "
            f"a pool closes them (max_idle {given['max_idle']:g} s): connections are opened again "
            "and again.",
            f"Set OPTIONS['pool']['max_idle'] to less than {idle:g}, or idle_session_timeout to 0 "
            "for this role.",
        )
    if not server.numbers.get("idle_in_transaction_session_timeout") and not given["max_hold"]:
        yield Finding(
            NOTE,
            "Nothing ends a transaction that its code leaves idle: it keeps locks, and VACUUM from "
            "its work.",
            "ALTER ROLE ... SET idle_in_transaction_session_timeout = '60s', or set "
            "OPTIONS['pool']['max_hold'].",
        )
    if not server.numbers.get("statement_timeout"):
        yield Finding(
            NOTE,
            "No statement is ever cancelled for its duration (statement_timeout is 0).",
            "Set it for the role of the web processes, above your slowest request: ALTER ROLE ... "
            "SET statement_timeout = '30s'.",
        )


def of_pooler(alias: str, settings_dict: Mapping[str, Any], kind: str) -> Finding:
    """Return whether OPTIONS["pooler"] fits the pooler that was found before the server."""
    given = settings_dict["OPTIONS"]
    declared = options.is_through_pooler(given)
    where = f"DATABASES[{alias!r}]['OPTIONS']['pooler']"
    if kind == poolers.TRANSACTION and not declared:
        return _undeclared(settings_dict, where)
    if kind == poolers.NONE and declared:
        return Finding(
            WARNING,
            "OPTIONS['pooler'] is set, and the connection goes to PostgreSQL itself: what needs a "
            "session is refused without need.",
            f"Leave {where} out, or set HOST and PORT to the pooler.",
        )
    if kind == poolers.SESSION and not declared:
        return Finding(
            NOTE,
            "A pooler or proxy stands before the server. It gave each of two connections a session "
            "of its own, as needed.",
            f"If it serves by transactions (PgBouncer: pool_mode = transaction), set {where} to "
            "'transaction'.",
        )
    said = {
        poolers.NONE: "The connection goes to PostgreSQL itself, without a pooler.",
        poolers.SESSION: "A pooler stands before the server, as OPTIONS['pooler'] says.",
        poolers.TRANSACTION: "A transaction pooler stands before the server, as declared.",
    }
    return Finding(OK, said[kind])


def _undeclared(settings_dict: Mapping[str, Any], where: str) -> Finding:
    text = (
        "A transaction pooler stands before the server, and OPTIONS['pooler'] does not say so: "
        "settings of a session reach other clients"
    )
    if not settings_dict.get("DISABLE_SERVER_SIDE_CURSORS"):
        text += ", and server-side cursors (iterator()) vanish between two statements"
    cure = f"Set {where} to 'transaction' (docs/poolers.md says what changes)."
    return Finding(ERROR, f"{text}.", cure)
