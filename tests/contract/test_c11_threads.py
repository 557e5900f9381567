"""Tests C11 with threads: one that takes part in a transaction may be interrupted anywhere.

A thread and a green task of the same transaction do one thing each. One of the two is halted at
each line of the package in turn, while the other does its thing from beginning to end; see
`tests/support/halt.py`. A thread loses the processor at such a moment only on a busy machine.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from random import Random
from typing import Any

import psycopg
import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.db import InterfaceError, OperationalError, connection, connections, transaction
from django.db.transaction import TransactionManagementError

from pgbackend import aio
from pgbackend.driver import bridge
from tests.conftest import Runner
from tests.library.models import Tag
from tests.support.halt import Halt

#: It is given the name of its row, and a function to call in the midst of its block.
Thing = Callable[[str, Callable[[], object]], None]
Sweep = Callable[[Callable[[Halt], Any]], None]

#: The second is of a cursor that was used before, and whose lease has ended.
_REFUSALS = (TransactionManagementError, InterfaceError)
#: A ROLLBACK cancels the statement in flight; Django does not wrap the errors of a COPY.
_CANCELLATIONS = (OperationalError, psycopg.errors.QueryCanceled)
#: How many lines each test halts at, of the up to 3,000 that it executes.
HALTS = 40


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


@pytest.mark.sweep(one_in=6)
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
