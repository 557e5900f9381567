"""Declared settings: what blocks declare for their statements, and what server sessions have.

A block of `pgbackend.session()` declares settings (``search_path``, ``role``, ``app.tenant``, ...)
for the statements that its code sends. A context variable, `declared`, names them, so tasks inherit
them. Each server session has a record (`SessionSettings`) of the settings that it is known to have.
Where they differ from the declared ones, the next statement is preceded by the commands that change
them (`Change`), in the same message if it can be: see prefix.py.

Note [Declared settings]
- Outside of a transaction, ``SET`` is sent. The server session keeps the value, so the next
  statement with the same settings needs no command, whoever leases the connection. A statement
  with other settings, or with none, changes the values first.
- In a transaction, ``SET LOCAL`` is sent. At the end of the transaction, whether it is committed or
  rolled back, the server session has the settings again that it had before (`settle()`).
- A name has an *outside value*: the one that it has outside of all blocks. It is read
  (``current_setting()``) before the first change of the name, and is set again when a statement
  comes that does not declare the name.
- The record is not trusted after a statement that nobody vouches for (vouching.py), since that may
  have changed settings; after an error; and after an interruption. Then all values are sent once
  more, with the next statement.
- Settings are changed with the privileges of the role that has logged in: a declared role is left
  before, and taken again afterwards.
- Through a transaction pooler (`SessionSettings.per_transaction`; through_pooler.py) the next
  transaction may run in another server session. So only ``SET LOCAL`` is sent, in each transaction
  anew, and the record is empty between two of them. Outside of a transaction, the commands and the
  statement are one message, which is a transaction by itself, or else stand in an explicit one.
  Nothing is read there, since nothing is set back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any, Final, NamedTuple, TypeAlias

from psycopg import Error
from psycopg.abc import Query
from psycopg.errors import error_from_result
from psycopg.pq import Escaping, PipelineStatus, TransactionStatus
from psycopg.pq.abc import PGconn, PGresult
from psycopg.sql import Composable

from .vouching import COMMENT, is_vouched

_IDLE = TransactionStatus.IDLE
_INERROR = TransactionStatus.INERROR

#: A declared value: text, or the names of a list (of schemas, say), which are quoted one by one.
Value: TypeAlias = str | tuple[str, ...]

NOTHING: Final[Mapping[str, Value]] = MappingProxyType({})


class Unread(Enum):
    """Stands for an outside value that was lost: the message that reads it was interrupted."""

    UNREAD = "the value that RESET sets"


class Unsure(Enum):
    """Stands for a value that a statement of the running code may have changed."""

    UNSURE = "any value"


_UNREAD = Unread.UNREAD
_UNSURE = Unsure.UNSURE
#: An outside value, as text; None if the name had none.
Outside: TypeAlias = str | Unread | None
#: What the server session is known to have, by names; names that are missing have outside values.
Current: TypeAlias = Mapping[str, Value | Unsure]

#: Settings that a transaction reads as it begins, so that they must be set before.
READ_AT_BEGIN = frozenset(
    (
        *("default_transaction_deferrable", "default_transaction_isolation"),
        *("default_transaction_read_only", "transaction_timeout"),
    )
)
#: Settings that are lists of names. Their text is no literal of SQL: only set_config() takes it.
LISTS_OF_NAMES = frozenset(
    (
        *("local_preload_libraries", "search_path", "session_preload_libraries"),
        "temp_tablespaces",
    )
)
_ROLE = "role"

_REFUSED = "the server refuses a setting that a block of pgbackend.session() declares: {names}"
#: Errors that are not about a setting: of the statement's syntax, and of its cancellation.
_NOT_REFUSED = ("42601", "57014")


class Key(NamedTuple):
    """A key of a block, by which its end finds it."""

    block: object
    """The context manager; None if a call of a decorated function is the block."""
    frame: object
    """A key of the frame of the `with`, or of the call, so that no other code ends the block."""


class Declared:
    """The settings that a block of `session()` declares, merged with those of the blocks around it.

    `outer` is the same of the next outer block; where both set a name, the inner value wins.
    """

    __slots__ = ("_database", "_values", "by_database", "has_ended", "key", "outer")

    def __init__(
        self, key: Key, outer: Declared | None, database: str, values: Mapping[str, Value]
    ) -> None:
        self.key = key
        self.outer = outer
        #: Whether the block has ended; tasks that it has started keep its settings.
        self.has_ended = False
        self._database = database
        self._values = values
        #: The settings of all these blocks, by the name of the database.
        self.by_database: Mapping[str, Mapping[str, Value]]
        others = {} if outer is None else outer.by_database
        self.by_database = {**others, database: {**others.get(database, NOTHING), **values}}

    def drop_ended(self) -> None:
        """Drop outer blocks that have ended: or they would pile up in tasks that start tasks."""
        while self.outer is not None and self.outer.has_ended:
            self.outer = self.outer.outer

    def on(self, outer: Declared | None) -> Declared:
        """Return the same block's settings on other outer ones."""
        return Declared(self.key, outer, self._database, self._values)


#: The settings that the running code declares; None, nearly always, if it declares none.
declared: ContextVar[Declared | None] = ContextVar("declared", default=None)


# --- What a statement is, as far as settings are concerned ---

_BEFORE = rf"(?:\s|{COMMENT}|--[^\r\n]*\n)*"
_AFTER = rf"(?:\s|{COMMENT})*+;?(?:\s|{COMMENT})*+(?:--[^\r\n]*)?"
_FIRST_WORD = re.compile(rf"(?:{_BEFORE}\()*{_BEFORE}([A-Za-z]+)", re.DOTALL)
#: Statements that may stand in one message with others, in an implicit transaction block.
_SHARING = frozenset(
    ("DELETE", "EXPLAIN", "INSERT", "MERGE", "SELECT", "TABLE", "UPDATE", "VALUES", "WITH")
)
#: Statements that begin and end blocks: they depend on no settings, and may not fail by them. The
#: whole text must match, since another statement may follow in the same text.
_NEUTRAL = re.compile(
    rf"{_BEFORE}(?:BEGIN|START|SAVEPOINT|RELEASE|ROLLBACK|ABORT|SET\s+TRANSACTION)\b"
    rf'(?:[^;"/-]|"[^"]*"|/(?!\*)|-(?!-))*+{_AFTER}',
    re.DOTALL | re.IGNORECASE,
)
_SEMICOLON_INSIDE = re.compile(r";\s*\S")
#: Words of statements that undo changes of settings in a transaction, or begin another transaction.
_UNDOING = re.compile(r"\b(?:ROLLBACK|ABORT|COMMIT|END|CHAIN)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Statement:
    """The properties of a statement on which its settings depend."""

    shares: bool = False
    """Whether it may stand in one message with commands that change settings."""
    is_neutral: bool = False
    """Whether it needs no settings, because it only begins or ends a block."""
    undoes: bool = False
    """Whether it may roll back, and so undo changes of settings in the transaction."""
    keeps_settings: bool = False
    """Whether it is known to change no settings."""

    @classmethod
    def of(cls, query: Query, connection: Any) -> Statement:
        """Return the properties of `query`, which is about to be executed on `connection`."""
        text = text_of(query, connection)
        found = _FIRST_WORD.match(text)
        shares = found is not None and found[1].upper() in _SHARING
        if shares and is_vouched(query):
            return cls(shares=True, keeps_settings=True)
        # Several statements in one text may end the transaction that the settings are in.
        shares = shares and _SEMICOLON_INSIDE.search(text) is None
        is_neutral = not shares and _NEUTRAL.fullmatch(text) is not None
        return cls(
            shares=shares,
            is_neutral=is_neutral,
            undoes=not shares and _UNDOING.search(text) is not None,
            keeps_settings=is_neutral or is_vouched(query),
        )


#: A statement of which nothing is known, of a cursor that is not the connection's own, say.
UNKNOWN = Statement(undoes=True)


def text_of(query: object, connection: Any) -> str:
    """Return the SQL of `query`, with the placeholders of its parameters."""
    if isinstance(query, Composable):
        return query.as_string(connection)
    if isinstance(query, bytes):
        return query.decode("latin-1")
    return query if isinstance(query, str) else ""


# --- The settings of one server session ---


class SessionSettings:
    """The record of the settings that one server session has: Note [Declared settings].

    All facades of a connection share it. It is changed only by code that has the lock of the
    connection.
    """

    # fmt: off
    __slots__ = (
        "_before", "_doubtful", "_stale", "base", "current", "database", "outside",
        "per_transaction",
    )
    # fmt: on

    def __init__(self) -> None:
        #: Whether settings end with each transaction, since a pooler may change the server session.
        self.per_transaction = False
        #: The settings of all statements, beside the declared ones; only with `per_transaction`.
        self.base: Mapping[str, Value] = NOTHING
        #: The name of the database, by which settings are declared. None: none are looked up,
        #: because the connection is being set up, or belongs to no database of the backend.
        self.database: str | None = None
        self.forget()

    def forget(self) -> None:
        """Record that the server session has all its outside values: it is new, or was reset."""
        #: The declared settings that the server session has; None if that is not known.
        self.current: Current | None = NOTHING
        #: The outside values of the names that were changed once; None: the name had no value.
        self.outside: dict[str, Outside] = {}
        #: The names whose outside values have to be read again before they change.
        self._stale: set[str] = set()
        #: `current` and `outside` as they were before the open transaction changed settings.
        self._before: tuple[Current | None, dict[str, Outside]] | None = None
        #: Whether a statement in a pipeline may have changed settings.
        self._doubtful = False

    def settle(self, status: int) -> None:
        """Go back to the record from before a transaction, if `status` says that it has ended."""
        if status != _IDLE:
            return
        if self.per_transaction:
            self.forget()
        elif self._before is not None:
            (self.current, self.outside), self._before = self._before, None

    def change(self, pgconn: PGconn, *, local: bool, at_once: bool = False) -> Change | None:
        """Return the change that the running code's next statement needs; None if it needs none.

        `local` says that the change is to be sent in a transaction, to end with it; `at_once`, that
        the transaction has no other statement. Nothing is sent yet.
        """
        self.settle(pgconn.transaction_status)
        if self._doubtful and pgconn.pipeline_status == PipelineStatus.OFF:
            self._doubtful = False
            self._distrust(may_drop=False)
        wanted = self._wanted()
        if self.current == wanted or pgconn.transaction_status == _INERROR:
            return None
        change = Change(self, wanted, local=local or at_once, reads=not at_once)
        change.write(pgconn)
        if change.results:
            return change
        self.current = wanted
        return None

    def _wanted(self) -> Mapping[str, Value]:
        if self.database is None:
            return NOTHING
        found = declared.get()
        wanted = NOTHING if found is None else found.by_database.get(self.database, NOTHING)
        return {**self.base, **wanted} if self.base else wanted

    def remember(self) -> None:
        """Keep the record for the end of the transaction in which settings are about to change."""
        if self._before is None:
            self._before = self.current, dict(self.outside)

    def has_lost_values(self) -> bool:
        """Return whether the outside value of a name is lost, so that a reset must set it."""
        return not self.per_transaction and _UNREAD in self.outside.values()

    def needs_reading(self, name: str) -> bool:
        """Return whether the outside value of `name` must be read before `name` changes."""
        return name not in self.outside or (
            name in self._stale and self.current is not None and name not in self.current
        )

    def was_read(self, name: str, value: str | None) -> None:
        """Record the outside value of `name`."""
        self.outside[name] = value
        self._stale.discard(name)

    def executed(self, statement: Statement, pgconn: PGconn, *, autocommit: bool) -> None:
        """Record that `statement` was executed, or is about to be: it may have changed settings."""
        in_pipeline = pgconn.pipeline_status != PipelineStatus.OFF
        is_idle = pgconn.transaction_status == _IDLE
        if is_idle and self.per_transaction:
            self.forget()
            return
        has_changed = self._before is not None and not is_idle  # settings, in the transaction
        if statement.undoes and has_changed and not (in_pipeline and statement is UNKNOWN):
            self.current = None
        elif statement.keeps_settings:
            pass
        elif in_pipeline:
            self._doubtful = True
        else:
            self._distrust(may_drop=autocommit and is_idle)

    def doubt_all(self) -> None:
        """Record that a statement which the record does not see may have changed any setting."""
        if self.outside:
            self.current = None

    def _distrust(self, *, may_drop: bool) -> None:
        """Record that a statement of the running code may have changed any setting.

        The names that the code does not declare had their outside values when the statement came.
        If it has changed them, the new values are the outside values. If `may_drop`, no rollback
        can bring the declared values of these names back, and the record forgets the names.
        """
        if self._before is not None and self._before[0]:
            self._before = dict.fromkeys(self._before[0], _UNSURE), self._before[1]
        if self.current is None:
            return
        if may_drop:
            self.outside = {name: self.outside[name] for name in self.current}
        self._stale.update(name for name in self.outside if name not in self.current)
        self.current = dict.fromkeys(self.current, _UNSURE)


class Change:
    """Commands that give a server session the settings that a statement needs."""

    def __init__(
        self,
        settings: SessionSettings,
        wanted: Mapping[str, Value],
        *,
        local: bool,
        reads: bool = True,
    ) -> None:
        self._settings = settings
        self._wanted = wanted
        self._local = local
        self._record = settings.current, settings.outside
        #: The names whose outside values the first command reads.
        self.reads = tuple(filter(settings.needs_reading, wanted)) if reads else ()
        #: The names that change, with their new values.
        self._targets = dict(self._find_targets())
        #: The commands, and how many results the server sends for them.
        self.sql = b""
        self.results = 0

    def _find_targets(self) -> Iterator[tuple[str, Value | Unread | None]]:
        current, outside = self._record
        for name in {**outside, **self._wanted}:
            target = self._wanted.get(name, outside.get(name))
            is_new = name not in outside or name in self.reads
            if current is None or is_new or current.get(name, outside[name]) != target:
                yield name, target

    def stands_alone(self) -> bool:
        """Return True if the commands must be sent before the transaction of the statement begins.

        They change a setting that a transaction reads as it begins, the implicit one of a message,
        too.
        """
        return not READ_AT_BEGIN.isdisjoint(self._targets)

    # --- The commands ---

    def write(self, pgconn: PGconn) -> None:
        """Write the commands into `sql`, and their number into `results`."""
        to = _Writer(pgconn, local=self._local)
        commands = [to.read(self.reads)] if self.reads else []
        role = self._targets.get(_ROLE, _UNREAD)
        others = [(name, value) for name, value in self._targets.items() if name != _ROLE]
        if others and self._may_have_role():
            outside = self._settings.outside[_ROLE]
            commands.append(to.set(_ROLE, outside))
            role = self._wanted.get(_ROLE, outside)
            takes_role = role != outside
        else:
            takes_role = _ROLE in self._targets
        commands += [to.set(name, value) for name, value in others]
        if takes_role:
            commands.append(to.set(_ROLE, role))
        self.sql, self.results = b"; ".join(commands), len(commands)

    def _may_have_role(self) -> bool:
        """Return whether the server session has a declared role now, or may have one."""
        current, outside = self._record
        if _ROLE not in outside:
            return False
        return current is None or current.get(_ROLE, outside[_ROLE]) != outside[_ROLE]

    # --- What became of them ---

    def sent(self) -> None:
        """Record that the commands are about to be sent; until `done()` nothing is known."""
        settings = self._settings
        if self._local:
            settings.remember()
        settings.current = None
        settings.outside = {**dict.fromkeys(self.reads, _UNREAD), **settings.outside}

    def done(self, results: Sequence[PGresult], pgconn: PGconn) -> None:
        """Record that the server has executed the commands, with these results."""
        for column, name in enumerate(self.reads):
            value = results[0].get_value(0, column)
            text = None if value is None else value.decode(pgconn._encoding)  # noqa: SLF001
            self._settings.was_read(name, text)
        self._settings.current = self._wanted

    def refusal(self, result: PGresult, pgconn: PGconn) -> Error:
        """Return psycopg's error for `result`, with a note that it is about a declared setting."""
        exc = error_from_result(result, encoding=pgconn._encoding)  # noqa: SLF001
        if exc.sqlstate not in _NOT_REFUSED:
            exc.add_note(_REFUSED.format(names=", ".join(self._wanted)))
        return exc

    def failed(self, status: int) -> None:
        """Record that the message of the commands has failed; `status` is the transaction's now.

        The server has undone what the commands did, or the rollback that must follow will.
        """
        self._settings.settle(status)
        self._settings.current, self._settings.outside = self._record


class _Writer:
    """Writes commands that read and change settings; quotes names and values."""

    def __init__(self, pgconn: PGconn, *, local: bool) -> None:
        self._escaping = Escaping(pgconn)
        self._encoding = pgconn._encoding  # noqa: SLF001 - psycopg's name for client_encoding
        self._set = b"SET LOCAL " if local else b"SET "
        self._local = b"true" if local else b"false"

    def read(self, names: Sequence[str]) -> bytes:
        """Return a query of the values of `names`: NULL for a name that was never set."""
        calls = [b"current_setting(" + self._literal(name) + b", true)" for name in names]
        return b"SELECT " + b", ".join(calls)

    def set(self, name: str, value: Value | Unread | None) -> bytes:
        """Return a command that sets `name` to `value`; None sets the empty string."""
        if isinstance(value, str) and name in LISTS_OF_NAMES:
            arguments = (self._literal(name), self._literal(value), self._local)
            return b"SELECT set_config(" + b", ".join(arguments) + b")"
        target = b".".join(map(self._identifier, name.split(".")))
        return self._set + target + b" TO " + self._value(value)

    def _value(self, value: Value | Unread | None) -> bytes:
        if value is _UNREAD:
            return b"DEFAULT"
        if isinstance(value, tuple) and value:
            return b", ".join(map(self._identifier, value))
        return self._literal(value if isinstance(value, str) else "")

    def _identifier(self, name: str) -> bytes:
        return self._escaping.escape_identifier(name.encode(self._encoding))

    def _literal(self, text: str) -> bytes:
        return self._escaping.escape_literal(text.encode(self._encoding))
