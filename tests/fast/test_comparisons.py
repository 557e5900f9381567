"""Compares what the ORM does with a shortcut and without it: rows, objects, errors, messages.

Each kind of work is done green, and green in an `atomic` block (in sync code for `cursors`). Each
shortcut that it takes is unplugged in turn; then all of them are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from unittest import mock

import pytest
from django.contrib.contenttypes.models import ContentType
from django.db import connection, connections, models, transaction
from django.db.models import F, Q, Value, functions
from django.test import override_settings
from django.test.utils import CaptureQueriesContext

from kitchen.models import Dish, Order, OrderLine, Section
from pgbackend.fast.registry import SHORTCUTS
from tests.conftest import Runner
from tests.library.models import Author, Book, Entry, Note, Tag
from tests.support.both_ways import Wire, compare, error_of
from tests.support.expressions import OwnSQL
from tests.support.fixtures import pool_of_default

from .test_objects import told

NOW = datetime(2026, 1, 2, 3, 4, 5, 6, UTC)
MODELS: tuple[Any, ...] = (Author, Book, Dish, Entry, Note, Order, OrderLine, Section, Tag)


@pytest.fixture(autouse=True)
def _the_clock_stands() -> Iterator[None]:
    with mock.patch("django.utils.timezone.now", return_value=NOW):
        yield


def settled(work: Callable[[], Any]) -> Any:
    """Do `work`; return when the only connection of the pool has been reset, if it must be."""
    result = work()
    Tag.objects.count()
    return result


def empty() -> None:
    """Empty the tables, count keys from 1, and forget what shortcuts have cached of the models."""
    names = ", ".join(model._meta.db_table for model in MODELS)
    with connection.cursor() as cursor:
        cursor.execute(f"TRUNCATE {names} RESTART IDENTITY CASCADE")
    ContentType.objects.clear_cache()


def forget() -> None:
    for model in MODELS:
        for name in ("_pgbackend_columns", "_pgbackend_inserts", "_pgbackend_row_constructor"):
            vars(model._meta).pop(name, None)


def values(found: Any) -> Any:
    """Return values with their types: 1, 1.0 and True are equal."""
    if isinstance(found, dict):
        return {key: values(value) for key, value in found.items()}
    if isinstance(found, (list, tuple)):
        return type(found), [values(each) for each in found]
    if isinstance(found, (float, datetime)):  # NaN equals nothing; moments are equal in any zone
        return type(found), repr(found)
    return type(found), told(found) if isinstance(found, models.Model) else found


# --- The work -------------------------------------------------------------------------------------


def fill() -> None:
    soups, sweets = (Section.objects.create(name=name) for name in ("Soups", "Sweets"))
    for n, section in enumerate((soups, soups, sweets)):
        Dish.objects.create(section=section, name=f"dish {n}", price=Decimal(n), position=n)
    author = Author.objects.create(name="a%s'")
    book = Book.objects.create(title="b", author=author, text='{"a": 1}')
    book.tags.set([Tag.objects.create(name=name) for name in ("one", "two")])
    Note.objects.create(text="n", subject=book)


def reading() -> list[Any]:
    fill()
    dishes, tags = Dish.objects.order_by("pk"), Tag.objects.all()
    found: list[Any] = [
        Dish.objects.get(pk=1), Dish.objects.get(pk="2"), list(Dish.objects.filter(section=1)),
        list(Dish.objects.filter(position__lt=1 << 40)), list(Dish.objects.filter(pk=1 << 70)),
        list(Dish.objects.filter(position__gte=1, price__lt=2)),
        Order.objects.filter(pk=-1).first(),
        list(Order.objects.filter(promised_minutes=None)),
        list(Dish.objects.filter(available=True)),
        list(dishes[1:3]), dishes.last(), dishes.count(), dishes.filter(pk=3).exists(),
        list(dishes.only("name")), list(dishes.defer("name", "price")), list(dishes.reverse()),
        list(dishes.select_related("section")), list(Section.objects.prefetch_related("dishes")),
        list(Section.objects.get(pk=1).dishes.all()), Book.objects.get(title="b").author,
        list(dishes.values()), list(dishes.values_list("price", "vegetarian", named=False)),
        list(dishes.annotate(more=F("price") * 2).values_list("more", flat=True)),
        list(Section.objects.annotate(n=models.Count("dishes")).filter(n__gt=1)),
        dishes.aggregate(models.Sum("price"), models.Max("name")), Dish.objects.in_bulk([1, 3]),
        list(dishes.iterator(chunk_size=2)), list(Tag.objects.raw("SELECT * FROM library_tag")),
        list(tags.filter(name="one").union(tags.filter(name="two")).order_by("pk")),
        list(dishes.filter(Q(pk=1) | ~Q(section__name="Soups"))), list(tags.none()),
        list(Tag.objects.extra(select={"one": "1"}).order_by("pk")), tags.earliest("pk"),
        list(dishes.distinct("section_id").order_by("section_id")), list(tags.filter(pk__in=[])),
        [*Author.objects.get(name="a%s'").books.all()], [*Book.objects.get().notes.all()],
        list(tags.annotate(now=functions.Now()).values_list("name")),
        [*Order.objects.dates("created_at", "day")],
        list(tags.annotate(at=Value(NOW), x=Value(1.5), s=Value("%")).values_list("at", "x", "s")),
        list(tags.annotate(a=OwnSQL("ARRAY[NULL, '1']", ())).values_list("a")),
        list(tags.filter(pk__gt=0)), list(tags.filter(pk__gt=0)[:1]),
        list(tags.filter(pk__gt=0)[1:]),
    ]  # fmt: skip
    wrapper: Any = connections["default"]
    vars(wrapper)["timezone"] = timezone(timedelta(hours=5))
    found.append(list(tags.annotate(at=Value(NOW)).values_list("at", flat=True)))
    del vars(wrapper)["timezone"]
    return found


def writing() -> list[Any]:
    tag = Tag(name="one")
    tag.save()
    section = Section.objects.create(name="s")
    dish = Dish.objects.create(section=section, name="d", price="1.50")
    order = Order.objects.create(table="7", note="%s")
    seen: list[Any] = [tag, section, dish, order, Dish.objects.get(), Order.objects.get()]
    tag.name = "two"
    tag.save()
    dish.position = F("position") + 3
    dish.save(update_fields=["position"])
    order.promised_minutes = None
    order.save()
    seen += [
        Dish.objects.filter(pk=dish.pk).update(price=F("price") * 2 + 1, available=False),
        Dish.objects.filter(section=section).update(description="%s", name=functions.Upper("name")),
        Dish.objects.filter(position=1 << 40).update(position=1),
        Tag.objects.none().update(name=""),
        Order.objects.update(note=None or "", promised_minutes=None), Dish.objects.values().get(),
        Tag.objects.bulk_create([Tag(name="x"), Tag(pk=77, name="y")]),
        Order.objects.values().get(),
        Tag.objects.bulk_create([Tag(name="x")], ignore_conflicts=True), list(Tag.objects.all()),
        Tag.objects.get_or_create(name="x"), Tag.objects.get_or_create(name="z"),
        Section.objects.update_or_create(name="s", defaults={"position": 3}),
        Tag.objects.bulk_update([Tag(pk=77, name="yy")], ["name"]),
        Author.objects.create(name="writes an entry, too"), list(Entry.objects.all()),
        OrderLine.objects.create(order=order, dish=dish, quantity=1, price=functions.Round(1.2)).pk,
        Tag.objects.create(pk=5, name=functions.Lower(Value("ABC"))).pk, Tag(pk=5, name="q").save(),
        list(Tag.objects.order_by("pk")), Tag.objects.get(pk=5).delete(), Section().pk,
    ]  # fmt: skip
    book = Book.objects.create(title="t", author=Author.objects.get())
    book.tags.add(tag)
    book.tags.add(tag, Tag.objects.create(name="more"))
    seen += [list(book.tags.order_by("pk")), book, book.save(update_fields=["title"]), book.saves]
    book.refresh_from_db()
    seen += [book, Author.objects.all().delete(), Dish.objects.filter(pk=-1).delete(), tag.delete()]
    return seen


def by_cursor(work: Callable[[Any], Any]) -> Any:
    with connection.cursor() as cursor:
        return work(cursor)


FAILING: list[Callable[[], Any]] = [
    lambda: Dish.objects.get(pk=-1),
    lambda: Tag.objects.get(name__gt=""),
    lambda: Tag.objects.create(name="one"),
    lambda: Tag(pk=1, name="x").save(force_insert=True),
    lambda: Tag(pk=-1, name="x").save(force_update=True),
    lambda: Tag.objects.create(name="x" * 51),
    lambda: Tag.objects.filter(pk=1).update(name="two"),
    lambda: Tag.objects.filter(pk=1).update(name="x" * 51),
    lambda: Section.objects.create(name=None),
    lambda: Dish.objects.filter(pk=1).update(price=F("price") / 0),
    lambda: Dish.objects.filter(pk=1).update(price=-1),
    lambda: list(Tag.objects.annotate(x=OwnSQL("1 / 0", ()))),
    lambda: list(Tag.objects.annotate(x=OwnSQL("%s::int", ("x",)))),
    lambda: list(Tag.objects.annotate(x=OwnSQL("no_such_column", ()))),
    lambda: list(Tag.objects.annotate(x=OwnSQL("%s", ()))),
    lambda: list(Tag.objects.annotate(x=OwnSQL("1", (1, 2)))),
    lambda: list(Tag.objects.annotate(x=OwnSQL("%s", (object,)))),
    lambda: list(Tag.objects.raw("SELEC 1")),
    lambda: Section.objects.filter(pk=1).delete(),
    lambda: Tag.objects.filter(name="\0").count(),
    lambda: Tag.objects.filter(pk="x"),
    lambda: Tag.objects.filter(pk=1.5).count(),
    lambda: Tag.objects.select_for_update().first(),
    lambda: Tag(pk="x", name="x").save(),
    lambda: Tag(pk=1 << 70, name="x").save(),
    lambda: Book.objects.create(title="of nobody", author=Author(name="unsaved")),
    lambda: by_cursor(lambda cursor: cursor.execute("SELECT %s", ())),
    lambda: by_cursor(lambda cursor: cursor.fetchone()),
]


def failing() -> list[Any]:
    """Return the error of each failure: alone, first in a block, and between others in a block."""
    fill()

    def in_a_block(fail: Callable[[], Any]) -> Any:
        with transaction.atomic():
            Tag.objects.count()
            seen = error_of(fail), connection.needs_rollback, error_of(Tag.objects.count)
            transaction.set_rollback(True)
        return seen

    return [
        [error_of(fail), error_of(transaction.atomic(fail)), in_a_block(fail)] for fail in FAILING
    ]


def observed() -> list[Any]:
    """Return what an observer sees: the log of queries, and an `execute_wrapper()`."""
    seen: list[Any] = []

    def wrap(execute: Any, sql: Any, params: Any, many: bool, context: Any) -> Any:
        seen.append((sql, values(params), many, sorted(context), type(context["cursor"]).__name__))
        return execute(sql, params, many, context)

    def work() -> None:
        tag = Tag.objects.create(name="one")
        Tag.objects.filter(pk=tag.pk).update(name="two")
        seen.extend([told(Tag.objects.get(pk=tag.pk)), tag.delete()])
        seen.append(error_of(transaction.atomic(lambda: Tag.objects.create(pk=1, name=None))))

    with connection.execute_wrapper(wrap):
        work()
    with CaptureQueriesContext(connection) as captured:
        work()
    with override_settings(DEBUG=True):
        connection.queries_log.clear()
        work()
        seen += [sorted(each) for each in connection.queries]
        logged = [each["sql"] for each in connection.queries]
        connection.queries_log.clear()
    names: dict[str, str] = {}  # of savepoints
    return [seen, [[_named(sql, names) for sql in log] for log in ([*_sql(captured)], logged)]]


def _sql(captured: Any) -> Iterator[str]:
    return (each["sql"] for each in captured.captured_queries)


def _named(sql: str, names: dict[str, str]) -> str:
    for word in sql.split('"'):
        if word.startswith("s") and "_x" in word:
            sql = sql.replace(word, names.setdefault(word, f"s{len(names)}"))
    return sql


# --- Done both ways -------------------------------------------------------------------------------

WORK: dict[Callable[[], Any], list[str]] = {
    reading: ["select", "known", "rows", "statements", "cursors", "run", "all"],
    writing: ["insert", "update", "statements", "cursors", "run", "lease", "begin", "all"],
    failing: ["select", "insert", "update", "statements", "cursors", "run", "begin", "blocks",
              "all"],
    observed: ["select", "known", "insert", "update", "rows", "cursors", "lease", "all"],
}  # fmt: skip


def named(name: str) -> Any:
    """Return `name` as a parameter of a test that is skipped while the shortcut is off."""
    names = SHORTCUTS if name == "all" else (name,)
    return pytest.param(name, marks=[pytest.mark.shortcut(each) for each in names])


@pytest.mark.sweep(one_in=8)
@pytest.mark.parametrize(
    ("name", "work"),
    [
        pytest.param(
            *named(name).values, work, id=f"{name}-{work.__name__}", marks=named(name).marks
        )
        for work, names in WORK.items()
        for name in names
    ],
)
def test_work_has_the_same_results_and_messages(
    run_once: Runner, leases: list[Any], name: str, work: Callable[[], Any]
) -> None:
    forget()

    def everywhere() -> Any:
        seen: list[Any] = []
        places = (
            [work] if name == "cursors" else [green] if work is failing else [green, in_a_block]
        )
        for start in places:
            empty()
            connection.close()
            leases.clear()
            with Wire() as wire:
                result = values(start())
                if name in BY_ANOTHER_MESSAGE:
                    seen.append([_without_position(result), wire.statements()])
                else:
                    seen.append([result, wire.messages()])
                seen.append(_told_leases(leases))
                connection.close()
        return seen

    def green() -> Any:
        return run_once.green(settled, work)

    def in_a_block() -> Any:
        return run_once.green(settled, transaction.atomic(work))

    with pool_of_default(max_size=1):
        compare(name, everywhere)


#: BEGIN is sent in another message: the contract says that positions in errors count from it (C2).
BY_ANOTHER_MESSAGE = {"begin", "all"}


def _without_position(found: Any) -> Any:
    if isinstance(found, dict):
        return {key: _without_position(each) for key, each in found.items() if key != _POSITION}
    if isinstance(found, (list, tuple)):
        return [*map(_without_position, found)]
    return re.sub(r"\nLINE .*\n *\^", "", found) if isinstance(found, str) else found


_POSITION = "statement_position"


def _told_leases(events: list[Any]) -> list[tuple[Any, ...]]:
    return [(type(each).__name__, each.pool, getattr(each, "discarded", None)) for each in events]
