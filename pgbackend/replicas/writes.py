"""Notes which primaries the running code has written to, and when.

Note [Writes]
A read must see the writes of its own request. So each statement on a primary counts as a write at
the moment at which it is over, or, in a transaction, at which the COMMIT is over; also if it has
failed, since it may have been committed. Only statements that are known to be none do not count:
SELECTs that the ORM compiled from Django's own expressions, FETCH, savepoints, and statements of
the set-up of a connection. All other ways to the server count, such as raw SQL, COPY, pipelines and
psycopg's own connection, because they end in the one switch point, `Connection.wait()`: `install()`
puts a function around that which looks at the connections of primaries.

Nothing is asked for a write. `Record.at` has only its time, and `monitors.py` turns that into a
position of the log when somebody reads.

A record belongs to a request, and is shared by its tasks and threads: `current()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from time import monotonic
from typing import Any

from psycopg.pq import TransactionStatus

from pgbackend import expressions
from pgbackend.compiler import (
    SQLAggregateCompiler,
    SQLCompiler,
    SQLDeleteCompiler,
    SQLInsertCompiler,
    SQLUpdateCompiler,
    put_before,
)
from pgbackend.driver.connection import Connection
from pgbackend.driver.naming import served
from pgbackend.state import in_async_context
from pgbackend.wrapper.transactions import Transactions

from .positions import Position

# --- Records --------------------------------------------------------------------------------------


class Record:
    """The writes of a request, or of other code, by the alias of their primary."""

    def __init__(self, outer: Record | None = None) -> None:
        #: When the last write was over; and how many there were.
        self.at: dict[str, float] = {}
        self.count = 0
        #: Positions that a token has brought: writes of an earlier request, or another process.
        self.positions: dict[str, Position] = {}
        #: The record of the code around this, which has these writes, too.
        self.outer = outer
        #: The scope of the request; None outside of requests.
        self.scope = served.get()

    def note(self, alias: str) -> None:
        """Note a write to the primary `alias`, which is over."""
        self.at[alias] = monotonic()
        self.count += 1
        if self.outer is not None:
            self.outer.note(alias)

    def need_now(self, alias: str) -> None:
        """Require, of the primary `alias`, all that is committed by now."""
        self.at[alias] = monotonic()
        self.positions.pop(alias, None)


_record: ContextVar[Record | None] = ContextVar("pgbackend.record", default=None)
#: The record of async code that serves no request.
_of_async_code = Record()
_KEY = "pgbackend.writes"


def current() -> Record:
    """Return the record of the running code.

    It is that of the block of `routers.use_token()`, else of the ASGI request, which its tasks and
    threads share. Code that serves no request has the record of its thread; all async code without
    a request has one in common, since its tasks may wait for each other's writes.
    """
    record, scope = _record.get(), served.get()
    # A server's own code may have a record, whose context its requests inherit.
    if record is not None and record.scope is scope:
        return record
    if isinstance(scope, MutableMapping):
        of_request: Record = scope.setdefault(_KEY, Record())
        return of_request
    if in_async_context():
        return _of_async_code
    record = Record()
    _record.set(record)
    return record


def last_write(record: Record, alias: str) -> float:
    """Return when the code of `record` last wrote to the primary `alias`; 0.0 if it did not."""
    moment = record.at.get(alias, 0.0)
    if record.outer is None and record.scope is None:
        # A thread may wait for async code, which then has written for it.
        moment = max(moment, _of_async_code.at.get(alias, 0.0))
    return moment


@contextmanager
def recording(record: Record) -> Iterator[Record]:
    """Make `record` that of the code inside the `with`."""
    before = _record.get()
    _record.set(record)
    try:
        yield record
    finally:
        _record.set(before)


# --- What counts as a write -----------------------------------------------------------------------

#: The aliases whose writes are noted.
primaries: set[str] = set()
#: Whether the statements of the running code are known to write nothing.
_reading: ContextVar[bool] = ContextVar("pgbackend.reading", default=False)
_IN_TRANSACTION = frozenset(
    (TransactionStatus.ACTIVE, TransactionStatus.INTRANS, TransactionStatus.INERROR)
)
#: Names of generators that the driver waits for beside the statements of its users. FETCH and
#: CLOSE are of cursors whose DECLARE has counted already, if it must.
_NEUTRAL = frozenset(
    (
        *("_close_gen", "_commit_gen", "_fetch_gen", "_letting_go", "_rollback_gen"),
        *("_set_autocommit_gen", "_set_deferrable_gen", "_set_isolation_level_gen"),
        *("_set_read_only_gen", "_with_settings", "notifies", "settle_gen"),
    )
)


@contextmanager
def reading(*, value: bool = True) -> Iterator[None]:
    """Declare that the statements in the `with` write nothing; or, if not `value`, may write."""
    before = _reading.get()
    _reading.set(value)
    try:
        yield
    finally:
        _reading.set(before)


def _waiting(plain: Callable[..., Any], self: Connection, gen: Any, *args: Any, **kw: Any) -> Any:
    """Do what `Connection.wait()`, which is `plain`, does; note what counts as a write."""
    if self.session_settings.database not in primaries:
        return plain(self, gen, *args, **kw)
    has_failed = True
    try:
        result = plain(self, gen, *args, **kw)
        has_failed = False
        return result
    finally:
        _note_end(self, getattr(gen, "__name__", ""), has_failed)


def _note_end(connection: Connection, name: str, has_failed: bool) -> None:
    """Note that a wait for the generator `name` on a primary's connection is over.

    A statement that was interrupted may still be committed, while its connection is tidied up.
    """
    its = vars(connection)
    if not _reading.get() and name not in _NEUTRAL:
        its[_KEY] = True
    is_over = has_failed or connection.pgconn.transaction_status not in _IN_TRANSACTION
    if its.get(_KEY) and is_over:
        its[_KEY] = has_failed
        if name != "_rollback_gen":
            assert connection.session_settings.database is not None
            current().note(connection.session_settings.database)


class _Selects:
    """A base of the compilers of SELECT: their statements do not count as writes."""

    connection: Any

    def execute_sql(self, *args: Any, **kwargs: Any) -> Any:
        if self.connection.alias not in primaries or self.connection.execute_wrappers:
            return super().execute_sql(*args, **kwargs)  # type: ignore[misc]
        noted = expressions.noted
        try:
            with reading():
                return super().execute_sql(*args, **kwargs)  # type: ignore[misc]
        finally:
            if expressions.noted is not noted:  # a part of it may be the user's own SQL
                _note_select(self.connection)


def _note_select(wrapper: Any) -> None:
    """Count the SELECT that was sent just now as a write."""
    current().note(wrapper.alias)
    if isinstance(connection := wrapper.connection, Connection):
        vars(connection)[_KEY] = True  # in a transaction, its COMMIT counts


class _Writes:
    """A base of the other compilers: a SELECT that is being compiled may run them."""

    def execute_sql(self, *args: Any, **kwargs: Any) -> Any:
        if not _reading.get():
            return super().execute_sql(*args, **kwargs)  # type: ignore[misc]
        with reading(value=False):
            return super().execute_sql(*args, **kwargs)  # type: ignore[misc]


def _savepoint(plain: Callable[..., Any], self: Any, sid: str) -> None:
    with reading():
        plain(self, sid)


#: The bases that are put in front of those of the compilers.
_BASES: list[tuple[type[Any], type[Any]]] = [
    *((kind, _Selects) for kind in (SQLCompiler, SQLAggregateCompiler)),
    *((kind, _Writes) for kind in (SQLDeleteCompiler, SQLInsertCompiler, SQLUpdateCompiler)),
]
#: The methods that are replaced, and the functions that call them.
_AROUND: list[tuple[type[Any], str, Callable[..., Any]]] = [
    (Connection, "wait", _waiting),
    *((Transactions, f"_savepoint{end}", _savepoint) for end in ("", "_commit", "_rollback")),
]


def install() -> None:
    """Have writes noted from now on; done once, when a router has replicas."""
    if hasattr(Connection.wait, "__wrapped__"):
        return
    for owner, name, around in _AROUND:
        setattr(owner, name, _method(around, getattr(owner, name)))
    for kind, base in _BASES:
        put_before(kind, base)


def uninstall() -> None:
    """Undo `install()`, for tests: others count what a statement costs."""
    if not hasattr(Connection.wait, "__wrapped__"):
        return
    for owner, name, _ in _AROUND:
        setattr(owner, name, getattr(owner, name).__wrapped__)
    for kind, base in _BASES:
        kind.__bases__ = tuple(each for each in kind.__bases__ if each is not base)
    primaries.clear()


def _method(around: Callable[..., Any], plain: Callable[..., Any]) -> Any:
    """Return a method that calls `around` with `plain`, the method whose place it takes."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(plain, self, *args, **kwargs)

    method.__wrapped__ = plain  # type: ignore[attr-defined]
    return method
