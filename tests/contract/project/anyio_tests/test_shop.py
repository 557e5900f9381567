"""As anyio's documentation writes them."""

import anyio
import pytest
from django.db import transaction
from shop.models import Product

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
