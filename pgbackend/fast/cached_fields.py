"""Tells whether what was cached for a model's fields is still what Django would compute.

`select.py` and `insert.py` cache, on the `_meta` of a model, SQL and converters that depend on its
fields and on the operations of the connection. Only answers of Django's own methods are cached:
fields that say themselves how they are selected are asked each time. Packages and tests patch these
methods, or give a field another column, so `FieldAnswers` is compared again for each statement.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, repeat
from operator import attrgetter, is_
from typing import Any

from django.db.models import DurationField, Field, ForeignKey
from django.db.models.expressions import Col

#: How many statements are cached for one model, for each shortcut.
MOST_STATEMENTS = 64

#: The methods that make a column, where it depends on nothing but the field.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "get_col": (Field.get_col, ForeignKey.get_col),
    "get_db_converters": (
        *(Field.get_db_converters, DurationField.get_db_converters, ForeignKey.get_db_converters),
    ),
    "select_format": (Field.select_format,),
}

#: Methods of the operations whose answers are cached for a model.
_CACHED_OF_OPS = (
    *("adapt_integerfield_value", "get_db_converters", "integer_field_range", "limit_offset_sql"),
    "quote_name",
)
_asked_of_ops = attrgetter(*_CACHED_OF_OPS)
_asked_of_kind = attrgetter("get_col", "get_db_converters", "select_format")
#: The type of a generated column is a field that has no column of its own.
_COLUMN, _FROM_DB_VALUE, _NONE = repeat("column"), repeat("from_db_value"), repeat(None)


def _is_plain(field: Any) -> bool:
    """Return whether a field is selected, and its values are converted, as Django's own are."""
    return not vars(field).keys() & _PLAIN.keys() and all(
        any(map(is_, repeat(getattr(type(field), name, None)), known))
        for name, known in _PLAIN.items()
    )


def are_plain(ops: type[Any]) -> bool:
    """Return whether operations answer for columns by Django's methods, or ours: for all alike."""
    answer = (ops.get_db_converters.__module__, ops.quote_name.__module__)
    return all(module.startswith(("django.", "pgbackend.")) for module in answer)


def is_plain_column(col: Any, field: Any, table: str) -> bool:
    """Return whether `col` is the column of `field` in `table`, with nothing done to it."""
    return (
        type(col) is Col
        and col.target is field
        and col.alias == table
        and not hasattr(col, "as_postgresql")
        and _is_plain(field)
        and _is_plain(col.output_field)
    )


class FieldAnswers:
    """The answers of fields and operations at the time when something of a model was cached.

    All loops are in C: each statement pays for `is_stale()`.
    """

    __slots__ = ("columns", "fields", "functions", "kinds", "loaders", "ops", "sizes")

    def __init__(self, fields: Any, ops: Any) -> None:
        self.fields = list(dict.fromkeys(fields))
        self.kinds = list(dict.fromkeys(map(type, self.fields)))
        self.ops = type(ops)
        self.functions = [*self._look_up_functions()]
        #: How many attributes each field has: a method that is set on a field adds to them.
        self.sizes = [*map(len, map(vars, self.fields))]
        self.columns = [*map(getattr, self.fields, _COLUMN, _NONE)]
        self.loaders = [*map(getattr, self.fields, _FROM_DB_VALUE, _NONE)]

    def _look_up_functions(self) -> Iterator[Any]:
        """Return the methods that were asked, as the classes of operations and fields have them."""
        return chain(
            _asked_of_ops(self.ops),
            chain.from_iterable(map(_asked_of_kind, self.kinds)),
            map(getattr, self.kinds, _FROM_DB_VALUE, _NONE),
        )

    def is_stale(self, ops: Any) -> bool:
        """Return whether fields and operations might answer otherwise now, or `ops` are others."""
        fields = self.fields
        return (
            self.ops is not type(ops)
            or not all(map(is_, self._look_up_functions(), self.functions))
            or not vars(ops).keys().isdisjoint(_CACHED_OF_OPS)
            or [*map(len, map(vars, fields))] != self.sizes
            or [*map(getattr, fields, _COLUMN, _NONE)] != self.columns
            or [*map(getattr, fields, _FROM_DB_VALUE, _NONE)] != self.loaders
        )
