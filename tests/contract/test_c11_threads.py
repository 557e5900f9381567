"""Tests C11 with threads: one that takes part in a transaction may be interrupted anywhere.

A thread and a green task of the same transaction do one thing each. One of the two is halted at
each line of the package in turn, while the other does its thing from beginning to end; see
`tests/support/halt.py`. A thread loses the processor at such a moment only on a busy machine.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from random import Random
from typing import Any

import psycopg
import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.db import (
    InterfaceError,
    OperationalError,
    close_old_connections,
    connection,
    connections,
    transaction,
)
from django.db.backends.signals import connection_created
from django.db.transaction import TransactionManagementError

from pgbackend import aio, state, transactions
from pgbackend.driver import bridge
from pgbackend.driver.coroutines import as_coroutine
from pgbackend.driver.lease import Lease
from pgbackend.transactions import Transaction
from tests.conftest import Runner
from tests.library.models import Tag
from tests.support.fixtures import settings_of_default
from tests.support.halt import Halt

#: It is given the name of its row, and a function to call in the midst of its block.
Thing = Callable[[str, Callable[[], object]], None]
Sweep = Callable[[Callable[[Halt], Any]], None]

#: The second is of a cursor that was used before, and whose lease has ended.
_REFUSALS = (TransactionManagementError, InterfaceError)
#: A ROLLBACK cancels the statement in flight; Django does not wrap the errors of a COPY.
_CANCELLATIONS = (OperationalError, psycopg.errors.QueryCanceled)
#: How many lines each test halts at, of the up to 3,000 that it executes.
HALTS = 20


def statement(who: str, pause: Callable[[], object]) -> None:
    Tag.objects.create(name=who)


def statement_of_ones_own(who: str, pause: Callable[[], object]) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
        cursor.execute("INSERT INTO library_tag (name) VALUES (%s)", [who])


def many(who: str, pause: Callable[[], object]) -> None:
    with connection.cursor() as cursor:
        cursor.executemany("INSERT INTO library_tag (name) VALUES (%s)", [[who]])


def copy(who: str, pause: Callable[[], object]) -> None:
    with connection.cursor() as cursor, cursor.copy("COPY library_tag (name) FROM STDIN") as copy:
        copy.write_row([who])


def block(who: str, pause: Callable[[], object]) -> None:
    with transaction.atomic():
        pause()
        Tag.objects.create(name=who)


def refused_block(who: str, pause: Callable[[], object]) -> None:
    with transaction.atomic():
        Tag.objects.create(name="refused")
        pause()
        transaction.set_rollback(True)
    seen = [tag.name for tag in Tag.objects.all()]
    assert "refused" not in seen, "a statement of the other's block, or one that went into it"
    Tag.objects.create(name=who)


def failing_block(who: str, pause: Callable[[], object]) -> None:
    try:
        with transaction.atomic():
            Tag.objects.create(name="refused")
            pause()
            raise ZeroDivisionError
    except ZeroDivisionError:
        Tag.objects.create(name=who)


STATEMENTS = [statement, statement_of_ones_own, many, copy]
BLOCKS = [block, refused_block, failing_block]


async def side_by_side(halt: Halt, halted: str, of_thread: Thing, of_task: Thing) -> None:
    """Let a thread and a task do their things; one of them is halted meanwhile.

    In the midst of its block the other one lets it go on, until it waits or is done.
    """

    def let_go_on() -> None:
        halt.end()
        deadline = time.monotonic() + 10
        while not halt.is_at_rest():
            assert time.monotonic() < deadline, halt.place
            if bridge.current() is not None:
                bridge.await_(asyncio.sleep(0))

    def do(thing: Thing, who: str) -> None:
        if who == halted:
            with halt.tracing():
                thing(who, int)
        else:
            halt.wait()
            thing(who, let_go_on)
            halt.end()

    async def in_task() -> None:
        while halted == "thread" and not halt.is_reached():
            await asyncio.sleep(0)  # without blocking the loop
        await aio.run(do, of_task, "task")

    in_thread = sync_to_async(do, thread_sensitive=False)(of_thread, "thread")
    with halt.ends_with_waits():
        await asyncio.gather(in_thread, in_task())


@pytest.fixture
def sweep(run_once: Runner, request: pytest.FixtureRequest) -> Sweep:
    """Run a test's schedule with a halt at each of some lines, drawn by this run's seed."""
    draw = Random(f"{request.config.option.seed} {request.node.nodeid}")

    def run(once: Callable[[Halt], Any]) -> None:
        def halt(at: int) -> Halt:
            made = Halt(at)
            if inspect.iscoroutinefunction(once):
                run_once(once(made))
            else:
                once(made)
            return made

        lines = halt(-1).lines
        assert lines > HALTS
        for at in draw.sample(range(lines), HALTS):
            halt(at)

    return run


@pytest.mark.sweep(one_in=12)
@pytest.mark.parametrize("halted", ["thread", "task"])
@pytest.mark.parametrize(
    ("of_thread", "of_task"),
    [
        *((each, refused_block) for each in STATEMENTS),
        *((refused_block, each) for each in STATEMENTS[:2]),
        *((one, other) for one in BLOCKS for other in BLOCKS),
    ],
)
def test_a_thread_and_a_task_take_turns_wherever_one_is_halted(
    sweep: Sweep, halted: str, of_thread: Thing, of_task: Thing
) -> None:
    async def once(halt: Halt) -> None:
        async with transaction.atomic():
            await Tag.objects.acreate(name="first")
            await side_by_side(halt, halted, of_thread, of_task)
            names = sorted([tag.name async for tag in Tag.objects.all()])
            assert names == ["first", "task", "thread"], halt.place
            assert not transaction.get_rollback(), halt.place
        assert await Tag.objects.acount() == 3, halt.place
        await Tag.objects.all().adelete()

    sweep(once)


@pytest.mark.sweep(one_in=6)
@pytest.mark.parametrize("halted", ["thread", "task"])
@pytest.mark.parametrize(
    ("of_thread", "of_task"),
    [
        *((each, refused_block) for each in STATEMENTS),
        *((refused_block, each) for each in STATEMENTS),
        (refused_block, refused_block),
    ],
)
def test_a_connection_of_ones_own_is_used_in_turn_by_those_whom_its_thread_waits_for(
    sweep: Sweep, halted: str, of_thread: Thing, of_task: Thing
) -> None:
    """They share a transaction that sync code has opened before it calls `async_to_sync()`."""

    def once(halt: Halt) -> None:
        with transaction.atomic():
            Tag.objects.create(name="first")
            async_to_sync(side_by_side)(halt, halted, of_thread, of_task)
            names = sorted(Tag.objects.values_list("name", flat=True))
            assert names == ["first", "task", "thread"], halt.place
        Tag.objects.all().delete()

    sweep(once)


@pytest.mark.sweep(one_in=7)
@pytest.mark.parametrize("fails", [False, True], ids=["COMMIT", "ROLLBACK"])
@pytest.mark.parametrize("halted", ["thread", "task"])
@pytest.mark.parametrize("of_thread", [*STATEMENTS, *BLOCKS])
def test_a_thread_writes_nothing_after_the_end_of_its_block(
    sweep: Sweep, halted: str, of_thread: Thing, fails: bool
) -> None:
    """The writes of a thread whose block ends meanwhile are committed with it, or refused."""
    refusals = (*_REFUSALS, *_CANCELLATIONS) if fails else _REFUSALS

    async def once(halt: Halt) -> None:
        def do() -> None:
            if halted == "thread":
                with halt.tracing():
                    of_thread("thread", int)
            else:
                halt.wait()
                of_thread("thread", int)
                halt.end()

        def end_meanwhile() -> asyncio.Future[None]:
            block = ExitStack()
            block.enter_context(transaction.atomic())
            Tag.objects.create(name="first")
            thread = asyncio.ensure_future(sync_to_async(do, thread_sensitive=False)())
            bridge.await_(asyncio.sleep(0))  # starts the thread
            while halted == "thread" and not halt.is_reached():
                bridge.await_(asyncio.sleep(0))
            error = ZeroDivisionError() if fails else None
            with halt.tracing() if halted == "task" else nullcontext():
                block.__exit__(type(error) if error else None, error, None)
            halt.end()
            return thread

        with halt.ends_with_waits():
            thread = await aio.run(end_meanwhile)
            await asyncio.wait([thread])
        refused = thread.exception()
        assert refused is None or isinstance(refused, refusals), halt.place
        found = {tag.name async for tag in Tag.objects.all()}
        assert found == (set() if fails else {"first"} if refused else {"first", "thread"}), (
            halt.place
        )
        await Tag.objects.all().adelete()

    sweep(once)


def test_an_execute_of_two_statements_that_loses_its_turn_in_between_repeats_none(
    run: Runner,
) -> None:
    """A cursor class may send more than it is asked for: the first is not sent twice."""
    between, block_is_open = threading.Event(), threading.Event()

    class Auditing(psycopg.ClientCursor[Any]):
        def execute(self, query: Any, *args: Any, **kwargs: Any) -> Any:
            if "'asked'" in str(query):
                super().execute("INSERT INTO library_tag (name) VALUES ('audit')")
                between.set()
                assert block_is_open.wait(10)
            return super().execute(query, *args, **kwargs)

    def ask() -> None:
        with connection.cursor() as cursor:
            cursor.execute("INSERT INTO library_tag (name) VALUES ('asked')")

    async def main() -> None:
        async with transaction.atomic():
            await Tag.objects.acreate(name="first")
            thread = asyncio.create_task(sync_to_async(ask, thread_sensitive=False)())
            while not between.is_set():
                await asyncio.sleep(0)
            async with transaction.atomic():
                await Tag.objects.acreate(name="inside")
                block_is_open.set()
                with pytest.raises(OperationalError, match="between two statements of one call"):
                    await thread
        names = sorted([tag.name async for tag in Tag.objects.all()])
        assert names == ["audit", "first", "inside"]

    options = {**connection.settings_dict["OPTIONS"], "cursor_factory": Auditing}
    with settings_of_default(OPTIONS=options):
        run(main())


@pytest.mark.parametrize("error", [None, ZeroDivisionError()], ids=["COMMIT", "ROLLBACK"])
def test_a_function_that_outlives_its_block_in_a_thread_is_refused(
    run: Runner, error: Exception | None
) -> None:
    """It would write in autocommit, on a connection of its thread, what belongs to the block."""
    ended = threading.Event()

    def outlive() -> None:
        with transaction.atomic():
            Tag.objects.create(name="inside")
        ended.wait(10)
        with pytest.raises(TransactionManagementError, match="has ended"):
            Tag.objects.create(name="outside")
        with pytest.raises(TransactionManagementError, match="has ended"), transaction.atomic():
            pass
        assert not connection.in_atomic_block

    async def main() -> None:
        with suppress(ZeroDivisionError):
            async with transaction.atomic():
                thread = asyncio.create_task(sync_to_async(outlive, thread_sensitive=False)())
                while not await Tag.objects.aexists():
                    await asyncio.sleep(0)
                if error is not None:
                    raise error
        ended.set()
        await thread
        assert [tag.name async for tag in Tag.objects.all()] == ([] if error else ["inside"])
        # The thread may be called again, from outside of the block.
        await sync_to_async(Tag.objects.create, thread_sensitive=False)(name="later")
        await sync_to_async(connections.close_all, thread_sensitive=False)()
        assert await Tag.objects.filter(name="later").aexists()

    run(main())


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    """Return an executor that no loop waits for when it ends."""
    with ThreadPoolExecutor(1) as executor:
        yield executor
        executor.submit(connections.close_all).result()


def close(rows: Iterator[Tag], cursor: Any) -> None:
    close_old_connections()
    connection.close()


def write(rows: Iterator[Tag], cursor: Any) -> None:
    with pytest.raises(TransactionManagementError, match="has ended"):
        Tag.objects.create(name="late")


def fetch(rows: Iterator[Tag], cursor: Any) -> None:
    with pytest.raises(TransactionManagementError, match="has ended"):
        list(rows)


def copy_late(rows: Iterator[Tag], cursor: Any) -> None:
    with (
        pytest.raises(TransactionManagementError, match="has ended"),
        cursor.copy("COPY library_tag (name) FROM STDIN") as copy,
    ):
        copy.write_row(["late"])


def doom(rows: Iterator[Tag], cursor: Any) -> None:
    with pytest.raises(TransactionManagementError):
        transaction.set_rollback(True)


def begin_by_hand(rows: Iterator[Tag], cursor: Any) -> None:
    with pytest.raises(TransactionManagementError, match="has ended"):
        transaction.set_autocommit(False)


@pytest.mark.parametrize("late", [close, write, copy_late, fetch, doom, begin_by_hand])
def test_a_function_that_outlives_its_block_does_nothing_to_the_next_one(
    executor: ThreadPoolExecutor, late: Callable[[Iterator[Tag], Any], None]
) -> None:
    """Both blocks are of one connection: that of the sync code which calls `async_to_sync()`."""
    has_read, goes_on = threading.Event(), threading.Event()
    thread: list[Any] = []

    def outlive() -> None:
        rows = Tag.objects.all().iterator(chunk_size=1)
        next(rows)
        with connection.cursor() as cursor:
            has_read.set()
            goes_on.wait(10)
            late(rows, cursor)

    def start_thread() -> None:
        thread.append(executor.submit(contextvars.copy_context().run, outlive))

    async def start() -> None:
        await sync_to_async(start_thread, thread_sensitive=False)()
        while not has_read.is_set():
            await asyncio.sleep(0)

    with transaction.atomic():
        Tag.objects.bulk_create([Tag(name="first"), Tag(name="second")])
        async_to_sync(start)()
    hooks: list[str] = []
    with transaction.atomic():
        Tag.objects.create(name="third")
        transaction.on_commit(lambda: hooks.append("committed"))
        goes_on.set()
        thread[0].result(10)
        Tag.objects.create(name="fourth")
    assert hooks == ["committed"]
    assert Tag.objects.count() == 4


class Traced:
    """Wraps a cursor, as tracing tools do."""

    def __init__(self, cursor: Any) -> None:
        self.wrapped = cursor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)


def test_a_wrapped_cursor_may_be_used_by_those_whom_its_thread_waits_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrapper_class: Any = type(connections["default"])
    create_cursor = wrapper_class.create_cursor
    monkeypatch.setattr(
        wrapper_class,
        "create_cursor",
        lambda wrapper, name=None: Traced(create_cursor(wrapper, name)),
    )

    async def main() -> None:
        await Tag.objects.acreate(name="task")
        await sync_to_async(Tag.objects.create, thread_sensitive=False)(name="thread")

    with transaction.atomic():
        Tag.objects.create(name="first")
        async_to_sync(main)()
        assert Tag.objects.count() == 3


def slow_many() -> None:
    with connection.cursor() as cursor:
        slowly = "INSERT INTO library_tag (name) SELECT %s FROM pg_sleep(0.1)"
        cursor.executemany(slowly, [["one"], ["two"]])


def streamed() -> None:
    with connection.cursor() as cursor:
        assert list(cursor.stream("SELECT count(*) FROM library_tag")) == [(3,)]


def iterated() -> None:
    assert len(list(Tag.objects.all().iterator())) == 3


async def beside_executemany(of_other: Callable[[], None], in_thread: bool) -> None:
    many = asyncio.create_task(aio.run(slow_many))
    await asyncio.sleep(0.05)
    if in_thread:
        await sync_to_async(of_other, thread_sensitive=False)()
    else:
        await aio.run(of_other)
    await many


@pytest.mark.parametrize("in_thread", [False, True], ids=["task", "thread"])
@pytest.mark.parametrize("of_other", [streamed, iterated])
def test_a_server_side_cursor_waits_for_the_executemany_of_another(
    run_once: Runner, of_other: Callable[[], None], in_thread: bool
) -> None:
    """psycopg looks for a pipeline, in which it refuses such a cursor, before it has the lock."""

    async def main() -> None:
        async with transaction.atomic():
            await Tag.objects.acreate(name="first")
            await beside_executemany(of_other, in_thread)

    run_once(main())
    Tag.objects.all().delete()
    with transaction.atomic():
        Tag.objects.create(name="first")
        async_to_sync(beside_executemany)(of_other, in_thread)


@pytest.mark.parametrize("in_thread", [False, True], ids=["task", "thread"])
def test_a_fetch_is_not_cancelled_with_the_block_of_another(run: Runner, in_thread: bool) -> None:
    """It takes no turns: a sibling may roll a block back, that is open below, at the same time."""

    async def main() -> None:
        has_opened, has_begun = threading.Event(), threading.Event()

        async def until(event: threading.Event) -> None:
            while not event.is_set():
                await asyncio.sleep(0)

        def read() -> list[Any]:
            with connection.chunked_cursor() as cursor:
                cursor.execute("SELECT i FROM generate_series(1, 2) i, pg_sleep(0.1 * i)")
                has_opened.set()
                if in_thread:
                    has_begun.wait(10)
                else:
                    bridge.await_(until(has_begun))
                rows: list[Any] = cursor.fetchall()
                return rows

        async def fail() -> None:
            await until(has_opened)
            async with transaction.atomic():
                await Tag.objects.acreate(name="undone")
                has_begun.set()
                await asyncio.sleep(0.05)
                raise ZeroDivisionError

        async with transaction.atomic():
            reading = sync_to_async(read, thread_sensitive=False)() if in_thread else aio.run(read)
            rows, error = await asyncio.gather(reading, fail(), return_exceptions=True)
            assert rows == [(1,), (2,)]
            assert isinstance(error, ZeroDivisionError)
        assert not await Tag.objects.aexists()

    run(main())


def test_a_thread_may_make_the_first_statement_of_its_loop(run: Runner) -> None:
    """The loop's pool, which begins with it, prepares connections in the thread of the loop."""

    def prepare(connection: Any, **kwargs: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SET application_name = 'prepared'")

    async def main() -> None:
        async with transaction.atomic():
            await sync_to_async(Tag.objects.create, thread_sensitive=False)(name="thread")
        names = [tag.name async for tag in Tag.objects.all()]
        assert names == ["thread"]

    connection_created.connect(prepare)
    try:
        run(main())
    finally:
        connection_created.disconnect(prepare)


@pytest.mark.parametrize("in_block", [False, True])
def test_a_task_that_gives_up_waiting_for_a_thread_is_not_in_the_block_of_the_thread(
    run: Runner, in_block: bool
) -> None:
    """asgiref hands the context of the thread back, in the midst of the thread's own block."""
    goes_on = threading.Event()

    def in_thread(give_up: Callable[[], object]) -> None:
        with transaction.atomic():
            Tag.objects.create(name="refused")
            give_up()
            goes_on.wait(10)
            transaction.set_rollback(True)
        if not in_block:
            connection.close()  # that of the thread

    async def main() -> None:
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()

        def thread(give_up: Callable[[], object]) -> None:
            try:
                in_thread(give_up)
            finally:
                loop.call_soon_threadsafe(ended.set)

        async with transaction.atomic() if in_block else nullcontext():
            if in_block:
                await Tag.objects.acreate(name="first")
            with suppress(TimeoutError):
                async with asyncio.timeout(10) as timeout:
                    give_up = partial(loop.call_soon_threadsafe, timeout.reschedule, 0)
                    await sync_to_async(thread, thread_sensitive=False)(give_up)
            if in_block:
                loop.call_later(0.05, goes_on.set)  # it is the turn of the thread until then
            await Tag.objects.acreate(name="kept")
            goes_on.set()
            await ended.wait()
        names = [tag.name async for tag in Tag.objects.order_by("name")]
        assert names == (["first", "kept"] if in_block else ["kept"])

    run(main())


def test_a_thread_that_need_not_wait_may_be_woken_all_the_same(run_once: Runner) -> None:
    def need_not_wait(shared: Transaction, halt: Halt) -> None:
        with halt.tracing():
            assert shared._wait(shared.changes - 1, 10)

    async def halted(at: int) -> Halt:
        halt = Halt(at)
        async with transaction.atomic():
            block = state.current_block(connection)
            assert block is not None
            thread = sync_to_async(need_not_wait, thread_sensitive=False)
            waits = asyncio.create_task(thread(block.transaction, halt))
            while not halt.is_reached():
                await asyncio.sleep(0)
            block.transaction._wake()
            halt.end()
            await waits
        return halt

    for at in range(run_once(halted(-1)).lines):
        run_once(halted(at))


def test_a_block_ends_while_a_thread_is_given_its_first_connection(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection_of: Any = Lease.connection
    in_midst, ended = threading.Event(), threading.Event()

    def pausing(lease: Lease) -> Any:
        if not in_midst.is_set():
            in_midst.set()
            ended.wait(0.1)
        return connection_of.fget(lease)

    async def main() -> None:
        create = sync_to_async(Tag.objects.create, thread_sensitive=False)
        async with transaction.atomic():
            monkeypatch.setattr(Lease, "connection", property(pausing))
            thread = asyncio.create_task(create(name="thread"))
            while not in_midst.is_set():
                await asyncio.sleep(0)
        ended.set()
        await asyncio.wait([thread])
        refusal = thread.exception()
        assert refusal is None or isinstance(refusal, TransactionManagementError)
        names = [tag.name async for tag in Tag.objects.all()]
        assert names == ([] if refusal else ["thread"])

    run(main())


def test_a_block_that_ends_just_before_a_thread_waits_for_it_is_not_missed(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread has seen the block open, and is about to wait when the block ends."""
    about_to_wait, block_has_ended = threading.Event(), threading.Event()
    waits: list[float | None] = []

    class Waiter(transactions.Waiter):
        def __init__(self) -> None:
            about_to_wait.set()
            assert block_has_ended.wait(10)
            super().__init__()

        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout)
            return super().wait(timeout)

    async def main() -> None:
        async with transaction.atomic():
            await Tag.objects.acreate(name="first")
            outer = contextvars.copy_context()
            async with transaction.atomic():
                await Tag.objects.acreate(name="inside")
                monkeypatch.setattr(transactions, "Waiter", Waiter)
                write = sync_to_async(statement, thread_sensitive=False)("thread", int)
                thread = asyncio.create_task(write, context=outer)
                while not about_to_wait.is_set():
                    await asyncio.sleep(0)
            block_has_ended.set()
            await thread
        assert await Tag.objects.acount() == 3

    run(main())
    assert not waits


@pytest.mark.parametrize("begin", ["by hand", "in a generator"])
def test_a_transaction_that_ends_with_its_task_is_marked_as_ended_first(
    run: Runner, monkeypatch: pytest.MonkeyPatch, begin: str
) -> None:
    """A thread that found no transaction, and no block that has ended, would begin another."""
    marked: list[bool] = []
    end = Transaction.end

    def seen(ending: Transaction) -> None:
        marked.append(ending.state.transaction is ending)
        end(ending)

    def begin_by_hand() -> None:
        transaction.set_autocommit(False)
        Tag.objects.create(name="by hand")

    async def in_block() -> AsyncIterator[None]:
        async with transaction.atomic():
            await Tag.objects.acreate(name="in a generator")
            yield

    async def main() -> None:
        left = in_block()
        work = aio.run(begin_by_hand) if begin == "by hand" else anext(left)
        await asyncio.create_task(as_coroutine(work))
        await asyncio.sleep(0)
        with suppress(TransactionManagementError):
            await left.aclose()
        assert not await Tag.objects.aexists()

    monkeypatch.setattr(Transaction, "end", seen)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # of what the task has left open
        run(main())
    assert marked and all(marked)
