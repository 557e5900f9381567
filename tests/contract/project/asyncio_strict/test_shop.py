"""Tests the shop as pytest-asyncio's documentation writes tests in its strict mode."""

import pytest
import pytest_asyncio
from shop.models import Product
from shop.ways import WAYS, all_names


@pytest_asyncio.fixture
async def tea(db):
    return await Product.objects.acreate(name="tea", stock=3)


@pytest_asyncio.fixture(loop_scope="session", scope="session")
async def nothing():
    return None


@pytest.mark.asyncio
@pytest.mark.parametrize("number", range(2))
async def test_the_data_of_a_fixture_is_seen_and_rolled_back(tea, async_client, number):
    assert (await async_client.get("/sell/tea/")).json() == {"left": 2}
    await Product.objects.acreate(name="coffee")
    assert await Product.objects.acount() == 2


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.django_db
@pytest.mark.parametrize("number", range(2))
async def test_tests_on_the_loop_of_the_session(nothing, number):
    assert not await Product.objects.aexists()
    await Product.objects.acreate(name="coffee")


@pytest.mark.asyncio
async def test_transactional_tests_commit(transactional_db, async_client):
    await Product.objects.acreate(name="tea", stock=1)
    assert (await async_client.get("/sell/tea/")).json() == {"left": 0}


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.django_db
@pytest.mark.parametrize("way", WAYS)
async def test_whatever_the_way_on_the_loop_of_the_session(nothing, way):
    await Product.objects.acreate(name="tea")
    assert await WAYS[way]("cocoa") == ["cocoa", "tea"]
    assert await all_names() == ["cocoa", "tea"]
