"""Tests that the compilers write the SQL that Django's write, also from their caches."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from unittest import mock
from uuid import UUID

import django
import pytest
from django.apps.registry import Apps
from django.core.exceptions import EmptyResultSet
from django.db import connection, connections, models, transaction
from django.db.backends.postgresql import compiler as djangos
from django.db.backends.postgresql.operations import DatabaseOperations as DjangosOperations
from django.db.models import F, Q, QuerySet, Value, functions, lookups
from django.db.models.constants import OnConflict
from django.db.models.expressions import Col, CombinedExpression
from django.db.models.sql.compiler import SQLCompiler, SQLInsertCompiler, SQLUpdateCompiler
from django.db.models.sql.datastructures import BaseTable
from django.db.models.sql.query import ExplainInfo
from django.db.models.sql.subqueries import DeleteQuery, InsertQuery, UpdateQuery
from django.db.models.sql.where import OR, XOR, WhereNode

from kitchen.models import Dish, Order, OrderLine, Section
from pgbackend import compiler as ours
from pgbackend.fast import insert
from pgbackend.fast.cached_fields import MOST_STATEMENTS
from pgbackend.operations import DatabaseOperations
from tests.library.models import Tag


@pytest.fixture(autouse=True)
def _nothing_is_known() -> Iterator[None]:
    for model in (Dish, Order, OrderLine, Section, Tag):
        for name in ("_pgbackend_columns", "_pgbackend_inserts", "_pgbackend_row_constructor"):
            vars(model._meta).pop(name, None)
    yield


def compiled(queryset: QuerySet[Any], compilers: Any, by: Any = connection) -> tuple[Any, ...]:
    """Return everything that the rest of Django takes from a compiler."""
    made = compilers.SQLCompiler(queryset.query.chain(), by, "default")
    with transaction.atomic():  # or rows could not be locked
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
    return klass_info["model"]._meta.model, klass_info["select_fields"], related


def changed(queryset: QuerySet[Any], **attributes: Any) -> QuerySet[Any]:
    """Set attributes of the query for which the queryset has no method; return the queryset."""
    vars(queryset.query).update(attributes)
    return queryset


def where_is(queryset: QuerySet[Any], **attributes: Any) -> QuerySet[Any]:
    vars(queryset.query.where).update(attributes)
    return queryset


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
    "one row": lambda: Dish.objects.order_by().filter(pk=7)[:21],
    "by a foreign key": lambda: Dish.objects.order_by().filter(section=7),
    "by the key of a foreign key": lambda: Dish.objects.order_by().filter(section__pk__lt=7),
    "by a boolean": lambda: Dish.objects.order_by().filter(available=True),
    "by no boolean": lambda: Dish.objects.order_by().filter(available=False),
    "by an integer that is given as a boolean": lambda: Dish.objects.filter(position=True),
    "by null": lambda: Order.objects.filter(promised_minutes=None),
    "by a column": lambda: Dish.objects.filter(position__gt=F("section_id")),
    "by an expression": lambda: Dish.objects.filter(position__lte=F("section_id") + 1),
    "by an aggregate": lambda: Section.objects.annotate(n=models.Count("dishes")).filter(n__gt=1),
    "by a subquery": lambda: Dish.objects.filter(section=Section.objects.filter(pk=1)[:1]),
    "by a number too large, or": lambda: Dish.objects.filter(Q(position=1 << 40) | Q(pk=1)),
    "not by a number too large": lambda: Dish.objects.exclude(position=1 << 40),
    "not": lambda: Dish.objects.order_by().exclude(pk=7),
    "or": lambda: Dish.objects.filter(Q(pk=7) | Q(price__gte="1.50")),
    "xor": lambda: Dish.objects.filter(Q(pk=7) ^ Q(price__gte="1.50")),
    "in": lambda: Dish.objects.filter(pk__in=[1, 2]),
    "in nothing": lambda: Dish.objects.exclude(pk__in=[]),
    "as text": lambda: Dish.objects.filter(name__icontains="x", price__startswith="1"),
    "by a part of a date": lambda: Order.objects.filter(created_at__year__gt=2020),
    "where, in SQL": lambda: Dish.objects.extra(where=["name = %s"], params=["x"]),
    "another table": lambda: Dish.objects.order_by().extra(tables=["kitchen_section"]),
    "ordered by chance": lambda: Dish.objects.order_by("?")[:1],
    "ordered in SQL, else not": lambda: Tag.objects.extra(order_by=["-name"]),
    "explained": lambda: changed(Tag.objects.all(), explain_info=ExplainInfo("json", {})),
    "not, as a whole": lambda: where_is(Tag.objects.filter(pk=1), negated=True),
    "resolved": lambda: where_is(Tag.objects.filter(pk=1), resolved=True),
    "xor of one": lambda: where_is(Tag.objects.filter(pk=1), connector=XOR),
    "or of one": lambda: where_is(Tag.objects.filter(pk=1), connector=OR),
    "by a window": lambda: Tag.objects.filter(pk=models.Window(functions.RowNumber())),
    "by a window, not": lambda: Tag.objects.exclude(pk__gt=models.Window(functions.RowNumber())),
    "grouped by its columns": lambda: changed(Tag.objects.all(), group_by=True),
    "ordered, in SQL": lambda: Dish.objects.extra(order_by=["-price"]),
    "ordered by an expression": lambda: Dish.objects.filter(pk=1).order_by(F("price") * 2),
    "ordered by a relation": lambda: OrderLine.objects.filter(pk=1).order_by("dish__section")[3:],
    "reversed": lambda: Order.objects.filter(status="x").reverse()[:1],
    "ordered by a parameter": lambda: Tag.objects.order_by(models.expressions.RawSQL("%s", ["1"])),
    "filtered as a relation": lambda: Section.objects.alias(
        cheap=models.FilteredRelation("dishes", condition=Q(dishes__price__lt=3))
    ).filter(cheap__name="x"),
    "a join that is not needed any more": lambda: Dish.objects.filter(section__pk=1),
}


@pytest.mark.parametrize("name", QUERIES)
def test_a_query_is_compiled_as_by_django_each_time(name: str) -> None:
    expected = compiled(QUERIES[name](), djangos)
    assert [compiled(QUERIES[name](), ours) for _ in range(3)] == [expected] * 3


@pytest.mark.sweep(one_in=4)
@pytest.mark.parametrize("first", QUERIES)
def test_what_one_query_leaves_is_right_for_all_others(first: str) -> None:
    compiled(QUERIES[first](), ours)
    for make in QUERIES.values():
        assert compiled(make(), ours) == compiled(make(), djangos)


@pytest.mark.parametrize("name", QUERIES)
def test_the_same_query_is_compiled_to_the_same_each_time(name: str) -> None:
    queries = [QUERIES[name]().query for _ in range(2)]
    for _ in range(3):
        told = []
        for query, compilers in zip(queries, (djangos, ours), strict=True):
            with transaction.atomic():
                sql = compilers.SQLCompiler(query, connection, "default").as_sql()
            told.append((sql, query.alias_refcount))
        assert told[0] == told[1]


def test_a_query_of_no_model_is_compiled() -> None:
    """Constraints are validated by such queries."""
    for _ in range(2):
        assert Q(price__gt=3).check({"price": 4})
        assert not Q(price__gt=3).check({"price": 2})


NOTHING: dict[str, Callable[[], QuerySet[Any]]] = {
    "none": Dish.objects.none,
    "a number too large": lambda: Dish.objects.filter(position=1 << 40),
    "a number too large, and": lambda: Dish.objects.filter(position=1 << 40, pk=1),
    "in nothing": lambda: Dish.objects.filter(pk__in=[]),
}


@pytest.mark.parametrize("name", NOTHING)
def test_what_cannot_be_found_is_not_asked_for_unless_django_needs_the_statement(name: str) -> None:
    Dish.objects.first()  # cache the columns
    counted = []
    for compilers in (djangos, ours):
        query = NOTHING[name]().query
        with pytest.raises(EmptyResultSet):
            compilers.SQLCompiler(query, connection, "default").as_sql()
        counted.append(query.alias_refcount)
    assert counted[0] == counted[1]
    told = {
        compilers.SQLCompiler(NOTHING[name]().query, connection, "default", False).as_sql()
        for compilers in (djangos, ours)
    }
    assert len(told) == 1
    assert " WHERE 0 = 1" in told.pop()[0]


def test_limits_can_be_left_out() -> None:
    for _ in range(2):
        first, second = (
            compilers.SQLCompiler(Dish.objects.all()[:3].query, connection, "default")
            for compilers in (djangos, ours)
        )
        assert first.as_sql(with_limits=False) == second.as_sql(with_limits=False)


def test_all_that_a_compiler_finds_out_is_left_on_it() -> None:
    names = ("col_count", "has_extra_select", "having", "qualify", "_meta_ordering")
    for make in QUERIES.values():
        found = []
        for compilers in (djangos, ours, ours):
            query = make().query
            made = compilers.SQLCompiler(query, connection, "default")
            with transaction.atomic():
                made.as_sql()
            found.append([getattr(made, name) for name in names] + [made.where is query.where])
            assert found[0] == found[-1]


LOOKUPS = {
    f"{field}__{lookup}={value!r}": Q(**{f"{field}__{lookup}": value})
    for field, values in {
        "pk": (1, "1", None, True, F("position")),
        "position": (1, 1.5, F("pk"), Value(3)),
        "price": ("1.20", F("position")),
        "name": ("x", F("description"), 7),
        "section": (1, F("position")),
    }.items()
    for lookup in ("exact", "gt", "gte", "lt", "lte")
    for value in values
    if value is not None or lookup == "exact"
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_a_lookup_is_compiled_to_the_same_in_the_same_types(name: str) -> None:
    query = Dish.objects.filter(LOOKUPS[name]).query
    told = [
        compilers.SQLCompiler(query, connection, "default").compile(query.where.children[0])
        for compilers in (djangos, ours)
    ]
    assert told[0] == told[1]
    assert type(told[0][1]) is type(told[1][1])


def mine(*args: Any) -> Any:
    return "mine", []


#: The functions of Django that somebody may have patched, and a patch for each.
PATCHES: dict[tuple[Any, str], Any] = {
    (lookups.IntegerFieldExact, "as_sql"): mine,
    (lookups.IntegerFieldExact, "as_postgresql"): mine,
    (lookups.IntegerFieldExact, "process_lhs"): mine,
    (lookups.IntegerFieldExact, "get_rhs_op"): lambda *args: "mine",
    (lookups.Exact, "as_sql"): mine,
    (lookups.BuiltinLookup, "as_sql"): mine,
    (lookups.BuiltinLookup, "process_lhs"): mine,
    (lookups.Lookup, "process_lhs"): mine,
    (Col, "as_sql"): mine,
    (Col, "resolve_expression"): lambda self, *args: Value("mine"),
    (WhereNode, "as_sql"): mine,
    (WhereNode, "as_postgresql"): mine,
    (SQLCompiler, "as_sql"): lambda self, **kwargs: ("mine", ()),
    (SQLCompiler, "compile"): lambda self, node: ("mine", ()),
    (SQLCompiler, "pre_sql_setup"): lambda self, **kwargs: pytest.fail("mine"),
    (SQLCompiler, "setup_query"): lambda self, **kwargs: pytest.fail("mine"),
    (SQLCompiler, "get_select"): lambda self, **kwargs: pytest.fail("mine"),
    (SQLCompiler, "get_extra_select"): lambda self, *args: pytest.fail("mine"),
}


def told(query: Any, compilers: Any) -> Any:
    try:
        return compilers.SQLCompiler(query, connection, "default").as_sql()
    except pytest.fail.Exception as exc:
        return str(exc)


@pytest.mark.parametrize(("owner", "name"), PATCHES)
def test_what_somebody_has_patched_says_what_it_likes(owner: Any, name: str) -> None:
    Section.objects.first()
    one = Section.objects.order_by().filter(pk=1).query
    two = Section.objects.order_by().filter(pk=1, position=2).query
    related = Dish.objects.order_by().filter(section=1).query
    with mock.patch.object(owner, name, PATCHES[owner, name], create=True):
        for query in (one, two, related):
            assert told(query, ours) == told(query, djangos)
        assert "mine" in str(told(one, ours)) + str(told(related, ours))


#: The same for the compilers of INSERT and UPDATE.
OTHER_PATCHES: dict[tuple[Any, str], Any] = {
    (SQLUpdateCompiler, "as_sql"): lambda self: ("mine", ()),
    (SQLUpdateCompiler, "pre_sql_setup"): lambda self: pytest.fail("mine"),
    (CombinedExpression, "resolve_expression"): lambda self, *args, **kwargs: Value("mine"),
    (Value, "resolve_expression"): lambda self, *args, **kwargs: pytest.fail("mine"),
    (Col, "resolve_expression"): lambda self, *args, **kwargs: pytest.fail("mine"),
    (SQLInsertCompiler, "as_sql"): lambda self: [("mine", ())],
    (SQLInsertCompiler, "pre_save_val"): lambda self, field, row: "mine",
    (SQLInsertCompiler, "prepare_value"): lambda self, field, value: "mine",
    (SQLInsertCompiler, "field_as_sql"): lambda self, *args: ("mine", []),
    (SQLInsertCompiler, "assemble_as_sql"): lambda self, *args: ([["mine"]], [[]]),
    (DatabaseOperations, "modify_insert_params"): lambda self, *args: ["mine"],
    (DatabaseOperations, "insert_statement"): lambda self, **kwargs: "mine",
    (DatabaseOperations, "bulk_insert_sql"): lambda self, *args: "mine",
    (DatabaseOperations, "on_conflict_suffix_sql"): lambda self, *args: "mine",
}


@pytest.mark.parametrize(("owner", "name"), OTHER_PATCHES)
def test_what_somebody_has_patched_writes_as_it_likes(owner: Any, name: str) -> None:
    insert = InsertQuery(Tag)
    insert.insert_values([Tag._meta.get_field("name")], [Tag(name="x")])
    update = Tag.objects.filter(pk=1).query.chain(UpdateQuery)
    update.add_update_values({"name": F("name") + Value("x")})

    def written(compilers: Any) -> Any:
        try:
            return (
                compilers.SQLInsertCompiler(insert, connection, "default").as_sql(),
                compilers.SQLUpdateCompiler(update, connection, "default").as_sql(),
            )
        except pytest.fail.Exception as exc:
            return str(exc)

    with mock.patch.object(owner, name, OTHER_PATCHES[owner, name]):
        assert written(ours) == written(djangos)
        assert "mine" in str(written(ours))


@pytest.mark.sweep(one_in=3)
@pytest.mark.parametrize(
    "patch", ["mine", "functools.wraps(as_sql)(mine)", "mock.Mock(side_effect=mine)"]
)
def test_what_was_patched_before_the_backend_was_loaded_is_seen(patch: str) -> None:
    """An `AppConfig.ready()` may patch before the first query loads the compilers."""
    code = f"""
import functools, django
from unittest import mock
django.setup()
from django.db.models import lookups
as_sql = lookups.BuiltinLookup.as_sql
def mine(*args):
    return "mine", ()
lookups.BuiltinLookup.as_sql = {patch}
from tests.library.models import Tag
for _ in range(2):
    print(Tag.objects.filter(pk=1).query)
"""
    environment = {**os.environ, "DJANGO_SETTINGS_MODULE": "tests.settings"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" WHERE mine") == 2


def test_a_table_of_somebody_elses_is_asked() -> None:
    class Sample(BaseTable):
        def as_sql(self, compiler: Any, connection: Any) -> Any:
            return "mine", [3]

    Tag.objects.first()
    query = Tag.objects.filter(pk=1).query
    query.alias_map["library_tag"] = Sample("library_tag", "library_tag")
    assert told(query, ours) == told(query, djangos)
    assert " FROM mine " in told(query, ours)[0]


def test_who_is_told_that_a_value_will_be_saved_is_told_once() -> None:
    class Counted(models.IntegerField):
        told = 0

        def get_db_prep_save(self, value: Any, connection: Any) -> Any:
            Counted.told += 1
            return super().get_db_prep_save(value, connection)

    model = make_model(number=Counted(), other=models.IntegerField(), name=Upper(max_length=9))
    for values in ({"number": 1}, {"number": 1, "other": F("pk")}, {"number": 1, "name": "x"}):
        Counted.told = 0
        query = model._base_manager.filter(pk=1).query.chain(UpdateQuery)
        query.add_update_values(values)
        ours.SQLUpdateCompiler(query, connection, "default").as_sql()
        assert Counted.told == 1


def test_a_query_counts_its_tables_as_djangos() -> None:
    class Named(models.Func):
        """Looks for a name when it is compiled."""

        def as_sql(self, compiler: Any, connection: Any, **kwargs: Any) -> Any:
            F("name").resolve_expression(compiler.query)
            return "1 = 1", []

    condition = Named(output_field=models.BooleanField())
    counted = []
    for compilers in (djangos, ours):
        query = Tag.objects.filter(condition).query
        for _ in range(2):
            told(query, compilers)
        update = Tag.objects.filter(pk=1).query.chain(UpdateQuery)
        update.add_update_values({"name": "x"})
        compilers.SQLUpdateCompiler(update, connection, "default").as_sql()
        counted.append((query.alias_refcount, update.alias_refcount))
    assert counted[0] == counted[1]


def test_a_wrapper_compares_by_operators_of_its_own() -> None:
    other = copy.copy(connections["default"])
    other.operators = {**connection.operators, "exact": "IS NOT DISTINCT FROM %s"}
    query = Tag.objects.filter(pk=1)
    for by in (connection, other, connection, other):
        sql, _ = query.query.get_compiler(connection=by).as_sql()
        assert ("IS NOT DISTINCT FROM %s" in sql) is (by is other)


def test_a_lookup_says_what_it_compares_with(monkeypatch: pytest.MonkeyPatch) -> None:
    query = Tag.objects.filter(name="x")
    for _ in range(2):  # the second time it is cached
        assert compiled(query, ours) == compiled(query, djangos)

    def prepared(self: Any, value: Any, connection: Any) -> Any:
        return "upper(%s)", [value]

    with monkeypatch.context() as patches:
        patches.setattr(lookups.Exact, "get_db_prep_lookup", prepared)
        assert compiled(query, ours) == compiled(query, djangos)
        assert "upper(%s)" in compiled(query, ours)[0][0]


def test_a_statement_that_is_known_is_no_others() -> None:
    some = Tag.objects.filter(pk=1)
    queries = [
        *(some, some[:1], some[:21], some[3:5], some[2:]),
        *(Tag.objects.filter(pk=2), Tag.objects.filter(name="x"), Tag.objects.filter(pk__gt=1)),
        *(Tag.objects.filter(pk__lt=1)[:1], Dish.objects.filter(pk=1), Tag.objects.exclude(pk=1)),
    ]
    for query in [*queries, *queries]:
        assert compiled(query, ours) == compiled(query, djangos)
        made = [
            each.SQLCompiler(query.query.chain(), connection, "default") for each in (ours, djangos)
        ]
        assert made[0].as_sql(with_limits=False) == made[1].as_sql(with_limits=False)


class Cents(models.IntegerField):
    def get_db_prep_value(self, value: Any, connection: Any, prepared: bool = False) -> Any:
        return value * 100


@pytest.fixture
def numbers() -> Any:
    """Make a model of which nothing is cached yet."""

    class Numbers(models.Model):
        auto = models.BigAutoField(primary_key=True)
        whole = models.IntegerField()
        big = models.BigIntegerField()
        small = models.SmallIntegerField()
        positive = models.PositiveIntegerField()
        cents = Cents()
        given = models.IntegerField()
        other = models.ForeignKey("self", models.CASCADE)

        class Meta:
            app_label = "numbers"
            apps = Apps()

        def __str__(self) -> str:
            return str(self.pk)

    given: Any = Numbers._meta.get_field("given")
    given.get_db_prep_value = lambda value, connection, prepared=False: value + 1
    return Numbers


def sent(query: QuerySet[Any], compilers: Any) -> Any:
    """Return the SQL of the query, and its parameters with their types."""
    try:
        sql, params = compilers.SQLCompiler(query.query.chain(), connection, "default").as_sql()
    except EmptyResultSet:
        return "nothing can be found"
    return sql, [(type(each), each) for each in params]


FIELDS = ("auto", "whole", "big", "small", "positive", "cents", "given", "other")
VALUES = (5, 0, -5, 32767, 32768, -32769, 2**31 - 1, 2**31, 2**63 - 1, 2**63, "7", 1.5, True)


@pytest.mark.parametrize("lookup", ["exact", "gt", "lte"])
@pytest.mark.parametrize("field", FIELDS)
def test_a_number_is_sent_as_django_sends_it(numbers: Any, field: str, lookup: str) -> None:
    for value in (*VALUES, *reversed(VALUES)):
        query = numbers._base_manager.filter(**{f"{field}__{lookup}": value})
        assert sent(query, ours) == sent(query, djangos), value


def comparing(model: Any, *lookup: Any) -> QuerySet[Any]:
    """Return a query with a lookup that has not been prepared."""
    query = model._base_manager.all()
    query.query.get_initial_alias()
    query.query.where.add(lookups.IntegerFieldExact(*lookup), "AND")
    return query


def test_a_number_is_sent_as_the_field_says_that_it_is_compared_with(numbers: Any) -> None:
    """A `Col` may have another field than its column's own, as target or as output field."""
    query = numbers._base_manager.filter(whole=5)
    assert sent(query, ours) == sent(query, djangos)
    col = query.query.where.children[0].lhs
    cents = copy.copy(numbers._meta.get_field("cents"))
    cents.column = "whole"
    for other in (Col(col.alias, col.target, cents), Col(col.alias, cents), col):
        query = comparing(numbers, other, 5)
        assert sent(query, ours) == sent(query, djangos)


def test_what_no_number_was_sent_for_says_nothing_of_numbers(numbers: Any) -> None:
    col = numbers._meta.get_field("auto").get_col("numbers_numbers")
    lookup = comparing(numbers, col, 5)
    lookup.query.where.children[0].rhs = "5"
    for query in (lookup, lookup, numbers._base_manager.filter(auto=5), lookup):
        assert sent(query, ours) == sent(query, djangos)


def test_operations_that_send_numbers_in_their_own_way_are_asked(numbers: Any) -> None:
    class Operations(DatabaseOperations):
        def adapt_integerfield_value(self, value: Any, internal_type: str) -> Any:
            return super().adapt_integerfield_value(value + 1, internal_type)

    wrapper = copy.copy(connections["default"])
    wrapper.ops = Operations(wrapper)
    query = numbers._base_manager.filter(whole=5)
    for _ in range(4):
        made = ours.SQLCompiler(query.query.chain(), wrapper, "default")
        assert made.as_sql()[1] == (6,)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (lookups.IntegerFieldOverflow, "process_rhs"),
        (lookups.Exact, "process_rhs"),
        (lookups.Lookup, "process_rhs"),
        (lookups.FieldGetDbPrepValueMixin, "get_db_prep_lookup"),
        (models.IntegerField, "get_db_prep_value"),
        (models.Field, "get_db_prep_value"),
        (models.fields.AutoFieldMixin, "get_db_prep_value"),
        (DjangosOperations, "adapt_integerfield_value"),
        (DjangosOperations, "integer_field_range"),
    ],
)
def test_who_patches_how_a_number_is_sent_is_asked(owner: Any, name: str) -> None:
    asked: list[Any] = []
    original = getattr(owner, name)

    def patched(*args: Any, **kwargs: Any) -> Any:
        asked.append(args)
        return original(*args, **kwargs)

    queries = [Tag.objects.filter(pk=1), Section.objects.filter(position=1).order_by()]
    for query in (*queries, *queries):
        sent(query, ours)
    with mock.patch.object(owner, name, patched):
        for query in queries:
            assert sent(query, ours) == sent(query, djangos)
        times = len(asked)
        for query in queries:
            sent(query, djangos)
    assert times == 2 * (len(asked) - times) > 0


@pytest.mark.shortcut("known")
def test_statements_of_many_pages_are_not_all_kept() -> None:
    for page in range(200):
        str(Tag.objects.filter(pk=1)[page : page + 1].query)
    assert 0 < len(Tag._meta._pgbackend_columns.statements) <= 64


def test_operations_that_cast_a_column_are_asked() -> None:
    class Operations(DatabaseOperations):
        def lookup_cast(self, lookup_type: str, internal_type: str | None = None) -> str:
            return "abs(%s)"

    class OldOperations(DatabaseOperations):
        def field_cast_sql(self, db_type: str, internal_type: str) -> str:
            return "abs(%s)"

    for operations in (Operations, OldOperations):
        other = copy.copy(connections["default"])
        other.ops = operations(other)
        query = Tag.objects.filter(pk=1).query
        with warnings.catch_warnings(action="ignore"):
            assert ours.SQLCompiler(query, other, "default").as_sql() == (
                djangos.SQLCompiler(query, other, "default").as_sql()
            )


class Now(models.DateTimeField):
    """Has a placeholder of its own, under the names of all releases of Django."""

    def get_placeholder(self, value: Any, compiler: Any, connection: Any) -> str:
        return "least(%s, now())"

    def get_placeholder_sql(self, value: Any, compiler: Any, connection: Any) -> Any:
        return "least(%s, now())", (value,)


class Upper(models.CharField):
    """Becomes an expression when it is saved."""

    def get_db_prep_save(self, value: Any, connection: Any) -> Any:
        return models.functions.Upper(Value(value))


UPDATES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "a row": lambda: (Dish.objects.filter(pk=1), {"name": "x", "price": Decimal(3)}),
    "null": lambda: (Order.objects.filter(pk=1), {"promised_minutes": None, "note": ""}),
    "of another type": lambda: (Dish.objects.filter(pk=1), {"position": "3", "available": 1}),
    "all": lambda: (Dish.objects.all(), {"name": "x"}),
    "some": lambda: (Dish.objects.filter(section=1), {"available": False}),
    "by two": lambda: (Dish.objects.filter(pk=1, name="y"), {"name": "x"}),
    "not": lambda: (Dish.objects.exclude(pk=1), {"name": "x"}),
    "by a column": lambda: (Dish.objects.filter(position=F("pk")), {"name": "x"}),
    "by a join": lambda: (Dish.objects.filter(section__name="y"), {"name": "x"}),
    "an expression": lambda: (Dish.objects.filter(pk=1), {"position": F("position") + 1}),
    "computed": lambda: (
        Dish.objects.filter(pk=1),
        {
            "position": 2 * F("position") - (F("id") + Value(3)) % 7,
            "price": F("price") * Decimal(2),
        },
    ),
    "of another column": lambda: (Dish.objects.filter(pk=1), {"position": F("id")}),
    "a value": lambda: (Dish.objects.filter(pk=1), {"position": Value(3)}),
    "a later time": lambda: (
        Order.objects.filter(pk=1),
        {"created_at": F("created_at") + timedelta(1)},
    ),
    "of a function": lambda: (
        Dish.objects.filter(pk=1),
        {"position": functions.Abs("position") + 1, "name": functions.Upper(F("name"))},
    ),
    "of an annotation": lambda: (
        Dish.objects.annotate(more=F("position") + 1).filter(pk=1),
        {"position": F("more") + 1},
    ),
    "a choice": lambda: (
        Dish.objects.filter(pk=1),
        {"position": models.Case(models.When(pk=1, then=Value(3)), default=Value(4)) + 1},
    ),
    "a subquery": lambda: (
        Dish.objects.filter(pk=1),
        {"position": models.Subquery(Section.objects.values("pk")[:1])},
    ),
    "an instance": lambda: (Dish.objects.filter(pk=1), {"section": Section(pk=3)}),
    "a key": lambda: (Dish.objects.filter(pk=1), {"section": 3}),
    "named in SQL": lambda: (
        Dish.objects.extra(select={"name": "'y'"}).filter(pk=1),
        {"name": "x"},
    ),
    "nothing": lambda: (Dish.objects.filter(pk=1), {}),
    "all that are less than any": lambda: (
        Dish.objects.filter(position__lt=10**12),
        {"name": "x"},
    ),
    "values and an expression": lambda: (
        Order.objects.filter(pk=1),
        {"note": "x", "promised_minutes": F("promised_minutes") + 1},
    ),
    "ordered": lambda: (Dish.objects.filter(pk=1).order_by("name"), {"name": "x"}),
    "a date": lambda: (
        Order.objects.filter(pk=1),
        {"created_at": NOW},
    ),
    "a placeholder": lambda: (
        make_model(at=Now())._base_manager.filter(pk=1),
        {"at": NOW},
    ),
    "saved as an expression": lambda: (
        make_model(name=Upper(max_length=9))._base_manager.filter(pk=1),
        {"name": "x"},
    ),
    "a mapping": lambda: (
        make_model(data=models.JSONField())._base_manager.filter(pk=1),
        {"data": {}},
    ),
    "a parent's": lambda: (make_child()._base_manager.filter(pk=1), {"name": "x", "number": 3}),
    "a parent's, by its own": lambda: (
        make_child()._base_manager.filter(number=1),
        {"name": "x", "number": 3},
    ),
}


def make_child() -> Any:
    parent = make_model(name=models.CharField(max_length=9))
    meta = type("Meta", (), {"app_label": "library", "apps": parent._meta.apps})
    members = {"__module__": __name__, "Meta": meta, "number": models.IntegerField()}
    return type("Child", (parent,), members)


@pytest.mark.parametrize("name", UPDATES)
def test_an_update_is_compiled_as_by_django(name: str) -> None:
    found, values = UPDATES[name]()

    def compiled_by(compilers: Any) -> Any:
        query = found.query.chain(UpdateQuery)
        query.add_update_values(values)
        made = compilers.SQLUpdateCompiler(query, connection, "default")
        sql, params = made.as_sql()
        return sql, [(type(each), str(each)) for each in params], query.related_updates

    if name.startswith("a parent's"):  # Django looks first for the keys of the parents
        with connection.schema_editor() as editor, contextlib.ExitStack() as tables:
            for model in (found.model.__mro__[1], found.model):
                editor.create_model(model)
                tables.callback(editor.delete_model, model)
            found.model._base_manager.create(name="y", number=1)
            assert compiled_by(ours) == compiled_by(djangos)
    else:
        assert compiled_by(ours) == compiled_by(djangos)


@pytest.mark.skipif(django.VERSION < (6, 0), reason="Django 6.0 has it")
def test_an_update_that_returns_columns_is_djangos() -> None:
    query = Dish.objects.filter(pk=1).query.chain(UpdateQuery)
    query.add_update_values({"name": "x"})
    told = []
    for compilers in (djangos, ours):
        made = compilers.SQLUpdateCompiler(query.clone(), connection, "default")
        made.returning_fields = [Dish._meta.pk]
        told.append(made.as_sql())
    assert told[0] == told[1]
    assert "RETURNING" in told[0][0]


NOW = datetime(2026, 1, 1, tzinfo=UTC)

INSERTS: dict[str, Callable[[], Any]] = {
    "a row": lambda: [Dish(section_id=1, name="x", price=Decimal(3))],
    "with its key": lambda: [Tag(pk=7, name="x")],
    "null": lambda: [Order(table="7", promised_minutes=None)],
    "of other types": lambda: [Dish(section_id="1", name=7, price="1.50", position=True)],
    "rows": lambda: [Tag(name="x"), Tag(name="y")],
    "an expression": lambda: [Tag(name=models.functions.Lower(Value("X")))],
    "a string of its own type": lambda: [Order(table="7", status=Order.Status.READY)],
    "nothing but a key": lambda: [make_model()()],
    "a placeholder": lambda: [make_model(at=Now())(at=NOW)],
    "saved as an expression": lambda: [make_model(name=Upper(max_length=9))(name="x")],
    "a mapping": lambda: [make_model(data=models.JSONField())(data={"a": [1]})],
    "a default of the database": lambda: [
        make_model(at=models.DateTimeField(db_default=models.functions.Now()))()
    ],
    "a UUID": lambda: [make_model(code=models.UUIDField())(code=UUID(int=7))],
}


def inserted_by(compilers: Any, rows: list[Any], *, returning: bool = True, **how: Any) -> Any:
    model = type(rows[0])
    raw = how.pop("raw", False)
    query = InsertQuery(model, **how)
    fields = [each for each in model._meta.concrete_fields if not each.primary_key or rows[0].pk]
    query.insert_values(fields, rows, raw=raw)
    made = compilers.SQLInsertCompiler(query, connection, "default")
    made.returning_fields = model._meta.db_returning_fields if returning else None
    with mock.patch("django.utils.timezone.now", return_value=NOW):
        told = made.as_sql()
    for row in rows:
        assert vars(row).get("created_at", NOW) == NOW  # the row is as if it had been saved
    params = [[(type(each), str(each)) for each in params] for _, params in told]
    return [sql for sql, _ in told], [type(each) for _, each in told], params, made.returning_params


@pytest.mark.parametrize("returning", [True, False])
@pytest.mark.parametrize("name", INSERTS)
def test_an_insert_is_compiled_as_by_django(name: str, returning: bool) -> None:
    rows = INSERTS[name]()
    expected = inserted_by(djangos, rows, returning=returning)
    assert inserted_by(ours, rows, returning=returning) == expected


@pytest.mark.parametrize(
    "how",
    [
        {"on_conflict": OnConflict.IGNORE},
        {
            "on_conflict": OnConflict.UPDATE,
            "update_fields": [Tag._meta.get_field("name")],
            "unique_fields": [Tag._meta.pk],
        },
    ],
)
def test_an_insert_in_another_way_is_djangos(how: dict[str, Any]) -> None:
    rows = [Tag(pk=1, name="x")]
    assert inserted_by(ours, rows, **how) == inserted_by(djangos, rows, **how)


def test_what_is_loaded_from_a_fixture_is_inserted_as_it_is() -> None:
    rows = [Order(pk=1, table="7", created_at=NOW, changed_at=NOW - timedelta(1))]
    expected = inserted_by(djangos, rows, raw=True)
    assert inserted_by(ours, rows, raw=True) == expected
    assert (datetime, str(rows[0].changed_at)) in expected[2][0]


def test_a_field_is_told_once_that_it_will_be_saved() -> None:
    class Counted(models.IntegerField):
        told = 0

        def pre_save(self, row: Any, add: bool) -> Any:
            Counted.told += 1
            return super().pre_save(row, add)

    inserted_by(ours, [make_model(number=Counted())(number=1)])
    inserted_by(ours, [make_model(number=Counted(), at=Now())(number=1, at=NOW)])
    assert Counted.told == 2


def test_all_fields_are_told_that_they_are_saved_before_an_expression_is_compiled() -> None:
    """`pre_save()` may save a file: if the rest fails, the file is there if it is with Django."""

    class Refusing(models.Func):
        def as_sql(self, *args: Any, **kwargs: Any) -> Any:
            raise ZeroDivisionError

    class Counted(models.IntegerField):
        told = 0

        def pre_save(self, row: Any, add: bool) -> Any:
            Counted.told += 1
            return super().pre_save(row, add)

    model = make_model(name=models.CharField(max_length=9), number=Counted())
    row = model(name=Refusing(output_field=models.CharField()), number=1)
    for times, compilers in enumerate((djangos, ours), 1):
        with pytest.raises(ZeroDivisionError):
            inserted_by(compilers, [row])
        assert Counted.told == times


def test_a_default_that_is_given_to_a_field_without_one_is_written_as_by_django() -> None:
    default = models.expressions.DatabaseDefault(Value("x"))
    model = make_model(name=models.CharField(max_length=9), other=models.IntegerField())
    rows = [model(name=default, other=1)]
    assert inserted_by(ours, rows) == inserted_by(djangos, rows)


def test_a_default_is_resolved_where_django_resolves_it() -> None:
    class Counted(models.expressions.DatabaseDefault):
        resolved = 0

        def resolve_expression(self, *args: Any, **kwargs: Any) -> Any:
            type(self).resolved += 1
            return super().resolve_expression(*args, **kwargs)

    model = make_model(name=models.CharField(max_length=9))
    told = []
    for compilers in (djangos, ours):
        Counted.resolved = 0
        told.append((inserted_by(compilers, [model(name=Counted(Value("x")))]), Counted.resolved))
    assert told[0] == told[1]


def test_features_that_return_nothing_from_one_row_are_asked() -> None:
    with mock.patch.object(connection.features, "can_return_columns_from_insert", new=False):
        assert inserted_by(ours, [Tag(name="x")]) == inserted_by(djangos, [Tag(name="x")])


def test_operations_that_insert_in_their_own_way_are_asked() -> None:
    class Operations(DatabaseOperations):
        def insert_statement(self, on_conflict: Any = None) -> str:
            return "INSERT /* mine */ INTO"

    query = InsertQuery(Tag)
    query.insert_values([Tag._meta.get_field("name")], [Tag(name="x")])
    other = copy.copy(connections["default"])
    other.ops = Operations(other)
    told = [
        compilers.SQLInsertCompiler(query, other, "default").as_sql()
        for compilers in (djangos, ours)
    ]
    assert told[0] == told[1]
    assert "mine" in told[1][0][0]


# The cached SQL of an INSERT is kept with the model, by its fields.


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record each INSERT that is compiled because it is not cached."""
    made: list[Any] = []
    make = insert._CachedInsert.__init__

    def recorded(self: Any, *args: Any) -> None:
        make(self, *args)
        made.append(self)

    monkeypatch.setattr(insert._CachedInsert, "__init__", recorded)
    return made


@pytest.mark.shortcut("insert")
def test_the_words_of_an_insert_are_put_together_once(kept: list[Any]) -> None:
    model = make_model(name=models.CharField(max_length=9), number=models.IntegerField(default=1))
    for row in (
        model(name="x"),
        model(name="y", number=7),
        model(name=functions.Lower(Value("X"))),
    ):
        assert inserted_by(ours, [row]) == inserted_by(djangos, [row])
    assert len(kept) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda model: mock.patch.object(model._meta, "db_table", "library_other"),
        lambda model: mock.patch.object(model._meta.get_field("name"), "column", "other"),
        lambda model: mock.patch.object(connections["default"], "ops", _Quoting(connection)),
    ],
)
def test_what_the_words_of_an_insert_depend_on_is_looked_at(change: Any, kept: list[Any]) -> None:
    model = make_model(name=models.CharField(max_length=9))
    before = inserted_by(ours, [model(name="x")])
    with change(model):
        assert inserted_by(ours, [model(name="x")]) == inserted_by(djangos, [model(name="x")])
        assert inserted_by(ours, [model(name="x")]) != before
    assert inserted_by(ours, [model(name="x")]) == before
    for rows, returning in (([model(name="x")], False), ([model(pk=1, name="x")], True)):
        expected = inserted_by(djangos, rows, returning=returning)
        assert inserted_by(ours, rows, returning=returning) == expected != before


class _Quoting(DatabaseOperations):
    def quote_name(self, name: str) -> str:
        return f'"{name.strip(chr(34)).upper()}"'


@pytest.mark.shortcut("insert")
def test_the_words_of_no_more_inserts_are_kept_than_are_of_use(kept: list[Any]) -> None:
    model = make_model(**{f"number_{n}": models.IntegerField(default=1) for n in range(7)})
    fields = model._meta.local_concrete_fields[1:]
    for chosen in range(1, 128):
        query = InsertQuery(model)
        query.insert_values([each for n, each in enumerate(fields) if chosen & 1 << n], [model()])
        made = ours.SQLInsertCompiler(query, connection, "default")
        made.returning_fields = None
        made.as_sql()
    assert len(kept) == 127
    assert len(model._meta._pgbackend_inserts) == MOST_STATEMENTS


@pytest.mark.parametrize(
    "found", [Q(pk=1), Q(pk=1, name="x"), Q(section__name="x"), ~Q(pk=1), Q(pk__in=[1, 2])]
)
def test_a_deletion_is_compiled_as_by_django(found: Q) -> None:
    query = Dish.objects.filter(found).query.chain(DeleteQuery)
    told = [
        compilers.SQLDeleteCompiler(query.clone(), connection, "default").as_sql()
        for compilers in (djangos, ours)
    ]
    assert told[0] == told[1]


@pytest.mark.shortcut("select")
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
    """Compiles for a backend that is derived from ours."""

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
    """Has a `select_format()` of its own."""

    how = "upper(%s)"

    def select_format(self, compiler: Any, sql: str, params: Any) -> Any:
        return self.how % sql, params


def make_model(**fields: Any) -> Any:
    """Make a model that nothing else refers to."""
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
    # Django itself caches some fields' SQL, whatever the table; not that of a foreign key.
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
    """Another thread may add the field."""
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


@pytest.mark.shortcut("select")
def test_what_is_known_goes_with_the_model() -> None:
    model = make_model(name=models.CharField(max_length=9))
    compiled(model._base_manager.all(), ours)
    assert "_pgbackend_columns" in vars(model._meta)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
