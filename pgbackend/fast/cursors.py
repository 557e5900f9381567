"""Opens a cursor on an open connection without Django's search for one: the shortcut `cursors`.

Synchronous code outside of transactions opens most cursors on a connection that is open already.
Django still calls methods that look for a pool, a failed health check and a connection. The methods
of this module replace those of `pgbackend.wrapper.cursors`: they check if any of that can matter;
if not, they only take Django's remaining steps.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from operator import attrgetter, is_
from typing import Any

from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.postgresql.base import DatabaseWrapper as PostgresDatabaseWrapper

from pgbackend import state
from pgbackend.adapters import adapting
from pgbackend.driver import bridge
from pgbackend.driver.bridge import Portal
from pgbackend.patches import if_unpatched, lookup, unpatched
from pgbackend.wrapper import streams
from pgbackend.wrapper.cursors import Cursors

_get_running_loop = asyncio._get_running_loop
_running = bridge.running

#: The engine's methods: the plain way.
_plain_cursor = Cursors.cursor
_plain_create_cursor = Cursors.create_cursor

#: Django's `cursor()` and `create_cursor()`, which somebody may patch later.
_CURSOR = if_unpatched(PostgresDatabaseWrapper.cursor)
_CREATE_CURSOR = if_unpatched(PostgresDatabaseWrapper.create_cursor)
#: Django's `cursor()` without the guard `async_unsafe`: `cursor()` below checks instead.
_open_cursor: Callable[..., Any] = inspect.unwrap(PostgresDatabaseWrapper.cursor)

#: The names of Django's `_cursor()`, and of the methods that it calls to get a connection.
_ASKING = ("_cursor", "close_if_health_check_failed", "ensure_connection")
_NAMES = frozenset(_ASKING)
_asks = attrgetter(*_ASKING)
#: The same methods as Django's classes have them now, and one that these call.
_djangos_asks = lookup(
    "its._cursor its.close_if_health_check_failed its.ensure_connection "
    "base.close_if_health_check_failed",
    its=PostgresDatabaseWrapper,
    base=BaseDatabaseWrapper,
)
_DJANGO_ASKS = unpatched(*_djangos_asks())


def cursor(self: Cursors) -> Any:
    """Open a cursor by Django's `cursor()`, without the guard `async_unsafe` around it.

    Raises an error itself if a loop runs and the caller is not green.
    """
    if type(self)._cursor is not _cursor or PostgresDatabaseWrapper.cursor is not _CURSOR:
        return _plain_cursor(self)
    if _get_running_loop() is not None:
        here = _running()
        if type(here) is not Portal:
            self.check_context("cursor")
        elif (found := self.cursor_for_compiler(here)) is not None:
            return found
    return _open_cursor(self)


def _cursor(self: Cursors, name: str | None = None) -> Any:
    """Make a cursor if the connection is open and no method is patched; else take the plain way."""
    if name and streams.is_apart(self):
        return streams.open_stream(self, name)
    own = state.plain_state(self)
    if own is None:
        return self._cursor_in_turn(name)
    if (
        own.connection is None
        or own.health_check_enabled
        # or one of the methods that Django would call is patched or overridden
        or not all(map(is_, _djangos_asks(), _DJANGO_ASKS))
        or not all(map(is_, _asks(type(self)), _OWN_ASKS))
        or not self.__dict__.keys().isdisjoint(_NAMES)
    ):
        return super(Cursors, self)._cursor(name)
    with self.wrap_database_errors:  # Django's steps after it has a connection
        return self._prepare_cursor(self.create_cursor(name))


def close_if_health_check_failed(self: Cursors) -> None:
    """Do what Django's method does, but return at once if health checks are not enabled."""
    if state.current_state(self).health_check_enabled or not all(
        map(is_, _djangos_asks(), _DJANGO_ASKS)
    ):
        super(Cursors, self).close_if_health_check_failed()


def create_cursor(self: Cursors, name: str | None = None) -> Any:
    """Make a cursor as Django does; but look the connection up once, and not at each step."""
    if name or PostgresDatabaseWrapper.create_cursor is not _CREATE_CURSOR:
        return _plain_create_cursor(self, name)
    if _get_running_loop() is not None:
        self.check_context("create_cursor")
    connection = self.connection
    made = connection.cursor()
    if (prepare := adapting(self.timezone, connection.adapters)) is not None:
        prepare(made)
    return made


#: The methods `_ASKING` of a wrapper class that overrides none of them.
_OWN_ASKS = (_cursor, close_if_health_check_failed, Cursors.ensure_connection)


def install() -> None:
    """Replace four methods of the engine's class `Cursors` by those of this module."""
    for method in (cursor, _cursor, close_if_health_check_failed, create_cursor):
        setattr(Cursors, method.__name__, method)
