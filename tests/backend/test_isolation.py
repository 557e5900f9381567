"""Tests that overlapping requests never share a connection, a transaction or a query log.

This was the first regression test: the original of this idea kept its connection in one context
variable for all tasks of a thread, and four overlapping requests crossed connections.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.db import connection, transaction
from django.test.utils import CaptureQueriesContext

from pgbackend import aio
from tests.conftest import Runner
from tests.library.models import Author

STEPS = ("begin", "insert", "look", "end")


class Schedule:
    """Lets named tasks take their steps in one given order."""

    def __init__(self, order: tuple[str, ...]) -> None:
        self.order = list(order)
        self.turns: dict[str, asyncio.Event] = {}

    async def step(self, name: str) -> None:
        """Wait until it is the turn of `name`."""
        if self.order and self.order[0] == name:
            return
        event = self.turns[name] = asyncio.Event()
        await event.wait()

    def done(self) -> None:
        """Let the next task take its turn."""
        self.order.pop(0)
        if self.order and (event := self.turns.get(self.order[0])) is not None:
            event.set()


def _orders() -> Iterator[tuple[str, ...]]:
    """Yield every order in which four requests can begin, and every order in which they can end."""
    names = "abcd"
    for begin, finish in itertools.product(itertools.permutations(names), repeat=2):
        yield (*begin, *begin, *finish, *finish)


def _pid() -> int:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        return cursor.fetchone()[0]


async def _request(name: str, schedule: Schedule, parent_used: bool) -> tuple[int, list[str]]:
    """Run a transaction in four steps; between them, other tasks take theirs."""
    await schedule.step(name)
    assert connection.connection is None and not connection.in_atomic_block
    with CaptureQueriesContext(connection) as queries:
        with transaction.atomic():
            transaction.on_commit(lambda: seen.append(name))
            seen: list[str] = []
            pid = _pid()
            schedule.done()
            await schedule.step(name)
            Author.objects.create(name=name)
            schedule.done()
            await schedule.step(name)
            assert [author.name for author in Author.objects.filter(name__in="abcd")] == [name]
            assert pid == _pid(), "one transaction, one connection"
            schedule.done()
            await schedule.step(name)
            transaction.set_rollback(True)
    schedule.done()
    assert seen == [], "the transaction was rolled back"
    assert connection.connection is None
    return pid, [query["sql"] for query in queries.captured_queries]


@pytest.mark.sweep(one_in=4)
@pytest.mark.parametrize("parent_used", [False, True], ids=["fresh parent", "used parent"])
def test_four_requests_that_overlap_in_every_order_share_nothing(
    run: Runner, parent_used: bool
) -> None:
    async def overlap(order: tuple[str, ...]) -> None:
        schedule = Schedule(order)
        answers = await asyncio.gather(
            *(aio.portal(_request(name, schedule, parent_used)) for name in "abcd")
        )
        assert len({pid for pid, _ in answers}) == 4
        for name, (_, queries) in zip("abcd", answers, strict=True):
            inserts = [sql for sql in queries if sql.startswith("INSERT")]
            assert len(inserts) == 2, inserts  # the author, and the receiver's entry
            assert f"'{name}'" in inserts[0]

    async def main() -> None:
        if parent_used:
            await Author.objects.acount()
        for order in itertools.islice(_orders(), None, None, 7):
            await overlap(order)

    run(main(), timeout=120)
    assert not Author.objects.exists()


def test_a_cursor_kept_after_its_lease_is_refused(run: Runner) -> None:
    from django.db.utils import InterfaceError

    def keep() -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
            raw = cursor.connection
        with pytest.raises(InterfaceError):
            cursor.execute("SELECT 2")
        with pytest.raises(Exception, match="went back to the pool"):
            raw.execute("SELECT 3")

    run.green(keep)


def test_execute_wrappers_are_the_tasks_own(run: Runner) -> None:
    seen: dict[str, list[str]] = {"a": [], "b": []}

    def wrapper(name: str) -> Callable[..., Any]:
        def wrapped(execute: Any, sql: str, *args: Any) -> Any:
            seen[name].append(sql)
            return execute(sql, *args)

        return wrapped

    async def one(name: str, mine: asyncio.Event, other: asyncio.Event) -> None:
        with connection.execute_wrapper(wrapper(name)):
            mine.set()
            await other.wait()
            await Author.objects.filter(name=name).acount()
            # Tasks that the observed code starts are observed too.
            await asyncio.gather(Author.objects.filter(name=f"{name} child").acount())

    async def main() -> None:
        first, second = asyncio.Event(), asyncio.Event()
        await asyncio.gather(one("a", first, second), one("b", second, first))

    run(main())
    assert [len(sql) for sql in seen.values()] == [2, 2]
