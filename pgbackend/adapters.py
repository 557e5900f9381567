"""Loads timestamps in fewer steps than Django, and renews the pools when an adapter is registered.

Django keeps the adapters of all future connections in a template (`get_adapters_template()`), on
which projects register loaders and dumpers of their own. pgbackend uses that template itself, not a
copy, so every connection that is opened after a registration has the new adapter. Connections that
are open already do not get it: the pools close them (leased ones when they come back).
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
    """A class for Django's template of adapters: registering an adapter on it renews the pools."""

    registered: dict[Any, Any]
    """The adapter that was registered last, by type and format: a repeated one renews no pool."""

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
    """Make Django's `template` load UTC timestamps in C alone, and renew pools on registrations.

    A template that the project has made is left unchanged.

    Django's loader calls psycopg's, which is C code, and then sets `timezone` on the timestamp, in
    Python. If `timezone` and the time zone of the server session are both UTC, this second step
    changes nothing, and is left out. Connections of Django's own engine share the template, and
    load the same values as before.
    """
    if all(template is not get_adapters_template(use_tz, timezone) for use_tz in (True, False)):
        return  # it is not Django's: the project has made it
    loader = template.get_loader(_TIMESTAMPTZ, Format.TEXT)
    if _may_be_spared(loader):
        AdaptersMap.register_loader(template, _TIMESTAMPTZ, _without_detour(loader))
    if type(template) is not Template:
        template.registered = {}
        template.__class__ = Template


def _may_be_spared(loader: type[Any]) -> bool:
    """Return True if `loader` is Django's own, unpatched, and sets the time zone UTC."""
    if not issubclass(loader, BaseTzLoader) or issubclass(loader, _Fast):
        return False
    return bool(loader.load is BaseTzLoader.load and loader.timezone is UTC)


class _Fast:
    """A mixin without members: marks the loaders that `_without_detour()` has made."""


def _without_detour(djangos: Any) -> type[Loader]:
    class UTCLoader(_Fast, djangos):  # type: ignore[misc]
        def __new__(cls, oid: int, context: AdaptContext | None = None) -> Any:
            # Asked of the connection: `SET TIME ZONE` may have changed it since it was opened.
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
    """Return a function that makes a cursor load timestamps in `timezone`; None if none is needed.

    `adapters` are those of the cursor's connection. If they load timestamps in `timezone` already,
    the function is not needed.
    """
    loader: Any = adapters.get_loader(_TIMESTAMPTZ, Format.TEXT)
    return None if loader.timezone == timezone else partial(register_tzloader, timezone)
