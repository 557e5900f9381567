"""Tests the shop as Django's documentation writes tests, for `manage.py test`."""

import asyncio
from urllib.request import urlopen

from django.contrib.auth.models import User
from django.db import connection, transaction
from django.test import (
    AsyncClient,
    LiveServerTestCase,
    SimpleTestCase,
    TestCase,
    TransactionTestCase,
)
from shop.models import Product, Sale
from shop.views import told
from shop.ways import TIDY, WAYS, Threaded, all_names, said_by


class ProductTests(TestCase):
    @classmethod
    def setUpTestData(cls):
        cls.tea = Product.objects.create(name="tea", stock=3)
        cls.user = User.objects.create_user("ada", password="secret")

    def setUp(self):
        Product.objects.create(name="coffee", stock=1)
        told.clear()

    async def test_async_code_sees_the_data_of_class_and_test(self):
        self.assertEqual(await Product.objects.acount(), 2)
        self.assertEqual(
            [p.name async for p in Product.objects.order_by("name")], ["coffee", "tea"]
        )

    async def test_what_a_test_writes_is_its_own(self):
        await Product.objects.acreate(name="cocoa")
        self.assertEqual(await Product.objects.acount(), 3)

    def test_what_another_test_wrote_is_gone(self):
        self.assertEqual(Product.objects.count(), 2)
        Product.objects.create(name="cocoa")

    async def test_the_class_data_of_each_test_is_fresh(self):
        self.assertEqual(self.tea.stock, 3)
        self.tea.stock = 0
        await self.tea.asave()

    async def test_the_async_client(self):
        answer = await self.async_client.get("/sell/tea/")
        self.assertEqual(answer.json(), {"left": 2})
        await self.tea.arefresh_from_db()
        self.assertEqual(self.tea.stock, 2)
        self.assertEqual((await AsyncClient().get("/sell/milk/")).status_code, 404)

    def test_the_sync_client_of_an_async_view(self):
        self.assertEqual(self.client.get("/sell/tea/").json(), {"left": 2})
        self.assertEqual(self.client.get("/products/").json(), {"tea": 2, "coffee": 1})

    async def test_the_async_client_of_a_sync_view(self):
        answer = await self.async_client.get("/products/sync/")
        self.assertEqual(answer.json(), {"products": 2})

    async def test_signing_in(self):
        self.assertEqual((await self.async_client.get("/account/")).status_code, 302)
        await self.async_client.aforce_login(self.user)
        self.assertEqual((await self.async_client.get("/account/")).content, b"ada")
        await self.async_client.alogout()
        self.assertTrue(await self.async_client.alogin(username="ada", password="secret"))

    def test_hooks_are_captured(self):
        with self.captureOnCommitCallbacks(execute=True) as callbacks:
            self.client.get("/sell/tea/")
        self.assertEqual(len(callbacks), 1)
        self.assertEqual(told, list(Sale.objects.values_list("pk", flat=True)))

    async def test_hooks_of_async_code_are_captured(self):
        with self.captureOnCommitCallbacks() as callbacks:
            await self.async_client.get("/sell/tea/")
        self.assertEqual((len(callbacks), told), (1, []))

    def test_queries_are_counted(self):
        with self.assertNumQueries(1):
            self.client.get("/products/")

    async def test_queries_of_async_code_are_counted(self):
        with self.assertNumQueries(2):
            await Product.objects.acount()
            await self.tea.arefresh_from_db()

    async def test_queries_of_the_async_client_are_counted(self):
        with self.assertNumQueries(1):
            await self.async_client.get("/products/")

    async def test_an_atomic_block_rolls_back_alone(self):
        with self.assertRaises(ZeroDivisionError):
            async with transaction.atomic():
                await Product.objects.acreate(name="lost")
                raise ZeroDivisionError
        self.assertEqual(await Product.objects.acount(), 2)

    async def test_tasks_share_the_data_of_the_test(self):
        counts = await asyncio.gather(*(Product.objects.acount() for _ in range(5)))
        self.assertEqual(counts, [2] * 5)

    async def test_whatever_the_way_to_the_database_the_test_is_seen(self):
        names = ["coffee", "tea"]
        for way, add in WAYS.items():
            with self.subTest(way):
                names.append(way.replace("/", " "))
                self.assertEqual(await add(names[-1]), sorted(names))
                self.assertEqual(await all_names(), sorted(names))

    async def test_a_consumer_hears_many_messages(self):
        messages = [{"name": name} for name in ("a", "b", "c")]
        self.assertEqual((await said_by(Threaded, *messages))[-1], ["a", "b", "c", "coffee", "tea"])
        self.assertEqual(await all_names(), ["a", "b", "c", "coffee", "tea"])


class CommittingTests(TransactionTestCase):
    reset_sequences = True

    async def test_hooks_run(self):
        told.clear()
        tea = await Product.objects.acreate(name="tea", stock=2)
        self.assertEqual(tea.pk, 1)
        await self.async_client.get("/sell/tea/")
        self.assertEqual(told, [(await Sale.objects.aget()).pk])

    def test_the_tables_are_empty_again(self):
        self.assertFalse(Product.objects.exists())
        self.assertEqual(Product.objects.create(name="tea").pk, 1)

    async def test_tasks_of_a_test_commit_apart(self):
        await asyncio.gather(*(Product.objects.acreate(name=str(n)) for n in range(10)))
        self.assertEqual(await Product.objects.acount(), 10)

    async def test_whatever_the_way_what_is_written_is_committed(self):
        names = []
        for way in TIDY:
            with self.subTest(way):
                names.append(way)
                self.assertEqual(await WAYS[way](way), sorted(names))
                self.assertEqual(await all_names(), sorted(names))


class LiveTests(LiveServerTestCase):
    def test_the_live_server_sees_the_data(self):
        Product.objects.create(name="tea", stock=1)
        with urlopen(f"{self.live_server_url}/products/") as answer:
            self.assertEqual(answer.read(), b'{"tea": 1}')

    def test_what_the_live_server_writes_is_seen(self):
        Product.objects.create(name="tea", stock=1)
        with urlopen(f"{self.live_server_url}/sell/tea/"):
            self.assertEqual(Product.objects.get().stock, 0)


class SimpleTests(SimpleTestCase):
    def test_the_database_is_out_of_reach(self):
        with self.assertRaises(AssertionError):
            Product.objects.count()

    async def test_the_database_is_out_of_reach_of_async_code(self):
        with self.assertRaises(AssertionError):
            await Product.objects.acount()


class RequiringTests(TestCase):
    databases = {"default"}

    def test_the_engine_is_the_one_that_is_set(self):
        self.assertEqual(connection.settings_dict["ENGINE"], "pgbackend")
