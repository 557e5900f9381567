"""Finds what is wrong with `DATABASES[alias]`: each problem has an id, a text and a cure.

Sync and async code raise the first problem as `ImproperlyConfigured`, before they connect; the
system checks (`checks.py`) report all of them. docs/checks.md lists the ids. The server and libpq
check the rest (the password, the name of the database, values of libpq's options), and their own
message reaches the user.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from inspect import iscoroutinefunction
from typing import Any

import psycopg
from django.core.exceptions import ImproperlyConfigured
from psycopg import IsolationLevel
from psycopg.conninfo import conninfo_to_dict

from .driver import Connection
from .driver.through_pooler import TRANSACTION

#: Defaults of the pool: an idle process keeps no connection, and a request that gets no connection
#: fails before its client gives up.
POOL_DEFAULTS: Mapping[str, Any] = {
    "min_size": 0,
    "max_size": 10,
    "timeout": 10.0,
    "max_idle": 60.0,
    # psycopg_pool's own retries back off to five minutes; a request that asks for a connection
    # makes the next attempt instead (see driver/attempts.py).
    "reconnect_timeout": 0.0,
    # Longer than a pause that is meant, shorter than the patience of whoever looks for the cause.
    "hold_warning": 30.0,
    "max_hold": None,
    # A restart or a planned switchover takes about 3 s.
    "outage_grace": 5.0,
}

_NUMBERS = {
    "min_size": int,
    "max_size": int,
    "max_waiting": int,
    "num_workers": int,
    "timeout": float,
    "max_lifetime": float,
    "max_idle": float,
    "reconnect_timeout": float,
    "hold_warning": float,
    "max_hold": float,
    "outage_grace": float,
}
#: The numbers that may be None.
_OPTIONAL = {"max_size", "hold_warning", "max_hold"}
#: The options of our async pools that psycopg_pool does not know.
NOT_PSYCOPGS = frozenset({"hold_warning", "max_hold", "outage_grace"})
_FUNCTIONS = {"check", "reconnect_failed", "reset"}
_OTHERS = {"close_returns", "connection_class", "name", *_FUNCTIONS}
_LEVELS = [level.value for level in IsolationLevel]
_RESETS = ("always", "dirty", "never")

#: The key of `OPTIONS` by which a replica names its primary.
REPLICA_OF = "replica_of"
#: The key of `OPTIONS` that has the id of each transaction asked for before its COMMIT.
COMMIT_ID = "commit_id"
#: The key of `OPTIONS` by which listeners reach the server itself, beside a pooler.
LISTEN = "listen"
#: Keys of `OPTIONS` that Django and pgbackend take out before they connect.
_OUR_OPTIONS = {
    *("assume_role", "isolation_level", "pool", "pooler", "server_side_binding", "session_reset"),
    *(REPLICA_OF, COMMIT_ID, LISTEN),
}

#: The options of pgbackend that Django leaves in the arguments of `connect()`.
NOT_SENT = ("session_reset", REPLICA_OF, COMMIT_ID, LISTEN)
#: Arguments of our driver's `connect()` that the backend adds, and no option names.
_ADDED = frozenset(("time_zone",))

#: Arguments of psycopg's `connect()` beside those of libpq.
_PSYCOPG_ARGUMENTS = {
    *("autocommit", "conninfo", "context", "cursor_factory", "prepare_threshold", "row_factory"),
}

#: Options whose value may be a class or a function that is not asked for another value.
NOT_ASKED = frozenset({"context", "cursor_factory", "row_factory"})

#: The keys of `DATABASES[alias]` that are connection options, and libpq's names for them.
LIBPQ_NAMES = {"HOST": "host", "PASSWORD": "password", "PORT": "port", "USER": "user"}


@dataclass(frozen=True, slots=True)
class Problem:
    """A wrong option; shown by a system check, and raised at the first connect."""

    id: str
    text: str
    hint: str
    in_djangos_words: bool = False
    """Whether `text` is the message of Django's own exception, and is raised as it is."""

    def error(self) -> ImproperlyConfigured:
        """Return the exception to raise, which says the problem and its cure."""
        text = self.text if self.in_djangos_words else f"{self.text} {self.hint}"
        return ImproperlyConfigured(text)


def problems(
    alias: str, settings_dict: Mapping[str, Any], *, has_own_parameters: bool = False
) -> Iterator[Problem]:
    """Yield what is wrong with `settings_dict`, which is `DATABASES[alias]`.

    `has_own_parameters` says that a derived wrapper overrides `get_connection_params()`, and so may
    have options of its own; then unknown ones are found only when it has been asked.
    """
    options = settings_dict["OPTIONS"]
    yield from _problems_of_pool(alias, options.get("pool"))
    if options.get("pool") and settings_dict.get("CONN_MAX_AGE", 0) != 0:
        yield Problem(
            "pgbackend.E006",
            "Pooling doesn't support persistent connections.",
            f"Set DATABASES[{alias!r}]['CONN_MAX_AGE'] to 0, or leave OPTIONS['pool'] out: async "
            "code has a pool without it.",
            in_djangos_words=True,
        )
    reset = options.get("session_reset", "dirty")
    if reset not in _RESETS:
        yield Problem(
            "pgbackend.E007",
            f"{_where(alias, 'session_reset')} is {reset!r}.",
            f"Set it to one of {', '.join(map(repr, _RESETS))}.",
        )
    yield from _problems_of_pooler(alias, options)
    yield from _problems_of_listen(alias, options)
    level = options.get("isolation_level")
    if level is not None and level not in _LEVELS:
        yield Problem(
            "pgbackend.E008",
            f"Invalid transaction isolation level {level} specified.",  # both as in Django
            "Use one of the psycopg.IsolationLevel values.",
        )
    threshold = options.get("prepare_threshold")
    if not (threshold is None or (_is_whole(threshold) and threshold >= 0)):
        yield Problem(
            "pgbackend.E009",
            f"{_where(alias, 'prepare_threshold')} is {threshold!r}.",
            "Set it to None, or to a whole number, not negative.",
        )
    if not isinstance(asks := options.get(COMMIT_ID, False), bool):
        yield Problem(
            "pgbackend.E016",
            f"{_where(alias, COMMIT_ID)} is {asks!r}.",
            "Set it to True, to have the id of each transaction asked for before its COMMIT, or "
            "leave it out.",
        )
    yield from problems_of_replica(alias, settings_dict)
    yield from _problems_of_kind(alias, settings_dict)
    if not has_own_parameters:
        yield from unknown_options(alias, options)


def only_libpqs(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the `arguments` of psycopg's `connect()` that libpq knows."""
    known = {"conninfo", *_libpq_options()}
    return {name: value for name, value in arguments.items() if name in known}


def check_arguments(alias: str, arguments: Collection[str]) -> None:
    """Raise `ImproperlyConfigured` if psycopg's `connect()` does not know one of `arguments`."""
    for problem in unknown_options(alias, [name for name in arguments if name not in _ADDED]):
        raise problem.error()


def unknown_options(alias: str, names: Collection[str]) -> Iterator[Problem]:
    """Yield a problem for each of `names` that is no option of Django, pgbackend or psycopg."""
    known = _known_options()
    for name in names:
        if name not in known:
            text = f"DATABASES[{alias!r}]['OPTIONS'] has no option {name!r}."
            yield Problem("pgbackend.E010", text, _suggestion(name, known))


@functools.cache
def _known_options() -> frozenset[str]:
    """Return all names that `OPTIONS` may have, with those of the installed libpq."""
    return frozenset({*_libpq_options(), *_OUR_OPTIONS, *_PSYCOPG_ARGUMENTS})


@functools.cache
def _libpq_options() -> frozenset[str]:
    """Return the names of the options of the installed libpq."""
    return frozenset(each.keyword.decode() for each in psycopg.pq.Conninfo.get_defaults())


def _suggestion(name: object, known: Collection[str]) -> str:
    close = difflib.get_close_matches(str(name), known, 1)
    return f"Did you mean {close[0]!r}?" if close else f"Use one of {', '.join(sorted(known))}."


def _where(alias: str, *keys: str) -> str:
    return f"DATABASES[{alias!r}]['OPTIONS']" + "".join(f"[{key!r}]" for key in keys)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# --- OPTIONS["pooler"] ----------------------------------------------------------------------------


def is_through_pooler(options: Mapping[str, Any]) -> bool:
    """Return whether `options` say that a transaction pooler stands before the server."""
    return bool(options.get("pooler") == TRANSACTION)


def _problems_of_pooler(alias: str, options: Mapping[str, Any]) -> Iterator[Problem]:
    pooler = options.get("pooler")
    if pooler is None:
        return
    if pooler != TRANSACTION:
        yield Problem(
            "pgbackend.E014",
            f"{_where(alias, 'pooler')} is {pooler!r}.",
            "Set it to 'transaction' if a transaction pooler stands before the server. Leave it "
            "out if there is none, or one that gives each connection a session of its own "
            "(PgBouncer's mode 'session').",
        )
        return
    pool = options.get("pool")
    resets = {
        ("session_reset",): options.get("session_reset") in ("always", "dirty"),
        ("pool", "reset"): isinstance(pool, Mapping) and pool.get("reset") is not None,
    }
    for keys in [keys for keys, is_set in resets.items() if is_set]:
        yield Problem(
            "pgbackend.E015",
            f"{_where(alias, *keys)} and {_where(alias, 'pooler')} contradict each other: a reset "
            "would reach a session that other clients use.",
            f"Leave {keys[-1]!r} out: the pooler resets its sessions itself.",
        )


# --- OPTIONS["listen"] ----------------------------------------------------------------------------


def listening_parameters(given: Any) -> dict[str, Any]:
    """Return libpq's parameters in `OPTIONS["listen"]`, a dictionary or a connection string.

    Raises `psycopg.ProgrammingError` if libpq cannot read the string.
    """
    return conninfo_to_dict(given) if isinstance(given, str) else dict(given or {})


def _problems_of_listen(alias: str, options: Mapping[str, Any]) -> Iterator[Problem]:
    where, given = _where(alias, LISTEN), options.get(LISTEN)
    cure = "Set it to a dictionary such as {'host': ..., 'port': ...}, or to a connection string."
    if callable(given):
        return  # E011
    try:  # no value is shown: it may be a password
        named = listening_parameters(given)
    except (psycopg.ProgrammingError, TypeError, ValueError):
        text = f"{where} is a {type(given).__name__} that libpq cannot read."
        yield Problem("pgbackend.E017", text, cure)
        return
    of_libpq = _libpq_options()
    for name, value in named.items():
        if name == "dbname":
            text = f"{where} names a database."
            hint = "Leave it out: a notification reaches the listeners of its own database only."
            yield Problem("pgbackend.E017", text, hint)
        elif name not in of_libpq:
            hint = _suggestion(name, of_libpq)
            yield Problem("pgbackend.E017", f"{where} has no option {name!r}.", hint)
        elif isinstance(value, bool) or not isinstance(value, str | int):
            text = f"{where}[{name!r}] is a {type(value).__name__}."
            yield Problem("pgbackend.E017", text, "Set it to a text or a number.")


# --- OPTIONS["pool"] ------------------------------------------------------------------------------


def _problems_of_pool(alias: str, pool: Any) -> Iterator[Problem]:
    where = _where(alias, "pool")
    if not pool or pool is True:
        return
    if not isinstance(pool, Mapping):
        hint = "Set it to True, or to a dictionary of options."
        yield Problem("pgbackend.E001", f"{where} is {pool!r}.", hint)
        return
    sound = True
    for name, value in pool.items():
        if name not in _NUMBERS and name not in _OTHERS:
            hint = _suggestion(name, [*_NUMBERS, *_OTHERS])
            yield Problem("pgbackend.E002", f"{where} has no option {name!r}.", hint)
        elif (cure := _cure(name, value)) is not None:
            yield Problem("pgbackend.E003", f"{where}[{name!r}] is {value!r}.", cure)
            sound = sound and name not in _NUMBERS
    if sound:
        yield from _problems_of_sizes(where, pool)
    cls = pool.get("connection_class", Connection)
    if not (isinstance(cls, type) and issubclass(cls, Connection)):
        text = f"{where}['connection_class'] is {cls!r}."
        yield Problem(
            "pgbackend.E005", text, "Set it to a subclass of pgbackend.driver.Connection."
        )


def _cure(name: str, value: Any) -> str | None:
    """Return the cure if `value` is wrong for the pool's option `name`; None if it is right."""
    if name in _NUMBERS:
        number = _NUMBERS[name]
        is_right = _is_whole(value) or (number is float and isinstance(value, float))
        if (is_right and value >= 0) or (name in _OPTIONAL and value is None):
            return None
        kind = "a whole number" if number is int else "a number of seconds"
        return f"Set it to {kind}, not negative."
    cures = {
        "close_returns": (isinstance(value, bool), "Set it to True or False."),
        "name": (value is None or isinstance(value, str), "Set it to a text."),
        **dict.fromkeys(
            _FUNCTIONS, (value is None or callable(value), "Set it to a function, or to None.")
        ),
    }
    is_right, cure = cures.get(name, (True, ""))
    return None if is_right else cure


def _problems_of_sizes(where: str, pool: Mapping[str, Any]) -> Iterator[Problem]:
    low, high = sizes(pool)
    if high < max(low, 1):
        yield Problem(
            "pgbackend.E004",
            f"{where} has min_size {low} and max_size {high}.",
            "Set max_size to at least min_size, and at least 1.",
        )
    if pool.get("num_workers") == 0:
        text = f"{where}['num_workers'] is 0."
        yield Problem("pgbackend.E004", text, "Set it to at least 1.")


def unusable_in_sync_code(alias: str, pool: Any) -> Iterator[Problem]:
    """Yield the functions in `pool` that Django's synchronous pool would call and never await."""
    if not isinstance(pool, Mapping):
        return
    for name in sorted(_FUNCTIONS):
        if iscoroutinefunction(pool.get(name)):
            yield Problem(
                "pgbackend.W002",
                f"{_where(alias, 'pool', name)} is a coroutine function, which sync code, such as "
                "manage.py migrate, cannot call.",
                "Set it to a synchronous function: async code calls it on the event loop, too.",
            )


def sizes(pool: Mapping[str, Any]) -> tuple[int, int]:
    """Return `min_size` and `max_size` of an async pool; `pool` may give one, both or none."""
    low: int = pool.get("min_size", POOL_DEFAULTS["min_size"])
    high: int | None = pool.get("max_size", max(low, POOL_DEFAULTS["max_size"]))
    return low, low if high is None else high


def sync_sizes(pool: Mapping[str, Any]) -> dict[str, int]:
    """Return the size that Django's synchronous pool must be given beside those in `pool`, if any.

    psycopg_pool's defaults (`min_size` 4, and `max_size` the same as `min_size`) contradict a
    `max_size` below 4, or a `min_size` of 0.
    """
    if "max_size" in pool and "min_size" not in pool:
        return {} if pool["max_size"] is None else {"min_size": min(4, pool["max_size"])}
    if pool.get("min_size") == 0 and "max_size" not in pool:
        return {"max_size": POOL_DEFAULTS["max_size"]}
    return {}


# --- Replicas -------------------------------------------------------------------------------------


def problems_of_replica(alias: str, settings_dict: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield what is wrong with a replica, as far as its own settings tell."""
    options = settings_dict.get("OPTIONS", {})
    primary = options.get(REPLICA_OF)
    if primary is None:
        return
    if not isinstance(primary, str) or not primary or primary == alias:
        yield Problem(
            "pgbackend.E012",
            f"{_where(alias, REPLICA_OF)} is {primary!r}.",
            "Set it to the alias of the primary, or leave it out if this is no replica.",
        )
    for host in (settings_dict.get("HOST"), options.get("host"), options.get("hostaddr")):
        if isinstance(host, str) and "," in host:
            yield Problem(
                "pgbackend.E012",
                f"DATABASES[{alias!r}] is a replica with a list of hosts, {host!r}.",
                "Make an alias of each replica: how far one has replayed says nothing of another.",
            )


# --- Kinds of values ------------------------------------------------------------------------------


def _problems_of_kind(alias: str, settings_dict: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield the options that are functions, or collections, where they cannot be."""
    options = settings_dict["OPTIONS"]
    asked = {f"['OPTIONS'][{name!r}]": options.get(name) for name in _OUR_OPTIONS}
    for key, value in {"['NAME']": settings_dict.get("NAME"), **asked}.items():
        if callable(value):
            hint = "Set it to a value: only PASSWORD, USER, HOST, PORT and libpq's options may be "
            yield Problem(
                "pgbackend.E011",
                f"DATABASES[{alias!r}]{key} is a function.",
                f"{hint}functions that are asked at each connect.",
            )
    for name, value in options.items():
        if name not in _OUR_OPTIONS | NOT_ASKED and isinstance(value, dict | list | tuple | set):
            yield Problem(
                "pgbackend.E011",
                # The value is not shown: it may be a secret.
                f"{_where(alias, name)} is a {type(value).__name__}.",
                "Set it to a text, a number, or a function that returns one.",
            )
