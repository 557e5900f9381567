"""Sends an integer that is compared with a column of integers without asking Django to prepare it.

Of an integer that fits into the column, Django sends the same integer, in a type of psycopg's that
depends on the field only. `Integers` caches range and type for one column: for the shortcut
`known`, see `select.py`.
"""

from __future__ import annotations

from operator import attrgetter, is_
from typing import Any, NamedTuple

from django.db.backends.postgresql.operations import DatabaseOperations
from django.db.models import (
    AutoField,
    BigAutoField,
    BigIntegerField,
    Field,
    IntegerField,
    SmallAutoField,
    SmallIntegerField,
    lookups,
)
from django.db.models.fields import AutoFieldMixin

from pgbackend.patches import lookup, unpatched

_INTEGER_FIELDS = {
    *(BigIntegerField, IntegerField, SmallIntegerField),
    *(AutoField, BigAutoField, SmallAutoField),
}
_PREPARING = ("get_db_prep_value", "get_internal_type")
_prepared_by = attrgetter("adapt_integerfield_value", "integer_field_range")
#: The functions that are bypassed, as long as they are what they were.
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
_INTEGERS = unpatched(*_for_integers())


class Integers(NamedTuple):
    """The integers that fit into a column, and the type in which Django sends them."""

    field: Any
    least: int
    most: int
    kind: Any

    @classmethod
    def for_column(cls, column: Any, ops: Any, sent: Any) -> Integers | None:
        """Return those of `column`, for which Django has `sent` one; None if others prepare it."""
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
        """Return whether `value`, which is compared with `column`, fits and is sent as it is."""
        return (
            type(value) is int
            and column.target is self.field is column.output_field
            and self.least <= value <= self.most
            and all(map(is_, _for_integers(), _INTEGERS))
        )
