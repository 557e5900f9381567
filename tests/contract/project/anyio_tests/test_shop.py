"""Tests the shop as anyio's documentation writes tests."""

import anyio
import pytest
from django.db import transaction
from shop.models import Product
from shop.ways import TIDY, WAYS, Consumer, Threaded, all_names, said_by

pytestmark = [pytest.mark.anyio, pytest.mark.django_db]


@pytest.fixture(params=["asyncio", ("asyncio", {"use_uvloop": True})], ids=["asyncio", "uvloop"])
def anyio_backend(request):
    return request.param


@pytest.fixture
async def tea():
    return await Product.objects.acreate(name="tea", stock=3)


@pytest.fixture
def coffee(db):
    return Product.objects.create(name="coffee", stock=1)


@pytest.mark.parametrize("number", range(2))
async def test_the_data_of_sync_and_async_fixtures_is_seen_and_rolled_back(coffee, tea, number):
    assert {p async for p in Product.objects.all()} == {tea, coffee}
    await Product.objects.acreate(name="cocoa")


async def test_a_task_group_takes_part(tea, async_client):
    async def sell():
        assert (await async_client.get("/sell/tea/")).status_code == 200

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(sell)
    await tea.arefresh_from_db()
    assert tea.stock == 0


async def test_a_scope_that_is_cancelled_rolls_back_alone(tea):
    with anyio.CancelScope() as scope:
        async with transaction.atomic():
            await Product.objects.acreate(name="lost")
            scope.cancel()
            await anyio.sleep_forever()
    assert await Product.objects.acount() == 1


@pytest.mark.django_db(transaction=True)
async def test_transactional_tests_commit(async_client):
    await Product.objects.acreate(name="tea", stock=1)
    assert (await async_client.get("/sell/tea/")).json() == {"left": 0}


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
