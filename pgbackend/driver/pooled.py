"""The connections that the pool keeps: opened, checked and closed; each lends facades.

`AsyncConnection` is the connection that the pool opens, checks and closes. A *facade* is a
`Connection` on the same `pgconn`. Each lease lends a new facade. So anything that a task has kept
from an earlier lease (connection, cursors, COPY) is refused, and does not run in the transaction of
the task that has the connection now.
"""

from __future__ import annotations

import asyncio
import functools
import weakref
from collections.abc import Callable, Mapping
from operator import is_
from time import monotonic
from typing import Any, Self, TypeVar

import psycopg
from psycopg import waiting
from psycopg._cursor_base import BaseCursor
from psycopg._preparing import PrepareManager
from psycopg._queries import PostgresClientQuery
from psycopg.abc import Params, PQGen, PQGenConn, Query
from psycopg.adapt import AdaptersMap
from psycopg.pq import ConnStatus, DiagnosticField, TransactionStatus
from psycopg.pq.abc import PGconn
from psycopg.rows import tuple_row
from psycopg.waiting import Wait

from .bridge import INTERRUPTIONS
from .connecting import note_host
from .connection import Connection
from .cursors import leased_class
from .protocols import Lease
from .recovery import CLEANUP_BUDGET, WAIT_INTERVAL, ask_to_cancel
from .server_changes import ServerChanges, is_on_standby, is_read_only
from .shortcuts import NO_OTHERS, looking
from .socket_watch import Watch
from .statement_cursors import Result, StatementCursor, statement_class
from .through_pooler import TRANSACTION, deallocates
from .time_zones import start_with, steps_of

RV = TypeVar("RV")

_ACTIVE = TransactionStatus.ACTIVE
_BAD = ConnStatus.BAD

#: The methods of a cursor's class that psycopg calls for a statement, from `cursor()` to `close()`.
_CURSOR_METHODS = (
    *("__init__", "execute", "fetchall", "close", "_execute_gen", "_start_query", "_reset"),
    *("_convert_query", "_maybe_prepare_gen", "_get_prepared", "_execute_send", "_set_results"),
    *("_select_current_result", "_make_row_maker", "_fetch_pipeline", "_check_result_for_fetch"),
    *("_close", "rowcount"),
)
#: The methods of other classes that psycopg calls for a statement.
_OTHER_METHODS = (
    "connection.cursor connection._start_query prepared.maybe_add_to_cache query.__init__ "
    "query.convert query.dump query._ensure_bytes query.validate_and_reorder_params "
    "query.is_params_sequence base.__init__"
)


class _LentConnection:
    """Notice what the user of a facade may have changed (a mixin for lent facades).

    - If `adapters` is read, this is recorded: the user may register a type.
    - A statement that its cursor has not looked at (vouching.py) makes the lease dirty. These are
      the statements of a COPY, `executemany()` and `stream()`, and those of a cursor that was made
      without the factories of the facade.
    """

    lease: Lease | None
    physical: AsyncConnection
    has_looked: bool
    #: Whether the pool has taken the connection back from its holder: see holding.py.
    taken_back = False

    @property
    def adapters(self) -> AdaptersMap:
        if self.lease is not None:
            self.lease.types_seen = True
        else:  # the lease is over, and its user still reads them
            self.physical.forget_types()
        return super().adapters  # type: ignore[misc,no-any-return]

    def _start_query(self) -> PQGen[None]:
        if not self.has_looked and self.lease is not None:
            self.lease.dirty = self.lease.dirty or self.lease.pool.soiled_unless_vouched
        self.has_looked = False
        return super()._start_query()  # type: ignore[misc,no-any-return]


@functools.lru_cache(maxsize=64)
def _lent_class(facade_class: Any) -> Any:
    names = {"__module__": facade_class.__module__, "__qualname__": facade_class.__qualname__}
    return type(facade_class.__name__, (_LentConnection, facade_class), names)


class AsyncConnection(psycopg.AsyncConnection[Any]):
    """The connection that the pool keeps, and that lends its facades."""

    __module__ = "pgbackend.driver"

    watch: Watch
    #: The facade of which each lent facade is a copy; it is never lent itself.
    facade: Connection
    #: The facade whose handlers receive the server's notices and notifications.
    listener: weakref.ref[Connection]
    #: The cursor of `run_statement()`, while no statement uses it.
    _cursor: StatementCursor | None = None
    #: When the connection was last given back without a reset, by `time.monotonic()`.
    free_since = 0.0
    #: Whether the server looks if this process lives (client_checks.py); None in a new session.
    is_checked_on: bool | None = None
    #: How long the user's `check` may take, in seconds.
    check_limit = 0.0
    #: When the connection was made, by `time.monotonic()`; and what the server told of itself then.
    made_at = 0.0
    began_read_only: bool | None = None
    began_on_standby = False
    #: What is told when a statement fails because the server has changed; None until the pool has
    #: the connection.
    changes: ServerChanges | None = None
    _disowned = False
    #: The arguments that the pool was given when it asked for those of this connection.
    asked: Mapping[str, Any]

    @classmethod
    async def connect(  # type: ignore[override]  # cursors are its facades'
        cls,
        conninfo: str = "",
        *,
        cursor_factory: type[psycopg.Cursor[Any]] | None = None,
        facade_class: type[Connection] = Connection,
        asked: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Open a connection whose facades, of `facade_class`, make cursors by `cursor_factory`.

        `asked` is kept for the code that sets the connection up. `pooler` and `time_zone` are as in
        `Connection.connect()`.
        """
        pooler = kwargs.pop("pooler", None)
        with start_with(kwargs.pop("time_zone", None)):
            self = await super().connect(conninfo, **kwargs)
        self.asked = asked or {}
        self.watch = Watch(asyncio.get_running_loop(), self.pgconn.socket)
        self.made_at = monotonic()
        self.began_read_only = is_read_only(self.pgconn)
        self.began_on_standby = is_on_standby(self.pgconn)
        self._make_facade(facade_class, cursor_factory)
        self.facade.session_settings.per_transaction = pooler == TRANSACTION
        return self

    @classmethod
    def _connect_gen(cls, conninfo: str = "", **kwargs: Any) -> PQGenConn[Self]:
        note_host(conninfo)  # psycopg calls this for one host after the other
        return steps_of(super()._connect_gen(conninfo, **kwargs))

    def _make_facade(
        self, facade_class: type[Connection], cursor_factory: type[psycopg.Cursor[Any]] | None
    ) -> None:
        """Make the facade of which each lent facade is a copy."""
        facade = facade_class(self.pgconn)
        facade.physical = self
        facade.lent_class = _lent_class(facade_class)  # type: ignore[arg-type]  # a class has a hash
        facade._autocommit = self._autocommit  # noqa: SLF001
        facade._adapters = self.adapters  # noqa: SLF001
        # One server session has one set of prepared statements.
        facade._prepared = self._prepared  # noqa: SLF001
        facade.given_threshold = self.prepare_threshold
        facade._pool = None  # noqa: SLF001 - the pool closes it
        factory: Any = cursor_factory or psycopg.Cursor
        if _Probe.is_needed():
            factory = _Probe.wrapped_factory(self.pgconn, factory)
        facade.cursor_factory = leased_class(factory)
        facade.server_cursor_factory = leased_class(psycopg.ServerCursor)
        self._cursor_class = statement_class(factory)
        self._seen_for_run, plain = looking(
            "run",
            f"{_OTHER_METHODS} {' '.join(f'factory.{name}' for name in _CURSOR_METHODS)}",
            connection=psycopg.Connection,
            prepared=PrepareManager,
            query=PostgresClientQuery,
            base=BaseCursor,
            factory=factory,
        )
        # `run_statement()` does not call `cursor()`, which a user's class may override.
        is_plain = (
            facade_class.cursor is Connection.cursor
            and facade.row_factory is tuple_row
            and factory.__module__.partition(".")[0] in ("psycopg", "django")
        )
        self._run = plain if is_plain else NO_OTHERS
        self.facade = facade
        self._hears_itself = self.listener = weakref.ref(facade)
        me = weakref.ref(self)  # as in psycopg: the handler must not keep the connection alive
        self.pgconn.notice_handler = functools.partial(_hear, me, facade._notice_handler)  # noqa: SLF001
        self.pgconn.notify_handler = functools.partial(_hear, me, facade._notify_handler)  # noqa: SLF001

    # --- Statements that leave nothing but their rows ---
    # Note [Statements without a facade] in statement_cursors.py

    def run_statement(
        self, connection: Connection | None, query: Query, params: Params | None
    ) -> Result:
        """Execute `query` and fetch all its rows, on a cursor that is kept for this.

        `connection` is the facade of the lease; if it is None, the facade that is never lent is
        used. The caller holds the lease, and does nothing else meanwhile. Raises psycopg's errors.
        """
        if connection is None:
            connection = self.facade
            connection._prepared.prepare_threshold = connection.given_threshold  # noqa: SLF001
        cursor, self._cursor = self._cursor or self._new_cursor(), None
        cursor._conn = connection  # noqa: SLF001
        if connection.lease is not None and connection.lease.types_seen:
            cursor._last_query = None  # noqa: SLF001 - its user may have registered a type
        result = cursor.run(query, params)
        cursor._conn = self.facade  # noqa: SLF001
        self._cursor = cursor
        return result

    def _new_cursor(self) -> StatementCursor:
        """Make a cursor for `run_statement()`, because none is kept, or the kept one is in use."""
        cursor: StatementCursor = self._cursor_class(self.facade)
        cursor._adapters = self.adapters  # noqa: SLF001 - no copy: a type may be registered
        return cursor

    def makes_cursors_of(self, connection: Connection | None) -> bool:
        """Return True if `run_statement()` does all that a cursor made by `connection` would.

        Returns False if the user has set a class for cursors or rows, if a tool has patched
        psycopg, or if the shortcut `run` is off. `connection` is None for the facade that is never
        lent.
        """
        return all(map(is_, self._seen_for_run(), self._run)) and (
            connection is None
            or (
                connection.cursor_factory is self.facade.cursor_factory
                and connection.row_factory is tuple_row
            )
        )

    def pid(self) -> int:
        """Return the id of the server process; 0 if the connection is lost."""
        return 0 if self.pgconn.status == _BAD else self.pgconn.backend_pid

    def forget_facade(self, *, types_seen: bool) -> None:
        """Pass no more notices to the last facade; call `forget_types()` if `types_seen`.

        Called at the end of each lease; sends nothing. `types_seen` says that the facade's user may
        have registered a type.
        """
        self.listener = self._hears_itself
        if types_seen:
            self.forget_types()

    def forget_types(self) -> None:
        """Make the next `run_statement()` look up its dumpers and loaders again."""
        if self._cursor is not None:
            self._cursor._last_query = None  # noqa: SLF001

    def is_alive(self) -> bool:
        """Return False if the socket shows that the server has closed the connection, else True.

        Costs one poll of the socket, but no round trip: on an idle connection, the server sends
        little but the reason why it closes the connection.
        """
        try:
            while self.pgconn.status != _BAD:
                if not waiting._ready(self.pgconn.socket, Wait.R):  # a poll(), in C
                    return True
                self.pgconn.consume_input()
                if self._read_farewell():
                    return False
        except psycopg.Error:
            pass
        return False

    def _read_farewell(self) -> bool:
        """Parse what the server sent; return whether it says that it closes the connection."""
        read: list[bytes | None] = []
        heard = self.pgconn.notice_handler
        self.pgconn.notice_handler = lambda result: read.append(
            result.error_field(DiagnosticField.SEVERITY_NONLOCALIZED)
        )
        try:
            self.pgconn.is_busy()  # parses what was read, and calls the handler of notices
        finally:
            self.pgconn.notice_handler = heard
        return b"FATAL" in read or b"PANIC" in read

    async def wait(
        self, gen: PQGen[RV], interval: float = WAIT_INTERVAL, timeout: float | None = None
    ) -> RV:
        """Run `gen` to its end, and return its result; if interrupted, close the connection."""
        # psycopg registers a reader of its own for this socket, and removes it at the end.
        self.watch.stop()
        # What runs here is not known: it may be the user's own `check` or `reset`.
        self.facade.session_settings.doubt_all()
        try:
            return await waiting.wait_async(gen, self.pgconn.socket, interval, timeout)
        except asyncio.CancelledError:
            # On a silent link, psycopg would take 5 s to cancel the statement and 5 s to wait for
            # its end. But this is a clean-up of the pool's, whose time is limited, and the
            # connection is closed anyway.
            try:
                if self.pgconn.transaction_status == _ACTIVE:
                    await self._try_cancel(timeout=CLEANUP_BUDGET)
            finally:
                self.close_now()
            raise
        except INTERRUPTIONS:
            self.close_now()
            raise

    def _deallocate(self, name: bytes | None) -> PQGen[None]:
        if not self.facade.session_settings.per_transaction or deallocates(name):
            yield from super()._deallocate(name)

    async def cancel_safe(self, *, timeout: float = 30.0) -> None:
        """Ask the server to cancel the running statement, as psycopg does."""
        if self._should_cancel():
            await ask_to_cancel(self, timeout)

    async def close(self) -> None:
        """Close the connection to the server."""
        self.close_now()

    def close_now(self) -> None:
        """Close the connection without waiting for anything."""
        if self._disowned:
            return
        self.watch.stop()
        self._closed = True
        self.pgconn.finish()

    def close_soon(self) -> None:
        """Have the loop close the connection. May be called in any thread."""
        try:
            self.watch.loop.call_soon_threadsafe(self.close_now)
        except RuntimeError:  # the loop was closed meanwhile
            self.close_now()

    def disown(self) -> None:
        """Leave the socket and its loop alone from now on: after a fork they are the parent's."""
        self._disowned = True
        self.watch.reading = self.watch.writing = False


def _hear(
    me: weakref.ref[AsyncConnection], handler: Callable[[Any, Any], None], message: object
) -> None:
    """Pass a notice or notification on to psycopg's `handler`, for the facade that listens now."""
    if (physical := me()) is not None:
        handler(physical.listener, message)


class _Probe(psycopg.Connection[Any]):
    """A stand-in connection, by which a tool's wrapper of `Connection.connect()` is called.

    OpenTelemetry, for one, wraps `connect()` to replace the cursor factory that is given to it. The
    pool connects in another way. So it calls the wrapped `connect()` of this class, which opens
    nothing, and uses the cursor factory of the result.
    """

    _opened: PGconn

    @classmethod
    def is_needed(cls) -> bool:
        connect = vars(psycopg.Connection)["connect"]
        if type(connect) is not classmethod:
            return True
        return bool(connect.__func__.__globals__["__name__"] != "psycopg.connection")

    @classmethod
    def wrapped_factory(cls, pgconn: PGconn, factory: type[Any]) -> type[Any]:
        probing: type[_Probe] = type("Connection", (cls,), {"_opened": pgconn})
        wrapped: type[Any] = probing.connect(cursor_factory=factory).cursor_factory
        return wrapped

    @classmethod
    def _get_connection_params(cls, conninfo: str, **kwargs: object) -> dict[str, Any]:
        return {"host": "/"}  # no name to resolve

    @classmethod
    def _connect_gen(cls, conninfo: str = "") -> PQGenConn[Self]:
        self = cls(cls._opened)
        self._pool = None  # not to be reported as left open
        yield from ()
        return self
