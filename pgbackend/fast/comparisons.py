"""Compiles the comparison of a column with a value in one step: for SELECT and UPDATE.

Django takes some ten steps for ``"dish"."id" = %s``, one of which copies the column. For Django's
own lookups on a plain column, `ComparesColumns.compile()` writes the same SQL at once. Django
compiles all others: derived lookups, and all lookups if one of the methods below is patched.
"""

from __future__ import annotations

from operator import is_
from typing import Any

import django
from django.db.backends.postgresql import compiler as django_compiler
from django.db.backends.postgresql.operations import DatabaseOperations
from django.db.models import lookups
from django.db.models.expressions import Col
from django.db.models.fields import related_lookups
from django.db.models.sql.where import AND, WhereNode

from pgbackend import expressions
from pgbackend.compiler import COMPILERS, CompiledStatement, put_before
from pgbackend.patches import NO_OTHERS, if_unpatched, lookup, unpatched

_PLAIN_EXPRESSIONS = expressions.plain

#: Whether a compiler quotes every name by `ops.quote_name()`: so it is since Django 6.1.
QUOTES_ALIKE = hasattr(django_compiler.SQLCompiler, "quote_name")

# The bypassed functions: the shortcut is taken while they are the same as at import.

_for_comparison = lookup(
    "lookups.Exact.as_sql lookups.BuiltinLookup.as_sql lookups.Lookup.process_lhs Col.as_sql "
    "Col.resolve_expression",
    lookups=lookups,
    Col=Col,
)
_COMPILE = if_unpatched(django_compiler.SQLCompiler.compile)
_WHERE = if_unpatched(WhereNode.as_sql)
_COMPARISON = unpatched(*_for_comparison())
#: PostgreSQL's methods, which add no cast to a compared column; Django 5.2 calls the old one, too.
_CAST = if_unpatched(DatabaseOperations.lookup_cast)
_OLD_CAST = getattr(DatabaseOperations, "field_cast_sql", None)

#: Lookups that compare a plain column with a value, each with its methods that write the SQL.
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
    if (methods := unpatched(each.as_sql, each.process_lhs, each.get_rhs_op)) is not NO_OTHERS
}
#: The type in which a lookup returns its parameters.
_Params: Any = tuple if django.VERSION >= (6, 0) else list


def _cast_nothing(ops: type[Any]) -> bool:
    """Return whether the class `ops` adds no cast to a column that is compared."""
    return ops.lookup_cast is _CAST and getattr(ops, "field_cast_sql", None) is _OLD_CAST


def is_plain_comparison(node: Any, ops: type[Any]) -> bool:
    """Return whether `node` compares a column with a value, all by Django's own methods."""
    kind = type(node)
    return (
        (methods := _COMPARISONS.get(kind)) is not None
        and type(node.lhs) is Col
        and type(node.rhs) is not bool
        and all(map(is_, methods, (kind.as_sql, kind.process_lhs, kind.get_rhs_op)))
        and all(map(is_, _for_comparison(), _COMPARISON))
        and _cast_nothing(ops)
    )


def comparison_in(where: Any) -> Any:
    """Return the only condition of `where` if it compares a column with a value; else None."""
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


class ComparesColumns(CompiledStatement):
    """A base of all compilers that writes the SQL of a plain comparison in one step."""

    def compile(self, node: Any) -> Any:
        if django_compiler.SQLCompiler.compile is not _COMPILE:
            return super().compile(node)
        kind = type(node)
        if kind not in _PLAIN_EXPRESSIONS:
            expressions.look_at(node)
        connection = self.connection
        as_vendor = getattr(node, "as_" + connection.vendor, None)
        if as_vendor:
            sql, params = as_vendor(self, connection)
        elif kind in _COMPARISONS and is_plain_comparison(node, type(connection.ops)):
            sql, _ = self.compile(node.lhs)
            value, params = node.process_rhs(self, connection)
            sql = f"{sql} {connection.operators[node.lookup_name] % value}"
            params = _Params(params)
        else:
            return node.as_sql(self, connection)
        return sql, params


def install() -> None:
    """Put `ComparesColumns` in front of the bases of all compilers."""
    for kind in COMPILERS:
        put_before(kind, ComparesColumns)
