"""Tests C4: `iterator()` and `aiterator()` stream, and hold a connection just as long."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
from django.db import connection, transaction
from django.db.models import signals
from django.db.utils import ConnectionDoesNotExist

import pgbackend
from pgbackend import aio
from tests.conftest import Runner
from tests.library.models import Tag
from tests.support.fixtures import pool_of_default, settings_of_default

ROWS = 6

#: With a server-side cursor, and with all rows fetched at once.
KINDS = ("server-side", "client-side")


def streaming(kind: str) -> Any:
    if kind == "server-side":
        return nullcontext()
    return settings_of_default(DISABLE_SERVER_SIDE_CURSORS=True)


def leased() -> int:
    return sum(record.leased for record in pgbackend.statistics())


def tags() -> Any:
    return Tag.objects.order_by("name")


def open_cursors() -> int:
    """Return how many server-side cursors are open in the pool's only session."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM pg_cursors WHERE name LIKE '\\_django%'")
        return cursor.fetchone()[0]


async def nothing_is_left() -> None:
    """Wait until the only connection is back in the pool, and check that its session is clean."""
    gc.collect()
    async with asyncio.timeout(5):
        while leased():
            await asyncio.sleep(0)
        assert await aio.run(open_cursors) == 0


@pytest.fixture(autouse=True)
def _rows() -> Iterator[None]:
    Tag.objects.bulk_create(Tag(name=f"tag {number}") for number in range(ROWS))
    with pool_of_default(max_size=1, timeout=5):
        yield


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    with streaming(request.param):
        yield request.param


# --- Exhausted ------------------------------------------------------------------------------------


def test_iterator_keeps_one_lease_until_it_is_exhausted(
    run: Runner, kind: str, leases: list[Any]
) -> None:
    def work() -> None:
        seen = []
        for tag in tags().iterator(chunk_size=2):
            # Client-side, all rows are in memory when the first chunk is.
            assert leased() == (kind == "server-side") or len(seen) == ROWS - 1
            seen.append(tag.name)
        assert seen == [f"tag {number}" for number in range(ROWS)]
        assert leased() == 0
        assert len(leases) == 2

    run.green(work)


def test_aiterator_keeps_one_lease_until_it_is_exhausted(
    run: Runner, kind: str, leases: list[Any]
) -> None:
    async def main() -> None:
        seen = []
        async for tag in tags().aiterator(chunk_size=2):
            seen.append(tag.name)
            await asyncio.sleep(0)
        assert seen == [f"tag {number}" for number in range(ROWS)]
        assert leased() == 0
        assert len(leases) == 2

    run(main())


@pytest.mark.parametrize("how", ["aiterator", "async for"])
def test_an_alias_that_there_is_not_is_djangos_error_at_the_first_row(
    run: Runner, how: str
) -> None:
    async def main() -> None:
        queryset = tags().using("nowhere")
        rows = aiter(queryset.aiterator() if how == "aiterator" else queryset)
        with pytest.raises(ConnectionDoesNotExist, match="'nowhere' doesn't exist"):
            await anext(rows)

    run(main())


def test_disable_server_side_cursors_is_honoured(run: Runner, kind: str, leases: list[Any]) -> None:
    declared: list[str] = []

    def observe(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        declared.append(type(context["cursor"].cursor).__name__)
        return execute(sql, params, many, context)

    async def main() -> None:
        with connection.execute_wrapper(observe):
            assert len([tag async for tag in tags().aiterator(chunk_size=2)]) == ROWS
            assert len(await aio.run(lambda: list(tags().iterator(chunk_size=2)))) == ROWS

    run(main())
    server_side = ["ServerSideCursor" in name or "ServerCursor" in name for name in declared]
    assert server_side == [kind == "server-side"] * 2


# --- Abandoned, at each row -----------------------------------------------------------------------


def read(rows: Iterator[Any], count: int) -> None:
    for _ in range(count):
        next(rows)


async def aread(rows: AsyncIterator[Any], count: int) -> None:
    for _ in range(count):
        await anext(rows)


def close(count: int) -> None:
    rows = tags().iterator(chunk_size=1)
    read(rows, count)
    rows.close()


def leave_the_loop(count: int) -> None:
    for number, _ in enumerate(tags().iterator(chunk_size=1), 1):
        if number >= count:
            break


def drop(count: int) -> None:
    rows = tags().iterator(chunk_size=1)
    read(rows, count)


def drop_in_a_cycle(count: int) -> None:
    rows = tags().iterator(chunk_size=1)
    read(rows, count)
    cycle: list[Any] = [rows]
    cycle.append(cycle)


def fail(count: int) -> None:
    rows = tags().iterator(chunk_size=1)
    read(rows, count)
    raise ZeroDivisionError


@pytest.mark.sweep(one_in=4)
@pytest.mark.parametrize("count", range(ROWS + 1))
@pytest.mark.parametrize("abandon", [close, leave_the_loop, drop, drop_in_a_cycle, fail])
def test_iterator_gives_its_connection_back_wherever_it_is_abandoned(
    run: Runner, kind: str, abandon: Callable[[int], None], count: int
) -> None:
    async def main() -> None:
        try:
            await aio.run(abandon, count)
        except ZeroDivisionError:
            pass
        await nothing_is_left()

    run(main())


async def aclose(count: int) -> None:
    rows = aiter(tags().aiterator(chunk_size=1))
    await aread(rows, count)
    await rows.aclose()


async def aleave_the_loop(count: int) -> None:
    number = 0
    async for _ in tags().aiterator(chunk_size=1):
        number += 1
        if number >= count:
            break


async def adrop(count: int) -> None:
    rows = aiter(tags().aiterator(chunk_size=1))
    await aread(rows, count)
    del rows


async def adrop_in_a_cycle(count: int) -> None:
    rows = aiter(tags().aiterator(chunk_size=1))
    await aread(rows, count)
    cycle: list[Any] = [rows]
    cycle.append(cycle)


async def afail(count: int) -> None:
    rows = aiter(tags().aiterator(chunk_size=1))
    await aread(rows, count)
    raise ZeroDivisionError


async def abandoned_by_another_task(count: int) -> None:
    rows = aiter(tags().aiterator(chunk_size=1))
    await asyncio.create_task(aread(rows, count))
    await asyncio.create_task(_aclose(rows))


async def _aclose(rows: Any) -> None:
    await rows.aclose()


@pytest.mark.sweep(one_in=4)
@pytest.mark.parametrize("count", range(ROWS + 1))
@pytest.mark.parametrize(
    "abandon",
    [aclose, aleave_the_loop, adrop, adrop_in_a_cycle, afail, abandoned_by_another_task],
)
@pytest.mark.parametrize("green", [False, True], ids=["loop", "green"])
def test_aiterator_gives_its_connection_back_wherever_it_is_abandoned(
    run: Runner,
    kind: str,
    abandon: Callable[[int], Coroutine[Any, Any, None]],
    count: int,
    green: bool,
) -> None:
    async def main() -> None:
        try:
            await abandon(count)
        except ZeroDivisionError:
            pass
        await nothing_is_left()

    run(aio.portal(main()) if green else main())


@pytest.mark.parametrize("count", range(1, ROWS))
def test_aclose_of_an_aiterator_has_given_its_connection_back_when_it_returns(
    run: Runner, kind: str, count: int
) -> None:
    async def main() -> None:
        rows = aiter(tags().aiterator(chunk_size=1))
        await aread(rows, count)
        await rows.aclose()
        assert pgbackend.statistics()[0].leased == 0

    run(main())


@pytest.mark.sweep(one_in=4)
@pytest.mark.parametrize("count", range(ROWS + 1))
@pytest.mark.parametrize("between", [False, True], ids=["in a fetch", "between rows"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["iterator", "aiterator"])
def test_a_cancelled_task_gives_the_connection_of_its_iterator_back(
    run: Runner, kind: str, asynchronous: bool, between: bool, count: int
) -> None:
    reached = 0

    async def consume() -> None:
        nonlocal reached
        if asynchronous:
            async for _ in tags().aiterator(chunk_size=1):
                await row()
        else:
            for _ in tags().iterator(chunk_size=1):
                await row()

    async def row() -> None:
        nonlocal reached
        reached += 1
        if reached == count:
            task.cancel()  # delivered where the task waits next
            if between:
                await asyncio.sleep(0)

    async def main() -> None:
        nonlocal task
        task = asyncio.create_task(aio.portal(consume()))
        if count == 0:
            await asyncio.sleep(0)
            task.cancel()
        await asyncio.wait([task])
        # Client-side, no step waits after the first row.
        last = count == ROWS and not between
        assert task.cancelled() or last or (kind == "client-side" and not between)
        await nothing_is_left()

    task: asyncio.Task[None]
    run(main())


@pytest.mark.parametrize("rows", range(1, ROWS))
def test_an_iterator_that_its_loop_ends_with_says_nothing(
    run: Runner, kind: str, rows: int
) -> None:
    """`asyncio.run()` closes the async generators that are left."""
    kept: list[Any] = []

    async def main() -> None:
        kept.append(aiter(tags().aiterator(chunk_size=1)))
        await aread(kept[0], rows)

    run(main())
    kept.clear()


def test_a_finalizer_that_the_garbage_collector_runs_waits_for_nothing(run: Runner) -> None:
    """The collector's lists are on the stack: another task would use them during a wait."""
    waits: list[BaseException] = []

    class Finalized:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            try:
                Tag.objects.count()
            except BaseException as exc:
                waits.append(exc)

    async def neighbour() -> None:
        while not waits:
            await Tag.objects.acount()

    async def main() -> None:
        with pool_of_default(max_size=2):
            task = asyncio.create_task(neighbour())
            Finalized()
            gc.collect()
            assert "finalizer" in str(waits[0])
            await task
            assert Tag.objects.count() == ROWS
            await nothing_is_left()

    run(aio.portal(main()))


# --- In the body of the loop ----------------------------------------------------------------------


def test_statements_in_the_body_share_the_lease(run: Runner, kind: str, leases: list[Any]) -> None:
    """The pool has one connection: a statement that needed another would wait for it."""

    def each(tag: Tag) -> None:
        assert Tag.objects.get(pk=tag.pk) == tag
        with transaction.atomic():
            tag.name += "'"
            tag.save()
        with pgbackend.pinned(), connection.cursor() as cursor:
            cursor.execute("SELECT 1")
        for _ in tags().iterator(chunk_size=1):
            break

    async def main() -> None:
        for tag in tags().iterator(chunk_size=1):
            each(tag)
        if kind == "server-side":
            assert len(leases) == 2
        async for tag in tags().aiterator(chunk_size=1):
            await aio.run(each, tag)
        if kind == "server-side":
            assert len(leases) == 4
        await nothing_is_left()
        assert await tags().filter(name__endswith="''").acount() == ROWS

    run(aio.portal(main()))


def test_a_transaction_in_the_body_that_fails_loses_only_itself(run: Runner, kind: str) -> None:
    async def main() -> None:
        seen = 0
        async for tag in tags().aiterator(chunk_size=1):
            seen += 1
            with pytest.raises(ZeroDivisionError):
                async with transaction.atomic():
                    await Tag.objects.acreate(name=f"lost {tag.pk}")
                    raise ZeroDivisionError
            await Tag.objects.acreate(name=f"kept {tag.pk}")
        assert seen == ROWS
        await nothing_is_left()

    run(main())
    assert Tag.objects.filter(name__startswith="kept").count() == ROWS
    assert not Tag.objects.filter(name__startswith="lost").exists()


def test_iterators_in_a_block_end_with_it(run: Runner, kind: str) -> None:
    async def main() -> None:
        with transaction.atomic():
            left = tags().iterator(chunk_size=1)
            next(left)
            assert [tag.pk for tag in tags().iterator(chunk_size=2)]
            rows = aiter(tags().aiterator(chunk_size=1))
            await anext(rows)
        assert leased() == 0
        del left, rows
        await nothing_is_left()

    run(aio.portal(main()))


def test_two_tasks_stream_at_once_each_on_its_own_connection(run: Runner, kind: str) -> None:
    async def stream() -> list[str]:
        seen = []
        async for tag in tags().aiterator(chunk_size=1):
            seen.append(tag.name)
            await asyncio.sleep(0)
        return seen

    async def main() -> None:
        answers = await asyncio.gather(*(stream() for _ in range(8)))
        assert answers == [[f"tag {number}" for number in range(ROWS)]] * 8

    with pool_of_default(max_size=3):
        run(main())


# --- Memory ---------------------------------------------------------------------------------------


def test_objects_are_made_of_a_chunks_rows_a_few_at_a_time(run: Runner, kind: str) -> None:
    Tag.objects.bulk_create(Tag(name=f"more {number:04}") for number in range(500))
    made: list[str] = []

    def note(instance: Tag, **kwargs: Any) -> None:
        made.append(instance.name)

    async def main() -> None:
        seen = []
        async for tag in tags().aiterator(chunk_size=400):
            seen.append(tag.name)
            assert len(made) - len(seen) < 100
        assert seen == made == sorted(made)
        assert len(seen) == ROWS + 500

    signals.post_init.connect(note, Tag)
    try:
        run(main())
    finally:
        signals.post_init.disconnect(note, Tag)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["iterator", "aiterator"])
def test_memory_is_bounded_by_the_chunk(run: Runner, asynchronous: bool) -> None:
    """20,000 rows of 2 kB are 40 MB; a chunk of 100 of them is less than one."""

    def queryset() -> Any:
        return Tag.objects.extra(
            select={"text": "repeat('x', 2000)", "n": "n"}, tables=["numbers"]
        ).values_list("text", flat=True)

    async def main() -> int:
        count = 0
        if asynchronous:
            async for _ in queryset().aiterator(chunk_size=100):
                count += 1
        else:
            for _ in queryset().iterator(chunk_size=100):
                count += 1
        return count

    with connection.cursor() as cursor:
        cursor.execute(
            "CREATE TABLE numbers AS SELECT generate_series(1, %s) AS n", [20_000 // ROWS]
        )
    try:
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        count = run(aio.portal(main()))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        with connection.cursor() as cursor:
            cursor.execute("DROP TABLE numbers")
    assert count > 19_000
    assert peak - before < 4_000_000
