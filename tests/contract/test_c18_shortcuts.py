"""Tests C18: shortcuts are optional, and never stale.

A patch, mock, derived class or change at run time takes effect at once, green and in sync code,
before and after first use: for each function that a shortcut bypasses, too. The registry is tested
in `tests/fast/test_registry.py`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import django
import pytest
from django.apps.registry import Apps
from django.db import connection, connections, models, transaction
from django.db.models import F
from django.db.models.query import ModelIterable, QuerySet

from pgbackend import aio, iteration
from pgbackend.fast import signals
from pgbackend.fast.fingerprints import find
from pgbackend.fast.registry import SHORTCUTS
from tests.conftest import Runner
from tests.library.models import Author, Book, Tag
from tests.support.counting import Counting
from tests.support.exchange import serve_by
from tests.support.patched_requests import CALLED, answer, calls
from tests.support.processes import Program, run_all

__all__ = ["serve_by"]

STOCK = "django.db.backends.postgresql"

Call = Callable[[Callable[[], Any]], Any]


@pytest.fixture(params=["sync", "green"])
def call(request: pytest.FixtureRequest, run: Runner) -> Call:
    """Call a function in a thread without a loop, or green."""
    if request.param == "green":
        return lambda function: run(aio.run(function))
    return lambda function: function()


# --- Models that change ---------------------------------------------------------------------------


class Text(models.TextField):
    def from_db_value(self, value: Any, expression: Any, connection: Any) -> Any:
        return value


class Noting:
    """Notes the values that it is set to, as a descriptor."""

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else vars(instance).get("noted", "never set")

    def __set__(self, instance: Any, value: Any) -> None:
        vars(instance)["noted"] = f"set to {value}"


Make = Callable[[Any], Any]
#: Pairs of the value that was seen and the expected one.
Seen = Iterator[tuple[Any, Any]]


@pytest.fixture
def make() -> Iterator[Make]:
    """Make a model with a field `value`; two rows have been made, and read."""
    made: list[Any] = []

    def used_model(value: Any) -> Any:
        meta = {"app_label": "library", "apps": Apps(), "db_table": f"thing_{len(made)}"}
        body = {"__module__": __name__, "Meta": type("Meta", (), meta), "value": value}
        model: Any = type(models.Model)("Thing", (models.Model,), body)
        with connection.schema_editor() as editor:
            editor.create_model(model)
        made.append(model)
        for _ in range(2):
            model.objects.create()
            assert model.objects.get(pk=1) == model.objects.filter(pk=1)[0]
        return model

    yield used_model
    for model in made:
        with connection.cursor() as cursor:
            cursor.execute(f"DROP TABLE {model._meta.db_table} CASCADE")


def patched(*args: Any) -> str:
    return "patched"


def from_db_value_of_the_class(make: Make) -> Seen:
    thing = make(Text(default="a"))
    with mock.patch.object(Text, "from_db_value", patched):
        yield thing.objects.get(pk=1).value, "patched"
    yield thing.objects.get(pk=1).value, "a"


def from_db_value_of_the_field(make: Make) -> Seen:
    thing = make(models.TextField(default="a"))
    thing._meta.get_field("value").from_db_value = patched
    yield thing.objects.get(pk=1).value, "patched"
    del thing._meta.get_field("value").from_db_value
    yield thing.objects.get(pk=1).value, "a"


def select_format_of_the_class(make: Make) -> Seen:
    thing = make(Text(default="a"))
    upper = mock.patch.object(Text, "select_format", lambda *args: (f"upper({args[2]})", args[3]))
    with upper:
        yield thing.objects.get(pk=1).value, "A"
    yield thing.objects.get(pk=1).value, "a"


def get_db_prep_value_of_the_field(make: Make) -> Seen:
    thing = make(models.IntegerField(default=5))
    assert thing.objects.filter(value=5).count() == len(thing.objects.filter(value=5)) == 2
    thing._meta.get_field("value").get_db_prep_value = lambda *args, **kwargs: 6
    yield len(thing.objects.filter(value=5)), 0


def integers_are_adapted_by_the_operations(make: Make) -> Seen:
    thing = make(models.IntegerField(default=5))
    assert len(thing.objects.filter(value=5)) == len(thing.objects.filter(value=5)) == 2
    with mock.patch.object(type(connection.ops), "adapt_integerfield_value", return_value=6):
        yield len(thing.objects.filter(value=5)), 0


def another_column(make: Make) -> Seen:
    thing = make(Text(default="a"))
    with connection.cursor() as cursor:
        cursor.execute(f"ALTER TABLE {thing._meta.db_table} RENAME value TO renamed")
    field = thing._meta.get_field("value")
    field.column = "renamed"
    vars(field).pop("cached_col", None)
    yield thing.objects.get(pk=1).value, "a"
    yield thing.objects.create(value="b").value, "b"


def a_placeholder_of_the_class(make: Make) -> Seen:
    thing = make(Text(default="a"))
    name = "get_placeholder_sql" if django.VERSION >= (6, 1) else "get_placeholder"

    def placeholder(field: Any, value: Any, *args: Any) -> Any:
        return ("upper(%s)", (value,)) if name == "get_placeholder_sql" else "upper(%s)"

    with mock.patch.object(Text, name, placeholder, create=True):
        key = thing.objects.create(value="b").pk
    yield thing.objects.get(pk=key).value, "B"


def descriptor_of_a_foreign_key(make: Make) -> Seen:
    thing = make(models.ForeignKey("self", models.CASCADE, null=True))
    with mock.patch.object(thing, "value_id", Noting()):
        yield thing.objects.get(pk=1).value_id, "set to None"
    yield thing.objects.get(pk=1).value_id, None


def converters_of_the_operations(make: Make) -> Seen:
    thing = make(Text(default="a"))
    with mock.patch.object(type(connection.ops), "get_db_converters", return_value=[patched]):
        yield thing.objects.get(pk=1).value, "patched"
    yield thing.objects.get(pk=1).value, "a"


def names_quoted_by_the_operations(make: Make) -> Seen:
    thing, other = make(Text(default="a")), make(Text(default="other"))
    tables = {thing._meta.db_table: other._meta.db_table}

    def quote(operations: Any, name: str) -> str:
        return f'"{tables.get(name, name)}"'

    with mock.patch.object(type(connection.ops), "quote_name", quote):
        yield thing.objects.get(pk=1).value, "other"


def limits_of_the_operations(make: Make) -> Seen:
    thing = make(Text(default="a"))
    assert len(thing.objects.filter(pk=1)[:1]) == 1
    with mock.patch.object(type(connection.ops), "limit_offset_sql", return_value="LIMIT 0"):
        yield len(thing.objects.filter(pk=1)[:1]), 0


def limits_of_the_operations_of_one_connection(make: Make) -> Seen:
    thing = make(Text(default="a"))
    assert len(thing.objects.filter(pk=1)[:1]) == 1
    with mock.patch.object(connection.ops, "limit_offset_sql", return_value="LIMIT 0"):
        yield len(thing.objects.filter(pk=1)[:1]), 0
    yield len(thing.objects.filter(pk=1)[:1]), 1


CHANGES = [
    limits_of_the_operations_of_one_connection,
    from_db_value_of_the_class,
    from_db_value_of_the_field,
    select_format_of_the_class,
    get_db_prep_value_of_the_field,
    integers_are_adapted_by_the_operations,
    another_column,
    a_placeholder_of_the_class,
    descriptor_of_a_foreign_key,
    converters_of_the_operations,
    names_quoted_by_the_operations,
    limits_of_the_operations,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_changes_of_a_model_takes_effect_at_once(call: Call, make: Make, change: Any) -> None:
    seen = call(lambda: [*change(make)])
    assert seen
    assert [found for found, _ in seen] == [expected for _, expected in seen]


def test_a_generated_column_is_returned_by_an_insert(call: Call) -> None:
    """The type of the column's value is a field that has no column."""
    meta = type("Meta", (), {"app_label": "library", "apps": Apps(), "db_table": "generated"})
    value: Any = models.GeneratedField(
        expression=F("number") + 1, output_field=models.IntegerField(), db_persist=True
    )
    body = {"__module__": __name__, "Meta": meta, "number": models.IntegerField(), "value": value}
    model: Any = type(models.Model)("Generated", (models.Model,), body)
    with connection.schema_editor() as editor:
        editor.create_model(model)
    try:
        made = call(lambda: [model.objects.create(number=number).value for number in (1, 2)])
    finally:
        with connection.schema_editor() as editor:
            editor.delete_model(model)
    assert made == [2, 3]


def test_klass_info_has_the_model_for_who_derives_from_djangos_iterable(call: Call) -> None:
    class Reading(ModelIterable):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            compiler = self.queryset.query.get_compiler(self.queryset.db)
            list(compiler.results_iter(compiler.execute_sql()))
            yield compiler.klass_info["model"]
            yield from super().__iter__()

    def read() -> list[Any]:
        Author.objects.create(name="a")
        list(Author.objects.all())
        rows: Any = Author.objects.all()
        rows._iterable_class = Reading
        return list(rows)

    model, author = call(read)
    assert model is Author
    assert type(author) is Author


# --- Functions that are patched -------------------------------------------------------------------


def work(alias: str) -> None:
    """Do everything that shortcuts are for."""
    author = Author.objects.using(alias).create(name="a")
    other = Author(name="b")
    other.save(using=alias)
    other.name = "c"
    other.save(using=alias)
    book = Book.objects.using(alias).create(title="t", author=author)
    assert [each.author.name for each in Book.objects.using(alias).select_related("author")] == [
        "a"
    ]
    assert Author.objects.using(alias).get(pk=author.pk) == author
    assert Author.objects.using(alias).filter(name="a").order_by("name")[:1][0] == author
    assert Author.objects.using(alias).filter(pk__gt=0).count() == 2
    assert Book.objects.using(alias).filter(pk=book.pk).update(saves=F("saves") + 1) == 1
    assert Tag.objects.using(alias).filter(pk=-1).first() is None
    with transaction.atomic(using=alias):
        assert Author.objects.using(alias).filter(pk=other.pk).exists()
        with transaction.atomic(using=alias):
            Tag.objects.using(alias).create(name="t")
    with connections[alias].cursor() as cursor:
        cursor.execute("SELECT 1")
        assert cursor.fetchone() == (1,)
    Book.objects.using(alias).all().delete()
    Tag.objects.using(alias).all().delete()
    Author.objects.using(alias).all().delete()


#: The functions that `work()` may call on Django's engine. Those of requests are not among them,
#: nor those of psycopg_pool: Django's engine never calls any of `AsyncConnectionPool`, and the
#: synchronous side has its `ConnectionPool` here, too.
BYPASSED = sorted(
    name
    for name in {name for each in SHORTCUTS.values() for name in each.bypasses}
    if name.startswith(("django.db.", "psycopg.")) and find(name) is not None
)


@pytest.fixture
def stock() -> Iterator[str]:
    """Add an alias of Django's own engine, on the same database."""
    connections.settings["stock"] = {**connections.settings["default"], "ENGINE": STOCK}
    try:
        yield "stock"
    finally:
        connections["stock"].close()
        connections["stock"].close_pool()  # type: ignore[attr-defined]
        del connections["stock"]
        del connections.settings["stock"]


def forget_what_is_kept() -> None:
    """Make the next use of the models the first one."""
    for model in (Author, Book, Tag):
        for name in [each for each in vars(model._meta) if each.startswith("_pgbackend_")]:
            delattr(model._meta, name)


@pytest.mark.sweep(one_in=24)
# Django 5.2 takes a proxy of this old method for one of the project's, and warns, on each engine.
@pytest.mark.filterwarnings("ignore:.*field_cast_sql:DeprecationWarning")
@pytest.mark.parametrize("used_before", [False, True], ids=["before first use", "afterwards"])
@pytest.mark.parametrize("by", ["function", "proxy"])
@pytest.mark.parametrize("name", BYPASSED)
def test_a_patch_of_what_is_bypassed_is_called_as_on_djangos_engine(
    run: Runner, stock: str, name: str, by: Any, used_before: bool
) -> None:
    ours: dict[str, Call] = {
        "sync": lambda function: function(),
        "green": lambda function: run(aio.run(function)),
    }
    work(stock)
    for context, call in ours.items():
        if used_before:
            call(lambda: work("default"))
        else:
            forget_what_is_kept()
        with Counting(name, by) as counting:
            on_stock = counting.count(lambda: work(stock))
            here = counting.count(lambda: call(lambda: work("default")))  # noqa: B023
        assert bool(here) >= bool(on_stock), f"{context}: {on_stock} calls on Django's engine"


@pytest.fixture(scope="module")
def calls_on_stock(conninfo: str) -> dict[str, int]:
    """Count the calls of each function by one request to Django's own handler, by patched place."""
    program = Program(["tests/support/patched_requests.py"], environment={"DATABASE_URL": conninfo})
    (finished,) = run_all([program])
    counts: dict[str, int] = json.loads(finished.check())
    return counts


@pytest.mark.sweep(one_in=4)
@pytest.mark.parametrize("used_before", [False, True], ids=["before first use", "afterwards"])
@pytest.mark.parametrize("on", ["class", "class, by a proxy", "object"])
@pytest.mark.parametrize("name", CALLED)
def test_a_patch_of_what_a_request_bypasses_is_called_as_by_djangos_handler(
    run: Runner,
    serve_by: Any,
    calls_on_stock: dict[str, int],
    name: str,
    on: str,
    used_before: bool,
) -> None:
    serve_by(answer)
    if used_before:
        run(calls(name, on))
    else:
        signals._known.clear()
    assert run(calls(name, on)) == calls_on_stock[f"{name} {on}"]


# --- The next Django ------------------------------------------------------------------------------


def test_aiterator_has_the_default_of_what_it_stands_for() -> None:
    shown = inspect.signature(QuerySet.aiterator, follow_wrapped=False).parameters["chunk_size"]
    djangos = inspect.signature(inspect.unwrap(QuerySet.aiterator)).parameters["chunk_size"]
    assert shown.default == djangos.default


def test_aiterator_passes_on_what_a_later_django_takes(run: Runner) -> None:
    """Django 6.2 has `chunk_size=None` by default, and warns where rows are prefetched."""
    received: list[Any] = []

    class Later(QuerySet[Any]):
        async def aiterator(self, chunk_size: Any = None) -> Any:
            received.append(chunk_size)
            async for row in QuerySet.aiterator(self, chunk_size=chunk_size or 2000):
                yield row

    Later.aiterator = iteration.make_aiterator(Later.aiterator)  # type: ignore[method-assign]

    async def main() -> None:
        await Author.objects.acreate(name="a")
        for rows in (Later(Author), Later(Author).prefetch_related("books")):
            for given in ((), (None,), (1,)):
                assert [row.name async for row in rows.aiterator(*given)] == ["a"]

    run(main())
    assert received == [None, None, 1]  # with prefetched rows the rest is ours
