"""Sends an integer that is compared with an integer column, without Django's preparation of it.

If the integer is in the range of the column, Django sends it unchanged, in a type of psycopg's that
depends only on the field. `Integers` caches range and type of a column, for the shortcut `known`
in `select.py`.
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
#: The bypassed functions: the shortcut is taken while they are the same as at import.
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
    """A record of the range of a column's integers, and of the type in which Django sends them."""

    field: Any
    least: int
    most: int
    kind: Any

    @classmethod
    def for_column(cls, column: Any, ops: Any, sent: Any) -> Integers | None:
        """Return the record of `column`; None if any but Django's methods prepares its integers.

        `sent` is an integer as Django has prepared it for this column: its type is recorded.
        """
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
        """Return whether `value`, which is compared with `column`, can be sent unprepared."""
        return (
            type(value) is int
            and column.target is self.field is column.output_field
            and self.least <= value <= self.most
            and all(map(is_, _for_integers(), _INTEGERS))
        )
