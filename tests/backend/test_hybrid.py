"""Tests `aio.hybrid_middleware`: sync middleware that is green in an async chain."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured, MiddlewareNotUsed
from django.core.handlers.asgi import ASGIHandler
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.test import Client
from django.utils.deprecation import MiddlewareMixin

import pgbackend
from pgbackend import aio
from tests.conftest import Runner
from tests.library.models import Tag
from tests.support.exchange import Exchange, serve_by

__all__ = ["serve_by"]

HERE = __name__

#: The hooks that ran, and whether on the loop.
seen: list[tuple[str, bool]] = []


def note(name: str) -> None:
    Tag.objects.count()
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        seen.append((name, False))
    else:
        seen.append((name, threading.current_thread() is threading.main_thread()))


class Plain:
    """A middleware with all hooks, as in Django's documentation."""

    def __init__(self, get_response: Any) -> None:
        self.get_response = get_response

    def __call__(self, request: Any) -> Any:
        note("in")
        response = self.get_response(request)
        note("out")
        return response

    def process_view(self, request: Any, *args: Any) -> None:
        note("view")

    def process_template_response(self, request: Any, response: Any) -> Any:
        note("template")
        return response

    def process_exception(self, request: Any, exception: Exception) -> Any:
        note("exception")
        return HttpResponse(f"mended {exception}")


class Mixin(MiddlewareMixin):
    def process_request(self, request: Any) -> None:
        note("in")

    def process_response(self, request: Any, response: Any) -> Any:
        note("out")
        return response


@aio.hybrid_middleware
def function(get_response: Any) -> Any:
    def middleware(request: Any) -> Any:
        note("in")
        response = get_response(request)
        note("out")
        return response

    return middleware


plain = aio.hybrid_middleware(Plain)
mixin = aio.hybrid_middleware(Mixin)


async def view(request: HttpRequest) -> HttpResponse:
    if request.method == "DELETE":
        raise LookupError("this")
    if request.method == "PUT":
        return TemplateResponse(request, "names.html")
    return HttpResponse(f"{await Tag.objects.acount()}")


async def ask(method: str = "GET", application: Any = None) -> Exchange:
    exchange = Exchange(application=application)
    exchange.scope["method"] = method
    await exchange.serve()
    return exchange


@pytest.fixture(autouse=True)
def _project(settings: Any, serve_by: Any) -> None:
    (engine,) = settings.TEMPLATES
    loaders = [("django.template.loaders.locmem.Loader", {"names.html": "names"})]
    options = {**engine.get("OPTIONS", {}), "loaders": loaders}
    settings.TEMPLATES = [{**engine, "APP_DIRS": False, "OPTIONS": options}]
    settings.ALLOWED_HOSTS = ["*"]
    serve_by(view)
    seen.clear()


@pytest.mark.parametrize("name", ["plain", "mixin", "function"])
def test_in_an_async_chain_it_is_green_and_needs_no_thread(
    run: Runner, settings: Any, threads: list[str], name: str
) -> None:
    settings.MIDDLEWARE = [
        "django.middleware.security.SecurityMiddleware",
        f"{HERE}.{name}",
        "django.middleware.common.CommonMiddleware",
    ]

    async def main() -> None:
        assert (await ask()).content == b"0"
        if name == "plain":
            assert (await ask("PUT")).content == b"names"
            assert (await ask("DELETE")).content == b"mended this"

    run(main())
    hooks = ["in", "view", "out", "in", "view", "template", "out", "in", "view", "exception", "out"]
    assert seen == [(hook, True) for hook in (hooks if name == "plain" else ["in", "out"])]
    assert threads == []


@pytest.mark.parametrize("name", ["plain", "mixin", "function"])
def test_in_a_sync_chain_it_is_what_it_was(settings: Any, name: str) -> None:
    settings.MIDDLEWARE = [f"{HERE}.{name}"]
    assert Client().get("/").content == b"0"
    assert {on_loop for _, on_loop in seen} == {False}


def test_in_the_whole_stack_it_is_green_too(run: Runner, settings: Any, threads: list[str]) -> None:
    settings.MIDDLEWARE = [f"{HERE}.plain"]

    async def main() -> None:
        exchange = await ask(application=pgbackend.get_asgi_application())
        assert exchange.content == b"0"

    run(main())
    assert seen == [("in", True), ("view", True), ("out", True)]
    assert threads == []


def test_a_hook_that_is_async_already_stays_so(run: Runner, settings: Any) -> None:
    settings.MIDDLEWARE = [f"{HERE}.async_hook"]

    async def main() -> None:
        assert (await ask()).content == b"0"

    run(main())
    assert seen == [("in", True), ("async view", True), ("out", True)]


class AsyncHook(Plain):
    async def process_view(self, request: Any, *args: Any) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        note("async view")


async_hook = aio.hybrid_middleware(AsyncHook)


@aio.hybrid_middleware
def not_used(get_response: Any) -> Any:
    raise MiddlewareNotUsed


@aio.hybrid_middleware
def forgets(get_response: Any) -> Any:
    return None


def test_a_factory_may_decline_or_forget_as_any_other(run: Runner, settings: Any) -> None:
    settings.MIDDLEWARE = [f"{HERE}.not_used"]

    async def main() -> None:
        assert (await ask()).content == b"0"

    run(main())
    settings.MIDDLEWARE = [f"{HERE}.forgets"]
    with pytest.raises(ImproperlyConfigured, match="returned None"):
        ASGIHandler()


def test_it_looks_like_what_it_wraps() -> None:
    assert (plain.__name__, plain.__wrapped__) == ("Plain", Plain)
    assert plain.__doc__ == Plain.__doc__

    async def get_response(request: Any) -> Any:
        return None

    assert "Plain object" in repr(plain(get_response))
