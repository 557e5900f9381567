"""Writes an INSERT of one row from cached SQL: the shortcut `insert`.

The SQL of an INSERT depends on the fields that it writes and returns, so it is cached by these, on
the model's `_meta`. The fields prepare their values each time. This shortcut is taken only if the
compiler and the connection's `ops` are not derived or patched, and if no field writes its own
placeholder.
"""

from __future__ import annotations

import asyncio
from itertools import repeat
from operator import attrgetter, is_
from typing import Any

import django
from django.db.backends.base.operations import BaseDatabaseOperations
from django.db.backends.postgresql import compiler as django_compiler
from django.db.models import NOT_PROVIDED
from django.db.models.expressions import DatabaseDefault
from django.db.models.sql import compiler as sql_compiler

from pgbackend import expressions
from pgbackend.compiler import CompiledInsert, SQLInsertCompiler, put_before
from pgbackend.patches import lookup, unpatched

from . import statements
from .cached_fields import MOST_STATEMENTS, FieldAnswers, are_plain, is_plain_column
from .written_values import PLAIN_TYPES, RETURNING, are_returned_rows_djangos, has_placeholder

_get_running_loop = asyncio._get_running_loop

#: The bypassed functions: the shortcut is taken while they are the same as at import.
_for_insert = lookup(
    "its.as_sql its.pre_save_val its.prepare_value its.field_as_sql its.assemble_as_sql "
    "base.assemble_as_sql base.get_converters ops.bulk_insert_sql",
    its=django_compiler.SQLInsertCompiler,
    base=sql_compiler.SQLInsertCompiler,
    ops=BaseDatabaseOperations,
)
_INSERT = unpatched(*_for_insert())

#: Whether Django does not prepare a `DatabaseDefault`: so it is since Django 6.1.
_LEAVES_DEFAULTS = django.VERSION >= (6, 1)
#: The name of the method by which a field writes the placeholder of its value.
_GET_PLACEHOLDER = repeat("get_placeholder_sql" if django.VERSION >= (6, 1) else "get_placeholder")

_insert_features = attrgetter(
    *("can_return_columns_from_insert", "can_return_rows_from_bulk_insert", "has_bulk_insert"),
)
_INSERTS_AND_RETURNS = (True, True, True)


def _has_default_or_placeholder(field: Any) -> bool:
    return field.db_default is not NOT_PROVIDED or has_placeholder(field)


class _CachedInsert:
    """The SQL of an INSERT of one row, for certain written and returned fields."""

    __slots__ = (
        *("answers", "into", "kept_by", "returning", "returning_params", "returns_as_is", "sql"),
        "table",
    )

    def __init__(self, made_by: Any, fields: Any, returning_fields: Any) -> None:
        ops, opts = made_by.connection.ops, made_by.query.get_meta()
        #: Keeps the fields alive, because the key of the cache has their `id()`.
        self.kept_by = list(fields), list(returning_fields)
        self.table = opts.db_table
        columns = [field.column for field in fields]
        names = ", ".join(map(ops.quote_name, columns))
        self.into = f"INSERT INTO {ops.quote_name(self.table)} ({names})"
        sql, self.returning_params = "", ()
        if returning_fields:
            sql, self.returning_params = getattr(ops, RETURNING)(returning_fields)
        self.returning = sql and f" {sql}"
        placeholders = ", ".join(["%s"] * len(columns))
        self.sql = f"{self.into} VALUES ({placeholders}){self.returning}"
        cols = [field.get_col(self.table) for field in returning_fields]
        #: Whether no converter changes the returned values.
        self.returns_as_is = not made_by.get_converters(cols) and all(
            map(is_plain_column, cols, returning_fields, repeat(self.table))
        )
        returned = [col.output_field for col in cols]
        self.answers = FieldAnswers([*fields, *returning_fields, *returned], ops)

    @classmethod
    def for_compiler(cls, made_by: Any, returning_fields: Any) -> _CachedInsert | None:
        """Return the SQL for `made_by`, cached or new; None if a field has SQL of its own."""
        query: Any = made_by.query
        fields, opts = query.fields, query.model._meta  # noqa: SLF001
        known: dict[Any, _CachedInsert] = opts.__dict__.get("_pgbackend_inserts", {})
        key = tuple(map(id, fields)), tuple(map(id, returning_fields))
        cached = known.get(key)
        if (
            cached is not None
            and cached.table == opts.db_table
            and not any(map(hasattr, fields, _GET_PLACEHOLDER))
            and not cached.answers.is_stale(made_by.connection.ops)
        ):
            return cached
        if any(map(_has_default_or_placeholder, fields)):
            return None
        cached = cls(made_by, fields, returning_fields)
        if are_plain(cached.answers.ops) and len(known) < MOST_STATEMENTS:
            opts._pgbackend_inserts = {**known, key: cached}  # noqa: SLF001
        return cached


class Inserts(CompiledInsert):
    """A base of the INSERT compiler: inserts one row by cached SQL, and fetches what it returns."""

    def as_sql(self: Any) -> Any:
        cached = (
            _CachedInsert.for_compiler(self, self.returning_fields or ())
            if self._is_usual()
            else None
        )
        return super().as_sql() if cached is None else [self._cached_insert(cached)]

    def execute_sql(self: Any, returning_fields: Any = None) -> Any:
        if (
            _get_running_loop() is None
            or not self._is_usual()
            or not statements.is_executed_by_django(self)
            or (cached := _CachedInsert.for_compiler(self, returning_fields or ())) is None
            or not statements.can_execute(self.connection)
        ):
            return super().execute_sql(returning_fields)
        self.returning_fields = returning_fields
        connection = self.connection
        noted = expressions.noted
        sql, params = self._cached_insert(cached)
        _, rows = statements.execute(connection, sql, params, expressions.noted is not noted)
        if not returning_fields:
            return []
        returned = statements.fetched(connection, rows)
        if cached.returns_as_is:
            return returned
        cols = [field.get_col(cached.table) for field in returning_fields]
        converters = self.get_converters(cols)
        return list(self.apply_converters(returned, converters)) if converters else returned

    def _is_usual(self: Any) -> bool:
        """Return whether this INSERT writes one row, in the form that `_CachedInsert` has."""
        query: Any = self.query
        return bool(
            type(self) is SQLInsertCompiler
            and all(map(is_, _for_insert(), _INSERT))
            and len(query.objs) == 1
            and query.fields
            and not query.raw
            and query.on_conflict is None
            and _insert_features(self.connection.features) == _INSERTS_AND_RETURNS
            and are_returned_rows_djangos(self.connection)
        )

    def _cached_insert(self, cached: _CachedInsert) -> tuple[str, tuple[Any, ...]]:
        self.returning_params = cached.returning_params
        values = self._prepared_values()
        for value in values:
            if hasattr(value, "as_sql"):
                return self._with_expressions(cached, values)
        return cached.sql, (*values, *cached.returning_params)

    def _prepared_values(self: Any) -> list[Any]:
        row, connection = self.query.objs[0], self.connection
        values: list[Any] = []
        for field in self.query.fields:
            value = field.pre_save(row, add=True)
            if type(value) in PLAIN_TYPES:
                value = field.get_db_prep_save(value, connection=connection)
            elif not (_LEAVES_DEFAULTS and isinstance(value, DatabaseDefault)):
                value = self.prepare_value(field, value)
            values.append(value)
        return values

    def _with_expressions(
        self, cached: _CachedInsert, values: list[Any]
    ) -> tuple[str, tuple[Any, ...]]:
        placeholders: list[str] = []
        params: list[Any] = []
        for value in values:
            if hasattr(value, "as_sql"):
                sql, sent = self.compile(value)
                placeholders.append(sql)
                params.extend(sent)
            else:
                placeholders.append("%s")
                params.append(value)
        params.extend(cached.returning_params)
        return f"{cached.into} VALUES ({', '.join(placeholders)}){cached.returning}", tuple(params)


def install() -> None:
    """Put `Inserts` in front of the bases of the compiler of INSERTs."""
    put_before(SQLInsertCompiler, Inserts)
