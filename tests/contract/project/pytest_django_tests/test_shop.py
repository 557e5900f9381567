"""Tests the shop as pytest-django's documentation writes tests."""

import asyncio
from urllib.request import urlopen

import pytest
from asgiref.sync import async_to_sync
from django.test import TestCase
from shop.models import Product, Sale
from shop.views import told


@pytest.fixture
def tea(db):
    return Product.objects.create(name="tea", stock=3)


@pytest.mark.parametrize("number", range(2))
def test_the_data_of_a_fixture_is_seen_and_rolled_back(tea, number):
    assert Product.objects.get() == tea
    Product.objects.create(name="coffee")


@pytest.mark.parametrize("number", range(2))
def test_async_code_sees_it(tea, async_client, number):
    answer = async_to_sync(async_client.get)("/sell/tea/")
    assert answer.json() == {"left": 2}
    assert Sale.objects.count() == 1
    assert asyncio.run(Product.objects.acount()) == 1
    asyncio.run(Product.objects.acreate(name="coffee"))
    assert Product.objects.count() == 2


@pytest.fixture(scope="module")
def runner():
    with asyncio.Runner() as runner:
        runner.get_loop()  # the loop copies its context now, before any test
        yield runner


@pytest.mark.parametrize("number", range(2))
def test_a_loop_of_the_module_sees_it(runner, tea, number):
    assert runner.run(Product.objects.acount()) == 1
    runner.run(Product.objects.acreate(name="coffee"))
    assert Product.objects.count() == 2


def test_the_sync_client(tea, client):
    assert client.get("/sell/tea/").json() == {"left": 2}
    assert client.get("/products/sync/").json() == {"products": 1}


def test_queries_are_counted(tea, client, django_assert_num_queries):
    with django_assert_num_queries(1):
        client.get("/products/")
    with django_assert_num_queries(1):
        asyncio.run(Product.objects.acount())


def test_hooks_are_captured(tea, client, django_capture_on_commit_callbacks):
    told.clear()
    with django_capture_on_commit_callbacks(execute=True) as callbacks:
        client.get("/sell/tea/")
    assert len(callbacks) == len(told) == 1


@pytest.mark.parametrize("number", range(2))
@pytest.mark.django_db(transaction=True, reset_sequences=True)
def test_transactional_tests_commit_and_start_empty(async_client, number):
    told.clear()
    assert Product.objects.create(name="tea", stock=1).pk == 1
    async_to_sync(async_client.get)("/sell/tea/")
    assert told == [Sale.objects.get().pk]


def test_the_live_server(live_server, transactional_db):
    Product.objects.create(name="tea", stock=1)
    with urlopen(f"{live_server.url}/sell/tea/") as answer:
        assert answer.read() == b'{"left": 0}'
    assert Product.objects.get().stock == 0


def test_without_db_the_database_is_out_of_reach():
    with pytest.raises(RuntimeError, match="Database access not allowed"):
        Product.objects.count()
    with pytest.raises(RuntimeError, match="Database access not allowed"):
        asyncio.run(Product.objects.acount())


def test_the_database_can_be_unblocked(django_db_blocker, django_db_setup):
    with django_db_blocker.unblock():
        assert Product.objects.count() == 0


class TestCaseTests(TestCase):
    @classmethod
    def setUpTestData(cls):
        Product.objects.create(name="tea")

    async def test_async_code_sees_the_data_of_the_class(self):
        assert await Product.objects.acount() == 1

    async def test_what_a_test_writes_is_rolled_back(self):
        await Product.objects.acreate(name="coffee")
        assert await Product.objects.acount() == 2
