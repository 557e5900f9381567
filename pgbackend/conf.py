"""Makes options of a pool of `DATABASES[alias]`; the only module that reads settings.

options.py checks the dictionary before.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Mapping
from inspect import iscoroutinefunction
from pathlib import Path
from typing import Any, TypeGuard

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.db import connections

from .driver import Connection, bridge
from .driver.pooled import AsyncConnection
from .options import COMMIT_ID, POOL_DEFAULTS, REPLICA_OF, sizes
from .protocols import Wrapper


def is_shared(alias: str, settings_dict: Mapping[str, Any]) -> bool:
    """Return True if `settings_dict` is the object in `connections.settings`; False for a copy."""
    return connections.settings.get(alias) is settings_dict


def has_foreign_alias() -> bool:
    """Return whether an alias has another engine than pgbackend; Django's dummy does not count."""
    # Not `any()`: a request asks several times, and a generator costs more than the loop.
    for entry in connections.settings.values():
        engine = entry["ENGINE"]
        if not (_engines.get(engine) or engine == _DUMMY or engine_is_ours(engine)):
            return True
    return False


def alias_is_ours(alias: str) -> bool:
    """Return whether pgbackend is the engine of `alias`; False for an unknown alias.

    The caller then does what it does for other engines, and so Django raises its own error.
    """
    settings_dict = connections.settings.get(alias)
    return settings_dict is not None and engine_is_ours(settings_dict["ENGINE"])


def wrapper_is_ours(connection: object) -> TypeGuard[Wrapper]:
    """Return whether `connection` is a `DatabaseWrapper` of pgbackend's."""
    return hasattr(connection, "async_session")


def engine_is_ours(engine: str) -> bool:
    """Return whether `engine` names pgbackend, or a backend whose wrapper derives from it."""
    try:
        return _engines[engine]
    except KeyError:
        from django.db.utils import load_backend  # the backend may be loading this module

        wrapper = load_backend(engine).DatabaseWrapper
        ours = any(base.__module__ == "pgbackend.base" for base in wrapper.__mro__)
        return _engines.setdefault(engine, ours)


def load_own_engines() -> bool:
    """Load the backend of each alias; return whether one of them is pgbackend's.

    A backend of others that cannot be loaded is left to Django, which raises its error when the
    alias is used.
    """
    ours = False
    for settings_dict in connections.settings.values():
        engine = settings_dict["ENGINE"]
        try:
            ours = engine_is_ours(engine) or ours
        except (ImportError, ImproperlyConfigured):
            if engine in _OWN_ENGINES:
                raise
    return ours


_engines: dict[str, bool] = {}
_OWN_ENGINES = ("pgbackend", "pgbackend.gis")
_DUMMY = "django.db.backends.dummy"


#: The cache inside of Django's settings, emptied when a setting changes. A setting that is needed
#: for each statement is looked up here first: that takes fewer steps.
_known_settings: dict[str, Any] = vars(settings)


def is_debugging() -> bool:
    """Return whether `DEBUG` is on: Django then logs all statements, in `connection.queries`."""
    try:
        return bool(_known_settings["DEBUG"])
    except KeyError:
        return bool(settings.DEBUG)


def most_in_memory() -> int:
    """Return how many bytes of a request's body Django keeps in memory."""
    most: int = settings.FILE_UPLOAD_MAX_MEMORY_SIZE
    return most


def allows_async_unsafe() -> bool:
    """Return whether `DJANGO_ALLOW_ASYNC_UNSAFE` is set, as Django reads it."""
    return bool(os.environ.get("DJANGO_ALLOW_ASYNC_UNSAFE"))


_DUMP_SIGNAL = "PGBACKEND_DUMP_SIGNAL"


def dump_signal() -> signal.Signals | None:
    """Return the signal that the setting `PGBACKEND_DUMP_SIGNAL` names; None if it is not set.

    Raises `ImproperlyConfigured` if it names no signal that a program can handle.
    """
    name = getattr(settings, _DUMP_SIGNAL, None)
    if name is None:
        return None
    found = signal.Signals.__members__.get(name) if isinstance(name, str) else None
    if found is None or name in {"SIGKILL", "SIGSTOP"}:
        raise ImproperlyConfigured(
            f"{_DUMP_SIGNAL} is {name!r}. Set it to the name of a signal, such as 'SIGUSR1'."
        )
    return found


_CONTROL_DIRECTORY = "PGBACKEND_CONTROL_DIR"


def control_directory() -> str | None:
    """Return the checked setting `PGBACKEND_CONTROL_DIR`: a path; "" for the default.

    Returns None if no socket shall be opened. Raises `ImproperlyConfigured` for any other value.
    """
    value = getattr(settings, _CONTROL_DIRECTORY, None)
    if value is None:
        return ""
    if value is False:
        return None
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else ""
    if not (isinstance(path, str) and Path(path).is_absolute()):
        raise ImproperlyConfigured(
            f"{_CONTROL_DIRECTORY} is {value!r}. Set it to the absolute path of a directory that "
            "only the user of the processes may enter, or to False for no socket."
        )
    return path


def settings_module() -> str:
    """Return the name of the module of the project's settings; "" if the project has none."""
    return str(getattr(settings, "SETTINGS_MODULE", None) or "")


_SHORTCUTS = "PGBACKEND_SHORTCUTS"


def shortcuts_switched_off(names: Iterable[str]) -> tuple[frozenset[str], str]:
    """Return the shortcuts of `names` that are switched off, and which setting says so.

    `PGBACKEND_SHORTCUTS` is read from the environment, else from the settings. It is ``0``, which
    switches all off, or a list of names with a minus before each: ``-select,-rows``. By default,
    and with ``1``, none is off. Raises `ImproperlyConfigured` for any other value.
    """
    names = [*names]
    if (value := os.environ.get(_SHORTCUTS)) is not None:
        where = f"{_SHORTCUTS} in the environment"
    else:
        value, where = getattr(settings, _SHORTCUTS, ""), f"the setting {_SHORTCUTS}"
    if value in ("0", 0):
        return frozenset(names), where
    said = [each.strip() for each in value.split(",")] if isinstance(value, str) else [repr(value)]
    off = frozenset(each.removeprefix("-") for each in said if each not in {"", "1"})
    for each in said:
        if each not in {"", "1"} and (each[0] != "-" or each[1:] not in names):
            raise ImproperlyConfigured(
                f"{where} says {each!r}: it must be '0', which switches all shortcuts off, or a "
                f"list like '-{names[0]},-{names[1]}', of {', '.join(sorted(names))}."
            )
    return off, where


_THREAD_LOCALS = "PGBACKEND_THREAD_LOCALS"


def thread_locals() -> dict[str, frozenset[str]]:
    """Return the checked setting `PGBACKEND_THREAD_LOCALS`, as sets of dotted names.

    Its keys are ``exclude`` and ``include``. Raises `ImproperlyConfigured` for any other value.
    """
    value = getattr(settings, _THREAD_LOCALS, {})
    names = {"exclude", "include"}
    if not isinstance(value, Mapping) or not value.keys() <= names:
        raise ImproperlyConfigured(
            f"{_THREAD_LOCALS} is {value!r}. Set it to a dictionary with the keys 'exclude' and "
            "'include', or one of them."
        )
    for key, dotted in value.items():
        if isinstance(dotted, str) or not all(isinstance(each, str) for each in dotted):
            raise ImproperlyConfigured(
                f"{_THREAD_LOCALS}[{key!r}] is {dotted!r}. Set it to a list of dotted names, like "
                "['package.module.name']."
            )
    return {key: frozenset(value.get(key, ())) for key in names}


_SLOW_STEP = "PGBACKEND_SLOW_STEP"


def slow_step() -> float | None:
    """Return the checked setting `PGBACKEND_SLOW_STEP`, in seconds; None if it is not set.

    Raises `ImproperlyConfigured` if it is no number, or negative.
    """
    value = getattr(settings, _SLOW_STEP, None)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise ImproperlyConfigured(
            f"{_SLOW_STEP} is {value!r}. Set it to a number of seconds, or to 0 for no warnings."
        )
    return float(value)


def of_project(name: str) -> Any:
    """Return the current value of the project's setting `name`."""
    try:
        return _known_settings[name]
    except KeyError:
        return getattr(settings, name)


def pool_options(settings_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return `outage_grace`, and the keyword arguments for psycopg_pool's `AsyncConnectionPool`.

    The other options have psycopg_pool's names. An option that is a coroutine function there
    (`check`, `reset`) may also be a synchronous function, as for psycopg_pool's `ConnectionPool`;
    it is then called green.
    """
    given = _given(settings_dict)
    options = {**POOL_DEFAULTS, **given}
    if settings_dict["OPTIONS"].get(REPLICA_OF) and "outage_grace" not in given:
        options["outage_grace"] = 0.0  # reads that cannot have a replica go to the primary
    options["min_size"], options["max_size"] = sizes(given)
    if settings_dict.get("CONN_HEALTH_CHECKS"):
        options.setdefault("check", _check_connection)
    for name in ("check", "reset"):
        if callable(options.get(name)) and not iscoroutinefunction(options[name]):
            options[name] = _green_callback(options[name])
    options.pop("connection_class", None)
    return options


def is_without_pool(settings_dict: Mapping[str, Any]) -> bool:
    """Return whether async code opens a connection for each lease: OPTIONS["pool"] is None."""
    options = settings_dict["OPTIONS"]
    return "pool" in options and options["pool"] is None


def asks_commit_id(settings_dict: Mapping[str, Any]) -> bool:
    """Return whether the id of each transaction is asked for before its COMMIT."""
    return bool(settings_dict["OPTIONS"].get(COMMIT_ID))


def facade_class(settings_dict: Mapping[str, Any]) -> type[Connection]:
    """Return the class of the connections that user code sees: `Connection`, or a subclass."""
    cls: type[Connection] = _given(settings_dict).get("connection_class", Connection)
    return cls


def pool_timeout(settings_dict: Mapping[str, Any]) -> float:
    """Return how long a task waits for a connection, or for its turn on one, in seconds."""
    return float(_given(settings_dict).get("timeout", POOL_DEFAULTS["timeout"]))


def _given(settings_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the options of the pool that the settings give, which may be none."""
    given = settings_dict["OPTIONS"].get("pool")
    return given if isinstance(given, Mapping) else {}


async def _check_connection(connection: AsyncConnection) -> None:
    await connection.execute("")


def _green_callback(fn: Callable[[Connection], Any]) -> Callable[[AsyncConnection], Any]:
    """Return a callback for the async pool that calls `fn` green, with a synchronous connection."""

    async def callback(connection: AsyncConnection) -> None:
        await bridge.run(fn, connection.facade)

    return callback
