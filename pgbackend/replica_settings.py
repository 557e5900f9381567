"""Reads from `DATABASES` which alias is a replica of which, and finds what is wrong with that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from django.db import connections

from . import options
from .conf import alias_is_ours
from .options import REPLICA_OF, Problem

#: The key of ``TEST`` that a test runner's set-up has set for a mirror: see creation.py.
IS_MIRRORED = "PGBACKEND_IS_MIRRORED"

_CURE = "Set it to the alias of the primary, whose ENGINE is 'pgbackend', too."


def families() -> dict[str, list[str]]:
    """Return the aliases of the replicas of each primary that has any, by the primary's alias."""
    found: dict[str, list[str]] = {}
    for alias, settings_dict in connections.settings.items():
        if (primary := _primary_of(settings_dict)) is not None:
            found.setdefault(primary, []).append(alias)
    return found


def is_mirrored(alias: str) -> bool:
    """Return whether a test runner has made the replica `alias` a mirror of its primary."""
    return bool(connections.settings[alias].get("TEST", {}).get(IS_MIRRORED))


def problems(alias: str, settings_dict: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield what is wrong with the primary that `settings_dict`, those of `alias`, names.

    `options.problems()` finds what can be seen without the other aliases.
    """
    primary = _primary_of(settings_dict)
    if not primary or not isinstance(primary, str) or primary == alias:
        return
    text = f"DATABASES[{alias!r}]['OPTIONS'][{REPLICA_OF!r}] is {primary!r}, "
    if primary not in connections.settings:
        yield Problem("pgbackend.E013", f"{text}which is no alias.", _CURE)
    elif _primary_of(connections.settings[primary]) is not None:
        yield Problem("pgbackend.E013", f"{text}which is itself a replica.", _CURE)
    elif not alias_is_ours(primary):
        yield Problem("pgbackend.E013", f"{text}whose ENGINE is another one.", _CURE)


def check() -> None:
    """Raise `ImproperlyConfigured` if an alias is no right replica of another one."""
    for alias, settings_dict in connections.settings.items():
        of_alias = options.problems_of_replica(alias, settings_dict)
        for problem in (*of_alias, *problems(alias, settings_dict)):
            raise problem.error()


def _primary_of(settings_dict: Mapping[str, Any]) -> Any:
    """Return the primary that `settings_dict` names; None for an alias that is no replica."""
    return settings_dict.get("OPTIONS", {}).get(REPLICA_OF)
