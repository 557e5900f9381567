"""`DatabaseWrapper`: Django's backend for PostgreSQL, on connections that a task leases.

In a sync context everything is inherited: one connection a thread, kept as Django keeps it. In an
async context (green) the wrapper has no connection of its own: `_cursor()` takes a lease from the
pool of the running loop when the first statement is made, and the lease ends with the cursor, or
with the transaction. What Django keeps on the wrapper is looked up in `state`.

A wrapper that `django.db.connections` does not own (`connection.copy()`, the one that creates test
databases) has a connection of its own in every context, as in Django; it still does not block the
loop.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter, is_
from types import FrameType
from typing import Any

from asgiref.sync import iscoroutinefunction
from django.core.exceptions import ImproperlyConfigured, SynchronousOnlyOperation
from django.db import DEFAULT_DB_ALIAS, Error
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.postgresql.base import DatabaseWrapper as PostgresDatabaseWrapper
from django.db.backends.signals import connection_created
from django.db.backends.utils import debug_transaction
from django.utils.functional import cached_property
from psycopg import IsolationLevel
from psycopg.pq import TransactionStatus

from . import conf, driver, frames, hooks, request, state, statements, transactions
from .adapters import prepare_template
from .attributes import follow, names_of, of_connection
from .block_context import look_again
from .client import DatabaseClient
from .creation import DatabaseCreation
from .descriptors import rollback_attribute, scope_attribute, state_attribute
from .driver import bridge
from .driver.bridge import Portal
from .driver.connection import LEASE_ENDED, ConnectArguments, adopt
from .driver.errors import LeaseEnded
from .driver.pool import Lease, Pool, PoolOptions, close_pools, get_pool
from .driver.vouching import vouching
from .fast.install import install as install_shortcuts
from .fast.registry import is_on
from .features import DatabaseFeatures
from .introspection import DatabaseIntrospection
from .operations import DatabaseOperations
from .patches import NO_OTHERS, djangos, if_djangos, lookup
from .schema import DatabaseSchemaEditor
from .sessions import Key, Scope, Session, State
from .statements import StatementCursor, adapting, can_execute
from .transactions import Block, Transaction

CURE = (
    "the ORM was called on the event loop, outside of pgbackend's greenlets ({name}()). Requests "
    "that Django's ASGI handler serves have one; elsewhere, call the a-method ('await qs.aget()'), "
    "use 'async with transaction.atomic()', or wrap the function: 'await pgbackend.aio.run(fn)'."
)


# Code that runs for each statement spells `bridge.green()` out: the call would cost too much.
_get_running_loop = asyncio._get_running_loop
_plain_attribute = object.__getattribute__
_running = bridge.running


class _InThePool:
    """What a wrapper shows for a connection that it has not leased yet."""

    closed = False


_ENSURE_CONNECTION = if_djangos(PostgresDatabaseWrapper.ensure_connection)
_DJANGOS_CURSOR = if_djangos(PostgresDatabaseWrapper._cursor)  # type: ignore[attr-defined]
_GET_AUTOCOMMIT = if_djangos(PostgresDatabaseWrapper.get_autocommit)
_SET_AUTOCOMMIT = if_djangos(PostgresDatabaseWrapper.set_autocommit)
_SET_ON_CONNECTION = if_djangos(PostgresDatabaseWrapper._set_autocommit)  # type: ignore[attr-defined]  # noqa: SLF001
_RUN_HOOKS = if_djangos(PostgresDatabaseWrapper.run_and_clear_commit_hooks)
# Each statement, and each transaction, comes by these: they are guarded like the others, with less
# in between.
_COMMIT = if_djangos(PostgresDatabaseWrapper._commit)  # type: ignore[attr-defined]  # noqa: SLF001
_CURSOR = if_djangos(PostgresDatabaseWrapper.cursor)
_CREATE_CURSOR = if_djangos(PostgresDatabaseWrapper.create_cursor)
if not is_on("cursors"):
    _CURSOR = _CREATE_CURSOR = None
_open_cursor: Callable[..., Any] = inspect.unwrap(PostgresDatabaseWrapper.cursor)
_create_cursor: Callable[..., Any] = inspect.unwrap(PostgresDatabaseWrapper.create_cursor)


#: What Django's `_cursor()` calls to have a connection.
_ASKING = frozenset({"_cursor", "close_if_health_check_failed", "ensure_connection"})
_asks = attrgetter(*_ASKING)
#: These in Django, and what one of them calls.
_djangos_asks = lookup(
    "its._cursor its.close_if_health_check_failed its.ensure_connection "
    "base.close_if_health_check_failed",
    its=PostgresDatabaseWrapper,
    base=BaseDatabaseWrapper,
)
_DJANGO_ASKS = djangos(*_djangos_asks()) if is_on("cursors") else NO_OTHERS


def _guarded(name: str) -> Callable[..., Any]:
    """Django's method `name` with our guard in the place of `async_unsafe`'s.

    Django's refuses wherever a loop runs; green code may call the method, since it does not block.
    A method that somebody has patched (Sentry does, before this is loaded; Django's test cases,
    afterwards) is called as it is; the patch may call what it stands for, which it has found here.
    """
    unsafe = if_djangos(getattr(PostgresDatabaseWrapper, name))
    method = inspect.unwrap(getattr(PostgresDatabaseWrapper, name))

    @functools.wraps(method)
    def guarded(self: DatabaseWrapper, *args: Any, **kwargs: Any) -> Any:
        if _get_running_loop() is not None and type(_running()) is not Portal:
            self.check_context(name)
        if getattr(PostgresDatabaseWrapper, name) is unsafe or name in self._in_patches:
            return method(self, *args, **kwargs)
        found = getattr(super(DatabaseWrapper, self), name)
        self._in_patches.add(name)
        try:
            return found(*args, **kwargs)
        finally:
            self._in_patches.discard(name)

    return guarded


class DatabaseWrapper(PostgresDatabaseWrapper):
    Database = driver
    SchemaEditorClass = DatabaseSchemaEditor
    client_class = DatabaseClient
    creation_class = DatabaseCreation
    features_class = DatabaseFeatures
    introspection_class = DatabaseIntrospection
    ops_class = DatabaseOperations
    # Not Django's dictionary: an alias may be tried with either engine in one process.
    _connection_pools: dict[str, Any] = {}  # noqa: RUF012

    for _name in State.NAMES:
        locals()[_name] = state_attribute(_name)
    needs_rollback = rollback_attribute
    for _name in Scope.NAMES:
        locals()[_name] = scope_attribute(_name)
    del _name

    #: What `cursor()` calls, unless somebody overrides or patches it; see statements.py.
    cursor_calls: tuple[Any, ...]
    #: The first of these, which see that there is a connection.
    asks: tuple[Any, ...]

    _ready = False
    _asking_others = False
    _sharing: tuple[Any, bool] = (None, False)
    _own_blocks: Any = None
    #: How often it is lent; see Note [Lent wrappers] in state.py.
    lent = 0

    #: Whether what others set on it follows requests, see attributes.py; and which is its own.
    follows_request = False
    own_names: frozenset[str] = frozenset()
    _attributes: Mapping[str, Any] = {}
    #: Whether `django.db.connections` has it, and so its alias has its attributes.
    _published = False
    #: Attributes that its `_cursor()` sets, by the code that runs it: tasks share this object.
    _noted: Mapping[object, dict[str, Any]] = {}

    def __init__(self, settings_dict: dict[str, Any], alias: str = DEFAULT_DB_ALIAS) -> None:
        if request.follows():
            follow(self)
        self._own = State()
        self._own_scope = Scope(None, self.queries_limit)
        self._in_patches: set[str] = set()
        super().__init__(settings_dict, alias)
        self._ready = True

    def __copy__(self) -> DatabaseWrapper:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._own = self._own.copy()
        other._own_blocks = None
        other._published = False
        other._in_patches = set()
        other._own_scope = copy.copy(self._own_scope)
        return other

    def __getattr__(self, name: str) -> Any:
        if name in self.own_names or type(self).follows_request or not request.follows():
            return _plain_attribute(self, name)  # raises
        follow(self)  # it was made by code of a thread that follows a request now
        return getattr(self, name)

    @property
    def _key(self) -> Key:
        return id(self.settings_dict)

    @property
    def _shared(self) -> bool:
        """Whether this wrapper stands for its alias, and so uses the pool in an async context."""
        settings_dict, shared = self._sharing
        if settings_dict is not self.settings_dict:
            for_threads = self._thread_sharing_count > self.lent
            shared = not for_threads and conf.is_shared(self.alias, self.settings_dict)
            self._sharing = (self.settings_dict, shared)
        return shared

    def inc_thread_sharing(self) -> None:
        """Let other threads use this wrapper's connection; from here on it has one of its own."""
        super().inc_thread_sharing()
        self._sharing = (None, False)
        look_again()
        if bridge.current() is not None:
            self.ensure_connection()

    def dec_thread_sharing(self) -> None:
        super().dec_thread_sharing()
        self._sharing = (None, False)
        look_again()
        if bridge.current() is not None and not self.allow_thread_sharing:
            self._close_own()  # nobody would use it again

    def lend(self) -> None:
        """Let the async code that this thread is about to wait for use the wrapper."""
        super().inc_thread_sharing()
        self.lent += 1

    def take_back(self) -> None:
        """Undo `lend()`."""
        self.lent -= 1
        super().dec_thread_sharing()

    # --- Contexts ---

    def check_context(self, name: str) -> None:
        """Raise `SynchronousOnlyOperation` where waiting for the database would block a loop."""
        if _get_running_loop() is None:
            return
        if bridge.current() is None and state.in_async_context():
            raise SynchronousOnlyOperation(CURE.format(name=name))

    def async_session(self) -> Session | None:
        """The task's session, in an async context; else None."""
        return state.async_session(self)

    @contextmanager
    def backend_statement(self, *texts: str) -> Iterator[None]:
        """Execute statements of the backend's own, with these texts, that soil no session."""
        session = self.async_session()
        if session is None:
            yield
            return
        outer, session.compiled = session.compiled, True
        try:
            with vouching(texts):
                yield
        finally:
            session.compiled = outer

    # --- Guards: each of Django's async_unsafe methods ---

    _connect = _guarded("connect")
    _get_new_connection = _guarded("get_new_connection")
    savepoint_rollback = _guarded("savepoint_rollback")
    savepoint_commit = _guarded("savepoint_commit")
    clean_savepoints = _guarded("clean_savepoints")
    _guarded_chunked_cursor = _guarded("chunked_cursor")
    _guarded_cursor = _guarded("cursor")
    _ensure_connection = _guarded("ensure_connection")
    _guarded_create_cursor = _guarded("create_cursor")
    _close_connection = _guarded("close")
    _commit_transaction = _guarded("commit")
    _roll_back_transaction = _guarded("rollback")
    savepoint = _guarded("savepoint")

    # --- Connecting ---

    # The settings hold the password: an error leaves behind the frames that had them, which
    # Django's debug page and tools like it would show with their local variables.

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
            return self._get_new_connection(conn_params)
        except driver.Error as exc:
            exc.__context__ = None
            raise exc.with_traceback(None) from None

    @property
    def pool(self) -> Any:
        """Django's synchronous pool, with connections of ours; None in an async context."""
        if not self.settings_dict["OPTIONS"].get("pool"):
            return None
        if self.alias not in self._connection_pools:
            return self._make_sync_pool()
        if self._shared and state.in_async_context():
            return None
        return super().pool

    def _make_sync_pool(self) -> Any:
        if self._shared and state.in_async_context():
            return None
        stand_in = copy.copy(self)
        given = self.settings_dict["OPTIONS"]["pool"]
        options = {} if given is True else given
        options = {"connection_class": driver.Connection, **options}
        stand_in.settings_dict = {
            **self.settings_dict,
            "OPTIONS": {**self.settings_dict["OPTIONS"], "pool": options},
        }
        return super(DatabaseWrapper, stand_in).pool

    def close_pool(self) -> None:
        """Close the synchronous pool and the pools of all loops; from any thread."""
        if self.alias in self._connection_pools:
            self._connection_pools.pop(self.alias).close()
        if conf.is_shared(self.alias, self.settings_dict):
            close_pools(self._key)

    def connect(self) -> None:
        """Connect; green, see that the database can be reached, and hold nothing afterwards."""
        if self._asking_others:
            return
        current = state.current_state(self)
        if not current.pooled:
            self._connect()
            return
        self.check_context("connect")
        if current.transaction is not None:
            # As in Django, a new connection knows nothing of what the old one was in.
            if current.lease is not None:
                current.lease.connection.close()
                current.lease.end()
            transactions.end(self, current)
        self.run_on_commit = []
        self.ensure_connection()

    def ensure_connection(self) -> None:
        """Guarantee that the database can be reached.

        Green, a connection is leased and given back. On the bare loop there is nothing to do:
        each statement will lease its own.
        """
        current = state.current_state(self)
        if self._asking_others and "ensure_connection" not in self._in_patches:
            self._ensure_connection()
        elif current.connection is not None:
            if PostgresDatabaseWrapper.ensure_connection is not _ENSURE_CONNECTION:
                self._let_patches_refuse()
        elif not current.pooled:
            self._ensure_connection()
        elif bridge.current() is not None and not current.closed_in_transaction:
            lease = self.lease_for(current, state.async_session(self))
            if lease is not None:
                lease.maybe_end()

    def close_if_health_check_failed(self) -> None:
        # Each cursor comes by here. Django looks for its pool first, which takes longer.
        if state.current_state(self).health_check_enabled or not all(
            map(is_, _djangos_asks(), _DJANGO_ASKS)
        ):
            super().close_if_health_check_failed()

    def lease_for(self, current: State, session: Session | None) -> Lease | None:
        """Give `current` a connection, if it has none; return the lease if it is new.

        `session` is the running task's.
        """
        if current.connection is not None:
            if type(self).ensure_connection is not _OWN_ENSURE_CONNECTION:
                self.ensure_connection()
            elif PostgresDatabaseWrapper.ensure_connection is not _ENSURE_CONNECTION:
                self._let_patches_refuse()
            return None
        transaction = current.transaction
        if transaction is None:
            return self._take(current, None, session)
        assert transaction.leasing is not None
        with transaction.leasing:
            missing = current.connection is None  # another task may have leased it meanwhile
            return self._take(current, transaction, session) if missing else None

    def _take(
        self,
        current: State,
        transaction: Transaction | None,
        session: Session | None,
    ) -> Lease:
        if (
            type(self).ensure_connection is not _OWN_ENSURE_CONNECTION
            or PostgresDatabaseWrapper.ensure_connection is not _ENSURE_CONNECTION
        ):
            self._ask_others()
        lease = None if transaction is None else transaction.borrow()
        if lease is None:
            with self.wrap_database_errors:
                lease = self._get_lease(transaction)
        if transaction is not None and transaction.innermost is None:
            lease.end()
            state.take_turn(self)  # raises: the block has ended while its task waited
        current.take(lease)
        if transaction is not None:
            lease.pin()
            lease.task = transaction.owner  # who has begun the block ends it, and the lease
            # psycopg begins with the first statement.
            lease.connection._autocommit = False  # noqa: SLF001
        elif session is not None:
            session.watch()
            if session.pins:
                lease.pin()
        return lease

    def _let_patches_refuse(self) -> None:
        """Let who has patched `ensure_connection()` refuse a connection that is open, too.

        Not on the bare loop, where no statement is sent: tests begin to capture queries there.
        """
        if bridge.current() is not None or not state.in_async_context():
            self._ensure_connection()

    def _ask_others(self) -> None:
        """Call `ensure_connection()` for a class that overrides it, or for somebody's patch.

        They may refuse, as test cases without a database do. Nothing connects here, and so nothing
        waits: the flag is seen by this call only. Code that looks for a connection finds none the
        first time, and after `close()`; then there is one, as in Django, though it is taken from
        the pool for each statement.
        """
        current = state.current_state(self)
        session = self.async_session()
        known = current if session is None else session.state
        self._asking_others = True
        if known.asked:
            current.connection = _InThePool()
        is_overridden = type(self).ensure_connection is not _OWN_ENSURE_CONNECTION
        try:
            if is_overridden and "ensure_connection" not in self._in_patches:
                self.ensure_connection()
            else:
                self._ensure_connection()
        finally:
            current.connection = None
            self._asking_others = False
        known.asked = True

    def _get_lease(self, transaction: Transaction | None) -> Lease:
        home = None if transaction is None else transaction.home
        running = asyncio._get_running_loop()
        if home is None or home is running:
            return self._async_pool().lease()
        # A thread, or another loop, makes the first statement of a transaction of `home`.
        leasing = asyncio.run_coroutine_threadsafe(bridge.run(self._lease_at_home), home)
        if running is None:
            return leasing.result()
        return bridge.await_(asyncio.wrap_future(leasing))

    def pool_alone(self) -> Pool:
        """Return the pool to lease a connection from, for one statement in no transaction."""
        if (
            type(self).ensure_connection is not _OWN_ENSURE_CONNECTION
            or PostgresDatabaseWrapper.ensure_connection is not _ENSURE_CONNECTION
        ):
            self._ask_others()
        return self._async_pool()

    def _lease_at_home(self) -> Lease:
        return self._async_pool().lease()

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
        return PoolOptions(
            connect=ConnectArguments(
                params,
                twin_class=conf.twin_class(self.alias, self.settings_dict),
            ),
            pool=conf.pool_options(self.alias, self.settings_dict),
            initialise=functools.partial(self._initialise, params),
            session_reset=conf.session_reset(self.alias, self.settings_dict["OPTIONS"]),
            soiled_unless_vouched=True,
        )

    def _initialise(self, params: dict[str, Any], connection: driver.Connection) -> None:
        """Do for a connection of the pool what `connect()` does.

        It is asked for as a new one, so that what derived wrappers do to those is done to it.
        """
        connection.isolation_level = self._isolation_level_option()
        with state.prepared(self, connection):
            self.get_new_connection(params)
            self.init_connection_state()
            connection_created.send(sender=type(self), connection=self)

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

    # --- Cursors ---

    def cursor(self) -> Any:
        """Django's; or, for a statement of the ORM's that is fetched at once, one for just that."""
        if _get_running_loop() is not None:
            here = _running()
            if type(here) is not Portal:
                self.check_context("cursor")
            elif self._fetches_at_once(here):
                return StatementCursor(self)
        if type(self)._cursor is not _OWN_CURSOR:
            with of_connection(self):
                return self._guarded_cursor()
        if PostgresDatabaseWrapper.cursor is not _CURSOR:
            return self._guarded_cursor()
        return _open_cursor(self)

    def chunked_cursor(self) -> Any:
        if type(self)._cursor is not _OWN_CURSOR:
            with of_connection(self):
                return self._guarded_chunked_cursor()
        return self._guarded_chunked_cursor()

    def _fetches_at_once(self, here: Portal) -> bool:
        session = state.find(here, self).session
        if session is None or not session.at_once:
            return False
        session.at_once = False
        if not can_execute(self):
            return False
        session.compiled = False
        return True

    def _cursor(self, name: str | None = None) -> Any:
        own = state.plain_state(self)
        if own is not None:
            if (
                own.connection is None
                or own.health_check_enabled
                # or somebody has a say in it who has overridden or patched what Django's calls
                or not all(map(is_, _djangos_asks(), _DJANGO_ASKS))
                or not all(map(is_, _asks(type(self)), self.asks))
                or not self.__dict__.keys().isdisjoint(_ASKING)
            ):
                return super()._cursor(name)
            with self.wrap_database_errors:  # what is left of Django's, with a connection
                return self._prepare_cursor(self.create_cursor(name))
        state.take_turn(self)
        current, session = state.state_and_session(self)
        if not current.pooled:
            return super()._cursor(name)
        compiled = session is not None and session.compiled
        current = self.begin_if_due(current)
        cursor = self._lease_cursor(current, session, name, compiled)
        if session is not None and compiled:
            session.compiled, session.cursor = False, cursor.cursor
        return cursor

    def _lease_cursor(
        self, current: State, session: Session | None, name: str | None, compiled: bool
    ) -> Any:
        djangos_class: Any = PostgresDatabaseWrapper
        lease = self.hold(current, session)
        wrapped = None
        try:
            if djangos_class._cursor is not _DJANGOS_CURSOR:
                wrapped = super()._cursor(name)
                cursor = wrapped.cursor
            else:
                self.close_if_health_check_failed()
                with self.wrap_database_errors:
                    cursor = self.create_cursor(name)
            if current.lease is not None:
                if name and (block := state.named_block(self)) is not None:
                    cursor.why_gone = block.why_cursors_are_gone
                if name or not compiled:
                    current.lease.opened_at = frames.place()
                if not compiled:
                    cursor.opened_at = _caller()
                cursor.renew = self._renew
        finally:
            if lease is not None:
                lease.unpin()
        return wrapped or self._prepare_cursor(cursor)

    def hold(self, current: State, session: Session | None) -> Lease | None:
        """Give `current` a connection, if it has none, and pin it: `unpin()` is for the caller.

        Returns None where the connection is held by a transaction, which pins it, or by nobody.
        """
        while True:
            self.lease_for(current, session)
            lease = current.lease
            if current.transaction is not None or (
                lease is None and current.connection is not None
            ):
                return None
            if lease is not None:
                lease.pin()
                if not lease.ended:
                    return lease
                lease.pins -= 1
            # The garbage collector has freed what held the connection, since it was looked at.

    def _renew(self, cursor: Any) -> None:
        """Give a connection to `cursor`, which has let its own go."""
        state.take_turn(self)
        current, session = state.state_and_session(self)
        if not current.pooled:
            return  # psycopg refuses
        current = self.begin_if_due(current)
        lease = self.hold(current, session)
        try:
            if current.lease is None:
                current.connection._check_connection_ok()  # noqa: SLF001 - raises
                raise LeaseEnded(LEASE_ENDED)
            cursor.move_to(current.connection)
        finally:
            if lease is not None:
                lease.unpin()

    def create_cursor(self, name: str | None = None) -> Any:
        if PostgresDatabaseWrapper.create_cursor is not _CREATE_CURSOR:
            cursor = self._guarded_create_cursor(name)
        else:
            if _get_running_loop() is not None:
                self.check_context("create_cursor")
            if name:
                cursor = _create_cursor(self, name)
            else:  # what Django does, which looks the connection up for each step
                connection = self.connection
                cursor = connection.cursor()
                if (prepare := adapting(self.timezone, connection.adapters)) is not None:
                    prepare(cursor)
        if name and state.current_state(self).lease is not None:
            adopt(cursor)  # Django makes server-side cursors without the connection's factory
        return cursor

    def validate_no_broken_transaction(self) -> None:
        # Every statement comes by here, right before it is sent.
        own = state.plain_state(self)
        if own is not None and not own.needs_rollback:
            return
        if own is None:
            state.take_turn(self)
        super().validate_no_broken_transaction()

    def is_usable(self) -> bool:
        """Whether the database answers: on the connection that is held, else on one of the pool's.

        Green code holds none between two statements, which says nothing about the database.
        """
        current, session = state.state_and_session(self)
        if not current.pooled:
            return bool(super().is_usable())
        self.check_context("is_usable")
        try:
            state.take_turn(self)
            lease = self.lease_for(current, session)
        except Error:
            return False
        try:
            with vouching(("SELECT 1",)):
                return bool(super().is_usable())
        finally:
            if lease is not None:
                lease.maybe_end()

    @contextmanager
    def temporary_connection(self) -> Iterator[Any]:
        """Give a cursor; close the connection afterwards, if it was opened for this.

        Green, the cursor gives back what it has leased. Django's would close the connection of a
        block whose first statement this is, and so end its transaction.
        """
        if state.current_state(self).pooled:
            with self.cursor() as cursor:
                yield cursor
        else:
            with super().temporary_connection() as cursor:
                yield cursor

    @cached_property
    def pg_version(self) -> int:
        with self.backend_statement(), self.temporary_connection():
            return self.connection.info.server_version

    @property
    def isolation_level(self) -> Any:
        """The level of transactions: of the connection, or that of all connections of the pool."""
        current = state.current_state(self)
        if current.pooled and current.isolation_level is None:
            return self._isolation_level_option() or IsolationLevel.READ_COMMITTED
        return current.isolation_level

    @isolation_level.setter
    def isolation_level(self, level: Any) -> None:
        if self._ready:
            state.current_state(self).isolation_level = level

    # --- Transactions ---

    def get_autocommit(self) -> bool:
        current = state.current_state(self)
        if not current.pooled or PostgresDatabaseWrapper.get_autocommit is not _GET_AUTOCOMMIT:
            return super().get_autocommit()
        # No connection is needed to know: it is leased at the block's first statement.
        self.check_context("get_autocommit")
        return current.autocommit

    def set_autocommit(
        self, autocommit: bool, force_begin_transaction_with_broken_autocommit: bool = False
    ) -> None:
        self.check_context("set_autocommit")
        current = state.current_state(self)
        if current.pooled:
            if PostgresDatabaseWrapper.set_autocommit is _SET_AUTOCOMMIT:
                self._set_autocommit_pooled(current, autocommit)
            else:  # a patch
                super().set_autocommit(autocommit, force_begin_transaction_with_broken_autocommit)
            if not autocommit and not force_begin_transaction_with_broken_autocommit:
                # By hand: `Atomic`, which knows where it ends, has that flag set.
                transaction = state.current_state(self).transaction
                assert transaction is not None
                transaction.end_with_task()
        else:
            super().set_autocommit(autocommit, force_begin_transaction_with_broken_autocommit)
        if autocommit:
            bridge.deliver_cancellation()

    def _set_autocommit_pooled(self, current: State, autocommit: bool) -> None:
        # Django's own, but for ensure_connection(): the first statement leases the connection.
        if current.in_atomic_block:
            self.validate_no_atomic_block()  # raises
        if autocommit or not self.queries_logged:
            self._set_autocommit(autocommit)
        else:
            with debug_transaction(self, "BEGIN"):
                self._set_autocommit(autocommit)
        if current.needs_rollback:  # which Django keeps until rollback(), or a new connection
            now = state.current_state(self)
            now.needs_rollback, now.rollback_exc = True, current.rollback_exc

    def _set_autocommit(self, autocommit: bool) -> None:
        current = state.current_state(self)
        if current.pooled:
            djangos_class: Any = PostgresDatabaseWrapper
            is_patched = djangos_class._set_autocommit is not _SET_ON_CONNECTION  # noqa: SLF001
            if autocommit:
                if is_patched and current.connection is not None:
                    super()._set_autocommit(True)
                self.end_pooled(current, state.current_block(self))
                return
            begun = self.begin_pooled(current)
            if is_patched:  # it expects that there is a connection
                self.lease_for(begun, state.async_session(self))
                super()._set_autocommit(False)
            return
        super()._set_autocommit(autocommit)
        current = state.current_state(self)
        if autocommit:
            transactions.end(self, current)
        elif current.transaction is None:
            transactions.begin(self, current)

    def begin_if_due(self, current: State) -> State:
        """Begin the transaction that each task is in where AUTOCOMMIT is off; return its state."""
        if current.transaction is not None or current.autocommit:
            return current
        self.set_autocommit(False)
        return state.current_state(self)

    def begin_pooled(self, current: State) -> State:
        """Begin a transaction, unless `current` is in one; return its state."""
        if current.transaction is not None:
            current.autocommit = False
            return current
        begun = State(pooled=True)
        transaction = transactions.begin(self, begun)
        if current.lease is not None:
            transaction.lender = state.session(self)
        return begun

    def end_pooled(
        self, current: State, block: Block | None, session: Session | None = None
    ) -> None:
        """Give the connection of `current` back, end its transaction, and run the hooks of it.

        `block` is the one that is ended; `session` the running task's, if it has been looked up.
        """
        if current.lease is not None:
            self._end_lease(current, block)
        now = current
        if current.transaction is not None:
            transactions.end(self, current)
            # Hooks are run by Django, on the state that it finds.
            if session is None or current.run_on_commit:
                now = state.current_state(self)
            else:
                now = session.state
            now.run_on_commit = current.run_on_commit
            now.run_commit_hooks_on_set_autocommit_on = (
                current.run_commit_hooks_on_set_autocommit_on
            )
        now.autocommit = True
        if now.run_commit_hooks_on_set_autocommit_on:
            if (
                now.run_on_commit
                or PostgresDatabaseWrapper.run_and_clear_commit_hooks is not _RUN_HOOKS
            ):
                self.run_and_clear_commit_hooks()
            now.run_commit_hooks_on_set_autocommit_on = False

    def _end_lease(self, current: State, block: Block | None) -> None:
        assert current.lease is not None
        if current.connection.closed:
            # Its end was interrupted by what Django does not catch (GeneratorExit).
            current.run_on_commit = []
        else:
            self._end_on_connection(current.connection, block)
        if current.transaction is None:
            current.lease.end()
        else:
            current.transaction.give_up_lease()

    def _end_on_connection(self, connection: Any, block: Block | None) -> None:
        with self.wrap_database_errors:
            if block is not None and block.moving and not _is_idle(connection):
                # COMMIT was interrupted while it stood behind the statement of a child task.
                if not connection.lease.can_wait():  # the pool does, when that has ended
                    connection.close_in_turn()
                    return
                connection.rollback()
            connection.back_to_autocommit()

    def _commit(self) -> None:
        djangos: Any = PostgresDatabaseWrapper
        if self.queries_logged or djangos._commit is not _COMMIT:  # noqa: SLF001
            self._log_without_connection("COMMIT")
            super()._commit()
        elif (connection := self.connection) is not None:
            with self.wrap_database_errors:
                connection.commit()

    def _rollback(self) -> None:
        self._log_without_connection("ROLLBACK")
        super()._rollback()

    def _log_without_connection(self, end: str) -> None:
        """Log the end of a transaction that has needed no connection, and so sends nothing.

        Its BEGIN was logged: Django's own backend, which is connected, logs and sends both.
        """
        current = state.current_state(self)
        if current.pooled and current.connection is None:
            with debug_transaction(self, end):
                pass

    def commit(self) -> None:
        with bridge.postpone_delivery():
            self._commit_transaction()

    def commit_pooled(self, current: State) -> None:
        """What `commit()` does in the end, where nobody has a say in it; see fast/blocks.py."""
        if current.connection is not None:
            with self.wrap_database_errors:
                current.connection.commit()
        current.errors_occurred = False
        current.run_commit_hooks_on_set_autocommit_on = True

    def rollback(self) -> None:
        with bridge.postpone_delivery():
            self._roll_back_transaction()

    def _savepoint(self, sid: str) -> None:
        with self.backend_statement(self.ops.savepoint_create_sql(sid)):
            super()._savepoint(sid)

    def _savepoint_rollback(self, sid: str) -> None:
        rollback = self.ops.savepoint_rollback_sql(sid)
        with self.backend_statement(rollback), bridge.hold_cancellation():
            if (cancel_others := getattr(self.connection, "cancel_others", None)) is not None:
                cancel_others()
            super()._savepoint_rollback(sid)
        bridge.deliver_cancellation()

    def _savepoint_commit(self, sid: str) -> None:
        commit = self.ops.savepoint_commit_sql(sid)
        with self.backend_statement(commit), bridge.hold_cancellation():
            super()._savepoint_commit(sid)
        bridge.deliver_cancellation()

    # --- Hooks on commit ---

    def on_commit(self, func: Callable[[], Any], robust: bool = False) -> None:
        """Register `func`; a coroutine function is awaited when its turn comes."""
        if not callable(func):
            raise TypeError("on_commit()'s callback must be a callable.")
        super().on_commit(_awaited(func), robust)

    def execute_wrapper(self, wrapper: Callable[..., Any]) -> Any:
        return self._observed_wrapper(wrapper)

    @contextmanager
    def _observed_wrapper(self, wrapper: Callable[..., Any]) -> Iterator[None]:
        with super().execute_wrapper(wrapper):
            state.observe(self)
            yield

    # --- Closing ---

    def close(self) -> None:
        """Close the connection; green and outside a transaction, give it back at once."""
        if state.has_joined_test(self):
            self._close_own()
            return
        current = state.current_state(self)
        current.asked = False
        if current.pooled:
            self._close_own()
        if current.pooled and current.lease is None and not current.in_atomic_block:
            current.run_on_commit = []
        else:
            self._close_connection()
        if current.pooled and not current.in_atomic_block:
            current.needs_rollback = False  # as of a new connection: the next is one
        if current.transaction is not None and not current.in_atomic_block:
            # What was begun by set_autocommit(False) ends with its connection.
            transactions.end(self, current)

    def close_if_unusable_or_obsolete(self) -> None:
        """Close a connection that should not serve another request; but not that of a test.

        In the transaction of a test it is not in the autocommit mode that it is expected in: on
        Django's own backend channels' `database_sync_to_async` ends a `TestCase` so.
        """
        if not state.is_of_test(self):
            super().close_if_unusable_or_obsolete()

    def _close_own(self) -> None:
        """Close what sync code has left open on this wrapper: in this thread, or handed to one."""
        own = self._own
        if own.connection is None or own.in_atomic_block or own.transaction is not None:
            return
        if state.is_borrowed(self):
            return
        connection, own.connection = own.connection, None
        sync_pool = self._connection_pools.get(self.alias)
        if sync_pool is None:
            connection.close()
        else:
            sync_pool.putconn(connection)

    def _close(self) -> None:
        current = state.current_state(self)
        if not current.pooled:
            super()._close()
        elif current.lease is not None:
            lease = current.lease
            if current.in_atomic_block or current.transaction is not None:
                lease.connection.close_in_turn()
            lease.dirty = True
            lease.end()


_OWN_CURSOR = DatabaseWrapper._cursor
_OWN_ENSURE_CONNECTION = DatabaseWrapper.ensure_connection
# Django asks each wrapper at the beginning of each block whether it has the last of these, as that
# of SQLite does: nobody sets it.
DatabaseWrapper.own_names = names_of(DatabaseWrapper) | {"_start_transaction_under_autocommit"}
DatabaseWrapper.cursor_calls = statements.called_on(DatabaseWrapper)
DatabaseWrapper.asks = _asks(DatabaseWrapper)


def _is_idle(connection: driver.Connection) -> bool:
    return connection.pgconn.transaction_status == TransactionStatus.IDLE


def _awaited(func: Callable[[], Any]) -> Callable[[], Any]:
    if not iscoroutinefunction(inspect.unwrap(func)) and not iscoroutinefunction(
        getattr(func, "func", None)
    ):
        return func

    @functools.wraps(func)
    def call() -> Any:
        return hooks.run_coroutine_function(func)

    return call


_CURSOR_MODULES = (__name__, "django.db.backends.base.base", "django.utils.asyncio")


def _caller() -> str | None:
    """Where user code opened a cursor; None when Django or pgbackend itself did."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") in _CURSOR_MODULES:
        frame = frame.f_back
    if frame is None or frame.f_globals.get("__name__", "").startswith("django."):
        return None
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


install_shortcuts(DatabaseWrapper)
hooks.install()
