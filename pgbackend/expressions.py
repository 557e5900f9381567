"""Notes if a statement has a part that is not Django's own, and so may change the server session.

SQL that the ORM compiles from its own expressions changes nothing in the server session. A user's
part may: `RawSQL("set_config(...)")`, a `Func` with a given function name, a custom lookup, a field
that writes SQL. So the compilers pass each part to one of the `look_at...()` functions, which
replace the object `noted` for a part that is not Django's own. The code that executes a statement
compares `noted` before and after compiling: if the object was replaced, the lease becomes dirty.
Subqueries, and the parts of unions, have compilers of their own, which run in between.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from django.db.models import Aggregate, Func, Subquery, Value
from django.db.models.expressions import Combinable, CombinedExpression, RawSQL
from django.db.models.sql.where import ExtraWhere

#: A new object each time that a part is compiled which is not Django's own. If another thread
#: replaces it while a statement is compiled, that costs one needless reset; no part is missed.
noted = object()

#: Classes of expressions that need no look: none of their objects can write the user's SQL.
plain: set[type[Any]] = set()
_plain_fields: set[type[Any]] = set()

#: Classes whose objects write the SQL text that the user gives them.
_RAW = (RawSQL, ExtraWhere)
_NAMED_BY_USERS = (Func, Aggregate)
#: The `extra` of the `Func` by which Django's `ArrayField` writes an array with expressions in it.
_ARRAY = {"function": "ARRAY", "template": "%(function)s[%(expressions)s]"}
#: Django's operators; and those of `django.contrib.postgres.search`.
_OPERATORS = {value for name, value in vars(Combinable).items() if name.isupper()}
_CONNECTORS = frozenset(_OPERATORS | {"||", "&&"})

#: Methods by which a field writes the SQL of its value in a statement, and of its selected column.
_PLACING = frozenset({"get_placeholder", "get_placeholder_sql"})
_SELECTING = frozenset({"select_format"})
#: Attributes that a class derived from our compilers may define without changing the SQL.
_NOT_WRITING = frozenset(
    {
        *("__annotations__", "__annotate_func__", "__annotations_cache__", "__classcell__"),
        *("__dict__", "__doc__", "__firstlineno__", "__module__", "__orig_bases__"),
        *("__parameters__", "__qualname__", "__static_attributes__", "__weakref__"),
        *("apply_converters", "execute_returning_sql", "execute_sql", "explain_query"),
        *("get_converters", "has_results", "results_iter"),
    }
)


def note() -> None:
    """Replace `noted`, because a part of the statement being compiled is not Django's own."""
    global noted  # noqa: PLW0603 - all compilers share it
    noted = object()


def look_at(node: Any) -> None:
    """Call `note()` if `node`, which is being compiled, may write the user's own SQL."""
    kind = type(node)
    if kind is Value:  # first, since values are the most frequent nodes
        field = node.__dict__.get("output_field")
        if field is not None and type(field) not in _plain_fields:
            look_at_written(field)
    elif kind is CombinedExpression:
        if node.connector not in _CONNECTORS:
            note()
    else:
        _look_at_others(node, kind)


def _look_at_others(node: Any, kind: type[Any]) -> None:
    if not is_djangos(kind) or issubclass(kind, _RAW):
        note()
    elif issubclass(kind, CombinedExpression):
        if node.connector not in _CONNECTORS:
            note()
    elif hasattr(node, "extra"):
        _look_at_words(node, kind)
    else:
        plain.add(kind)


def _look_at_words(node: Any, kind: type[Any]) -> None:
    """Call `note()` if arguments of `node` (a function's name, a template) are the user's SQL."""
    if issubclass(kind, Subquery):
        is_plain = node.template == kind.template and is_djangos(type(node.query))
        is_plain = is_plain and not node.extra
    else:
        is_plain = node.extra == _ARRAY or not (node.extra or kind in _NAMED_BY_USERS)
    if not is_plain:
        note()


def look_at_parts(compiler: Any) -> None:
    """Call `note()` if the query has extra tables, or if the compiler writes SQL of its own."""
    if compiler.query.extra_tables or not writes_as_django(type(compiler)):
        note()


def look_at_selected(select: Iterable[tuple[object, object, object]]) -> None:
    """Call `note()` if a selected field is a custom one that writes the SQL of its column."""
    for expression, _, _ in select:
        field = getattr(expression, "__dict__", {}).get("output_field")
        if field is not None:
            _look_at_field(field, _SELECTING)


def look_at_written(field: object) -> None:
    """Call `note()` if `field`, whose value is sent, is a custom one that writes the SQL of it."""
    _look_at_field(field, _PLACING)


def _look_at_field(field: object, names: frozenset[str]) -> None:
    kind = type(field)
    if kind in _plain_fields:
        return
    own = [vars(each).keys() for each in kind.__mro__ if not is_djangos(each)]
    if any(names & each for each in own):
        note()
    elif not any((_PLACING | _SELECTING) & each for each in own):
        _plain_fields.add(kind)


def is_djangos(kind: type[Any]) -> bool:
    """Return whether the class `kind` is `object`, or defined by Django."""
    return kind is object or kind.__module__.startswith("django.")


def writes_as_django(kind: type[Any]) -> bool:
    """Return whether compilers of the class `kind` write the same SQL as Django's.

    True for Django's and pgbackend's own classes, and for classes derived from them that override
    no method which writes SQL.
    """
    return _writes_as_django(kind)  # type: ignore[arg-type]  # a class has a hash


@lru_cache(maxsize=256)
def _writes_as_django(kind: type[Any]) -> bool:
    return not any(
        vars(each).keys() - _NOT_WRITING
        for each in kind.__mro__
        if not is_djangos(each) and not each.__module__.startswith("pgbackend.")
    )
