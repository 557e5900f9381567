"""Tests that the ORM's statements, executed and fetched in one step, give the same results."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import django
import psycopg
import pytest
from django.apps import apps
from django.db import (
    DatabaseError,
    IntegrityError,
    InterfaceError,
    ProgrammingError,
    connection,
    connections,
    models,
    transaction,
)
from django.db.backends import utils
from django.db.backends.base.operations import BaseDatabaseOperations
from django.db.backends.postgresql.base import DatabaseWrapper as PostgresDatabaseWrapper
from django.db.backends.postgresql.operations import (
    DatabaseOperations as PostgresDatabaseOperations,
)
from django.db.backends.signals import connection_created
from django.db.models import F, Value
from django.db.models.functions import Length, Now
from django.db.models.sql import compiler
from django.db.models.sql.constants import CURSOR, MULTI, ROW_COUNT, SINGLE
from django.db.transaction import TransactionManagementError
from django.test import override_settings
from django.test.utils import CaptureQueriesContext, isolate_apps
from psycopg.types.string import TextLoader

import pgbackend
from pgbackend import aio, base, driver, transactions
from pgbackend.driver import loops
from pgbackend.driver.errors import LeaseEnded
from pgbackend.fast import statements
from tests.conftest import Runner
from tests.library.models import Author, Tag
from tests.support.expressions import OwnSQL
from tests.support.patches import patched, patched_on_the_object


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the statements that were executed and fetched in one step."""
    seen: list[str] = []
    execute = statements.execute

    def recorded(wrapper: Any, sql: Any, *args: Any) -> Any:
        seen.append(sql)
        return execute(wrapper, sql, *args)

    monkeypatch.setattr(statements, "execute", recorded)
    return seen


def every_statement() -> list[Any]:
    """Execute a statement of each kind that Django's compilers make; return their results."""
    Tag.objects.all().delete()
    one = Tag.objects.create(name="one")
    Tag.objects.bulk_create([Tag(name="two"), Tag(name="three")])
    Tag.objects.filter(name="two").update(name="2")
    one.name = "1"
    one.save()
    Tag.objects.filter(pk=one.pk).update(name=F("name"))
    return [
        one.pk is not None,
        Tag.objects.get(pk=one.pk).name,
        sorted(Tag.objects.values_list("name", flat=True)),
        Tag.objects.count(),
        Tag.objects.filter(name="2").exists(),
        Tag.objects.none().count(),
        Tag.objects.aggregate(most=models.Max("name")),
        [tag.name for tag in Tag.objects.filter(name="nobody")],
        Tag.objects.in_bulk([one.pk])[one.pk].name,
        "Seq Scan" in Tag.objects.all().explain(),
        [tag.name for tag in Tag.objects.raw("SELECT * FROM library_tag WHERE name = %s", ["2"])],
        Tag.objects.filter(name="three").delete()[0],
        Tag.objects.filter(name="nobody").update(name="x"),
        Tag.objects.none().update(name="x"),
        Tag.objects.all()._raw_delete("default"),
    ]


@pytest.mark.shortcut("statements")
def test_every_kind_of_statement_says_what_it_says_in_a_sync_context(
    run: Runner, at_once: list[str]
) -> None:
    expected = every_statement()
    assert at_once == []
    assert run.green(every_statement) == expected
    alone = len(at_once)
    with_a_block = run.green(transaction.atomic(every_statement))
    assert with_a_block == expected
    kinds = {sql.split()[0] for sql in at_once}
    assert kinds == {"SELECT", "INSERT", "UPDATE", "DELETE", "EXPLAIN"}
    assert alone == len(at_once) - alone == 19


@pytest.mark.shortcut("statements")
@isolate_apps("tests.library")
def test_a_row_in_two_tables_is_updated_in_both(run: Runner, at_once: list[str]) -> None:
    class Child(Tag):
        more = models.CharField(max_length=10)

        class Meta:
            app_label = "library"

    def green() -> list[Any]:
        child = Child.objects.create(name="one", more="1")
        done = [
            Child.objects.update(name="two", more="2"),
            Child.objects.filter(more="2").update(name="three"),
            Child.objects.filter(more="nobody").update(name="four", more="4"),
        ]
        child.refresh_from_db()
        return [done, child.name, child.more, child.delete()[0]]

    with connection.schema_editor() as editor:
        editor.create_model(Child)
    try:
        expected = green()
        assert expected == [[1, 1, 0], "three", "2", 2]
        assert run.green(green) == expected
    finally:
        with connection.schema_editor() as editor:
            editor.delete_model(Child)
    assert at_once


@pytest.mark.shortcut("statements")
def test_many_rows_come_in_the_chunks_of_django(run: Runner, at_once: list[str]) -> None:
    Tag.objects.bulk_create(Tag(name=f"{n:03}") for n in range(250))

    def chunks(**kwargs: Any) -> list[int]:
        made = Tag.objects.order_by("name").values_list("name").query.get_compiler("default")
        return [len(rows) for rows in made.execute_sql(**kwargs)]

    for kwargs in ({}, {"chunk_size": 125}, {"chunk_size": 250}, {"chunk_size": 249}):
        expected = chunks(**kwargs)
        assert sum(expected) == 250
        assert run.green(lambda kwargs=kwargs: chunks(**kwargs)) == expected
    assert len(at_once) == 4


# --- Observers see statements ---------------------------------------------------------------------


@contextmanager
def _wrapping(seen: list[str]) -> Iterator[None]:
    def wrapper(execute: Any, sql: str, *args: Any) -> Any:
        seen.append(sql)
        return execute(sql, *args)

    with connection.execute_wrapper(wrapper):
        yield


@contextmanager
def _capturing(seen: list[str]) -> Iterator[None]:
    with CaptureQueriesContext(connection) as captured:
        yield
    seen += [query["sql"] for query in captured]


@contextmanager
def _debugging(seen: list[str]) -> Iterator[None]:
    with override_settings(DEBUG=True):
        connection.queries_log.clear()
        yield
        seen += [query["sql"] for query in connection.queries]
        connection.queries_log.clear()


OBSERVERS: dict[str, Callable[[list[str]], Any]] = {
    "execute_wrapper": _wrapping,
    "CaptureQueriesContext": _capturing,
    "DEBUG": _debugging,
    **{
        f"{owner.__module__}.{owner.__name__}.{name}": lambda seen, owner=owner, name=name: patched(
            owner, name, seen
        )
        for owner, names in {
            utils.CursorWrapper: ("execute", "_execute_with_wrappers", "_execute"),
            PostgresDatabaseWrapper: (
                *("cursor", "create_cursor", "ensure_connection", "_prepare_cursor"),
                "validate_thread_sharing",
            ),
            base.DatabaseWrapper: (
                *("cursor", "_cursor", "create_cursor", "make_cursor", "_prepare_cursor"),
                *("validate_no_broken_transaction", "validate_thread_sharing"),
            ),
            compiler.SQLCompiler: ("execute_sql",),
            psycopg.Cursor: ("execute",),
        }.items()
        for name in names
    },
    **{
        f"connection.{name}": lambda seen, name=name: patched_on_the_object(name, seen)
        for name in (
            *("cursor", "_cursor", "create_cursor", "make_cursor", "_prepare_cursor"),
            *("validate_no_broken_transaction", "validate_thread_sharing"),
        )
    },
}


@pytest.mark.parametrize("observer", OBSERVERS)
def test_who_observes_statements_sees_those_of_the_orm(run_once: Runner, observer: str) -> None:
    tag = Tag.objects.create(name="x")

    def seen_by(statement: Callable[[], Any]) -> int:
        seen: list[str] = []
        with OBSERVERS[observer](seen):
            statement()
        return len(seen)

    def green() -> list[int]:
        return [
            seen_by(lambda: Tag.objects.get(pk=tag.pk)),
            seen_by(lambda: Tag.objects.filter(pk=tag.pk).update(name="y")),
        ]

    assert min(green()) > 0, "in a sync context"
    assert min(run_once.green(green)) > 0
    with_a_block = run_once.green(transaction.atomic(green))
    assert min(with_a_block) > 0


_FETCHING = "fetch_returned_rows" if django.VERSION >= (6, 0) else "fetch_returned_insert_columns"
_RETURNING = "returning_columns" if django.VERSION >= (6, 0) else "return_insert_columns"


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (compiler.SQLInsertCompiler, "execute_sql"),
        (compiler.SQLCompiler, "get_converters"),
        (BaseDatabaseOperations, _FETCHING),
        (PostgresDatabaseOperations, _FETCHING),
        (PostgresDatabaseOperations, _RETURNING),
        (PostgresDatabaseOperations, "bulk_insert_sql"),
        (utils.CursorWrapper, "execute"),
    ],
)
def test_who_observes_inserts_sees_them(run_once: Runner, owner: Any, name: str) -> None:
    def green() -> int:
        seen: list[str] = []
        with patched(owner, name, seen):
            assert Tag.objects.create(name="x").pk
        Tag.objects.all().delete()
        return len(seen)

    expected = green()
    assert expected > 0, "in a sync context"
    assert run_once.green(green) == expected


@pytest.mark.shortcut("statements")
@isolate_apps("tests.library")
def test_what_a_row_is_given_by_the_database_is_converted(run: Runner, at_once: list[str]) -> None:
    class Key(models.BigAutoField):
        def from_db_value(self, value: int, *args: object) -> str:
            return f"row {value}"

    class Row(models.Model):  # noqa: DJ008 - nobody reads it
        id = Key(primary_key=True)
        name = models.CharField(max_length=9)

        class Meta:
            app_label = "library"

    def green() -> list[Any]:
        with connection.cursor() as cursor:
            cursor.execute("TRUNCATE library_row RESTART IDENTITY")
        return [Row.objects.create(name=name).pk for name in "xy"]

    with connection.schema_editor() as editor:
        editor.create_model(Row)
    try:
        assert run.green(green) == green() == ["row 1", "row 2"]
    finally:
        with connection.schema_editor() as editor:
            editor.delete_model(Row)
    assert len(at_once) == 2


@pytest.mark.shortcut("statements")
def test_a_cursor_of_ones_own_is_djangos_also_inside_a_statement(
    run: Runner, at_once: list[str]
) -> None:
    """Django may ask for a cursor as it compiles, or saves, before the statement does."""
    found: list[Any] = []

    class Asks(Value):
        def as_sql(self, *args: Any, **kwargs: Any) -> Any:
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1")
                found.append((cursor.description[0].name, cursor.fetchone()))
            found.append(Tag.objects.filter(name="nobody").exists())
            return super().as_sql(*args, **kwargs)

    def green() -> None:
        Tag.objects.create(name="x")
        assert Tag.objects.annotate(asked=Asks(1)).get().asked == 1
        Tag.objects.update(name=Asks("y"))
        assert Tag.objects.get().name == "y"

    run.green(green)
    assert found == [("?column?", (1,)), False] * 2
    assert len(at_once) == 6


@pytest.mark.shortcut("statements")
def test_a_row_that_is_saved_may_use_its_connection(
    run: Runner, at_once: list[str], leases: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pre_save()` of a field runs after Django has asked for the cursor of the INSERT."""
    field = Tag._meta.get_field("name")
    kept: list[Any] = []

    def pre_save(row: Any, add: bool) -> Any:
        kept.append(connection.cursor())
        kept[-1].execute("SELECT 1")
        with transaction.atomic():
            return f"{row.name} {Tag.objects.count()}"

    monkeypatch.setattr(field, "pre_save", pre_save)

    def green() -> None:
        assert Tag.objects.create(name="x").pk
        for cursor in kept:
            cursor.close()

    run.green(green)
    assert Tag.objects.get().name == "x 0"
    assert len(leases) == 2, "the cursor that is open holds the only connection of the task"
    assert len(at_once) == len(kept) + 1


def test_raw_sql_in_a_row_that_is_saved_leaves_nothing_in_the_session(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pre_save(row: Any, add: bool) -> Any:
        with connection.cursor() as cursor:
            cursor.execute("SET application_name = 'of a row'")
        return row.name

    def green() -> list[str]:
        Author.objects.create(name="x")
        named = Author.objects.annotate(found=OwnSQL("current_setting('application_name')", ()))
        with monkeypatch.context() as patches:
            patches.setattr(Tag._meta.get_field("name"), "pre_save", pre_save)
            Tag.objects.create(name="x")
        return [named.get().found for _ in range(3)]

    assert "of a row" not in run.green(green)


# --- Connections ----------------------------------------------------------------------------------


def test_a_statement_holds_its_connection_while_it_is_executed(run: Runner) -> None:
    async def main() -> None:
        await Tag.objects.acreate(name="x")  # open the pool
        sleeping = asyncio.create_task(
            Tag.objects.annotate(slept=OwnSQL("pg_sleep(0.2)", ())).aget()
        )
        while not (held := pgbackend.statistics()[0].leased):
            await asyncio.sleep(0)
        assert held == 1
        await sleeping
        assert pgbackend.statistics()[0].leased == 0

    run(main())


def test_an_error_that_is_kept_keeps_no_connection(run: Runner) -> None:
    """The error's traceback refers to the frames that leased a connection."""

    async def main() -> None:
        await Tag.objects.acreate(name="x")
        with pytest.raises(IntegrityError) as error:
            await Tag.objects.acreate(name="x")
        assert pgbackend.statistics()[0].leased == 0, error

        asked = Tag.objects.annotate(slept=OwnSQL("pg_sleep(5)", ())).aget()
        sleeping = asyncio.create_task(asked)
        while not pgbackend.statistics()[0].leased:
            await asyncio.sleep(0)
        sleeping.cancel()
        with pytest.raises(asyncio.CancelledError) as cancellation:
            await sleeping
        assert pgbackend.statistics()[0].leased == 0, cancellation

    run(main())


def test_a_statement_may_lose_its_turn_any_number_of_times(
    run_once: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = 0
    may_send = transactions.Transaction.may_send

    def lose(self: transactions.Transaction) -> bool:
        nonlocal lost
        lost += 1
        return lost > 1100 and may_send(self)  # more than Python's limit on recursion

    async def main() -> None:
        async with transaction.atomic():
            await Tag.objects.acount()
            monkeypatch.setattr(transactions.Transaction, "may_send", lose)
            assert await asyncio.create_task(Tag.objects.acount()) == 0
        assert lost > 1100

    run_once(main())


def test_tasks_that_share_a_transaction_share_its_connection(run: Runner) -> None:
    async def main() -> list[int]:
        async with transaction.atomic():
            asked = (
                Author.objects.annotate(found=OwnSQL("%s + pg_backend_pid() * 0", (n,))).aget()
                for n in range(20)
            )
            await Author.objects.acreate(name="x")
            return [author.found for author in await asyncio.gather(*asked)]

    assert run(main()) == list(range(20))


@pytest.mark.parametrize("rows", [0, 1], ids=["an empty block", "one with a statement"])
@pytest.mark.parametrize("statement", ["a SELECT", "an INSERT"])
def test_a_task_whose_block_has_ended_is_refused(run: Runner, statement: str, rows: int) -> None:
    async def main() -> None:
        ended = asyncio.Event()

        async def late() -> None:
            await ended.wait()
            if statement == "a SELECT":
                Author.objects.count()
            else:
                Author.objects.create(name="late")

        async with transaction.atomic():
            for _ in range(rows):
                await Author.objects.acreate(name="x")
            task = asyncio.create_task(late())
        ended.set()
        with pytest.raises(TransactionManagementError, match="that has ended"):
            await task
        assert await Author.objects.acount() == rows

    run(aio.portal(main()))


def test_pinned_the_statements_of_the_orm_see_the_session(run: Runner) -> None:
    def green() -> set[int]:
        asked = Tag.objects.annotate(pid=OwnSQL("pg_backend_pid()", ()))
        with pgbackend.pinned():
            pids = {Tag.objects.create(name=f"{n}") and asked.first().pid for n in range(3)}
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_backend_pid()")
                pids.add(cursor.fetchone()[0])
        return pids

    assert len(run.green(green)) == 1


def test_errors_are_those_of_djangos_cursor(run: Runner) -> None:
    tag = Tag.objects.create(name="x")

    def twice() -> None:
        Tag.objects.create(name="x")

    def missing() -> None:
        list(Tag.objects.annotate(a=OwnSQL("nothing", ())))

    def broken() -> None:
        with transaction.atomic():
            with pytest.raises(IntegrityError):
                twice()
            Tag.objects.get(pk=tag.pk)

    def doomed() -> None:
        with transaction.atomic():
            transaction.set_rollback(True)
            Tag.objects.get(pk=tag.pk)

    def error_of(work: Callable[[], None]) -> tuple[Any, ...]:
        with pytest.raises(DatabaseError) as caught:
            work()
        cause = caught.value.__cause__
        return type(caught.value), type(cause), str(caught.value)

    for work in (twice, missing, broken, doomed):
        connection.rollback_exc = None  # that of the last block, in a sync context
        assert run.green(error_of, work) == error_of(work)
        assert run.green(lambda: Tag.objects.get(pk=tag.pk)) == tag
    assert error_of(doomed)[0] is TransactionManagementError
    assert error_of(missing)[0] is ProgrammingError


def test_a_connection_that_died_in_a_block_is_refused(run: Runner) -> None:
    def green() -> None:
        with transaction.atomic():
            Tag.objects.count()
            connection.connection.lease.end()
            Tag.objects.count()

    with pytest.raises(InterfaceError) as caught:
        run.green(green)
    assert isinstance(caught.value.__cause__, LeaseEnded)


def test_without_rows_there_is_nothing_to_fetch(run: Runner) -> None:
    def green() -> None:
        cursor = statements.StatementCursor(connections["default"])
        cursor.execute("UPDATE library_tag SET name = 'x'")
        assert cursor.rowcount == 0
        with pytest.raises(ProgrammingError, match="didn't produce records"):
            cursor.fetchone()
        with cursor.execute("SELECT generate_series(1, 4)"):
            assert cursor.fetchone() == (1,)
            assert cursor.fetchmany(2) == [(2,), (3,)]
            assert cursor.fetchall() == [(4,)]
            assert cursor.fetchone() is None

    run.green(green)


# --- What one statement leaves to the next, and what it does not ----------------------------------


def test_the_same_statement_takes_values_of_other_types(run: Runner) -> None:
    moment = datetime(2026, 1, 2, tzinfo=UTC)
    values = [1, "a%", 2.5, moment, "b", 1 << 40, True, "%s"]

    def green() -> list[Any]:
        asked = [Author.objects.annotate(found=Value(value)).get().found for value in values]
        with transaction.atomic():
            return asked + [
                Author.objects.filter(name=value).count() for value in ("x", "%s", "x", "y")
            ]

    Author.objects.create(name="x")
    expected = green()
    assert expected[-4:] == [1, 0, 1, 0]
    assert run.green(green) == expected


@pytest.mark.shortcut("run")
def test_nothing_of_a_statement_is_left_but_its_words(run_once: Runner) -> None:
    def green() -> None:
        for block in (transaction.atomic, pgbackend.pinned):
            with block():
                Author.objects.create(name="a secret")
                assert Author.objects.filter(name="a secret")[0].name == "a secret"
        Author.objects.filter(name="a secret").update(name="another secret")
        with transaction.atomic():
            list(Author.objects.filter(name="another secret"))
        [pool] = loops._by_loop[asyncio.get_running_loop()].pools.values()
        [physical] = pool._psycopg.made
        cursor = physical._cursor
        assert (cursor._query, cursor.pgresult, cursor._results) == (None, None, [])
        assert (cursor._merged.query, cursor._merged.params) == (b"", None)
        assert b"secret" not in repr([cursor._last_query, cursor._merged.template]).encode()
        assert cursor._conn is physical.facade

    run_once.green(green)


class Shouting(TextLoader):
    def load(self, data: Any) -> str:
        return str(super().load(data)).upper()


class Whispering(TextLoader):
    def load(self, data: Any) -> str:
        return str(super().load(data)).lower()


def test_types_that_a_holder_registers_are_known_to_later_statements(run: Runner) -> None:
    def green() -> list[str]:
        Author.objects.create(name="x")
        asked = Author.objects.annotate(found=OwnSQL("name::text", ()))
        found = [asked.get().found]
        with pgbackend.pinned():
            connection.ensure_connection()
            with connection.cursor() as cursor:
                cursor.connection.adapters.register_loader("text", Shouting)
            found.append(asked.get().found)
        found.append(asked.get().found)
        return found

    assert run.green(green)[:2] == ["x", "X"]


@pytest.mark.parametrize("by_the_server", [False, True])
def test_a_type_that_is_registered_in_a_block_is_known_at_once(
    run: Runner, by_the_server: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = connections["default"].settings_dict["OPTIONS"]
    monkeypatch.setitem(options, "server_side_binding", by_the_server)

    def green() -> list[str]:
        Author.objects.create(name="Xy")
        asked = Author.objects.annotate(found=OwnSQL("name::text", ()))
        found = [asked.get().found]
        with transaction.atomic():
            found.append(asked.get().found)
            facade = connection.connection
            adapters = facade.adapters
            adapters.register_loader("text", Shouting)
            found.append(asked.get().found)
            adapters.register_loader("text", Whispering)
            found.append(asked.get().found)
        found.append(asked.get().found)
        facade.adapters.register_loader("text", Shouting)  # its lease is over
        found.append(asked.get().found)
        with transaction.atomic():
            Author.objects.count()
            asked.get()
            connection.connection.adapters.register_loader("text", Whispering)
        found.append(asked.get().found)
        return found

    assert run.green(green) == ["Xy", "Xy", "XY", "xy", "xy", "XY", "xy"]


def test_a_prepare_threshold_of_a_holder_is_not_the_next_ones(run_once: Runner) -> None:
    options = connections["default"].settings_dict["OPTIONS"]

    def prepared() -> int:
        counted = OwnSQL("(SELECT count(*) FROM pg_prepared_statements)", ())
        return Author.objects.annotate(found=counted).get().found

    def green() -> list[int]:
        Author.objects.create(name="x")
        with pgbackend.pinned():
            Author.objects.count()
            connection.ensure_connection()
            with connection.cursor() as cursor:
                facade = cursor.connection
            found = [prepared()]
        facade._prepared.prepare_threshold = 0
        return [*found, *(prepared() for _ in range(8))]

    with pytest.MonkeyPatch.context() as patches:
        patches.setitem(options, "server_side_binding", True)
        assert run_once.green(green) == [0] * 9


def test_a_notice_reaches_who_listens_on_every_connection_and_no_former_holder(
    run: Runner,
) -> None:
    heard: list[tuple[str, str]] = []

    def listen(sender: Any, connection: Any, **kwargs: Any) -> None:
        connection.connection.add_notice_handler(
            lambda diagnostic: heard.append(("all", diagnostic.message_primary))
        )

    def green() -> None:
        with connection.cursor() as cursor:
            cursor.execute(
                "CREATE OR REPLACE FUNCTION say(what text) RETURNS text AS "
                "$$BEGIN RAISE NOTICE '%', what; RETURN what; END$$ LANGUAGE plpgsql"
            )

        def say(what: str) -> None:
            Author.objects.annotate(said=OwnSQL("say(%s)", (what,))).get()

        Author.objects.create(name="x")
        say("one")
        with transaction.atomic():
            Author.objects.count()
            facade = connection.connection
            facade.add_notice_handler(lambda diagnostic: heard.append(("holder", "of a block")))
            say("two")
        say("three")
        assert facade.closed

    connection_created.connect(listen)
    try:
        run.green(green)
    finally:
        connection_created.disconnect(listen)
        with connection.cursor() as cursor:
            cursor.execute("DROP FUNCTION say(text)")
    assert heard == [("all", "one"), ("all", "two"), ("holder", "of a block"), ("all", "three")]


def test_a_moment_is_of_the_wrappers_timezone(run: Runner) -> None:
    elsewhere = timezone(timedelta(hours=5))

    def offset() -> timedelta | None:
        found: datetime = Author.objects.annotate(now=Now()).get().now
        return found.utcoffset()

    def green() -> list[timedelta | None]:
        wrapper = connections["default"]
        Author.objects.create(name="x")
        offsets = [offset()]
        wrapper.__dict__["timezone"] = elsewhere
        try:
            offsets.append(offset())
            with transaction.atomic():
                offsets.append(offset())
        finally:
            del wrapper.__dict__["timezone"]
        return [*offsets, offset()]

    east = timedelta(hours=5)
    assert run.green(green) == [timedelta(0), east, east, timedelta(0)]


# --- Users' own classes ---------------------------------------------------------------------------


class _Counted(psycopg.ClientCursor[Any]):
    executed: list[Any] = []

    def execute(self, query: Any, *args: Any, **kwargs: Any) -> Any:
        self.executed.append(query)
        return super().execute(query, *args, **kwargs)


class _Counting(driver.Connection):
    asked: list[Any] = []

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        self.asked.append(args)
        return super().cursor(*args, **kwargs)


@pytest.mark.parametrize(
    "option, value, seen",
    [
        ("cursor_factory", _Counted, _Counted.executed),
        ("pool", {"connection_class": _Counting}, _Counting.asked),
    ],
)
def test_cursors_and_connections_of_a_class_of_ones_own_are_asked(
    run_once: Runner, option: str, value: Any, seen: list[Any]
) -> None:
    def green() -> int:
        Author.objects.create(name="x")
        seen.clear()
        Author.objects.get()
        with transaction.atomic():
            Author.objects.update(name="y")
        return len(seen)

    with pytest.MonkeyPatch.context() as patches:
        patches.setitem(connections["default"].settings_dict["OPTIONS"], option, value)
        assert run_once.green(green) == 2


@pytest.mark.parametrize("name", ["cursor_factory", "row_factory"])
def test_a_factory_that_a_holder_has_set_is_asked(run_once: Runner, name: str) -> None:
    asked: list[Any] = []

    def factory(*args: Any, **kwargs: Any) -> Any:
        asked.append(args)
        return original(*args, **kwargs)

    def green() -> None:
        nonlocal original
        Author.objects.create(name="x")
        with transaction.atomic():
            Author.objects.count()
            original = getattr(connection.connection, name)
            setattr(connection.connection, name, factory)
            Author.objects.get()
        assert asked
        asked.clear()
        Author.objects.get()
        assert not asked

    original: Any = None
    run_once.green(green)


# --- Statements that are executed as in Django ----------------------------------------------------


def test_a_cursor_that_is_asked_for_is_given(run: Runner, at_once: list[str]) -> None:
    Author.objects.create(name="x")

    def green() -> Any:
        made = Author.objects.values_list("name").query.get_compiler("default")
        with made.execute_sql(CURSOR) as cursor:
            return cursor.description[0].name, cursor.fetchall()

    assert run.green(green) == green() == ("name", [("x",)])
    assert at_once == []


def test_rows_that_are_streamed_are_not_fetched_at_once(run: Runner, at_once: list[str]) -> None:
    Tag.objects.bulk_create(Tag(name=f"{n}") for n in range(5))
    assert run.green(lambda: len(list(Tag.objects.iterator(chunk_size=2)))) == 5
    assert at_once == []


@pytest.mark.shortcut("statements")
def test_what_is_asked_for_is_returned(run: Runner, at_once: list[str]) -> None:
    Tag.objects.bulk_create(Tag(name=name) for name in ("ccc", "a", "bb"))

    def results() -> list[Any]:
        names = Tag.objects.order_by(Length("name")).values_list("name")
        few, none = names.filter(name__lt="c"), names.filter(name="nobody")
        return [
            list(names.distinct()),  # with a column more than was asked for
            *(
                query.query.get_compiler("default").execute_sql(result_type)
                for result_type in (MULTI, SINGLE, ROW_COUNT, None)
                for query in (names, few, none, names.distinct())
            ),
            list(names.none().query.get_compiler("default").execute_sql(MULTI)),
            names.none().query.get_compiler("default").execute_sql(SINGLE),
        ]

    expected = results()
    assert run.green(results) == expected
    assert len(at_once) == 17


def test_without_autocommit_statements_are_in_a_transaction(run: Runner) -> None:
    def green() -> list[int]:
        Tag.objects.create(name="x")
        counts = [Tag.objects.count()]
        connection.rollback()
        counts.append(Tag.objects.count())
        Tag.objects.create(name="y")
        connection.commit()
        counts.append(Tag.objects.count())
        return counts

    with pytest.MonkeyPatch.context() as patches:
        patches.setitem(connections["default"].settings_dict, "AUTOCOMMIT", False)
        assert run.green(green) == [1, 0, 1]


def test_a_copy_of_the_wrapper_has_a_connection_of_its_own(run: Runner, leases: list[Any]) -> None:
    Author.objects.create(name="x")

    def green() -> bool:
        own = connections["default"].copy()
        try:
            made = Author.objects.values_list("name").query.get_compiler(connection=own)
            assert made.execute_sql(MULTI) == [[("x",)]]
            return own.connection is not None
        finally:
            own.close()

    assert run.green(green)
    assert leases == []


def test_before_the_apps_are_ready_django_warns(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def green() -> None:
        monkeypatch.setattr(apps, "ready", False)
        try:
            with pytest.warns(RuntimeWarning, match="during app initialization"):
                Author.objects.count()
        finally:
            monkeypatch.undo()

    run.green(green)


@pytest.mark.parametrize("name", ["ensure_connection", "close_if_health_check_failed"])
@pytest.mark.parametrize(
    "owner", [PostgresDatabaseWrapper, base.DatabaseWrapper, None], ids=["django", "ours", "object"]
)
def test_in_a_sync_context_who_sees_to_the_connection_is_asked(owner: Any, name: str) -> None:
    Author.objects.create(name="x")
    connection.connection.close()
    connection.close()
    Author.objects.count()  # there is a connection, and nothing to do
    seen: list[str] = []
    watched = patched_on_the_object(name, seen) if owner is None else patched(owner, name, seen)
    with watched:
        Author.objects.count()
    assert seen or (owner, name) == (PostgresDatabaseWrapper, "close_if_health_check_failed"), (
        "ours calls Django's where health checks are on"
    )


def test_a_wrapper_of_another_thread_is_refused(run: Runner) -> None:
    made: list[Any] = []

    def make() -> None:
        made.append(base.DatabaseWrapper(connections.settings["default"], "default"))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()

    def green() -> None:
        Author.objects.all().query.get_compiler(connection=made[0]).execute_sql(MULTI)

    with pytest.raises(DatabaseError, match="can only be used in that same thread"):
        run.green(green)
