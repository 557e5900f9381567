"""Tests that async tests see the data of the test's transaction, and that everything rolls back."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.db import close_old_connections, connection, transaction
from django.test import TestCase

from pgbackend import aio
from tests.library.models import Tag


class AsyncTestCaseTests(TestCase):
    """Follows the examples of Django's documentation, unedited."""

    @classmethod
    def setUpTestData(cls) -> None:
        cls.tag = Tag.objects.create(name="made for the class")

    def setUp(self) -> None:
        Tag.objects.create(name="made for the test")

    async def test_an_async_test_sees_its_data(self) -> None:
        assert await Tag.objects.acount() == 2
        await Tag.objects.acreate(name="gone afterwards")
        await asyncio.gather(*(Tag.objects.acreate(name=f"g{n}") for n in range(5)))
        assert await Tag.objects.acount() == 8

    async def test_nothing_is_left_of_the_other_test(self) -> None:
        assert await Tag.objects.acount() == 2

    async def test_the_async_client_sees_its_data(self) -> None:
        response = await self.async_client.get("/library/from-middleware/")
        assert response.content == b"2 tags"

    def test_the_sync_client_sees_its_data(self) -> None:
        assert self.client.get("/library/from-middleware/").content == b"2 tags"

    async def test_on_commit_hooks_are_captured(self) -> None:
        seen: list[str] = []

        async def hook() -> None:
            seen.append(str(await Tag.objects.acount()))

        with self.captureOnCommitCallbacks(execute=False) as callbacks:
            async with transaction.atomic():
                transaction.on_commit(hook)
        assert len(callbacks) == 1 and seen == []

    def test_queries_are_counted(self) -> None:
        with self.assertNumQueries(1):
            Tag.objects.count()

    async def test_queries_of_async_code_are_counted(self) -> None:
        with self.assertNumQueries(2):
            await Tag.objects.acount()
            await asyncio.gather(Tag.objects.acount())

    async def test_a_nested_block_rolls_back(self) -> None:
        try:
            async with transaction.atomic():
                await Tag.objects.acreate(name="lost")
                raise ZeroDivisionError
        except ZeroDivisionError:
            pass
        assert await Tag.objects.acount() == 2


@pytest.mark.django_db
def test_a_loop_that_copied_its_context_early_takes_part(
    request: pytest.FixtureRequest,
) -> None:
    """Copy the context first: the loop of an async test runner is older than the transaction."""

    async def inside() -> int:
        await Tag.objects.acreate(name="inside")
        return await Tag.objects.acount()

    Tag.objects.create(name="outside")
    assert connection.in_atomic_block
    with asyncio.Runner() as runner:
        assert runner.run(inside(), context=contextvars.Context()) == 2
    assert Tag.objects.count() == 2


@pytest.mark.django_db
def test_and_nothing_of_it_is_left() -> None:
    assert Tag.objects.count() == 0


@pytest.mark.django_db
def test_async_view_and_test_share_the_transaction(async_client: Any) -> None:
    Tag.objects.create(name="outside")
    response = asyncio.run(async_client.get("/library/from-middleware/"))
    assert response.content == b"1 tags"


# --- Threads of async code, in contexts that name no transaction ---


@pytest.fixture
def run_apart() -> Iterator[Any]:
    """Run a coroutine on a loop and in a context that know nothing of the test."""
    context = contextvars.Context()
    with asyncio.Runner() as runner:
        yield lambda main: runner.run(main, context=context)


@contextmanager
def a_test() -> Iterator[None]:
    """Open the transaction of a test, as Django opens it."""
    atomic = transaction.atomic()
    atomic._from_testcase = True
    with atomic:
        Tag.objects.create(name="of the test")
        yield
        transaction.set_rollback(True)


@pytest.fixture
def unblocked(django_db_blocker: Any, django_db_setup: None) -> Iterator[None]:
    """Let a test open its own transactions."""
    with django_db_blocker.unblock():
        yield
        connection.close()


@pytest.mark.usefixtures("unblocked")
def test_a_thread_takes_part_in_the_test_of_the_moment(run_apart: Any) -> None:
    """Serve one test after the other, as the loop and context of a test session do."""

    async def inside() -> int:
        await sync_to_async(Tag.objects.create)(name="by a thread")
        return await Tag.objects.acount()

    for _ in range(2):
        with a_test():
            assert run_apart(inside()) == 2


@pytest.mark.usefixtures("unblocked")
def test_a_task_that_outlives_a_test_is_not_in_it(run_apart: Any) -> None:
    """The context of the task names no transaction of a test once the thread has ended."""

    async def lives_on() -> list[int]:
        counts = [await sync_to_async(transaction.atomic(Tag.objects.count))()]
        begun.set()
        await over.wait()
        return [*counts, await Tag.objects.acount()]

    async def start() -> None:
        tasks.append(asyncio.create_task(lives_on()))
        await begun.wait()

    async def end() -> list[int]:
        over.set()
        return await tasks[0]

    begun, over = asyncio.Event(), asyncio.Event()
    tasks: list[asyncio.Task[list[int]]] = []
    with a_test():
        run_apart(start())
    assert run_apart(end()) == [1, 0]


@pytest.mark.django_db
def test_threads_and_tasks_share_the_connection_of_the_test(run_apart: Any) -> None:
    def block(number: int) -> None:
        with transaction.atomic():
            Tag.objects.create(name=f"thread {number}")
            if number % 2:
                transaction.set_rollback(True)

    async def inside() -> int:
        in_thread = sync_to_async(block, thread_sensitive=False)
        await asyncio.gather(
            *(in_thread(number) for number in range(20)),
            *(Tag.objects.acreate(name=f"task {number}") for number in range(20)),
        )
        return await sync_to_async(Tag.objects.count)()

    assert run_apart(inside()) == 30
    assert Tag.objects.count() == 30


def _close() -> None:
    Tag.objects.count()
    close_old_connections()
    connection.close()


@pytest.mark.django_db
@pytest.mark.parametrize("where", ["thread", "green", "other thread"])
def test_who_takes_part_does_not_close_the_connection_of_the_test(
    run_apart: Any, where: str
) -> None:
    """On Django's own backend, a thread that closes its connection never has the test's."""

    async def inside() -> int:
        if where == "green":
            await aio.run(_close)
        else:
            await sync_to_async(_close, thread_sensitive=where == "thread")()
        return await Tag.objects.acount()

    Tag.objects.create(name="outside")
    assert run_apart(inside()) == 1
    assert Tag.objects.count() == 1


@pytest.mark.django_db
def test_what_tidies_up_old_connections_leaves_that_of_a_test() -> None:
    """Close as `database_sync_to_async` does, in the thread of a `TestCase`."""
    Tag.objects.create(name="outside")
    close_old_connections()
    assert Tag.objects.count() == 1
