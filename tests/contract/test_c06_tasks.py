"""Tests C6: a transaction belongs to the code inside its block, and to tasks started there."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import random
import sys
import warnings
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from django.core.handlers.asgi import ASGIHandler
from django.db import DatabaseError, IntegrityError, connection, transaction
from django.db.models.signals import post_save
from django.db.transaction import TransactionManagementError
from django.dispatch import Signal
from django.test.utils import CaptureQueriesContext

import pgbackend
from pgbackend import aio, state
from pgbackend.driver import bridge
from pgbackend.driver.errors import NotGreen
from tests.conftest import Runner
from tests.library.models import Tag
from tests.support.fixtures import pool_of_default
from tests.support.tags import Oops, anames, names


def _pid() -> int:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        return cursor.fetchone()[0]


async def apid() -> int:
    return await aio.run(_pid)


def leased() -> int:
    return sum(record.leased for record in pgbackend.statistics())


# --- The tree of tasks and blocks, against a model ------------------------------------------------
#
# A program is a tuple of steps: "w" writes a row, a tuple is a nested block with its own steps.
# Each task asks for a token before each step (a write, the opening and the closing of a block), so
# that a schedule says which task takes the next step. A task that waits for its turn in the
# transaction has not taken its step yet: the driver sees it among the transaction's waiters.

Program = tuple[Any, ...]

#: The kinds of failure, each of which replaces a step.
KINDS = ("an error of the code", "a failed statement, caught", "a failed statement, not caught")


@dataclass(frozen=True)
class Step:
    """Describes one step of a program: a write, or a nested block with the number of its end."""

    place: int
    inside: tuple[Step, ...] | None = None
    end: int = 0


def steps_of(program: Program, numbers: Iterator[int]) -> tuple[Step, ...]:
    """Give each step of a program its number."""
    return tuple(
        Step(next(numbers))
        if step == "w"
        else Step(next(numbers), steps_of(step, numbers), next(numbers))
        for step in program
    )


@dataclass(frozen=True)
class Failure:
    task: str
    place: int
    kind: str


class Lost(Exception):
    """Says, in the model, that the block which this error leaves is rolled back."""


class Doomed(Exception):
    """Says, in the model, that the block shared by all tasks is rolled back."""


def model(programs: dict[str, Program], failure: Failure | None) -> set[str]:
    """Return the rows that must be in the table, whatever the schedule.

    A row is kept if each block around it is; a block is lost if an error leaves it, or if a
    statement fails in it. P is the task in whose block the others were started.
    """
    kept: set[str] = set()
    for name, program in programs.items():
        rows: list[str] = []
        struck = failure if failure is not None and failure.task == name else None
        try:
            _model_of_block(name, steps_of(program, itertools.count()), struck, rows, 0)
        except Doomed:
            return set()
        except Lost:
            if name == "P":
                return set()
        kept.update(rows)
    return kept


def _model_of_block(
    name: str, steps: tuple[Step, ...], failure: Failure | None, rows: list[str], depth: int
) -> None:
    def strike(place: int, depth: int) -> None:
        if failure is not None and failure.place == place:
            raise Lost if depth or failure.kind == KINDS[0] else Doomed

    for step in steps:
        strike(step.place, depth)
        if step.inside is None:
            rows.append(f"{name}{step.place}")
            continue
        inner: list[str] = []
        try:
            _model_of_block(name, step.inside, failure, inner, depth + 1)
            strike(step.end, depth + 1)
        except Lost:
            continue
        rows.extend(inner)


@dataclass
class Schedule:
    """Gives one token at a time; each choice of a task is drawn, or given by `choices`."""

    choices: list[int]
    random: random.Random | None = None
    waiting: dict[str, asyncio.Future[None]] = field(default_factory=dict)
    joining: set[str] = field(default_factory=set)
    made: list[tuple[int, int]] = field(default_factory=list)
    #: The transactions whose waiters count as tasks that have not taken their step.
    transactions: list[Any] = field(default_factory=list)

    async def token(self, name: str) -> None:
        self.waiting[name] = asyncio.get_running_loop().create_future()
        await self.waiting[name]

    async def drive(self, tasks: dict[str, asyncio.Task[Any]]) -> None:
        while True:
            while not self._at_rest(tasks):
                await asyncio.sleep(0)
            if all(task.done() for task in tasks.values()):
                return
            ready = sorted(self.waiting)
            assert ready, f"tasks wait for each other after {self.made}"
            at = len(self.made)
            if at < len(self.choices):
                choice = min(self.choices[at], len(ready) - 1)
            else:
                choice = self.random.randrange(len(ready)) if self.random else 0
            self.made.append((choice, len(ready)))
            self.waiting.pop(ready[choice]).set_result(None)
            await asyncio.sleep(0)

    def _at_rest(self, tasks: dict[str, asyncio.Task[Any]]) -> bool:
        """Return whether every task is done, or waits: for a token, its children or its turn."""
        live = [name for name, task in tasks.items() if not task.done()]
        joining = self.joining if len(live) > 1 else set()
        moving = [name for name in live if name not in self.waiting and name not in joining]
        return len(moving) == sum(len(shared.waiters) for shared in self.transactions)


class Run:
    """Runs three programs by one schedule."""

    def __init__(
        self, number: int, programs: dict[str, Program], failure: Failure | None, schedule: Schedule
    ) -> None:
        self.prefix = f"{number}:"
        self.programs = programs
        self.failure = failure
        self.schedule = schedule

    async def perform(self, name: str) -> None:
        """Run a program in the block that the caller is in."""
        await self._perform(name, steps_of(self.programs[name], itertools.count()))

    async def _perform(self, name: str, steps: tuple[Step, ...]) -> None:
        for step in steps:
            await self._turn(name, step.place)
            if step.inside is None:
                await Tag.objects.acreate(name=f"{self.prefix}{name}{step.place}")
                continue
            try:
                async with transaction.atomic():
                    await self._perform(name, step.inside)
                    await self._turn(name, step.end)
            except (Oops, DatabaseError):
                pass

    async def _turn(self, name: str, place: int) -> None:
        """Wait for the token of this step; fail in its place if the run's failure is here."""
        await self.schedule.token(name)
        if self.failure is None or (self.failure.task, self.failure.place) != (name, place):
            return
        if self.failure.kind == KINDS[0]:
            raise Oops
        try:
            await Tag.objects.acreate(name="taken")
        except IntegrityError:
            if self.failure.kind == KINDS[2]:
                raise

    async def rows(self) -> set[str]:
        found = await anames()
        return {name.removeprefix(self.prefix) for name in found if name.startswith(self.prefix)}


async def run_family(run: Run, shape: str) -> None:
    """Run the programs of P, A and B: P opens a block and starts the others inside it."""
    tasks: dict[str, asyncio.Task[Any]] = {}

    async def parent() -> None:
        try:
            async with transaction.atomic():
                run.schedule.transactions.append(state.current_block(connection).transaction)
                if shape == "in a nested block":
                    await Tag.objects.acreate(name=f"{run.prefix}outer")
                    try:
                        async with transaction.atomic():
                            await start_and_join()
                    except (Oops, DatabaseError):
                        pass
                    await Tag.objects.acreate(name=f"{run.prefix}outer after")
                else:
                    await start_and_join()
        except (Oops, DatabaseError):
            pass

    async def start_and_join() -> None:
        for name in "AB":
            tasks[name] = asyncio.create_task(run.perform(name), name=name)
        await run.perform("P")
        run.schedule.joining.add("P")
        await asyncio.wait([tasks["A"], tasks["B"]])
        run.schedule.joining.discard("P")

    tasks["P"] = asyncio.create_task(parent(), name="P")
    await asyncio.sleep(0)
    await run.schedule.drive(tasks)
    for name in "AB":
        assert isinstance(tasks[name].exception(), Oops | DatabaseError | None)
    await tasks["P"]


def _length(program: Program) -> int:
    return sum(1 if step == "w" else 2 + _length(step) for step in program)


def next_choices(made: list[tuple[int, int]]) -> list[int] | None:
    """Return the next schedule of a depth-first walk through all; None after the last."""
    made = list(made)
    while made and made[-1][0] + 1 >= made[-1][1]:
        made.pop()
    if not made:
        return None
    return [choice for choice, _ in made[:-1]] + [made[-1][0] + 1]


def expected(run: Run, shape: str) -> set[str]:
    kept = model(run.programs, run.failure)
    return kept | {"outer", "outer after"} if shape == "in a nested block" else kept


async def check_one(run: Run, shape: str) -> None:
    await run_family(run, shape)
    assert await run.rows() == expected(run, shape), (run.failure, run.schedule.made)
    assert leased() == 0, (run.failure, run.schedule.made)


FLAT = {"P": (("w",),), "A": (("w",),), "B": (("w",),)}
#: The deepest block is the third of its transaction; the fourth, in the nested shape.
DEEP = {"P": ("w", ("w",)), "A": (("w", ("w",)),), "B": (("w",), "w")}
SHAPES = ("in the outermost block", "in a nested block")


async def check_every_schedule(
    numbers: Iterator[int], programs: dict[str, Program], failure: Failure | None, shape: str
) -> int:
    """Walk through all schedules of the programs; return how many there were."""
    choices: list[int] | None = []
    for count in itertools.count():
        if choices is None:
            return count
        one = Run(next(numbers), programs, failure, Schedule(choices))
        await check_one(one, shape)
        choices = next_choices(one.schedule.made)
    raise AssertionError


@pytest.mark.sweep(one_in=2)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_interleaving_of_three_tasks_with_nested_blocks_keeps_all_rows(
    run: Runner, shape: str
) -> None:
    async def main() -> None:
        assert await check_every_schedule(itertools.count(), FLAT, None, shape) > 50

    run(main(), timeout=120)


@pytest.mark.sweep(one_in=3)
@pytest.mark.parametrize("kind", KINDS)
def test_a_failure_at_each_place_of_every_interleaving_loses_its_block_and_no_other(
    run: Runner, kind: str
) -> None:
    async def main() -> None:
        await Tag.objects.acreate(name="taken")
        numbers = itertools.count()
        for task, place in itertools.product("PA", range(3)):  # B's are A's by another name
            failure = Failure(task, place, kind)
            await check_every_schedule(numbers, FLAT, failure, "in a nested block")

    run(main(), timeout=120)


@pytest.mark.sweep(one_in=3)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_failure_at_each_place_three_blocks_deep_loses_its_block_and_no_other(
    run: Runner, request: pytest.FixtureRequest, shape: str, kind: str
) -> None:
    drawn = random.Random(repr((request.config.option.seed, shape, kind)))
    numbers = itertools.count()
    failures = [
        Failure(task, place, kind)
        for task, program in DEEP.items()
        for place in range(_length(program))
    ]

    async def main() -> None:
        await Tag.objects.acreate(name="taken")
        for failure in failures:
            for _ in range(4):
                schedule = Schedule([], random.Random(drawn.random()))
                await check_one(Run(next(numbers), DEEP, failure, schedule), shape)

    run(main(), timeout=120)


@pytest.mark.parametrize("failing", [None, "P", "A"])
def test_three_tasks_with_transactions_of_their_own_never_wait_for_each_other(
    run: Runner, request: pytest.FixtureRequest, failing: str | None
) -> None:
    """Any task may take its next step at any point, and sees no row of the others."""
    drawn = random.Random(repr((request.config.option.seed, failing)))
    programs = dict.fromkeys("PAB", (("w", ("w",)),))

    async def main() -> None:
        for number in range(40):
            failure = failing and Failure(failing, 4, KINDS[0])  # at the end of the outer block
            one = Run(
                number, programs, failure or None, Schedule([], random.Random(drawn.random()))
            )
            if failing:
                one.failure = Failure(failing, 5, KINDS[0])
            tasks = {name: asyncio.create_task(one.perform(name)) for name in programs}
            await asyncio.sleep(0)
            await one.schedule.drive(tasks)
            await asyncio.gather(*tasks.values())
            assert await one.rows() == model(programs, one.failure), one.schedule.made
            ready = [ready for _, ready in one.schedule.made]
            assert ready == sorted(ready, reverse=True), "nobody waits for his turn"

    run(main(), timeout=60)


# --- Statements under way when a block ends -------------------------------------------------------


async def busy_child(
    prefix: str, written: list[str], drawn: random.Random, refused: type[Exception]
) -> None:
    """Write rows until a write is refused; record those that were reported as written."""
    for number in itertools.count():
        await asyncio.sleep(0)
        name = f"{prefix}:{number}"
        try:
            if drawn.random() < 0.5:
                async with transaction.atomic():
                    await Tag.objects.acreate(name=name)
            else:
                await Tag.objects.acreate(name=name)
        except refused:
            return
        written.append(name)


@pytest.mark.parametrize("nested", [False, True], ids=["outermost", "nested"])
@pytest.mark.parametrize("fails", [False, True], ids=["commit", "rollback"])
def test_no_statement_of_a_child_slips_behind_the_end_of_its_block(
    run: Runner, request: pytest.FixtureRequest, nested: bool, fails: bool
) -> None:
    """Children write while the block ends: the rows reported as written are the rows there."""
    drawn = random.Random(repr((request.config.option.seed, nested, fails)))
    # Statements in a block that is rolled back are cancelled.
    refused = DatabaseError if fails else TransactionManagementError

    async def block(prefix: str, written: list[str]) -> list[asyncio.Task[None]]:
        tasks: list[asyncio.Task[None]] = []
        with pytest.raises(Oops) if fails else warnings.catch_warnings():
            async with transaction.atomic():
                for child in "ab":
                    coro = busy_child(f"{prefix}{child}", written, drawn, refused)
                    tasks.append(asyncio.create_task(coro))
                for _ in range(drawn.randrange(40)):
                    await asyncio.sleep(0)
                await Tag.objects.acreate(name=f"{prefix}parent")
                if fails:
                    raise Oops
        if not fails:
            written.append(f"{prefix}parent")
        return tasks

    async def main() -> None:
        expected: list[str] = []
        for number in range(40):
            written: list[str] = []
            if nested:
                async with transaction.atomic():
                    tasks = await block(f"{number}", written)
                    await Tag.objects.acreate(name=f"{number} after")
                    await asyncio.gather(*tasks)
                expected.append(f"{number} after")
            else:
                tasks = await block(f"{number}", written)
                await asyncio.gather(*tasks)
            assert leased() == 0
            expected += [] if fails else written
        assert await anames() == sorted(expected)

    run(main(), timeout=60)


def test_a_child_that_outlives_its_block_is_refused_before_and_after_the_commit(
    run: Runner,
) -> None:
    async def child(go: asyncio.Event) -> None:
        await go.wait()
        await Tag.objects.acreate(name="late")

    async def main() -> None:
        during, after = asyncio.Event(), asyncio.Event()
        async with transaction.atomic():
            await Tag.objects.acreate(name="kept")
            tasks = [asyncio.create_task(child(event)) for event in (during, after)]
            await asyncio.sleep(0)
            during.set()  # the task's step comes when this task waits next: for its COMMIT
        after.set()
        for task in tasks:
            with pytest.raises(TransactionManagementError, match="was started inside an atomic"):
                await task
        assert leased() == 0

    run(main())
    assert names() == ["kept"]


def test_a_child_that_is_refused_does_not_doom_the_block_around_its_own(run: Runner) -> None:
    async def child(go: asyncio.Event) -> None:
        await go.wait()
        await Tag.objects.acreate(name="late")  # Django dooms the block when save() fails

    async def main() -> None:
        go = asyncio.Event()
        async with transaction.atomic():
            async with transaction.atomic():
                task = asyncio.create_task(child(go))
                await asyncio.sleep(0)
            go.set()
            with pytest.raises(TransactionManagementError, match="has ended"):
                await task
            await Tag.objects.acreate(name="kept")

    run(main())
    assert names() == ["kept"]


def test_a_child_keeps_no_connection_of_the_block_that_it_outlives(run: Runner) -> None:
    """Once the connection is another task's, the child can use neither it nor a cursor of it."""

    def hold() -> tuple[Any, Any]:
        cursor = connection.cursor()
        cursor.execute("SELECT 1")
        return cursor, connection.connection

    async def child(held: asyncio.Event, ended: asyncio.Event) -> None:
        cursor, raw = await aio.run(hold)
        held.set()
        await ended.wait()
        for use in (lambda: cursor.execute("SELECT 2"), lambda: raw.execute("SELECT 3")):
            with pytest.raises(Exception, match="has ended|went back to the pool|closed"):
                await aio.run(use)
        cursor.close()

    async def main() -> None:
        held, ended = asyncio.Event(), asyncio.Event()
        async with transaction.atomic():
            task = asyncio.create_task(child(held, ended))
            await held.wait()
        assert leased() == 0
        ended.set()
        async with transaction.atomic():  # on the very connection that the child had
            await Tag.objects.acreate(name="kept")
            await task
            assert await anames() == ["kept"]

    with pool_of_default(max_size=1):
        run(main())


def test_a_child_that_waits_for_the_first_connection_leaves_none_behind(run: Runner) -> None:
    """The child's block ends while the child waits for the pool; its connection comes too late."""

    async def holder(held: asyncio.Event, free: asyncio.Event) -> None:
        async with transaction.atomic():
            await Tag.objects.acount()
            held.set()
            await free.wait()

    async def main() -> None:
        held, free = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(holder(held, free))
        await held.wait()
        async with transaction.atomic():
            late = asyncio.create_task(Tag.objects.acreate(name="late"))
            while not pgbackend.statistics()[0].waiting:
                await asyncio.sleep(0)
        free.set()
        await task
        try:
            await late
        except TransactionManagementError as exc:
            refusal = exc  # and with the error the frames of the child
        assert "has ended" in str(refusal)
        assert leased() == 0

    with pool_of_default(max_size=1):
        run(main())
    assert names() == []


# --- Ends that cannot wait ------------------------------------------------------------------------


async def stubborn_child(opened: asyncio.Event, go: asyncio.Event) -> None:
    async with transaction.atomic():
        await Tag.objects.acreate(name="child's")
        opened.set()
        await go.wait()


@pytest.mark.parametrize("nested", [False, True], ids=["outermost", "nested"])
@pytest.mark.parametrize(
    "how", ["cancelled", "cancelled while it waits", "fails", "waits too long"]
)
def test_a_block_that_is_left_with_an_error_is_rolled_back_with_what_is_open_in_it(  # noqa: PLR0915
    run: Runner, how: str, nested: bool
) -> None:
    async def block(opened: asyncio.Event, go: asyncio.Event, tasks: list[Any]) -> None:
        async with transaction.atomic():
            blocks.append(state.current_block(connection))
            await Tag.objects.acreate(name="parent's")
            tasks.append(asyncio.create_task(stubborn_child(opened, go), name="the child"))
            await opened.wait()
            if how == "cancelled":
                await asyncio.Event().wait()
            if how == "fails":
                raise Oops
            if how == "waits too long":
                shared = state.current_block(connection).transaction
                shared.settings_dict = {"OPTIONS": {"pool": {"timeout": 0.05}}}

    async def around(*args: Any) -> None:
        if not nested:
            await block(*args)
            return
        async with transaction.atomic():
            error: BaseException | None = None
            try:
                await block(*args)
            except BaseException as exc:
                error = exc
            await Tag.objects.acreate(name="after")
            transaction.on_commit(lambda: kept.append("hook"))
            if isinstance(error, asyncio.CancelledError):
                raise error
            errors.append(error)  # and not raised, so that the outer block is committed

    kept: list[str] = []
    blocks: list[Any] = []
    errors: list[BaseException | None] = []

    async def main() -> None:
        opened, go = asyncio.Event(), asyncio.Event()
        tasks: list[asyncio.Task[None]] = []
        parent = asyncio.create_task(around(opened, go, tasks), name="the parent")
        await opened.wait()
        if how == "cancelled while it waits":
            while not blocks[0].transaction.waiters:
                await asyncio.sleep(0)
        if "cancelled" in how:
            parent.cancel()
        async with asyncio.timeout(2):
            await asyncio.wait([parent])
        if "cancelled" in how:
            assert parent.cancelled()
        else:
            error = errors[0] if nested else parent.exception()
            if how == "fails":
                assert isinstance(error, Oops)
            else:
                assert isinstance(error, TransactionManagementError)
                assert "'the child'" in str(error) and "'the parent'" in str(error)
        assert leased() == 0
        go.set()
        with pytest.raises(TransactionManagementError, match="has ended"):
            await tasks[0]

    run(main())
    committed = nested and "cancelled" not in how
    assert names() == (["after"] if committed else [])
    assert kept == (["hook"] if committed else [])


def test_a_cancelled_end_that_waits_for_a_childs_statement_leaves_no_connection(
    run: Runner,
) -> None:
    """COMMIT stands behind the statement of a child in the queue of the connection."""

    def sleeping() -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_sleep(20)")

    async def parent(tasks: list[Any]) -> None:
        async with transaction.atomic():
            await Tag.objects.acreate(name="lost")
            tasks.append(asyncio.create_task(aio.run(sleeping)))
            while not connection.connection.lock.locked():
                await asyncio.sleep(0)

    async def main() -> None:
        tasks: list[asyncio.Task[None]] = []
        task = asyncio.create_task(parent(tasks))
        while not tasks:
            await asyncio.sleep(0.001)
        for _ in range(20):
            await asyncio.sleep(0)
        task.cancel()
        async with asyncio.timeout(1):  # the child's statement is cancelled: it is lost anyway
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(DatabaseError):
                await tasks[0]
        assert leased() == 0
        async with transaction.atomic():
            await Tag.objects.acreate(name="kept")

    with pool_of_default(max_size=1):
        run(main())
    assert names() == ["kept"]


@pytest.mark.parametrize("nested", [False, True], ids=["block", "nested block"])
def test_a_block_that_is_left_with_an_error_does_not_wait_for_a_childs_statement(
    run: Runner, nested: bool
) -> None:
    def sleeping() -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_sleep(20)")

    async def leave(tasks: list[Any]) -> None:
        async with transaction.atomic():
            await Tag.objects.acreate(name="lost")
            tasks.append(asyncio.create_task(aio.run(sleeping)))
            while not connection.connection.lock.locked():
                await asyncio.sleep(0)
            raise Oops

    async def main() -> None:
        tasks: list[asyncio.Task[None]] = []
        async with asyncio.timeout(1):
            async with transaction.atomic() if nested else pgbackend.detached():
                with pytest.raises(Oops):
                    await leave(tasks)
                await Tag.objects.acreate(name="kept")
            with pytest.raises(DatabaseError):
                await tasks[0]

    with pool_of_default(max_size=1):
        run(main())
    assert names() == ["kept"]


def test_a_connection_is_closed_after_the_statement_of_a_sibling(run: Runner) -> None:
    """The sibling's statement ends whole; later statements are refused."""

    def sleeping() -> list[Any]:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_sleep(0.1), 7")
            rows: list[Any] = cursor.fetchall()
        return rows

    async def main() -> None:
        with pytest.raises(Oops):
            async with transaction.atomic():
                await Tag.objects.acreate(name="lost")
                task = asyncio.create_task(aio.run(sleeping))
                while not connection.connection.lock.locked():
                    await asyncio.sleep(0)
                await aio.run(connection.close)
                assert [row[1] for row in await task] == [7]
                with pytest.raises(DatabaseError):
                    await aio.run(sleeping)
                raise Oops

    run(main())
    assert names() == []


# --- Tasks take part, however they were started ---------------------------------------------------


async def with_gather(*coros: Awaitable[Any]) -> None:
    await asyncio.gather(*coros)


async def with_create_task(*coros: Any) -> None:
    for task in [asyncio.create_task(coro) for coro in coros]:
        await task


async def with_task_group(*coros: Any) -> None:
    async with asyncio.TaskGroup() as group:
        for coro in coros:
            group.create_task(coro)


async def with_wait_for(*coros: Any) -> None:
    for coro in coros:  # on Python 3.11 each of them is a task
        await asyncio.wait_for(coro, 10)


async def with_shield(*coros: Any) -> None:
    for coro in coros:
        await asyncio.shield(coro)


async def with_as_completed(*coros: Any) -> None:
    for done in asyncio.as_completed(coros):
        await done


async def with_signal_receivers(*coros: Any) -> None:
    signal = Signal()
    for coro in coros:

        async def receiver(coro: Any = coro, **kwargs: Any) -> None:
            await coro

        signal.connect(receiver, weak=False)
    await signal.asend(sender=None)


async def with_sync_send(*coros: Any) -> None:
    signal = Signal()
    for coro in coros:

        async def receiver(coro: Any = coro, **kwargs: Any) -> None:
            await coro

        signal.connect(receiver, weak=False)
    await aio.run(signal.send, sender=None)


@pytest.mark.parametrize(
    "start",
    [
        with_gather,
        with_create_task,
        with_task_group,
        with_wait_for,
        with_shield,
        with_as_completed,
        with_signal_receivers,
        with_sync_send,
    ],
)
@pytest.mark.parametrize("green", [False, True], ids=["loop", "green"])
def test_a_task_that_is_started_inside_a_block_takes_part_in_it(
    run: Runner, start: Callable[..., Awaitable[None]], green: bool
) -> None:
    async def child(number: int) -> None:
        await Tag.objects.acreate(name=f"child {number}")
        pids.add(await apid())
        transaction.on_commit(lambda: hooks.append(number))

    async def block(fail: bool) -> None:
        async with transaction.atomic():
            await Tag.objects.acreate(name="parent")
            pids.add(await apid())
            await start(*(child(number) for number in range(5)))
            assert len(await anames()) == 6
            if fail:
                raise Oops

    async def main() -> None:
        with pytest.raises(Oops):
            await block(fail=True)
        assert await anames() == [] and hooks == []
        pids.clear()
        await block(fail=False)

    pids: set[int] = set()
    hooks: list[int] = []
    run(aio.portal(main()) if green else main())
    assert len(pids) == 1, "one connection for all"
    assert sorted(hooks) == list(range(5))
    assert len(names()) == 6


def test_async_receivers_of_the_models_signals_take_part_in_the_block(run: Runner) -> None:
    async def receiver(sender: Any, instance: Tag, created: bool, **kwargs: Any) -> None:
        if not instance.name.endswith("'"):
            await asyncio.sleep(0)
            await Tag.objects.acreate(name=f"{instance.name}'")

    async def main() -> None:
        with pytest.raises(Oops):
            async with transaction.atomic():
                await Tag.objects.acreate(name="lost")
                assert await anames() == ["lost", "lost'"]
                raise Oops
        async with transaction.atomic():
            await Tag.objects.acreate(name="kept")

    post_save.connect(receiver, sender=Tag)
    try:
        run(main())
    finally:
        post_save.disconnect(receiver, sender=Tag)
    assert names() == ["kept", "kept'"]


def test_a_hundred_tasks_with_nested_blocks_share_one_connection_in_turn(
    run: Runner, leases: list[Any]
) -> None:
    async def child(number: int) -> None:
        await Tag.objects.acreate(name=f"{number}")
        try:
            async with transaction.atomic():
                await Tag.objects.acreate(name=f"{number} nested")
                await asyncio.sleep(0)
                if number % 3 == 0:
                    raise Oops
        except Oops:
            pass

    async def main() -> None:
        async with transaction.atomic():
            await asyncio.gather(*(child(number) for number in range(100)))

    with pool_of_default(timeout=25):
        run(main())
    assert len(leases) == 2, "one lease, and its release"
    nested = {f"{number} nested" for number in range(100) if number % 3}
    assert set(names()) == {str(number) for number in range(100)} | nested


def test_tasks_that_green_code_starts_are_green(run: Runner) -> None:
    async def child() -> int:
        assert bridge.green() is not None
        inner = asyncio.create_task(grandchild())
        return Tag.objects.count() + await inner

    async def grandchild() -> int:
        await asyncio.sleep(0)
        return len(list(Tag.objects.all()))

    async def main() -> None:
        Tag.objects.create(name="t")
        async with asyncio.TaskGroup() as group:
            task = group.create_task(child())
        assert task.result() == 2
        assert await asyncio.gather(child(), asyncio.wait_for(child(), 10)) == [2, 2]
        with transaction.atomic():
            assert await asyncio.create_task(child()) == 2

    run(aio.portal(main()))


# --- Turns ----------------------------------------------------------------------------------------


def test_statements_of_siblings_wait_while_a_nested_block_is_open(run: Runner) -> None:
    order: list[str] = []

    async def nested(opened: asyncio.Event, go: asyncio.Event) -> None:
        with pytest.raises(Oops):
            async with transaction.atomic():
                await Tag.objects.acreate(name="lost")
                opened.set()
                await go.wait()
                order.append("the nested block ends")
                raise Oops

    async def sibling(opened: asyncio.Event) -> None:
        await opened.wait()
        await Tag.objects.acreate(name="kept")
        order.append("a statement")

    async def nested_sibling(opened: asyncio.Event) -> None:
        await opened.wait()
        async with transaction.atomic():
            order.append("a nested block")
            await Tag.objects.acreate(name="kept too")

    async def main() -> None:
        opened, go = asyncio.Event(), asyncio.Event()
        async with transaction.atomic():
            async with asyncio.TaskGroup() as group:
                group.create_task(nested(opened, go))
                group.create_task(sibling(opened))
                group.create_task(nested_sibling(opened))
                waiters = state.current_block(connection).transaction
                while len(waiters.waiters) < 2:
                    await asyncio.sleep(0)
                go.set()

    run(main())
    assert order[0] == "the nested block ends" and len(order) == 3
    assert names() == ["kept", "kept too"]


@pytest.mark.parametrize("waits_for", ["a statement", "a nested block"])
def test_who_waits_longer_than_the_pools_timeout_is_told_for_whom(
    run: Runner, waits_for: str
) -> None:
    async def sibling() -> None:
        if waits_for == "a statement":
            await Tag.objects.acreate(name="not sent")
        else:
            async with transaction.atomic():
                raise AssertionError("not reached")

    async def main() -> None:
        opened, go = asyncio.Event(), asyncio.Event()
        async with transaction.atomic():
            await Tag.objects.acreate(name="before")
            async with asyncio.TaskGroup() as group:
                group.create_task(stubborn_child(opened, go), name="the holder")
                await opened.wait()
                other = asyncio.create_task(sibling(), name="the one that waits")
                with pytest.raises(TransactionManagementError) as caught:
                    await other
                message = str(caught.value)
                assert "'the holder'" in message and "'the one that waits'" in message
                assert "pgbackend.detached()" in message and "0.1 s" in message
                go.set()
            if waits_for == "a statement":
                # acreate() failed: as in Django, its own block is doomed, ...
                with pytest.raises(TransactionManagementError, match="until the end of the"):
                    await Tag.objects.acount()
                transaction.set_rollback(False)  # ... and may be cleared, for nothing was sent
            await Tag.objects.acreate(name="after")

    with pool_of_default(timeout=0.1):
        run(aio.portal(main()))
    assert names() == ["after", "before", "child's"], "nobody else is disturbed"


@pytest.mark.parametrize("failure", ["save()", "raw SQL"])
def test_a_failed_statement_dooms_the_block_for_all_who_take_part(
    run: Runner, failure: str
) -> None:
    def fail() -> None:
        if failure == "save()":
            Tag.objects.create(name="taken")
        else:
            with connection.cursor() as cursor:
                cursor.execute("INSERT INTO library_tag (name) VALUES ('taken')")

    async def child(failed: asyncio.Event) -> None:
        await failed.wait()
        with pytest.raises(DatabaseError, match="atomic|aborted"):
            await Tag.objects.acreate(name="sibling's")

    async def failing(failed: asyncio.Event) -> None:
        with pytest.raises(IntegrityError):
            await aio.run(fail)
        failed.set()

    async def main() -> None:
        await Tag.objects.acreate(name="taken")
        failed = asyncio.Event()
        async with transaction.atomic():
            await Tag.objects.acreate(name="kept")
            with pytest.raises(Oops):
                async with transaction.atomic():
                    await Tag.objects.acreate(name="lost")
                    await asyncio.gather(child(failed), failing(failed))
                    with pytest.raises(DatabaseError, match="atomic|aborted"):
                        await Tag.objects.acount()
                    raise Oops
            assert await anames() == ["kept", "taken"]

    run(main())
    assert names() == ["kept", "taken"]


# --- Detached -------------------------------------------------------------------------------------


@pytest.mark.parametrize("using", [None, "default"])
def test_detached_code_is_in_no_transaction_and_on_another_connection(
    run: Runner, using: str | None
) -> None:
    async def work(name: str) -> int:
        assert not await aio.run(lambda: connection.in_atomic_block)
        await Tag.objects.acreate(name=name)
        return await apid()

    async def main() -> None:
        with pytest.raises(Oops):
            async with transaction.atomic():
                await Tag.objects.acreate(name="lost")
                inside = await apid()
                with pgbackend.detached(using=using):
                    assert await work("with") != inside
                    with pytest.raises(Oops):
                        async with transaction.atomic():
                            await Tag.objects.acreate(name="lost too")
                            raise Oops
                async with pgbackend.detached(using=using):
                    assert await work("async with") != inside
                task = asyncio.create_task(pgbackend.detached(work("task"), using=using))
                assert await apid() == inside
                raise Oops
        await task

    run(main())
    assert names() == ["async with", "task", "with"]


def test_detached_work_goes_on_when_the_block_has_ended(run: Runner) -> None:
    async def background(go: asyncio.Event) -> None:
        await Tag.objects.acreate(name="1")
        await go.wait()
        async with transaction.atomic():
            await Tag.objects.acreate(name="2")

    async def main() -> None:
        go = asyncio.Event()
        async with transaction.atomic():
            await Tag.objects.acreate(name="0")
            task = asyncio.create_task(pgbackend.detached(background(go)))
        go.set()
        await task

    run(main())
    assert names() == ["0", "1", "2"]


# --- Neighbours -----------------------------------------------------------------------------------


@pytest.mark.parametrize("green", [False, True], ids=["loop", "green"])
@pytest.mark.parametrize("parent_used", [False, True], ids=["fresh parent", "used parent"])
def test_tasks_that_share_only_the_loop_share_nothing_in_whatever_order(
    run: Runner, parent_used: bool, green: bool
) -> None:
    """Three tasks begin, go on and end in every order."""
    orders = list(itertools.permutations("ABC"))

    async def neighbour(name: str, schedule: Schedule, seen: dict[str, Any]) -> None:
        wrapped: list[str] = []

        def wrapper(execute: Any, sql: str, *args: Any) -> Any:
            wrapped.append(sql)
            return execute(sql, *args)

        await schedule.token(name)
        assert not await aio.run(lambda: connection.in_atomic_block or connection.savepoint_ids)
        assert await aio.run(lambda: connection.execute_wrappers) == []
        with CaptureQueriesContext(connection) as queries, connection.execute_wrapper(wrapper):
            async with transaction.atomic():
                pid = await apid()
                async with transaction.atomic():
                    transaction.on_commit(lambda: seen["hooks"].append(name))
                    await schedule.token(name)
                    await Tag.objects.acreate(name=name)
                    assert await aio.run(lambda: len(connection.savepoint_ids)) == 1
                    assert await anames() == [name]
                    assert await aio.run(lambda: len(connection.run_on_commit)) == 1
                    await schedule.token(name)
                assert await apid() == pid
                transaction.set_rollback(True) if green else await aio.run(
                    transaction.set_rollback, True
                )
        seen["pids"].append(pid)
        inserts = [query["sql"] for query in queries.captured_queries if "INSERT" in query["sql"]]
        assert len(inserts) == 1 and f"'{name}'" in inserts[0]
        assert (
            len(wrapped) == len([q for q in queries.captured_queries if "pg_back" in q["sql"]]) + 4
        )

    async def main() -> None:
        if parent_used:
            await Tag.objects.acount()
        for begin, middle, end in itertools.islice(itertools.product(orders, repeat=3), 0, None, 7):
            seen: dict[str, Any] = {"hooks": [], "pids": []}
            schedule = Schedule([])
            tasks = {name: asyncio.create_task(neighbour(name, schedule, seen)) for name in "ABC"}
            await asyncio.sleep(0)
            for name in (*begin, *middle, *end):
                while set(schedule.waiting) != {n for n, task in tasks.items() if not task.done()}:
                    await asyncio.sleep(0)
                schedule.waiting.pop(name).set_result(None)
            await asyncio.gather(*tasks.values())
            assert len(set(seen["pids"])) == 3 and seen["hooks"] == []

    run(aio.portal(main()) if green else main(), timeout=60)
    assert names() == []


def test_a_task_of_djangos_own_in_a_request_is_green(run: Runner) -> None:
    """The task listens for the client's end by `receive()`, which ASGI middleware may wrap."""
    seen: list[int] = []
    scope: dict[str, Any] = {"type": "http", "method": "GET", "path": "/", "headers": []}
    listening = asyncio.Event()

    async def receive() -> dict[str, Any]:
        seen.append(Tag.objects.count())
        if len(seen) == 1:
            return {"type": "http.request", "body": b"", "more_body": False}
        seen.append(await asyncio.create_task(Tag.objects.acount()))
        listening.set()
        await asyncio.Event().wait()
        raise AssertionError("nobody woke it")

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            await listening.wait()

    run(ASGIHandler()(scope, receive, send))
    assert seen == [0, 0, 0]


# --- Tasks that begin at once, inside the step of the task that makes them ------------------------

eager = pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")


def eager_factory(loop: Any, coro: Any, **kwargs: Any) -> Any:
    return asyncio.Task(coro, loop=loop, **{**kwargs, "eager_start": True})


def by_hand(coro: Any) -> asyncio.Task[Any]:
    return eager_factory(asyncio.get_running_loop(), coro)


def by_the_factory(coro: Any) -> asyncio.Task[Any]:
    loop = asyncio.get_running_loop()
    loop.set_task_factory(eager_factory)
    bridge.make_child_tasks_green(loop)
    return loop.create_task(coro)


def by_a_factory_that_replaces_ours(coro: Any) -> asyncio.Task[Any]:
    asyncio.get_running_loop().set_task_factory(eager_factory)
    return asyncio.create_task(coro)


EAGERLY = [by_hand, by_the_factory, by_a_factory_that_replaces_ours]


@eager
@pytest.mark.parametrize("start", EAGERLY, ids=lambda start: start.__name__)
def test_an_eager_task_uses_the_database_beside_the_one_that_made_it(
    run: Runner, start: Any
) -> None:
    async def view() -> None:
        streaming = Tag.objects.order_by("name").iterator(chunk_size=1)
        assert next(streaming).name == "a"  # this task holds a connection
        wrapped: list[str] = []

        def wrapper(execute: Any, sql: str, *args: Any) -> Any:
            wrapped.append(sql)
            return execute(sql, *args)

        tasks = [start(Tag.objects.acount()), start(anames()), start(aio.portal(apid()))]
        with connection.execute_wrapper(wrapper):
            pid = _pid()
            assert await tasks[0] == 2 and await tasks[1] == ["a", "b"]
            assert await tasks[2] != pid and len(wrapped) == 1
        assert next(streaming).name == "b"
        streaming.close()

    async def main() -> None:
        await Tag.objects.abulk_create([Tag(name="a"), Tag(name="b")])
        for green in (aio.portal(view()), aio.portal(view())):
            count, _ = await asyncio.gather(Tag.objects.acount(), green)
            assert count == 2

    run(main())
    assert leased() == 0


@eager
@pytest.mark.parametrize("start", EAGERLY, ids=lambda start: start.__name__)
def test_an_eager_task_takes_part_in_the_block_it_was_made_in(run: Runner, start: Any) -> None:
    async def nested(name: str, fails: bool) -> int:
        async with transaction.atomic():
            await Tag.objects.acreate(name=name)
            if fails:
                raise Oops
            return await apid()

    async def own(name: str) -> None:
        async with pgbackend.detached(), transaction.atomic():
            await Tag.objects.acreate(name=name)

    async def view() -> None:
        with pytest.raises(Oops):
            async with transaction.atomic():
                pid = await apid()
                tasks = [start(nested("kept", False)), start(nested("undone", True))]
                detached = start(own("detached"))
                results = await asyncio.gather(*tasks, return_exceptions=True)
                assert results[0] == pid and type(results[1]) is Oops
                await detached
                assert await anames() == ["detached", "kept"]
                late = start(nested_later())
                raise Oops
        with pytest.raises(TransactionManagementError, match="has ended"):
            await late

    async def nested_later() -> None:
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await ended.wait()
        await Tag.objects.acount()

    async def main() -> None:
        nonlocal ended
        ended = asyncio.Event()
        task = asyncio.create_task(aio.portal(view()))
        asyncio.get_running_loop().call_later(0.05, ended.set)
        await task

    ended: asyncio.Event
    run(main())
    assert names() == ["detached"]


@eager
@pytest.mark.parametrize("start", [by_hand, by_a_factory_that_replaces_ours])
@pytest.mark.parametrize("held", [False, True])
def test_direct_orm_code_of_an_eager_task_is_refused_before_it_sends_anything(
    run: Runner, start: Any, held: bool
) -> None:
    """The task is in its maker's portal, and must not use the maker's session or block."""

    def peeks() -> None:
        connections_seen.append(connection.connection)
        Tag.objects.count()

    def observed() -> None:
        seen.append(connection.execute_wrappers is not makers)
        with connection.execute_wrapper(lambda execute, *args: execute(*args)):
            Tag.objects.count()

    seen: list[bool] = []
    connections_seen: list[Any] = []
    makers: Any = None
    uses: list[Callable[[], Any]] = [
        lambda: list(Tag.objects.all()),
        lambda: Tag.objects.create(name="never"),
        _pid,
        lambda: next(Tag.objects.iterator()),
        transaction.atomic(Tag.objects.count),
        *(observed, peeks),
    ]

    async def child(use: Callable[[], Any]) -> None:
        with pytest.raises((NotGreen, DatabaseError)) as refused:
            use()
        assert "await pgbackend.aio.run" in str(refused.value)
        assert await Tag.objects.acount() == 1

    async def view() -> None:
        nonlocal makers
        await Tag.objects.acreate(name="one")
        makers = connection.execute_wrappers
        streaming = Tag.objects.iterator() if held else iter(())
        if held:
            next(streaming)
        pid = _pid()
        for use in uses:
            assert (connection.connection is not None) == held  # which is cached for this task
            await start(child(use))
            assert connection.execute_wrappers == [] and not connection.in_atomic_block
            assert Tag.objects.count() == 1
        assert not held or _pid() == pid
        if held:
            streaming.close()

    run(aio.portal(view()))
    assert names() == ["one"] and leased() == 0
    assert seen == [True] and connections_seen == [None]


@eager
@pytest.mark.parametrize("green", [True, False])
def test_structured_concurrency_with_eager_tasks(run: Runner, green: bool) -> None:
    def sleep() -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_sleep(30)")

    async def write(name: str) -> None:
        async with transaction.atomic():
            await Tag.objects.acreate(name=name)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await asyncio.Event().wait()

    async def work() -> None:
        await asyncio.gather(*(write(name) for name in "abc"))
        async with asyncio.TaskGroup() as group:
            for name in "def":
                group.create_task(write(name))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                async with asyncio.TaskGroup() as group:
                    group.create_task(aio.run(sleep))  # type: ignore[arg-type]
        assert await anames() == list("abcdef")

    async def main() -> None:
        asyncio.get_running_loop().set_task_factory(eager_factory)
        await (aio.portal(work()) if green else work())

    run(main())
    assert names() == list("abcdef") and leased() == 0


@pytest.mark.parametrize("inherits", [True, False], ids=["inherited", "empty"])
def test_a_task_with_a_context_of_its_own_knows_no_block_of_its_starter(
    run: Runner, inherits: bool
) -> None:
    async def in_block() -> bool:
        return await aio.run(lambda: connection.in_atomic_block)

    async def main() -> None:
        async with transaction.atomic():
            context = None if inherits else contextvars.Context()
            assert await asyncio.create_task(in_block(), context=context) is inherits

    run(main())
