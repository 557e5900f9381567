"""Async tests see the data of the test's transaction, and everything rolls back."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from django.db import connection, transaction
from django.test import TestCase

from tests.library.models import Tag


class AsyncTestCaseTests(TestCase):
    """Written as Django's documentation shows, unedited."""

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
    """As async test runners do: their loop's context is older than the test's transaction."""
    import contextvars

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
