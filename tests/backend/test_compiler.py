"""The compilers say what Django's say, also when they have said it before."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.apps.registry import Apps
from django.db import connection, connections, models, transaction
from django.db.backends.postgresql import compiler as djangos
from django.db.models import F, Q, QuerySet, Value

from kitchen.models import Dish, Order, OrderLine, Section
from pgbackend import compiler as ours
from pgbackend.operations import DatabaseOperations
from tests.library.models import Tag


@pytest.fixture(autouse=True)
def _nothing_is_known() -> Iterator[None]:
    for model in (Dish, Order, OrderLine, Section, Tag):
        vars(model._meta).pop("_pgbackend_columns", None)
    yield


def compiled(queryset: QuerySet[Any], compilers: Any, by: Any = connection) -> tuple[Any, ...]:
    """All that the rest of Django takes from a compiler."""
    made = compilers.SQLCompiler(queryset.query.chain(), by, "default")
    with transaction.atomic():  # or nothing could be locked
        sql = made.as_sql()
    cols = [selected[0] for selected in made.select[: made.col_count]]
    converters = made.get_converters(cols)
    columns = [(type(col), getattr(col, "target", None), type(col.output_field)) for col in cols]
    composite = made.has_composite_fields(cols)
    refcounts = dict(made.query.alias_refcount)
    kept = {
        place: [each.__qualname__ for each in convs] for place, (convs, _) in converters.items()
    }
    models_of = _models_of(made.klass_info)
    return sql, models_of, made.annotation_col_map, columns, kept, composite, refcounts


def _models_of(klass_info: Any) -> Any:
    if klass_info is None:
        return None
    related = [_models_of(each) for each in klass_info.get("related_klass_infos", ())]
    return klass_info["model"], klass_info["select_fields"], related


QUERIES: dict[str, Callable[[], QuerySet[Any]]] = {
    "all": Dish.objects.all,
    "filter": lambda: Dish.objects.filter(name="x", price__gt=3),
    "a join": lambda: Dish.objects.filter(section__name="x"),
    "a table twice": lambda: Section.objects.filter(dishes__name="a").filter(dishes__name="b"),
    "order": lambda: Dish.objects.order_by("section__name", "-price"),
    "distinct on": lambda: Dish.objects.order_by("section").distinct("section"),
    "slice": lambda: Dish.objects.all()[2:5],
    "lock": lambda: Dish.objects.select_for_update(of=("self",), nowait=True),
    "related": lambda: Dish.objects.select_related("section"),
    "only": lambda: Dish.objects.only("name"),
    "defer": lambda: Dish.objects.defer("name"),
    "values": lambda: Dish.objects.values("name", "price"),
    "annotated": lambda: Dish.objects.annotate(more=F("price") + 1),
    "an alias": lambda: Dish.objects.alias(more=F("price") + 1).filter(more__gt=3),
    "grouped": lambda: Section.objects.annotate(number=models.Count("dishes")),
    "extra": lambda: Dish.objects.extra(select={"one": "1"}),
    "extra, named as a column": lambda: Dish.objects.extra(select={"name": "'x'"}),
    "union": lambda: OrderLine.objects.filter(pk=1).union(OrderLine.objects.filter(pk=2)),
    "a subquery": lambda: Dish.objects.filter(section__in=Section.objects.filter(name="x")),
    "exists": lambda: Section.objects.filter(
        models.Exists(Dish.objects.filter(section=models.OuterRef("pk")))
    ),
    "raw": lambda: Dish.objects.annotate(raw=models.expressions.RawSQL("%s", [1])),
    "a constant": lambda: Dish.objects.annotate(one=Value(1)).filter(Q(one=1)),
    "two foreign keys": lambda: OrderLine.objects.filter(order__status="x"),
}


@pytest.mark.parametrize("name", QUERIES)
def test_a_query_is_compiled_as_by_django_each_time(name: str) -> None:
    expected = compiled(QUERIES[name](), djangos)
    assert [compiled(QUERIES[name](), ours) for _ in range(3)] == [expected] * 3


@pytest.mark.parametrize("first", QUERIES)
def test_what_one_query_leaves_is_right_for_all_others(first: str) -> None:
    compiled(QUERIES[first](), ours)
    for make in QUERIES.values():
        assert compiled(make(), ours) == compiled(make(), djangos)


def test_columns_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("compiled again")

    compiled(Dish.objects.all(), ours)
    monkeypatch.setattr(ours.SQLCompiler, "get_default_columns", refuse)
    compiled(Dish.objects.filter(pk=1), ours)
    with pytest.raises(AssertionError, match="compiled again"):
        compiled(Section.objects.all(), ours)


def test_who_changes_what_was_selected_changes_it_for_himself() -> None:
    expected = compiled(Dish.objects.all(), djangos)
    for _ in range(3):
        made = ours.SQLCompiler(Dish.objects.all().query, connection, "default")
        made.setup_query()
        made.get_converters([col for col, _, _ in made.select])[0] = ([str], None)
        made.select.clear()
        made.klass_info["select_fields"].clear()
        made.klass_info["model"] = made.annotation_col_map["x"] = None
        assert compiled(Dish.objects.all(), ours) == expected


def test_a_query_that_was_only_asked_for_its_columns_is_still_whole() -> None:
    query = Dish.objects.all().query
    ours.SQLCompiler(query, connection, "default").get_select()
    expected = djangos.SQLCompiler(Dish.objects.all().query, connection, "default").as_sql()
    assert ours.SQLCompiler(query, connection, "default").as_sql() == expected


class FewerColumns(ours.SQLCompiler):
    """A compiler of a backend that is derived from ours."""

    def get_default_columns(self, *args: Any, **kwargs: Any) -> Any:
        return super().get_default_columns(*args, **kwargs)[:1]


@pytest.mark.parametrize("first", [ours.SQLCompiler, FewerColumns])
def test_a_compiler_of_somebody_elses_is_asked_each_time_and_for_itself(first: Any) -> None:
    for each in (first, FewerColumns, ours.SQLCompiler, FewerColumns):
        made = each(Tag.objects.all().query, connection, "default")
        made.as_sql()
        assert len(made.select) == (1 if each is FewerColumns else 2)


def test_operations_that_convert_what_others_do_not_are_asked_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Operations(DatabaseOperations):
        given: Any = ()

        def get_db_converters(self, expression: Any) -> Any:
            return [*self.given]

    other = copy.copy(connections["default"])
    other.ops = Operations(other)
    assert compiled(Tag.objects.all(), ours)[4] == {}
    assert compiled(Tag.objects.all(), ours, other)[4] == {}
    monkeypatch.setattr(Operations, "given", (str,))
    assert compiled(Tag.objects.all(), ours, other)[4] == {0: ["str"], 1: ["str"]}
    assert compiled(Tag.objects.all(), ours)[4] == {}


class Shouting(models.CharField):
    """A field that says how it is selected."""

    how = "upper(%s)"

    def select_format(self, compiler: Any, sql: str, params: Any) -> Any:
        return self.how % sql, params


def make_model(**fields: Any) -> Any:
    """A model that nothing else knows."""
    meta = type("Meta", (), {"app_label": "library", "apps": Apps()})
    return type("Made", (models.Model,), {"__module__": __name__, "Meta": meta, **fields})


def test_a_field_that_says_how_it_is_selected_is_asked_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model(name=Shouting(max_length=9))
    assert 'upper("library_made"."name")' in compiled(model._base_manager.all(), ours)[0][0]
    monkeypatch.setattr(Shouting, "how", "lower(%s)")
    assert 'lower("library_made"."name")' in compiled(model._base_manager.all(), ours)[0][0]


def test_a_field_that_was_given_a_way_to_be_selected_is_asked_each_time() -> None:
    model = make_model(name=models.CharField(max_length=9))
    field: Any = model._meta.get_field("name")
    field.select_format = lambda compiler, sql, params: (f"trim({sql})", params)
    compiled(model._base_manager.all(), ours)
    field.select_format = lambda compiler, sql, params: (f"upper({sql})", params)
    assert 'upper("library_made"."name")' in compiled(model._base_manager.all(), ours)[0][0]


def test_a_field_that_depends_on_the_connection_is_asked_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Converted(models.IntegerField):
        given: Any = ()

        def get_db_converters(self, connection: Any) -> Any:
            return [*self.given]

    model = make_model(number=Converted())
    assert compiled(model._base_manager.all(), ours)[4] == {}
    monkeypatch.setattr(Converted, "given", (str,))
    assert compiled(model._base_manager.all(), ours)[4] == {1: ["str"]}


def test_a_model_that_gets_a_field_or_another_table_is_compiled_anew() -> None:
    # Django itself keeps what it made of some fields, whatever the table; not of a foreign key.
    model = make_model(tag=models.ForeignKey(Tag, models.CASCADE))
    for _ in range(2):
        assert compiled(model._base_manager.all(), ours) == compiled(
            model._base_manager.all(), djangos
        )
    model.add_to_class("number", models.IntegerField(default=0))
    assert '"library_made"."number"' in compiled(model._base_manager.all(), ours)[0][0]
    model._meta.db_table = "moved"
    assert compiled(model._base_manager.all(), ours) == compiled(model._base_manager.all(), djangos)
    assert ' FROM "moved"' in compiled(model._base_manager.all(), ours)[0][0]


def test_a_field_that_comes_while_the_columns_are_compiled_is_not_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As by another thread."""
    model = make_model(name=models.CharField(max_length=9))
    get_default_columns = djangos.SQLCompiler.get_default_columns

    def compile_and_add(self: Any, *args: Any, **kwargs: Any) -> Any:
        columns = get_default_columns(self, *args, **kwargs)
        monkeypatch.undo()
        model.add_to_class("number", models.IntegerField(default=0))
        return columns

    monkeypatch.setattr(ours.SQLCompiler, "get_default_columns", compile_and_add)
    compiled(model._base_manager.all(), ours)
    for _ in range(2):
        assert '"library_made"."number"' in compiled(model._base_manager.all(), ours)[0][0]


def test_inherited_columns_are_compiled_as_by_django() -> None:
    parent = make_model(name=models.CharField(max_length=9))
    meta = type("Meta", (), {"app_label": "library", "apps": parent._meta.apps})
    members = {"__module__": __name__, "Meta": meta, "number": models.IntegerField()}
    child = type("Child", (parent,), members)
    proxied = type("Meta", (), {"app_label": "library", "apps": parent._meta.apps, "proxy": True})
    proxy = type("Proxy", (parent,), {"__module__": __name__, "Meta": proxied})
    for model in (child, parent, proxy) * 2:
        made: Any = model
        assert compiled(made._base_manager.all(), ours) == compiled(
            made._base_manager.all(), djangos
        )


def test_what_is_known_goes_with_the_model() -> None:
    model = make_model(name=models.CharField(max_length=9))
    compiled(model._base_manager.all(), ours)
    assert "_pgbackend_columns" in vars(model._meta)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
