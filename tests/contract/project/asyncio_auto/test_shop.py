"""Tests the shop as pytest-asyncio's documentation writes tests in its auto mode."""

import asyncio

import pytest
from django.db import transaction
from shop.models import Product, Sale
from shop.ways import TIDY, WAYS, Consumer, Threaded, all_names, said_by

pytestmark = pytest.mark.django_db


@pytest.fixture
async def tea():
    return await Product.objects.acreate(name="tea", stock=3)


@pytest.fixture
def coffee(db):
    return Product.objects.create(name="coffee", stock=1)


@pytest.mark.parametrize("number", range(3))
async def test_the_data_of_sync_and_async_fixtures_is_seen_and_rolled_back(coffee, tea, number):
    assert {p async for p in Product.objects.all()} == {tea, coffee}
    await Product.objects.acreate(name="cocoa")


async def test_the_async_client(tea, async_client):
    assert (await async_client.get("/sell/tea/")).json() == {"left": 2}
    await tea.arefresh_from_db()
    assert (tea.stock, await Sale.objects.acount()) == (2, 1)


async def test_tasks_take_part(tea):
    async with asyncio.TaskGroup() as group:
        for number in range(5):
            group.create_task(Product.objects.acreate(name=str(number)))
    assert await Product.objects.acount() == 6


async def test_an_atomic_block_rolls_back_alone(tea):
    with pytest.raises(ZeroDivisionError):
        async with transaction.atomic():
            await Product.objects.acreate(name="lost")
            raise ZeroDivisionError
    assert await Product.objects.acount() == 1


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("number", range(2))
async def test_transactional_tests_commit(async_client, number):
    await Product.objects.acreate(name="tea", stock=1)
    await async_client.get("/sell/tea/")
    assert await Sale.objects.acount() == 1


def test_a_sync_test_sees_nothing_of_the_others():
    assert not Product.objects.exists()


@pytest.mark.asyncio(loop_scope="module")
class TestOneLoop:
    async def test_a_loop_may_serve_many_tests(self, tea):
        assert await Product.objects.aget() == tea

    async def test_and_none_sees_what_another_wrote(self):
        assert not await Product.objects.aexists()

    @pytest.mark.django_db(transaction=True)
    async def test_nor_do_transactional_ones(self):
        assert not await Product.objects.aexists()
        await Product.objects.acreate(name="tea")

    async def test_which_leave_nothing(self):
        assert not await Product.objects.aexists()


@pytest.mark.parametrize("way", WAYS)
async def test_whatever_the_way_to_the_database_the_test_is_seen_and_rolled_back(coffee, tea, way):
    assert await WAYS[way]("cocoa") == ["cocoa", "coffee", "tea"]
    assert await all_names() == ["cocoa", "coffee", "tea"]


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("way", TIDY)
async def test_whatever_the_way_in_a_transactional_test(way):
    await Product.objects.acreate(name="tea")
    assert await WAYS[way]("cocoa") == ["cocoa", "tea"]
    assert await all_names() == ["cocoa", "tea"]


async def test_a_consumer_hears_many_messages(tea):
    messages = [{"hop": "sync_to_async", "name": name} for name in ("a", "b", "c")]
    assert await said_by(Consumer, *messages) == [
        ["a", "tea"],
        ["a", "b", "tea"],
        ["a", "b", "c", "tea"],
    ]
    assert await said_by(Threaded, {"name": "d"}) == [["a", "b", "c", "d", "tea"]]
    assert await all_names() == ["a", "b", "c", "d", "tea"]
