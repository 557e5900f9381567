"""Connecting: parameters of connections, their pools, and how a new connection is set up.

Synchronous code has one connection in each thread, or Django's synchronous pool, whose connections
are the driver's. Async code has one pool for each alias and loop, whose connections are set up as
Django's `connect()` sets up a connection.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.db.backends.signals import connection_created
from django.utils.functional import cached_property
from psycopg import IsolationLevel

from pgbackend import conf, driver, state
from pgbackend.adapters import prepare_template
from pgbackend.driver.connection import ConnectArguments, Connection
from pgbackend.driver.loops import close_pools, get_pool
from pgbackend.driver.pool import Pool, PoolOptions

from .contexts import Contexts


class Connecting(Contexts):
    """A wrapper that knows how to connect, and which pools its connections come from."""

    # Not Django's dictionary: one process may use an alias with Django's engine, then with ours.
    _connection_pools: dict[str, Any] = {}  # noqa: RUF012

    # The settings contain the password. Django's debug page, and similar tools, show the local
    # variables of an error's frames: so errors are raised without the frames that had the settings.

    def get_connection_params(self) -> dict[str, Any]:
        try:
            params = ConnectArguments(super().get_connection_params())
        except ImproperlyConfigured as exc:
            raise exc.with_traceback(None) from None
        params.pop("session_reset", None)
        prepare_template(params["context"], self.timezone)
        return params

    def get_new_connection(self, conn_params: dict[str, Any]) -> Any:
        if (prepared := state.being_prepared(self)) is not None:
            return prepared
        try:
            connection = super().get_new_connection(conn_params)
        except driver.Error as exc:
            exc.__context__ = None
            raise exc.with_traceback(None) from None
        if isinstance(connection, Connection):
            # It may come from the synchronous pool. Until it is set up, it is outside of blocks.
            connection.session_settings.database = None
        return connection

    @cached_property
    def pg_version(self) -> int:
        with self.backend_statement(), self.temporary_connection():
            version: int = self.connection.info.server_version
        return version

    # --- Pools ---

    @property
    def pool(self) -> Any:
        """Return Django's synchronous pool, if the option `pool` is set; None in async code."""
        if not self.settings_dict["OPTIONS"].get("pool"):
            return None
        if self.alias not in self._connection_pools:
            return self._make_sync_pool()
        if self._uses_pool and state.in_async_context():
            return None
        return super().pool

    def _make_sync_pool(self) -> Any:
        if self._uses_pool and state.in_async_context():
            return None
        stand_in = copy.copy(self)
        given = self.settings_dict["OPTIONS"]["pool"]
        options = {} if given is True else given
        options = {"connection_class": driver.Connection, **options}
        options.pop("outage_grace", None)  # of the async pools only
        stand_in.settings_dict = {
            **self.settings_dict,
            "OPTIONS": {**self.settings_dict["OPTIONS"], "pool": options},
        }
        return super(Connecting, stand_in).pool

    def close_pool(self) -> None:
        """Close the synchronous pool and the pools of all loops. May be called in any thread."""
        if self.alias in self._connection_pools:
            self._connection_pools.pop(self.alias).close()
        if conf.is_shared(self.alias, self.settings_dict):
            close_pools(self._key)

    def _async_pool(self) -> Pool:
        settings_dict = self.settings_dict
        return get_pool((id(settings_dict), settings_dict["NAME"]), self.alias, self._pool_options)

    def _pool_options(self) -> PoolOptions:
        try:
            return self._read_pool_options()
        except ImproperlyConfigured as exc:
            raise exc.with_traceback(None) from None

    def _read_pool_options(self) -> PoolOptions:
        self.check_settings()
        self._isolation_level_option()
        params = ConnectArguments(self.get_connection_params())
        pool = conf.pool_options(self.alias, self.settings_dict)
        return PoolOptions(
            connect=ConnectArguments(
                params,
                facade_class=conf.facade_class(self.alias, self.settings_dict),
            ),
            outage_grace=pool.pop("outage_grace"),
            pool=pool,
            initialise=functools.partial(self._initialise, params),
            session_reset=conf.session_reset(self.alias, self.settings_dict["OPTIONS"]),
            soiled_unless_vouched=True,
        )

    def _initialise(self, params: dict[str, Any], connection: Connection) -> None:
        """Set up a connection of the async pool, as Django's `connect()` sets up a connection.

        Calls `get_new_connection()`, which returns `connection` here, so that overrides of that
        method in derived wrappers apply to it, too.
        """
        connection.isolation_level = self._isolation_level_option()
        with state.prepared(self, connection):
            self.get_new_connection(params)
            self.init_connection_state()
            connection_created.send(sender=type(self), connection=self)

    # --- The level of isolation ---

    @property
    def isolation_level(self) -> IsolationLevel | None:
        """Return the isolation level of transactions: the one that was set, else the pool's."""
        current = state.current_state(self)
        if current.pooled and current.isolation_level is None:
            return self._isolation_level_option() or IsolationLevel.READ_COMMITTED
        return current.isolation_level

    @isolation_level.setter
    def isolation_level(self, level: IsolationLevel | None) -> None:
        if self._ready:
            state.current_state(self).isolation_level = level

    def _isolation_level_option(self) -> IsolationLevel | None:
        value = self.settings_dict["OPTIONS"].get("isolation_level")
        if value is None:
            return None
        try:
            return IsolationLevel(value)
        except ValueError:
            raise ImproperlyConfigured(
                f"Invalid transaction isolation level {value} specified. "
                "Use one of the psycopg.IsolationLevel values."
            ) from None
