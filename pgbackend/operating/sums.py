"""Adds up the connections that the settings allow: `manage.py pgbackend sum`.

The formula is that of docs/scale-out.md: each process has for each alias an async pool on each of
its event loops, and for sync code either one synchronous pool or a connection of each thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from django.db import connections

from pgbackend import conf, options, replica_settings

from .findings import ERROR, NOTE, OK, WARNING, Finding
from .server import Server


@dataclass(frozen=True, slots=True)
class Load:
    """The number of processes of a project, and of the loops and threads in each."""

    processes: int = 1
    loops: int = 1
    threads: int = 1
    listens: bool = False


@dataclass(frozen=True, slots=True)
class Sum:
    """The connections that one process may open by one alias; None stands for no limit."""

    alias: str
    asynchronous: int | None
    sync: int
    listening: int
    monitors: int

    @property
    def total(self) -> int | None:
        if self.asynchronous is None:
            return None
        return self.asynchronous + self.sync + self.listening + self.monitors


def own_aliases() -> list[str]:
    """Return the aliases whose engine is pgbackend."""
    return [alias for alias in connections if conf.alias_is_ours(alias)]


def of_process(alias: str, load: Load) -> Sum:
    """Return the connections that one process of `load` may open by `alias`."""
    settings_dict = connections.settings[alias]
    most = options.sizes(_pool(settings_dict))[1]
    unlimited = conf.is_without_pool(settings_dict) and load.loops > 0
    return Sum(
        alias=alias,
        asynchronous=None if unlimited else most * load.loops,
        sync=_of_sync_code(settings_dict, load.threads),
        listening=load.loops if load.listens else 0,
        monitors=1 if _is_watched(alias) else 0,
    )


def _pool(settings_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    given = settings_dict["OPTIONS"].get("pool")
    return given if isinstance(given, Mapping) else {}


def _of_sync_code(settings_dict: Mapping[str, Any], threads: int) -> int:
    if not _has_sync_pool(settings_dict) or not threads:
        return threads
    pool = _pool(settings_dict)
    sizes = {**options.sync_sizes(pool), **pool}
    low = int(sizes.get("min_size", 4))  # psycopg_pool's default
    high = sizes.get("max_size")
    return low if high is None else int(high)


def _has_sync_pool(settings_dict: Mapping[str, Any]) -> bool:
    return bool(settings_dict["OPTIONS"].get("pool"))


def _listens_elsewhere(alias: str) -> bool:
    """Return whether listeners go to the server that OPTIONS["listen"] names, past the pooler."""
    return bool(connections.settings[alias]["OPTIONS"].get("listen"))


def _is_watched(alias: str) -> bool:
    """Return whether a replica's monitor connects by `alias`, if a router sends reads there."""
    families = replica_settings.families()
    return any(replicas and alias in (primary, *replicas) for primary, replicas in families.items())


def compared(
    sums: Iterable[Sum], load: Load, servers: Mapping[str, Server], pooled: Iterable[str] = ()
) -> list[Finding]:
    """Return for each server whether it has as many connections as the aliases may open.

    `servers` are the reached servers by alias; the aliases of `pooled` reach a transaction pooler.
    """
    by_place: dict[str, list[Sum]] = {}
    for each in sums:
        if each.alias in servers:
            by_place.setdefault(servers[each.alias].place, []).append(each)
    return [
        _compared(together, load, servers[together[0].alias], {*pooled})
        for together in by_place.values()
    ]


def _compared(together: list[Sum], load: Load, server: Server, pooled: set[str]) -> Finding:
    names = " and ".join(repr(each.alias) for each in together)
    totals = [each.total for each in together]
    if any(total is None for total in totals):
        return Finding(
            NOTE,
            f"{names}: OPTIONS['pool'] is None, so each task may open a connection: the pooler's "
            "own limit (PgBouncer's max_client_conn) is the only one.",
        )
    elsewhere = sum(each.listening for each in together if _listens_elsewhere(each.alias))
    wanted = (sum(filter(None, totals)) - elsewhere) * load.processes
    text = (
        f"{names}: {load.processes} x {wanted // load.processes} = {wanted} connections may be "
        f"opened; the server allows {_limits(server)}."
    )
    if pooled & {each.alias for each in together}:
        text = f"{names}: {wanted} connections to the pooler may be opened."
        cure = f"Let the pooler accept as many clients: max_client_conn at least {wanted}."
        return Finding(NOTE, text, cure)
    if wanted > server.allowed:
        return Finding(ERROR, text, _cure(together, load, server, wanted))
    if wanted > server.allowed * 0.9:
        cure = "Leave some for migrations, shells and monitoring; a deployment may run old and new "
        return Finding(WARNING, text, cure + "processes side by side.")
    return Finding(OK, text)


def _limits(server: Server) -> str:
    said = [f"{server.unreserved} (max_connections {server.whole('max_connections')}"]
    kept = ("superuser_reserved_connections", "reserved_connections")
    if not server.is_superuser:
        said += [f"{name} {server.whole(name)}" for name in kept if server.whole(name)]
    text = ", less ".join(said) + ")"
    if server.role_limit >= 0 and not server.is_superuser:
        text += f", the role {server.role_limit}"
    if server.database_limit >= 0 and not server.is_superuser:
        text += f", the database {server.database_limit}"
    return f"{text}; {server.in_use} are in use now"


def _cure(together: list[Sum], load: Load, server: Server, wanted: int) -> str:
    """Return which setting to change, and to what."""
    names = " and ".join(f"DATABASES[{each.alias!r}]" for each in together)
    cures = []
    if (fits := _size_that_fits(together, load, server)) >= 1:
        cures.append(f"set OPTIONS['pool']['max_size'] of {names} to at most {fits}")
    each = wanted // load.processes
    if server.allowed >= each:
        cures.append(f"run at most {server.allowed // each} processes")
    cures.append(_raised(server, wanted))
    cures.append("put a transaction pooler between (docs/poolers.md)")
    text = ", or ".join(cures)
    return f"{text[0].upper()}{text[1:]}."


def _size_that_fits(together: list[Sum], load: Load, server: Server) -> int:
    """Return the `max_size` with which the pools of all processes fit; 0 or less if none does."""
    pools, others = 0, 0
    for each in together:
        has_pool = _has_sync_pool(connections.settings[each.alias]) and load.threads > 0
        pools += load.loops + has_pool
        others += each.listening + each.monitors + (0 if has_pool else each.sync)
    return (server.allowed // load.processes - others) // pools if pools else 0


def _raised(server: Server, wanted: int) -> str:
    limited = [
        name
        for name, limit in (("role", server.role_limit), ("database", server.database_limit))
        if 0 <= limit < wanted and not server.is_superuser
    ]
    if limited:
        return f"raise the CONNECTION LIMIT of the {' and the '.join(limited)} to {wanted}"
    kept = server.whole("max_connections") - server.unreserved
    return f"raise the server's max_connections to {wanted + kept} or more"
