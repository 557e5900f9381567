"""Tests C15: state that code keeps by thread, or on the connection, follows the request."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.core.handlers.asgi import ASGIHandler
from django.db import connection, connections
from django.http import HttpRequest, HttpResponse
from django.test import AsyncClient, Client
from django.urls import path
from django.utils.decorators import async_only_middleware, sync_only_middleware

from pgbackend import aio
from tests.conftest import Runner
from tests.library.models import Entry, Tag

local = threading.local()


class Stack(threading.local):
    """Keeps a stack for each thread, as packages do that nest something."""

    depth = 0

    def __init__(self, *first: str, name: str = "") -> None:
        self.items = list(first)
        self.name = name

    def push(self, item: str) -> None:
        self.items.append(item)

    @property
    def top(self) -> str:
        return self.items[-1]


stack = Stack("bottom", name="stack")


class Audited(Tag):
    """Notes what its `save()` has seen below the ORM."""

    class Meta:
        proxy = True
        app_label = "library"

    def save(self, *args: Any, **kwargs: Any) -> None:
        self.seen = seen_here()
        super().save(*args, **kwargs)


#: The two places to keep a value, tried in turns: how to set it, and how to read it.
WAYS: dict[str, tuple[Callable[[str], None], Callable[[], str]]] = {
    "local": (
        lambda user: setattr(local, "user", user),
        lambda: getattr(local, "user", "nobody"),
    ),
    "connection": (
        lambda user: setattr(connection, "user", user),
        lambda: getattr(connection, "user", "nobody"),
    ),
}
_way = "local"


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Keep a request's value in one of the two places."""
    global _way  # noqa: PLW0603 - the middleware, which Django makes, looks at it
    _way = request.param
    yield _way
    for each in connections.all(initialized_only=True):
        assert "user" not in each._attributes, "code outside of requests has set nothing"
    assert not vars(local), "nor has this thread"


def set_here(user: str) -> None:
    WAYS[_way][0](user)


def seen_here() -> str:
    return WAYS[_way][1]()


@sync_only_middleware
def sets_in_a_thread(get_response: Any) -> Any:
    def middleware(request: HttpRequest) -> HttpResponse:
        assert seen_here() == "nobody", "a request begins without what others have set"
        set_here(request.headers["user"])
        response = get_response(request)
        response["after"] = seen_here()
        return response

    return middleware


@async_only_middleware
def sets_on_the_loop(get_response: Any) -> Any:
    async def middleware(request: HttpRequest) -> HttpResponse:
        assert seen_here() == "nobody", "a request begins without what others have set"
        set_here(request.headers["user"])
        response = await get_response(request)
        response["after"] = seen_here()
        return response

    return middleware


async def async_view(request: HttpRequest) -> HttpResponse:
    tag = Audited(name=f"of {seen_here()}")
    await tag.asave()
    in_a_thread = await sync_to_async(seen_here)()
    green = await aio.run(seen_here)
    return HttpResponse(f"{seen_here()} {tag.seen} {in_a_thread} {green}")


async def view_with_tasks(request: HttpRequest) -> HttpResponse:
    tags = [Audited(name=f"{number} of {seen_here()}") for number in range(2)]
    await asyncio.gather(*[tag.asave() for tag in tags])
    async with asyncio.TaskGroup() as group:
        task = group.create_task(aio.run(seen_here))
    in_a_thread = await asyncio.gather(sync_to_async(seen_here)())
    return HttpResponse(f"{tags[0].seen} {tags[1].seen} {task.result()} {in_a_thread[0]}")


def sync_view(request: HttpRequest) -> HttpResponse:
    async def on_a_loop() -> str:
        await Tag.objects.acount()
        return seen_here()

    tag = Audited(name=f"of {seen_here()}")
    tag.save()
    back = async_to_sync(on_a_loop)()
    return HttpResponse(f"{seen_here()} {tag.seen} {back} {back}")


async def setting_view(request: HttpRequest) -> HttpResponse:
    set_here("the view")
    return HttpResponse(" ".join(["x"] * 4))


class urls:  # noqa: N801 - a module
    urlpatterns = [
        path("async", async_view),
        path("tasks", view_with_tasks),
        path("sync", sync_view),
        path("sets", setting_view),
    ]


def client_of_a_new_handler() -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(ASGIHandler()), base_url="http://site")


@pytest.fixture(params=["sets_in_a_thread", "sets_on_the_loop"])
def site(request: pytest.FixtureRequest, settings: Any) -> None:
    """Serve the views, with one middleware that sets the request's value."""
    settings.ROOT_URLCONF = urls
    settings.MIDDLEWARE = [f"{__name__}.{request.param}"]


# --- Requests -------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", ["async", "tasks", "sync"])
def test_what_middleware_sets_is_seen_by_all_of_its_request_and_by_no_other(
    run: Runner, way: str, site: None, view: str
) -> None:
    names = ["ann", "bob", "eve"] * 7

    async def main() -> None:
        async with client_of_a_new_handler() as client:
            users = [f"{name}{number}" for number, name in enumerate(names)]
            answers = await asyncio.gather(*[_answer(client, view, user) for user in users])
        for user, answer in zip(users, answers, strict=True):
            assert answer == (f"{user} {user} {user} {user}", user)

    run(main())


async def _answer(client: httpx.AsyncClient, view: str, user: str) -> tuple[str, str]:
    response = await client.get(f"/{view}", headers={"user": user})
    assert response.status_code == 200
    return response.text, response.headers["after"]


def test_what_the_view_sets_is_seen_by_the_middleware_around_it(
    run: Runner, way: str, site: None
) -> None:
    async def main() -> None:
        async with client_of_a_new_handler() as client:
            for _ in range(2):
                assert (await _answer(client, "sets", "ann"))[1] == "the view"
        assert seen_here() == "nobody", "nor has the task that the requests were made in"

    run(main())


def test_what_a_request_of_djangos_async_client_sets_is_not_the_tests(
    run: Runner, way: str, site: None
) -> None:
    async def main() -> None:
        set_here("the test")
        for user in ("ann", "bob"):
            response = await AsyncClient().get("/async", headers={"user": user})
            assert response.content.decode() == f"{user} {user} {user} {user}"
            assert seen_here() == "the test"

    run(main())


@pytest.mark.parametrize("view", ["async", "tasks"])
def test_under_wsgi_a_view_on_a_loop_sees_what_its_thread_has_set(
    way: str, settings: Any, view: str
) -> None:
    settings.ROOT_URLCONF = urls
    settings.MIDDLEWARE = [f"{__name__}.sets_in_a_thread"]
    try:
        response = Client().get(f"/{view}", headers={"user": "ann"})
        assert response.content.decode() == "ann ann ann ann"
        assert seen_here() == "ann", "the thread's, as with Django's own backend"
    finally:
        _forget_in_this_thread()


def test_under_wsgi_what_such_a_view_sets_is_the_threads(way: str, settings: Any) -> None:
    settings.ROOT_URLCONF = urls
    settings.MIDDLEWARE = [f"{__name__}.sets_in_a_thread"]
    try:
        assert Client().get("/sets", headers={"user": "ann"})["after"] == "the view"
        assert seen_here() == "the view"
    finally:
        _forget_in_this_thread()


def _forget_in_this_thread() -> None:
    vars(local).clear()
    for each in connections.all(initialized_only=True):
        each.__dict__.pop("_attributes", None)


# --- Tasks ----------------------------------------------------------------------------------------


def test_what_a_task_sets_is_seen_by_it_and_by_those_that_it_starts_afterwards(
    run: Runner, way: str, site: None
) -> None:
    async def main() -> None:
        set_here("parent")
        may_look = asyncio.Event()

        async def looks() -> str:
            await may_look.wait()
            return seen_here()

        async def sets(user: str) -> list[str]:
            before = asyncio.create_task(looks())
            set_here(user)
            after = asyncio.create_task(looks())
            await asyncio.sleep(0)
            in_a_thread = await sync_to_async(seen_here)()
            return [seen_here(), in_a_thread, await before, await after]

        tasks = [asyncio.create_task(sets(user)) for user in ("ann", "bob")]
        await asyncio.sleep(0)
        set_here("changed")
        may_look.set()
        for user, seen in zip(("ann", "bob"), await asyncio.gather(*tasks), strict=True):
            assert seen == [user, user, "parent", user]
        assert seen_here() == "changed"

    run(main())


def test_what_a_thread_of_a_task_sets_is_the_tasks(run: Runner, way: str, site: None) -> None:
    async def main() -> None:
        await sync_to_async(set_here)("by a thread")
        assert seen_here() == "by a thread"
        assert await sync_to_async(seen_here)() == "by a thread"
        assert await asyncio.create_task(_seen()) == "by a thread"

    async def _seen() -> str:
        return seen_here()

    run(main())


def test_lists_that_code_appends_to_are_each_tasks_own(run: Runner, site: None) -> None:
    ASGIHandler()  # looks at this module
    outside = stack.items

    async def main() -> None:
        await Tag.objects.acount()  # from here on tasks of this loop are made by pgbackend
        assert (stack.items, stack.name, stack.depth) == (["bottom"], "stack", 0)
        stack.push("parent")

        async def pushes(item: str) -> list[str]:
            stack.push(item)
            await Tag.objects.acount()
            await sync_to_async(stack.push)(f"{item} in a thread")
            assert stack.top == f"{item} in a thread"
            return stack.items

        children = [asyncio.create_task(pushes(item)) for item in ("ann", "bob")]
        stack.push("later")
        assert await asyncio.gather(*children) == [
            ["bottom", "parent", item, f"{item} in a thread"] for item in ("ann", "bob")
        ]
        assert stack.items == ["bottom", "parent", "later"]

    run(main())
    assert stack.items is outside
    assert outside == ["bottom"]


def test_lists_within_dictionaries_are_each_tasks_own_too(run: Runner, site: None) -> None:
    ASGIHandler()

    async def main() -> None:
        await Tag.objects.acount()
        shared = object()
        local.kept = {"a list": [1, {2}], "an object": shared}
        local.kept["itself"] = local.kept

        async def changes() -> None:
            local.kept["a list"].append(3)
            local.kept["a list"][1].add(4)
            assert local.kept["itself"] is local.kept
            assert local.kept["an object"] is shared

        await asyncio.create_task(changes())
        assert local.kept["a list"] == [1, {2}]

    run(main())


def test_what_is_bound_to_a_thread_stays_with_it(run: Runner, site: None) -> None:
    ASGIHandler()

    def query() -> int:
        if not hasattr(local, "database"):
            local.database = sqlite3.connect(":memory:")
        (one,) = local.database.execute("SELECT 1").fetchone()
        return int(one)

    def close() -> None:
        local.database.close()
        del local.database

    async def main() -> None:
        assert query() == 1
        mine = local.database
        assert await sync_to_async(query)() == 1
        assert local.database is mine
        assert await sync_to_async(lambda: local.database is mine)() is False
        del local.database
        assert not hasattr(local, "database")
        mine.close()
        await sync_to_async(close)()

    run(main())


def test_statements_are_wrapped_for_the_view_and_its_tasks(run: Runner, settings: Any) -> None:
    settings.ROOT_URLCONF = urls
    settings.MIDDLEWARE = [f"{__name__}.wraps_statements"]

    async def main() -> None:
        async with client_of_a_new_handler() as client:
            for view in ("async", "tasks", "sync"):
                wrapped.clear()
                response = await client.get(f"/{view}", headers={"user": "ann"})
                assert response.status_code == 200
                inserted = sum(sql.startswith("INSERT") for sql in wrapped)
                assert inserted == (2 if view == "tasks" else 1), view
                await Tag.objects.all().adelete()
            wrapped.clear()
            await Tag.objects.acount()
            assert not wrapped, "the next has none"

    run(main())


wrapped: list[str] = []


def note_statement(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
    wrapped.append(sql)
    return execute(sql, params, many, context)


@sync_only_middleware
def wraps_statements(get_response: Any) -> Any:
    def middleware(request: HttpRequest) -> HttpResponse:
        with connection.execute_wrapper(note_statement):
            response: HttpResponse = get_response(request)
        return response

    return middleware


# --- Wrappers that packages derive ----------------------------------------------------------------


def test_attributes_can_be_deleted_and_methods_be_replaced(run: Runner, site: None) -> None:
    async def main() -> None:
        connection.user = "ann"
        assert connections["default"].user == "ann"

        async def child() -> None:
            del connection.user
            assert not hasattr(connection, "user")

        await asyncio.create_task(child())
        assert connection.user == "ann"
        del connection.user
        with pytest.raises(AttributeError, match="has no attribute 'user'"):
            connection.user
        with pytest.raises(AttributeError, match="has no attribute 'user'"):
            del connection.user

    def green() -> None:
        wrapper = connections["default"]
        wrapper.queries_limit = 5
        assert "queries_limit" in vars(wrapper), "Django's own attributes are the wrapper's"
        wrapper.cursor = wrapper.cursor
        assert "cursor" in vars(wrapper), "a method that a tool has replaced is that object's"
        assert Entry.objects.count() == 0

    run(main())
    run.green(green)
