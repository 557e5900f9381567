"""Says in plain words why a connection failed, and how to mend it.

libpq gives no SQLSTATE for a failed attempt to connect, only a message. Messages of a server may be
in another language than English; such a message is shown as it is, with a cure for any failure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from django.core.exceptions import ImproperlyConfigured
from django.db import NotSupportedError

from .findings import ERROR, Finding, without_secrets


class _Cause(NamedTuple):
    """A cause of failures, in plain words.

    In `cause` and `cure`, `{where}` stands for DATABASES['alias'], `{at}` for the host and port,
    `{user}` and `{name}` for USER and NAME of the settings.
    """

    pattern: str
    """A regular expression that finds the messages of this cause."""
    cause: str
    cure: str


_CAUSES: tuple[_Cause, ...] = (
    _Cause(
        "password authentication failed",
        "the server refuses the password of the user {user}",
        "Set {where}['PASSWORD'] (or what it is asked from: PGPASSWORD, a passfile, a service) to "
        "the password of this user on this server, or set that with ALTER ROLE ... PASSWORD.",
    ),
    _Cause(
        "no password supplied",
        "the server asks the user {user} for a password, and the settings give none",
        "Set {where}['PASSWORD'], or name a file by OPTIONS['passfile'].",
    ),
    _Cause(
        r"database \".*\" does not exist",
        "the server has no database {name}",
        "Set {where}['NAME'] to a database that exists ('psql -l' lists them), or make this one: "
        "createdb {name}.",
    ),
    _Cause(
        r"role \".*\" does not exist",
        "the server has no user {user}",
        "Set {where}['USER'] to a role that exists, or make it: CREATE ROLE ... LOGIN. If USER is "
        "empty, libpq takes the name of the process's user.",
    ),
    _Cause(
        "is not permitted to log in",
        "the role {user} may not log in",
        "ALTER ROLE ... LOGIN, or set {where}['USER'] to another role.",
    ),
    _Cause(
        "no pg_hba.conf entry|pg_hba.conf rejects",
        "the server does not accept the user {user} from this host, for this database",
        "Add a line for it to the server's pg_hba.conf and reload the server; or connect with "
        "TLS, if the server demands that (OPTIONS['sslmode'] = 'require').",
    ),
    _Cause(
        "(Peer|Ident) authentication failed",
        "the server lets a user of the operating system in only as the role of the same name",
        "Set {where}['HOST'] to 'localhost' and give a password, or change the method 'peer' of "
        "the server's pg_hba.conf.",
    ),
    _Cause(
        "Connection refused",
        "nothing listens at {at}",
        "Start PostgreSQL there, or set {where}['HOST'] and ['PORT'] to where it listens; its "
        "listen_addresses must include that address.",
    ),
    _Cause(
        "No such file or directory.*socket|on socket .*No such file",
        "there is no PostgreSQL on this machine that listens at {at}",
        "Start it, or set {where}['HOST'] to the server's host name. An empty HOST, or one that "
        "begins with '/', stands for a Unix socket on this machine.",
    ),
    _Cause(
        "failed to resolve host|could not translate host name",
        "the name of the host {at} is not known",
        "Mend {where}['HOST'], or let the name be resolved (DNS, /etc/hosts, the name of a "
        "container's service).",
    ),
    _Cause(
        "timeout expired|timed out|^ConnectionTimeout",
        "{at} does not answer",
        "Look whether {where}['HOST'] and ['PORT'] are right, whether a firewall drops the "
        "packets, and whether the server is up.",
    ),
    _Cause(
        "No route to host|Network is unreachable",
        "there is no route to {at}",
        "Look at {where}['HOST'], and at the network of this machine or container.",
    ),
    _Cause(
        "too many connections for (role|database)",
        "the limit of connections of this role or database is used up",
        "Raise it (ALTER ROLE or DATABASE ... CONNECTION LIMIT), or lower the sizes of the pools: "
        "'manage.py pgbackend sum' adds them up.",
    ),
    _Cause(
        "too many clients|remaining connection slots|no more connections allowed",
        "all connections of the server are in use",
        "Lower the sizes of the pools or the number of processes ('manage.py pgbackend sum' adds "
        "them up), raise max_connections, or put a pooler between.",
    ),
    _Cause(
        "is starting up|not yet accepting|in recovery mode",
        "the server is starting",
        "Wait until it accepts connections; its log says how far it is.",
    ),
    _Cause("is shutting down", "the server is shutting down", "Start it again."),
    _Cause(
        "does not support SSL",
        "the settings demand TLS, and the server has none",
        "Set ssl = on with a certificate at the server, or OPTIONS['sslmode'] = 'prefer'.",
    ),
    _Cause(
        "root certificate file|certificate verify failed|does not match host name",
        "the certificate of the server cannot be verified",
        "Let OPTIONS['sslrootcert'] name the file of the authority that signed it ('system' for "
        "those of this machine), and {where}['HOST'] be the name in the certificate.",
    ),
    _Cause(
        "session is (not )?read-only|server is (not )?in hot standby",
        "no host of the list is of the kind that OPTIONS['target_session_attrs'] asks for",
        "Add the host of that kind to {where}['HOST'], or change target_session_attrs.",
    ),
    _Cause(
        "unsupported startup parameter",
        "a pooler at {at} does not take one of the parameters of the connection",
        "Set OPTIONS['pooler'] as docs/poolers.md says, or add the parameter to PgBouncer's "
        "ignore_startup_parameters.",
    ),
    _Cause(
        "no such database|server_login_retry|server login has been failing|pooler|pgbouncer",
        "the pooler at {at} cannot serve the database {name}",
        "Look at the pooler's log, and at its list of databases and users.",
    ),
    _Cause(
        "unrecognized configuration parameter|invalid command-line argument",
        "OPTIONS['options'] sets something that this server does not know",
        "Correct OPTIONS['options'] of {where}.",
    ),
    _Cause(
        "definition of service .* not found",
        "libpq finds no service of the name in OPTIONS['service']",
        "Add it to the file that PGSERVICEFILE names (default: ~/.pg_service.conf).",
    ),
    _Cause(
        r"invalid \S+ value|invalid (integer|connection) |invalid port",
        "libpq does not accept the value of an option",
        "Correct OPTIONS of {where}; PostgreSQL's page 'Parameter Key Words' lists the values.",
    ),
    _Cause(
        r"couldn't get a connection after|^TimeoutError",
        "the pool opens no connection, although one can be opened without it",
        "Look at the functions in OPTIONS['pool'] (check, reset), and at receivers of "
        "connection_created: one of them fails or waits.",
    ),
    _Cause(
        "permission denied for database|does not have CONNECT privilege",
        "the role {user} may not connect to the database {name}",
        "GRANT CONNECT ON DATABASE ... TO ...",
    ),
)
_OTHER = "Look at the message, and at the log of the server at {at}."


def explained(
    alias: str, settings_dict: Mapping[str, Any], exc: BaseException, way: str = ""
) -> Finding:
    """Return the cause and the cure of `exc`, by which an attempt to connect has failed.

    `way` says in which way it was attempted, if another way has succeeded.
    """
    message = without_secrets(" ".join(str(exc).split()), _secret(settings_dict))
    if isinstance(exc, ImproperlyConfigured):
        return Finding(ERROR, f"The settings of {alias!r} are wrong: {message}")
    if isinstance(exc, NotSupportedError):
        cure = "Upgrade the server, or use the version of Django that supports it."
        return Finding(
            ERROR, f"This Django does not support the server of {alias!r}: {message}.", cure
        )
    words = _words(alias, settings_dict)
    said = f"{type(exc).__name__}: {message}"
    for each in _CAUSES:
        if re.search(each.pattern, said, re.IGNORECASE):
            text = f"{alias!r} cannot connect{way}: {each.cause.format(**words)}. ({said})"
            return Finding(ERROR, text, each.cure.format(**words))
    text = f"{alias!r} cannot connect{way}: {said}"
    return Finding(ERROR, text, _OTHER.format(**words))


def _secret(settings_dict: Mapping[str, Any]) -> object:
    """Return the password, unless another setting has the same text: hiding that would tell it."""
    password = settings_dict.get("PASSWORD")
    shown = (settings_dict.get(name) for name in ("HOST", "NAME", "PORT", "USER"))
    return None if password in shown else password


def _words(alias: str, settings_dict: Mapping[str, Any]) -> dict[str, str]:
    options = settings_dict.get("OPTIONS", {})
    user = settings_dict.get("USER") or options.get("user")
    name = settings_dict.get("NAME") or options.get("dbname")
    return {
        "where": f"DATABASES[{alias!r}]",
        "at": place(settings_dict),
        "user": _named(user, "of libpq's choice"),
        "name": _named(name, "of libpq's choice"),
    }


def _named(value: object, otherwise: str) -> str:
    if callable(value):
        return "that the settings ask a function for"
    return repr(without_secrets(str(value))) if value else otherwise


def place(settings_dict: Mapping[str, Any]) -> str:
    """Return the host and port that the settings name, for messages."""
    options = settings_dict.get("OPTIONS", {})
    host, port = (settings_dict.get(key) or options.get(key.lower()) for key in ("HOST", "PORT"))
    if callable(host) or callable(port):
        return "the host that the settings ask a function for"
    return without_secrets(f"{host or 'the default host'}, port {port or 5432}")
