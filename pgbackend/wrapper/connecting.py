"""Connecting: parameters of connections, their pools, and how a new connection is set up.

Synchronous code has one connection in each thread, or Django's synchronous pool, whose connections
are the driver's. Async code has one pool for each alias and loop, whose connections are set up as
Django's `connect()` sets up a connection.
"""

from __future__ import annotations

import copy
import functools
from typing import Any, Self

from django.core.exceptions import ImproperlyConfigured, SynchronousOnlyOperation
from django.db import NotSupportedError
from django.db.backends.base.base import NO_DB_ALIAS
from django.db.backends.signals import connection_created
from django.utils.functional import cached_property
from psycopg import IsolationLevel

from pgbackend import conf, credentials, driver, options, replica_settings, state
from pgbackend.adapters import prepare_template
from pgbackend.driver import bridge
from pgbackend.driver.asking import ConnectArguments
from pgbackend.driver.connection import Connection
from pgbackend.driver.holding import HoldBounds
from pgbackend.driver.listening import Hub, HubOptions
from pgbackend.driver.loops import close_pools, get_hub, get_pool
from pgbackend.driver.pool import Pool, PoolOptions
from pgbackend.driver.time_zones import are_same

from .contexts import Contexts


class Connecting(Contexts):
    """A wrapper that knows how to connect, and which pools its connections come from."""

    # Not Django's dictionary: one process may use an alias with Django's engine, then with ours.
    _connection_pools: dict[str, Any] = {}  # noqa: RUF012

    #: Whether Django asks for parameters that it will not use, since its synchronous pool connects.
    _asked_in_vain = False

    # The settings contain the password. Django's debug page, and similar tools, show the local
    # variables of an error's frames: so errors are raised without the frames that had the settings.

    def check_settings(self) -> None:
        super().check_settings()
        try:
            for problem in self.option_problems():
                raise problem.error()
        except ImproperlyConfigured as exc:
            raise exc.with_traceback(None) from None

    @classmethod
    def has_own_parameters(cls) -> bool:
        """Return whether a derived wrapper overrides `get_connection_params()`."""
        return cls.get_connection_params is not Connecting.get_connection_params

    def option_problems(self) -> list[options.Problem]:
        """Return what is wrong with the settings of this alias, for the system checks."""
        own = self.has_own_parameters()
        return [
            *options.problems(self.alias, self.settings_dict, has_own_parameters=own),
            *replica_settings.problems(self.alias, self.settings_dict),
        ]

    def get_connection_params(self) -> dict[str, Any]:
        """Return the arguments of `connect()`; options that are functions are asked now."""
        try:
            params = ConnectArguments(super().get_connection_params())
        except ImproperlyConfigured as exc:
            raise exc.with_traceback(None) from None
        for name in options.NOT_SENT:
            params.pop(name, None)
        if self.is_through_pooler():
            params["time_zone"] = self.timezone_name
        else:
            params.pop("pooler", None)
        prepare_template(params["context"], self.timezone)
        if self._asked_in_vain:
            asked = {name for name, value in params.items() if credentials.is_asked(name, value)}
            return ConnectArguments({name: params[name] for name in params.keys() - asked})
        try:
            return credentials.resolve(self.alias, self.settings_dict, params)
        except (driver.Error, ImproperlyConfigured, SynchronousOnlyOperation) as exc:
            raise exc.with_traceback(None) from exc.__cause__

    def connect(self) -> None:
        """Connect in sync code; an error keeps no frame that shows the parameters."""
        if self._has_sync_pool():
            vars(self)["_asked_in_vain"] = True
        try:
            super().connect()
        except Exception as exc:
            credentials.forget_parameters(exc)
            raise
        finally:
            vars(self).pop("_asked_in_vain", None)

    def get_new_connection(self, conn_params: dict[str, Any]) -> Any:
        if (prepared := state.being_prepared(self)) is not None:
            return prepared
        cause = None
        try:
            if not self._asked_in_vain:
                options.check_arguments(self.alias, conn_params)
            connection = super().get_new_connection(conn_params)
        except Exception as exc:
            if self._asked_in_vain and isinstance(exc, driver.Error):
                pool = self._connection_pools.get(self.alias)
                cause = pool and pool.kwargs.failure
            exc.__context__ = None
            raise exc.with_traceback(None) from cause
        if isinstance(connection, Connection):
            # It may come from the synchronous pool. Until it is set up, it is outside of blocks.
            connection.session_settings.database = None
            connection.asks_commit_id = conf.asks_commit_id(self.settings_dict)
            connection.thread_of = None if self.pool else self.alias
        return connection

    # --- Through a transaction pooler: nothing that a later transaction would need is set ---

    def is_through_pooler(self) -> bool:
        """Return whether a transaction pooler stands before the server: OPTIONS["pooler"]."""
        return options.is_through_pooler(self.settings_dict["OPTIONS"])

    def _configure_timezone(self, connection: Any) -> bool:
        if not self.is_through_pooler():
            return bool(super()._configure_timezone(connection))  # type: ignore[misc]
        has = connection.info.parameter_status("TimeZone")
        if self.timezone_name and not are_same(self.timezone_name, has):
            connection.close()  # psycopg_pool would not
            raise self._note_failure(
                ImproperlyConfigured(
                    f"The connection of {self.alias!r} has the time zone {has!r} instead of "
                    f"{self.timezone_name!r}: the pooler does not take it from the parameters of "
                    "a connection. Set it for the role: ALTER ROLE ... SET timezone = "
                    f"'{self.timezone_name}'."
                )
            )
        return False

    def _note_failure(self, exc: ImproperlyConfigured) -> ImproperlyConfigured:
        """Return `exc`; the synchronous pool, if there is one, shall tell it as the cause."""
        if (pool := self._connection_pools.get(self.alias)) is not None:
            pool.kwargs.failure = exc
        return exc

    def ensure_timezone(self) -> bool:
        if not self.is_through_pooler():
            return bool(super().ensure_timezone())
        self.close_pool()  # as Django does: new connections get the time zone
        if self._own.connection is not None and not self._own.in_atomic_block:
            self._close_own()
        elif self.connection is not None:
            with self.backend_statement(), self.connection.cursor() as cursor:
                name = [self.timezone_name]
                cursor.execute("SELECT set_config('TimeZone', %s, true)", name)
        return False

    def _configure_role(self, connection: Any) -> bool:
        if not self.is_through_pooler():
            return bool(super()._configure_role(connection))  # type: ignore[misc]
        role = self.settings_dict["OPTIONS"].get("assume_role")
        connection.session_settings.base = {"role": role} if role else {}
        return False

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

    def _has_sync_pool(self) -> bool:
        """Return whether sync code gets its connections from Django's synchronous pool."""
        return bool(self.settings_dict["OPTIONS"].get("pool")) and self.alias != NO_DB_ALIAS

    def _make_sync_pool(self) -> Any:
        if self._uses_pool and state.in_async_context():
            return None
        self.check_settings()
        asking, stand_in = copy.copy(self), copy.copy(self)
        vars(asking).pop("_asked_in_vain", None)
        # Django would ask once, and connect with that for ever.
        vars(stand_in)["get_connection_params"] = functools.partial(_AskedEachTime, asking)
        given = self.settings_dict["OPTIONS"]["pool"]
        given = {} if given is True else given
        for problem in options.unusable_in_sync_code(self.alias, given):
            raise problem.error()
        pool = {"connection_class": driver.Connection, **options.sync_sizes(given), **given}
        check = pool.pop("check", None)
        pool = {name: pool[name] for name in pool if name not in options.NOT_PSYCOPGS}
        stand_in.settings_dict = {
            **self.settings_dict,
            "OPTIONS": {**self.settings_dict["OPTIONS"], "pool": pool},
        }
        made = super(Connecting, stand_in).pool
        if check is not None:
            # Django 5.2 names the argument itself, and so cannot be given it with the others.
            made._check = check  # noqa: SLF001
        return made

    def close_pool(self) -> None:
        """Close the synchronous pool and the pools of all loops. May be called in any thread.

        The connections that listen are closed, too; their listeners get `PoolClosed`.
        """
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
        pool = conf.pool_options(self.settings_dict)
        hold = HoldBounds(pool.pop("hold_warning"), pool.pop("max_hold"))
        reset = self.settings_dict["OPTIONS"].get("session_reset", "dirty")
        if self.is_through_pooler() or conf.is_without_pool(self.settings_dict):
            reset = "never"  # nobody uses the session afterwards, or only a pooler's clients
        return PoolOptions(
            connect={"facade_class": conf.facade_class(self.settings_dict)},
            ask=self._ask,
            raised_as_is=credentials.RAISED_AS_IS,
            outage_grace=pool.pop("outage_grace"),
            pool=pool,
            keeps_none=conf.is_without_pool(self.settings_dict),
            hold=hold,
            initialise=self._initialise,
            session_reset=reset,
            soiled_unless_vouched=True,
        )

    async def _ask(self) -> dict[str, Any]:
        """Return the arguments of the next connection of the async pool.

        A derived wrapper's `get_connection_params()` may block (on the network, for a token); so it
        runs in a thread.
        """
        if self.has_own_parameters():
            where = f"get_connection_params() of DATABASES[{self.alias!r}]"
            params = await credentials.ask_in_thread(where, self.get_connection_params)
        else:
            params = await bridge.run(self.get_connection_params)
        options.check_arguments(self.alias, params)
        return params

    def _initialise(self, connection: Connection) -> None:
        """Set up a connection of the async pool, as Django's `connect()` sets up a connection.

        Calls `get_new_connection()`, which returns `connection` here, so that overrides of that
        method in derived wrappers apply to it, too.
        """
        assert connection.physical is not None
        connection.isolation_level = self._isolation_level_option()
        connection.asks_commit_id = conf.asks_commit_id(self.settings_dict)
        with state.prepared(self, connection):
            self.get_new_connection(ConnectArguments(connection.physical.asked))
            self.init_connection_state()
            connection_created.send(sender=type(self), connection=self)

    # --- The connection that listens ---

    def listening_hub(self) -> Hub:
        """Return what listens for this alias on the running loop."""
        key = (self._key, self.settings_dict["NAME"])
        return get_hub(key, self.alias, self._hub_options)

    def _hub_options(self) -> HubOptions:
        self.check_settings()
        options_of_alias = self.settings_dict["OPTIONS"]
        if (primary := options_of_alias.get(options.REPLICA_OF)) is not None:
            raise NotSupportedError(
                f"{self.alias!r} is a replica, which cannot listen: use listen(using={primary!r})"
            )
        if self.is_through_pooler() and options.LISTEN not in options_of_alias:
            raise NotSupportedError(
                f"listen() cannot go through the transaction pooler of {self.alias!r}, which does "
                "not pass notifications on. Set OPTIONS['listen'] to the host and port of "
                "PostgreSQL itself: {'host': ..., 'port': ...}"
            )
        pool = conf.pool_options(self.settings_dict)
        return HubOptions(
            ask=self._ask_to_listen,
            timeout=pool["timeout"],
            grace=pool["outage_grace"],
            raised_as_is=credentials.RAISED_AS_IS,
        )

    async def _ask_to_listen(self) -> dict[str, Any]:
        """Return the arguments of the connection that listens: the alias's, but for `listen`."""
        params = ConnectArguments(options.only_libpqs(await self._ask()))
        own = options.listening_parameters(self.settings_dict["OPTIONS"].get(options.LISTEN))
        if "host" in own:
            params.pop("hostaddr", None)  # it would win
        params.update(own)
        name = params.get("application_name")
        params["application_name"] = f"{name} (listens)" if name else "pgbackend (listens)"
        return params

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
        return None if value is None else IsolationLevel(value)

    def copy(self, alias: str | None = None) -> Self:
        """Return another wrapper with a copy of the settings, as Django does.

        Functions among the settings are not copied: they may have locks, and caches to be shared.
        """
        settings_dict = self.settings_dict
        values = [*settings_dict.values(), *settings_dict["OPTIONS"].values()]
        memo = {id(value): value for value in values if callable(value)}
        return type(self)(copy.deepcopy(settings_dict, memo), alias or self.alias)


class _AskedEachTime(ConnectArguments):
    """Arguments that psycopg_pool asks for at each connect, since they can be called."""

    def __init__(self, asking: Connecting) -> None:
        super().__init__()
        self._asking = asking
        #: Why the arguments could not be had the last time; None if they could.
        self.failure: Exception | None = None

    def __call__(self) -> ConnectArguments:
        """Return the arguments of a new connection, with those that Django has set here."""
        asking = self._asking
        self.failure = None
        try:
            params = ConnectArguments(asking.get_connection_params(), **self)
            options.check_arguments(asking.alias, params)
            return params
        except Exception as exc:
            credentials.forget_variables(exc)
            self.failure = exc
            raise
