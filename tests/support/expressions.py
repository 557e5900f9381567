"""Defines an expression for SQL in tests, which pgbackend takes for one of Django's own."""

from __future__ import annotations

from typing import Any

from django.db.models import Expression


class OwnSQL(Expression):
    """Equals `RawSQL` except for its class: pgbackend does not reset the session after it."""

    __module__ = "django.db.models.expressions"

    def __init__(self, sql: str, params: Any, output_field: Any = None) -> None:
        super().__init__(output_field=output_field)
        self.sql, self.params = sql, params

    def _resolve_output_field(self) -> Any:
        from django.db.models import Field

        return super()._resolve_output_field() or Field()

    def as_sql(self, compiler: Any, connection: Any) -> tuple[str, Any]:
        return f"({self.sql})", tuple(self.params)

    def get_group_by_cols(self) -> list[Any]:
        return [self]
