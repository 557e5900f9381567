"""`session()`: blocks that declare settings of the server session for the statements of their code.

This module has the blocks, and checks the names and values. How the settings reach the server is
told in `driver/session_settings.py`, Note [Declared settings].
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import timedelta
from decimal import Decimal
from enum import Enum
from types import FrameType
from typing import Any, Self, overload
from uuid import UUID

from django.core.exceptions import ImproperlyConfigured
from django.db import DEFAULT_DB_ALIAS, connections
from django.utils.connection import ConnectionDoesNotExist

from . import frames, generators
from .conf import alias_is_ours
from .decorating import Decorating
from .driver.session_settings import (
    LISTS_OF_NAMES,
    READ_AT_BEGIN,
    Declared,
    Key,
    Value,
    declared,
)
from .options import is_through_pooler

#: The values that a setting may have.
Setting = str | int | float | Decimal | UUID | timedelta | Sequence[str] | None

_NAME = re.compile(r"[a-z_][a-z0-9_$]*(\.[a-z_][a-z0-9_$]*)*")
#: Settings that cannot be declared, and what to do instead.
_REFUSED = {
    "client_encoding": "psycopg decodes rows by it: set OPTIONS['client_encoding']",
    "datestyle": "psycopg reads dates in the style 'ISO': format them with to_char()",
    "idle_session_timeout": "it counts between statements: set it for the database",
    "intervalstyle": "psycopg reads intervals in the style 'postgres': format them with to_char()",
    "is_superuser": "PostgreSQL sets it by the role: declare 'role'",
    "seed": "PostgreSQL cannot tell its value, to set it again: call setseed()",
    "session_authorization": "it resets 'role': declare 'role'",
    "standard_conforming_strings": "it changes how values are quoted: set it for the database",
    "timezone": (
        "Django makes datetimes by the TIME_ZONE of the database: set that, or use "
        "django.utils.timezone.override()"
    ),
    "transaction_deferrable": "it belongs to one transaction: use 'default_transaction_deferrable'",
    "transaction_isolation": "it belongs to one transaction: use 'default_transaction_isolation'",
    "transaction_read_only": "it belongs to one transaction: use 'default_transaction_read_only'",
}
#: Bytes of PostgreSQL's longest identifier (NAMEDATALEN - 1).
_LONGEST_NAME = 63
#: Packages that run a generator function as a context manager or fixture: they make its first step
#: where the block begins, and the next one where it ends.
_RUNNERS = frozenset(("_pytest", "anyio", "contextlib", "pytest_asyncio"))


@overload
def session(
    using: str = DEFAULT_DB_ALIAS,
    *,
    search_path: str | Sequence[str] | None = None,
    role: str | None = None,
    **settings: Setting,
) -> SessionBlock: ...


# For names that are in a dictionary, which type checkers cannot tell from the other parameters.
@overload
def session(using: str = DEFAULT_DB_ALIAS, /, **settings: Setting) -> SessionBlock: ...


def session(
    using: Any = DEFAULT_DB_ALIAS,
    *,
    search_path: Any = None,
    role: Any = None,
    **settings: Any,
) -> SessionBlock:
    """Declare settings of the server session for all statements of a block.

    The block is a ``with``, an ``async with``, or a function, coroutine function or generator
    function that the result decorates. The settings are in force for each statement of the block
    on the database `using`, on whatever connection it is sent, in autocommit and in transactions,
    also in tasks and `sync_to_async()` threads that the block starts; and for no other statement.
    Blocks nest: an inner block adds to the outer one, and wins where both set a name. ::

        with pgbackend.session(search_path="tenant_7", statement_timeout="5s"):
            orders = list(Order.objects.all())

        @pgbackend.session(role="reader", **{"app.tenant": 7})
        async def report(request): ...

    `search_path` is the name of a schema, or a list of such names. `role` is a role that the user
    of the database may take; ``"none"`` is that user's own. `settings` are PostgreSQL's other
    settings, and custom ones, whose names have a dot. Values are text, numbers, bools, UUIDs, or
    timedeltas (sent as milliseconds, 1 at least unless zero); None leaves the name as it is outside
    of the block. Names and values are quoted.

    No round trip is made for the settings: they are sent in the message of the next statement, if
    the connection does not have them yet. So PostgreSQL's error for a setting that it refuses is
    raised by that statement.

    Raises `ValueError` or `TypeError` for a name or value that cannot be sent,
    `django.db.ConnectionDoesNotExist` for an unknown database, and `ImproperlyConfigured` if the
    database's ENGINE is not pgbackend. Entering the block raises `RuntimeError` in a generator
    function, whose settings would hold for the code between its steps, too: decorate it instead.
    """
    _check_alias(using)
    given = {"search_path": search_path, "role": role}
    values: dict[str, Value] = {}
    for name, value in [*given.items(), *settings.items()]:
        if value is None:
            continue
        key = _check_name(name)
        if key in values:
            raise ValueError(f"the setting {key!r} is given twice: PostgreSQL ignores case")
        values[key] = _as_value(key, value)
    _check_through_pooler(using, values)
    return SessionBlock(using, values)


def _check_through_pooler(using: str, names: Collection[str]) -> None:
    """Raise `ValueError` for a name that cannot be set with SET LOCAL, where only that is sent."""
    late = sorted(READ_AT_BEGIN.intersection(names))
    if late and is_through_pooler(connections.settings[using]["OPTIONS"]):
        raise ValueError(
            f"pgbackend.session() cannot declare {late[0]!r} through a transaction pooler: it "
            "would be set in the transaction, which has begun by then. Use SET TRANSACTION in the "
            "block, or OPTIONS['isolation_level'], or set it for the role: ALTER ROLE ... SET"
        )


class SessionBlock(Decorating):
    """The result of `session()`: a context manager, and a decorator; may be used many times."""

    def __init__(self, using: str, values: Mapping[str, Value]) -> None:
        self._using = using
        self._values = values

    def __repr__(self) -> str:
        names = ", ".join(self._values) or "nothing"  # values may be secret
        return f"<pgbackend.session of {self._using!r}: {names}>"

    def __enter__(self) -> Self:
        frame = frames.of_with(sys._getframe(1))
        _check_no_generator(frame)
        self._enter(Key(self, _suspendable(frame)))
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._leave(Key(self, _suspendable(frames.of_with(sys._getframe(1)))))

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(self, *exc_info: object) -> None:
        self.__exit__()

    def _enter(self, key: Key) -> Key:
        """Begin a block; return `key`, by which it is found when it ends."""
        outer = declared.get()
        if outer is not None:
            outer.drop_ended()
        declared.set(Declared(key, outer, self._using, self._values))
        return key

    def _leave(self, key: Key) -> None:
        """End the innermost block with this key that the running code is in.

        If there is none, end one that a ``with`` of this object has begun in another function. But
        if a generator or coroutine is being closed, which was left behind, do nothing: the context
        is that of other code.
        """
        blocks = list(_blocks())
        found = [each for each in blocks if each.key == key]
        if not found:
            if isinstance(sys.exception(), GeneratorExit):
                return
            found = [
                each for each in blocks if key.block is not None and each.key.block is key.block
            ]
        if not found:
            raise RuntimeError(
                f"{self!r} ends in another context than it began in, where its settings may still "
                "be in force: enter and leave it in the same task, and in the same function"
            )
        here = found[0]
        here.has_ended = True
        remaining = here.outer
        for each in reversed(blocks[: blocks.index(here)]):
            remaining = each.on(remaining)
        declared.set(remaining)

    # --- As a decorator: see decorating.py ---

    def begin_call(self) -> Key:
        return self._enter(Key(None, object()))

    def end_call(self, begun: Key) -> None:
        self._leave(begun)


def _blocks() -> Iterator[Declared]:
    """Yield the blocks that the running code is in, the innermost first."""
    here = declared.get()
    while here is not None:
        yield here
        here = here.outer


def _suspendable(frame: FrameType | None) -> int | None:
    """Return a key of `frame` if it is a generator's or coroutine's, else None.

    Such a frame may be closed by the garbage collector, in the midst of other code, which may be in
    a block of the same object.
    """
    if frame is None or not frame.f_code.co_flags & (generators.GENERATORS | inspect.CO_COROUTINE):
        return None
    return id(frame)


# --- Checks ---


def _check_alias(using: object) -> None:
    if callable(using):
        raise TypeError(f"write @pgbackend.session(...), with parentheses, before {using!r}")
    alias = str(using)
    if alias not in connections.settings:
        raise ConnectionDoesNotExist(f"The connection {alias!r} doesn't exist.")
    if not alias_is_ours(alias):
        raise ImproperlyConfigured(
            "pgbackend.session() declares settings for databases whose ENGINE is 'pgbackend'; that "
            f"of DATABASES[{alias!r}] is {connections.settings[alias].get('ENGINE')!r}"
        )


def _check_no_generator(frame: FrameType | None) -> None:
    """Raise `RuntimeError` if the ``with`` in `frame` is in a generator that code iterates."""
    while frame is not None and generators.carries(frame):
        runner = frame.f_back
        package = "" if runner is None else runner.f_globals.get("__name__", "").partition(".")[0]
        if package not in _RUNNERS:
            raise RuntimeError(
                f"the settings of 'with pgbackend.session()' in the generator "
                f"{frame.f_code.co_name!r} would hold for the code between its steps, too: "
                "decorate the generator function with it, or put the 'with' around the loop"
            )
        frame = frames.of_with(runner) if package == "contextlib" else None


def _check_name(name: str) -> str:
    key = name.lower()
    if not _NAME.fullmatch(key):
        raise ValueError(
            f"{name!r} is no name of a setting: write letters, digits and '_', and for a custom "
            "setting a '.' between two such names"
        )
    if key in _REFUSED:
        raise ValueError(f"pgbackend.session() cannot declare {name!r}: {_REFUSED[key]}")
    return key


def _as_value(name: str, value: Any) -> Value:
    """Return `value` as it is sent; raise `TypeError` or `ValueError` if it cannot be."""
    if name in LISTS_OF_NAMES:
        return _as_names(name, value)
    if isinstance(value, Enum):
        value = value.value
    if name == "role" and not isinstance(value, str):
        raise TypeError(f"'role' is the name of a role; got {type(value).__name__!r}")
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, timedelta):
        return f"{_milliseconds(value)}ms"
    if isinstance(value, str | int | float | Decimal | UUID):
        return _check_text(name, str(value))
    raise TypeError(
        f"the setting {name!r} is of type {type(value).__name__!r}, which PostgreSQL has no text "
        "for: pass a str, number, bool, UUID or timedelta"
    )


def _milliseconds(value: timedelta) -> int:
    exact = value / timedelta(milliseconds=1)
    return 1 if 0 < exact < 1 else round(exact)


def _as_names(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        if "," in value:
            raise ValueError(
                f"{name}={value!r} would be the name of one schema, with a comma in it: pass a "
                "list of names"
            )
        value = [value] if value else []
    if not isinstance(value, Sequence) or not all(isinstance(each, str) for each in value):
        raise TypeError(f"{name!r} is a name, or a list of names; got {type(value).__name__!r}")
    return tuple(_check_identifier(name, str.__str__(each)) for each in value)


def _check_identifier(setting: str, name: str) -> str:
    _check_text(setting, name)
    if not name:
        raise ValueError(f"{setting!r} has an empty name in its list")
    if len(name.encode()) > _LONGEST_NAME:
        raise ValueError(
            f"{setting!r} has a name of more than {_LONGEST_NAME} bytes, which PostgreSQL would "
            f"cut off, and so take for another one: {name!r}"
        )
    return name


def _check_text(name: str, text: str) -> str:
    """Return `text`; raise `ValueError` if it cannot be sent, without showing it (a secret)."""
    if "\0" in text:
        raise ValueError(f"the value of the setting {name!r} contains a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"the value of the setting {name!r} contains a character that cannot be encoded"
        ) from None
    return text
