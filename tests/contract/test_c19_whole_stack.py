"""Tests C19: the whole stack green: sync middleware and views run on the loop, in no thread."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.contrib.auth import authenticate, get_user_model
from django.core.exceptions import (
    BadRequest,
    ImproperlyConfigured,
    PermissionDenied,
    SuspiciousOperation,
    SynchronousOnlyOperation,
)
from django.core.handlers.asgi import ASGIHandler
from django.core.signals import got_request_exception, request_finished, request_started
from django.db import connection, connections, transaction
from django.http import Http404, HttpRequest, HttpResponse, JsonResponse
from django.template.response import TemplateResponse
from django.urls import path, reverse
from django.utils.decorators import async_only_middleware
from django.utils.deprecation import MiddlewareMixin

import pgbackend
from tests.conftest import Runner
from tests.library.models import Author, Entry, Tag
from tests.support.exchange import Exchange

HERE = __name__

#: The names of the pieces of the project's code that ran, and whether each was green on the loop.
seen: list[tuple[str, bool]] = []


def note(name: str) -> None:
    """Note that the code `name` runs; a statement tells that it may wait."""
    Tag.objects.count()
    here = threading.current_thread() is threading.main_thread()
    seen.append((name, here and asyncio.current_task() is not None))


def function(get_response: Any) -> Any:
    def middleware(request: Any) -> Any:
        note("function in")
        response = get_response(request)
        note("function out")
        return response

    return middleware


class Mixin(MiddlewareMixin):
    def process_request(self, request: Any) -> None:
        note("mixin in")

    def process_view(self, request: Any, *args: Any) -> None:
        note("mixin view")

    def process_template_response(self, request: Any, response: Any) -> Any:
        note("mixin template")
        return response

    def process_exception(self, request: Any, exception: Exception) -> Any:
        note("mixin exception")
        return HttpResponse("mended") if isinstance(exception, LookupError) else None

    def process_response(self, request: Any, response: Any) -> Any:
        note("mixin out")
        return response


@async_only_middleware
def async_only(get_response: Any) -> Any:
    async def middleware(request: Any) -> Any:
        note("async in")
        await asyncio.sleep(0)
        response = await get_response(request)
        note("async out")
        return response

    return middleware


KINDS = {
    "django": "django.middleware.security.SecurityMiddleware",
    "function": f"{HERE}.function",
    "mixin": f"{HERE}.Mixin",
    "async": f"{HERE}.async_only",
}


def answer(request: HttpRequest) -> Any:
    note("view")
    if request.path == "/template/":
        return TemplateResponse(request, "names.html")
    if request.path == "/mended/":
        raise KeyError
    if request.path == "/broken/":
        raise ValueError("of the view")
    return HttpResponse("answered")


def sync_view(request: HttpRequest) -> Any:
    return answer(request)


async def async_view(request: HttpRequest) -> Any:
    await asyncio.sleep(0)
    return answer(request)


class Urls:
    """Stands for the module of a project's URLs."""

    def __init__(self, view: Any, **views: Any) -> None:
        paths = ("", "template/", "mended/", "broken/")
        self.urlpatterns = [path(each, view) for each in paths]
        self.urlpatterns += [path(f"{name}/", each, name=name) for name, each in views.items()]


Ask = Callable[..., Exchange]


@pytest.fixture
def ask(settings: Any, run: Runner) -> Iterator[Ask]:
    """Return a function that asks for one page, which `view` answers, from the whole stack."""
    names = dict.fromkeys(("names.html", "404.html", "500.html"), "")
    (engine,) = settings.TEMPLATES
    loaders = [("django.template.loaders.locmem.Loader", names)]
    options = {**engine.get("OPTIONS", {}), "loaders": loaders}
    settings.TEMPLATES = [{**engine, "APP_DIRS": False, "OPTIONS": options}]
    settings.MIDDLEWARE = []
    settings.ALLOWED_HOSTS = ["*"]
    seen.clear()

    def ask(
        page: str = "",
        view: Any = sync_view,
        *,
        method: str = "GET",
        body: bytes = b"",
        **views: Any,
    ) -> Exchange:
        settings.ROOT_URLCONF = Urls(view, **views)

        async def main() -> Exchange:
            exchange = Exchange(body, application=pgbackend.get_asgi_application())
            headers = [(b"content-type", b"application/x-www-form-urlencoded")] if body else []
            exchange.scope |= {"path": f"/{page}", "method": method, "headers": headers}
            await exchange.serve()
            assert all(record.leased == 0 for record in pgbackend.statistics())
            return exchange

        served: Exchange = run(main())
        return served

    yield ask


# --- The chain ------------------------------------------------------------------------------------


@pytest.mark.sweep(one_in=8)
@pytest.mark.parametrize("view", [sync_view, async_view])
@pytest.mark.parametrize("outer", KINDS)
@pytest.mark.parametrize("middle", KINDS)
@pytest.mark.parametrize("inner", KINDS)
def test_every_middleware_and_view_runs_green_on_the_loop_in_djangos_order(
    ask: Ask, settings: Any, threads: list[str], outer: str, middle: str, inner: str, view: Any
) -> None:
    kinds = (outer, middle, inner)
    settings.MIDDLEWARE = [KINDS[kind] for kind in kinds]
    for page, status in {"": 200, "template/": 200, "mended/": 200, "broken/": 500}.items():
        seen.clear()
        mended = "mixin" in kinds and page == "mended/"
        exchange = ask(page, view)
        assert exchange.status == (500 if page == "mended/" and not mended else status)
        assert all(green for _, green in seen), seen
        own = [kind for kind in kinds if kind != "django"]
        mixins = own.count("mixin")
        assert [name for name, _ in seen] == [
            *(f"{kind} in" for kind in own),
            *["mixin view"] * mixins,
            "view",
            *["mixin template"] * (mixins if page == "template/" else 0),
            *["mixin exception"] * {"broken/": mixins, "mended/": min(mixins, 1)}.get(page, 0),
            *(f"{kind} out" for kind in own[::-1]),
        ]
    assert threads == []


def test_a_response_may_have_an_async_render(ask: Ask, threads: list[str]) -> None:
    class Response(TemplateResponse):
        async def render(self) -> Any:  # type: ignore[override]
            self.content = f"{await Tag.objects.acount()}"
            return self

    def view(request: HttpRequest) -> HttpResponse:
        return Response(request, "names.html")

    assert ask(view=view).content == b"0"
    assert threads == []


def test_the_application_is_djangos_handler_and_takes_http_only(run: Runner) -> None:
    application = pgbackend.get_asgi_application()
    assert isinstance(application, ASGIHandler)

    async def main() -> None:
        for kind in ("lifespan", "websocket"):
            with pytest.raises(ValueError, match=f"ASGI/HTTP connections, not {kind}"):
                await application({"type": kind}, None, None)

    run(main())


def test_a_project_without_the_engine_is_told_what_to_set(monkeypatch: Any) -> None:
    entry = connections.settings["default"]
    monkeypatch.setitem(entry, "ENGINE", "django.db.backends.postgresql")
    with pytest.raises(ImproperlyConfigured, match=r"Set DATABASES.*to 'pgbackend', or use django"):
        pgbackend.get_asgi_application()


def test_the_script_name_of_the_server_is_the_prefix_of_urls(settings: Any, run: Runner) -> None:
    settings.MIDDLEWARE = []
    settings.ROOT_URLCONF = Urls(sync_view, there=lambda request: HttpResponse(reverse("there")))

    async def main() -> None:
        exchange = Exchange(application=pgbackend.get_asgi_application())
        exchange.scope |= {"path": "/below/there/", "root_path": "/below"}
        await exchange.serve()
        assert exchange.content == b"/below/there/"

    run(main())


def test_a_posted_form_and_an_upload_reach_the_view(ask: Ask, threads: list[str]) -> None:
    def view(request: HttpRequest) -> HttpResponse:
        return JsonResponse({"name": request.POST["name"], "raw": len(request.body)})

    exchange = ask(view=view, method="POST", body=b"name=" + b"x" * 10_000)
    assert json.loads(exchange.content) == {"name": "x" * 10_000, "raw": 10_005}
    assert threads == []


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("chain", [(), ("async",), ("mixin", "async", "function")])
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Http404, 404),
        (PermissionDenied, 403),
        (BadRequest, 400),
        (SuspiciousOperation, 400),
        (RuntimeError, 500),
    ],
)
def test_errors_have_djangos_responses_made_on_the_loop(
    ask: Ask,
    settings: Any,
    threads: list[str],
    chain: tuple[str, ...],
    error: type[Exception],
    status: int,
    debug: bool,
) -> None:
    settings.DEBUG = debug
    settings.DEBUG_PROPAGATE_EXCEPTIONS = False
    settings.MIDDLEWARE = [KINDS[kind] for kind in chain]
    told: list[type[Any]] = []

    def receiver(sender: type[Any], **kwargs: Any) -> None:
        note("receiver")
        told.append(sender)

    def view(request: HttpRequest) -> HttpResponse:
        Author.objects.create(name="kept")
        raise error

    got_request_exception.connect(receiver)
    try:
        assert ask(view=view).status == status
    finally:
        got_request_exception.disconnect(receiver)
    assert len(told) == (status == 500)
    assert all(green for _, green in seen)
    assert threads == []
    assert Author.objects.filter(name="kept").exists(), "without ATOMIC_REQUESTS it is committed"


def handler500(request: HttpRequest) -> HttpResponse:
    note("handler500")
    return HttpResponse("of the project", status=500)


@pytest.mark.parametrize("chain", [(), ("async",)])
def test_the_error_view_of_a_project_may_use_the_database(
    ask: Ask, settings: Any, threads: list[str], monkeypatch: Any, chain: tuple[str, ...]
) -> None:
    settings.MIDDLEWARE = [KINDS[kind] for kind in chain]
    monkeypatch.setattr(Urls, "handler500", staticmethod(handler500), raising=False)
    exchange = ask("broken/")
    assert (exchange.status, exchange.content) == (500, b"of the project")
    assert ("handler500", True) in seen
    assert threads == []


def test_a_view_that_returns_nothing_is_told_of_as_in_django(ask: Ask, settings: Any) -> None:
    settings.DEBUG = True
    exchange = ask(view=lambda request: None)
    assert exchange.status == 500
    assert b"return an HttpResponse object. It returned None" in exchange.content


# --- Transactions ---------------------------------------------------------------------------------


@pytest.fixture
def atomic_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(connections.settings["default"], "ATOMIC_REQUESTS", True)


def write(request: HttpRequest) -> HttpResponse:
    Author.objects.create(name="written")
    assert connection.in_atomic_block is (request.path != "/exempt/")
    if request.path == "/broken/":
        raise LookupError
    return HttpResponse("written")


async def write_async(request: HttpRequest) -> HttpResponse:
    await Tag.objects.acreate(name="written")
    return write(request)


@pytest.mark.parametrize("view", [write, write_async])
@pytest.mark.parametrize("chain", [(), ("async",), ("function", "async", "django")])
@pytest.mark.usefixtures("atomic_requests")
def test_atomic_requests_commits_rolls_back_or_lets_a_view_be(
    ask: Ask, settings: Any, threads: list[str], view: Any, chain: tuple[str, ...]
) -> None:
    settings.MIDDLEWARE = [KINDS[kind] for kind in chain]
    assert ask("broken/", view).status == 500
    assert not Author.objects.exists()
    assert not Entry.objects.exists()
    assert ask("", view).status == 200
    assert Author.objects.count() == Entry.objects.count() == 1
    Author.objects.all().delete()
    Tag.objects.all().delete()

    def exempt(request: HttpRequest) -> Any:
        return async_to_sync(write_async)(request) if view is write_async else write(request)

    assert ask("exempt/", exempt=transaction.non_atomic_requests(exempt)).status == 200
    assert Author.objects.count() == 1
    assert threads == []


def test_hooks_of_a_commit_run_and_a_view_may_mark_its_transaction(
    ask: Ask, atomic_requests: None
) -> None:
    ran: list[str] = []

    async def later() -> None:
        ran.append(f"{await Author.objects.acount()} async")

    def view(request: HttpRequest) -> HttpResponse:
        Author.objects.create(name="a")
        transaction.on_commit(lambda: ran.append(f"{Author.objects.count()} sync"))
        transaction.on_commit(later)
        if request.method == "DELETE":
            transaction.set_rollback(True)
        return HttpResponse()

    ask(view=view, method="DELETE")
    assert (ran, Author.objects.count()) == ([], 0)
    ask(view=view)
    assert (ran, Author.objects.count()) == (["1 sync", "1 async"], 1)


# --- Sync and async code below a sync view --------------------------------------------------------


def pid() -> int:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        return int(cursor.fetchone()[0])


def test_sync_to_async_goes_to_a_thread_that_shares_the_transaction(
    ask: Ask, atomic_requests: None
) -> None:
    """The thread and the loop see each other's rows; the request's end tidies the thread up."""
    found: dict[str, Any] = {}

    def in_thread() -> list[str]:
        found["thread"] = threading.current_thread()
        found["pid"] = pid()
        Tag.objects.create(name="of the thread")
        return [author.name for author in Author.objects.all()]

    def view(request: HttpRequest) -> HttpResponse:
        Author.objects.create(name="of the view")
        assert async_to_sync(sync_to_async(in_thread))() == ["of the view"]
        assert (found["thread"] is threading.main_thread(), found["pid"]) == (False, pid())
        assert Tag.objects.get().name == "of the thread"
        raise LookupError

    assert ask(view=view).status == 500
    assert not Author.objects.exists()
    assert not Tag.objects.exists()


def test_a_blocking_call_goes_to_a_thread_and_the_loop_goes_on(ask: Ask) -> None:
    loop_goes_on = threading.Event()

    def view(request: HttpRequest) -> HttpResponse:
        asyncio.get_running_loop().call_later(0.01, loop_goes_on.set)
        assert async_to_sync(asyncio.to_thread)(loop_goes_on.wait, 10)
        return HttpResponse("waited")

    assert ask(view=view).content == b"waited"


def test_another_engine_is_refused_on_the_loop_and_served_in_a_thread(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, threads: list[str], tmp_path: Path
) -> None:
    """The rest of the request is served on the loop as ever; its end closes what the thread has."""
    sqlite = {"ENGINE": "django.db.backends.sqlite3", "NAME": str(tmp_path / "db"), "OPTIONS": {}}
    entry = {**connections.settings["default"], **sqlite}
    monkeypatch.setitem(connections.settings, "foreign", entry)
    opened: list[Any] = []

    def query() -> Any:
        with connections["foreign"].cursor() as cursor:
            opened.append(connections["foreign"])
            return cursor.execute("SELECT 7").fetchone()

    def refused(request: HttpRequest) -> HttpResponse:
        note("view")
        with pytest.raises(SynchronousOnlyOperation):
            query()
        return HttpResponse("refused")

    def view(request: HttpRequest) -> HttpResponse:
        (found,) = async_to_sync(sync_to_async(query))()
        return HttpResponse(f"{found}")

    assert ask(view=refused).content == b"refused"
    assert (seen, threads) == ([("view", True)], [])
    assert ask(view=view).content == b"7"
    (wrapper,) = opened
    assert wrapper.connection is None


def test_a_view_may_gather_async_queries(ask: Ask, threads: list[str]) -> None:
    async def both() -> list[int]:
        return await asyncio.gather(Author.objects.acount(), Tag.objects.acount())

    def view(request: HttpRequest) -> HttpResponse:
        Author.objects.create(name="a")
        return JsonResponse(async_to_sync(both)(), safe=False)

    assert ask(view=view).content == b"[1, 0]"
    assert threads == []


def test_passwords_are_hashed_in_a_thread(ask: Ask, settings: Any) -> None:
    settings.PASSWORD_HASHERS = ["tests.library.hashers.TellingHasher"]
    from tests.library import hashers

    hashers.threads.clear()

    def view(request: HttpRequest) -> HttpResponse:
        get_user_model().objects.create_user("a", password="b")
        user = authenticate(request, username="a", password="b")
        assert authenticate(request, username="a", password="c") is None
        assert authenticate(request, username="nobody", password="c") is None
        assert user is not None
        user.set_password("d")
        return HttpResponse(user.get_username())

    assert ask(view=view).content == b"a"
    assert len(hashers.threads) == 5
    assert threading.main_thread().name not in hashers.threads


# --- Signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("uses_thread", [False, True])
def test_receivers_of_a_requests_signals_run_on_the_loop(
    ask: Ask, threads: list[str], uses_thread: bool
) -> None:
    def started(**kwargs: Any) -> None:
        note("started")

    def finished(**kwargs: Any) -> None:
        note("finished")

    async def later(**kwargs: Any) -> None:
        note("async")

    def view(request: HttpRequest) -> HttpResponse:
        if uses_thread:
            async_to_sync(sync_to_async(Author.objects.count))()
        response = HttpResponse()
        response._resource_closers.append(lambda: note("closed"))  # type: ignore[attr-defined]
        return response

    request_started.connect(started)
    request_started.connect(later)
    request_finished.connect(finished)
    try:
        ask(view=view)
    finally:
        request_started.disconnect(started)
        request_started.disconnect(later)
        request_finished.disconnect(finished)
    assert seen == [(name, True) for name in ("started", "async", "closed", "finished")]
    assert bool(threads) is uses_thread
