"""Lists what a task can leave unfinished, the ways to leave it, and the facts to check afterwards.

A *run* is one task that leaves one thing in one way and goes on with one next step. Events besides
(a garbage collection, another task that closes the thing) happen at a wait of the task, which is
counted as in `sweep.py`. After each run the same facts are checked, in one place.

Note [Blocks that are still open]
Code between two steps of a generator that is inside `atomic()` is inside the block, in Django as
well. So where the generator is alive (in an uncollected cycle, or kept), the next statement may
take part in the block, and is lost or refused with the block. Where the generator is gone, the next
statement must simply work.

Note [Copies that are still going on]
While a COPY goes on, its session can do nothing else; Django refuses other statements, too. So as
long as the copy lives, the next statement of the same task may be refused.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import gc
import itertools
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import psycopg
from django.db import Error, InterfaceError, ProgrammingError, connection, connections, transaction
from django.db.models import Value
from django.db.transaction import TransactionManagementError

import pgbackend
from pgbackend import aio
from pgbackend.driver import bridge
from tests.library.models import Entry, Tag
from tests.support.sweep import as_coroutine, observed

#: Connections that the pool may open: the task's, a child's, and the neighbour's.
MAX_SIZE = 3
OPTIONS = {
    "application_name": "left",
    "pool": {"min_size": 0, "max_size": MAX_SIZE, "timeout": 2},
}
ROWS = 5

#: "all" tries each next step in each place, and takes four times as long; else the seed draws some.
SWEEP = os.environ.get("SWEEP", "")

#: Seconds in which a run must end, and seconds after it in which all leases must have ended.
AT_MOST = 4.0
SETTLED = 1.5

#: Seconds for which the loop may be blocked.
BLOCKED = 1.5

_numbers = itertools.count(1)


def steady() -> Any:
    """Return the rows that the runs only read."""
    return Tag.objects.filter(name__startswith="x ").order_by("name")


def prepare() -> None:
    """Write the rows that the runs read."""
    Tag.objects.bulk_create(Tag(name=f"x {number}") for number in range(1, ROWS + 1))
    Entry.objects.create(text="last 0")


# --- Things that can be left: each is an iterator, which is left after its first step -------------


@dataclass(frozen=True)
class Thing:
    """Describes a thing that can be left unfinished."""

    name: str
    #: Makes the iterator: an asynchronous one, or one that green code steps.
    make: Callable[[Run], Any]
    #: Whether the thing is inside a transaction block of its own.
    in_block: bool = False
    #: Whether its session is in the midst of COPY, or of `stream()`, as long as the thing lives.
    in_copy: bool = False
    #: Whether its statement fails, which would doom a block around it.
    fails: bool = False
    #: Whether the thing is a task, which runs on by itself, and which only the loop refers to.
    is_task: bool = False
    #: Whether the thing is a task that holds a connection of its own until it ends.
    goes_on: bool = False
    #: Whether all code that uses the thing must be green.
    green_only: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def is_async(self) -> bool:
        return self.name in _ASYNC


def aiterator(run: Run) -> Any:
    return steady().aiterator(chunk_size=1)


async def atomic_in_async_generator(run: Run) -> AsyncIterator[int]:
    async with transaction.atomic():
        for number in range(3):
            await Tag.objects.acreate(name=run.inside())
            yield number


async def plain_atomic_in_async_generator(run: Run) -> AsyncIterator[int]:
    with transaction.atomic():
        for number in range(3):
            Tag.objects.create(name=run.inside())
            yield number


async def aiterator_in_atomic(run: Run) -> AsyncIterator[Any]:
    async with transaction.atomic():
        async for row in steady().aiterator(chunk_size=1):
            yield row


async def nested_atomic_in_async_generator(run: Run) -> AsyncIterator[int]:
    async with transaction.atomic():
        await Tag.objects.acreate(name=run.inside())
        async with transaction.atomic():
            for number in range(3):
                await Tag.objects.acreate(name=run.inside())
                yield number


async def pinned_in_async_generator(run: Run) -> AsyncIterator[int]:
    async with pgbackend.pinned():
        for _ in range(3):
            yield await steady().acount()


async def detached_in_async_generator(run: Run) -> AsyncIterator[int]:
    async with pgbackend.detached():
        for _ in range(3):
            yield await steady().acount()


def iterator(run: Run) -> Any:
    return steady().iterator(chunk_size=1)


def raw_iterator(run: Run) -> Any:
    sql = "SELECT * FROM library_tag WHERE name LIKE 'x %%' ORDER BY name"
    return Tag.objects.raw(sql, []).iterator()


class Failing:
    """Runs a failing function, and keeps the error, as code does that logs or collects errors."""

    def __init__(self, fail: Callable[[], Any]) -> None:
        self.fail = fail
        self.error: BaseException | None = None

    def __iter__(self) -> Failing:
        return self

    def __next__(self) -> None:
        try:
            self.fail()
        except ProgrammingError as error:
            self.error = error
        else:
            raise AssertionError("it does not fail")

    def close(self) -> None:
        self.error = None


def failing_raw(run: Run) -> Any:
    return Failing(lambda: list(Tag.objects.raw("SELECT nowhere FROM library_tag")))


def raw_copy(run: Run) -> Any:
    return Failing(lambda: list(Tag.objects.raw(_COPY_OUT)))


def executed_copy(run: Run) -> Any:
    def execute() -> None:
        with connection.cursor() as cursor:
            cursor.execute(_COPY_OUT)

    return Failing(execute)


def executed_copy_from(run: Run) -> Any:
    def execute() -> None:
        connection.cursor().execute(_COPY_IN)

    return Failing(execute)


_COPY_OUT = "COPY (SELECT generate_series(1, 5000)) TO STDOUT"
_COPY_IN = "COPY library_tag (name) FROM STDIN"


def cursor(run: Run) -> Any:
    opened = connection.cursor()
    opened.execute("SELECT generate_series(1, 100)")
    return _iterated(opened)


def named_cursor(run: Run) -> Any:
    opened = connection.chunked_cursor()
    opened.execute("SELECT generate_series(1, 1000)")
    return _iterated(opened)


class _iterated:  # noqa: N801 - stands for a cursor
    """Makes an iterator of a cursor, so that the tests can step it."""

    def __init__(self, opened: Any) -> None:
        self.opened = opened

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        return self.opened.fetchone()

    def close(self) -> None:
        self.opened.close()


def copy_out(run: Run) -> Iterator[Any]:
    with connection.cursor() as opened, opened.copy(_COPY_OUT) as copying:
        yield from copying


def streamed(run: Run) -> Iterator[Any]:
    with connection.cursor() as opened:
        yield from opened.stream("SELECT generate_series(1, 5)")


def copy_in(run: Run) -> Iterator[None]:
    with connection.cursor() as opened, opened.copy(_COPY_IN) as copying:
        while True:
            copying.write_row([run.inside()])
            yield


class Copying:
    """Opens a COPY, and never leaves its `with` block."""

    def __init__(self) -> None:
        self.context = connection.cursor().copy(_COPY_OUT)
        self.copying = self.context.__enter__()

    def __iter__(self) -> Copying:
        return self

    def __next__(self) -> Any:
        return self.copying.read()

    def close(self) -> None:
        self.context.__exit__(None, None, None)


def copy_object(run: Run) -> Any:
    return Copying()


def atomic_in_generator(run: Run) -> Iterator[int]:
    with transaction.atomic():
        for number in range(3):
            Tag.objects.create(name=run.inside())
            yield number


def iterator_in_atomic(run: Run) -> Iterator[Any]:
    with transaction.atomic():
        yield from steady().iterator(chunk_size=1)


def pinned_in_generator(run: Run) -> Iterator[int]:
    with pgbackend.pinned():
        for _ in range(3):
            yield steady().count()


class Child:
    """Runs a task that pauses in the midst of its work, until the run is over."""

    def __init__(self, run: Run, work: Callable[[Child], Coroutine[Any, Any, None]]) -> None:
        self.run = run
        self.work = work
        self.begun = asyncio.Event()
        self.released = run.released
        self.task: asyncio.Task[Any] | None = None

    def __aiter__(self) -> Child:
        return self

    async def __anext__(self) -> None:
        await self.start()
        await self.begun.wait()

    async def start(self) -> None:
        self.task = asyncio.create_task(self.work(self))
        self.run.children.append(self.task)

    async def aclose(self) -> None:
        if self.task is not None:
            self.task.cancel()
            await asyncio.wait([self.task])

    async def pause(self) -> None:
        self.begun.set()
        await self.released.wait()


class ChildOfBlock(Child):
    """Runs a `Child` that still works when its parent's block has ended."""

    async def __anext__(self) -> None:
        async with transaction.atomic():
            await super().__anext__()


def child_with_a_cursor(run: Run) -> Any:
    async def work(child: Child) -> None:
        async for _ in steady().aiterator(chunk_size=1):
            await child.pause()

    return Child(run, work)


def child_of_a_block(run: Run) -> Any:
    async def work(child: Child) -> None:
        await steady().acount()
        await child.pause()
        with suppress(TransactionManagementError):
            await Tag.objects.acreate(name=run.inside())

    return ChildOfBlock(run, work)


def detached_child(run: Run) -> Any:
    async def work(child: Child) -> None:
        await pgbackend.detached(detached(child))

    async def detached(child: Child) -> None:
        async with transaction.atomic():
            await steady().acount()
            await child.pause()
            await Tag.objects.acreate(name=run.inside())
            transaction.set_rollback(True)

    return ChildOfBlock(run, work)


_ASYNC = {
    "aiterator",
    "aiterator_in_atomic",
    "atomic_in_async_generator",
    "child_of_a_block",
    "child_with_a_cursor",
    "detached_child",
    "detached_in_async_generator",
    "nested_atomic_in_async_generator",
    "pinned_in_async_generator",
    "plain_atomic_in_async_generator",
}


def _thing(make: Callable[[Run], Any], **traits: bool) -> Thing:
    return Thing(make.__name__, make, **traits)


THINGS = [
    _thing(aiterator),
    _thing(atomic_in_async_generator, in_block=True),
    _thing(plain_atomic_in_async_generator, in_block=True, green_only=True),
    _thing(aiterator_in_atomic, in_block=True),
    _thing(nested_atomic_in_async_generator, in_block=True),
    _thing(pinned_in_async_generator),
    _thing(detached_in_async_generator),
    _thing(iterator),
    _thing(raw_iterator),
    _thing(failing_raw, fails=True),
    _thing(cursor),
    _thing(named_cursor),
    _thing(raw_copy, fails=True),
    _thing(executed_copy, fails=True),
    _thing(executed_copy_from, fails=True),
    _thing(copy_out, in_copy=True),
    _thing(copy_in, in_copy=True),
    _thing(streamed, in_copy=True),
    _thing(copy_object, in_copy=True),
    _thing(atomic_in_generator, in_block=True),
    _thing(iterator_in_atomic, in_block=True),
    _thing(pinned_in_generator),
    _thing(child_with_a_cursor, is_task=True, goes_on=True),
    _thing(child_of_a_block, is_task=True),
    _thing(detached_child, is_task=True, goes_on=True),
]


async def step(left: Any) -> None:
    """Take the next step of `left`, in the running task."""
    if hasattr(left, "__anext__"):
        await anext(left)
    else:
        await aio.run(next, left)


async def close(left: Any) -> None:
    """Close `left` as its user would, in the running task."""
    if hasattr(left, "__anext__"):
        await left.aclose()
    else:
        await aio.run(left.close)


#: The errors by which a left thing may refuse to be stepped or closed by other tasks.
REFUSALS = (
    InterfaceError,
    psycopg.InterfaceError,
    TransactionManagementError,
    StopAsyncIteration,
)


# --- Ways to leave it -----------------------------------------------------------------------------


class Left(Exception):
    """Leaves a loop: it is raised in the loop's body."""


Body = Callable[[], Coroutine[Any, Any, None]]


async def nothing() -> None:
    pass


async def fail() -> None:
    raise Left


async def iterate(run: Run, body: Body = nothing) -> None:
    """Take one step of the thing, then leave it by `break`, or by an error of `body`."""
    if run.thing.is_async:
        await _iterate_async(run, body)
    else:
        await aio.run(_iterate, run, body)


async def _iterate_async(run: Run, body: Body) -> None:
    rows = run.make()
    async for _ in rows:
        await body()
        break


def _iterate(run: Run, body: Body) -> None:
    rows = run.make()
    for _ in rows:
        bridge.await_(body())
        break


async def by_break(run: Run) -> None:
    """Leave the loop in the frame that goes on."""
    if run.thing.is_async:
        async for _ in run.make():
            break
    else:
        await aio.run(_break, run)


def _break(run: Run) -> None:
    for _ in run.make():
        break


async def by_return(run: Run) -> None:
    await iterate(run)


async def by_exception(run: Run) -> None:
    with suppress(Left):
        await iterate(run, fail)


async def by_exception_that_is_kept(run: Run) -> None:
    try:
        await iterate(run, fail)
    except Left as error:  # its traceback has the frames, and these the iterator
        run.kept.append(error)


async def by_cancellation(run: Run) -> None:
    task = asyncio.current_task()
    assert task is not None

    async def body() -> None:
        asyncio.get_running_loop().call_soon(task.cancel)
        await asyncio.Event().wait()

    try:
        await iterate(run, body)
    except asyncio.CancelledError:
        task.uncancel()


async def by_timeout(run: Run) -> None:
    async def body() -> None:
        limit.reschedule(asyncio.get_running_loop().time())
        await asyncio.Event().wait()

    with suppress(TimeoutError):
        async with asyncio.timeout(None) as limit:
            await iterate(run, body)


async def by_cancellation_in_a_step(run: Run) -> None:
    """Wait in the iteration until `Run.happens` cancels this task."""
    task = asyncio.current_task()
    assert task is not None
    try:
        await iterate(run)
    except asyncio.CancelledError:
        task.uncancel()


async def with_wait_for(run: Run) -> None:
    """Step the thing by `wait_for()`: on Python 3.11, that is a task for each step."""
    rows = await run.opened()
    await asyncio.wait_for(step(rows), AT_MOST)
    with suppress(*REFUSALS):
        await asyncio.wait_for(step(rows), AT_MOST)


async def with_a_heartbeat(run: Run) -> None:
    """Step the thing by tasks, and cancel the last of them, as if it were late."""
    rows = await run.opened()
    await asyncio.create_task(step(rows))
    late = asyncio.create_task(step(rows))
    await asyncio.sleep(0)
    late.cancel()
    await asyncio.wait([late])
    if not late.cancelled() and not isinstance(late.exception(), (*REFUSALS, type(None))):
        late.result()


async def in_a_cycle(run: Run) -> None:
    rows = await run.opened()
    await step(rows)
    cycle = [rows]
    cycle.append(cycle)


async def kept(run: Run) -> None:
    """Keep the thing where other tasks reach it."""
    rows = await run.opened()
    await step(rows)
    run.kept.append(rows)


# --- Events that befall the thing, and their times ------------------------------------------------


def nothing_happens(run: Run) -> None:
    pass


def is_cancelled(run: Run) -> None:
    assert run.task is not None
    run.task.cancel()


def garbage_is_collected(run: Run) -> None:
    gc.collect()


def a_child_closes_it(run: Run) -> None:
    run.help(close(run.kept.pop()), contextvars.copy_context())


def another_task_closes_it(run: Run) -> None:
    run.help(close(run.kept.pop()), run.outside.copy())


def another_task_steps_it(run: Run) -> None:
    run.help(step(run.kept[-1]), run.outside.copy())


def a_thread_drops_it(run: Run) -> None:
    in_a_thread(run.kept.pop)


def a_thread_closes_it(run: Run) -> None:
    run.help(asyncio.to_thread(run.kept.pop().close), run.outside.copy())


def in_a_thread(do: Callable[[], Any]) -> None:
    """Call `do`, which cannot wait for the loop, in a thread; block the loop until its end."""

    def call() -> None:
        do()

    thread = threading.Thread(target=call, name="dropping")
    thread.start()
    thread.join(AT_MOST)
    assert not thread.is_alive(), "a finalizer waits for the loop"


BEFORE, DURING, AFTER = "before", "during", "after"


@dataclass(frozen=True)
class Way:
    """Describes how a thing is left."""

    name: str
    leave: Callable[[Run], Coroutine[Any, Any, None]]
    happens: Callable[[Run], None] = nothing_happens
    #: Before the next step, during it (at each of its waits), or after the task.
    when: str = BEFORE
    #: The phase whose waits are counted, if the event happens at each of them.
    phase: str = "next"

    def __str__(self) -> str:
        return self.name

    @property
    def keeps(self) -> bool:
        """Return whether the thing lives on when it is left."""
        return self.leave in (in_a_cycle, kept, by_exception_that_is_kept)

    @property
    def lives(self) -> bool:
        """Return whether the thing still lives when the next step begins."""
        return self.keeps and self.when != BEFORE

    @property
    def is_swept(self) -> bool:
        return self.when == DURING

    @property
    def cancels_a_statement(self) -> bool:
        return self.leave in (by_cancellation_in_a_step, with_a_heartbeat)


WAYS = [
    Way("break", by_break),
    Way("return", by_return),
    Way("exception", by_exception),
    Way("exception that is kept", by_exception_that_is_kept, when=AFTER),
    Way("cancellation", by_cancellation),
    Way("cancellation in a step", by_cancellation_in_a_step, is_cancelled, DURING, "leave"),
    Way("timeout", by_timeout),
    Way("wait_for", with_wait_for),
    Way("heartbeat", with_a_heartbeat),
    Way("garbage before", in_a_cycle, garbage_is_collected),
    Way("garbage during", in_a_cycle, garbage_is_collected, DURING),
    Way("garbage after", in_a_cycle, garbage_is_collected, AFTER),
    Way("closed by a child before", kept, a_child_closes_it),
    Way("closed by a child during", kept, a_child_closes_it, DURING),
    Way("closed by another task before", kept, another_task_closes_it),
    Way("closed by another task during", kept, another_task_closes_it, DURING),
    Way("closed by another task after", kept, another_task_closes_it, AFTER),
    Way("stepped by another task during", kept, another_task_steps_it, DURING),
    Way("stepped by another task after", kept, another_task_steps_it, AFTER),
    Way("dropped by a thread before", kept, a_thread_drops_it),
    Way("dropped by a thread during", kept, a_thread_drops_it, DURING),
    Way("dropped by a thread after", kept, a_thread_drops_it, AFTER),
    Way("closed by a thread before", kept, a_thread_closes_it),
    Way("closed by a thread during", kept, a_thread_closes_it, DURING),
    Way("closed by a thread after", kept, a_thread_closes_it, AFTER),
]


def is_possible(thing: Thing, way: Way) -> bool:
    """Return whether the thing can be left in this way."""
    if thing.is_task:
        # asyncio complains of a task that nobody refers to ("destroyed while pending"): its user
        # must refer to it. The task has one step, and no thread may touch it.
        return way.leave in _FOR_TASKS and way.happens in _FOR_TASKS
    if way.happens is a_thread_closes_it and thing.name != "copy_object":
        return not thing.is_async  # `aclose()` is awaited, by a task
    if thing.name == "copy_object":
        # The COPY is its task's for as long as the object lives: it lives on in the traceback of a
        # cancelled step, and while a thread is only about to close it.
        return way.leave is not with_a_heartbeat and way.happens is not a_thread_closes_it
    if thing.fails:
        # A failed statement has nothing to step again. Its error is caught where it was raised,
        # before a body begins, so there is no body to cancel.
        again = (with_wait_for, with_a_heartbeat, another_task_steps_it)
        return not {way.leave, way.happens} & {*again, by_cancellation, by_timeout}
    return True


_FOR_TASKS = {
    *(by_break, by_exception, by_cancellation, by_timeout, kept),
    *(nothing_happens, a_child_closes_it, another_task_closes_it),
}


Next = Callable[["Run"], Coroutine[Any, Any, None]]


# --- The next step of the same task ---------------------------------------------------------------


async def get(run: Run) -> None:
    row = await Tag.objects.annotate(n=Value(run.n)).aget(name="x 1")
    assert (row.n, row.name) == (run.n, "x 1"), f"another's row: {(row.n, row.name)}"


async def count(run: Run) -> None:
    assert (seen := await steady().acount()) == ROWS, f"{seen} rows counted"


async def update(run: Run) -> None:
    changed = await Entry.objects.filter(text__startswith="last ").aupdate(text=f"last {run.n}")
    assert changed == 1, f"{changed} rows updated"


async def create(run: Run) -> None:
    await Tag.objects.acreate(name=f"{run.n} a")


async def atomic(run: Run) -> None:
    async with transaction.atomic():
        await Tag.objects.acreate(name=f"{run.n} a")
        await count(run)
        await Tag.objects.acreate(name=f"{run.n} b")


async def by_cursor(run: Run) -> None:
    """Write a row with a cursor of its own."""

    def write() -> None:
        with connection.cursor() as cursor:
            cursor.execute("INSERT INTO library_tag (name) VALUES (%s)", [f"{run.n} a"])

    await aio.run(write)


async def again(run: Run) -> None:
    await run.way.leave(run)


async def for_ever(run: Run) -> None:
    """Wait until the loop ends."""
    await asyncio.Event().wait()


NEXTS: list[Next] = [get, count, update, create, atomic, by_cursor, again]
_WRITES = {create: ["a"], atomic: ["a", "b"], by_cursor: ["a"]}


# --- A run, and the facts after it ----------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Describes where the task does its work: green or not, in a block or not."""

    is_green: bool
    in_block: bool

    def __str__(self) -> str:
        return ("green" if self.is_green else "loop") + (", in a block" if self.in_block else "")


PLACES = [Place(green, block) for green in (False, True) for block in (False, True)]


def fits(thing: Thing, way: Way, place: Place) -> bool:
    """Return whether the thing can be left in this way at this place."""
    dooms = thing.fails or thing.in_copy or way.cancels_a_statement
    if place.in_block and dooms:
        return False  # a statement that fails or is cut short dooms the block, as in Django
    return place.is_green or not thing.green_only


@dataclass
class Run:
    """Runs one task that leaves a thing and goes on."""

    thing: Thing
    way: Way
    next: Next
    place: Place
    #: The wait, in the phase that is swept, at which the event happens.
    at: int = 0
    n: int = field(default_factory=lambda: next(_numbers))
    #: The context of code that is unrelated to the task.
    outside: contextvars.Context = field(default_factory=contextvars.copy_context)
    phase: str = "begin"
    waits: int = 0
    kept: list[Any] = field(default_factory=list)
    helpers: list[asyncio.Task[Any]] = field(default_factory=list)
    children: list[asyncio.Task[Any]] = field(default_factory=list)
    released: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[Any] | None = None
    neighbour: asyncio.Task[Any] | None = None
    _names: Iterator[int] = field(default_factory=itertools.count)

    def __str__(self) -> str:
        happens = f", at wait {self.at} of '{self.way.phase}'" if self.way.is_swept else ""
        return f"then {self.next.__name__} ({self.place}{happens})"

    def inside(self) -> str:
        """Return a name for a row that the left thing writes, and that must never be committed."""
        return f"{self.n} inside {next(self._names)}"

    def make(self) -> Any:
        return self.thing.make(self)

    async def opened(self) -> Any:
        return self.make() if self.thing.is_async else await aio.run(self.make)

    def help(self, work: Coroutine[Any, Any, Any], context: contextvars.Context) -> None:
        """Let another task do `work`; tasks that green code starts are green."""
        coro = aio.portal(work) if self.place.is_green else work
        loop = asyncio.get_running_loop()
        self.helpers.append(loop.create_task(coro, context=context))

    def start(self) -> asyncio.Task[Any]:
        """Start the task, in a context of its own."""
        coro = aio.portal(self._main()) if self.place.is_green else self._main()
        watched = as_coroutine(observed(coro, self._waiting, []))
        loop = asyncio.get_running_loop()
        self.task = loop.create_task(watched, context=self.outside.copy())
        return self.task

    async def _main(self) -> None:
        if self.place.in_block:
            async with transaction.atomic():
                await steady().acount()
                await self._leave_and_go_on()
        else:
            await self._leave_and_go_on()

    async def _leave_and_go_on(self) -> None:
        self.phase = "leave"
        await self.way.leave(self)
        self.phase = "between"
        if self.way.when == BEFORE:
            self.way.happens(self)
            if self.helpers:
                await asyncio.wait(self.helpers)
        self.neighbour = asyncio.get_running_loop().create_task(
            as_neighbour(), context=self.outside.copy()
        )
        self.phase = "next"
        await self.next(self)
        self.phase = "rest"

    def _waiting(self, number: int, waits_for: Any, task: asyncio.Task[Any]) -> None:
        if self.way.is_swept and self.phase == self.way.phase:
            self.waits += 1
            if self.waits == self.at + 1:
                self.way.happens(self)


async def as_neighbour() -> None:
    """Use the database in an unrelated task."""
    rows = [row.name async for row in steady().annotate(n=Value(1))]
    assert rows == [f"x {number}" for number in range(1, ROWS + 1)], f"a neighbour reads {rows}"


def may_raise(run: Run, error: BaseException) -> bool:
    """Return whether Django would raise `error` as well: see the notes at the top."""
    if not (run.way.lives or (run.way.keeps and run.next is again)):
        return False
    # psycopg raises its own error, from a cursor that the block had, with the same message.
    told = isinstance(error, TransactionManagementError) or "atomic block was" in str(error)
    if run.thing.in_block and told:
        return True
    return run.thing.in_copy and isinstance(error, Error | psycopg.Error)


class Scene:
    """Runs what a test gives it, and checks the facts after each run."""

    #: After so many failures the rest is not tried.
    ENOUGH = 4

    def __init__(self, watch: psycopg.Connection[Any], seed: object) -> None:
        self.watch = watch
        self.random = random.Random(repr(seed))
        self.failures: list[str] = []
        self.complaints: list[str] = []
        #: Warnings of things that the backend closes by itself, with the place where each was
        #: opened.
        self.warnings: list[str] = []
        self.runs = 0
        #: The runs whose things may still be referred to.
        self.open: list[Run] = []
        #: Seconds to wait until all leases have ended; fewer after a lease has been left.
        self.patience = SETTLED

    async def sweep(self, thing: Thing, way: Way) -> None:
        """Leave the thing in this way before each next step, in some places, at each wait."""
        self.hear_loop(at_most=120)
        places = [place for place in PLACES if fits(thing, way, place)]
        for next_, place in self._drawn(places, 1 if way.is_swept else 2):
            for at in itertools.count():
                run = Run(thing, way, next_, place, at)
                await self.do(run)
                if not way.is_swept or run.waits <= at or self.has_enough():
                    break
            if self.has_enough():
                self.failures.append("... (the rest was not tried)")
                return

    def _drawn(self, places: list[Place], most: int) -> Iterator[tuple[Next, Place]]:
        """Yield each next step with some places, drawn by the seed; with all if SWEEP=all."""
        for next_ in NEXTS:
            few = min(most, len(places))
            drawn = places if SWEEP == "all" else self.random.sample(places, few)
            for place in drawn:
                yield next_, place

    def has_enough(self) -> bool:
        """Return whether there is no point in going on."""
        return len(self.failures) >= self.ENOUGH or any("blocked" in one for one in self.failures)

    async def do(self, run: Run) -> None:
        """Do one run, note its faults, and leave nothing of it for the next run."""
        self.runs += 1
        self.open = [run]
        wrong: list[str] = []
        task = run.start()
        _, pending = await asyncio.wait([task], timeout=AT_MOST)
        if pending:
            wrong.append(f"no end within {AT_MOST} s, in '{run.phase}'")
            await _end(task)
        # The thing is still referred to: the end of the task must give its connection back.
        if not run.thing.goes_on:
            wrong += await self.what_is_held("at the task's end")
        if run.way.when == AFTER:
            run.way.happens(run)
        run.released.set()
        wrong += await self._what_helpers_met(run)
        self.forget()
        if run.way.lives or run.way.leave in (in_a_cycle, with_a_heartbeat):
            gc.collect()
        wrong += await self.what_is_held("after all")
        wrong += self.how_it_ended(run, task)
        wrong += self.complaints
        self.complaints.clear()
        if wrong:
            self.failures.append(f"{run}: {'; '.join(wrong)}")
            await self._recover()

    async def _what_helpers_met(self, run: Run) -> list[str]:
        wrong = []
        others = [*run.helpers, *run.children, *([run.neighbour] if run.neighbour else [])]
        if not others:
            return []
        _, pending = await asyncio.wait(others, timeout=AT_MOST)
        for task in pending:
            wrong.append(f"no end of {task.get_coro()}")
            await _end(task)
        for task in others:
            if task.cancelled() or (error := task.exception()) is None:
                continue
            # An object in use says so: "asynchronous generator is already running".
            busy = isinstance(error, (RuntimeError, ValueError)) and "already" in str(error)
            used = task in run.helpers or (task in run.children and run.place.in_block)
            # A COPY that refused the end of a block has cost the block its connection.
            closed = run.thing.in_copy and "the connection is closed" in str(error)
            if not used or not (busy or closed or isinstance(error, REFUSALS)):
                who = "the neighbour" if task is run.neighbour else "another task"
                wrong.append(f"{who}: {_told(error)}")
        return wrong

    async def what_is_held(self, when: str) -> list[str]:
        """Wait until all leases have ended; return those that have not."""
        deadline = time.monotonic() + self.patience
        while (held := self._held()) and time.monotonic() < deadline:
            await asyncio.sleep(0.001)
        if not held:
            return []
        self.patience = SETTLED / 10
        return [f"{when}: {held}"]

    def sessions(self) -> list[str]:
        """Return the states of the sessions of all pools, as the server knows them."""
        return [str(state) for state, _ in self.watch.execute(_SESSIONS)]

    def _held(self) -> str:
        (record,) = pgbackend.statistics("default") or [None]
        if record is None:
            return ""
        if record.leased or record.waiting:
            return f"{record.leased} leased, {record.waiting} waiting"
        pool = connections["default"]._async_pool()  # type: ignore[attr-defined]
        if pool.leases:
            return f"leases {list(pool.leases.values())}"
        states = self.sessions()
        if any(state != "idle" for state in states):
            return f"sessions {states}"
        return f"{len(states)} sessions" if len(states) > MAX_SIZE else ""

    def how_it_ended(self, run: Run, task: asyncio.Task[Any]) -> list[str]:
        """Return differences from the model: the next step's writes are there, and no others."""
        written = self.names(f"{run.n} %")
        last = self.names("last %", "library_entry", "text")
        wrote = [*written, *([last[0]] if last == [f"last {run.n}"] else [])]
        expected = [f"{run.n} {letter}" for letter in _WRITES.get(run.next, [])]
        expected += [f"last {run.n}"] if run.next is update else []
        wrong = []
        error: BaseException | None = asyncio.CancelledError()
        if not task.cancelled():
            error = task.exception()
        if error is not None and not may_raise(run, error):
            wrong.append(f"raised {_told(error)}")
        if error is not None and wrote:
            wrong.append(f"raised {_told(error)}, and {wrote} is committed")
        elif error is None and wrote != expected and not (self._may_lose(run) and not wrote):
            wrong.append(f"wrote {wrote}, which should be {expected}")
        return wrong

    def names(self, like: str, table: str = "library_tag", column: str = "name") -> list[str]:
        sql = f"SELECT {column} FROM {table} WHERE {column} LIKE %s ORDER BY 1"
        return [name for (name,) in self.watch.execute(sql, [like])]

    def _may_lose(self, run: Run) -> bool:
        return run.thing.in_block and run.way.lives

    async def _recover(self) -> None:
        gc.collect()
        connections["default"].close_pool()  # type: ignore[attr-defined]
        self.end_sessions()
        await self.what_is_held("")
        self.complaints.clear()

    def forget(self) -> None:
        """Drop all references to left things, which the frames of a test's error would keep."""
        for run in self.open:
            run.kept.clear(), run.helpers.clear(), run.children.clear()
            run.task = run.neighbour = None
        self.open.clear()

    def end_sessions(self) -> None:
        """End the sessions that are left on the server: their locks would stop the next run."""
        self.watch.execute(f"SELECT pg_terminate_backend(pid) FROM ({_SESSIONS}) AS session")

    def hear_loop(self, at_most: float = 10) -> None:
        """Record errors that the running loop would only have logged, and end what blocks the loop.

        The loop is stopped after `at_most` seconds, if it has not ended by then.
        """
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(
            lambda loop, context: self._complain(context["message"], context.get("exception"))
        )
        self._beat(loop)
        loop.call_later(at_most, loop.stop)

    def _beat(self, loop: asyncio.AbstractEventLoop) -> None:
        signal.setitimer(signal.ITIMER_REAL, BLOCKED, BLOCKED)
        loop.call_later(BLOCKED / 10, self._beat, loop)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Record warnings and errors that Python would only have logged; collect no garbage."""
        before, sys.unraisablehook = sys.unraisablehook, self._unraisable
        before_alarm = signal.signal(signal.SIGALRM, _end_what_blocks)
        gc.collect()
        gc.disable()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.showwarning = self._warned  # type: ignore[assignment]
                yield
                gc.collect()
        finally:
            gc.enable()
            sys.unraisablehook = before
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before_alarm)

    def _complain(self, message: str, error: BaseException | None) -> None:
        # The loop closes abandoned generators, and reports that it refused to end a block.
        if not isinstance(error, TransactionManagementError):
            self.complaints.append(f"the loop: {message}: {_told(error)}")

    def _unraisable(self, unraisable: Any) -> None:
        self.complaints.append(f"unraisable: {_told(unraisable.exc_value)}")

    def _warned(self, message: Any, category: Any, *args: Any) -> None:
        if issubclass(category, ResourceWarning) and "left_behind.py:" in str(message):
            self.warnings.append(str(message))
        else:
            self.complaints.append(f"{category.__name__}: {message}")


class Blocked(AssertionError):
    """Interrupts code that has blocked the loop for too long."""


def _end_what_blocks(number: int, frame: Any) -> None:
    raise Blocked(f"the loop was blocked for {BLOCKED} s")


_SESSIONS = "SELECT state, pid FROM pg_stat_activity WHERE application_name = 'left'"


async def _end(task: asyncio.Task[Any]) -> None:
    for _ in range(3):
        task.cancel()
        _, pending = await asyncio.wait([task], timeout=1)
        if not pending:
            return
    raise AssertionError(f"cannot be cancelled: {task}")


def _told(error: BaseException | None) -> str:
    text = f"{type(error).__name__}: {error}".partition("\n")[0]
    return text[:160]


@functools.cache
def combinations() -> list[tuple[Thing, Way]]:
    """Return all things, each with the ways in which it can be left."""
    return [(thing, way) for thing in THINGS for way in WAYS if is_possible(thing, way)]
