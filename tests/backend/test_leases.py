"""Tests that a statement leases a connection; and streaming, pinning, and session settings."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest
from django.db import connection, transaction
from django.db.models.signals import post_save

import pgbackend
from pgbackend import aio
from tests.conftest import Runner
from tests.library.models import Author, Book, Tag


def count(events: list[Any]) -> int:
    leased = [event for event in events if type(event).__name__ == "Leased"]
    assert len(leased) * 2 == len(events), "each lease has ended"
    events.clear()
    return len(leased)


def test_each_statement_has_a_lease_of_its_own(run: Runner, leases: list[Any]) -> None:
    author = Author.objects.create(name="a")
    book = Book.objects.create(title="b", author=author)

    def work() -> None:
        list(Book.objects.all())
        assert count(leases) == 1
        list(Book.objects.prefetch_related("tags", "author"))
        assert count(leases) == 3
        Book.objects.get(pk=book.pk).author.name
        assert count(leases) == 2
        Book.objects.filter(pk=book.pk).update(title="c")
        assert count(leases) == 1
        book.save()
        assert count(leases) == 1
        Tag.objects.bulk_create([Tag(name="x"), Tag(name="y")])
        assert count(leases) == 1, "bulk_create is atomic: one lease for all of it"
        with transaction.atomic():
            assert Tag.objects.count() == 2
            assert Tag.objects.exists()
        assert count(leases) == 1
        with transaction.atomic():
            pass
        assert count(leases) == 0, "a block without a statement needs no connection"
        book.delete()
        assert count(leases) <= 4

    run.green(work)


def test_statements_leave_no_work_for_the_garbage_collector(run: Runner) -> None:
    """Objects that refer to each other (lease, connection, cursor) part when the lease ends."""
    tag = Tag.objects.create(name="x")

    def work() -> None:
        Tag.objects.get(pk=tag.pk)
        tag.save()
        with transaction.atomic():
            list(Tag.objects.all())
            with transaction.atomic():
                tag.save()
        list(Tag.objects.iterator())

    def watched() -> list[object]:
        work()
        gc.collect()
        gc.disable()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            for _ in range(20):
                work()
            gc.collect()
            return [thing for thing in gc.garbage if type(thing).__module__.startswith("pgback")]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()

    assert run.green(watched) == []


def test_a_statement_shares_the_lease_that_its_task_holds(run: Runner, leases: list[Any]) -> None:
    Tag.objects.bulk_create(Tag(name=str(n)) for n in range(10))

    def green() -> None:
        for tag in Tag.objects.iterator(chunk_size=2):
            assert Tag.objects.get(pk=tag.pk) == tag
        assert count(leases) == 1
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
            assert Tag.objects.count() == 10
        assert count(leases) == 1

    async def on_the_loop() -> None:
        async for tag in Tag.objects.aiterator(chunk_size=2):
            assert await Tag.objects.aget(pk=tag.pk) == tag
        assert count(leases) == 1

    run.green(green)
    run(on_the_loop())


@pytest.mark.parametrize("rows_read", range(5))
def test_an_abandoned_iterator_gives_its_connection_back(
    run: Runner, leases: list[Any], rows_read: int
) -> None:
    Tag.objects.bulk_create(Tag(name=str(n)) for n in range(5))

    def abandon() -> None:
        rows = Tag.objects.iterator(chunk_size=1)
        for _ in range(rows_read):
            next(rows)
        del rows
        gc.collect()

    async def abandon_on_the_loop() -> None:
        rows = aiter(Tag.objects.aiterator(chunk_size=1))
        for _ in range(rows_read):
            await anext(rows)
        await rows.aclose()
        async for _ in Tag.objects.aiterator(chunk_size=1):
            break
        gc.collect()
        await asyncio.sleep(0)

    async def main() -> None:
        await aio.run(abandon)
        await abandon_on_the_loop()
        async with asyncio.timeout(5):
            while pgbackend.statistics()[0].leased:
                await asyncio.sleep(0)
        with connection_cursor_count() as open_cursors:
            assert await aio.run(open_cursors) == 0

    class connection_cursor_count:  # noqa: N801
        def __enter__(self) -> Any:
            def look() -> int:
                with connection.cursor() as cursor:
                    cursor.execute("SELECT count(*) FROM pg_cursors WHERE name LIKE '_django%'")
                    return cursor.fetchone()[0]

            return look

        def __exit__(self, *exc_info: object) -> None:
            pass

    run(main())


def test_a_cursor_left_open_warns_with_its_place(run_once: Runner) -> None:
    def forget() -> None:
        cursor = connection.cursor()
        cursor.execute("SELECT 1")
        with pytest.warns(ResourceWarning, match=r"test_leases\.py"):
            del cursor
            gc.collect()

    run_once.green(forget)


def test_pinned_keeps_one_session(run: Runner) -> None:
    def work() -> None:
        with pgbackend.pinned():
            with connection.cursor() as cursor:
                cursor.execute("CREATE TEMPORARY TABLE scratch (n int)")
            with connection.cursor() as cursor:
                cursor.execute("INSERT INTO scratch VALUES (1)")
            with pgbackend.pinned():
                Tag.objects.count()
            with connection.cursor() as cursor:
                cursor.execute("SELECT n FROM scratch")
                assert cursor.fetchone() == (1,)
        assert connection.connection is None

    run.green(work)


def test_raw_sql_leaves_nothing_in_the_session(run: Runner) -> None:
    async def main() -> None:
        async with pgbackend.pinned():
            await aio.run(spoil)
        for _ in range(8):
            await aio.run(look)

    def spoil() -> None:
        with connection.cursor() as cursor:
            cursor.execute("SET search_path TO pg_catalog")
            cursor.execute("SELECT set_config('app.tenant', 'one', false)")
            cursor.execute("CREATE TEMPORARY TABLE mine (n int)")
            cursor.execute("SELECT pg_advisory_lock(42)")
            cursor.execute("LISTEN news")

    def look() -> None:
        assert Tag.objects.count() == 0
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT current_setting('app.tenant', true), to_regclass('mine'), "
                "(SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' "
                "AND pid = pg_backend_pid()), "
                "(SELECT count(*) FROM pg_listening_channels())"
            )
            assert cursor.fetchone() in ((None, None, 0, 0), ("", None, 0, 0))

    run(main())


def test_statements_of_the_orm_pay_no_reset(run: Runner, admin: Any) -> None:
    """The server sees no reset: the ORM's statement stays the last statement of the session."""

    def work() -> int:
        with transaction.atomic():
            Tag.objects.create(name="t")
            with transaction.atomic():
                Tag.objects.count()
        Tag.objects.filter(name="t").exists()
        return pgbackend.statistics()[0].requests

    async def main() -> None:
        await aio.run(work)
        last = admin.execute(
            "SELECT query FROM pg_stat_activity WHERE query LIKE '%library_tag%' AND pid <> "
            "pg_backend_pid() AND state = 'idle' AND datname LIKE 'test%'"
        ).fetchall()
        assert last and all(not query.startswith("DISCARD") for (query,) in last)

    run(main())


def test_connection_created_is_sent_once_for_each_connection(run: Runner) -> None:
    from django.db.backends.signals import connection_created

    made: list[Any] = []

    def receiver(sender: Any, connection: Any, **kwargs: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
        made.append(connection.connection)

    async def main() -> None:
        for _ in range(5):
            await Tag.objects.acount()

    connection_created.connect(receiver)
    try:
        run(main())
    finally:
        connection_created.disconnect(receiver)
    assert len(made) == 1 and made[0] is not None


def test_async_receivers_are_awaited_and_sync_ones_run_in_place(run: Runner) -> None:
    seen: list[Any] = []

    async def later(sender: Any, instance: Any, **kwargs: Any) -> None:
        await asyncio.sleep(0)
        seen.append(("async", Tag.objects.count()))

    def at_once(sender: Any, instance: Any, **kwargs: Any) -> None:
        seen.append(("sync", Tag.objects.count()))

    async def main() -> None:
        async with transaction.atomic():
            await Tag.objects.acreate(name="t")

    post_save.connect(later, sender=Tag)
    post_save.connect(at_once, sender=Tag)
    try:
        run(main())
    finally:
        post_save.disconnect(later, sender=Tag)
        post_save.disconnect(at_once, sender=Tag)
    assert seen == [("sync", 1), ("async", 1)]


def test_orm_on_the_bare_loop_names_the_cure(run_once: Runner) -> None:
    from django.core.exceptions import SynchronousOnlyOperation

    async def main() -> None:
        with pytest.raises(SynchronousOnlyOperation, match="pgbackend.aio.run"):
            list(Tag.objects.all())

    run_once(main())


@pytest.mark.sweep(one_in=2)
def test_idle_connections_that_the_server_closed_are_noticed(run: Runner, admin: Any) -> None:
    async def main() -> None:
        for _ in range(10):
            await asyncio.gather(*(Tag.objects.acount() for _ in range(4)))
            admin.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                "WHERE datname LIKE 'test%' AND state = 'idle' AND query LIKE '%COUNT%library_tag%'"
            )

    run(main())


@pytest.mark.parametrize("in_block", [False, True], ids=["autocommit", "in a block"])
def test_a_cancelled_statement_gives_its_connection_back_at_once(
    run: Runner, in_block: bool
) -> None:
    """Freeing the traceback would be too late: Django closes its cursor for `Exception` only."""

    async def sleeping(kind: str) -> None:
        def work() -> None:
            if kind == "raw cursor":
                connection.cursor().execute("SELECT pg_sleep(10)")
            elif kind == "raw query":
                list(Tag.objects.raw("SELECT 1 AS id, pg_sleep(10)"))
            else:
                list(Tag.objects.extra(select={"nap": "pg_sleep(10)"}))

        if in_block:
            async with transaction.atomic():
                await aio.run(work)
        else:
            await aio.run(work)

    async def main() -> None:
        await Tag.objects.acreate(name="t")
        for kind in ("compiled", "raw cursor", "raw query"):
            task = asyncio.create_task(sleeping(kind))
            while not pgbackend.statistics()[0].leased:
                await asyncio.sleep(0)
            await asyncio.sleep(0.05)
            task.cancel()
            try:
                await task
            except asyncio.CancelledError as exc:
                kept = exc  # and with the error its traceback, frames and cursors
            assert pgbackend.statistics()[0].leased == 0, kind
            assert task.cancelled() and kept

    run(main())


def test_close_pool_closes_the_pools_of_all_loops(run: Runner, admin: Any) -> None:
    def sessions() -> int:
        row = admin.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%library_tag%' "
            "AND pid <> pg_backend_pid() AND backend_type = 'client backend' AND state = 'idle'"
        ).fetchone()
        return row[0]

    async def main() -> None:
        before = sessions()
        await Tag.objects.acount()
        assert sessions() == before + 1
        await asyncio.to_thread(connection.close_pool)
        assert pgbackend.statistics() == []
        async with asyncio.timeout(5):  # the server ends the session in its own time
            while sessions() > before:
                await asyncio.sleep(0.01)
        assert await Tag.objects.acount() == 0, "the next statement opens a new pool"

    run(main())
