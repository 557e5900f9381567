"""Tests C3: a connection is leased for one statement, and no longer."""

from __future__ import annotations

import asyncio
import gc
import warnings
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from django.db import connection, models, transaction
from django.db.models import Count, F, Prefetch
from django.db.models.signals import post_init, post_save, pre_save

import pgbackend
from pgbackend import aio
from pgbackend.driver.pool import Pool
from tests.conftest import Runner
from tests.library.models import Author, Book, Entry, Tag
from tests.support.fixtures import pool_of_default

# Each column of the table is a lambda, so that all rows read alike.
# ruff: noqa: PLW0108


def leased() -> int:
    return sum(record.leased for record in pgbackend.statistics())


async def user_code_awaits() -> None:
    """Wait, in the place of an HTTP call, a template or a sleep of the user's."""
    assert leased() == 0
    for _ in range(3):
        await asyncio.sleep(0)
    assert leased() == 0


class Ledger:
    """Counts the statements of each lease, in order."""

    def __init__(self, events: list[Any]) -> None:
        self.events = events

    def observe(self, execute: Any, sql: str, *args: Any) -> Any:
        self.events.append(sql)
        return execute(sql, *args)

    def take(self) -> list[int]:
        counts: list[int] = []
        held = False
        for event in self.events:
            if isinstance(event, str):
                assert held, f"without a lease: {event}"
                counts[-1] += 1
            elif type(event).__name__ == "Leased":
                assert not held, "one lease at a time"
                counts.append(0)
                held = True
            else:
                held = False
        assert not held, "each lease has ended"
        self.events.clear()
        return counts


@pytest.fixture
def ledger(leases: list[Any]) -> Ledger:
    return Ledger(leases)


# --- Thirty kinds of operations -------------------------------------------------------------------

#: The sync form of an operation, its a-method (None: there is none), and the number of statements
#: in each of its leases. Three books, authors and tags are in the tables.
Operation = tuple[Callable[[], Any], Callable[[], Awaitable[Any]] | None, list[int]]


def book() -> Book:
    made = Book(pk=Books.pks[0], author_id=Books.authors[0], title="a book")
    made._state.db = "default"
    return made


class Books:
    pks: list[int]
    authors: list[int]
    tags: list[int]


async def a_list(queryset: Any) -> list[Any]:
    return [item async for item in queryset]


def _each(rows: Any) -> list[Any]:
    return list(rows)


def _first_author_name() -> str:
    found = Book.objects.get(pk=Books.pks[0])
    return found.author.name


def _deferred() -> str:
    found = Book.objects.defer("text").get(pk=Books.pks[0])
    return found.text


def _saved() -> Book:
    found = book()
    found.title = "saved"
    found.save(force_update=True)
    return found


async def _asaved() -> None:
    found = book()
    await found.asave(force_update=True)


OPERATIONS: dict[str, Operation] = {
    "get": (
        lambda: Book.objects.get(pk=Books.pks[0]),
        lambda: Book.objects.aget(pk=Books.pks[0]),
        [1],
    ),
    "list of a filter": (
        lambda: list(Book.objects.filter(title__startswith="book")),
        lambda: a_list(Book.objects.filter(title__startswith="book")),
        [1],
    ),
    "count": (lambda: Book.objects.count(), lambda: Book.objects.acount(), [1]),
    "exists": (lambda: Book.objects.exists(), lambda: Book.objects.aexists(), [1]),
    "first": (lambda: Book.objects.first(), lambda: Book.objects.afirst(), [1]),
    "last": (lambda: Book.objects.last(), lambda: Book.objects.alast(), [1]),
    "earliest": (
        lambda: Book.objects.earliest("pk"),
        lambda: Book.objects.aearliest("pk"),
        [1],
    ),
    "latest": (lambda: Book.objects.latest("pk"), lambda: Book.objects.alatest("pk"), [1]),
    "aggregate": (
        lambda: Book.objects.aggregate(Count("pk")),
        lambda: Book.objects.aaggregate(Count("pk")),
        [1],
    ),
    "contains": (
        lambda: Book.objects.contains(book()),
        lambda: Book.objects.acontains(book()),
        [1],
    ),
    "in_bulk": (
        lambda: Book.objects.in_bulk(Books.pks),
        lambda: Book.objects.ain_bulk(Books.pks),
        [1],
    ),
    "values": (
        lambda: list(Book.objects.values("title")),
        lambda: a_list(Book.objects.values("title")),
        [1],
    ),
    "values_list": (
        lambda: list(Book.objects.values_list("title", flat=True)),
        lambda: a_list(Book.objects.values_list("title", flat=True)),
        [1],
    ),
    "annotate": (
        lambda: list(Author.objects.annotate(n=Count("books"))),
        lambda: a_list(Author.objects.annotate(n=Count("books"))),
        [1],
    ),
    "union": (
        lambda: list(Book.objects.filter(pk=0).union(Book.objects.all())),
        lambda: a_list(Book.objects.filter(pk=0).union(Book.objects.all())),
        [1],
    ),
    "raw": (
        lambda: list(Book.objects.raw("SELECT * FROM library_book")),
        lambda: a_list(Book.objects.raw("SELECT * FROM library_book")),
        [1],
    ),
    "explain": (lambda: Book.objects.explain(), lambda: Book.objects.aexplain(), [1]),
    "an index": (lambda: Book.objects.order_by("pk")[1], None, [1]),
    "a slice": (lambda: list(Book.objects.order_by("pk")[1:3]), None, [1]),
    "an empty one": (lambda: list(Book.objects.none()), lambda: a_list(Book.objects.none()), []),
    "foreign key": (_first_author_name, None, [1, 1]),
    "deferred field": (_deferred, None, [1, 1]),
    "reverse foreign key": (
        lambda: list(Author(pk=Books.authors[0]).books.all()),
        lambda: a_list(Author(pk=Books.authors[0]).books.all()),
        [1],
    ),
    "many-to-many": (
        lambda: list(book().tags.all()),
        lambda: a_list(book().tags.all()),
        [1],
    ),
    "select_related": (
        lambda: [found.author.name for found in Book.objects.select_related("author")],
        None,
        [1],
    ),
    "prefetch_related": (
        lambda: list(Book.objects.prefetch_related("tags", "author")),
        lambda: a_list(Book.objects.prefetch_related("tags", "author")),
        [1, 1, 1],
    ),
    "Prefetch with a queryset": (
        lambda: list(
            Author.objects.prefetch_related(Prefetch("books", Book.objects.defer("text")))
        ),
        None,
        [1, 1],
    ),
    "iterator": (
        lambda: _each(Book.objects.iterator(chunk_size=2)),
        lambda: a_list(Book.objects.aiterator(chunk_size=2)),
        [1],
    ),
    "iterator with prefetch_related": (
        # The statement for the first chunk shares the lease of the server-side cursor, which is
        # exhausted when the second and last chunk has been read.
        lambda: _each(Book.objects.prefetch_related("tags").iterator(chunk_size=2)),
        lambda: a_list(Book.objects.prefetch_related("tags").aiterator(chunk_size=2)),
        [2, 1],
    ),
    "create": (
        lambda: Tag.objects.create(name="brand new"),
        lambda: Tag.objects.acreate(name="brand new"),
        [1],
    ),
    "create with a receiver that writes": (
        lambda: Author.objects.create(name="brand new"),
        lambda: Author.objects.acreate(name="brand new"),
        [1, 1],
    ),
    "bulk_create in one batch": (
        lambda: Tag.objects.bulk_create(Tag(name=f"n{n}") for n in range(4)),
        lambda: Tag.objects.abulk_create(Tag(name=f"n{n}") for n in range(4)),
        [1],
    ),
    "bulk_create in two batches": (
        lambda: Tag.objects.bulk_create((Tag(name=f"n{n}") for n in range(4)), batch_size=2),
        lambda: Tag.objects.abulk_create((Tag(name=f"n{n}") for n in range(4)), batch_size=2),
        [2],  # a transaction has one lease
    ),
    "bulk_update": (
        lambda: Book.objects.bulk_update([book()], ["title"]),
        lambda: Book.objects.abulk_update([book()], ["title"]),
        [1],
    ),
    "update": (
        lambda: Book.objects.update(saves=F("saves") + 1),
        lambda: Book.objects.aupdate(saves=F("saves") + 1),
        [1],
    ),
    "delete": (
        lambda: Entry.objects.all().delete(),
        lambda: Entry.objects.all().adelete(),
        [1],
    ),
    "delete with what depends on it": (
        # Django looks for the author's books, with their tags and notes; then it deletes all of
        # them in a transaction: tags, notes, books and the author.
        lambda: Author(pk=Books.authors[0]).delete(),
        lambda: Author(pk=Books.authors[0]).adelete(),
        [1, 1, 4],
    ),
    "get_or_create, found": (
        lambda: Tag.objects.get_or_create(name="long"),
        lambda: Tag.objects.aget_or_create(name="long"),
        [1],
    ),
    "get_or_create, not found": (
        lambda: Tag.objects.get_or_create(name="new one"),
        lambda: Tag.objects.aget_or_create(name="new one"),
        [1, 1],
    ),
    "update_or_create, found": (
        lambda: Tag.objects.update_or_create(name="long", defaults={"name": "longer"}),
        lambda: Tag.objects.aupdate_or_create(name="long", defaults={"name": "longer"}),
        [2],  # in a transaction: SELECT FOR UPDATE, UPDATE
    ),
    "update_or_create, not found": (
        lambda: Tag.objects.update_or_create(name="brand new"),
        lambda: Tag.objects.aupdate_or_create(name="brand new"),
        [4],  # the same, with a savepoint around the INSERT
    ),
    "save": (_saved, _asaved, [1]),
    "refresh_from_db": (
        lambda: book().refresh_from_db(),
        lambda: book().arefresh_from_db(),
        [1],
    ),
    "many-to-many add": (
        lambda: book().tags.add(Books.tags[0]),
        lambda: book().tags.aadd(Books.tags[0]),
        [1],
    ),
    "many-to-many set": (
        lambda: book().tags.set([Books.tags[0]]),
        lambda: book().tags.aset([Books.tags[0]]),
        [2],
    ),
    "many-to-many clear": (
        lambda: book().tags.clear(),
        lambda: book().tags.aclear(),
        [1],
    ),
    "many-to-many create": (
        lambda: book().tags.create(name="brand new"),
        lambda: book().tags.acreate(name="brand new"),
        [1, 1],
    ),
    "a block of three": (
        lambda: _block(),
        lambda: _ablock(),
        [3],
    ),
    "an empty block": (lambda: _empty_block(), lambda: _aempty_block(), []),
}


def _block() -> None:
    with transaction.atomic():
        Tag.objects.create(name="a")
        Tag.objects.count()
        Tag.objects.exists()


async def _ablock() -> None:
    async with transaction.atomic():
        await Tag.objects.acreate(name="a")
        await Tag.objects.acount()
        await Tag.objects.aexists()


def _empty_block() -> None:
    with transaction.atomic(), transaction.atomic(savepoint=False):
        pass


async def _aempty_block() -> None:
    async with transaction.atomic():
        pass


@pytest.fixture
def _books(make_books: Callable[..., list[Any]]) -> None:
    made = make_books(3)
    Books.pks = [one.pk for one in made]
    Books.authors = [one.author_id for one in made]
    Books.tags = list(Tag.objects.order_by("name").values_list("pk", flat=True))


def test_there_are_thirty_kinds_of_operations_and_more() -> None:
    assert len(OPERATIONS) >= 30


@pytest.mark.usefixtures("_books")
@pytest.mark.parametrize("name", OPERATIONS)
def test_green_each_operation_has_as_many_leases_as_it_should(
    run: Runner, ledger: Ledger, name: str
) -> None:
    operation, _, expected = OPERATIONS[name]

    async def main() -> None:
        with connection.execute_wrapper(ledger.observe):
            await user_code_awaits()
            operation()
            await user_code_awaits()
        assert ledger.take() == expected

    run(aio.portal(main()))


@pytest.mark.usefixtures("_books")
@pytest.mark.parametrize("name", [name for name, one in OPERATIONS.items() if one[1]])
def test_on_the_loop_each_operation_has_as_many_leases_as_it_should(
    run: Runner, ledger: Ledger, name: str
) -> None:
    _, operation, expected = OPERATIONS[name]
    assert operation is not None

    async def main() -> None:
        with connection.execute_wrapper(ledger.observe):
            await operation()
            await user_code_awaits()
        assert ledger.take() == expected

    run(main())


# --- While user code awaits anything else, no connection is held ----------------------------------


async def receiver_that_awaits(**kwargs: Any) -> None:
    await user_code_awaits()


def green_receiver_that_awaits(**kwargs: Any) -> None:
    aio_await(user_code_awaits())


def aio_await(coro: Any) -> Any:
    """Await `coro` in sync code, as users do by `async_to_sync`."""
    from asgiref.sync import async_to_sync

    async def wait() -> Any:
        return await coro

    return async_to_sync(wait)()


@pytest.fixture
def _receivers() -> Iterator[None]:
    signals = (post_init, pre_save, post_save)
    for signal, receiver in _product(signals):
        signal.connect(receiver, sender=Tag)
    yield
    for signal, receiver in _product(signals):
        signal.disconnect(receiver, sender=Tag)


def _product(signals: Any) -> list[tuple[Any, Any]]:
    return [
        (signal, receiver)
        for signal in signals
        for receiver in (receiver_that_awaits, green_receiver_that_awaits)
    ]


@pytest.mark.usefixtures("_receivers")
def test_no_connection_is_held_while_a_receiver_of_a_signal_awaits(
    run: Runner, ledger: Ledger
) -> None:
    async def main() -> None:
        with connection.execute_wrapper(ledger.observe):
            tag = await Tag.objects.acreate(name="a")
            tag.name = "b"
            await tag.asave()
            assert await Tag.objects.aget(name="b") == tag
            assert [tag async for tag in Tag.objects.all()] == [tag]
        assert ledger.take() == [1, 1, 1, 1]

    run(main())


def test_no_connection_is_held_while_a_save_of_the_users_awaits(
    run: Runner, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = models.Model.save

    def save_that_awaits(self: Any, *args: Any, **kwargs: Any) -> None:
        aio_await(user_code_awaits())
        save(self, *args, **kwargs)
        aio_await(user_code_awaits())

    monkeypatch.setattr(Tag, "save", save_that_awaits, raising=False)

    async def main() -> None:
        with connection.execute_wrapper(ledger.observe):
            await Tag.objects.acreate(name="a")
            await aio.run(Tag.objects.create, name="b")
            await Tag.objects.aget_or_create(name="a")
        assert ledger.take() == [1, 1, 1]

    run(main())


@pytest.mark.usefixtures("_books")
def test_no_connection_is_held_between_the_rows_of_a_result(run: Runner, ledger: Ledger) -> None:
    """Only `iterator()`, which streams, holds a connection between rows."""

    async def main() -> None:
        with connection.execute_wrapper(ledger.observe):
            for one in Book.objects.all():
                await user_code_awaits()
                assert one.author.name.startswith("author")
                await user_code_awaits()
            async for one in Book.objects.all():
                await user_code_awaits()
                assert await one.tags.acount() == 2
                await user_code_awaits()
        assert ledger.take() == [1] * 8

    run(aio.portal(main()))


@pytest.mark.usefixtures("_books")
def test_no_connection_is_held_while_a_view_awaits(
    run: Runner, async_client: Any, ledger: Ledger
) -> None:
    from django.http import HttpResponse
    from django.shortcuts import render
    from django.urls import path

    from tests import urls

    async def view(request: Any) -> HttpResponse:
        await user_code_awaits()
        titles = [book.title for book in Book.objects.order_by("pk")]
        await user_code_awaits()
        response = render(request, "library/books.html", {"books": Book.objects.order_by("pk")})
        await user_code_awaits()
        assert all(title in response.content.decode() for title in titles)
        return response

    urls.urlpatterns.append(path("awaits/", view))
    try:
        assert run(async_client.get("/awaits/")).status_code == 200
    finally:
        urls.urlpatterns.pop()
    counts = ledger.take()
    assert len(counts) > 2


@pytest.mark.parametrize("number", range(4))
def test_no_connection_is_held_after_a_statement_that_fails(
    run: Runner, ledger: Ledger, number: int
) -> None:
    def raw() -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1/0")

    def duplicate() -> None:
        Tag.objects.bulk_create([Tag(name="a"), Tag(name="a")])

    def nothing() -> None:
        Tag.objects.get(name="a")

    def streamed() -> None:
        list(Tag.objects.extra(select={"n": "1/(id-id)"}).iterator())

    operation = (raw, duplicate, nothing, streamed)[number]

    async def main() -> None:
        await Tag.objects.acreate(name="z")
        try:
            await aio.run(operation)
        except Exception as exc:
            kept = exc  # and with the error its traceback, frames and cursors
        await user_code_awaits()
        assert kept is not None

    run(main())


# --- Users' cursors -------------------------------------------------------------------------------


def test_a_cursor_holds_its_connection_until_it_is_closed(run: Runner, ledger: Ledger) -> None:
    async def main() -> None:
        with connection.execute_wrapper(ledger.observe):
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1")
                await asyncio.sleep(0)
                assert leased() == 1, "what the cursor has left in its session is still there"
                cursor.execute("SELECT 2")
            await user_code_awaits()
            cursor = connection.cursor()
            cursor.execute("SELECT 3")
            cursor.close()
            cursor.close()
            await user_code_awaits()
        assert ledger.take() == [2, 1]

    run(aio.portal(main()))


@pytest.mark.parametrize("how", ["deleted", "replaced", "in a cycle", "an exception"])
def test_a_cursor_that_is_forgotten_gives_its_connection_back_and_says_where_it_was_opened(
    run: Runner, how: str
) -> None:
    def forget() -> None:
        cursor = connection.cursor()  # opened here, in the task
        cursor.execute("SELECT 1")
        if how == "replaced":
            cursor = None
        elif how == "in a cycle":
            cursor.cursor.itself = [cursor]
        elif how == "an exception":
            raise ValueError

    async def main() -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                await aio.run(forget)
            except ValueError:
                pass
            gc.collect()
            await user_code_awaits()
        (warning,) = [one for one in caught if issubclass(one.category, ResourceWarning)]
        line = forget.__code__.co_firstlineno + 1
        assert f"{__file__}:{line} " in str(warning.message)
        assert "with connection.cursor()" in str(warning.message)

    run(main())


def test_a_cursor_in_a_block_is_the_blocks_to_end(run: Runner) -> None:
    """The block holds the connection, not the cursor, so forgetting the cursor is no leak."""

    async def main() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with transaction.atomic():
                cursor = connection.cursor()
                cursor.execute("SELECT 1")
            await user_code_awaits()
            with transaction.atomic():
                connection.cursor().execute("SELECT 1")
                gc.collect()
            await user_code_awaits()

    run(aio.portal(main()))


# --- One lease a task -----------------------------------------------------------------------------


def test_a_statement_shares_the_lease_that_its_task_holds(run: Runner, ledger: Ledger) -> None:
    def pid() -> int:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            return cursor.fetchone()[0]

    async def main() -> None:
        with connection.execute_wrapper(ledger.observe):
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_backend_pid()")
                (mine,) = cursor.fetchone()
                assert pid() == mine
                assert await aio.run(pid) == mine
                assert await Tag.objects.acount() == 0
                with transaction.atomic():
                    Tag.objects.create(name="t")
            assert ledger.take()[0] >= 4

    run(aio.portal(main()))


def test_a_task_never_waits_for_a_second_connection_while_it_holds_one(run: Runner) -> None:
    """Twenty tasks share a pool of one connection, and wait inside everything that holds it."""

    async def work(number: int) -> None:
        for tag in Tag.objects.iterator(chunk_size=1):
            await asyncio.sleep(0)
            assert Tag.objects.get(pk=tag.pk) == tag
        async for tag in Tag.objects.aiterator(chunk_size=1):
            assert await Tag.objects.aget(pk=tag.pk) == tag
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
            await asyncio.sleep(0)
            assert Tag.objects.count() >= 2
            with transaction.atomic():
                Tag.objects.create(name=f"cursor {number}")
        with pgbackend.pinned():
            Tag.objects.exists()
            await asyncio.sleep(0)
            with transaction.atomic():
                Tag.objects.create(name=f"pinned {number}")
        with transaction.atomic():
            for tag in Tag.objects.order_by("pk").iterator(chunk_size=1):
                await asyncio.gather(Tag.objects.aget(pk=tag.pk), Tag.objects.acount())
                break

    async def main() -> None:
        await Tag.objects.abulk_create([Tag(name="a"), Tag(name="b")])
        await asyncio.gather(*(work(number) for number in range(20)))

    with pool_of_default(max_size=1, timeout=20):
        run(aio.portal(main()), timeout=60)
    assert Tag.objects.count() == 42


# --- pinned() -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["with", "async with"])
def test_pinned_holds_one_connection_for_a_block(run: Runner, ledger: Ledger, form: str) -> None:
    def session() -> None:
        with connection.cursor() as cursor:
            cursor.execute("CREATE TEMPORARY TABLE scratch (n int)")
        with connection.cursor() as cursor:
            cursor.execute("SET application_name = 'pinned'")
            cursor.execute("SELECT pg_advisory_lock(7)")
        with pgbackend.pinned():
            Tag.objects.create(name="t")
        with transaction.atomic():
            Tag.objects.count()

    def after() -> None:
        with connection.cursor() as cursor:
            cursor.execute("INSERT INTO scratch VALUES (1)")
            cursor.execute("SHOW application_name")
            assert cursor.fetchone() == ("pinned",)
            cursor.execute("SELECT pg_advisory_unlock(7)")
            assert cursor.fetchone() == (True,)

    async def main() -> None:
        with connection.execute_wrapper(ledger.observe):
            if form == "with":
                with pgbackend.pinned():
                    assert leased() == 0, "it is leased at the first statement"
                    session()
                    await asyncio.sleep(0)
                    assert leased() == 1
                    after()
            else:
                async with pgbackend.pinned("default"):
                    await aio.run(session)
                    await asyncio.sleep(0)
                    await aio.run(after)
            await user_code_awaits()
        assert len(ledger.take()) <= 2  # a transaction in the operation has a lease of its own

    with pool_of_default(max_size=2):
        run(aio.portal(main()) if form == "with" else main())


def test_pinned_gives_the_connection_back_when_its_block_fails(run: Runner) -> None:
    async def main() -> None:
        with pytest.raises(ZeroDivisionError):
            async with pgbackend.pinned():
                await Tag.objects.acount()
                raise ZeroDivisionError
        await user_code_awaits()
        task = asyncio.create_task(forever())
        while not leased():
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await user_code_awaits()

    async def forever() -> None:
        async with pgbackend.pinned():
            await Tag.objects.acount()
            await asyncio.Event().wait()

    run(main())


def test_pinned_is_the_tasks_own(run: Runner) -> None:
    """A task that is started in the block takes a connection of its own."""

    def pid() -> int:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            return cursor.fetchone()[0]

    async def main() -> None:
        async with pgbackend.pinned():
            mine = await aio.run(pid)
            child = asyncio.create_task(aio.run(pid))
            assert await child != mine
            assert await aio.run(pid) == mine

    run(main())


@pytest.mark.usefixtures("_books")
@pytest.mark.parametrize(
    "name", ["get", "list of a filter", "create", "update", "a block of three"]
)
def test_a_lease_of_the_orms_own_statements_is_not_reset(
    run: Runner, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    reset: list[Any] = []
    restore = Pool._restore
    monkeypatch.setattr(Pool, "_restore", lambda *args: reset.append(args) or restore(*args))
    run.green(OPERATIONS[name][0])
    assert reset == []
