"""Tests C16: things left behind harm nobody.

A sweep leaves everything that can be left, in every way, and goes on with what may come next in the
same task; see `tests/support/left_behind.py` for the things, the ways and the facts that are
checked after each run.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import psycopg
import pytest
from django.db import OperationalError, connection, connections, transaction

import pgbackend
from pgbackend import aio
from tests.conftest import Runner, wait_for
from tests.library.models import Tag
from tests.support import left_behind
from tests.support.fixtures import settings_of_default
from tests.support.left_behind import PLACES, THINGS, Place, Run, Scene, Thing, Way, fits
from tests.support.loops import LoopFactory
from tests.support.sweep import as_coroutine, observed

_name = attrgetter("__name__")

KEPT = Way("kept", left_behind.kept, when=left_behind.AFTER)


@pytest.fixture(scope="module")
def watch(django_db_setup: None, conninfo: str) -> Iterator[psycopg.Connection[Any]]:
    """Open a session in Django's database that watches the others."""
    params = {"dbname": connections["default"].settings_dict["NAME"], "autocommit": True}
    with psycopg.connect(conninfo, **params, application_name="watcher") as watching:
        yield watching


@pytest.fixture
def scene(watch: psycopg.Connection[Any], request: pytest.FixtureRequest) -> Iterator[Scene]:
    left_behind.prepare()
    connection.close()
    with settings_of_default(OPTIONS=left_behind.OPTIONS):
        scene = Scene(watch, (request.config.option.seed, request.node.nodeid))
        yield scene
    scene.forget()
    scene.end_sessions()


@pytest.mark.sweep(one_in=36)
@pytest.mark.parametrize(
    ("thing", "way"),
    [
        pytest.param(*pair, id=f"{pair[0].name}-{pair[1].name}")
        for pair in left_behind.combinations()
    ],
)
def test_what_is_left_hurts_nothing_that_comes_next(
    run: Runner, scene: Scene, thing: Thing, way: Way
) -> None:
    with scene.listening():
        run(scene.sweep(thing, way), timeout=120)
    print(f"{scene.runs} runs")
    if scene.failures:
        pytest.fail("\n".join(["", *scene.failures]), pytrace=False)


# --- The end of the task --------------------------------------------------------------------------

#: Without things that hold no connection: `raw()` has all its rows in memory.
HOLDING = [
    thing
    for thing in THINGS
    if not (thing.fails or thing.is_task or "detached" in thing.name or "raw" in thing.name)
]


@pytest.mark.parametrize("thing", HOLDING, ids=str)
def test_the_end_of_a_task_gives_back_what_it_holds_and_says_where_it_was_opened(
    run: Runner, scene: Scene, thing: Thing
) -> None:
    async def main() -> None:
        scene.hear_loop()
        for place in PLACES[::2]:  # in a block, the thing is the block's
            if not fits(thing, KEPT, place):
                continue
            one = Run(thing, KEPT, left_behind.count, place)
            scene.open.append(one)
            await asyncio.wait([one.start()])
            assert not await scene.what_is_held("at the task's end")
            for _ in range(100):  # the warning comes once the loop has had the time to close it
                await asyncio.sleep(0)
            assert scene.warnings, f"nobody is told ({place})"
            scene.warnings.clear()

    with scene.listening():
        run(main())
    assert not scene.complaints


# --- The end of the loop --------------------------------------------------------------------------


@pytest.mark.sweep(one_in=5)
@pytest.mark.parametrize(
    "next_", [left_behind.count, left_behind.for_ever], ids=["done", "waiting"]
)
@pytest.mark.parametrize("thing", THINGS, ids=str)
def test_what_a_loop_leaves_behind_hurts_no_other_loop_and_no_thread(
    loop_factory: LoopFactory, scene: Scene, thing: Thing, next_: left_behind.Next
) -> None:
    """The task ends before its loop does, or is cancelled by the loop; the left thing is kept."""

    async def leave(place: Place) -> None:
        scene.hear_loop()
        one = Run(thing, KEPT, next_, place)
        scene.open.append(one)
        task = one.start()
        while not task.done() and one.phase != "next":
            await asyncio.sleep(0)
        if next_ is not left_behind.for_ever:
            with suppress(OperationalError) if thing.in_copy else nullcontext():
                await task  # where a COPY is open in the task, its next statement is refused

    async def go_on() -> None:
        scene.hear_loop()
        await left_behind.as_neighbour()
        await Tag.objects.acreate(name=f"{len(scene.open)} of the next loop")
        assert not await scene.what_is_held("in the next loop")

    def all_closed() -> bool:
        return not scene.sessions()

    with scene.listening():
        for place in PLACES:
            if not fits(thing, KEPT, place):
                continue
            with asyncio.Runner(loop_factory=loop_factory) as runner:
                runner.run(leave(place))
            with asyncio.Runner(loop_factory=loop_factory) as runner:
                runner.run(go_on())
            assert left_behind.steady().count() == left_behind.ROWS
            connection.close()
            wait_for(all_closed, "all sessions closed, while what was left is kept")
        loops = len(scene.open)
        scene.forget()
        gc.collect()
        assert left_behind.steady().count() == left_behind.ROWS
        connection.close()
        wait_for(all_closed, "all sessions closed")
    assert not scene.complaints
    assert not scene.names("%inside%")
    assert len(scene.names("% of the next loop")) == loops


# --- A generator that several tasks step ----------------------------------------------------------


async def _step(rows: Any) -> Any:
    return await anext(rows)


async def a_task_for_each_step(rows: Any) -> AsyncIterator[Any]:
    while True:
        yield await asyncio.create_task(_step(rows))


async def by_wait_for(rows: Any) -> AsyncIterator[Any]:
    while True:
        yield await asyncio.wait_for(_step(rows), 30)


async def with_a_heartbeat(rows: Any) -> AsyncIterator[Any]:
    """Use the database while the step is awaited, as a heartbeat does."""
    while True:
        task = asyncio.create_task(_step(rows))
        while not task.done():
            await left_behind.as_neighbour()
        yield task.result()


async def by_two_tasks_in_turn(rows: Any) -> AsyncIterator[Any]:
    """Let two tasks, which live as long as the generator, take steps alternately."""
    turns: list[asyncio.Queue[asyncio.Future[Any]]] = [asyncio.Queue(), asyncio.Queue()]

    async def work(turn: asyncio.Queue[asyncio.Future[Any]]) -> None:
        while True:
            answer = await turn.get()
            try:
                answer.set_result(await anext(rows))
            except BaseException as error:
                answer.set_exception(error)

    tasks = [asyncio.create_task(work(turn)) for turn in turns]
    try:
        for turn in itertools.cycle(turns):
            answer = asyncio.get_running_loop().create_future()
            turn.put_nowait(answer)
            yield await answer
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


STEPPINGS = [a_task_for_each_step, by_wait_for, with_a_heartbeat, by_two_tasks_in_turn]


class Undo(Exception):
    pass


async def plain() -> AsyncIterator[str]:
    async for tag in left_behind.steady().aiterator(chunk_size=1):
        yield tag.name


async def committed() -> AsyncIterator[str]:
    async with transaction.atomic():
        for name in NAMES:
            await Tag.objects.acreate(name=name)
            yield name


async def undone() -> AsyncIterator[str]:
    async with transaction.atomic():
        for name in NAMES:
            await Tag.objects.acreate(name=name)
            yield name
        raise Undo


async def undone_inside() -> AsyncIterator[str]:
    async with transaction.atomic():
        await Tag.objects.acreate(name="y 0")
        with suppress(Undo):
            async with transaction.atomic():
                for name in NAMES:
                    await Tag.objects.acreate(name=name)
                    yield name
                raise Undo


async def pinned() -> AsyncIterator[str]:
    async with pgbackend.pinned():
        for name in NAMES:
            await left_behind.steady().acount()
            yield name


NAMES = ["y 1", "y 2", "y 3"]


@dataclass(frozen=True)
class Source:
    """Describes an async generator: its values, and the rows written when it has ended well."""

    make: Callable[[], AsyncIterator[str]]
    gives: list[str]
    writes: list[str]

    def __str__(self) -> str:
        return self.make.__name__


SOURCES = [
    Source(plain, [f"x {number}" for number in range(1, left_behind.ROWS + 1)], []),
    Source(committed, NAMES, NAMES),
    Source(undone, NAMES, []),
    Source(undone_inside, NAMES, ["y 0"]),
    Source(pinned, NAMES, []),
]


@pytest.mark.parametrize("stepping", STEPPINGS, ids=_name)
@pytest.mark.parametrize("source", SOURCES, ids=str)
@pytest.mark.parametrize("is_green", [False, True], ids=["loop", "green"])
def test_a_generator_that_several_tasks_step_is_right_or_refused(
    run: Runner, scene: Scene, source: Source, stepping: Any, is_green: bool
) -> None:
    """All of its block is committed, or nothing; no step runs in autocommit unnoticed."""
    given: list[str] = []

    async def consume() -> str:
        rows = source.make()
        steps = stepping(rows)
        try:
            async for name in steps:
                given.append(name)  # noqa: PERF401 - values given before an error count
        except (RuntimeError, Undo, *left_behind.REFUSALS) as error:
            # The end of an async generator, raised through another, is a RuntimeError.
            at_end = isinstance(error, Undo) or isinstance(error.__cause__, StopAsyncIteration)
            if not at_end and not isinstance(error, left_behind.REFUSALS):
                raise
            return "" if at_end else str(error)
        finally:
            await steps.aclose()
            with suppress(*left_behind.REFUSALS):
                await rows.aclose()
        return ""

    async def main() -> str:
        scene.hear_loop()
        coro = aio.portal(consume()) if is_green else consume()
        reason = await asyncio.create_task(coro)
        assert not await scene.what_is_held("when it has ended")
        await left_behind.as_neighbour()
        return reason

    with scene.listening():
        reason = run(main())
    assert not scene.complaints
    assert given == source.gives[: len(given)]
    written = scene.names("y %")
    if reason:
        print(f"refused: {reason}")
        assert written == []
    else:
        assert (given, written) == (source.gives, source.writes)


# --- Failures inside open iterations --------------------------------------------------------------

OPEN: dict[str, list[Any]] = {
    "aiterator": list(range(1, left_behind.ROWS + 1)),
    "iterator": list(range(1, left_behind.ROWS + 1)),
    "raw_iterator": list(range(1, left_behind.ROWS + 1)),
    "cursor": list(range(1, 101)),
    "named_cursor": list(range(1, 1001)),
}


@pytest.mark.parametrize("is_green", [False, True], ids=["loop", "green"])
@pytest.mark.parametrize("name", OPEN)
def test_a_statement_that_is_cancelled_ends_nothing_that_is_open_beside_it(
    run: Runner, scene: Scene, name: str, is_green: bool
) -> None:
    """A cancellation comes at each wait of the statement; the iteration gives all its rows."""
    (thing,) = [thing for thing in THINGS if thing.name == name]

    async def main() -> int:
        scene.hear_loop()
        for at in itertools.count():
            beside = Beside(thing, at)
            coro = aio.portal(beside.main()) if is_green else beside.main()
            watched = as_coroutine(observed(coro, beside.waiting, []))
            seen = await asyncio.create_task(watched)
            assert seen == OPEN[name], f"cancelled at wait {at}: {len(seen)} of {len(OPEN[name])}"
            assert not await scene.what_is_held(f"cancelled at wait {at}")
            if beside.waits <= at:
                return at
        raise AssertionError

    with scene.listening():
        assert run(main()) >= 1
    assert not scene.complaints


class Beside:
    """Reads a thing to its end, and has one statement between cancelled at its wait `at`."""

    def __init__(self, thing: Thing, at: int) -> None:
        self.run = Run(thing, KEPT, left_behind.count, PLACES[0])
        self.at = at
        self.waits = 0
        self.counts = False

    async def main(self) -> list[int]:
        rows = await self.run.opened()
        seen = [await self.read(rows)]
        task = asyncio.current_task()
        assert task is not None
        self.counts = True
        try:
            await left_behind.steady().acount()
        except asyncio.CancelledError:
            task.uncancel()
        self.counts = False
        with suppress(StopAsyncIteration):
            while (row := await self.read(rows)) is not None:
                seen.append(row)
        await left_behind.close(rows)
        return seen

    async def read(self, rows: Any) -> int | None:
        if hasattr(rows, "__anext__"):
            row = await anext(rows)
        else:
            row = await aio.run(next, rows, None)
        if isinstance(row, Tag):
            return int(row.name.removeprefix("x "))
        return None if row is None else int(row[0])

    def waiting(self, number: int, waits_for: Any, task: asyncio.Task[Any]) -> None:
        if self.counts:
            self.waits += 1
            if self.waits == self.at + 1:
                task.cancel()


# --- A connection that is closed in its block -----------------------------------------------------


def orm_counts() -> None:
    left_behind.steady().count()


def orm_reads() -> None:
    list(left_behind.steady())


def orm_writes() -> None:
    Tag.objects.create(name="never")


def orm_iterates() -> None:
    next(left_behind.steady().iterator(chunk_size=1))


def nested_block() -> None:
    with transaction.atomic():
        left_behind.steady().count()


def cursor_executes() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")


def named_cursor_opens() -> None:
    with connection.chunked_cursor() as cursor:
        cursor.execute("SELECT 1")


def commits() -> None:
    connection.commit()


AFTER_CLOSE = [
    *(orm_counts, orm_reads, orm_writes, orm_iterates),
    *(nested_block, cursor_executes, named_cursor_opens, commits),
]


@pytest.mark.parametrize("statement", AFTER_CLOSE, ids=_name)
def test_after_a_close_in_a_block_errors_are_those_of_sync_code(
    run: Runner, scene: Scene, statement: Callable[[], None]
) -> None:
    def close_and_go_on() -> list[str]:
        seen = []
        try:
            with transaction.atomic():
                Tag.objects.create(name="y 1")
                connection.close()
                seen += [_class_of_error(statement), _class_of_error(statement)]
        except Exception as error:
            seen.append(f"at the end {type(error).__name__}")
        seen.append(_class_of_error(orm_counts))
        return seen

    with settings_of_default(OPTIONS={}):  # a connection of Django's pool ends in another way
        expected = close_and_go_on()
        connection.close()
    assert run.green(close_and_go_on) == expected
    assert scene.names("y %") == []


def _class_of_error(statement: Callable[[], None]) -> str:
    try:
        statement()
    except Exception as error:
        return type(error).__name__
    return "none"
