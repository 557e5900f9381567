"""Writes a SELECT of a model's columns from cached parts: the shortcuts `select` and `known`.

Note [Columns of a model]
Most queries select all columns of one model, and nothing else. To make these (the expressions,
their SQL, their converters) is a sixth of the work of a `get()`, and the result is the same every
time. So it is cached on the model's `_meta`, together with the methods of fields and `ops` that
made it (`cached_fields.py`), and only if all of these are Django's own.

Note [Usual statements]
Django asks some twenty parts of a query for their SQL, most of which have none. For a usual query
(a model's own columns, not grouped, not combined, not locked), `Selects.as_sql()` asks only the
parts that it has. With the shortcut `known`, the SQL of a SELECT with one comparison is cached as a
whole. The SQL equals Django's to the letter (`tests/fast/test_compiler.py`). Derived compilers
and queries are left to Django; so are all, if one of the methods in `_for_select` is patched.
"""

from __future__ import annotations

from itertools import repeat
from operator import attrgetter, is_
from typing import Any

from django.core.exceptions import EmptyResultSet, FullResultSet
from django.db.backends.postgresql import compiler as django_compiler
from django.db.models.expressions import Col
from django.db.models.sql import Query
from django.db.models.sql.datastructures import BaseTable

from pgbackend.compiler import CompiledSelect, SQLCompiler, put_before
from pgbackend.patches import lookup, unpatched

from .cached_fields import MOST_STATEMENTS, FieldAnswers, are_plain, is_plain_column
from .comparisons import QUOTES_ALIKE, comparison_in, is_plain_comparison
from .integers import Integers
from .registry import is_on

#: The bypassed functions: the shortcut is taken while they are the same as at import.
_for_select = lookup(
    "its.as_sql its.compile its.pre_sql_setup its.setup_query its.get_select its.get_extra_select "
    "Col.as_sql",
    its=django_compiler.SQLCompiler,
    Col=Col,
)
_SELECT = unpatched(*_for_select())
_KNOWN = is_on("known")


class _CachedColumns:
    """The cached result of `get_select()` for a model; see Note [Columns of a model]."""

    __slots__ = (
        *("answers", "cols", "converters", "fields", "from_", "indexes", "select", "select_from"),
        *("statements", "table"),
    )

    def __init__(self, made_by: Any, fields: Any, found: tuple[Any, Any, Any]) -> None:
        select, klass_info, _ = found
        self.select = select.copy()
        self.indexes: list[int] = klass_info["select_fields"].copy()
        #: Django makes another list when the fields of the model change.
        self.fields = fields
        self.table = made_by.query.base_table
        self.cols = [col for col, _, _ in self.select]
        columns = ", ".join([sql for _, (sql, _), _ in self.select])
        self.select_from = f"SELECT {columns} FROM "  # noqa: S608 - all of it is quoted
        self.from_ = self.select_from + made_by.connection.ops.quote_name(self.table)
        self.converters = made_by.get_converters(self.cols)
        converting = [col.output_field for col in self.cols]
        self.answers = FieldAnswers([*fields, *converting], made_by.connection.ops)
        #: The SQL of statements with one comparison, by column, operator and limits; each with the
        #: integers that its column can be compared with unprepared.
        self.statements: dict[Any, tuple[str, Integers | None]] = {}

    @classmethod
    def for_query(cls, query: Any, ops: Any) -> _CachedColumns | None:
        """Return the cached columns of the model of `query`; None if they are missing or stale."""
        opts = query.model._meta  # noqa: SLF001
        cached: _CachedColumns | None = opts.__dict__.get("_pgbackend_columns")
        if (
            cached is None
            or cached.fields is not opts.concrete_fields
            or cached.table != opts.db_table
            or cached.answers.is_stale(ops)
        ):
            return None
        return cached

    def keep(self, key: Any, sql: str, integers: Integers | None) -> None:
        """Cache the SQL of a statement with one comparison, for later ones with the same key."""
        if len(self.statements) >= MOST_STATEMENTS:  # each page of a list has another LIMIT
            self.statements.clear()
        self.statements[key] = sql, integers

    def selected_of(self, model: Any) -> tuple[Any, Any, Any]:
        """Return the result of `get_select()` for `model`, in copies that the caller may change."""
        klass_info = {"model": model, "select_fields": self.indexes.copy()}
        return self.select.copy(), klass_info, {}

    @classmethod
    def remember(cls, made_by: Any, opts: Any, fields: Any, found: tuple[Any, Any, Any]) -> None:
        """Cache `found`, the result of `get_select()`, if Django's own methods have made it."""
        cols = [col for col, _, _ in found[0]]
        if (
            are_plain(type(made_by.connection.ops))
            and len(cols) == len(fields)
            and all(map(is_plain_column, cols, fields, repeat(opts.db_table)))
        ):
            # Kept on `_meta`, so that the cache is freed together with the model.
            opts._pgbackend_columns = cls(made_by, fields, found)  # noqa: SLF001


#: Returns the parts of a query that have their initial values in a SELECT of a model's columns with
#: nothing but conditions, an order and limits.
_shape = attrgetter(
    *("default_cols", "selected", "select_related", "annotations", "extra", "deferred_loading"),
    *("distinct", "combinator", "group_by", "select_for_update", "explain_info", "extra_tables"),
)
_SHAPE = _shape(Query(None))


def _selects_a_model(query: Any) -> bool:
    """Return whether `query` selects the columns of its model: all of them, and nothing else."""
    return bool(
        type(query) is Query
        and query.default_cols
        and query.selected is None
        and not query.select_related
        and not query.annotations
        and not query.extra
        and not query.deferred_loading[0]
        and query.model is not None
        and _names_its_table(query)
    )


def _names_its_table(query: Any) -> bool:
    """Return whether `query` uses the model's table by its own name, not by an alias."""
    return bool(
        query.alias_map  # if empty, `base_table` would cache None
        and query.base_table == query.model._meta.db_table  # noqa: SLF001
        # Django 5.2 does not quote the name of a table that is also an alias in the query.
        and (QUOTES_ALIKE or (len(query.alias_map) == 1 and not query.external_aliases))
    )


def _is_usual(query: Any) -> bool:
    """Return whether `query` has only parts that `_cached_select()` can write."""
    return type(query) is Query and query.model is not None and _shape(query) == _SHAPE


def _is_ordered(query: Any) -> bool:
    return bool(
        query.extra_order_by
        or query.order_by
        or (query.default_ordering and query.get_meta().ordering)
    )


class Selects(CompiledSelect):
    """A base of the SELECT compiler: uses cached parts for usual statements; see the Notes."""

    #: The columns that `get_select()` found in the cache.
    _columns: _CachedColumns | None = None
    #: The list of expressions for which `get_converters()` returned cached converters.
    _converted: Any = None

    def _is_djangos(self: Any) -> bool:
        """Return whether this compiler is not derived, and no bypassed function is patched."""
        return type(self) is SQLCompiler and all(map(is_, _for_select(), _SELECT))

    def get_select(self, with_col_aliases: bool = False) -> tuple[Any, Any, Any]:
        query: Any = self.query
        if with_col_aliases or not self._is_djangos() or not _selects_a_model(query):
            return super().get_select(with_col_aliases=with_col_aliases)
        self._columns = cached = _CachedColumns.for_query(query, self.connection.ops)
        if cached is not None:
            query.get_initial_alias()  # counts a use of the table, as Django does
            return cached.selected_of(query.model)
        opts = query.get_meta()
        fields = opts.concrete_fields
        found = super().get_select(with_col_aliases=with_col_aliases)
        _CachedColumns.remember(self, opts, fields, found)
        return found

    def as_sql(self, with_limits: bool = True, with_col_aliases: bool = False) -> Any:
        query: Any = self.query
        if with_col_aliases or not self._is_djangos() or not _is_usual(query):
            return super().as_sql(with_limits=with_limits, with_col_aliases=with_col_aliases)
        only = comparison_in(query.where)
        ordered = _is_ordered(query)
        if _KNOWN and only is not None and not ordered and len(query.alias_map) == 1:
            made = self._known_statement(with_limits, only)
            made = made or self._cached_select(with_limits, only, ordered)
        else:  # an ORDER BY and other parts count uses of tables: undo that, as Django does
            refcounts_before = query.alias_refcount.copy()
            query.get_initial_alias()
            try:
                made = self._cached_select(with_limits, only, ordered)
            finally:
                query.reset_refcounts(refcounts_before)
        return made or super().as_sql(with_limits=with_limits)

    def _known_statement(self, with_limits: bool, only: Any) -> tuple[str, tuple[Any, ...]] | None:
        """Return the SQL, now cached, and the parameters of a SELECT with the condition `only`.

        Returns None if this way is not possible: the caller then tries `_cached_select()`.
        """
        query: Any = self.query
        cached = _CachedColumns.for_query(query, self.connection.ops)
        if (
            cached is None
            or type(query.alias_map.get(cached.table)) is not BaseTable
            or query.external_aliases
            or not is_plain_comparison(only, cached.answers.ops)
            or hasattr(only, "as_postgresql")
        ):
            return None
        value, operator = only.rhs, self.connection.operators[only.lookup_name]
        key: tuple[Any, ...] = operator, only.lhs.alias, only.lhs.target.column
        if with_limits:
            key = *key, query.low_mark, query.high_mark
        sql, integers = cached.statements.get(key, (None, None))
        if integers is not None and integers.include(value, only.lhs):
            params: tuple[Any, ...] = (integers.kind(value),)
        else:
            try:
                value, params = only.process_rhs(self, self.connection)
            except (EmptyResultSet, FullResultSet):
                return None
            if value != "%s":
                return None
        self._select(cached)
        if sql is None:
            where, _ = self.compile(only)
            sql = f"{cached.from_} WHERE {where}{self._limits(with_limits)}"
            cached.keep(key, sql, Integers.for_column(only.lhs, self.connection.ops, params[0]))
        return sql, tuple(params)

    def _select(self, cached: _CachedColumns) -> None:
        """Set the attributes that Django's `as_sql()` sets on this compiler, from the cache."""
        query: Any = self.query
        self._columns = cached
        self.where = query.where
        self.having = self.qualify = None
        self.select, self.klass_info, self.annotation_col_map = cached.selected_of(query.model)
        self.col_count = len(self.select)
        self.has_extra_select = False

    def _cached_select(
        self: Any, with_limits: bool, only: Any, ordered: bool
    ) -> tuple[str, tuple[Any, ...]] | None:
        """Return SQL and parameters, from cached parts; None if Django must write this SELECT.

        Also sets the attributes that `as_sql()` sets. `only` is the one condition, if that is a
        plain comparison, else None; `ordered` is True if there is an ORDER BY.
        """
        query = self.query
        cached = (
            _CachedColumns.for_query(query, self.connection.ops)
            if _names_its_table(query)
            else None
        )
        if cached is None:
            return None
        self._select(cached)
        if only is None:
            self.where, self.having, self.qualify = query.where.split_having_qualify()
            if self.having or self.qualify:
                return None
        order_by = self.get_order_by() if ordered else ()
        params: Any = []
        if len(query.alias_map) == 1 and type(query.alias_map[cached.table]) is BaseTable:
            sql = cached.from_
        else:
            tables, params = self.get_from_clause()
            sql = cached.select_from + " ".join(tables)
        where, where_params = self._compile_where(only or self.where)
        if where:
            sql = f"{sql} WHERE {where}"
            params.extend(where_params)
        if order_by:
            sql += " ORDER BY " + ", ".join([each for _, (each, _, _) in order_by])
            for _, (_, order_params, _) in order_by:
                params.extend(order_params)
        return f"{sql}{self._limits(with_limits)}", tuple(params)

    def _limits(self, with_limits: bool) -> str:
        query: Any = self.query
        if not with_limits or not query.is_sliced:
            return ""
        limits = self.connection.ops.limit_offset_sql(query.low_mark, query.high_mark)
        return f" {limits}"

    def _compile_where(self, where: Any) -> Any:
        try:
            return self.compile(where)
        except EmptyResultSet:
            if self.elide_empty:  # type: ignore[attr-defined]
                raise
            return "0 = 1", ()
        except FullResultSet:
            return "", ()

    def get_converters(self, expressions: Any) -> Any:
        cached = self._columns
        if (
            cached is None
            or len(expressions) != len(cached.cols)
            or not all(map(is_, expressions, cached.cols))
        ):
            return super().get_converters(expressions)  # type: ignore[misc]
        self._converted = expressions
        return cached.converters.copy()

    def has_composite_fields(self, expressions: Any) -> bool:
        if expressions is self._converted:
            return False
        return super().has_composite_fields(expressions)  # type: ignore[misc, no-any-return]


def install() -> None:
    """Put `Selects` in front of the bases of the compiler of SELECTs."""
    put_before(SQLCompiler, Selects)
