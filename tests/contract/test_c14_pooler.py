"""Tests C14: pooled connections go through a pooler, bind on the server, and prepare statements."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from django.db import connection, connections, transaction
from django.db.models import F
from django.db.utils import DatabaseError

import pgbackend
from pgbackend import aio
from tests.conftest import Runner, wait_for
from tests.library.models import Author, Book, Tag
from tests.support.fixtures import settings_of_default
from tests.support.pgbouncer import pgbouncer, program, version
from tests.support.sweep import CANCELLING, Mode, Outcome, sweep


@pytest.fixture(scope="module")
def bouncer(request: pytest.FixtureRequest, conninfo: str) -> Iterator[dict[str, Any]]:
    if program() is None and not request.config.option.require_servers:
        pytest.skip("no PgBouncer here: 'make pgbouncer' installs it")
    with pgbouncer(conninfo) as parameters:
        yield parameters


@pytest.fixture
def through_bouncer(bouncer: dict[str, Any]) -> Iterator[None]:
    """Apply the settings that Django documents for PgBouncer in transaction mode."""
    given = connections.settings["default"]
    changes = {
        "HOST": bouncer["host"],
        "PORT": bouncer["port"],
        "USER": bouncer["user"],
        "PASSWORD": "",
        "DISABLE_SERVER_SIDE_CURSORS": True,
        "OPTIONS": {**given["OPTIONS"], "sslmode": "disable", "gssencmode": "disable"},
    }
    with settings_of_default(**changes):
        _connect_anew()
        yield
    _connect_anew()


def _connect_anew() -> None:
    connection.close()
    connections["default"].close_pool()


def _pids() -> set[int]:
    """Return the server's sessions that a handful of statements met."""
    pids = set()
    for _ in range(12):
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            pids.add(cursor.fetchone()[0])
    return pids


def test_statements_of_one_task_go_by_many_sessions(run: Runner, through_bouncer: None) -> None:
    """Without this the tests below would prove nothing."""

    async def main() -> None:
        async with transaction.atomic():
            await Tag.objects.acount()  # hold one session, so that PgBouncer opens another
            await asyncio.create_task(pgbackend.detached(Tag.objects.acount()))
        assert len(await aio.run(_pids)) > 1

    run(main())


def test_the_orm_works_through_a_pooler(run: Runner, through_bouncer: None) -> None:
    def request(number: int) -> None:
        author = Author.objects.create(name=f"author {number}")
        with transaction.atomic():
            book = Book.objects.create(title=f"book {number}", author=author)
            with transaction.atomic():
                book.tags.add(Tag.objects.get_or_create(name=f"tag {number}")[0])
            locked = Book.objects.select_for_update().get(pk=book.pk)
            locked.title += " (read)"
            locked.save()
        titles = [b.title for b in Book.objects.filter(author=author).prefetch_related("tags")]
        assert titles == [f"book {number} (read)"]
        assert {a.pk for a in Author.objects.iterator(chunk_size=3)} >= {author.pk}

    async def main() -> None:
        await asyncio.gather(*(aio.run(request, number) for number in range(30)))
        assert await Book.objects.acount() == 30
        assert len([book async for book in Book.objects.aiterator(chunk_size=7)]) == 30

    run(main())


def test_sync_code_works_through_a_pooler(through_bouncer: None) -> None:
    with transaction.atomic():
        Tag.objects.create(name="a")
    assert Tag.objects.get().name == "a"


def test_a_transaction_stays_on_one_session(run: Runner, through_bouncer: None) -> None:
    def one(number: int) -> int:
        with transaction.atomic():
            return len(_pids())

    async def main() -> None:
        assert set(await asyncio.gather(*(aio.run(one, number) for number in range(12)))) == {1}

    run(main())


@pytest.mark.parametrize("mode", CANCELLING, ids=lambda mode: mode.__name__)
def test_a_cancellation_through_a_pooler_leaves_everything_whole(
    run: Runner, through_bouncer: None, mode: Mode, admin: psycopg.Connection[Any]
) -> None:
    def operation() -> None:
        with transaction.atomic():
            Tag.objects.create(name="lost")
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_sleep(0.005)")
            transaction.set_rollback(True)
        Tag.objects.count()

    async def check(outcome: Outcome) -> None:
        async def one(number: int) -> None:
            with transaction.atomic():
                assert Tag.objects.count() == 0
                with connection.cursor() as cursor:
                    cursor.execute("SELECT %s::int", [number])
                    assert cursor.fetchone() == (number,)

        await asyncio.gather(*(aio.portal(one(number)) for number in range(4)))

    async def main() -> None:
        assert await sweep(lambda: aio.run(operation), mode, check) >= 4

    run(main())
    in_transaction = "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in%'"
    wait_for(lambda: admin.execute(in_transaction).fetchone() == (0,), "no transaction is left")


def test_prepared_statements_work_through_a_pooler_that_knows_them(
    run: Runner, through_bouncer: None
) -> None:
    if version() < (1, 21):
        pytest.skip("PgBouncer tracks prepared statements from 1.21 on")
    given = connections.settings["default"]["OPTIONS"]

    async def requests() -> None:
        for _ in range(10):
            assert await aio.run(_work) == ["x"]

    async def main() -> None:
        await asyncio.gather(*(requests() for _ in range(6)))

    prepared = {"server_side_binding": True, "prepare_threshold": 0}
    with settings_of_default(OPTIONS={**given, **prepared}):
        run(main())


# --- Server-side binding and prepared statements --------------------------------------------------


@pytest.fixture
def options() -> Iterator[Callable[..., Any]]:
    """Change OPTIONS of 'default', for connections from here on."""
    given = connections.settings["default"]["OPTIONS"]
    contexts = []

    def change(**options: Any) -> None:
        context = settings_of_default(OPTIONS={**given, **options})
        context.__enter__()
        contexts.append(context)
        _connect_anew()

    yield change
    for context in contexts:
        context.__exit__(None, None, None)
    _connect_anew()


def _work() -> list[str]:
    author = Author.objects.create(name="x")
    Author.objects.filter(pk=author.pk).update(name=F("name"))
    found = Author.objects.filter(pk=author.pk, name__in=["x", "y"])
    names = list(found.values_list("name", flat=True))
    author.delete()
    return names


def test_server_side_binding_works_in_every_context(run: Runner, options: Any) -> None:
    options(server_side_binding=True)

    def bound() -> bool:
        with connection.cursor() as cursor:
            return type(cursor.cursor).__mro__[1:].count(psycopg.ClientCursor) == 0

    async def main() -> None:
        assert await aio.run(bound)
        assert await aio.run(_work) == ["x"]
        assert await Tag.objects.acount() == 0
        async with transaction.atomic():
            assert await aio.run(_work) == ["x"]

    run(main())
    assert bound()
    assert _work() == ["x"]


def _prepared() -> int:
    """Return how many statements are prepared in the session of the block."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM pg_prepared_statements")
        return cursor.fetchone()[0]


def _find_by_name(times: int) -> int:
    for _ in range(times):
        list(Tag.objects.filter(name="x"))
    return _prepared()


def test_statements_are_prepared_in_every_context(run: Runner, options: Any) -> None:
    options(server_side_binding=True, prepare_threshold=2)

    def in_a_block() -> int:
        with transaction.atomic():
            return _find_by_name(4)

    async def main() -> None:
        assert await aio.run(in_a_block) >= 1

    run(main())
    assert _find_by_name(4) >= 1


@pytest.fixture
def growing_table(admin_of_tests: psycopg.Connection[Any]) -> Iterator[Callable[[], None]]:
    """Return a function that adds a column to the table of the tags."""
    added: list[str] = []

    def add() -> None:
        added.append(f"column_{len(added)}")
        admin_of_tests.execute(f"ALTER TABLE library_tag ADD COLUMN {added[-1]} int")

    yield add
    for name in added:
        admin_of_tests.execute(f"ALTER TABLE library_tag DROP COLUMN {name}")


@pytest.fixture
def admin_of_tests(conninfo: str) -> Iterator[psycopg.Connection[Any]]:
    """Open a session in the database of the tests, beside Django's."""
    name = connections.settings["default"]["NAME"]
    with psycopg.connect(conninfo, dbname=name, autocommit=True) as session:
        yield session


def _all_columns() -> int:
    """Execute a statement that selects all columns; return how many there are."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT * FROM library_tag WHERE id > %s", [0])
        return len(cursor.description)


def test_no_request_fails_in_autocommit_when_a_table_is_altered(
    run: Runner, options: Any, growing_table: Callable[[], None]
) -> None:
    options(server_side_binding=True, prepare_threshold=1, session_reset="never")
    seen: list[int] = []

    async def requests() -> None:
        seen.extend([await aio.run(_all_columns) for _ in range(20)])

    async def main() -> None:
        await requests()
        columns = seen[-1]
        for more in range(1, 6):
            loads = [asyncio.create_task(requests()) for _ in range(4)]
            await asyncio.to_thread(growing_table)
            await asyncio.gather(*loads)
            await requests()
            assert seen[-1] == columns + more

    run(main())
    assert len(seen) == 20 + 5 * 100


def test_no_statement_of_sync_code_fails_in_autocommit_when_a_table_is_altered(
    options: Any, growing_table: Callable[[], None]
) -> None:
    options(server_side_binding=True, prepare_threshold=1)
    before = [_all_columns() for _ in range(4)]
    growing_table()
    assert [_all_columns() for _ in range(4)] == [before[0] + 1] * 4


def test_a_transaction_that_meets_an_altered_table_fails_once(
    run: Runner, options: Any, growing_table: Callable[[], None]
) -> None:
    options(
        server_side_binding=True,
        prepare_threshold=1,
        session_reset="never",
        pool={"max_size": 1, "min_size": 0},
    )

    def block() -> int:
        with transaction.atomic():
            return _all_columns()

    async def main() -> None:
        columns = [await aio.run(block) for _ in range(4)][-1]
        await asyncio.to_thread(growing_table)
        with pytest.raises(DatabaseError, match="cached plan must not change result type"):
            await aio.run(block)
        assert [await aio.run(block) for _ in range(4)] == [columns + 1] * 4

    run(main())


def test_a_statement_that_somebody_deallocated_is_prepared_anew(run: Runner, options: Any) -> None:
    options(
        server_side_binding=True,
        prepare_threshold=1,
        session_reset="never",
        pool={"max_size": 1, "min_size": 0},
    )

    def deallocate() -> None:
        with connection.cursor() as cursor:  # in a DO block, where psycopg cannot see it
            cursor.execute("DO $$ BEGIN EXECUTE 'DEALLOCATE ALL'; END $$")

    async def main() -> None:
        columns = {await aio.run(_all_columns) for _ in range(4)}
        await aio.run(deallocate)
        assert {await aio.run(_all_columns) for _ in range(4)} == columns

    run(main())
