"""Uses channels: each consumer has its user, in a `threading.local` of django-crum's too."""

import asyncio
import itertools
import json

from tests.packages.project import WHO, rows_of_others, setup

project = setup(
    __name__,
    "channels",
    state="the scope; sync consumers in asgiref's one thread",
    apps=["channels"],
)

import crum  # noqa: E402
from asgiref.sync import async_to_sync, sync_to_async  # noqa: E402
from channels.auth import AuthMiddlewareStack  # noqa: E402
from channels.db import database_sync_to_async  # noqa: E402
from channels.generic.websocket import (  # noqa: E402
    AsyncWebsocketConsumer,
    WebsocketConsumer,
)
from channels.routing import URLRouter  # noqa: E402
from channels.testing import WebsocketCommunicator  # noqa: E402
from django.conf import settings  # noqa: E402
from django.contrib.auth import BACKEND_SESSION_KEY, HASH_SESSION_KEY, SESSION_KEY  # noqa: E402
from django.contrib.auth.models import User  # noqa: E402
from django.contrib.sessions.backends.db import SessionStore  # noqa: E402
from django.db import models  # noqa: E402
from django.urls import path  # noqa: E402


class Note(models.Model):
    owner = models.CharField(max_length=100)
    author = models.CharField(max_length=100)

    def save(self, *args, **kwargs):
        user = crum.get_current_user()
        self.author = user.username if user else "nobody"
        super().save(*args, **kwargs)


COOKIES = {}


def create_rows():
    for who in WHO:
        user = User.objects.get(username=who)
        session = SessionStore()
        session[SESSION_KEY] = str(user.pk)
        session[BACKEND_SESSION_KEY] = settings.AUTHENTICATION_BACKENDS[0]
        session[HASH_SESSION_KEY] = user.get_session_auth_hash()
        session.save()
        COOKIES[who] = f"{settings.SESSION_COOKIE_NAME}={session.session_key}"


def work(who):
    return Note.objects.create(owner=who).author


async def awork(who):
    return (await Note.objects.acreate(owner=who)).author


async def children(who, way):
    if way == "alone":
        return [await awork(who)]
    coroutines = [awork(who), database_sync_to_async(work)(who), awork(who)]
    if way == "gather":
        return [*await asyncio.gather(*coroutines)]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(each) for each in coroutines]
    return [task.result() for task in tasks]


class Async(AsyncWebsocketConsumer):
    async def receive(self, text_data=None, bytes_data=None):
        user = self.scope["user"]
        crum.set_current_user(user)
        seen = await children(user.username, text_data)
        seen.append(await database_sync_to_async(work)(user.username))
        await self.send(json.dumps(seen))


class Sync(WebsocketConsumer):
    def receive(self, text_data=None, bytes_data=None):
        user = self.scope["user"]
        crum.set_current_user(user)
        seen = [work(user.username)]
        seen += async_to_sync(of_threads)(user.username, text_data)
        crum.set_current_user(None)
        self.send(json.dumps(seen))


async def of_threads(who, way):
    """Work as `children()` does, in threads only: on stock, async code does not see the user."""
    number = 1 if way == "alone" else 3
    return await asyncio.gather(*(sync_to_async(work)(who) for _ in range(number)))


class Named:
    """Queries the database in ASGI middleware, inside or outside of channels' own."""

    def __init__(self, application):
        self.application = application

    async def __call__(self, scope, receive, send):
        assert await User.objects.acount() == len(WHO)
        return await self.application(scope, receive, send)


def application_of(middleware):
    routes = URLRouter([path("sync/", Sync.as_asgi()), path("async/", Async.as_asgi())])
    if middleware == "sync":
        return Named(AuthMiddlewareStack(routes))
    return AuthMiddlewareStack(Named(routes))


async def one_cell(middleware, view, way):
    """Open the connections of one cell at once, and let each send one message."""
    application = application_of(middleware)
    users = list(itertools.islice(itertools.cycle(WHO), 20))
    communicators = [
        WebsocketCommunicator(application, f"/{view}/", [(b"cookie", COOKIES[who].encode())])
        for who in users
    ]
    for communicator in communicators:
        assert (await communicator.connect(10))[0]

    async def say(communicator):
        await communicator.send_to(way)
        answer = json.loads(await communicator.receive_from(10))
        await communicator.disconnect()
        return answer

    answers = await asyncio.gather(*map(say, communicators))
    return [
        None if {*answer} == {who} else f"{who} sees {answer}"
        for who, answer in zip(users, answers, strict=True)
    ]


def wrong_rows():
    return rows_of_others(Note)
