"""Lists the ways by which a project's code comes to its database, below an async test.

Each function takes the name of a product, adds the product, and returns the names of all products.
"""

import asyncio

from asgiref.sync import async_to_sync, sync_to_async
from asgiref.testing import ApplicationCommunicator
from channels.db import database_sync_to_async
from channels.generic.websocket import AsyncJsonWebsocketConsumer, JsonWebsocketConsumer
from channels.testing import WebsocketCommunicator
from django.core.asgi import get_asgi_application
from django.db import close_old_connections, connection, transaction
from django.test import AsyncClient, Client

from .models import Product


def add(name):
    Product.objects.create(name=name)
    return sorted(Product.objects.values_list("name", flat=True))


async def aadd(name):
    await Product.objects.acreate(name=name)
    return sorted([name async for name in Product.objects.values_list("name", flat=True)])


@transaction.atomic
def add_in_block(name):
    return add(name)


def add_and_close(name):
    """Add a product and close, as code does that knows its thread is not its caller's."""
    try:
        return add(name)
    finally:
        close_old_connections()
        connection.close()


def there_and_back(name):
    return async_to_sync(sync_to_async(add))(name)


# --- Hops: from async code, to a thread or not ---

HOPS = {
    "a-method": aadd,
    "sync_to_async": sync_to_async(add),
    "sync_to_async, not sensitive": sync_to_async(add, thread_sensitive=False),
    "a block in a thread": sync_to_async(add_in_block),
    "a thread that closes": sync_to_async(add_and_close, thread_sensitive=False),
    "database_sync_to_async, not sensitive": database_sync_to_async(add, thread_sensitive=False),
    "a thread and back": sync_to_async(there_and_back),
    "an a-method from a thread": sync_to_async(async_to_sync(aadd)),
}


# --- Places: where async code runs, below a test ---


async def in_test(hop, name):
    return await HOPS[hop](name)


async def in_task(hop, name):
    return await asyncio.create_task(HOPS[hop](name))


async def in_application(hop, name):
    """Add in an ASGI application, which asgiref runs in a context of its own, an empty one."""

    async def application(scope, receive, send):
        message = await receive()
        await send({"names": await HOPS[message["hop"]](message["name"])})

    communicator = ApplicationCommunicator(application, {"type": "shop"})
    await communicator.send_input({"hop": hop, "name": name})
    answer = await communicator.receive_output(10)
    await communicator.wait(10)
    return answer["names"]


class Consumer(AsyncJsonWebsocketConsumer):
    async def receive_json(self, content):
        await self.send_json(await HOPS[content["hop"]](content["name"]))


async def in_consumer(hop, name):
    return (await said_by(Consumer, {"hop": hop, "name": name}))[0]


PLACES = {
    "test": in_test,
    "task": in_task,
    "application": in_application,
    "consumer": in_consumer,
}


# --- Other ways, which choose their own hop ---


async def said_by(consumer, *messages):
    """Return a consumer's answers to messages; it tidies up connections before each, and last."""
    socket = WebsocketCommunicator(consumer.as_asgi(), "/")
    assert (await socket.connect())[0]
    answers = []
    for message in messages:
        await socket.send_json_to(message)
        answers.append(await socket.receive_json_from(10))
    await socket.disconnect()
    return answers


class InPlace(AsyncJsonWebsocketConsumer):
    """Runs sync code in an async consumer."""

    async def receive_json(self, content):
        await self.send_json(add(content["name"]))


class Threaded(AsyncJsonWebsocketConsumer):
    async def receive_json(self, content):
        await self.send_json(await database_sync_to_async(add)(content["name"]))


class Sync(JsonWebsocketConsumer):
    def receive_json(self, content):
        self.send_json(add(content["name"]))


async def by_client(name):
    return (await AsyncClient().get(f"/add/{name}/")).json()["names"]


async def by_client_to_a_sync_view(name):
    return (await AsyncClient().get(f"/add/sync/{name}/")).json()["names"]


async def by_sync_client_in_a_thread(name):
    return (await sync_to_async(Client().get)(f"/add/sync/{name}/")).json()["names"]


async def by_django_as_a_server_calls_it(name):
    """Add by a request without a client, so that Django closes old connections before and after."""
    path = f"/add/sync/{name}/"
    scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "query_string": b"",
        "headers": [(b"host", b"localhost")],
    }
    communicator = ApplicationCommunicator(get_asgi_application(), scope)
    await communicator.send_input({"type": "http.request"})
    assert (await communicator.receive_output(10))["status"] == 200
    await communicator.receive_output(10)
    await communicator.wait(10)
    return await all_names()


async def all_names():
    return sorted([name async for name in Product.objects.values_list("name", flat=True)])


OTHERS = {
    "a consumer, in place": InPlace,
    "a consumer, in a thread": Threaded,
    "a sync consumer": Sync,
    "AsyncClient, async view": by_client,
    "AsyncClient, sync view": by_client_to_a_sync_view,
    "Client in a thread": by_sync_client_in_a_thread,
    "Django, as a server calls it": by_django_as_a_server_calls_it,
}


async def by_other(other, name):
    way = OTHERS[other]
    if isinstance(way, type):
        return (await said_by(way, {"name": name}))[0]
    return await way(name)


#: Each way by its name.
WAYS = {
    **{
        f"{place}: {hop}": (lambda name, run=run, hop=hop: run(hop, name))
        for place, run in PLACES.items()
        for hop in HOPS
    },
    **{other: (lambda name, other=other: by_other(other, name)) for other in OTHERS},
}

#: The ways that leave no connection open in a thread: for tests that have no transaction.
TIDY = [
    *(f"{place}: {hop}" for place in PLACES for hop in ("a-method", "a thread that closes")),
    *("a consumer, in place", "a consumer, in a thread", "a sync consumer"),
    *("AsyncClient, async view", "Django, as a server calls it"),
]
