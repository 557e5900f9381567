"""C6: a transaction belongs to the code inside its block, and to the tasks started there."""

from __future__ import annotations

import asyncio
import itertools
import random
import warnings
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from django.db import DatabaseError, IntegrityError, connection, transaction
from django.db.models.signals import post_save
from django.db.transaction import TransactionManagementError
from django.dispatch import Signal
from django.test.utils import CaptureQueriesContext

import pgbackend
from pgbackend import aio, state
from pgbackend.driver import bridge
from tests.conftest import Runner
from tests.library.models import Tag
from tests.support.fixtures import pool_of_default


class Oops(Exception):
    pass


def names() -> list[str]:
    return sorted(Tag.objects.values_list("name", flat=True))


async def anames() -> list[str]:
    return await aio.run(names)


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

#: The kinds of failure, which strike instead of a step.
KINDS = ("an error of the code", "a failed statement, caught", "a failed statement, not caught")


@dataclass(frozen=True)
class Step:
    """One step of a program: a write, or a nested block with the place of its end."""

    place: int
    inside: tuple[Step, ...] | None = None
    end: int = 0


def steps_of(program: Program, numbers: Iterator[int]) -> tuple[Step, ...]:
    """Give each step of a program its place."""
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
    """In the model: the block that this leaves is rolled back."""


class Doomed(Exception):
    """In the model: the block that all tasks share is rolled back."""


def model(programs: dict[str, Program], failure: Failure | None) -> set[str]:
    """Which rows must be in the table, whatever the schedule.

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
    """Gives one token at a time; which task gets it is a choice at each point."""

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
        """Whether every task is done, or waits for a token, for its children or for its turn."""
        live = [name for name, task in tasks.items() if not task.done()]
        joining = self.joining if len(live) > 1 else set()
        moving = [name for name in live if name not in self.waiting and name not in joining]
        return len(moving) == sum(len(shared.waiters) for shared in self.transactions)


class Run:
    """One run of three programs by one schedule."""

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
        """Wait for the token of this step, and fail instead of it if that is asked for."""
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
    """The next schedule of a depth-first walk through all of them; None after the last."""
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


@pytest.mark.parametrize("shape", SHAPES)
def test_every_interleaving_of_three_tasks_with_nested_blocks_keeps_all_rows(
    run: Runner, shape: str
) -> None:
    async def main() -> None:
        assert await check_every_schedule(itertools.count(), FLAT, None, shape) > 50

    run(main(), timeout=120)


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
    programs = {name: (("w", ("w",)),) for name in "PAB"}

    async def main() -> None:
        for number in range(40):
            failure = failing and Failure(failing, 4, KINDS[0])  # at the end of the outer block
            one = Run(number, programs, failure or None, Schedule([], random.Random(drawn.random())))
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


# --- What is on its way when a block ends ---------------------------------------------------------


async def busy_child(prefix: str, written: list[str], drawn: random.Random) -> None:
    """Write rows until it is refused; write down which ones were reported as written."""
    for number in itertools.count():
        await asyncio.sleep(0)
        name = f"{prefix}:{number}"
        try:
            if drawn.random() < 0.5:
                async with transaction.atomic():
                    await Tag.objects.acreate(name=name)
            else:
                await Tag.objects.acreate(name=name)
        except TransactionManagementError as refusal:
            assert "has ended" in str(refusal)
            return
        written.append(name)


@pytest.mark.parametrize("nested", [False, True], ids=["outermost", "nested"])
@pytest.mark.parametrize("fails", [False, True], ids=["commit", "rollback"])
def test_no_statement_of_a_child_slips_behind_the_end_of_its_block(
    run: Runner, request: pytest.FixtureRequest, nested: bool, fails: bool
) -> None:
    """Children write while the block ends: what they were told is written is what is there."""
    drawn = random.Random(repr((request.config.option.seed, nested, fails)))

    async def block(prefix: str, written: list[str]) -> list[asyncio.Task[None]]:
        tasks: list[asyncio.Task[None]] = []
        with pytest.raises(Oops) if fails else warnings.catch_warnings():
            async with transaction.atomic():
                for child in "ab":
                    coro = busy_child(f"{prefix}{child}", written, drawn)
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

        def commit_is_on_its_way(execute: Any, sql: str, *args: Any) -> Any:
            return execute(sql, *args)

        async with transaction.atomic():
            await Tag.objects.acreate(name="kept")
            tasks = [asyncio.create_task(child(event)) for event in (during, after)]
            await asyncio.sleep(0)
            block = state.current_block(connection)
            push = block.transaction.push

            def pushed(parent: Any) -> Any:
                during.set()  # the child's statement comes while COMMIT is on its way
                return push(parent)

            state.Transaction.push, original = lambda self, parent: pushed(parent), push.__func__
        state.Transaction.push = original
        await asyncio.sleep(0)
        after.set()
        for task in tasks:
            with pytest.raises(TransactionManagementError, match="was started inside an atomic"):
                await task

    run(main())
    assert names() == ["kept"]
