"""Tells whether SQL that was cached for a model's fields is still the SQL that Django would write.

`select.py` and `insert.py` cache SQL and converters on the `_meta` of a model. These depend on the
model's fields, and on the connection's `ops` (Django's `DatabaseOperations`). They are cached only
if Django's own methods made them; a field that overrides such a method is asked each time. Packages
and tests patch these methods, or give a field another column, so `FieldAnswers` compares again for
each statement.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, repeat
from operator import attrgetter, is_
from typing import Any

from django.db.models import DurationField, Field, ForeignKey
from django.db.models.expressions import Col

#: The greatest number of statements that each shortcut caches for one model.
MOST_STATEMENTS = 64

#: Methods of a field that make its column and converters, with Django's own implementations.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "get_col": (Field.get_col, ForeignKey.get_col),
    "get_db_converters": (
        *(Field.get_db_converters, DurationField.get_db_converters, ForeignKey.get_db_converters),
    ),
    "select_format": (Field.select_format,),
}

#: Methods of `ops` whose results are cached for a model.
_CACHED_OF_OPS = (
    *("adapt_integerfield_value", "get_db_converters", "integer_field_range", "limit_offset_sql"),
    "quote_name",
)
_asked_of_ops = attrgetter(*_CACHED_OF_OPS)
_asked_of_kind = attrgetter("get_col", "get_db_converters", "select_format")
#: Arguments for `map(getattr, ...)`. None: the output field of a generated column has no `column`.
_COLUMN, _FROM_DB_VALUE, _NONE = repeat("column"), repeat("from_db_value"), repeat(None)


def _is_plain(field: Any) -> bool:
    """Return whether Django's own methods write the column of `field` and convert its values."""
    return not vars(field).keys() & _PLAIN.keys() and all(
        any(map(is_, repeat(getattr(type(field), name, None)), known))
        for name, known in _PLAIN.items()
    )


def are_plain(ops: type[Any]) -> bool:
    """Return whether the class `ops` quotes and converts columns by Django's or our methods."""
    answer = (ops.get_db_converters.__module__, ops.quote_name.__module__)
    return all(module.startswith(("django.", "pgbackend.")) for module in answer)


def is_plain_column(col: Any, field: Any, table: str) -> bool:
    """Return whether `col` is the plain column of `field` in `table`, which Django writes."""
    return (
        type(col) is Col
        and col.target is field
        and col.alias == table
        and not hasattr(col, "as_postgresql")
        and _is_plain(field)
        and _is_plain(col.output_field)
    )


class FieldAnswers:
    """A record of the methods and attributes on which cached SQL depends, made with the SQL.

    Each statement pays for `is_stale()`, so all loops are in C code.
    """

    __slots__ = ("columns", "fields", "functions", "kinds", "loaders", "ops", "sizes")

    def __init__(self, fields: Any, ops: Any) -> None:
        self.fields = list(dict.fromkeys(fields))
        self.kinds = list(dict.fromkeys(map(type, self.fields)))
        self.ops = type(ops)
        self.functions = [*self._look_up_functions()]
        #: The number of attributes of each field: patching a method on a field changes it.
        self.sizes = [*map(len, map(vars, self.fields))]
        self.columns = [*map(getattr, self.fields, _COLUMN, _NONE)]
        self.loaders = [*map(getattr, self.fields, _FROM_DB_VALUE, _NONE)]

    def _look_up_functions(self) -> Iterator[Any]:
        """Return the current methods of `ops` and fields, by class, that made the cached SQL."""
        return chain(
            _asked_of_ops(self.ops),
            chain.from_iterable(map(_asked_of_kind, self.kinds)),
            map(getattr, self.kinds, _FROM_DB_VALUE, _NONE),
        )

    def is_stale(self, ops: Any) -> bool:
        """Return True if a field, a method or the class of `ops` has changed: make the SQL anew."""
        fields = self.fields
        return (
            self.ops is not type(ops)
            or not all(map(is_, self._look_up_functions(), self.functions))
            or not vars(ops).keys().isdisjoint(_CACHED_OF_OPS)
            or [*map(len, map(vars, fields))] != self.sizes
            or [*map(getattr, fields, _COLUMN, _NONE)] != self.columns
            or [*map(getattr, fields, _FROM_DB_VALUE, _NONE)] != self.loaders
        )
