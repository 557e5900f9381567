"""SQL compilers that say which statements the ORM made.

A statement that the ORM compiled of what is Django's own leaves nothing in its session, so the
connection can go to the next task as it is; after any other, the session is reset (contract C9).
While a compiler executes, it vouches for the texts that it has compiled (`driver/vouching.py`), and
for no other that is sent meanwhile. The cursor of a compiled statement is closed by the compiler as
soon as the result is in memory, and the lease ends with it.

Note [Columns of a model]
Most queries select the columns of one model, all of them and nothing else. What Django makes of
that (the expressions, their SQL, their converters) is a sixth of the work of a `get()`, and the
same every time. So it is kept with the model, by what it depends on, and only if all that made it
is Django's own: fields that say themselves how they are selected are asked each time.

Note [Usual statements]
Django puts a statement together from some twenty parts, each of which finds for itself that it has
nothing to say. Where that can be told at once (a model's own columns, not grouped, not combined,
not locked), `SQLCompiler.as_sql()` asks only for the parts that there are; and a column is compared
with a value in one step (`CompiledStatement.compile`) where Django takes ten, of which one copies
the column. The statements are Django's to the letter (`tests/backend/test_compiler.py`). Classes
that somebody has derived are asked as Django asks them. So are Django's own where one of their
methods has been patched that is named in the constants below.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from functools import partial
from itertools import chain, repeat
from operator import attrgetter, is_
from typing import Any, NamedTuple
from uuid import UUID

import django
from django.core.exceptions import EmptyResultSet, FullResultSet
from django.db.backends.base.operations import BaseDatabaseOperations
from django.db.backends.postgresql import compiler
from django.db.backends.postgresql.operations import DatabaseOperations
from django.db.models import (
    NOT_PROVIDED,
    AutoField,
    BigAutoField,
    BigIntegerField,
    DurationField,
    Field,
    ForeignKey,
    IntegerField,
    SmallAutoField,
    SmallIntegerField,
    lookups,
)
from django.db.models.expressions import Col, CombinedExpression, DatabaseDefault, Value
from django.db.models.fields import AutoFieldMixin, related_lookups
from django.db.models.sql import Query
from django.db.models.sql import compiler as sql_compiler
from django.db.models.sql.constants import (
    CURSOR,
    GET_ITERATOR_CHUNK_SIZE,
    MULTI,
    ROW_COUNT,
    SINGLE,
)
from django.db.models.sql.datastructures import BaseTable
from django.db.models.sql.where import AND, WhereNode

from . import expressions, objects, statements
from .driver.vouching import vouching
from .fast.registry import is_on
from .patches import NO_OTHERS, djangos, if_djangos, lookup

_get_running_loop = asyncio._get_running_loop
_PLAIN_EXPRESSIONS = expressions.plain

#: Since Django 6.1 a compiler quotes every name as its operations do.
_QUOTES_ALIKE = hasattr(compiler.SQLCompiler, "quote_name")

#: What makes a column, where it depends on nothing but the field.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "get_col": (Field.get_col, ForeignKey.get_col),
    "get_db_converters": (
        *(Field.get_db_converters, DurationField.get_db_converters, ForeignKey.get_db_converters),
    ),
    "select_format": (Field.select_format,),
}


# What is passed over, as long as it is what it was.

_for_select = lookup(
    "its.as_sql its.compile its.pre_sql_setup its.setup_query its.get_select its.get_extra_select "
    "Col.as_sql",
    its=compiler.SQLCompiler,
    Col=Col,
)
_for_update = lookup(
    "its.as_sql its.pre_sql_setup Combined.resolve_expression Value.resolve_expression "
    "Col.resolve_expression",
    its=compiler.SQLUpdateCompiler,
    Combined=CombinedExpression,
    Value=Value,
    Col=Col,
)
_for_insert = lookup(
    "its.as_sql its.pre_save_val its.prepare_value its.field_as_sql its.assemble_as_sql "
    "base.assemble_as_sql base.get_converters ops.bulk_insert_sql",
    its=compiler.SQLInsertCompiler,
    base=sql_compiler.SQLInsertCompiler,
    ops=BaseDatabaseOperations,
)
_for_comparison = lookup(
    "lookups.Exact.as_sql lookups.BuiltinLookup.as_sql lookups.Lookup.process_lhs Col.as_sql "
    "Col.resolve_expression",
    lookups=lookups,
    Col=Col,
)
_for_executing = lookup(
    "sql.SQLCompiler.execute_sql sql.SQLInsertCompiler.execute_sql "
    "sql.SQLUpdateCompiler.execute_sql sql.cursor_iter",
    sql=sql_compiler,
)

_EXECUTE = djangos(*_for_executing()) if is_on("statements") else NO_OTHERS
_SELECT = djangos(*_for_select()) if is_on("select") else NO_OTHERS
_UPDATE = djangos(*_for_update()) if is_on("update") else NO_OTHERS
_INSERT = djangos(*_for_insert()) if is_on("insert") else NO_OTHERS
_COMPARES = is_on("select") or is_on("update")
_COMPILE = if_djangos(compiler.SQLCompiler.compile) if _COMPARES else None
_WHERE = if_djangos(WhereNode.as_sql)
_COMPARISON = djangos(*_for_comparison())
#: Which casts nothing for comparisons; nor does the older one, that Django 5.2 asks, too.
_CAST = if_djangos(DatabaseOperations.lookup_cast)
_OLD_CAST = getattr(DatabaseOperations, "field_cast_sql", None)

#: Lookups that compare a column, as it is, with a value; and the methods that make them do so.
_COMPARISONS: dict[type[Any], tuple[Any, ...]] = {
    each: methods
    for each in (
        *(lookups.Exact, lookups.IntegerFieldExact, related_lookups.RelatedExact),
        *(lookups.GreaterThan, lookups.IntegerGreaterThan, related_lookups.RelatedGreaterThan),
        *(lookups.LessThan, lookups.IntegerLessThan, related_lookups.RelatedLessThan),
        *(lookups.GreaterThanOrEqual, lookups.IntegerGreaterThanOrEqual),
        *(lookups.LessThanOrEqual, lookups.IntegerLessThanOrEqual),
        *(related_lookups.RelatedGreaterThanOrEqual, related_lookups.RelatedLessThanOrEqual),
    )
    if (methods := djangos(each.as_sql, each.process_lhs, each.get_rhs_op)) is not NO_OTHERS
}
#: What a lookup puts its parameters in.
_Params: Any = tuple if django.VERSION >= (6, 0) else list

_INTEGER_FIELDS = {
    *(BigIntegerField, IntegerField, SmallIntegerField),
    *(AutoField, BigAutoField, SmallAutoField),
}
_PREPARING = ("get_db_prep_value", "get_internal_type")
_prepared_by = attrgetter("adapt_integerfield_value", "integer_field_range")
_for_integers = lookup(
    "lookups.IntegerFieldOverflow.process_rhs lookups.Exact.process_rhs lookups.Lookup.process_rhs "
    "lookups.FieldGetDbPrepValueMixin.get_db_prep_lookup IntegerField.get_db_prep_value "
    "Field.get_db_prep_value AutoFieldMixin.get_db_prep_value ops.adapt_integerfield_value "
    "ops.integer_field_range",
    lookups=lookups,
    AutoFieldMixin=AutoFieldMixin,
    IntegerField=IntegerField,
    Field=Field,
    ops=DatabaseOperations,
)
_KNOWN = is_on("known")
_INTEGERS = djangos(*_for_integers())

#: Types of which no value is an expression, nor a model's instance.
_VALUES = {
    *(type(None), bool, int, float, Decimal, str, bytes, UUID),
    *(date, datetime, time, timedelta),
}
#: Whether Django sends NULL as a parameter, and writes DEFAULT without preparing it.
_SENDS_NULL = _LEAVES_DEFAULTS = django.VERSION >= (6, 1)


#: How a field says that it writes the placeholder of its value.
_GET_PLACEHOLDER = repeat("get_placeholder_sql" if django.VERSION >= (6, 1) else "get_placeholder")


def _has_placeholder(field: Any) -> bool:
    return hasattr(field, "get_placeholder_sql") or hasattr(field, "get_placeholder")


def _has_default_or_placeholder(field: Any) -> bool:
    return field.db_default is not NOT_PROVIDED or _has_placeholder(field)


_RETURNING = "returning_columns" if django.VERSION >= (6, 0) else "return_insert_columns"
#: What operations write an INSERT with, and read what it returns.
_inserting_by = attrgetter(
    *("bulk_insert_sql", "insert_statement", "modify_insert_params", "on_conflict_suffix_sql"),
    *(_RETURNING, "fetch_returned_rows")
    if django.VERSION >= (6, 0)
    else (_RETURNING, "fetch_returned_insert_columns"),
)
_INSERT_BY = djangos(*_inserting_by(DatabaseOperations))
_insert_features = attrgetter(
    *("can_return_columns_from_insert", "can_return_rows_from_bulk_insert", "has_bulk_insert"),
)
_INSERTS_AND_RETURNS = (True, True, True)


def _is_read_by_django(connection: Any) -> bool:
    """Return whether returned rows are read by Django's operations, which fetch them."""
    return all(map(is_, _inserting_by(type(connection.ops)), _INSERT_BY))


def _is_resolved(value: Any) -> bool:
    """Whether `value` is computed from columns and values, and resolving would only copy it."""
    kind = type(value)
    if kind is CombinedExpression:
        return _is_resolved(value.lhs) and _is_resolved(value.rhs)
    return kind is Col or (kind is Value and value.for_save)


def _cast_nothing(ops: type[Any]) -> bool:
    """Whether these operations leave a column that is compared as it is."""
    return ops.lookup_cast is _CAST and getattr(ops, "field_cast_sql", None) is _OLD_CAST


def _is_plain(field: Any) -> bool:
    return not vars(field).keys() & _PLAIN.keys() and all(
        any(map(is_, repeat(getattr(type(field), name, None)), known))
        for name, known in _PLAIN.items()
    )


def _are_plain(ops: type[Any]) -> bool:
    """Whether what these operations say of a column is Django's, or ours, for all connections."""
    said_by = (ops.get_db_converters.__module__, ops.quote_name.__module__)
    return all(module.startswith(("django.", "pgbackend.")) for module in said_by)


#: Methods of the operations whose answers are kept of a model.
_KEPT_OF_OPS = (
    *("adapt_integerfield_value", "get_db_converters", "integer_field_range", "limit_offset_sql"),
    "quote_name",
)
_said_by_ops = attrgetter(*_KEPT_OF_OPS)
_said_by_kind = attrgetter("get_col", "get_db_converters", "select_format")
#: The type of a generated column is a field that has no column of its own.
_COLUMN, _FROM_DB_VALUE, _NONE = repeat("column"), repeat("from_db_value"), repeat(None)


class _Said:
    """A note of how fields and operations answered when something of a model was kept.

    Packages and tests patch both, or give a field another column: who asks `is_stale()` for each
    statement notices. All loops are in C: each statement pays for it.
    """

    __slots__ = ("columns", "fields", "functions", "kinds", "loaders", "ops", "sizes")

    def __init__(self, fields: Any, ops: Any) -> None:
        self.fields = list(dict.fromkeys(fields))
        self.kinds = list(dict.fromkeys(map(type, self.fields)))
        self.ops = type(ops)
        self.functions = [*self._look_up_functions()]
        #: How many attributes each has: somebody who gives one to a field adds to them.
        self.sizes = [*map(len, map(vars, self.fields))]
        self.columns = [*map(getattr, self.fields, _COLUMN, _NONE)]
        self.loaders = [*map(getattr, self.fields, _FROM_DB_VALUE, _NONE)]

    def _look_up_functions(self) -> Iterator[Any]:
        """Return the functions of the classes of operations and fields, of which it has asked."""
        return chain(
            _said_by_ops(self.ops),
            chain.from_iterable(map(_said_by_kind, self.kinds)),
            map(getattr, self.kinds, _FROM_DB_VALUE, _NONE),
        )

    def is_stale(self, ops: Any) -> bool:
        """Return whether they would say anything else now, or `ops` are others."""
        fields = self.fields
        return (
            self.ops is not type(ops)
            or not all(map(is_, self._look_up_functions(), self.functions))
            or not vars(ops).keys().isdisjoint(_KEPT_OF_OPS)
            or [*map(len, map(vars, fields))] != self.sizes
            or [*map(getattr, fields, _COLUMN, _NONE)] != self.columns
            or [*map(getattr, fields, _FROM_DB_VALUE, _NONE)] != self.loaders
        )


_MOST_STATEMENTS = 64


class _Insert:
    """The words of an INSERT of one row, by the fields that it has and returns."""

    __slots__ = (
        *("into", "kept_by", "returning", "returning_params", "returns_as_is", "said", "sql"),
        "table",
    )

    def __init__(self, made_by: SQLInsertCompiler, fields: Any, returning_fields: Any) -> None:
        ops, opts = made_by.connection.ops, made_by.query.get_meta()
        #: Keeps the fields alive: the key uses their `id()`.
        self.kept_by = list(fields), list(returning_fields)
        self.table = opts.db_table
        columns = [field.column for field in fields]
        names = ", ".join(map(ops.quote_name, columns))
        self.into = f"INSERT INTO {ops.quote_name(self.table)} ({names})"
        sql, self.returning_params = "", ()
        if returning_fields:
            sql, self.returning_params = getattr(ops, _RETURNING)(returning_fields)
        self.returning = sql and f" {sql}"
        placeholders = ", ".join(["%s"] * len(columns))
        self.sql = f"{self.into} VALUES ({placeholders}){self.returning}"
        cols = [field.get_col(self.table) for field in returning_fields]
        #: Whether nothing converts what is returned.
        self.returns_as_is = not made_by.get_converters(cols) and all(
            map(_is_plain_column, cols, returning_fields, repeat(self.table))
        )
        returned = [col.output_field for col in cols]
        self.said = _Said([*fields, *returning_fields, *returned], ops)

    @classmethod
    def of(cls, made_by: SQLInsertCompiler, returning_fields: Any) -> _Insert | None:
        """The words for what `made_by` is to insert; None if a field has a say in them."""
        query: Any = made_by.query
        fields, opts = query.fields, query.model._meta  # noqa: SLF001
        known: dict[Any, _Insert] = opts.__dict__.get("_pgbackend_inserts", {})
        key = tuple(map(id, fields)), tuple(map(id, returning_fields))
        words = known.get(key)
        if (
            words is not None
            and words.table == opts.db_table
            and not any(map(hasattr, fields, _GET_PLACEHOLDER))
            and not words.said.is_stale(made_by.connection.ops)
        ):
            return words
        if any(map(_has_default_or_placeholder, fields)):
            return None
        words = cls(made_by, fields, returning_fields)
        if _are_plain(words.said.ops) and len(known) < _MOST_STATEMENTS:
            opts._pgbackend_inserts = {**known, key: words}  # noqa: SLF001
        return words


class _Integers(NamedTuple):
    """What Django sends in the place of an integer that is compared with a column of integers."""

    field: Any
    least: int
    most: int
    kind: Any

    @classmethod
    def of(cls, column: Any, ops: Any, sent: Any) -> _Integers | None:
        """What `sent`, of Django's making, stands for; None if others have a say in it."""
        field = column.target
        if (
            field is not column.output_field
            or type(field) not in _INTEGER_FIELDS
            or not vars(field).keys().isdisjoint(_PREPARING)
            or _prepared_by(type(ops)) != _prepared_by(DatabaseOperations)
            or not isinstance(sent, int)
        ):
            return None
        least, most = ops.integer_field_range(field.get_internal_type())
        return cls(field, least, most, type(sent))

    def include(self, value: Any, column: Any) -> bool:
        """Whether `value`, which is compared with `column`, is one of them."""
        return (
            type(value) is int
            and column.target is self.field is column.output_field
            and self.least <= value <= self.most
            and all(map(is_, _for_integers(), _INTEGERS))
        )


class _Columns:
    """What `get_select()` returns for a model; see Note [Columns of a model]."""

    __slots__ = (
        *("cols", "converters", "fields", "from_", "indexes", "said", "select", "select_from"),
        *("statements", "table"),
    )

    def __init__(self, made_by: SQLCompiler, fields: Any, found: tuple[Any, Any, Any]) -> None:
        select, klass_info, _ = found
        self.select = select.copy()
        self.indexes: list[int] = klass_info["select_fields"].copy()
        #: What it depends on. Django makes another list when the fields of the model change.
        self.fields = fields
        self.table = made_by.query.base_table
        self.cols = [col for col, _, _ in self.select]
        columns = ", ".join([sql for _, (sql, _), _ in self.select])
        self.select_from = f"SELECT {columns} FROM "  # noqa: S608 - all of it is quoted
        self.from_ = self.select_from + made_by.connection.ops.quote_name(self.table)
        self.converters = made_by.get_converters(self.cols)
        converting = [col.output_field for col in self.cols]
        self.said = _Said([*fields, *converting], made_by.connection.ops)
        #: Those with one comparison, by what they depend on; and what integers it may be with.
        self.statements: dict[Any, tuple[str, _Integers | None]] = {}

    @classmethod
    def of(cls, query: Any, ops: Any) -> _Columns | None:
        """What is known of the model of `query`."""
        opts = query.model._meta  # noqa: SLF001
        known: _Columns | None = opts.__dict__.get("_pgbackend_columns")
        if (
            known is None
            or known.fields is not opts.concrete_fields
            or known.table != opts.db_table
            or known.said.is_stale(ops)
        ):
            return None
        return known

    def keep(self, key: Any, sql: str, integers: _Integers | None) -> None:
        """Keep the words of a statement, for the next one of its kind."""
        if len(self.statements) >= _MOST_STATEMENTS:  # pages of a list have limits of their own
            self.statements.clear()
        self.statements[key] = sql, integers

    def selected_of(self, model: Any) -> tuple[Any, Any, Any]:
        """What `get_select()` returns, for the caller to keep."""
        klass_info = {"model": model, "select_fields": self.indexes.copy()}
        return self.select.copy(), klass_info, {}

    @classmethod
    def remember(
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


def _with_fields_seen(found: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
    """Return `found`, of `get_select()`, after a look which of its fields write SQL themselves."""
    expressions.look_at_selected(found[0])
    return found


def _is_plain_column(col: Any, field: Any, table: str) -> bool:
    return (
        type(col) is Col
        and col.target is field
        and col.alias == table
        and not hasattr(col, "as_postgresql")
        and _is_plain(field)
        and _is_plain(col.output_field)
    )


#: What a query of a model's columns has, where nothing has been asked for beside conditions, an
#: order and limits.
_shape = attrgetter(
    *("default_cols", "selected", "select_related", "annotations", "extra", "deferred_loading"),
    *("distinct", "combinator", "group_by", "select_for_update", "explain_info", "extra_tables"),
)
_SHAPE = _shape(Query(None))


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
        and _names_its_table(query)
    )


def _names_its_table(query: Any) -> bool:
    """Whether the table that `query` is of goes by its own name."""
    return bool(
        query.alias_map  # or `base_table`, which is remembered, would be None
        and query.base_table == query.model._meta.db_table  # noqa: SLF001
        # Django 5.2 does not quote a name that is also an alias of the query.
        and (_QUOTES_ALIKE or (len(query.alias_map) == 1 and not query.external_aliases))
    )


def _is_usual(query: Any) -> bool:
    """Whether `query` has no parts that `_usual_statement()` does not put in."""
    return type(query) is Query and query.model is not None and _shape(query) == _SHAPE


def _is_ordered(query: Any) -> bool:
    return bool(
        query.extra_order_by
        or query.order_by
        or (query.default_ordering and query.get_meta().ordering)
    )


def _is_plain_comparison(node: Any, ops: type[Any]) -> bool:
    """Whether `node` compares a column with a value, in Django's way."""
    kind = type(node)
    return (
        (methods := _COMPARISONS.get(kind)) is not None
        and type(node.lhs) is Col
        and type(node.rhs) is not bool
        and all(map(is_, methods, (kind.as_sql, kind.process_lhs, kind.get_rhs_op)))
        and all(map(is_, _for_comparison(), _COMPARISON))
        and _cast_nothing(ops)
    )


def _comparison_in(where: Any) -> Any:
    """The comparison of a column with a value that `where` consists of, or None."""
    if (
        type(where) is WhereNode
        and WhereNode.as_sql is _WHERE
        and not hasattr(where, "as_postgresql")
        and len(where.children) == 1
        and where.connector == AND
        and not where.negated
        and not where.resolved
    ):
        only: Any = where.children[0]
        if type(only) in _COMPARISONS and type(only.lhs) is Col and not hasattr(only.rhs, "as_sql"):
            return only
    return None


class CompiledStatement:
    """A compiler whose statements are marked as compiled by the ORM."""

    connection: Any

    def compile(self, node: Any) -> Any:
        kind = type(node)
        if kind not in _PLAIN_EXPRESSIONS:
            expressions.look_at(node)
        if compiler.SQLCompiler.compile is not _COMPILE:
            return super().compile(node)  # type: ignore[misc]
        connection = self.connection
        as_vendor = getattr(node, "as_" + connection.vendor, None)
        if as_vendor:
            sql, params = as_vendor(self, connection)
        elif kind in _COMPARISONS and _is_plain_comparison(node, type(connection.ops)):
            sql, _ = self.compile(node.lhs)
            value, params = node.process_rhs(self, connection)
            sql = f"{sql} {connection.operators[node.lookup_name] % value}"
            params = _Params(params)
        else:
            return node.as_sql(self, connection)
        return sql, params

    def execute_sql(self, *args: Any, **kwargs: Any) -> Any:
        session = self.connection.async_session()
        if session is None:
            return super().execute_sql(*args, **kwargs)  # type: ignore[misc]
        # The next cursor takes the marks. Compiling may run statements of its own before that.
        outer = session.compiled, session.at_once, session.cursor
        session.compiled, session.at_once, session.cursor = True, self._asks_first(), None
        try:
            with self._vouching():
                return super().execute_sql(*args, **kwargs)  # type: ignore[misc]
        except BaseException:
            # Django closes the cursor for an Exception, which a cancellation is not; the
            # traceback would keep it, and its lease, for as long as somebody keeps that.
            if session.cursor is not None:
                session.cursor.close()
            raise
        finally:
            session.compiled, session.at_once, session.cursor = outer

    @contextmanager
    def _vouching(self) -> Iterator[None]:
        """Vouch for what `as_sql()` returns in the block, if all of it is Django's own."""
        texts: list[str] = []
        # On the object: so it is what somebody returns who has derived from this class.
        as_sql: Any = self.as_sql  # type: ignore[attr-defined]  # of Django's
        vars(self)["as_sql"] = partial(self._as_known_sql, texts, as_sql)
        try:
            with vouching(texts):
                yield
        finally:
            vars(self).pop("as_sql", None)

    def _as_known_sql(
        self, texts: list[str], as_sql: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        noted = expressions.noted
        made = as_sql(*args, **kwargs)
        if expressions.noted is noted and expressions.writes_as_django(type(self)):
            texts += [sql for sql, _ in made] if isinstance(made, list) else [made[0]]
        return made

    def _asks_first(self) -> bool:
        """Whether Django asks for the cursor before it compiles, and fetches all rows at once."""
        return False

    def _is_executed_by_django(self) -> bool:
        """Whether nobody has derived from this compiler, or patched how it executes."""
        return type(self) in _OWN and all(map(is_, _for_executing(), _EXECUTE))


class _FetchedAtOnce(CompiledStatement):
    """A compiler whose statements leave nothing to fetch; see statements.py."""

    def execute_sql(self, result_type: Any = MULTI, *args: Any, **kwargs: Any) -> Any:
        if _get_running_loop() is None:
            return super(CompiledStatement, self).execute_sql(result_type, *args, **kwargs)  # type: ignore[misc]
        if (
            args
            or kwargs.get("chunked_fetch")
            or result_type == CURSOR
            or not self._is_executed_by_django()
            or not statements.can_execute(self.connection)
        ):
            return super().execute_sql(result_type, *args, **kwargs)
        return self._execute_at_once(result_type, kwargs.get("chunk_size", GET_ITERATOR_CHUNK_SIZE))

    def _execute_at_once(self: Any, result_type: Any, chunk_size: int) -> Any:
        """What Django's `execute_sql()` does."""
        noted = expressions.noted
        try:
            sql, params = self.as_sql()
            if not sql:
                raise EmptyResultSet
        except EmptyResultSet:
            return iter([]) if result_type == MULTI else None
        count, rows = statements.execute(
            self.connection, sql, params, expressions.noted is not noted
        )
        if result_type == ROW_COUNT:
            return count
        if not result_type:
            return None
        rows = statements.fetched(self.connection, rows)
        if result_type == SINGLE:
            return rows[0][: self.col_count] if rows else None
        if self.has_extra_select:
            rows = [row[: self.col_count] for row in rows]
        if len(rows) <= chunk_size:
            return [rows] if rows else []
        return [rows[n : n + chunk_size] for n in range(0, len(rows), chunk_size)]


class SQLCompiler(_FetchedAtOnce, compiler.SQLCompiler):
    #: What `get_select()` has found, and the list whose converters it has told.
    _columns: _Columns | None = None
    _converted: Any = None

    klass_info = objects.KlassInfo()

    def makes_objects(self) -> bool:
        """Return whether objects may be made of its rows in a shorter way than Django's."""
        return type(self) is SQLCompiler

    def _is_djangos(self) -> bool:
        """Whether nobody has derived from this compiler, or patched what it passes over."""
        return type(self) is SQLCompiler and all(map(is_, _for_select(), _SELECT))

    def get_select(self, with_col_aliases: bool = False) -> tuple[Any, Any, Any]:
        query = self.query
        if with_col_aliases or not self._is_djangos():
            return _with_fields_seen(super().get_select(with_col_aliases=with_col_aliases))
        if not _selects_a_model(query):
            return _with_fields_seen(super().get_select(with_col_aliases=with_col_aliases))
        self._columns = known = _Columns.of(query, self.connection.ops)
        if known is not None:
            query.get_initial_alias()  # which counts that the table is used
            return known.selected_of(query.model)
        opts = query.get_meta()
        fields = opts.concrete_fields
        found = _with_fields_seen(super().get_select(with_col_aliases=with_col_aliases))
        _Columns.remember(self, opts, fields, found)
        return found

    def as_sql(self, with_limits: bool = True, with_col_aliases: bool = False) -> Any:
        query = self.query
        if with_col_aliases or not self._is_djangos() or not _is_usual(query):
            expressions.look_at_parts(self)
            return super().as_sql(with_limits=with_limits, with_col_aliases=with_col_aliases)
        only = _comparison_in(query.where)
        ordered = _is_ordered(query)
        if _KNOWN and only is not None and not ordered and len(query.alias_map) == 1:
            made = self._known_statement(with_limits, only)
            made = made or self._usual_statement(with_limits, only, ordered)
        else:  # other parts may count what they use
            refcounts_before = query.alias_refcount.copy()
            query.get_initial_alias()
            try:
                made = self._usual_statement(with_limits, only, ordered)
            finally:
                query.reset_refcounts(refcounts_before)
        return made or super().as_sql(with_limits=with_limits)

    def _known_statement(self, with_limits: bool, only: Any) -> tuple[str, tuple[Any, ...]] | None:
        """`as_sql()` where one column is compared, whose words need not be put together again."""
        query: Any = self.query
        known = _Columns.of(query, self.connection.ops)
        if (
            known is None
            or type(query.alias_map.get(known.table)) is not BaseTable
            or query.external_aliases
            or not _is_plain_comparison(only, known.said.ops)
            or hasattr(only, "as_postgresql")
        ):
            return None
        value, operator = only.rhs, self.connection.operators[only.lookup_name]
        key: tuple[Any, ...] = operator, only.lhs.alias, only.lhs.target.column
        if with_limits:
            key = *key, query.low_mark, query.high_mark
        sql, integers = known.statements.get(key, (None, None))
        if integers is not None and integers.include(value, only.lhs):
            params: tuple[Any, ...] = (integers.kind(value),)
        else:
            try:
                value, params = only.process_rhs(self, self.connection)
            except (EmptyResultSet, FullResultSet):
                return None
            if value != "%s":
                return None
        self._select(known)
        if sql is None:
            where, _ = self.compile(only)
            sql = f"{known.from_} WHERE {where}{self._limits(with_limits)}"
            known.keep(key, sql, _Integers.of(only.lhs, self.connection.ops, params[0]))
        return sql, tuple(params)

    def _select(self, known: _Columns) -> None:
        """Leave on this compiler what `as_sql()` leaves there."""
        query: Any = self.query
        self._columns = known
        self.where = query.where
        self.having = self.qualify = None
        self.select, self.klass_info, self.annotation_col_map = known.selected_of(query.model)
        self.col_count = len(self.select)
        self.has_extra_select = False

    def _usual_statement(
        self: Any, with_limits: bool, only: Any, ordered: bool
    ) -> tuple[str, tuple[Any, ...]] | None:
        """What `as_sql()` returns, with the same left on this compiler; None if Django must."""
        query = self.query
        known = _Columns.of(query, self.connection.ops) if _names_its_table(query) else None
        if known is None:
            return None
        self._select(known)
        if only is None:
            self.where, self.having, self.qualify = query.where.split_having_qualify()
            if self.having or self.qualify:
                return None
        order_by = self.get_order_by() if ordered else ()
        params: Any = []
        if len(query.alias_map) == 1 and type(query.alias_map[known.table]) is BaseTable:
            sql = known.from_
        else:
            tables, params = self.get_from_clause()
            sql = known.select_from + " ".join(tables)
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
    def as_sql(self) -> list[tuple[str, tuple[Any, ...]]]:  # type: ignore[override]  # as Django's
        words = _Insert.of(self, self.returning_fields or ()) if self._is_usual() else None
        if words is not None:
            return [self._usual_statement(words)]
        query: Any = self.query
        for field in query.fields:
            expressions.look_at_written(field)
        made: list[tuple[str, tuple[Any, ...]]] = super().as_sql()
        return made

    def execute_sql(self, returning_fields: Any = None) -> Any:  # type: ignore[override]  # as Django's
        if (
            _get_running_loop() is None
            or not self._is_usual()
            or not self._is_executed_by_django()
            or (words := _Insert.of(self, returning_fields or ())) is None
            or not statements.can_execute(self.connection)
        ):
            return super().execute_sql(returning_fields)
        self.returning_fields = returning_fields
        connection = self.connection
        noted = expressions.noted
        sql, params = self._usual_statement(words)
        _, rows = statements.execute(connection, sql, params, expressions.noted is not noted)
        if not returning_fields:
            return []
        returned = statements.fetched(connection, rows)
        if words.returns_as_is:
            return returned
        cols = [field.get_col(words.table) for field in returning_fields]
        converters = self.get_converters(cols)
        return list(self.apply_converters(returned, converters)) if converters else returned

    def _asks_first(self) -> bool:
        return self._is_executed_by_django() and _is_read_by_django(self.connection)

    def _is_usual(self) -> bool:
        """Whether one row is inserted, of nothing but values and expressions."""
        query: Any = self.query
        return bool(
            type(self) is SQLInsertCompiler
            and all(map(is_, _for_insert(), _INSERT))
            and len(query.objs) == 1
            and query.fields
            and not query.raw
            and query.on_conflict is None
            and _insert_features(self.connection.features) == _INSERTS_AND_RETURNS
            and _is_read_by_django(self.connection)
        )

    def _usual_statement(self, words: _Insert) -> tuple[str, tuple[Any, ...]]:
        self.returning_params = words.returning_params
        values = self._prepared_values()
        for value in values:
            if hasattr(value, "as_sql"):
                return self._with_expressions(words, values)
        return words.sql, (*values, *words.returning_params)

    def _prepared_values(self) -> list[Any]:
        row, connection = self.query.objs[0], self.connection
        values: list[Any] = []
        for field in self.query.fields:
            value = field.pre_save(row, add=True)
            if type(value) in _VALUES:
                value = field.get_db_prep_save(value, connection=connection)
            elif not (_LEAVES_DEFAULTS and isinstance(value, DatabaseDefault)):
                value = self.prepare_value(field, value)
            values.append(value)
        return values

    def _with_expressions(self, words: _Insert, values: list[Any]) -> tuple[str, tuple[Any, ...]]:
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
        params.extend(words.returning_params)
        return f"{words.into} VALUES ({', '.join(placeholders)}){words.returning}", tuple(params)


class SQLDeleteCompiler(_FetchedAtOnce, compiler.SQLDeleteCompiler):
    pass


class SQLUpdateCompiler(_FetchedAtOnce, compiler.SQLUpdateCompiler):
    def as_sql(self) -> tuple[str, tuple[Any, ...]]:  # type: ignore[override]  # as Django's
        if (made := self._usual_statement()) is not None:
            return made
        query: Any = self.query
        for field, _, _ in query.values:
            expressions.look_at_written(field)
        made = super().as_sql()
        return made

    def _execute_at_once(self: Any, result_type: Any, chunk_size: int) -> Any:
        if self.query.related_updates:  # of the tables of parents, which have statements of theirs
            return super(_FetchedAtOnce, self).execute_sql(result_type)
        return super()._execute_at_once(result_type, chunk_size) or 0

    def _usual_statement(self) -> tuple[str, tuple[Any, ...]] | None:
        """What `as_sql()` returns where a column is one value; None if Django must.

        It sets plain values, and what is computed from columns and values: that has been resolved
        when it was put into the query, and Django resolves it again.
        """
        query: Any = self.query
        only = _comparison_in(query.where)
        if (
            only is None
            or type(self) is not SQLUpdateCompiler
            or not all(map(is_, _for_update(), _UPDATE))
            or len(query.alias_map) != 1
            or query.related_updates
            or not query.values
            or getattr(self, "returning_fields", None)
        ):
            return None
        for field, _, value in query.values:  # before the first is told that it will be saved
            if _has_placeholder(field):
                return None
            if type(value) not in _VALUES and not _is_resolved(value):
                return None
        query.get_initial_alias()
        quote_name = self.quote_name if _QUOTES_ALIKE else self.quote_name_unless_alias
        assignments, params = self._assign(query.values, quote_name)
        update = f"UPDATE {quote_name(query.base_table)} SET"
        sql = f"{update} {', '.join(assignments)}"
        try:
            where, where_params = self.compile(only)
        except FullResultSet:
            return sql, tuple(params)
        params.extend(where_params)
        return f"{sql} WHERE {where}", tuple(params)

    def _assign(self, values: Any, quote_name: Any) -> tuple[list[str], list[Any]]:
        connection = self.connection
        assignments: list[str] = []
        params: list[Any] = []
        for field, _, value in values:
            sent = field.get_db_prep_save(value, connection=connection)
            if hasattr(sent, "as_sql"):
                sql, sql_params = self.compile(sent)
                assignments.append(f"{quote_name(field.column)} = {sql}")
                params.extend(sql_params)
            elif sent is None and not _SENDS_NULL:
                assignments.append(f"{quote_name(field.column)} = NULL")
            else:
                assignments.append(f"{quote_name(field.column)} = %s")
                params.append(sent)
        return assignments, params

    def execute_returning_sql(self, returning_fields: Any) -> Any:  # Django 6.0 and later
        # Without fields it is `execute_sql()`, which marks the statement itself.
        session = self.connection.async_session() if returning_fields else None
        if session is None:
            return super().execute_returning_sql(returning_fields)
        outer = session.compiled, session.at_once
        session.compiled = True
        session.at_once = self._is_executed_by_django() and _is_read_by_django(self.connection)
        try:
            with self._vouching():
                return super().execute_returning_sql(returning_fields)
        finally:
            session.compiled, session.at_once = outer


class SQLAggregateCompiler(_FetchedAtOnce, compiler.SQLAggregateCompiler):
    pass


_OWN = {SQLAggregateCompiler, SQLCompiler, SQLDeleteCompiler, SQLInsertCompiler, SQLUpdateCompiler}
