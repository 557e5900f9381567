"""Notes whether all that a statement consists of is Django's own, or may change its session.

What the ORM compiles of its own expressions leaves nothing in the session. An expression of the
user's may: `RawSQL("set_config(...)")`, a `Func` with a name given to it, a lookup, a field that
writes SQL. So the compilers show what they compile to `look_at()` and its like, which change
`noted` for a part that is not Django's own; and whoever executes a statement compares `noted`
before it was compiled with `noted` afterwards. Subqueries and parts of unions have compilers of
their own, but are compiled in between.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from django.db.models import Aggregate, Func, Subquery, Value
from django.db.models.expressions import Combinable, CombinedExpression, RawSQL
from django.db.models.sql.where import ExtraWhere

#: Another object whenever a part has been compiled that is not Django's own. It is never one that
#: it was before: what another thread notes at the same time may cost a reset, and hides nothing.
noted = object()

#: Classes of which no object needs to be looked at.
plain: set[type[Any]] = set()
_plain_fields: set[type[Any]] = set()

#: Classes that write into a statement what they are given.
_RAW = (RawSQL, ExtraWhere)
_NAMED_BY_USERS = (Func, Aggregate)
#: How Django's own fields for arrays write one that has an expression in it.
_ARRAY = {"function": "ARRAY", "template": "%(function)s[%(expressions)s]"}
#: Django's operators; and those of `django.contrib.postgres.search`.
_OPERATORS = {value for name, value in vars(Combinable).items() if name.isupper()}
_CONNECTORS = frozenset(_OPERATORS | {"||", "&&"})

#: Methods by which a field says how it is set, and how it is selected.
_PLACING = frozenset({"get_placeholder", "get_placeholder_sql"})
_SELECTING = frozenset({"select_format"})
#: What a compiler derived from ours may do in its own way, and still write what Django writes.
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
    """Note that a part of the statement which is being compiled is not Django's own."""
    global noted  # noqa: PLW0603 - all compilers have one
    noted = object()


def look_at(node: Any) -> None:
    """Look at something that is being compiled, whose class is not one of the `plain`."""
    kind = type(node)
    if kind is Value:  # before all else, since they are frequent
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
    """Look at an expression that can be told by its arguments what it writes."""
    if issubclass(kind, Subquery):
        is_plain = node.template == kind.template and is_djangos(type(node.query))
        is_plain = is_plain and not node.extra
    else:
        is_plain = node.extra == _ARRAY or not (node.extra or kind in _NAMED_BY_USERS)
    if not is_plain:
        note()


def look_at_parts(compiler: Any) -> None:
    """Look at what a query has besides expressions, and who compiles it."""
    if compiler.query.extra_tables or not writes_as_django(type(compiler)):
        note()


def look_at_selected(select: Iterable[tuple[object, object, object]]) -> None:
    """Look at fields that are selected: some say themselves how."""
    for expression, _, _ in select:
        field = getattr(expression, "__dict__", {}).get("output_field")
        if field is not None:
            _look_at_field(field, _SELECTING)


def look_at_written(field: object) -> None:
    """Look at a field that a statement sets, or a value of it: some say themselves how."""
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
    """Return whether a class is Django's own."""
    return kind is object or kind.__module__.startswith("django.")


def writes_as_django(kind: type[Any]) -> bool:
    """Return whether a compiler of this class writes the SQL that ours and Django's write."""
    return _writes_as_django(kind)  # type: ignore[arg-type]  # a class has a hash


@lru_cache(maxsize=256)
def _writes_as_django(kind: type[Any]) -> bool:
    return not any(
        vars(each).keys() - _NOT_WRITING
        for each in kind.__mro__
        if not is_djangos(each) and not each.__module__.startswith("pgbackend.")
    )
