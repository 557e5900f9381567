"""Connects as the project is configured, and gathers what it finds: `manage.py pgbackend check`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from django.db import connections

from pgbackend import conf, options

from . import advice, connecting, failures, poolers, server, sums, this_process
from .findings import ERROR, OK, Finding, has_error, shown
from .versions import versions


@dataclass
class Alias:
    """The findings of one alias, and its server, if that was reached."""

    name: str
    options: Mapping[str, Any]
    findings: list[Finding] = field(default_factory=list)
    server: server.Server | None = None
    pooler: str | None = None


@dataclass
class Report:
    """All findings: of this installation, of each alias, and of the sum of the connections."""

    versions: Mapping[str, str]
    project: list[Finding]
    aliases: list[Alias]
    limits: list[Finding]

    def is_well(self) -> bool:
        """Return whether nothing is an error."""
        found = [*self.project, *self.limits]
        return not has_error(found) and not any(has_error(each.findings) for each in self.aliases)


def check(
    names: Iterable[str], *, connect: bool = True, show: Callable[[str, Any], Any] = shown
) -> Report:
    """Return what there is to say of the aliases `names`, whose engine is pgbackend.

    `show` says what may be shown of each setting.
    """
    aliases = [_of_alias(name, show, connect=connect) for name in names]
    reached = {each.name: each.server for each in aliases if each.server is not None}
    load = sums.Load()
    pooled = [each.name for each in aliases if each.pooler not in {None, poolers.NONE}]
    one_process = [sums.of_process(name, load) for name in reached]
    return Report(
        versions=versions(),
        project=list(this_process.findings()),
        aliases=aliases,
        limits=sums.compared(one_process, load, reached, pooled),
    )


def _of_alias(name: str, show: Callable[[str, Any], Any], *, connect: bool) -> Alias:
    settings_dict = connections.settings[name]
    found = Alias(name, options_in_force(settings_dict, show))
    wrapper: Any = connections[name]
    problems = [Finding(ERROR, each.text, each.hint) for each in wrapper.option_problems()]
    found.findings += problems
    if connect and not problems:
        _connect(found, settings_dict)
    return found


def _connect(found: Alias, settings_dict: Mapping[str, Any]) -> None:
    """Connect in each way that the settings allow; by the pools, if it is possible without."""
    try:
        with connecting.connected(found.name) as wrapper:
            found.server = server.ask(wrapper)
            found.findings.append(Finding(OK, "Sync code connects."))
            found.findings += advice.of_server(found.name, settings_dict, found.server)
            found.pooler = poolers.kind_of(found.name, wrapper)
            found.findings.append(advice.of_pooler(found.name, settings_dict, found.pooler))
    except Exception as exc:
        found.findings.append(failures.explained(found.name, settings_dict, exc))
    else:
        found.findings += _through_pools(found.name, settings_dict)


def _through_pools(name: str, settings_dict: Mapping[str, Any]) -> Iterator[Finding]:
    """Connect by the pools, for what may fail in them only: their functions, for example."""
    ways = {"Django's pool for sync code": connecting.through_sync_pool}
    if not settings_dict["OPTIONS"].get("pool"):
        ways.clear()
    ways["The pool for async code"] = connecting.through_async_pool
    for way, connect in ways.items():
        try:
            connect(name)
            yield Finding(OK, f"{way} connects.")
        except Exception as exc:
            by = f" by {way[0].lower() if way.startswith('The') else way[0]}{way[1:]}"
            yield failures.explained(name, settings_dict, exc, by)


#: The settings of an alias that are shown if they are not empty.
_SHOWN = (
    *("ENGINE", "HOST", "PORT", "NAME", "USER", "CONN_MAX_AGE", "CONN_HEALTH_CHECKS"),
    *("DISABLE_SERVER_SIDE_CURSORS", "ATOMIC_REQUESTS"),
)


def options_in_force(
    settings_dict: Mapping[str, Any], show: Callable[[str, Any], Any] = shown
) -> dict[str, Any]:
    """Return the settings of an alias with the defaults of the pool, and without secrets."""
    said = {name: show(name, settings_dict[name]) for name in _SHOWN if settings_dict.get(name)}
    given = {key: value for key, value in settings_dict["OPTIONS"].items() if key != "pool"}
    if given:
        said["OPTIONS"] = show("OPTIONS", given)
    said["pool"] = _pool_in_force(settings_dict, show)
    return said


def _pool_in_force(settings_dict: Mapping[str, Any], show: Callable[[str, Any], Any]) -> Any:
    if conf.is_without_pool(settings_dict):
        return None
    given = settings_dict["OPTIONS"].get("pool")
    if given and given is not True and not isinstance(given, Mapping):
        return show("pool", given)
    return show("pool", {**options.POOL_DEFAULTS, **(given if isinstance(given, Mapping) else {})})
