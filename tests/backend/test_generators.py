"""Tests blocks in generators: their own `with` finds them, whoever steps, closes or drops them."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import threading
import types
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from django.core.exceptions import SynchronousOnlyOperation
from django.db import DatabaseError, connection, transaction
from django.db.transaction import TransactionManagementError

import pgbackend
from pgbackend import aio, atomic_blocks, generators
from pgbackend.driver import bridge
from tests.conftest import Runner
from tests.library.models import Entry

OPENED_HERE = r"which had opened it in \S+test_generators.py:\d+, ended"


class Undo(Exception):
    pass


def leased() -> int:
    return sum(each.leased for each in pgbackend.statistics())


async def given_back() -> None:
    """Wait until no connection is held."""
    async with asyncio.timeout(5):
        while leased():
            await asyncio.sleep(0)


async def until_active(admin: Any, text: str) -> None:
    """Wait until a statement that begins with `text` is in flight."""
    sql = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE %s"
    async with asyncio.timeout(5):
        while admin.execute(sql, [f"SELECT {text}%"]).fetchone() == (0,):
            await asyncio.sleep(0.001)


async def texts() -> list[str]:
    """Return the committed texts, as another session sees them."""

    async def read() -> list[str]:
        return [entry.text async for entry in Entry.objects.order_by("text")]

    return await asyncio.create_task(pgbackend.detached(read()))


async def in_block() -> bool:
    return await aio.run(lambda: connection.in_atomic_block)


async def writing(*names: str, fail: bool = False, **options: Any) -> AsyncIterator[str]:
    async with transaction.atomic(**options):
        for name in names:
            await Entry.objects.acreate(text=name)
            yield name
        if fail:
            raise Undo


def writing_in_sync_code(*names: str) -> Iterator[str]:
    with transaction.atomic():
        for name in names:
            Entry.objects.create(text=name)
            yield name


async def step(generator: Any) -> Any:
    return await anext(generator, None)


@types.coroutine
def pause() -> Iterator[None]:
    yield


async def in_task(coro: Any) -> Any:
    """Await `coro` in a child task, which is inside the open blocks."""
    return await asyncio.create_task(coro)


@contextlib.asynccontextmanager
async def elsewhere() -> AsyncIterator[Callable[[Any], Any]]:
    """Yield a function like `in_task()`, for a task that is in none of the caller's blocks."""
    queue: asyncio.Queue[Any] = asyncio.Queue()

    async def serve() -> None:
        while (asked := await queue.get()) is not None:
            coro, done = asked
            try:
                done.set_result(await coro)
            except Exception as exc:
                done.set_exception(exc)

    async def call(coro: Any) -> Any:
        done = asyncio.get_running_loop().create_future()
        queue.put_nowait((coro, done))
        return await done

    task = asyncio.create_task(serve())
    try:
        yield call
    finally:
        queue.put_nowait(None)
        await task


@pytest.fixture(autouse=True)
def _nothing_is_listed() -> Iterator[None]:
    yield
    gc.collect()
    assert not generators.carried
    assert not generators._told


# --- Steps that several tasks make ----------------------------------------------------------------


@pytest.mark.parametrize("fail", [False, True], ids=["commits", "fails"])
@pytest.mark.parametrize("started", ["before", "inside"])
def test_other_tasks_steps_take_part_in_the_block(run: Runner, fail: bool, started: str) -> None:
    async def main() -> None:
        async with elsewhere() as there:
            await steps(in_task if started == "inside" else there)

    async def steps(other: Any) -> None:
        generator = writing("a", "b", "c", fail=fail)
        assert await anext(generator) == "a"
        assert await other(step(generator)) == "b"
        assert await other(step(generator)) == "c"
        assert await texts() == []
        if fail:
            with pytest.raises(Undo):
                await other(step(generator))
        else:
            assert await other(step(generator)) is None
        assert not await in_block()
        assert not await other(in_block())
        await given_back()
        await Entry.objects.acreate(text="afterwards")
        assert await texts() == (["afterwards"] if fail else ["a", "afterwards", "b", "c"])

    run(main())


def test_a_task_is_in_the_block_for_the_step_that_it_makes_only(run: Runner) -> None:
    async def other(generator: Any) -> None:
        assert await anext(generator) == "b"
        await Entry.objects.acreate(text="its own")
        assert not await in_block()
        async with transaction.atomic():
            await Entry.objects.acreate(text="its own too")

    async def main() -> None:
        async with elsewhere() as there:
            generator = writing("a", "b", fail=True)
            await anext(generator)
            await there(other(generator))
            with pytest.raises(Undo):
                await anext(generator)
        assert await texts() == ["its own", "its own too"]

    run(main())


def test_a_task_that_a_step_starts_is_in_the_block(run: Runner) -> None:
    async def gathering() -> AsyncIterator[None]:
        async with transaction.atomic():
            yield
            await Entry.objects.acreate(text="first")
            await asyncio.gather(*[Entry.objects.acreate(text=name) for name in "ab"])
            yield
            raise Undo

    async def main() -> None:
        async with elsewhere() as there:
            generator = gathering()
            await anext(generator)
            await there(step(generator))
            with pytest.raises(Undo):
                await anext(generator)
        assert await texts() == []

    run(main())


def test_the_inner_block_of_a_generator_is_ended_by_the_task_that_makes_the_step(
    run: Runner,
) -> None:
    async def nested() -> AsyncIterator[str]:
        async with transaction.atomic():
            await Entry.objects.acreate(text="outer")
            with contextlib.suppress(Undo):
                async with transaction.atomic():
                    await Entry.objects.acreate(text="undone")
                    yield "in both"
                    raise Undo
            yield "in one"
            await Entry.objects.acreate(text="outer too")

    async def main() -> None:
        async with elsewhere() as there:
            generator = nested()
            await anext(generator)
            assert await there(step(generator)) == "in one"
            assert await in_task(step(generator)) is None
        assert await texts() == ["outer", "outer too"]

    run(main())


def test_what_the_end_of_a_block_does_is_done_once_it_has_ended(run: Runner) -> None:
    """Hooks on commit are called from the generator, outside the block."""
    seen: list[bool] = []

    def hook() -> None:
        seen.append(connection.in_atomic_block)
        Entry.objects.create(text="by the hook")

    async def hooking() -> AsyncIterator[None]:
        async with transaction.atomic():
            await Entry.objects.acreate(text="a")
            transaction.on_commit(hook)
            yield

    async def main() -> None:
        async with elsewhere() as there:
            generator = hooking()
            await in_green(generator)
            await there(step(generator))
        assert seen == [False]
        assert await texts() == ["a", "by the hook"]

    async def in_green(generator: Any) -> None:
        await aio.portal(step(generator))

    run(main())


@pytest.mark.parametrize("heartbeat", [asyncio.wait_for, None], ids=["wait_for", "task"])
def test_a_block_ends_with_the_task_that_has_opened_it_and_later_steps_say_why(
    run: Runner, heartbeat: Any
) -> None:
    async def main() -> None:
        generator = writing("a", "b")
        await in_task(step(generator) if heartbeat is None else heartbeat(anext(generator), 5))
        with pytest.warns(ResourceWarning, match=OPENED_HERE):
            for _ in range(60):
                await asyncio.sleep(0)
        await given_back()
        with pytest.raises(TransactionManagementError, match=r"ended before the block did.*one ta"):
            await in_task(step(generator))
        await generator.aclose()
        await Entry.objects.acreate(text="afterwards")
        assert await texts() == ["afterwards"]

    run(main())


def test_a_block_that_ended_with_its_task_is_not_left_in_silence(run: Runner) -> None:
    async def waiting() -> AsyncIterator[None]:
        async with transaction.atomic():
            await Entry.objects.acreate(text="lost")
            yield

    async def main() -> None:
        generator = waiting()
        await in_task(step(generator))
        with pytest.raises(TransactionManagementError, match="ended before the block did"):
            await step(generator)  # no statement: only the end of the block can fail
        assert await texts() == []

    run(main())


def test_a_nested_block_that_ends_with_its_task_is_rolled_back_alone(run: Runner) -> None:
    async def main() -> None:
        async with transaction.atomic():
            await Entry.objects.acreate(text="outer")
            generator = writing("inner", "inner too")
            await in_task(step(generator))
            with pytest.warns(ResourceWarning, match=OPENED_HERE):
                for _ in range(60):
                    await asyncio.sleep(0)
            await Entry.objects.acreate(text="outer too")
            with pytest.raises(TransactionManagementError, match="ended before the block did"):
                await anext(generator)
        assert await texts() == ["outer", "outer too"]

    run(main())


def test_a_task_in_a_transaction_of_its_own_is_refused_the_step(run: Runner) -> None:
    async def other(generator: Any) -> None:
        async with transaction.atomic():
            await Entry.objects.acreate(text="its own")
            with pytest.raises(TransactionManagementError, match="cannot be part of both"):
                await anext(generator)

    async def main() -> None:
        async with elsewhere() as there:
            generator = writing("a", "b")
            await anext(generator)
            await there(other(generator))
        assert await texts() == ["its own"]
        assert not await in_block()
        await given_back()

    run(main())


def test_statements_of_others_are_their_own_while_a_generator_has_a_block_open(
    run: Runner,
) -> None:
    async def other() -> None:
        await Entry.objects.acreate(text="committed")
        async with transaction.atomic():
            await Entry.objects.acreate(text="committed too")

    async def main() -> None:
        others = [asyncio.create_task(pgbackend.detached(other())) for _ in range(2)]
        generator = writing("a", fail=True)
        await anext(generator)
        await asyncio.gather(*others)
        with pytest.raises(Undo):
            await anext(generator)
        assert await texts() == ["committed", "committed", "committed too", "committed too"]

    run(main())


# --- Abandoned generators -------------------------------------------------------------------------


async def by_break(generator: Any) -> None:
    async for _ in generator:
        break


async def by_an_error(generator: Any) -> None:
    with contextlib.suppress(Undo):
        async for _ in generator:
            raise Undo


async def by_a_timeout(generator: Any) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0):
            async for _ in generator:
                await asyncio.Event().wait()


@pytest.mark.parametrize("leave", [by_break, by_an_error, by_a_timeout])
@pytest.mark.parametrize("nested", [False, True], ids=["alone", "nested"])
@pytest.mark.parametrize("green", [False, True], ids=["loop", "green"])
def test_the_task_that_leaves_a_generator_is_out_of_its_block_at_once(
    run: Runner, leave: Callable[[Any], Any], nested: bool, green: bool
) -> None:
    async def around() -> None:
        await leave(writing("undone", "undone too"))
        await Entry.objects.acreate(text="kept")
        async with transaction.atomic():
            await Entry.objects.acreate(text="kept too")
        assert await in_block() == nested

    async def main() -> None:
        if nested:
            async with transaction.atomic():
                await around()
        else:
            await around()
        await given_back()
        assert await texts() == ["kept", "kept too"]

    run(aio.portal(main()) if green else main())


def test_a_generator_that_began_before_any_block_was_listed_is_left_as_others_are(
    run: Runner,
) -> None:
    async def late(begin: asyncio.Event) -> AsyncIterator[None]:
        yield
        await begin.wait()
        async with transaction.atomic():
            await Entry.objects.acreate(text="undone")
            yield

    async def main() -> None:
        begin = asyncio.Event()
        generator = late(begin)
        await anext(generator)
        begin.set()
        await anext(generator)
        del generator
        await Entry.objects.acreate(text="kept")
        assert not await in_block()
        await given_back()
        assert await texts() == ["kept"]

    run(main())


def test_a_pool_of_one_serves_the_task_that_has_left_a_generator(run: Runner) -> None:
    from tests.support.fixtures import pool_of_default

    async def main() -> None:
        await by_break(writing("undone"))
        await Entry.objects.acreate(text="kept")
        assert await texts() == ["kept"]

    with pool_of_default(max_size=1, min_size=0):
        run(main())


def test_the_task_whose_generator_another_has_closed_may_use_any_cursor(run: Runner) -> None:
    def with_cursor() -> Any:
        with connection.cursor() as cursor:
            return cursor.execute("SELECT 1").fetchone()

    async def main() -> None:
        generator = writing("undone", "undone too")
        await anext(generator)
        await in_task(generator.aclose())
        assert await aio.run(with_cursor) == (1,)
        await aio.run(connection.ensure_connection)
        await Entry.objects.acreate(text="kept")
        assert [entry.text async for entry in Entry.objects.all().aiterator()] == ["kept"]

    run(main())


@pytest.mark.parametrize("nested", [False, True], ids=["alone", "nested"])
def test_a_generator_that_another_task_closes_is_rolled_back(run: Runner, nested: bool) -> None:
    async def around() -> None:
        generator = writing("undone", "undone too")
        await anext(generator)
        await in_task(generator.aclose())  # type: ignore[attr-defined]
        assert await in_block() == nested
        await Entry.objects.acreate(text="kept")

    async def main() -> None:
        if nested:
            async with transaction.atomic():
                await around()
        else:
            await around()
        await given_back()
        assert await texts() == ["kept"]

    run(main())


def in_a_cycle(thing: Any) -> None:
    cycle = [thing]
    cycle.append(cycle)  # type: ignore[arg-type]


@pytest.mark.parametrize("nested", [False, True], ids=["alone", "nested"])
@pytest.mark.parametrize("sync", [False, True], ids=["async", "sync"])
@pytest.mark.parametrize("where", ["here", "another task", "the loop"])
def test_a_generator_that_the_garbage_collector_finds_is_rolled_back(
    run: Runner, nested: bool, sync: bool, where: str
) -> None:
    async def leave() -> None:
        if sync:
            generator: Any = writing_in_sync_code("undone", "undone too")
            await aio.run(next, generator)
        else:
            generator = writing("undone", "undone too")
            await anext(generator)
        in_a_cycle(generator)

    async def collect() -> None:
        if where == "here":
            gc.collect()
        elif where == "another task":
            await in_task(aio.run(gc.collect))
        else:
            collected = asyncio.Event()
            asyncio.get_running_loop().call_soon(lambda: (gc.collect(), collected.set()))
            await collected.wait()

    async def around() -> None:
        await leave()
        await collect()
        await Entry.objects.acreate(text="kept")
        assert await in_block() == nested

    async def main() -> None:
        gc.disable()
        try:
            if nested:
                async with transaction.atomic():
                    await around()
            else:
                await around()
        finally:
            gc.enable()
        await given_back()
        assert await texts() == ["kept"]

    run(main())


@pytest.mark.parametrize("nested", [False, True], ids=["alone", "nested"])
def test_a_coroutine_that_the_garbage_collector_finds_is_rolled_back(
    run: Runner, nested: bool
) -> None:
    """Green code has stepped the coroutine by hand: its block is listed under no generator."""

    async def write() -> None:
        with transaction.atomic():
            Entry.objects.create(text="undone")
            await pause()

    def leave() -> None:
        coro = write()
        coro.send(None)
        in_a_cycle(coro)

    def around() -> None:
        leave()
        gc.collect()
        assert connection.in_atomic_block == nested

    def green() -> None:
        if nested:
            with transaction.atomic():
                around()
        else:
            around()

    async def main() -> None:
        gc.disable()
        try:
            await aio.run(green)
        finally:
            gc.enable()
        await given_back()
        await Entry.objects.acreate(text="kept")
        assert await texts() == ["kept"]

    run(main())


@pytest.mark.parametrize("nested", [False, True], ids=["alone", "nested"])
def test_a_sync_generator_that_a_thread_closes_is_rolled_back(run: Runner, nested: bool) -> None:
    """The thread has met the generator by chance, and does not take part in the transaction."""

    async def around() -> None:
        generators: list[Any] = [writing_in_sync_code("undone", "undone too")]
        await aio.run(next, generators[0])
        thread = threading.Thread(target=generators.clear)
        thread.start()
        await asyncio.to_thread(thread.join)
        await Entry.objects.acreate(text="kept")
        assert await in_block() == nested

    async def main() -> None:
        if nested:
            async with transaction.atomic():
                await around()
        else:
            await around()
        await given_back()
        assert await texts() == ["kept"]

    run(main())


def test_a_thread_cannot_commit_a_generators_block_and_is_told_so(run: Runner) -> None:
    async def main() -> None:
        generator = writing_in_sync_code("lost")
        await aio.run(next, generator)
        told: list[BaseException] = []

        def end() -> None:
            try:
                next(generator)
            except TransactionManagementError as exc:
                told.append(exc)

        thread = threading.Thread(target=end)
        thread.start()
        await asyncio.to_thread(thread.join)
        (why,) = told
        assert "ended where nothing can be waited for" in str(why)
        await given_back()
        assert await texts() == []

    run(main())


def test_the_bare_loop_cannot_commit_a_generators_block_and_says_so(run: Runner) -> None:
    async def main() -> None:
        generator = writing_in_sync_code("lost")
        await aio.run(next, generator)
        with pytest.raises(SynchronousOnlyOperation):
            next(generator)
        await given_back()
        assert await texts() == []

    run(main())


@pytest.mark.parametrize("fail", [False, True], ids=["ends", "fails"])
@pytest.mark.parametrize("nested", [False, True], ids=["alone", "nested"])
def test_the_bare_loop_can_only_roll_back_a_block_that_green_code_has_opened(
    run: Runner, nested: bool, fail: bool
) -> None:
    """The block is in a coroutine that is stepped by hand: the same frame opens and ends it."""
    ran: list[str] = []

    async def write() -> None:
        with transaction.atomic():
            Entry.objects.create(text="undone")
            transaction.on_commit(lambda: ran.append("hook"))
            await pause()
            if fail:
                raise Undo

    async def around() -> None:
        coro = write()
        await aio.run(coro.send, None)
        with pytest.raises(Undo if fail else SynchronousOnlyOperation):
            coro.send(None)
        assert await in_block() == nested
        await Entry.objects.acreate(text="kept")

    async def main() -> None:
        if nested:
            async with transaction.atomic():
                await around()
        else:
            await around()
        await given_back()
        assert await texts() == ["kept"]

    run(main())
    assert ran == []


def test_a_block_is_open_in_a_generator_when_its_loop_ends(run: Runner, admin: Any) -> None:
    kept: list[Any] = []

    async def main() -> None:
        generator = writing("undone")
        await anext(generator)
        kept.append(generator)

    with warnings.catch_warnings():
        # Ignore the warning of the open block: it depends on how far the loop still runs.
        warnings.simplefilter("ignore", ResourceWarning)
        run(main())
    kept.clear()
    open_ = "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'"
    assert admin.execute(open_).fetchone() == (0,)
    assert Entry.objects.count() == 0


@pytest.mark.parametrize("started", ["before", "inside"])
def test_who_closes_a_generator_waits_for_the_statements_in_its_block(
    run: Runner, admin: Any, started: str
) -> None:
    """The statements are of tasks started inside, and go on when another task ends the block."""

    def sleep() -> Any:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_sleep(0.3), 'slept'")
            return cursor.fetchone()[1]

    async def writing_beside(children: list[asyncio.Task[Any]]) -> AsyncIterator[None]:
        async with transaction.atomic():
            await Entry.objects.acreate(text="undone")
            children.append(asyncio.create_task(aio.run(sleep)))
            yield

    async def main() -> None:
        children: list[asyncio.Task[Any]] = []
        async with elsewhere() as there:
            generator = writing_beside(children)
            await anext(generator)
            await until_active(admin, "pg_sleep")
            await (in_task if started == "inside" else there)(generator.aclose())
            assert await children[0] == "slept"
        await given_back()
        assert await texts() == []

    run(main())


def _execute(cursor: Any) -> None:
    cursor.execute(INSERT, ["sent"])


def _executemany(cursor: Any) -> None:
    cursor.executemany(INSERT, (each for each in [["sent"]]))


def _copy(cursor: Any) -> None:
    with cursor.copy("COPY library_entry (text) FROM STDIN") as copy:
        copy.write_row(["sent"])


def _stream(cursor: Any) -> None:
    assert len([*cursor.stream(f"{INSERT} RETURNING id", ["sent"])]) == 1


def _create(cursor: Any) -> None:
    Entry.objects.create(text="sent")


INSERT = "INSERT INTO library_entry (text) VALUES (%s)"


@pytest.mark.sweep(one_in=4)
@pytest.mark.parametrize("send", [_execute, _executemany, _copy, _stream, _create])
def test_a_statement_that_waits_while_another_task_ends_the_block_is_sent_outside_of_it(
    run: Runner, admin: Any, send: Callable[[Any], None]
) -> None:
    """The cursor was made in a generator's block, and nothing was sent before the block ended."""

    def sleep() -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_sleep(0.3)")

    async def writing_beside(children: list[asyncio.Task[Any]]) -> AsyncIterator[None]:
        async with transaction.atomic():
            await Entry.objects.acreate(text="undone")
            children.append(asyncio.create_task(aio.run(sleep)))
            yield

    async def main() -> None:
        children: list[asyncio.Task[Any]] = []
        async with elsewhere() as there:
            generator = writing_beside(children)
            await anext(generator)
            await until_active(admin, "pg_sleep")

            def write() -> None:
                with connection.cursor() as cursor:
                    closing = asyncio.create_task(there(generator.aclose()))
                    for _ in range(20):  # the closing task waits for the statement in the block
                        bridge.await_(asyncio.sleep(0))
                    assert not closing.done()
                    send(cursor)
                    bridge.await_(closing)

            await aio.run(write)
        await given_back()
        assert await texts() == ["sent"]

    run(main())


@pytest.mark.parametrize("green", [False, True], ids=["loop", "green"])
def test_a_generator_that_outlives_the_block_around_it_is_rolled_back_alone(
    run: Runner, green: bool
) -> None:
    async def main() -> None:
        async with transaction.atomic():
            await Entry.objects.acreate(text="kept")
            generator = writing("undone", "undone too")
            await anext(generator)
        assert not await in_block()
        with pytest.raises(TransactionManagementError, match="before the generator which it is"):
            await anext(generator)
        assert await texts() == ["kept"]

    run(aio.portal(main()) if green else main())


@pytest.mark.parametrize("green", [False, True], ids=["loop", "green"])
@pytest.mark.parametrize("nested", [False, True], ids=["alone", "nested"])
def test_a_cancellation_that_is_caught_keeps_no_generator_for_the_next_statement(
    run: Runner, green: bool, nested: bool
) -> None:
    """The task refers to the generator until its step ends; the error refers to its frames."""

    async def iterate() -> None:
        generator = writing("undone", "undone too")
        async for _ in generator:
            asyncio.get_running_loop().call_soon(task.cancel)
            await asyncio.Event().wait()

    async def cancelled() -> None:
        try:
            await iterate()
        except asyncio.CancelledError:
            task.uncancel()
        await Entry.objects.acreate(text="kept")
        await Entry.objects.acreate(text="kept too")

    async def main() -> None:
        if nested:
            async with transaction.atomic():
                await cancelled()
        else:
            await cancelled()

    async def whole() -> None:
        nonlocal task
        task = asyncio.create_task(aio.portal(main()) if green else main())
        await task
        await given_back()
        assert await texts() == ["kept", "kept too"]

    task: asyncio.Task[None]
    run(whole())


def test_a_task_is_started_without_a_wait_in_the_body_of_a_generator(run: Runner) -> None:
    """Code that starts a task does not expect other tasks to run meanwhile."""
    seen: list[str] = []

    async def main() -> None:
        async for _ in writing("a"):
            asyncio.get_running_loop().call_soon(seen.append, "another's turn")
            task = asyncio.create_task(asyncio.sleep(0))
            assert not seen
            await task
        assert seen

    run(aio.portal(main()))


def test_the_frame_of_an_async_with_is_handed_to_no_other_block(run: Runner) -> None:
    async def main() -> None:
        atomic = transaction.atomic()
        atomic._from_testcase = True  # type: ignore[attr-defined]
        async with atomic:  # which needs no frame
            assert atomic_blocks.async_with.frame is None
            transaction.set_rollback(True)
        assert atomic_blocks.async_with.frame is None

    run(main())


# --- Other ways to keep a block -------------------------------------------------------------------


def test_an_exit_stack_that_another_task_closes_ends_its_blocks(run: Runner) -> None:
    async def main() -> None:
        stack = contextlib.AsyncExitStack()
        await stack.enter_async_context(transaction.atomic())
        await Entry.objects.acreate(text="a")
        await stack.enter_async_context(transaction.atomic())
        await Entry.objects.acreate(text="b")
        await in_task(stack.aclose())
        assert not await in_block()
        await given_back()
        assert await texts() == ["a", "b"]

    run(main())


def test_a_block_that_was_opened_by_hand_ends_with_its_task(run: Runner) -> None:
    async def forget() -> Any:
        atomic = transaction.atomic()
        await atomic.__aenter__()  # type: ignore[attr-defined]
        await Entry.objects.acreate(text="lost")
        return atomic

    async def main() -> None:
        atomic = await in_task(forget())
        with pytest.warns(ResourceWarning, match="an atomic block was rolled back"):
            for _ in range(60):
                await asyncio.sleep(0)
        await given_back()
        with pytest.raises(TransactionManagementError, match="ended before the block did"):
            await atomic.__aexit__(None, None, None)
        assert await texts() == []

    run(main())


def test_a_context_manager_made_of_a_generator_is_a_block_like_others(run: Runner) -> None:
    @contextlib.asynccontextmanager
    async def unit() -> AsyncIterator[None]:
        async with transaction.atomic():
            yield

    async def work(name: str, fail: bool) -> None:
        with contextlib.suppress(Undo):
            async with unit():
                await Entry.objects.acreate(text=name)
                async with unit():
                    await Entry.objects.acreate(text=name * 2)
                if fail:
                    raise Undo
        assert not await in_block()

    async def main() -> None:
        await asyncio.gather(*[work(name, fail=name in "bd") for name in "abcd"])
        assert await texts() == ["a", "aa", "c", "cc"]

    run(main())


def test_one_atomic_object_may_be_entered_by_many_tasks_at_once(run: Runner) -> None:
    atomic = transaction.atomic()

    @atomic
    def in_sync_code(name: str) -> None:
        Entry.objects.create(text=name)
        Entry.objects.create(text=name * 2)
        if name in "bd":
            raise Undo

    async def work(name: str) -> None:
        with contextlib.suppress(Undo):
            async with atomic:
                await Entry.objects.acreate(text=f"async {name}")
                await aio.run(in_sync_code, name)
        with contextlib.suppress(Undo):
            await aio.run(in_sync_code, name)

    async def main() -> None:
        await asyncio.gather(*[work(name) for name in "abcd"])
        expected = sorted(["async a", "async c", *"aacc", "aa", "aa", "cc", "cc"])
        assert await texts() == expected
        assert atomic._pgbackend_blocks == []  # type: ignore[attr-defined]

    run(main())


def keeping(atomic: Any) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(atomic)
        Entry.objects.create(text="kept")
        yield


async def keeping_async(atomic: Any) -> AsyncIterator[None]:
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(atomic)
        await Entry.objects.acreate(text="kept")
        yield


@pytest.mark.parametrize("keep", [keeping, keeping_async])
def test_an_exit_stack_ends_its_own_block_inside_another_of_the_same_atomic_object(
    run: Runner, keep: Callable[[Any], Any]
) -> None:
    """The other block is another task's, in another transaction; a `contextlib` frame ends it."""
    atomic = transaction.atomic()

    async def make_step(generator: Any) -> None:
        if keep is keeping:
            await aio.run(next, generator, None)
        else:
            await step(generator)

    async def other(generator: Any) -> None:
        with contextlib.suppress(Undo):
            async with atomic:
                await Entry.objects.acreate(text="undone")
                await make_step(generator)
                assert await in_block()
                assert await texts() == ["kept"]
                raise Undo
        assert not await in_block()

    async def main() -> None:
        async with elsewhere() as there:
            generator = keep(atomic)
            await make_step(generator)
            await there(other(generator))
            assert not await in_block()
        await given_back()
        assert await texts() == ["kept"]
        assert atomic._pgbackend_blocks == []  # type: ignore[attr-defined]

    run(main())


def test_a_block_that_is_ended_by_hand_ends_no_other_of_its_function(run: Runner) -> None:
    def green() -> None:
        apart = transaction.atomic()
        with pgbackend.detached():
            apart.__enter__()
            Entry.objects.create(text="kept")
        with contextlib.suppress(Undo), transaction.atomic():
            Entry.objects.create(text="undone")
            apart.__exit__(None, None, None)
            assert connection.in_atomic_block
            raise Undo
        assert not connection.in_atomic_block

    async def main() -> None:
        await aio.run(green)
        await given_back()
        assert await texts() == ["kept"]

    run(main())


def test_the_late_end_of_a_nested_block_leaves_the_block_around_it_open(run: Runner) -> None:
    """The nested block has ended before, with the task that opened it."""

    async def forget() -> Any:
        atomic = transaction.atomic()
        await atomic.__aenter__()  # type: ignore[attr-defined]
        await Entry.objects.acreate(text="undone")
        return atomic

    async def main() -> None:
        with contextlib.suppress(Undo):
            async with transaction.atomic():
                atomic = await in_task(forget())
                with pytest.warns(ResourceWarning, match="an atomic block was rolled back"):
                    for _ in range(60):
                        await asyncio.sleep(0)
                assert await Entry.objects.acount() == 0
                with pytest.raises(TransactionManagementError, match="ended before the block did"):
                    await atomic.__aexit__(None, None, None)
                await Entry.objects.acreate(text="undone too")
                assert await in_block()
                raise Undo
        await given_back()
        assert await texts() == []

    run(main())


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_functions_that_open_and_end_blocks_of_one_atomic_object_end_their_tasks_own(
    run: Runner, order: str
) -> None:
    """No frame tells which block is meant: the function that opened it has returned."""
    atomic = transaction.atomic()

    async def begin(stack: contextlib.AsyncExitStack) -> None:
        await stack.enter_async_context(atomic)

    async def end(stack: contextlib.AsyncExitStack, error: BaseException | None) -> None:
        await stack.__aexit__(type(error) if error else None, error, None)

    async def work(name: str, begun: asyncio.Event, go: asyncio.Event) -> None:
        stack = contextlib.AsyncExitStack()
        await begin(stack)
        await Entry.objects.acreate(text=name)
        begun.set()
        await go.wait()
        await end(stack, Undo() if name == "b" else None)
        assert not await in_block()

    async def main() -> None:
        events = {name: (asyncio.Event(), asyncio.Event()) for name in "ab"}
        tasks = {name: asyncio.create_task(work(name, *events[name])) for name in "ab"}
        for begun, _ in events.values():
            await begun.wait()
        for name in order:
            events[name][1].set()
            await tasks[name]
            assert await texts() == (["a"] if tasks["a"].done() else [])
        await given_back()

    run(main())


def test_detached_code_of_a_generator_does_not_detach_who_leaves_it(run: Runner) -> None:
    async def detached() -> AsyncIterator[None]:
        async with pgbackend.detached():
            await Entry.objects.acreate(text="kept")
            yield

    async def main() -> None:
        with contextlib.suppress(Undo):
            async with transaction.atomic():
                await by_break(detached())
                assert await in_block()
                await Entry.objects.acreate(text="undone")
                raise Undo
        await given_back()
        assert await texts() == ["kept"]

    run(main())


def test_detached_code_below_a_generators_block_stays_detached(run: Runner) -> None:
    async def generating() -> AsyncIterator[None]:
        async with transaction.atomic():
            yield
            await Entry.objects.acreate(text="undone")
            async with pgbackend.detached():
                await Entry.objects.acreate(text="kept")
                async with transaction.atomic():
                    await Entry.objects.acreate(text="kept too")
            await Entry.objects.acreate(text="undone too")
            raise Undo

    async def main() -> None:
        async with elsewhere() as there:
            generator = generating()
            await anext(generator)
            with pytest.raises(Undo):
                await there(step(generator))
        await given_back()
        assert await texts() == ["kept", "kept too"]

    run(main())


def test_a_doomed_block_of_a_generator_is_rolled_back_where_it_ends(run: Runner) -> None:
    async def failing() -> AsyncIterator[None]:
        async with transaction.atomic():
            await Entry.objects.acreate(text="undone")
            with contextlib.suppress(DatabaseError):
                await aio.run(lambda: connection.cursor().execute("SELECT nowhere"))
            yield

    async def main() -> None:
        generator = failing()
        await anext(generator)
        with pytest.raises(TransactionManagementError):
            await in_task(step_to_the_end(generator))
        await given_back()
        assert await texts() == []

    async def step_to_the_end(generator: Any) -> None:
        with contextlib.suppress(StopAsyncIteration):
            await generator.asend(None)
        raise TransactionManagementError

    run(main())


def test_a_block_that_a_step_begins_with_is_inside_that_of_the_generator(run: Runner) -> None:
    """The task that makes the step may know nothing of the generator's block."""

    def nesting() -> Iterator[None]:
        with transaction.atomic():
            Entry.objects.create(text="outer")
            yield
            with transaction.atomic():
                Entry.objects.create(text="inner")
            yield

    async def main() -> None:
        outside = contextvars.copy_context()
        generator = nesting()
        await aio.run(next, generator)
        loop = asyncio.get_running_loop()
        await loop.create_task(aio.run(next, generator), context=outside)
        assert await texts() == [], "nothing of it is committed yet"
        await aio.run(generator.close)
        assert await texts() == []
        await given_back()

    run(main())
