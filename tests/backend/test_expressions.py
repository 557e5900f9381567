"""Tests how other expressions are told apart from Django's own when a statement is compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import django
import pytest
from django.contrib.postgres.aggregates import ArrayAgg
from django.contrib.postgres.fields import ArrayField
from django.contrib.postgres.search import SearchQuery, SearchRank, SearchVector
from django.db import connection, models
from django.db.models import F, Func, Q, Subquery, Value
from django.db.models.expressions import RawSQL
from django.db.models.functions import Lower, Now, TruncDay
from django.db.models.sql import InsertQuery, Query, UpdateQuery
from django.test.utils import isolate_apps

from pgbackend import compiler as ours
from pgbackend import expressions
from tests.library.models import Author, Book, Tag


def is_noted(compile_: Callable[[], Any]) -> bool:
    noted = expressions.noted
    compile_()
    return expressions.noted is not noted


def compiled(query: Any) -> Callable[[], Any]:
    query = getattr(query, "query", query)
    return lambda: query.get_compiler(connection=connection).as_sql()


DJANGOS: dict[str, Callable[[], Any]] = {
    "an aggregate of arrays": lambda: Tag.objects.values("name").annotate(x=ArrayAgg("books")),
    "an array with an expression": lambda: Tag.objects.alias(
        x=Func(F("name"), function="ARRAY", template="%(function)s[%(expressions)s]")
    ).filter(x=[1]),
    "a search": lambda: Tag.objects.annotate(
        x=SearchRank(SearchVector("name") + SearchVector("pk"), SearchQuery("a") & SearchQuery("b"))
    ),
    "a date": lambda: Tag.objects.annotate(x=TruncDay(Now())),
    "arithmetic": lambda: Tag.objects.annotate(x=(F("pk") * 2 + 1) % 3),
    "bits": lambda: Tag.objects.annotate(x=F("pk").bitand(1)),
    "columns of other tables": lambda: Book.objects.filter(author__name="x", tags__name="y"),
    "conditions": lambda: Tag.objects.exclude(Q(name="x") | Q(pk__in=[1, 2]) & Q(name__regex="y")),
    "no rows": lambda: Tag.objects.filter(pk=1).order_by("-name").distinct(),
}


@pytest.mark.parametrize("name", DJANGOS)
def test_what_is_djangos_is_not_noted(name: str) -> None:
    assert not is_noted(compiled(DJANGOS[name]()))


def test_classes_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    query = Tag.objects.filter(name__contains="x", pk__in=[1])
    compiled(query)()
    monkeypatch.setattr(expressions, "look_at", None)
    compiled(query)()


def test_one_class_may_be_djangos_by_one_name_and_the_users_by_another() -> None:
    for _ in range(2):
        assert not is_noted(compiled(Tag.objects.annotate(x=Lower("name"))))
        assert is_noted(compiled(Tag.objects.annotate(x=Lower("name", function="set_config"))))
        assert is_noted(compiled(Tag.objects.annotate(x=Lower("name", template="x"))))
        assert is_noted(compiled(Tag.objects.annotate(x=Lower("name", arg_joiner="x"))))


def test_a_known_statement_hides_no_expression() -> None:
    raw = RawSQL("set_config('a', 'b', false)", ())
    for _ in range(3):
        assert not is_noted(compiled(Tag.objects.filter(name="x")))
        assert is_noted(compiled(Tag.objects.filter(name=raw)))
        assert not is_noted(compiled(Tag.objects.order_by("name")))
        assert is_noted(compiled(Tag.objects.order_by(raw)))


# --- Fields that write SQL ------------------------------------------------------------------------


class Plain(models.CharField):
    """Leaves the writing of SQL to Django, as a field of a project's own."""

    def get_prep_value(self, value: Any) -> Any:
        return str(value).strip()


class Placed(models.CharField):
    def get_placeholder_sql(self, value: Any, compiler: Any, connection: Any) -> Any:
        return "set_config('a', %s, false)", (value,)


if django.VERSION < (6, 1):
    Placed.get_placeholder = lambda *args: "set_config('a', %s, false)"


class Selected(models.CharField):
    def select_format(self, compiler: Any, sql: str, params: Any) -> Any:
        return f"set_config('a', {sql}, false)", params


def insert(*rows: Any) -> Callable[[], Any]:
    query = InsertQuery(type(rows[0]))
    query.insert_values(rows[0]._meta.concrete_fields[1:], rows)
    return compiled(query)


def update(model: Any, **values: Any) -> Callable[[], Any]:
    query = model._base_manager.filter(pk=1).query.chain(UpdateQuery)
    query.add_update_values(values)
    return compiled(query)


@pytest.mark.parametrize(
    "field, writes, selects",
    [(Plain, False, False), (Placed, True, False), (Selected, False, True)],
)
@isolate_apps("tests.library")
def test_a_field_that_writes_sql_is_noted(field: Any, writes: bool, selects: bool) -> None:
    class Thing(models.Model):
        name = field(max_length=10)

        class Meta:
            app_label = "library"

        def __str__(self) -> str:
            return self.name

    for _ in range(2):
        assert is_noted(insert(Thing(name="x"))) is writes
        assert is_noted(insert(Thing(name="x"), Thing(name="y"))) is writes
        assert is_noted(update(Thing, name="x")) is writes
        assert is_noted(compiled(Thing._base_manager.all())) is selects
        assert is_noted(compiled(Thing._base_manager.values_list("name"))) is selects
        assert is_noted(compiled(Thing._base_manager.values_list("pk"))) is False
        value = Value("x", output_field=field())
        assert is_noted(compiled(Tag.objects.filter(name__lt=value))) is writes


def test_fields_of_djangos_that_write_sql_are_not_noted() -> None:
    value = Value(["x"], output_field=ArrayField(models.CharField()))
    assert not is_noted(compiled(Tag.objects.annotate(x=value)))


# --- A project's own compilers and queries --------------------------------------------------------


class Traced(ours.SQLCompiler):
    def execute_sql(self, *args: Any, **kwargs: Any) -> Any:
        return super().execute_sql(*args, **kwargs)


class Writing(ours.SQLCompiler):
    def as_sql(self, *args: Any, **kwargs: Any) -> Any:
        sql, params = super().as_sql(*args, **kwargs)
        return f"WITH a AS (SELECT set_config('a', 'b', false)) {sql}", params


class Joining(ours.SQLCompiler):
    def get_from_clause(self) -> Any:
        return super().get_from_clause()


class OwnQuery(Query):
    compiled_by: Any = Writing

    def get_compiler(self, using: Any = None, connection: Any = None, **kwargs: Any) -> Any:
        from django.db import connections

        return self.compiled_by(self, connection or connections[using], using)


@pytest.mark.parametrize("kind, noted", [(Traced, False), (Writing, True), (Joining, True)])
def test_a_compiler_of_ones_own_is_noted_if_it_writes(kind: Any, noted: bool) -> None:
    query = Tag.objects.filter(name="x").query
    assert is_noted(lambda: kind(query, connection, None).as_sql()) is noted
    assert expressions.writes_as_django(kind) is not noted


def test_a_subquery_of_a_class_of_ones_own_is_noted() -> None:
    query = Author.objects.values("name").query
    query.__class__ = OwnQuery
    assert is_noted(compiled(Tag.objects.annotate(x=Subquery(copy.copy(query)))))
    assert is_noted(compiled(Tag.objects.filter(name__in=copy.copy(query))))
