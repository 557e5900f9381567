"""Tests C15: a request's state follows it; its sync code never runs on the loop's thread."""

from __future__ import annotations

import asyncio
import functools
import itertools
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import iscoroutinefunction
from io import BytesIO
from pathlib import Path
from typing import Any
from uuid import uuid4

import django
import httpx
import pytest
import wrapt
from django import forms
from django.contrib import admin, messages
from django.contrib.auth import (
    BACKEND_SESSION_KEY,
    HASH_SESSION_KEY,
    SESSION_KEY,
    get_user_model,
)
from django.contrib.auth.backends import ModelBackend
from django.contrib.auth.decorators import (
    login_not_required,
    login_required,
    user_passes_test,
)
from django.contrib.messages.storage.cookie import CookieStorage
from django.contrib.sessions.backends import db as sessions_db
from django.contrib.sitemaps import Sitemap
from django.contrib.sitemaps.views import sitemap
from django.core.cache.backends.locmem import LocMemCache
from django.core.exceptions import BadRequest, PermissionDenied
from django.core.files.uploadhandler import MemoryFileUploadHandler
from django.core.handlers.asgi import ASGIHandler
from django.db import connection, connections, transaction
from django.http import FileResponse, Http404, HttpRequest, HttpResponse
from django.middleware.csrf import CsrfViewMiddleware, get_token
from django.middleware.security import SecurityMiddleware
from django.template.response import TemplateResponse
from django.urls import path
from django.utils.decorators import async_only_middleware, sync_and_async_middleware
from django.utils.deprecation import MiddlewareMixin
from django.views.decorators.cache import cache_page, never_cache
from django.views.decorators.clickjacking import xframe_options_deny
from django.views.decorators.csrf import csrf_protect
from django.views.decorators.http import condition
from django.views.generic import FormView, ListView, RedirectView, TemplateView

import pgbackend
from pgbackend import threads as policies
from tests.conftest import Runner
from tests.library.models import Tag

Seen = list[tuple[str, threading.Thread]]
SECURITY = "django.middleware.security.SecurityMiddleware"
HERE = __name__


# --- A project: middleware of each kind, and views ------------------------------------------------

#: The names of the pieces of code that the running request has run, and their threads.
seen: Seen = []


def note(name: str) -> None:
    seen.append((name, threading.current_thread()))


def function(get_response: Any) -> Any:
    def middleware(request: Any) -> Any:
        note("function in")
        response = get_response(request)
        note("function out")
        return response

    return middleware


class Mixin(MiddlewareMixin):
    """Has each hook that a middleware may have."""

    def process_request(self, request: Any) -> None:
        note("mixin in")

    def process_view(self, request: Any, *args: Any) -> None:
        note("mixin view")

    def process_template_response(self, request: Any, response: Any) -> Any:
        note("mixin template")
        return response

    def process_exception(self, request: Any, exception: Exception) -> None:
        note("mixin exception")

    def process_response(self, request: Any, response: Any) -> Any:
        note("mixin out")
        return response


@async_only_middleware
def async_only(get_response: Any) -> Any:
    async def middleware(request: Any) -> Any:
        note("async in")
        response = await get_response(request)
        note("async out")
        return response

    return middleware


@sync_and_async_middleware
def hybrid(get_response: Any) -> Any:
    if iscoroutinefunction(get_response):

        async def middleware(request: Any) -> Any:
            note("hybrid in")
            response = await get_response(request)
            note("hybrid out")
            return response

    else:

        def middleware(request: Any) -> Any:
            note("hybrid in")
            response = get_response(request)
            note("hybrid out")
            return response

    return middleware


def answer(request: HttpRequest) -> HttpResponse:
    """Answer as the request's path says: with a page, a template, or an error."""
    if request.path == "/error/":
        raise Http404
    if request.path == "/template/":
        return TemplateResponse(request, "names.html")
    return HttpResponse(f"{Tag.objects.count()}")


def sync_view(request: HttpRequest) -> HttpResponse:
    note("view")
    return answer(request)


async def async_view(request: HttpRequest) -> HttpResponse:
    note("view")
    return answer(request)


PATHS = ("page/", "template/", "error/")


class Urls:
    def __init__(self, **views: Any) -> None:
        self.urlpatterns = [path(f"{name}/", view) for name, view in views.items()]


def urls_of(view: Any) -> Urls:
    return Urls(page=view, template=view, error=view)


@pytest.fixture(autouse=True)
def _templates(settings: Any) -> None:
    """Give each test these templates, in memory."""
    names = {
        "names.html": "{{ form }}",
        "user.html": "{{ request.user }}",
        "404.html": "{{ request.user }}",
        "sitemap.xml": "{{ urlset|length }}",
    }
    loaders = [("django.template.loaders.locmem.Loader", names), _IN_APPS]
    (engine,) = settings.TEMPLATES
    options = {**engine.get("OPTIONS", {}), "loaders": loaders}
    settings.TEMPLATES = [{**engine, "APP_DIRS": False, "OPTIONS": options}]


_IN_APPS = "django.template.loaders.app_directories.Loader"


@pytest.fixture
def get(run: Runner, settings: Any) -> Callable[..., Any]:
    """Return a function that requests pages from a new ASGI handler; it returns the status codes.

    The notes of the project's code during these requests are in `seen`.
    """
    settings.ALLOWED_HOSTS = ["*"]

    def get(*pages: str, method: str = "GET", **options: Any) -> list[int]:
        async def main() -> list[int]:
            codes = await fetch(*pages, method=method, **options)
            assert all(record.leased == 0 for record in pgbackend.statistics())
            return codes

        seen.clear()
        codes: list[int] = run(main())
        return codes

    return get


async def fetch(
    *pages: str, method: str = "GET", client: dict[str, Any] | None = None, **options: Any
) -> list[int]:
    transport = httpx.ASGITransport(app=ASGIHandler(), **(client or {}))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as asked:
        return [(await asked.request(method, f"/{page}", **options)).status_code for page in pages]


def on_the_loop() -> dict[str, bool]:
    """Return whether each piece of the project's code that ran was on the loop's thread."""
    main = threading.main_thread()
    found: dict[str, bool] = {}
    for name, thread in seen:
        found[name] = found.get(name, False) or thread is main
    return found


def assert_in_one_thread() -> None:
    """Assert that no noted code ran on the loop, and all of it in the one thread of its request."""
    assert seen
    assert not any(on_the_loop().values()), seen
    assert len({thread for _, thread in seen}) == 1


# --- Where stock Django runs each -----------------------------------------------------------------

KINDS = {
    "django": SECURITY,
    "function": f"{HERE}.function",
    "mixin": f"{HERE}.Mixin",
    "async": f"{HERE}.async_only",
    "hybrid": f"{HERE}.hybrid",
}


def stock(kinds: tuple[str, ...], view: Any, page: str) -> dict[str, bool]:
    """Return where stock Django runs the project's code: its name, and whether on the loop."""
    places = {"view": iscoroutinefunction(view)}
    hooks = [
        "in",
        "view",
        "out",
        *{"template/": ["template"], "error/": ["exception"]}.get(page, []),
    ]
    is_async = True  # a sync view is called by a coroutine of the handler's
    for kind in reversed(kinds):
        is_async = kind == "async" or (kind != "function" and is_async)
        if kind == "mixin":
            places |= {f"mixin {hook}": False for hook in hooks}
        elif kind != "django":
            for name in (f"{kind} in", f"{kind} out"):
                places[name] = is_async or places.get(name, False)
    return places


@contextmanager
def another_engine() -> Iterator[None]:
    """Add a database of another engine: then all code runs where stock Django runs it."""
    connections.settings["foreign"] = {
        **connections.settings["default"],
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": ":memory:",
        "OPTIONS": {},
    }
    try:
        yield
    finally:
        del connections.settings["foreign"]


@pytest.mark.sweep(one_in=4)
@pytest.mark.parametrize("engines", ["pgbackend", "another too"])
@pytest.mark.parametrize("view", [sync_view, async_view])
@pytest.mark.parametrize("outermost", KINDS)
def test_each_middleware_and_view_of_a_project_runs_where_stock_runs_it(
    run: Runner, settings: Any, threads: list[str], outermost: str, view: Any, engines: str
) -> None:
    """All orders of three are tried; "another too" shows that `stock()` is right about Django."""
    settings.ROOT_URLCONF = urls_of(view)
    wrong = []

    async def main() -> None:
        for inner in itertools.product(KINDS, repeat=2):
            kinds = (outermost, *inner)
            settings.MIDDLEWARE = [KINDS[kind] for kind in kinds]
            for page in PATHS:
                seen.clear()
                threads.clear()
                await fetch(page)
                expected = stock(kinds, view, page)
                others = {thread for _, thread in seen} - {threading.main_thread()}
                if on_the_loop() != expected or len(others) > 1:
                    wrong.append((kinds, page, seen[:], expected))
                if engines == "pgbackend" and all(expected.values()) and threads:
                    wrong.append((kinds, page, threads[:], "no thread"))

    if engines == "pgbackend":
        run(main())
    else:
        with another_engine():
            run(main())
    assert not wrong, wrong[0]


def test_sync_middleware_below_djangos_own_waits_and_the_loop_goes_on(
    run: Runner, settings: Any
) -> None:
    settings.MIDDLEWARE = [SECURITY, f"{HERE}.waits"]
    settings.ROOT_URLCONF = urls_of(async_view)
    it_waits.clear()
    loop_goes_on.clear()

    async def main() -> None:
        request = asyncio.create_task(fetch("page/"))
        await asyncio.to_thread(it_waits.wait)
        loop_goes_on.set()
        assert await request == [200]

    run(main())


it_waits, loop_goes_on = threading.Event(), threading.Event()


def waits(get_response: Any) -> Any:
    def middleware(request: Any) -> Any:
        it_waits.set()
        assert threading.current_thread() is not threading.main_thread()
        loop_goes_on.wait()
        return get_response(request)

    return middleware


# --- Forms that a project's middleware may have ---------------------------------------------------


class Instance:
    """Follows the middleware of Django's documentation, with a hook."""

    def __init__(self, get_response: Any) -> None:
        self.get_response = get_response

    def __call__(self, request: Any) -> Any:
        note("call")
        return self.get_response(request)

    def process_view(self, request: Any, *args: Any) -> None:
        note("view hook")


def of_parts(get_response: Any) -> Any:
    return functools.partial(call_with, get_response)


def call_with(get_response: Any, request: Any) -> Any:
    note("partial")
    return get_response(request)


class Inherits(SecurityMiddleware):
    """Overrides one process_ method of Django's, and calls Django's."""

    def process_response(self, request: Any, response: Any) -> Any:
        note("inherits out")
        return super().process_response(request, response)


class Calls(CsrfViewMiddleware):
    """Overrides methods that Django's process_ methods call."""

    def _set_csrf_cookie(self, request: Any, response: Any) -> None:
        note("cookie")

    def _get_secret(self, request: Any) -> Any:
        note("secret")
        return "a" * 32


class OnlySync(SecurityMiddleware):
    """Switches Django's own middleware to sync only, in a chain with the middleware below it."""

    async_capable = False

    def process_request(self, request: Any) -> None:
        note("only sync")


def looks_like_djangos(get_response: Any) -> Any:
    """Make a middleware whose attributes all say that it is Django's."""

    @functools.wraps(SecurityMiddleware.process_request)
    def middleware(request: Any) -> Any:
        note("in disguise")
        return get_response(request)

    return middleware


REMOTE = (
    "django.contrib.sessions.middleware.SessionMiddleware"
    " django.contrib.auth.middleware.AuthenticationMiddleware"
    " django.contrib.auth.middleware.RemoteUserMiddleware"
)


@pytest.mark.parametrize("above", ["", SECURITY, f"{HERE}.hybrid", REMOTE])
@pytest.mark.parametrize("view", [sync_view, async_view])
@pytest.mark.parametrize(
    "name", ["Instance", "of_parts", "Inherits", "Calls", "OnlySync", "looks_like_djangos"]
)
def test_a_projects_middleware_of_any_form_keeps_its_thread(
    get: Any, settings: Any, name: str, view: Any, above: str
) -> None:
    settings.MIDDLEWARE = [*above.split(), f"{HERE}.{name}"]
    settings.ROOT_URLCONF = urls_of(view)
    assert get("page/") == [200]
    mine = [entry for entry in seen if not entry[0].startswith(("hybrid", "view"))]
    mine += [entry for entry in seen if entry[0] == "view hook"]
    seen[:] = mine
    assert_in_one_thread()


def patched(original: Any) -> Any:
    @functools.wraps(original)
    def patch(self: Any, *args: Any) -> Any:
        note("patched")
        return original(self, *args)

    return patch


def patched_call(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    return patched(wrapped)(*args, **kwargs)


@pytest.mark.parametrize("name", ["process_request", "process_response"])
@pytest.mark.parametrize("by", ["function", "proxy"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("where", ["class", "instance"])
def test_a_patched_method_of_djangos_middleware_keeps_its_thread(
    run: Runner,
    settings: Any,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    by: str,
    when: str,
    where: str,
) -> None:
    """The method may be patched after the same handler has served requests."""
    settings.MIDDLEWARE = [SECURITY]
    settings.ROOT_URLCONF = urls_of(async_view)
    made: list[Any] = []
    init = SecurityMiddleware.__init__

    def keep(self: Any, get_response: Any) -> None:
        init(self, get_response)
        made.append(self)

    monkeypatch.setattr(SecurityMiddleware, "__init__", keep)

    async def main() -> None:
        handler: Any = ASGIHandler()
        monkeypatch.setattr(SecurityMiddleware, "__init__", init)
        transport = httpx.ASGITransport(app=handler)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            if when == "after":
                await client.get("/page/")
            target: Any = SecurityMiddleware if where == "class" else made[0]
            if by == "proxy":
                patch = wrapt.FunctionWrapper(getattr(target, name), patched_call)
            elif where == "class":
                patch = patched(getattr(target, name))
            else:
                patch = functools.partial(patched(getattr(SecurityMiddleware, name)), target)
            monkeypatch.setattr(target, name, patch)
            seen.clear()
            assert (await client.get("/page/")).status_code == 200

    run(main())
    seen[:] = [entry for entry in seen if entry[0] == "patched"]
    assert_in_one_thread()


def test_a_patch_of_what_djangos_middleware_calls_keeps_its_thread(
    get: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An app patches when it is ready, before the first request."""
    monkeypatch.setattr(policies, "_known", {})
    monkeypatch.setattr(policies, "_usual", {})
    patch = patched(CsrfViewMiddleware._get_secret)  # type: ignore[attr-defined]
    monkeypatch.setattr(CsrfViewMiddleware, "_get_secret", patch)
    settings.MIDDLEWARE = ["django.middleware.csrf.CsrfViewMiddleware"]
    settings.ROOT_URLCONF = urls_of(quiet)
    assert get("page/") == [200]
    assert_in_one_thread()


class Same(SecurityMiddleware):
    """Derives from Django's middleware, and adds nothing."""


def test_a_class_that_adds_nothing_to_djangos_middleware_is_the_projects(
    get: Any, settings: Any, threads: list[str]
) -> None:
    settings.MIDDLEWARE = [f"{HERE}.Same"]
    settings.ROOT_URLCONF = urls_of(quiet)
    assert get("page/") == [200]
    assert threads != []


# --- Django's own middleware ----------------------------------------------------------------------

DEFAULT = (
    SECURITY,
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
)
MORE = (
    "django.contrib.auth.middleware.LoginRequiredMiddleware",
    "django.middleware.cache.CacheMiddleware",
    "django.middleware.cache.FetchFromCacheMiddleware",
    "django.middleware.cache.UpdateCacheMiddleware",
    "django.middleware.common.BrokenLinkEmailsMiddleware",
    "django.middleware.gzip.GZipMiddleware",
    "django.middleware.http.ConditionalGetMiddleware",
    "django.middleware.locale.LocaleMiddleware",
    *(
        ["django.middleware.csp.ContentSecurityPolicyMiddleware"]
        if django.VERSION >= (6, 0)
        else []
    ),
)
LOGIN = DEFAULT[:5]


async def everything(request: HttpRequest) -> HttpResponse:
    """Use everything that the middleware of the default project provides."""
    request.session["number"] = request.session.get("number", 0) + 1
    messages.info(request, f"{request.user} {await request.auser()} {get_token(request)}")
    return HttpResponse(f"{Tag.objects.count()}")


@pytest.mark.parametrize("added", [None, *MORE])
def test_a_request_that_runs_djangos_own_code_only_needs_no_thread(
    get: Any, settings: Any, threads: list[str], added: str | None
) -> None:
    settings.MIDDLEWARE = [*DEFAULT, *filter(None, [added])]
    settings.ROOT_URLCONF = urls_of(everything)
    settings.LOGIN_URL = "/"
    assert get("page/", "page/") in ([200, 200], [302, 302])
    assert threads == []


@pytest.mark.parametrize("one", DEFAULT)
def test_each_middleware_of_the_default_project_needs_no_thread_alone_and_above_others(
    get: Any, settings: Any, threads: list[str], one: str
) -> None:
    needs = [] if one in (DEFAULT[:2]) else [DEFAULT[1]]
    settings.ROOT_URLCONF = urls_of(async_view)
    for below in ([], [f"{HERE}.async_only"], [f"{HERE}.hybrid"]):
        settings.MIDDLEWARE = [*needs, one, *below]
        assert get("page/") == [200]
        assert all(on_the_loop().values())
        assert threads == [], below


def test_it_is_known_of_each_middleware_of_djangos_when_it_may_block() -> None:
    """A new version of Django may bring another middleware: until listed, it keeps its thread."""
    found = set()
    root = Path(django.__file__).parent
    for file in root.rglob("*.py"):
        module = ".".join(["django", *file.relative_to(root).with_suffix("").parts])
        names = re.findall(
            r"^class (\w+)\(.*(?:Middleware|MiddlewareMixin)\)", file.read_text(), re.MULTILINE
        )
        if ".tests" not in module:
            found |= {f"{module}.{name}" for name in names}
    asynchronous = {"django.contrib.auth.middleware.PersistentRemoteUserMiddleware"}  # is async
    assert found - asynchronous <= set(policies._MIDDLEWARE)
    assert len(found) > 15


# --- Blocking code below Django's own -------------------------------------------------------------


class Network(LocMemCache):
    """Plays a cache on another machine, whose answers one waits for."""

    def get(self, *args: Any, **options: Any) -> Any:
        note("cache get")
        return super().get(*args, **options)

    def set(self, *args: Any, **options: Any) -> Any:
        note("cache set")
        return super().set(*args, **options)

    def add(self, *args: Any, **options: Any) -> Any:
        note("cache add")
        return super().add(*args, **options)


@pytest.fixture
def network(settings: Any) -> None:
    settings.CACHES = {"default": {"BACKEND": f"{HERE}.Network", "LOCATION": f"{uuid4()}"}}


@pytest.mark.parametrize("engine", ["cache", "cached_db"])
@pytest.mark.parametrize("use", ["in the view", "for CSRF"])
@pytest.mark.usefixtures("network")
def test_sessions_in_a_cache_elsewhere_keep_their_thread(
    get: Any, settings: Any, engine: str, use: str
) -> None:
    settings.SESSION_ENGINE = f"django.contrib.sessions.backends.{engine}"
    settings.MIDDLEWARE = DEFAULT
    settings.CSRF_USE_SESSIONS = use == "for CSRF"

    async def view(request: HttpRequest) -> HttpResponse:
        await request.session.aset("number", 1)
        return HttpResponse()

    settings.ROOT_URLCONF = urls_of(view)
    session = {"Cookie": f"sessionid={'a' * 32}"}
    assert get("page/", headers=session) == [200]
    assert {"cache get", "cache add" if engine == "cache" else "cache set"} <= set(on_the_loop())
    assert_in_one_thread()


@pytest.mark.parametrize(
    ("engine", "needs_thread"),
    [
        ("db", False),
        ("signed_cookies", False),
        ("cache", False),
        ("cached_db", False),
        ("file", True),
    ],
)
def test_sessions_need_a_thread_if_they_block(
    get: Any, settings: Any, threads: list[str], engine: str, needs_thread: bool
) -> None:
    settings.SESSION_ENGINE = f"django.contrib.sessions.backends.{engine}"
    settings.MIDDLEWARE = DEFAULT
    settings.ROOT_URLCONF = urls_of(everything)
    assert get("page/") == [200]
    assert bool(threads) == needs_thread


@pytest.mark.parametrize("names", ["Cache", "UpdateCache FetchFromCache"])
@pytest.mark.parametrize("page", PATHS)
@pytest.mark.usefixtures("network")
def test_pages_in_a_cache_elsewhere_are_fetched_and_stored_in_a_thread(
    get: Any, settings: Any, names: str, page: str
) -> None:
    settings.MIDDLEWARE = [f"django.middleware.cache.{name}Middleware" for name in names.split()]
    settings.ROOT_URLCONF = urls_of(quiet)
    get(page, page)
    assert not any(on_the_loop().values()), seen
    assert set(on_the_loop()) == {"cache get", *(["cache set"] if page != "error/" else [])}


async def quiet(request: HttpRequest) -> HttpResponse:
    return answer(request)


def refused(request: HttpRequest, reason: str = "") -> HttpResponse:
    note("refused")
    return HttpResponse(reason, status=403)


def test_a_projects_view_for_forms_that_are_refused_keeps_its_thread(
    get: Any, settings: Any, threads: list[str]
) -> None:
    settings.MIDDLEWARE = ["django.middleware.csrf.CsrfViewMiddleware"]
    settings.ROOT_URLCONF = urls_of(quiet)
    settings.CSRF_FAILURE_VIEW = f"{HERE}.refused"
    assert get("page/") == [200]
    assert threads == []
    assert get("page/", method="POST") == [403]
    assert_in_one_thread()


class Upload(MemoryFileUploadHandler):
    def new_file(self, *args: Any, **options: Any) -> None:
        note("upload")
        super().new_file(*args, **options)


def test_a_projects_handler_of_uploads_keeps_its_thread(get: Any, settings: Any) -> None:
    settings.MIDDLEWARE = ["django.middleware.csrf.CsrfViewMiddleware"]
    settings.ROOT_URLCONF = urls_of(quiet)
    settings.FILE_UPLOAD_HANDLERS = [f"{HERE}.Upload"]
    token = "a" * 32
    form = {"data": {"csrfmiddlewaretoken": token}, "files": {"file": b"abc"}}
    codes = get("page/", method="POST", headers={"Cookie": f"csrftoken={token}"}, **form)
    assert codes == [200]
    assert_in_one_thread()


@pytest.mark.parametrize("size", [100, 3_000_000])
def test_a_large_form_is_parsed_for_its_token_in_a_thread(
    get: Any, settings: Any, threads: list[str], size: int
) -> None:
    settings.MIDDLEWARE = ["django.middleware.csrf.CsrfViewMiddleware"]
    settings.ROOT_URLCONF = urls_of(quiet)
    token = "a" * 32
    form = {"data": {"csrfmiddlewaretoken": token}, "files": {"file": b"a" * size}}
    codes = get("page/", method="POST", headers={"Cookie": f"csrftoken={token}"}, **form)
    assert codes == [200]
    assert any("process_view" in each for each in threads) == (size > 100)


class Storage(CookieStorage):
    def _store(self, *args: Any, **options: Any) -> Any:
        note("store")
        return super()._store(*args, **options)


def test_a_projects_storage_of_messages_keeps_its_thread(get: Any, settings: Any) -> None:
    settings.MIDDLEWARE = DEFAULT
    settings.MESSAGE_STORAGE = f"{HERE}.Storage"
    settings.ROOT_URLCONF = urls_of(everything)
    assert get("page/") == [200]
    assert_in_one_thread()


class Backend(ModelBackend):
    def get_user(self, user_id: Any) -> Any:
        note("get_user")
        return super().get_user(user_id)

    def has_perm(self, *args: Any, **options: Any) -> bool:
        note("has_perm")
        return super().has_perm(*args, **options)


@pytest.fixture
def session(settings: Any) -> dict[str, str]:
    """Return the cookie of a superuser whom `Backend` has let in."""
    settings.AUTHENTICATION_BACKENDS = [f"{HERE}.Backend"]
    user = get_user_model().objects.create_superuser("ada", password="tested")
    store = sessions_db.SessionStore()
    store[SESSION_KEY], store[BACKEND_SESSION_KEY] = str(user.pk), f"{HERE}.Backend"
    store[HASH_SESSION_KEY] = user.get_session_auth_hash()
    store.save()
    connection.close()
    return {"Cookie": f"sessionid={store.session_key}"}


async def names_user(request: HttpRequest) -> HttpResponse:
    return TemplateResponse(request, "user.html")


@pytest.mark.parametrize(
    "case", ["LoginRequired", "template", "Django's view", "async decorator", "404"]
)
def test_a_projects_backend_is_asked_for_the_user_in_a_thread(
    get: Any, settings: Any, session: dict[str, str], case: str
) -> None:
    settings.MIDDLEWARE = [*LOGIN]
    view: Any = names_user
    if case == "LoginRequired":
        settings.MIDDLEWARE.append("django.contrib.auth.middleware.LoginRequiredMiddleware")
        view = quiet
    elif case == "Django's view":
        view = login_required(TemplateView.as_view(template_name="names.html"))
    elif case == "async decorator":
        view = user_passes_test(passes)(quiet)
    settings.ROOT_URLCONF = Urls() if case == "404" else urls_of(view)
    assert get("page/", headers=session) == [404 if case == "404" else 200]
    assert_in_one_thread()


# --- Views, responses and answers to errors -------------------------------------------------------


def passes(user: Any) -> bool:
    note("test of the user")
    return True


class AnyForm(forms.Form):
    def __init__(self, *args: Any, **options: Any) -> None:
        note("form")
        super().__init__(*args, **options)


class Places(Sitemap):
    def items(self) -> list[Any]:
        note("sitemap")
        return []


class View:
    def __call__(self, request: HttpRequest) -> HttpResponse:
        note("instance")
        return HttpResponse()


class Lists(ListView):
    model = Tag
    template_name = "names.html"

    def get_queryset(self) -> Any:
        note("queryset")
        return super().get_queryset()


PAGE: Any = TemplateView.as_view(template_name="names.html")


@functools.wraps(PAGE)
def around(request: HttpRequest) -> Any:
    note("around a view of Django's")
    return PAGE(request)


MINE: dict[str, Any] = {
    "function": sync_view,
    "partial": functools.partial(sync_view),
    "instance": View(),
    "class": Lists.as_view(),
    "in a decorator": never_cache(sync_view),
    "in several": login_not_required(xframe_options_deny(csrf_protect(sync_view))),
    "in a transaction": transaction.atomic(sync_view),
    "around Django's": around,
    "test": user_passes_test(passes)(PAGE),
    "form": FormView.as_view(form_class=AnyForm, template_name="names.html", success_url="/"),
    "ETag": condition(etag_func=lambda request: note("etag"))(PAGE),
    "cached": cache_page(60)(PAGE),
    "sitemap": sitemap,
}
DJANGOS: dict[str, Any] = {
    "template": PAGE,
    "list": ListView.as_view(model=Tag, template_name="names.html"),
    "queryset": ListView.as_view(queryset=Tag.objects.order_by("pk"), template_name="names.html"),
    "in decorators": login_required(never_cache(csrf_protect(PAGE)), login_url="/"),
    "in a transaction": transaction.atomic(PAGE),
    "redirect": RedirectView.as_view(url="/"),
}


def urls_with(view: Any) -> Urls:
    urls = urls_of(view)
    if view is sitemap:
        urls.urlpatterns = [path("page/", view, {"sitemaps": {"places": Places}})]
    return urls


@pytest.mark.parametrize("name", MINE)
@pytest.mark.usefixtures("network")
def test_a_projects_view_keeps_its_thread_whatever_is_around_it(
    get: Any, settings: Any, name: str
) -> None:
    settings.MIDDLEWARE = LOGIN
    settings.ROOT_URLCONF = urls_with(MINE[name])
    assert get("page/") == [200]
    assert_in_one_thread()


@pytest.mark.parametrize("name", DJANGOS)
def test_a_view_of_djangos_needs_no_thread(
    get: Any, settings: Any, threads: list[str], name: str
) -> None:
    settings.MIDDLEWARE = LOGIN
    settings.ROOT_URLCONF = urls_of(DJANGOS[name])
    assert get("page/") in ([200], [302])
    assert threads == []


@pytest.mark.parametrize("own_page", [True, False])
def test_a_page_of_the_admin_keeps_its_thread_if_the_project_has_written_it(
    get: Any, settings: Any, threads: list[str], session: dict[str, str], own_page: bool
) -> None:
    class Hooks(admin.ModelAdmin):  # type: ignore[type-arg]
        list_display = ("name",)

        def get_queryset(self, request: HttpRequest) -> Any:
            note("hook")
            return super().get_queryset(request)

    class Page(Hooks):
        def changelist_view(self, *args: Any, **options: Any) -> Any:
            note("page")
            return super().changelist_view(*args, **options)

    settings.AUTHENTICATION_BACKENDS = ["django.contrib.auth.backends.ModelBackend"]
    store = sessions_db.SessionStore(session["Cookie"].partition("=")[2])
    store[BACKEND_SESSION_KEY] = settings.AUTHENTICATION_BACKENDS[0]
    store.save()
    site = admin.AdminSite()
    site.register(Tag, Page if own_page else Hooks)
    urls = Urls()
    urls.urlpatterns = [path("admin/", site.urls)]
    settings.ROOT_URLCONF = urls
    settings.MIDDLEWARE = DEFAULT
    threads.clear()
    assert get("admin/library/tag/", headers=session) == [200]
    if own_page:
        assert_in_one_thread()
    else:
        assert threads == []


class Rendered(TemplateResponse):
    @property
    def rendered_content(self) -> str:
        note("render")
        return super().rendered_content


class Closed(HttpResponse):
    def close(self) -> None:
        note("close")
        super().close()


class Resource:
    def close(self) -> None:
        note("closer")


def called_back(request: HttpRequest) -> HttpResponse:
    response = TemplateResponse(request, "names.html")
    response.add_post_render_callback(lambda response: note("callback"))
    return response


def with_resource(request: HttpRequest) -> HttpResponse:
    response = HttpResponse()
    response._resource_closers.append(Resource().close)  # type: ignore[attr-defined]
    return response


def file(request: HttpRequest) -> FileResponse:
    return FileResponse(Notes(b"abc"))


class Notes(BytesIO):
    def read(self, *args: Any) -> bytes:
        note("read")
        return super().read(*args)

    def close(self) -> None:
        note("close")
        super().close()


RESPONSES: dict[str, Any] = {
    "class": lambda request: Rendered(request, "names.html"),
    "callback": called_back,
    "close": lambda request: Closed(),
    "closer": with_resource,
    "file": file,
}


@pytest.mark.parametrize("name", RESPONSES)
@pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume")
def test_a_projects_response_is_rendered_and_closed_in_a_thread(
    get: Any, settings: Any, name: str
) -> None:
    async def view(request: HttpRequest) -> Any:
        return RESPONSES[name](request)

    settings.MIDDLEWARE = [SECURITY]
    settings.ROOT_URLCONF = urls_of(view)
    assert get("page/") == [200]
    assert_in_one_thread()


@pytest.mark.parametrize("code", [400, 403, 404, 500])
@pytest.mark.parametrize("chain", [[], [SECURITY], [SECURITY, f"{HERE}.function"]])
def test_a_projects_answer_to_an_error_is_made_in_a_thread(
    get: Any, settings: Any, code: int, chain: list[str]
) -> None:
    def handler(request: HttpRequest, exception: Any = None) -> HttpResponse:
        note("handler")
        return HttpResponse(status=code)

    async def view(request: HttpRequest) -> HttpResponse:
        raise {400: BadRequest, 403: PermissionDenied, 404: Http404, 500: KeyError}[code]

    settings.MIDDLEWARE = chain
    settings.ROOT_URLCONF = urls_of(view)
    for each in (400, 403, 404, 500):
        setattr(settings.ROOT_URLCONF, f"handler{each}", handler)
    assert get("page/", client={"raise_app_exceptions": False}) == [code]
    assert "handler" in on_the_loop()
    assert not any(on_the_loop().values())


def large(request: HttpRequest) -> HttpResponse:
    return HttpResponse(b"x" * int(request.GET["size"]))


async def sized(request: HttpRequest) -> HttpResponse:
    return large(request)


@pytest.mark.parametrize(("size", "needs_thread"), [(1000, False), (1_000_000, True)])
def test_to_compress_much_is_work_for_a_thread(
    get: Any, settings: Any, threads: list[str], size: int, needs_thread: bool
) -> None:
    settings.MIDDLEWARE = ["django.middleware.gzip.GZipMiddleware"]
    settings.ROOT_URLCONF = urls_of(sized)
    assert get(f"page/?size={size}", headers={"Accept-Encoding": "gzip"}) == [200]
    assert bool(threads) == needs_thread


@pytest.mark.parametrize("page", PATHS)
def test_mail_about_broken_links_is_sent_in_a_thread(
    get: Any, settings: Any, threads: list[str], page: str
) -> None:
    settings.MIDDLEWARE = ["django.middleware.common.BrokenLinkEmailsMiddleware"]
    settings.ROOT_URLCONF = urls_of(quiet)
    get(page)
    assert bool(threads) == (page == "error/")
