"""The contents of the admin's page: tables and facts about the connections of this process.

Texts are made here, once for the page and its live updates. Nothing here asks a database, except
`servers()`.
"""

from __future__ import annotations

import asyncio
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeAlias

import django
import psycopg
from django.db import connections
from django.utils.timezone import localtime

from . import __version__, conf, metrics
from .driver import bridge
from .driver.loops import open_pools
from .driver.snapshots import Snapshot, take
from .operating.shortcuts import listed

#: How many leases, and waiting tasks, of each pool are shown.
MOST = 100

Rows: TypeAlias = list[dict[str, object]]
"""Each row has its texts (``cells``), and whether it shows something that is wrong (``alert``)."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table of the page."""

    key: str
    caption: str
    headings: tuple[str, ...]
    empty: str
    """The text in the place of the table, if it has no rows."""


TABLES = (
    Table(
        "now",
        "Pools now",
        ("Pool", "In use", "Free", "Open", "Limit", "Waiting", "State"),
        "No pool is open: no code of this process has used a database on an event loop yet.",
    ),
    Table(
        "leases",
        "Connections in use",
        ("Pool", "Held by", "For", "State", "Code", "Server process"),
        "No connection of a pool is in use.",
    ),
    Table(
        "waiting",
        "Tasks that wait for a connection",
        ("Pool", "Task", "For", "Code"),
        "No task waits for a connection.",
    ),
    Table(
        "since",
        "Since each pool was opened",
        (
            *("Pool", "Requests", "Had to wait", "Average wait", "Failed"),
            *("Opened", "Failed to open", "Lost"),
        ),
        "No pool is open.",
    ),
    Table("shortcuts", "Shortcuts that are off", ("Shortcut", "Reason"), "All shortcuts are on."),
)


def contents() -> dict[str, object]:
    """Return what the page shows of this process, for JSON and for the template."""
    snapshots = take(MOST)
    return {
        "pid": os.getpid(),
        "at": f"{localtime(datetime.now(UTC)):%H:%M:%S}",
        "facts": facts(snapshots),
        "tables": {
            "now": [_now(each, name) for name, each in _named(snapshots)],
            "leases": [row for name, each in _named(snapshots) for row in _leases(each, name)],
            "waiting": [row for name, each in _named(snapshots) for row in _waiting(each, name)],
            "since": [_since(each, name) for name, each in _named(snapshots)],
            "shortcuts": [
                _row(each["name"], each["why_off"]) for each in listed() if not each["on"]
            ],
        },
    }


def tables(shown: Mapping[str, Any]) -> list[dict[str, object]]:
    """Return each table with the rows that it has in `shown`, each cell with its heading."""
    return [
        {
            "table": table,
            "rows": [
                {**row, "cells": [*zip(table.headings, row["cells"], strict=True)]}
                for row in shown["tables"][table.key]
            ],
        }
        for table in TABLES
    ]


def is_short() -> bool:
    """Return whether a request for a connection might have to wait in this process."""
    return any(_is_full(each) or each.outage for each in take(0)) or any(
        pool.get_stats().get("requests_waiting") for pool in _sync_pools()
    )


# --- Rows -------------------------------------------------------------------------------------


def _row(*cells: object, alert: bool = False) -> dict[str, object]:
    return {"cells": [*map(str, cells)], "alert": alert}


def _named(snapshots: list[Snapshot]) -> Iterator[tuple[str, Snapshot]]:
    """Yield each snapshot with a name for its pool; it names the thread if there are several."""
    several = len({each.thread for each in snapshots}) > 1
    for each in snapshots:
        alias = each.statistics.alias
        yield (f"{alias} in {each.thread}" if several else alias), each


def _is_full(snapshot: Snapshot) -> bool:
    s = snapshot.statistics
    return s.max_size is not None and s.leased >= s.max_size


def _now(snapshot: Snapshot, name: str) -> dict[str, object]:
    s, state = snapshot.statistics, "serves"
    if snapshot.outage:
        why = f": {'; '.join(snapshot.connecting)}" if snapshot.connecting else ""
        state = f"no connection can be opened, for {seconds(snapshot.outage)}{why}"
    elif snapshot.blocked:
        state = f"its event loop has been blocked for {seconds(snapshot.blocked)}"
    elif _is_full(snapshot):
        state = "all connections are in use"
    limit = "none" if s.max_size is None else s.max_size
    alert = state != "serves"
    return _row(name, s.leased, s.idle, s.size, limit, s.waiting, state, alert=alert)


def _leases(snapshot: Snapshot, name: str) -> Iterator[dict[str, object]]:
    for hold in snapshot.holds:
        code = hold.place or hold.opened_at or "unknown"
        yield _row(
            name,
            hold.holder,
            seconds(hold.seconds),
            hold.state,
            code,
            hold.server_process or "lost",
        )
    if (more := snapshot.statistics.leased - len(snapshot.holds)) > 0:
        yield _row(name, f"and {more} more", "", "", "", "")


def _waiting(snapshot: Snapshot, name: str) -> Iterator[dict[str, object]]:
    for wait in snapshot.waits:
        age = "unknown" if wait.seconds is None else seconds(wait.seconds)
        yield _row(name, wait.waiter, age, wait.place or "unknown", alert=True)
    if (more := snapshot.statistics.waiting - len(snapshot.waits)) > 0:
        yield _row(name, f"and {more} more", "", "", alert=True)


def _since(snapshot: Snapshot, name: str) -> dict[str, object]:
    s = snapshot.statistics
    average = (
        "none" if not s.requests_queued else f"{s.requests_wait_ms / s.requests_queued:.0f} ms"
    )
    return _row(
        name,
        *(s.requests, s.requests_queued, average, s.requests_errors),
        *(s.connections_made, s.connections_errors, s.connections_lost),
    )


def seconds(value: float) -> str:
    """Return a time as a text of few characters."""
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(int(value), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


# --- Facts ------------------------------------------------------------------------------------


def facts(snapshots: list[Snapshot]) -> dict[str, str]:
    """Return sentences about the process, by their headings."""
    total = metrics.connections()
    limits = ("no limit" if total.async_max is None else total.async_max), total.sync_max
    threads = {each.thread for each in snapshots}
    shortcuts = [*listed()]
    return {
        "Open connections": f"{total.open} of {'no limit' if total.max is None else total.max}",
        "Of pools on event loops": f"{total.async_open} of {limits[0]}",
        "Of sync code": f"{total.sync_open} of {limits[1]}",
        "Event loops with pools": str(len(threads)),
        "Shortcuts": f"{sum(each['on'] for each in shortcuts)} of {len(shortcuts)} are on",
        "Versions": _versions(),
    }


def _versions() -> str:
    return (
        f"pgbackend {__version__}, Django {django.__version__}, psycopg "
        f"{psycopg.__version__} ({psycopg.pq.__impl__}), Python {platform.python_version()}"
    )


def _sync_pools() -> Iterable[Any]:
    from .base import DatabaseWrapper  # needs Django's apps

    return list(DatabaseWrapper._connection_pools.values())  # noqa: SLF001 - Django's name


_SERVER = (
    "SELECT split_part(current_setting('server_version'), ' ', 1), "
    "current_setting('max_connections')::int, "
    "current_setting('superuser_reserved_connections')::int"
    " + coalesce(current_setting('reserved_connections', true), '0')::int, "
    "(SELECT sum(numbackends) FROM pg_stat_database)"
)


def servers() -> dict[str, str]:
    """Return a sentence about the server of each alias that can be asked without waiting."""
    return {alias: _server(alias) for alias in connections if conf.alias_is_ours(alias)}


def _server(alias: str) -> str:
    wrapper: Any = connections[alias]
    if not _has_free(wrapper):
        return "not asked: no connection is free at the moment"
    try:
        with wrapper.cursor() as cursor:
            cursor.execute(_SERVER)
            version, most, reserved, used = cursor.fetchone()
    except Exception as exc:
        return f"could not be asked ({type(exc).__name__})"
    return f"PostgreSQL {version}: {used} of {most} connections in use; {reserved} are reserved"


def _has_free(wrapper: Any) -> bool:
    """Return whether a statement would be sent at once, on a connection that is open already."""
    if wrapper.connection is not None:
        return True
    if bridge.current() is None:
        return False
    here = asyncio.get_running_loop()  # a pool that is not open yet is not opened for this
    return any(
        pool.name == wrapper.alias and pool.loop is here and bool(pool.next_lives())
        for pool in open_pools()
    )
