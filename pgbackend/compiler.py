"""SQL compilers that say which statements the ORM made.

A statement that the ORM compiled leaves nothing in its session, so the connection can go to the
next task as it is; after any other, the session is reset (contract C9). The cursor of a compiled
statement is closed by the compiler as soon as the result is in memory, and the lease ends with it.

Note [Columns of a model]
Most queries select the columns of one model, all of them and nothing else. What Django makes of
that (the expressions, their SQL, their converters) is a sixth of the work of a `get()`, and the
same every time. So it is kept with the model, by what it depends on, and only if all that made it
is Django's own: fields that say themselves how they are selected are asked each time.
"""

from __future__ import annotations

from itertools import repeat
from operator import is_
from typing import Any

from django.db.backends.postgresql import compiler
from django.db.models import DurationField, Field, ForeignKey
from django.db.models.expressions import Col
from django.db.models.sql import Query

#: Since Django 6.1 a compiler quotes every name as its operations do.
_QUOTES_ALIKE = hasattr(compiler.SQLCompiler, "quote_name")

#: What makes a column, where it depends on nothing but the field.
_PLAIN: dict[str, set[Any]] = {
    "get_col": {Field.get_col, ForeignKey.get_col},
    "get_db_converters": {each.get_db_converters for each in (Field, DurationField, ForeignKey)},
    "select_format": {Field.select_format},
}


def _is_plain(field: Any) -> bool:
    return not vars(field).keys() & _PLAIN.keys() and all(
        getattr(type(field), name, None) in known for name, known in _PLAIN.items()
    )


def _are_plain(ops: type[Any]) -> bool:
    """Whether what these operations say of a column is Django's, or ours, for all connections."""
    said_by = (ops.get_db_converters.__module__, ops.quote_name.__module__)
    return all(module.startswith(("django.", "pgbackend.")) for module in said_by)


class _Columns:
    """What `get_select()` returns for a model; see Note [Columns of a model]."""

    __slots__ = ("cols", "converters", "fields", "indexes", "ops", "select", "table")

    def __init__(self, made_by: SQLCompiler, fields: Any, found: tuple[Any, Any, Any]) -> None:
        select, klass_info, _ = found
        self.select = select.copy()
        self.indexes: list[int] = klass_info["select_fields"].copy()
        #: What it depends on. Django makes another list when the fields of the model change.
        self.fields = fields
        self.table = made_by.query.base_table
        self.ops = type(made_by.connection.ops)
        self.cols = [col for col, _, _ in self.select]
        self.converters = made_by.get_converters(self.cols)

    @classmethod
    def of(cls, opts: Any, ops: Any) -> _Columns | None:
        """What is known of the model with `opts`."""
        known: _Columns | None = opts.__dict__.get("_pgbackend_columns")
        if (
            known is None
            or known.fields is not opts.concrete_fields
            or known.table != opts.db_table
            or known.ops is not type(ops)
        ):
            return None
        return known

    @classmethod
    def keep(
        cls, made_by: SQLCompiler, opts: Any, fields: Any, found: tuple[Any, Any, Any]
    ) -> None:
        """Keep what was `found` of all `fields` for the next query, if it is Django's own."""
        cols = [col for col, _, _ in found[0]]
        if (
            _are_plain(type(made_by.connection.ops))
            and len(cols) == len(fields)
            and all(map(_is_plain_column, cols, fields, repeat(opts.db_table)))
        ):
            # There, and nowhere else, it is forgotten together with the model.
            opts._pgbackend_columns = cls(made_by, fields, found)  # noqa: SLF001


def _is_plain_column(col: Any, field: Any, table: str) -> bool:
    return (
        type(col) is Col
        and col.target is field
        and col.alias == table
        and not hasattr(col, "as_postgresql")
        and _is_plain(field)
        and _is_plain(col.output_field)
    )


def _selects_a_model(query: Any) -> bool:
    """Whether `query` selects the columns of its model: all of them, and nothing else."""
    return bool(
        type(query) is Query
        and query.default_cols
        and query.selected is None
        and not query.select_related
        and not query.annotations
        and not query.extra
        and not query.deferred_loading[0]
        and query.model is not None
        and query.alias_map  # or `base_table`, which is remembered, would be None
        and query.base_table == query.model._meta.db_table  # noqa: SLF001
        # Django 5.2 does not quote a name that is also an alias of the query.
        and (_QUOTES_ALIKE or (len(query.alias_map) == 1 and not query.external_aliases))
    )


class CompiledStatement:
    """A compiler whose statements are marked as compiled by the ORM."""

    connection: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if _QUOTES_ALIKE:
            # Django's keeps a dictionary for each statement, in front of what is kept anyway.
            self.quote_name = self.connection.ops.quote_name

    def execute_sql(self, *args: Any, **kwargs: Any) -> Any:
        session = self.connection.async_session()
        if session is None:
            return super().execute_sql(*args, **kwargs)  # type: ignore[misc]
        # The next cursor takes the mark. Compiling may run statements of its own before that.
        outer, session.compiled, session.cursor = (session.compiled, session.cursor), True, None
        try:
            return super().execute_sql(*args, **kwargs)  # type: ignore[misc]
        except BaseException:
            # Django closes the cursor for an Exception, which a cancellation is not; the
            # traceback would keep it, and its lease, for as long as somebody keeps that.
            if session.cursor is not None:
                session.cursor.close()
            raise
        finally:
            session.compiled, session.cursor = outer


class SQLCompiler(CompiledStatement, compiler.SQLCompiler):
    #: What `get_select()` has found, and the list whose converters it has told.
    _columns: _Columns | None = None
    _converted: Any = None

    def get_select(self, with_col_aliases: bool = False) -> tuple[Any, Any, Any]:
        query = self.query
        if with_col_aliases or type(self) is not SQLCompiler or not _selects_a_model(query):
            return super().get_select(with_col_aliases=with_col_aliases)
        opts = query.get_meta()
        self._columns = known = _Columns.of(opts, self.connection.ops)
        if known is None:
            fields = opts.concrete_fields
            found = super().get_select(with_col_aliases=with_col_aliases)
            _Columns.keep(self, opts, fields, found)
            return found
        query.get_initial_alias()  # which counts that the table is used
        klass_info = {"model": query.model, "select_fields": known.indexes.copy()}
        return known.select.copy(), klass_info, {}

    def get_converters(self, expressions: Any) -> Any:
        known = self._columns
        if (
            known is None
            or len(expressions) != len(known.cols)
            or not all(map(is_, expressions, known.cols))
        ):
            return super().get_converters(expressions)
        self._converted = expressions
        return known.converters.copy()

    def has_composite_fields(self, expressions: Any) -> bool:
        if expressions is self._converted:
            return False
        return super().has_composite_fields(expressions)


class SQLInsertCompiler(CompiledStatement, compiler.SQLInsertCompiler):
    pass


class SQLDeleteCompiler(CompiledStatement, compiler.SQLDeleteCompiler):
    pass


class SQLUpdateCompiler(CompiledStatement, compiler.SQLUpdateCompiler):
    def execute_returning_sql(self, returning_fields: Any) -> Any:  # Django 6.0 and later
        session = self.connection.async_session()
        if session is None:
            return super().execute_returning_sql(returning_fields)
        outer, session.compiled = session.compiled, True
        try:
            return super().execute_returning_sql(returning_fields)
        finally:
            session.compiled = outer


class SQLAggregateCompiler(CompiledStatement, compiler.SQLAggregateCompiler):
    pass
