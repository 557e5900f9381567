"""Compiles the ORM's statements, vouches for their SQL, and ends their leases.

A statement that the ORM compiled from Django's own parts changes nothing in the server session, so
the connection can go to the next task as it is; after any other statement it is reset (contract
C9). While a compiler executes, it vouches for the SQL texts that it has compiled
(`driver/vouching.py`), and for no other statement that is sent meanwhile. The cursor of a compiled
statement is closed as soon as the result is in memory, and the lease ends with it.

The classes `Compiled...` are mixins, in front of Django's compilers. They pass each part of a
statement to `expressions`, which notes a part that is not Django's own: the SQL is not vouched for
then.

Note [Seams of the compilers]
The five classes that Django looks up in this module by name are empty: their bases have the
methods. So a shortcut is plugged in as one more base, in front (`put_before()`), whose methods call
`super()` for the plain way; the class, its name and the classes derived from it stay the same. The
shortcuts are `fast/select.py`, `fast/insert.py`, `fast/update.py`, `fast/comparisons.py`,
`fast/rows.py` and `fast/statements.py`. This module does not know them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from django.db.backends.postgresql import compiler

from . import expressions
from .driver.session_settings import declared
from .driver.vouching import vouching

_PLAIN_EXPRESSIONS = expressions.plain


class CompiledStatement:
    """A mixin of all compilers: marks their statements as the ORM's, and vouches for their SQL.

    The mark (`Session.compiled`) tells the next cursor that its lease may end once the rows are in
    memory.
    """

    connection: Any
    query: Any

    def compile(self, node: object) -> tuple[str, Any]:
        if type(node) not in _PLAIN_EXPRESSIONS:
            expressions.look_at(node)
        return super().compile(node)  # type: ignore[misc,no-any-return]

    def execute_sql(self, *args: Any, **kwargs: Any) -> Any:
        session = self.connection.async_session()
        if session is None:
            return self._execute_sync(*args, **kwargs)
        # The next cursor takes these marks. Code that compiles may run other statements before it.
        outer = session.compiled, session.at_once, session.cursor
        session.compiled, session.at_once, session.cursor = True, self.fetches_at_once(), None
        try:
            with self._vouching():
                return super().execute_sql(*args, **kwargs)  # type: ignore[misc]
        except BaseException:
            # Django closes the cursor for an `Exception`, which a cancellation is not: the open
            # cursor would keep its lease for as long as the traceback lives.
            if session.cursor is not None:
                session.cursor.close()
            raise
        finally:
            session.compiled, session.at_once, session.cursor = outer

    def _execute_sync(self, *args: Any, **kwargs: Any) -> Any:
        if declared.get() is None:
            return super().execute_sql(*args, **kwargs)  # type: ignore[misc]
        # A statement that is vouched for keeps the declared settings, so the next needs no SET.
        with self._vouching():
            return super().execute_sql(*args, **kwargs)  # type: ignore[misc]

    def fetches_at_once(self) -> bool:
        """Return False: `execute_sql()` gets an ordinary cursor.

        The shortcut `statements` overrides this method, and returns True if `execute_sql()` may get
        a cursor that fetches all rows as it executes.
        """
        return False

    @contextmanager
    def _vouching(self) -> Iterator[None]:
        """Vouch, inside the `with`, for the SQL of `as_sql()` if its parts are all Django's own."""
        texts: list[str] = []
        # Set on the object, so that the text of a derived class's `as_sql()` is known, too.
        as_sql: Any = self.as_sql  # type: ignore[attr-defined]  # of Django's
        vars(self)["as_sql"] = partial(self._as_known_sql, texts, as_sql)
        try:
            with vouching(texts):
                yield
        finally:
            vars(self).pop("as_sql", None)

    def _as_known_sql(
        self, texts: list[str], as_sql: Callable[..., Any], *args: object, **kwargs: object
    ) -> object:
        noted = expressions.noted
        made = as_sql(*args, **kwargs)
        if expressions.noted is noted and expressions.writes_as_django(type(self)):
            texts += [sql for sql, _ in made] if isinstance(made, list) else [made[0]]
        return made


class CompiledSelect(CompiledStatement):
    """A mixin: a SELECT is not vouched for if a part of it may write SQL that is not Django's.

    The selected fields, the extra tables and the compiler itself are passed to the module
    `expressions`, which notes such a part.
    """

    def get_select(self, with_col_aliases: bool = False) -> tuple[Any, Any, Any]:
        found: tuple[Any, Any, Any] = super().get_select(with_col_aliases=with_col_aliases)  # type: ignore[misc]
        expressions.look_at_selected(found[0])
        return found

    def as_sql(
        self, with_limits: bool = True, with_col_aliases: bool = False
    ) -> tuple[str, tuple[Any, ...]]:
        expressions.look_at_parts(self)
        return super().as_sql(  # type: ignore[misc,no-any-return]
            with_limits=with_limits, with_col_aliases=with_col_aliases
        )


class CompiledInsert(CompiledStatement):
    """A mixin: an INSERT is not vouched for if a custom field writes the SQL of its own value.

    The fields are passed to the module `expressions`, which notes such a field.
    """

    def as_sql(self) -> list[tuple[str, tuple[Any, ...]]]:
        for field in self.query.fields:
            expressions.look_at_written(field)
        return super().as_sql()  # type: ignore[misc,no-any-return]


class CompiledUpdate(CompiledStatement):
    """A mixin: an UPDATE is not vouched for if a custom field writes the SQL of its own value.

    The fields are passed to the module `expressions`, which notes such a field. The mixin also
    overrides `execute_returning_sql()`, as `CompiledStatement` overrides `execute_sql()`: it marks
    the statement as the ORM's, and vouches for its SQL.
    """

    def as_sql(self) -> tuple[str, tuple[Any, ...]]:
        for field, _, _ in self.query.values:
            expressions.look_at_written(field)
        return super().as_sql()  # type: ignore[misc,no-any-return]

    def execute_returning_sql(self, returning_fields: object) -> Any:  # Django 6.0 and later
        # Without fields, Django calls `execute_sql()`, which marks the statement itself.
        session = self.connection.async_session() if returning_fields else None
        if session is None:
            return super().execute_returning_sql(returning_fields)  # type: ignore[misc]
        outer = session.compiled, session.at_once
        session.compiled, session.at_once = True, self.fetches_returned_at_once()
        try:
            with self._vouching():
                return super().execute_returning_sql(returning_fields)  # type: ignore[misc]
        finally:
            session.compiled, session.at_once = outer

    def fetches_returned_at_once(self) -> bool:
        """Return False, as `fetches_at_once()` does, but for `execute_returning_sql()`."""
        return False


class SQLCompiler(CompiledSelect, compiler.SQLCompiler):
    pass


class SQLInsertCompiler(CompiledInsert, compiler.SQLInsertCompiler):  # type: ignore[misc]
    pass


class SQLDeleteCompiler(CompiledStatement, compiler.SQLDeleteCompiler):
    pass


class SQLUpdateCompiler(CompiledUpdate, compiler.SQLUpdateCompiler):  # type: ignore[misc]
    pass


class SQLAggregateCompiler(CompiledStatement, compiler.SQLAggregateCompiler):
    pass


COMPILERS = (
    *(SQLCompiler, SQLInsertCompiler, SQLDeleteCompiler, SQLUpdateCompiler),
    SQLAggregateCompiler,
)


def put_before(kind: type[Any], shortcut: type[Any]) -> None:
    """Put `shortcut`, a class, in front of the bases of `kind`: Note [Seams of the compilers]."""
    kind.__bases__ = (shortcut, *kind.__bases__)
