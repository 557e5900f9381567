"""Loads values of the server as Django expects them, in fewer steps, and notices registrations.

Django keeps the adapters of all connections to come in a template, on which projects register
loaders and dumpers of their own (`get_adapters_template()`). It is used as it is, not copied: what
is registered on it reaches each connection that is opened afterwards. Those of the async pools are
not for code to close; they are replaced, so that the next lease has one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from datetime import UTC, tzinfo
from functools import partial
from typing import Any

from django.db.backends.postgresql.psycopg_any import (
    BaseTzLoader,
    get_adapters_template,
    register_tzloader,
)
from psycopg import adapters
from psycopg.abc import AdaptContext, Dumper, Loader
from psycopg.adapt import AdaptersMap
from psycopg.postgres import types
from psycopg.pq import Format

from .driver.loops import renew_pools

_TIMESTAMPTZ: int = types["timestamptz"].oid
_PSYCOPGS: Any = adapters.get_loader(_TIMESTAMPTZ, Format.TEXT)


class Template(AdaptersMap):
    """Django's template, which tells the pools when something new is registered on it."""

    registered: dict[Any, Any]
    """What has been registered last: who registers the same again changes nothing."""

    def register_dumper(self, cls: type | str | None, dumper: type[Dumper]) -> None:
        super().register_dumper(cls, dumper)
        self._tell((cls, dumper.format), dumper)

    def register_loader(self, oid: int | str, loader: type[Loader]) -> None:
        super().register_loader(oid, loader)
        self._tell((oid, loader.format), loader)

    def _tell(self, what: Hashable, by: object) -> None:
        if self.registered.get(what) is not by:
            self.registered[what] = by
            renew_pools()


def prepare_template(template: Any, timezone: tzinfo | None) -> None:
    """Let Django's `template` load timestamps without repeating what is done, and tell of changes.

    Django puts its `timezone` into each timestamp that psycopg has loaded, in Python. Where both
    are UTC it is there already, and psycopg's loader, which is C code, may do it alone. Connections
    of Django's own engine load the same.
    """
    if all(template is not get_adapters_template(use_tz, timezone) for use_tz in (True, False)):
        return  # somebody's own
    loader = template.get_loader(_TIMESTAMPTZ, Format.TEXT)
    if _may_be_spared(loader):
        AdaptersMap.register_loader(template, _TIMESTAMPTZ, _without_detour(loader))
    if type(template) is not Template:
        template.registered = {}
        template.__class__ = Template


def _may_be_spared(loader: type[Any]) -> bool:
    """Return whether `loader` is Django's own, and puts UTC into timestamps."""
    if not issubclass(loader, BaseTzLoader) or issubclass(loader, _Fast):
        return False
    return bool(loader.load is BaseTzLoader.load and loader.timezone is UTC)


class _Fast:
    """Marks the loaders that are made here."""


def _without_detour(djangos: Any) -> type[Loader]:
    class UTCLoader(_Fast, djangos):  # type: ignore[misc]
        def __new__(cls, oid: int, context: AdaptContext | None = None) -> Any:
            # The session's, which may have been set since it was prepared.
            if _timezone_of(context) == b"UTC":
                return _PSYCOPGS(oid, context)
            return djangos(oid, context)

    return UTCLoader


def _timezone_of(context: AdaptContext | None) -> bytes | None:
    connection = None if context is None else context.connection
    if connection is None:
        return None
    return connection.pgconn.parameter_status(b"TimeZone")


def adapting(timezone: tzinfo | None, adapters: AdaptersMap) -> Callable[[Any], None] | None:
    """Return a function that lets a cursor load timestamps in `timezone`; None if it does."""
    loader: Any = adapters.get_loader(_TIMESTAMPTZ, Format.TEXT)
    return None if loader.timezone == timezone else partial(register_tzloader, timezone)
