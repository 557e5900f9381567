"""Tests that things left open (a cursor, an iterator, `raw()`, `pinned()`, a COPY) harm nobody."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import re
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import ExitStack, closing, nullcontext
from typing import Any

import psycopg
import pytest
from django.db import Error, connection, connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import QuerySet, Value
from django.db.models.functions import Concat
from django.db.utils import DataError, InterfaceError, OperationalError, ProgrammingError

import pgbackend
from pgbackend import aio, sessions
from tests.conftest import Runner
from tests.library.models import Tag
from tests.support.gate import Gate
from tests.support.sweep import Interrupt, Outcome, sweep

ROWS = 6
#: Turns of the loop within which the backend warns of something that a task has left open.
TURNS = 40
COUNT = f"SELECT count(*) FROM {Tag._meta.db_table}"


@pytest.fixture(autouse=True)
def _tags(fresh_tables: None) -> None:
    Tag.objects.bulk_create(Tag(name=str(number)) for number in range(ROWS))


@pytest.fixture
def gate() -> Iterator[Gate]:
    """Make a gate, whose statements wait until the test opens it."""
    settings_dict = connection.settings_dict
    with (
        psycopg.connect(
            host=settings_dict["HOST"],
            port=settings_dict["PORT"],
            user=settings_dict["USER"],
            password=settings_dict["PASSWORD"],
            dbname=settings_dict["NAME"],
            autocommit=True,
        ) as admin,
        closing(Gate(admin)) as made,
    ):
        yield made


def leased() -> int:
    return sum(pool.leased for pool in pgbackend.statistics())


def made() -> int:
    return sum(pool.connections_made for pool in pgbackend.statistics())


async def given_back() -> None:
    """Wait until nothing is leased: the loop's own tasks, and threads, may take a while."""
    async with asyncio.timeout(5):
        while leased():
            await asyncio.sleep(0.001)


async def in_a_task(coro: Coroutine[Any, Any, Any]) -> Any:
    return await asyncio.create_task(coro)


def in_cycle(*things: object) -> None:
    """Leave `things` to the garbage collector."""
    cycle: list[object] = [*things]
    cycle.append(cycle)


# --- Things left, while a statement of the same task runs ---------------------------------------


def failed_raw() -> object:
    rows = Tag.objects.raw("SELECT nowhere FROM library_tag")
    with pytest.raises(ProgrammingError) as error:
        list(rows)
    return rows, error.value


def fetched_raw() -> object:
    rows = Tag.objects.raw("SELECT * FROM library_tag")
    assert len(list(rows)) == ROWS
    return rows


def left_raw() -> object:
    rows = iter(Tag.objects.raw("SELECT * FROM library_tag"))
    next(rows)
    return rows


def left_iterator() -> object:
    rows = Tag.objects.iterator(chunk_size=1)
    next(rows)
    return rows


def forgotten_cursor() -> object:
    cursor = connection.cursor()
    cursor.execute("SELECT 1")
    return cursor


def unused_cursor() -> object:
    return connection.cursor()


def failed_cursor() -> object:
    cursor = connection.cursor()
    with pytest.raises(DataError) as error:
        cursor.execute("SELECT 1/0")
    return cursor, error.value


def named_cursor() -> object:
    cursor = connection.chunked_cursor()
    cursor.execute("SELECT generate_series(1, 9)")
    cursor.fetchone()
    return cursor


LEAVE: list[Callable[[], object]] = [
    failed_raw,
    fetched_raw,
    left_raw,
    left_iterator,
    forgotten_cursor,
    unused_cursor,
    failed_cursor,
    named_cursor,
]


def tags_at(gate: Gate | None) -> QuerySet[Tag]:
    """Select all rows; wait for the gate first, if there is one."""
    if gate is None:
        return Tag.objects.all()
    return Tag.objects.extra(where=[gate.condition])


def update(gate: Gate | None = None) -> int:
    changed: int = tags_at(gate).update(name=Concat("name", Value("!")))
    return changed


def count_by_cursor(gate: Gate | None = None) -> int:
    with connection.cursor() as cursor:
        cursor.execute(COUNT + (f" WHERE {gate.condition}" if gate is not None else ""))
        (found,) = cursor.fetchone()
        return int(found)


def count_by_iterator(gate: Gate | None = None) -> int:
    return sum(1 for _ in tags_at(gate).iterator(chunk_size=2))


WORK = [update, count_by_cursor, count_by_iterator]


@pytest.mark.sweep(one_in=6)
@pytest.mark.filterwarnings("ignore:a cursor opened at:ResourceWarning")
@pytest.mark.parametrize("how", ["in the loop's thread", "in another thread"])
@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("leave", LEAVE)
def test_garbage_does_not_end_the_statement_in_flight(
    run: Runner, gate: Gate, leave: Callable[[], object], work: Any, how: str
) -> None:
    def leave_and_work() -> int:
        in_cycle(leave())
        found: int = work(gate)
        return found

    async def main() -> None:
        gc.disable()
        try:
            task = asyncio.create_task(aio.run(leave_and_work))
            await gate.reached()
            if how == "in another thread":
                await asyncio.to_thread(gc.collect)
            else:
                gc.collect()
        finally:
            gc.enable()
        await asyncio.sleep(0)
        gate.open()
        assert await task == ROWS
        await given_back()
        assert made() == sum(pool.size for pool in pgbackend.statistics()), "none was closed"
        assert await aio.run(count_by_cursor) == ROWS

    run(main())


def collect(at: int) -> Interrupt:
    """Collect garbage as the task begins its wait number `at`."""

    def interrupt(number: int, waits_for: Any, task: asyncio.Task[Any]) -> None:
        if number == at:
            gc.collect()

    return interrupt


@pytest.mark.sweep(one_in=6)
@pytest.mark.filterwarnings("ignore:a cursor opened at:ResourceWarning")
@pytest.mark.filterwarnings("ignore:task .* has ended with:ResourceWarning")
@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("leave", LEAVE)
def test_garbage_may_be_collected_at_any_wait(
    run: Runner, leave: Callable[[], object], work: Any
) -> None:
    def operation() -> None:
        in_cycle(leave())
        assert work() == ROWS
        with transaction.atomic():
            in_cycle(leave_quietly(leave))
            assert work() == ROWS

    async def check(outcome: Outcome) -> None:
        gc.collect()
        await given_back()
        assert await aio.run(open_on_the_server) == 0

    async def main() -> None:
        await sweep(lambda: aio.run(operation), collect, check)

    gc.collect()
    gc.disable()
    try:
        run(main())
    finally:
        gc.enable()


def test_the_last_holder_may_be_collected_while_a_cursor_is_made(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create_cursor(wrapper: Any, name: str | None = None) -> Any:
        gc.collect()
        return original(wrapper, name)

    wrapper_class: Any = type(connections["default"])
    original = wrapper_class.create_cursor
    monkeypatch.setattr(wrapper_class, "create_cursor", create_cursor)

    def main() -> None:
        for make in (unused_cursor, count_by_cursor, count_by_iterator, failed_then_again):
            in_cycle(left_iterator())
            kept = make()
            gc.collect()
            assert leased() == (make is unused_cursor)
            del kept

    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            run.green(main)
    finally:
        gc.enable()


def failed_then_again() -> None:
    with connection.cursor() as cursor:
        with pytest.raises(DataError):
            cursor.execute("SELECT 1/0")
        in_cycle(left_iterator())
        cursor.execute("SELECT 1")
        assert cursor.fetchone() == (1,)


def leave_quietly(leave: Callable[[], object]) -> object:
    """Leave something in a transaction; return the error if its statement fails."""
    try:
        with transaction.atomic():
            return leave()
    except Error as error:
        return error


def open_on_the_server() -> int:
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM pg_cursors WHERE name LIKE '\\_django%'")
        (found,) = cursor.fetchone()
        return int(found)


# --- raw() --------------------------------------------------------------------------------------


def test_raw_holds_nothing_once_its_rows_are_in_memory(run: Runner) -> None:
    def main() -> None:
        rows = Tag.objects.raw("SELECT * FROM library_tag ORDER BY id")
        assert len(list(rows)) == ROWS and leased() == 0
        assert rows.columns == ["id", "name"] and leased() == 0
        asked = Tag.objects.raw("SELECT * FROM library_tag ORDER BY id")
        assert asked.columns == ["id", "name"] and leased() == 0
        assert len(list(asked.query)) == ROWS and leased() == 0
        assert len(list(asked)) == ROWS
        again = iter(Tag.objects.raw("SELECT * FROM library_tag ORDER BY id"))
        first = next(again)
        assert leased() == 0
        assert [tag.pk for tag in (first, *again)] == [tag.pk for tag in rows]

    run.green(main)


@pytest.mark.parametrize("observed", ["nobody", "a wrapper", "the log"])
def test_raw_that_fails_holds_nothing(run: Runner, observed: str) -> None:
    def main() -> None:
        with ExitStack() as stack:
            if observed == "a wrapper":
                stack.enter_context(connection.execute_wrapper(lambda run, *args: run(*args)))
            elif observed == "the log":
                connection.force_debug_cursor = True
            kept = [failed_raw() for _ in range(9)]  # more than the pool has
            assert leased() == 0
            kept += [fetched_raw() for _ in range(9)]
            assert leased() == 0

    run.green(main)


@pytest.mark.parametrize("holder", [transaction.atomic, pgbackend.pinned])
def test_raw_lets_go_of_nothing_that_others_hold(run: Runner, holder: Any) -> None:
    def main() -> None:
        with holder():
            pid = backend_pid()
            kept = fetched_raw()
            assert leased() == 1 and backend_pid() == pid
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1")
                kept = kept, fetched_raw()
                assert cursor.fetchone() == (1,)
            assert leased() == 1 and backend_pid() == pid
        assert leased() == 0

    run.green(main)


def backend_pid() -> int:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        (pid,) = cursor.fetchone()
        return int(pid)


# --- aiterator(), stepped by other tasks ----------------------------------------------------------


def plainly() -> QuerySet[Tag]:
    return Tag.objects.order_by("pk")


def with_prefetch() -> QuerySet[Tag]:
    return Tag.objects.order_by("pk").prefetch_related("books")


def as_values() -> Any:
    return Tag.objects.order_by("pk").values_list("pk")


QUERYSETS = [plainly, with_prefetch, as_values]


@pytest.fixture
def on_client(request: pytest.FixtureRequest) -> Iterator[None]:
    """Switch server-side cursors off if the test's parameter says so."""
    settings_dict = connection.settings_dict
    settings_dict["DISABLE_SERVER_SIDE_CURSORS"] = request.param
    yield
    settings_dict["DISABLE_SERVER_SIDE_CURSORS"] = False


@pytest.mark.parametrize("on_client", [False, True], indirect=True)
@pytest.mark.parametrize("queryset", QUERYSETS)
def test_each_step_of_aiterator_may_be_a_tasks_of_its_own(
    run: Runner, queryset: Any, on_client: None
) -> None:
    async def main() -> None:
        rows = queryset().aiterator(chunk_size=1)
        seen = 0
        while (await asyncio.create_task(anext_or_none(rows))) is not None:
            seen += 1
            for _ in range(TURNS):
                await asyncio.sleep(0)
            held = not connection.settings_dict["DISABLE_SERVER_SIDE_CURSORS"]
            assert leased() == held, "that of the iteration"
            if seen % 2:
                assert await Tag.objects.acount() == ROWS
                assert leased() == held, "the task that made it shares it"
        assert seen == ROWS
        await given_back()

    run(main())


async def anext_or_none(rows: AsyncIterator[Any]) -> Any:
    return await anext(rows, None)


@pytest.mark.parametrize("queryset", QUERYSETS)
def test_the_iterations_of_one_task_may_be_stepped_in_turn(run: Runner, queryset: Any) -> None:
    async def main() -> None:
        several = [queryset().aiterator(chunk_size=1) for _ in range(3)]
        seen = [0] * 3
        for _ in range(ROWS):
            for number, rows in enumerate(several):
                assert await asyncio.create_task(anext_or_none(rows)) is not None
                seen[number] += 1
                assert leased() <= 3
        assert [await in_a_task(anext_or_none(rows)) for rows in several] == [None] * 3
        await given_back()

    run(main())


@pytest.mark.parametrize("queryset", QUERYSETS)
def test_one_queryset_may_be_iterated_by_several_tasks(run: Runner, queryset: Any) -> None:
    """Each iteration belongs to the task that began it, not to the task that began the last one."""
    shared = queryset()

    async def iterate(begun: asyncio.Event, others: asyncio.Event) -> int:
        rows = shared.aiterator(chunk_size=1)
        begun.set()
        await others.wait()
        seen = 0
        while await asyncio.create_task(anext_or_none(rows)) is not None:
            seen += 1
        return seen

    async def begin(first: asyncio.Event) -> None:
        await first.wait()
        shared.aiterator(chunk_size=1)

    async def main() -> None:
        begun, others = asyncio.Event(), asyncio.Event()
        first = asyncio.create_task(iterate(begun, others))
        await asyncio.create_task(begin(begun))
        others.set()
        assert await first == ROWS
        await given_back()

    run(main())


@pytest.mark.parametrize("queryset", QUERYSETS)
def test_a_queryset_whose_aiterator_was_used_can_be_copied(run: Runner, queryset: Any) -> None:
    async def main() -> None:
        tags = queryset()
        async for _ in tags.aiterator(chunk_size=1):
            break
        rows = tags.aiterator(chunk_size=1)
        await anext(rows)

        def copies() -> list[Any]:
            return [
                list(copy.deepcopy(tags)),
                list(tags.all()),
                list(pickle.loads(pickle.dumps(tags))),
            ]

        first, *others = await aio.run(copies)
        assert len(first) == ROWS and all(other == first for other in others)
        assert "_maker" not in vars(tags)
        await rows.aclose()
        await given_back()

    run(main())


@pytest.mark.parametrize("queryset", QUERYSETS)
def test_an_iteration_whose_maker_has_ended_ends_with_its_step(
    run_once: Runner, queryset: Any
) -> None:
    async def make() -> Any:
        return queryset().aiterator(chunk_size=1)

    async def main() -> None:
        rows = await in_a_task(make())
        with pytest.warns(
            ResourceWarning, match=r"has ended with a cursor or an iterator of .*open"
        ):
            await in_a_task(anext_or_none(rows))
            await given_back()
            for _ in range(TURNS):
                await asyncio.sleep(0)
        with pytest.raises(InterfaceError, match=r"went back to the pool with the end of task"):
            for _ in range(ROWS):
                await in_a_task(anext_or_none(rows))
        await given_back()

    run_once(main())


# --- A timeout in the body ------------------------------------------------------------------------


async def time_out(gate: Gate) -> None:
    """Run a statement that is ended by a timeout of its caller."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(10) as limit:
            statement = asyncio.ensure_future(reach(gate, limit))
            await aio.run(update, gate)
    await statement


async def reach(gate: Gate, limit: asyncio.Timeout) -> None:
    await gate.reached()
    limit.reschedule(0)


def test_a_timeout_in_the_body_of_an_iteration_ends_one_statement(run: Runner, gate: Gate) -> None:
    async def main() -> None:
        seen = 0
        async for _ in Tag.objects.aiterator(chunk_size=2):
            seen += 1
            if seen == 2:
                await time_out(gate)
                assert leased() == 1
        assert seen == ROWS and leased() == 0

    run(main())


def test_a_timeout_beside_an_open_cursor_ends_one_statement(run: Runner, gate: Gate) -> None:
    async def main() -> None:
        cursor = await aio.run(connection.cursor)
        await aio.run(cursor.execute, "SELECT generate_series(1, 3)")
        await time_out(gate)
        assert await aio.run(cursor.fetchall) == [(1,), (2,), (3,)]
        await aio.run(cursor.execute, "SELECT 7")
        assert await aio.run(cursor.fetchone) == (7,)
        await aio.run(cursor.close)
        assert leased() == 0

    run(main())


# --- A cursor that has failed, and is used again --------------------------------------------------


def again(cursor: Any) -> None:
    cursor.execute("SELECT 1")
    assert cursor.fetchone() == (1,)
    assert cursor.connection is connection.connection


@pytest.mark.parametrize("surroundings", [nullcontext, transaction.atomic, pgbackend.pinned])
def test_a_cursor_that_failed_takes_the_connection_of_where_it_is_used(
    run: Runner, surroundings: Any
) -> None:
    def main() -> None:
        with connection.cursor() as cursor:
            with pytest.raises(DataError):
                cursor.execute("SELECT 1/0")
            assert leased() == 0
            with surroundings():
                again(cursor)
                assert leased() == 1
                with connection.cursor() as other:
                    again(other)
                    assert other.connection is cursor.connection
        assert leased() == 0

    run.green(main)


@pytest.mark.parametrize("surroundings", [transaction.atomic, pgbackend.pinned])
def test_a_cursor_that_failed_where_others_hold_goes_on_there(
    run: Runner, surroundings: Any
) -> None:
    def main() -> None:
        with surroundings():
            pid = backend_pid()
            with connection.cursor() as cursor:
                with pytest.raises(DataError), transaction.atomic():
                    cursor.execute("SELECT 1/0")
                again(cursor)
                assert backend_pid() == pid
        assert leased() == 0

    run.green(main)


def test_a_cursor_that_failed_may_be_used_by_another_task(run: Runner) -> None:
    async def fail() -> Any:
        return (await aio.run(failed_cursor))[0]  # type: ignore[index]

    async def main() -> None:
        cursor = await in_a_task(fail())
        await aio.run(again, cursor)
        assert leased() == 1
        await aio.run(cursor.close)
        assert leased() == 0

    run(main())


def test_a_cursor_that_failed_before_its_connection_was_closed(run: Runner) -> None:
    def main() -> None:
        with pytest.raises(OperationalError, match="the connection is closed"):
            with transaction.atomic():
                with connection.cursor() as cursor:
                    with pytest.raises(DataError), transaction.atomic():
                        cursor.execute("SELECT 1/0")
                    connection.close()
                    connection.needs_rollback = False
                    again(cursor)
        assert leased() == 0

    run.green(main)


def test_what_a_cursor_that_failed_does_next_is_undone_like_raw_sql(run: Runner) -> None:
    def main() -> None:
        with connection.cursor() as cursor:
            with pytest.raises(DataError):
                cursor.execute("SELECT 1/0")
            cursor.execute("SET application_name = 'mine'")
        for _ in range(5):
            with connection.cursor() as cursor:
                cursor.execute("SHOW application_name")
                assert cursor.fetchone() != ("mine",)

    run.green(main)


@pytest.mark.parametrize("surroundings", [nullcontext, pgbackend.pinned])
def test_a_wrapper_may_repeat_a_statement_that_has_failed(run: Runner, surroundings: Any) -> None:
    def repeat(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        with pytest.raises(DataError):
            execute("SELECT 1/0", None, many, context)
        return execute(sql, params, many, context)

    def main() -> None:
        with surroundings(), connection.execute_wrapper(repeat):
            assert Tag.objects.count() == ROWS
            assert len(list(Tag.objects.all())) == ROWS
            assert len(list(Tag.objects.iterator(chunk_size=2))) == ROWS
            assert len(list(Tag.objects.raw("SELECT * FROM library_tag"))) == ROWS
            assert count_by_cursor() == ROWS
        assert leased() == 0

    run.green(main)


# --- COPY without copy() --------------------------------------------------------------------------


def by_raw(sql: str) -> None:
    list(Tag.objects.raw(sql))


def by_execute(sql: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(sql)


def by_executemany(sql: str) -> None:
    with connection.cursor() as cursor:
        cursor.executemany(sql, [(), ()])


def by_stream(sql: str) -> None:
    with connection.cursor() as cursor:
        list(cursor.stream(sql))


@pytest.mark.sweep(one_in=4)
@pytest.mark.parametrize("surroundings", [nullcontext, transaction.atomic, pgbackend.pinned])
@pytest.mark.parametrize(
    "sql", ["COPY library_tag TO STDOUT", "COPY library_tag (name) FROM STDIN"]
)
@pytest.mark.parametrize("copy_by", [by_raw, by_execute, by_executemany, by_stream])
def test_a_copy_that_cannot_go_on_ends_its_connection(
    run: Runner, copy_by: Callable[[str], None], sql: str, surroundings: Any
) -> None:
    def main() -> None:
        with pytest.raises((Error, psycopg.Error)) as error, surroundings():
            copy_by(sql)
        assert "COPY" in str(error.value)
        for _ in range(5):
            assert Tag.objects.count() == ROWS
            assert count_by_cursor() == ROWS
        assert leased() == 0

    run.green(main)


@pytest.mark.parametrize("copy_by", [by_raw, by_execute, by_executemany, by_stream])
def test_after_a_copy_the_block_says_that_its_connection_is_closed(
    run: Runner, copy_by: Callable[[str], None]
) -> None:
    def main() -> None:
        with pgbackend.pinned():
            with pytest.raises((Error, psycopg.Error)):
                copy_by("COPY library_tag TO STDOUT")
            for _ in range(2):
                try:
                    assert count_by_cursor() == ROWS
                except OperationalError as error:
                    assert "the connection is closed" in str(error)  # noqa: PT017 - or no error

    run.green(main)


# --- The end of the task ------------------------------------------------------------------------

HERE = r"test_left_open\.py:\d+"


def _leave(thing: Callable[[], object]) -> Callable[[list[object]], None]:
    def leave(kept: list[object]) -> None:
        kept.append(thing())

    leave.__name__ = thing.__name__
    return leave


def leave_pinned(kept: list[object]) -> None:
    pinned = pgbackend.pinned()
    pinned.__enter__()
    kept.append(pinned)
    Tag.objects.count()


@pytest.mark.parametrize(
    ("leave", "said"),
    [
        (_leave(left_iterator), f"a cursor or an iterator of .*{HERE}"),
        (_leave(forgotten_cursor), f"a cursor or an iterator of .*{HERE}"),
        (_leave(unused_cursor), f"a cursor or an iterator of .*{HERE}"),
        (_leave(named_cursor), f"a cursor or an iterator of .*{HERE}"),
        (leave_pinned, rf"pinned\(\) of .*{HERE}"),
    ],
    ids=["iterator", "cursor", "unused cursor", "named cursor", "pinned"],
)
@pytest.mark.parametrize("end", ["returns", "fails", "is cancelled"])
def test_the_end_of_a_task_gives_back_what_it_has_left_open(
    run: Runner, leave: Callable[[list[object]], None], said: str, end: str
) -> None:
    kept: list[object] = []

    async def leaves() -> None:
        await aio.run(leave, kept)
        if end == "fails":
            raise ZeroDivisionError
        if end == "is cancelled":
            asyncio.current_task().cancel()  # type: ignore[union-attr]
            await asyncio.sleep(0)

    async def main() -> None:
        with pytest.warns(ResourceWarning) as warned:
            task = asyncio.create_task(leaves(), name="the one that leaves")
            await asyncio.wait([task])
            await asyncio.sleep(0)
            assert leased() == 0
            for _ in range(TURNS):
                await asyncio.sleep(0)
        message = f"task 'the one that leaves' has ended with {said} open, and held its connection"
        [warning] = warned
        assert warning.category is ResourceWarning
        assert re.search(message, str(warning.message)), str(warning.message)
        assert not sessions.pinned_sessions
        assert await aio.run(open_on_the_server) == 0
        end_of(task)

    def end_of(task: asyncio.Task[None]) -> None:
        if end == "fails":
            assert isinstance(task.exception(), ZeroDivisionError)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        run(main())
        for thing in kept:
            if hasattr(thing, "__exit__") and isinstance(thing, pgbackend.pinned):
                thing.__exit__(None, None, None)
        kept.clear()
        gc.collect()


def test_what_is_used_after_the_end_of_its_task_says_why(run: Runner) -> None:
    async def leaves() -> Any:
        return await aio.run(forgotten_cursor)

    async def main() -> None:
        with pytest.warns(ResourceWarning, match="has ended with"):
            cursor = await asyncio.create_task(leaves(), name="the one that leaves")
            for _ in range(TURNS):
                await asyncio.sleep(0)
        with pytest.raises(InterfaceError, match=r"with the end of task 'the one that leaves'"):
            await aio.run(cursor.execute, "SELECT 1")
        await aio.run(cursor.close)

    run(main())


@pytest.mark.parametrize("queryset", QUERYSETS)
@pytest.mark.parametrize("rows_read", [1, 3])
def test_an_iteration_that_is_broken_off_at_the_end_of_its_task_is_no_fault(
    run: Runner, queryset: Any, rows_read: int
) -> None:
    """The loop closes the generator soon after the end of the task; a warning would be an error."""

    async def breaks_off() -> None:
        seen = 0
        async for _ in queryset().aiterator(chunk_size=1):
            seen += 1
            if seen == rows_read:
                break

    async def main() -> None:
        await in_a_task(breaks_off())
        await given_back()
        for _ in range(TURNS):
            await asyncio.sleep(0)
        assert await aio.run(open_on_the_server) == 0

    run(main())


def test_a_task_that_leaves_pinned_without_a_statement_is_forgotten(run: Runner) -> None:
    kept: list[Any] = []

    async def leaves() -> None:
        kept.append(pgbackend.pinned())
        await aio.run(kept[0].__enter__)

    async def main() -> None:
        await in_a_task(leaves())
        await asyncio.sleep(0)
        assert not sessions.pinned_sessions
        await aio.run(kept[0].__exit__)

    run(main())


def test_what_a_task_has_closed_is_not_warned_of(run: Runner) -> None:
    async def tidy() -> None:
        await aio.run(count_by_cursor)
        await aio.run(count_by_iterator)
        async with pgbackend.pinned():
            await Tag.objects.acount()
        async with transaction.atomic():
            await Tag.objects.acount()
            async for _ in Tag.objects.aiterator(chunk_size=1):
                pass

    async def main() -> None:
        await in_a_task(tidy())
        assert leased() == 0

    run(main())


# --- connection.close() in a block ---------------------------------------------------------------


@pytest.fixture
def stock() -> Iterator[BaseDatabaseWrapper]:
    """Add the same database on Django's own backend, as the alias ``stock``."""
    settings_dict = copy.deepcopy(connection.settings_dict)
    settings_dict["ENGINE"] = "django.db.backends.postgresql"
    settings_dict["OPTIONS"].pop("pool", None)
    connections.settings["stock"] = settings_dict
    try:
        wrapper = connections["stock"]
        # As in Django: a test's own method refuses a database that is not in its `databases`.
        wrapper.ensure_connection = (  # type: ignore[method-assign]
            lambda: None if wrapper.connection is not None else wrapper.connect()
        )
        yield wrapper
    finally:
        connections["stock"].close()
        del connections["stock"], connections.settings["stock"]


def errors_after_close(alias: str, where: str) -> list[tuple[str, str]]:
    """Return the error of each statement in a block after `close()`, and of the block's end."""
    wrapper = connections[alias]
    tags = Tag.objects.using(alias)
    seen: list[tuple[str, str]] = []

    def note(name: str, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:
            seen.append((name, f"{type(error).__module__}.{type(error).__name__}"))
        else:
            seen.append((name, "no error"))

    def nested(**options: Any) -> None:
        with transaction.atomic(using=alias, **options):
            tags.count()

    def by_cursor() -> None:
        with wrapper.cursor() as cursor:
            cursor.execute("SELECT 1")

    kept: list[Any] = []

    def statements() -> None:
        note("get", lambda: tags.get(name="1"))
        note("update", lambda: tags.update(name="2"))
        note("create", lambda: tags.create(name="new"))
        note("iterator", lambda: list(tags.iterator()))
        note("raw", lambda: list(tags.raw("SELECT * FROM library_tag")))
        note("cursor", by_cursor)
        note("an open cursor", lambda: kept[0].execute("SELECT 1"))
        note("nested", nested)
        note("nested without savepoint", lambda: nested(savepoint=False))
        note("durable", lambda: nested(durable=True))
        note("savepoint", lambda: transaction.savepoint(using=alias))
        note("on_commit", lambda: transaction.on_commit(lambda: None, using=alias))

    def block() -> None:
        with transaction.atomic(using=alias):
            kept.append(wrapper.cursor())
            kept[0].execute("SELECT 1")
            if where == "before the first statement":
                kept[0].close()
            if where == "in a nested block":
                with transaction.atomic(using=alias):
                    wrapper.close()
                    statements()
            else:
                wrapper.close()
            statements()

    note("block", block)
    note("after", tags.count)
    note("after, by a cursor", by_cursor)
    return seen


@pytest.mark.parametrize(
    "where", ["in the block", "in a nested block", "before the first statement"]
)
def test_after_close_in_a_block_errors_are_djangos(
    run: Runner, stock: BaseDatabaseWrapper, where: str
) -> None:
    theirs = errors_after_close("stock", where)
    assert ("cursor", "django.db.utils.OperationalError") in theirs
    assert run.green(errors_after_close, "default", where) == theirs


@pytest.mark.parametrize("in_thread", [False, True])
def test_who_closes_a_connection_waits_for_the_statement_of_another_task(
    run: Runner, gate: Gate, in_thread: bool
) -> None:
    async def main() -> None:
        with closing(gate):
            try:
                async with transaction.atomic():
                    if in_thread:
                        call = asyncio.to_thread(count_by_cursor, gate)
                    else:
                        call = aio.run(update, gate)
                    statement = asyncio.create_task(call)
                    await gate.reached()
                    closes = asyncio.create_task(aio.run(connection.close))
                    await asyncio.sleep(0)
                    assert not closes.done()
                    gate.open()
                    await closes
                    with pytest.raises(OperationalError, match="the connection is closed"):
                        await Tag.objects.acount()
                    assert await statement == ROWS
            except OperationalError:
                pass
        await given_back()
        assert await Tag.objects.acount() == ROWS

    run(main())
