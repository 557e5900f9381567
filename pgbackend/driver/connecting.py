"""Prepares attempts to connect: limits on silence, and a note of the host that is being tried.

By libpq's defaults, an attempt on a silent link would take a slot of the pool for 130 s, and a
statement on one for two hours: long after the tasks that wait for it have given up.
"""

from __future__ import annotations

import asyncio
import os
import re
import weakref
from collections.abc import Mapping
from time import monotonic
from typing import Any

from psycopg.conninfo import conninfo_to_dict

from .asking import ConnectArguments

#: Limits on silence of an open connection. A host that has vanished is given up after 15 + 2 × 5 s
#: if it owes a reply, and after 25 s if it has not even confirmed what was sent to it. That leaves
#: time to find another host within 35 s.
KEEPALIVES: Mapping[str, int] = {
    "keepalives_idle": 15,
    "keepalives_interval": 5,
    "keepalives_count": 2,
    "tcp_user_timeout": 25_000,
}

#: The options of a `Trial`.
_NOT_SECRET = ("host", "hostaddr", "port", "user", "dbname")

#: The shortest limit on an attempt that libpq and psycopg know, in seconds.
_SHORTEST = 2
#: The longest limit on an attempt that is set where tasks may wait for longer, or for ever.
_LONGEST = 3600.0


def arguments(given: Mapping[str, Any], timeout: float) -> ConnectArguments:
    """Return the arguments of `connect()`, for a pool whose tasks wait for `timeout` seconds.

    `given` are the user's; what they say stays. A service file may have keepalives of its own: then
    none are added.
    """
    arguments = ConnectArguments(given, autocommit=True)
    said = {*given, *conninfo_to_dict(given.get("conninfo", ""))}
    if "service" not in said and "PGSERVICE" not in os.environ:
        arguments.update({name: KEEPALIVES[name] for name in KEEPALIVES.keys() - said})
    if "connect_timeout" not in said and "PGCONNECT_TIMEOUT" not in os.environ:
        # A request that waits lives to see the attempt at the last host.
        each = int((min(timeout, _LONGEST) - 0.5) / number_of_hosts(given))
        arguments["connect_timeout"] = max(_SHORTEST, each)
    return arguments


def number_of_hosts(given: Mapping[str, Any]) -> int:
    """Return how many hosts an attempt tries, one after the other; at least 1."""
    named = [_param(given, name, f"PG{name.upper()}") for name in ("host", "hostaddr")]
    return max(text.count(",") + 1 for text in named)


def wants_read_only(given: Mapping[str, Any]) -> bool:
    """Return whether the options ask for sessions that cannot write, or do not mind them."""
    wanted = _param(given, "target_session_attrs", "PGTARGETSESSIONATTRS")
    options = _param(given, "options", "PGOPTIONS")
    return wanted in ("read-only", "standby", "prefer-standby") or bool(
        re.search(r"default_transaction_read_only\s*=\s*'?(on|true|yes|1)", options)
    )


def _param(given: Mapping[str, Any], name: str, variable: str) -> str:
    value = given.get(name)
    if value is None and "conninfo" in given:
        value = conninfo_to_dict(given["conninfo"]).get(name)
    return str(os.environ.get(variable, "") if value is None else value)


class Trial:
    """One task's attempt to connect: the host that is tried now, and since when."""

    def __init__(self) -> None:
        self.host = ""
        #: libpq's options for that host, without the secret ones.
        self.params: dict[str, Any] = {}
        self.since = monotonic()
        task = asyncio.current_task()
        assert task is not None
        _trials[task] = self

    def __str__(self) -> str:
        return f"{self.host or 'the server'} has been tried for {monotonic() - self.since:.2f} s"


_trials: weakref.WeakKeyDictionary[asyncio.Task[Any], Trial] = weakref.WeakKeyDictionary()


def note_host(conninfo: str) -> None:
    """Record that the running task now tries the host of `conninfo`, a connection string."""
    task = asyncio.current_task()
    trial = None if task is None else _trials.get(task)
    if trial is not None:
        params = conninfo_to_dict(conninfo)
        named = [
            f"{name} {params[name]}" for name in ("host", "hostaddr", "port") if name in params
        ]
        trial.host, trial.since = ", ".join(named), monotonic()
        trial.params = {name: params[name] for name in _NOT_SECRET if name in params}
