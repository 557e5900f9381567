"""Tells if values, fields and `ops` let an INSERT or UPDATE be written and read in fewer steps."""

from __future__ import annotations

from datetime import date, datetime, time, timedelta
from decimal import Decimal
from operator import attrgetter, is_
from typing import Any
from uuid import UUID

import django
from django.db.backends.postgresql.operations import DatabaseOperations

from pgbackend.patches import unpatched

#: Types of values that are written as one placeholder: no expressions, no model instances.
PLAIN_TYPES = {
    *(type(None), bool, int, float, Decimal, str, bytes, UUID),
    *(date, datetime, time, timedelta),
}

#: The name of the method of `ops` that writes ``RETURNING``.
RETURNING = "returning_columns" if django.VERSION >= (6, 0) else "return_insert_columns"
#: The methods of `ops` that write an INSERT, and read the rows that it returns.
_inserting_by = attrgetter(
    *("bulk_insert_sql", "insert_statement", "modify_insert_params", "on_conflict_suffix_sql"),
    *(RETURNING, "fetch_returned_rows")
    if django.VERSION >= (6, 0)
    else (RETURNING, "fetch_returned_insert_columns"),
)
_INSERT_BY = unpatched(*_inserting_by(DatabaseOperations))


def has_placeholder(field: Any) -> bool:
    """Return whether `field` has a method that writes the placeholder of its value."""
    return hasattr(field, "get_placeholder_sql") or hasattr(field, "get_placeholder")


def are_returned_rows_djangos(connection: Any) -> bool:
    """Return whether Django's own methods of `ops` write an INSERT and read what it returns."""
    return all(map(is_, _inserting_by(type(connection.ops)), _INSERT_BY))
