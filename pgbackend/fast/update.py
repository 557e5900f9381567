"""Writes an UPDATE whose only condition compares a column with a value: the shortcut `update`.

`save()` makes such an UPDATE, and so does most of ``filter(pk=...).update(...)``. Only the parts
that the UPDATE has are written; the SQL equals Django's to the letter
(`tests/fast/test_compiler.py`). Django resolves the assigned expressions once more; this module
does not, because they were resolved when they were added to the query.
"""

from __future__ import annotations

from operator import is_
from typing import Any

import django
from django.core.exceptions import FullResultSet
from django.db.backends.postgresql import compiler as django_compiler
from django.db.models.expressions import Col, CombinedExpression, Value

from pgbackend.compiler import CompiledUpdate, SQLUpdateCompiler, put_before
from pgbackend.patches import lookup, unpatched

from .comparisons import QUOTES_ALIKE, comparison_in
from .written_values import PLAIN_TYPES, has_placeholder

#: The bypassed functions: the shortcut is taken while they are the same as at import.
_for_update = lookup(
    "its.as_sql its.pre_sql_setup Combined.resolve_expression Value.resolve_expression "
    "Col.resolve_expression",
    its=django_compiler.SQLUpdateCompiler,
    Combined=CombinedExpression,
    Value=Value,
    Col=Col,
)
_UPDATE = unpatched(*_for_update())

#: Whether Django sends NULL as a parameter: so it is since Django 6.1.
_SENDS_NULL = django.VERSION >= (6, 1)


def _is_resolved(value: Any) -> bool:
    """Return whether `value` is made of columns and values only: resolving would just copy it."""
    kind = type(value)
    if kind is CombinedExpression:
        return _is_resolved(value.lhs) and _is_resolved(value.rhs)
    return kind is Col or (kind is Value and value.for_save)


def _assign(made_by: Any, values: Any, quote_name: Any) -> tuple[list[str], list[Any]]:
    """Return the assignments of an UPDATE, and their parameters."""
    connection = made_by.connection
    assignments: list[str] = []
    params: list[Any] = []
    for field, _, value in values:
        sent = field.get_db_prep_save(value, connection=connection)
        if hasattr(sent, "as_sql"):
            sql, sql_params = made_by.compile(sent)
            assignments.append(f"{quote_name(field.column)} = {sql}")
            params.extend(sql_params)
        elif sent is None and not _SENDS_NULL:
            assignments.append(f"{quote_name(field.column)} = NULL")
        else:
            assignments.append(f"{quote_name(field.column)} = %s")
            params.append(sent)
    return assignments, params


class Updates(CompiledUpdate):
    """A base of the UPDATE compiler: writes an UPDATE with one comparison, part by part."""

    def as_sql(self) -> Any:
        return self._cached_update() or super().as_sql()

    def _cached_update(self: Any) -> tuple[str, tuple[Any, ...]] | None:
        """Return the same as Django's `as_sql()`; None if Django must write this UPDATE."""
        query = self.query
        only = comparison_in(query.where)
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
        for field, _, value in query.values:  # before the first `get_db_prep_save()`
            if has_placeholder(field):
                return None
            if type(value) not in PLAIN_TYPES and not _is_resolved(value):
                return None
        query.get_initial_alias()
        quote_name = self.quote_name if QUOTES_ALIKE else self.quote_name_unless_alias
        assignments, params = _assign(self, query.values, quote_name)
        update = f"UPDATE {quote_name(query.base_table)} SET"
        sql = f"{update} {', '.join(assignments)}"
        try:
            where, where_params = self.compile(only)
        except FullResultSet:
            return sql, tuple(params)
        params.extend(where_params)
        return f"{sql} WHERE {where}", tuple(params)


def install() -> None:
    """Put `Updates` in front of the bases of the compiler of UPDATEs."""
    put_before(SQLUpdateCompiler, Updates)
