"""Tests C1: ENGINE is the only change, and async code may use the ORM as sync code does."""

from __future__ import annotations

import asyncio
import inspect
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from asgiref.sync import SyncToAsync, sync_to_async
from channels.db import aclose_old_connections
from channels.testing import HttpCommunicator, WebsocketCommunicator
from django import shortcuts
from django.conf import settings as django_settings
from django.contrib import auth
from django.contrib.auth import backends, hashers
from django.contrib.auth.models import AnonymousUser, Group, Permission, User
from django.contrib.sessions.backends import cached_db, db, signed_cookies
from django.core import paginator
from django.core.cache import caches
from django.core.handlers.asgi import ASGIHandler
from django.core.management import call_command
from django.db import connection, models
from django.db.backends.utils import CursorWrapper
from django.db.models import Count
from django.db.models.query import QuerySet
from django.http import Http404, HttpRequest

import pgbackend
from tests.conftest import Runner
from tests.contract.servers import consumers
from tests.contract.servers.running import environment
from tests.library.models import Author, Book, Entry, Note, Tag

Books = Callable[..., list[Book]]


def a_methods(owner: object) -> set[str]:
    """Return the names of the coroutine functions and async generators that `owner` offers."""
    return {
        name
        for name in dir(owner)
        if name.startswith("a") and _is_async(inspect.getattr_static(owner, name))
    }


def _is_async(member: Any) -> bool:
    member = getattr(member, "__func__", member)  # of a class method
    return inspect.iscoroutinefunction(member) or inspect.isasyncgenfunction(member)


class Calls:
    """Passes calls on to its owner, and records which of the a-methods were not called."""

    def __init__(self, owner: Any, *, names: set[str] | None = None) -> None:
        self._owner = owner
        self._missing = a_methods(owner) if names is None else names

    def __getattr__(self, name: str) -> Any:
        self._missing.discard(name)
        return getattr(self._owner, name)

    def check(self) -> None:
        """Fail for a method that the test does not call, such as a new one of a new Django."""
        assert self._missing == set()


@pytest.fixture
def statements_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[bool]]:
    """Record whether the statements were sent from the loop's thread."""
    seen: set[bool] = set()
    execute = CursorWrapper.execute

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.add(threading.current_thread() is threading.main_thread())
        return execute(self, *args, **kwargs)

    monkeypatch.setattr(CursorWrapper, "execute", recorded)
    yield seen


CACHES = {
    "table": {"BACKEND": "django.core.cache.backends.db.DatabaseCache", "LOCATION": "cached"},
    "memory": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"},
    "nothing": {"BACKEND": "django.core.cache.backends.dummy.DummyCache"},
    "files": {"BACKEND": "django.core.cache.backends.filebased.FileBasedCache"},
}


@pytest.fixture
def cached(settings: Any, tmp_path: Path) -> Iterator[None]:
    """Configure a cache of each kind; one of them is a table."""
    settings.CACHES = CACHES | {"default": CACHES["memory"]}
    CACHES["files"]["LOCATION"] = str(tmp_path)
    call_command("createcachetable")
    yield
    with connection.cursor() as cursor:
        cursor.execute("DROP TABLE cached")


# --- The a-methods ------------------------------------------------------------------------------


def test_every_a_method_of_a_queryset_runs_on_the_loop(
    run: Runner, make_books: Books, threads: list[str]
) -> None:
    make_books()

    async def main() -> None:
        names = a_methods(QuerySet)
        calls = Calls(Book.objects.order_by("pk"), names=names)
        await _read(calls)
        await _write(calls, Calls(Tag.objects.order_by("pk"), names=names))
        calls.check()

    run(main())
    assert threads == []


async def _read(books: Any) -> None:
    first = await books.aget(title="book 0")
    assert first == await books.afirst() == await books.aearliest("pk")
    last = await books.alast()
    assert last == await books.alatest("pk") != first
    assert (await books.acount(), await books.aexists()) == (3, True)
    assert await books.acontains(first)
    assert await books.aaggregate(n=Count("pk")) == {"n": 3}
    assert list(await books.ain_bulk([first.pk])) == [first.pk]
    assert await books.aexplain()
    assert first.pk in [book.pk async for book in books.aiterator(chunk_size=2)]


async def _write(books: Any, tags: Any) -> None:
    assert await books.aupdate(text="") == 3
    made = await tags.acreate(name="made")
    assert await tags.aget_or_create(name="made") == (made, False)
    assert (await tags.aget_or_create(name="got"))[1]
    assert (await tags.aupdate_or_create(name="other"))[1]
    several = await tags.abulk_create([Tag(name="b1"), Tag(name="b2")])
    several[0].name = "b0"
    assert await tags.abulk_update(several, ["name"]) == 2
    assert await tags.filter(name="b0").aupdate(name="b9") == 1
    assert (await tags.filter(name__startswith="b").adelete())[0] == 2
    if not isinstance(tags._owner, models.Manager):
        assert (await tags.adelete())[0] == 5 + 6, "the tags, and the books' links to them"


def test_a_queryset_in_all_its_forms_is_iterated_on_the_loop(
    run: Runner, make_books: Books, threads: list[str]
) -> None:
    make_books()

    async def main() -> None:
        books = Book.objects.order_by("pk")
        forms: list[Any] = [
            books,
            books[:3],
            books.select_related("author").prefetch_related("tags"),
            books.values(),
            books.values_list("pk"),
            books.values_list("title", flat=True),
            books.values_list("title", named=True),
            books.union(Book.objects.none()),
            books.defer("text"),
            Book.objects.raw("SELECT * FROM library_book"),
            Book.objects.all(),
            books.distinct(),
        ]
        for form in forms:
            assert len([row async for row in form]) == 3, form
        for form in (books, books.values(), books.values_list("title", flat=True)):
            assert len([row async for row in form.aiterator(chunk_size=2)]) == 3, form
        prefetched = books.prefetch_related("tags")
        async for book in prefetched.aiterator(chunk_size=2):
            names = [tag.name async for tag in book.tags.all()]
            assert sorted(names) == ["long", "new"]  # without an order the server chooses one

    run(main())
    assert threads == []


def test_an_async_iteration_that_is_left_early_gives_its_connection_back(
    run: Runner, make_books: Books, threads: list[str]
) -> None:
    make_books()

    async def main() -> None:
        for _ in range(3):
            rows = Book.objects.aiterator(chunk_size=1)
            assert await anext(rows)
            await rows.aclose()
            # Django leaves the generator below it to the loop, which closes it in a task.
            while (record := pgbackend.statistics()[0]).idle == 0:
                await asyncio.sleep(0)
        assert record.connections_made == 1, "closed in order, so that it can be used again"

    run(main())
    assert threads == []


def test_every_a_method_of_a_manager_runs_on_the_loop(
    run: Runner, make_books: Books, threads: list[str]
) -> None:
    make_books()

    async def main() -> None:
        # A manager's methods are plain functions that call the QuerySet's.
        names = {name for name in a_methods(QuerySet) if hasattr(Book.objects, name)}
        calls = Calls(Book.objects, names=set(names))
        assert await calls.acount() == await calls.all().acount() == 3
        await _read(calls)
        writes = Calls(Tag.objects, names=calls._missing)
        await _write(calls, writes)
        writes.check()

    run(main())
    assert threads == []


def test_every_a_method_of_a_related_manager_runs_on_the_loop(
    run: Runner, make_books: Books, threads: list[str]
) -> None:
    book, other, _ = make_books()
    author = book.author

    async def main() -> None:
        reverse = Calls(author.books)
        made = await reverse.acreate(title="related")
        assert (await reverse.aget_or_create(title="related")) == (made, False)
        assert (await reverse.aupdate_or_create(title="related")) == (made, False)
        await reverse.aadd(other)
        assert await reverse.acount() == 3
        await reverse.aset([made, book, other])
        reverse.check()

        tags = Calls(book.tags)
        assert (await tags.aget_or_create(name="got"))[1]
        assert (await tags.aupdate_or_create(name="updated"))[1]
        tag = await tags.acreate(name="through")
        await tags.aremove(tag)
        await tags.aadd(tag)
        await tags.aset([tag])
        assert [tag.name async for tag in tags.all()] == ["through"]
        await tags.aclear()
        assert not await tags.aexists()
        tags.check()

        books = Calls(tag.books)
        assert (await books.aget_or_create(title="got", author=author))[1]
        assert (await books.aupdate_or_create(title="updated", author=author))[1]
        await books.acreate(title="through", author=author)
        await books.aset([book])
        await books.aremove(book)
        await books.aadd(book)
        assert await books.acount() == 1
        await books.aclear()
        books.check()

        notes = Calls(await pgbackend.aio.run(lambda: book.notes))  # load its content type
        note = await notes.acreate(text="a")
        assert (await notes.aget_or_create(text="b"))[1]
        assert (await notes.aupdate_or_create(text="c"))[1]
        await notes.aset([note])
        await notes.aremove(note)
        await notes.aadd(Note(text="d"), bulk=False)
        assert [note.text async for note in notes.all()] == ["d"]
        await notes.aclear()
        assert not await Note.objects.aexists()
        notes.check()

    run(main())
    assert threads == []


def test_a_method_of_a_nullable_relation_runs_on_the_loop(run: Runner, threads: list[str]) -> None:
    """A foreign key that may be NULL adds two methods to its manager."""
    group = Group.objects.create(name="readers")
    user = User.objects.create(username="ada")

    async def main() -> None:
        groups = Calls(user.groups)
        await groups.aadd(group)
        assert await groups.aget_by_natural_key("readers") == group
        assert (await groups.aget_or_create(name="readers")) == (group, False)
        await groups.aset([])
        await groups.aupdate_or_create(name="writers")
        await groups.acreate(name="editors")
        await groups.aremove(group)
        assert await groups.acount() == 2
        await groups.aclear()
        groups.check()

    run(main())
    assert threads == []


def test_the_a_methods_call_the_same_code_as_their_twins(run: Runner, threads: list[str]) -> None:
    """The a-methods run overrides of `save()`, and the receivers of signals."""

    async def main() -> None:
        author = Calls(Author(name="new one"))
        await author.asave()
        assert await Entry.objects.filter(text="new new one").aexists()
        author._owner.name = "renamed"
        await author.asave(update_fields=["name"])
        assert await Entry.objects.filter(text="old renamed").aexists()
        book = Calls(await author.books.acreate(title="its"))
        assert book.saves == 1
        await book.asave(update_fields=["title"])
        await book.arefresh_from_db()
        assert book.saves == 2
        made, _ = await Book.objects.aget_or_create(title="got", author=author._owner)
        made, _ = await Book.objects.aupdate_or_create(title="got", defaults={"text": "changed"})
        assert made.saves == 2
        await book.adelete()
        book.check()
        await author.arefresh_from_db()
        await author.adelete()
        author.check()

    run(main())
    assert threads == []


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize("module", [db, cached_db, signed_cookies], ids=lambda m: m.__name__)
@pytest.mark.parametrize("cache", ["table", "memory"])
def test_every_a_method_of_a_session_runs_on_the_loop(
    run: Runner, module: Any, cache: str, threads: list[str], settings: Any
) -> None:
    settings.CACHES = CACHES | {"default": CACHES[cache]}

    async def main() -> None:
        session = Calls(module.SessionStore())
        await session.acreate()
        await session.aset("a", 1)
        assert await session.aget("a") == 1 and await session.ahas_key("a")
        assert await session.asetdefault("b", 2) == 2
        await session.aupdate({"c": 3})
        assert set(await session.akeys()) == {"a", "b", "c"}
        assert set(await session.avalues()) == {1, 2, 3}
        assert ("a", 1) in await session.aitems()
        assert await session.apop("c") == 3
        await session.aset_test_cookie()
        assert await session.atest_cookie_worked()
        await session.adelete_test_cookie()
        await session.aset_expiry(60)
        assert await session.aget_expiry_age() == 60
        assert await session.aget_expiry_date()
        assert not await session.aget_expire_at_browser_close()
        if hasattr(module.SessionStore, "acreate_model_instance"):
            assert await session.acreate_model_instance({})
        await session.asave()
        key = session.session_key
        assert await module.SessionStore(key).aget("a") == 1
        assert await session.aexists(key) is (module is not signed_cookies)
        assert await session.aload()
        if module is cached_db:
            assert await session.acache_key()
        await session.acycle_key()
        await session.adelete(session.session_key)
        await session.aclear_expired()
        await session.aflush()
        session.check()

    # Django calls the sync method of the cache, which the bare loop refuses with any ENGINE.
    asks_in_sync = module is cached_db and cache == "table"
    run(pgbackend.aio.portal(main()) if asks_in_sync else main())
    assert threads == []


def test_every_a_method_of_auth_queries_on_the_loop(
    run: Runner, threads: list[str], statements_on: set[bool]
) -> None:
    """Django itself gives only the hashing of a password to a thread: it is work, not waiting."""
    statements_on.clear()

    async def main() -> None:
        users = Calls(User.objects, names=a_methods(type(User.objects)))
        user = await users.acreate_user("ada", password="tested")
        await users.acreate_superuser("root", password="tested")
        assert await users.aget_by_natural_key("ada") == user
        users.check()
        request = HttpRequest()
        request.session = db.SessionStore()
        request.user = user  # as Django's middleware does
        request.auser = lambda: auth.aget_user(request)
        await _auth_functions(request, user)
        for backend in (backends.ModelBackend(), backends.RemoteUserBackend()):
            await _backend(Calls(backend), user)
        fresh = await User.objects.aget(pk=user.pk)  # without cached permissions
        await _permissions(Calls(fresh), Permission.objects)
        await _permissions(Calls(AnonymousUser()), None)

    run(main())
    assert statements_on == {True}
    hops = [hop for hop in threads if ": " in hop]
    assert all("'tested'" in hop or "'wrong'" in hop for hop in hops), hops


async def _auth_functions(request: Any, user: User) -> None:
    calls = Calls(auth)
    if hasattr(auth, "acheck_password_with_timing_attack_mitigation"):  # Django 6.0 and later
        assert await calls.acheck_password_with_timing_attack_mitigation(user, "tested")
    hashing = Calls(hashers)
    assert await hashing.acheck_password("tested", user.password)
    hashing.check()
    found = await calls.aauthenticate(request, username="ada", password="tested")
    assert found == user
    assert await calls.aauthenticate(request, username="ada", password="wrong") is None
    await calls.alogin(request, found)
    assert await calls.aget_user(request) == user
    await calls.aupdate_session_auth_hash(request, user)
    await calls.alogout(request)
    assert (await calls.aget_user(request)).is_anonymous
    calls.check()


async def _backend(backend: Calls, user: User) -> None:
    assert await backend.aget_user(user.pk) == user
    assert not await backend.ahas_perm(user, "library.add_book")
    assert not await backend.ahas_module_perms(user, "library")
    assert await backend.aget_user_permissions(user) == set()
    assert await backend.aget_group_permissions(user) == set()
    assert await backend.aget_all_permissions(user) == set()
    remote = isinstance(backend._owner, backends.RemoteUserBackend)
    credentials = {"remote_user": "bob"} if remote else {"username": "ada", "password": "tested"}
    assert await backend.aauthenticate(HttpRequest(), **credentials)
    if remote:
        assert await backend.aconfigure_user(HttpRequest(), user, created=False) == user
    backend.check()


async def _permissions(user: Calls, permissions: Any) -> None:
    if permissions is not None:
        permission = await permissions.aget(codename="add_book")
        await user.user_permissions.aadd(permission)
        await user.asave()
        await user.arefresh_from_db()
        assert await user.acheck_password("tested")
    allowed = permissions is not None
    assert await user.ahas_perm("library.add_book") is allowed
    assert await user.ahas_perms(["library.add_book"]) is allowed
    assert await user.ahas_module_perms("library") is allowed
    assert bool(await user.aget_user_permissions()) is allowed
    assert await user.aget_group_permissions() == set()
    assert bool(await user.aget_all_permissions()) is allowed
    if allowed:
        await user.adelete()
    user.check()


def test_shortcuts_prefetches_and_pages_run_on_the_loop(
    run: Runner, make_books: Books, threads: list[str]
) -> None:
    first, *_ = make_books()

    async def main() -> None:
        calls = Calls(shortcuts)
        assert await calls.aget_object_or_404(Book, pk=first.pk) == first
        assert len(await calls.aget_list_or_404(Book)) == 3
        with pytest.raises(Http404):
            await calls.aget_object_or_404(Book, pk=0)
        with pytest.raises(Http404):
            await calls.aget_list_or_404(Book, pk=0)
        calls.check()
        prefetch = Calls(models)
        await prefetch.aprefetch_related_objects([first], "tags", "notes")
        assert len(first.tags.all()) == 2
        prefetch.check()

    run(main())
    assert threads == []


if hasattr(paginator, "AsyncPaginator"):  # Django 6.0 and later

    def test_every_a_method_of_a_paginator_runs_on_the_loop(
        run: Runner, make_books: Books, threads: list[str]
    ) -> None:
        make_books()

        async def main() -> None:
            pages = Calls(paginator.AsyncPaginator(Book.objects.order_by("pk"), 2))
            assert (await pages.acount(), await pages.anum_pages()) == (3, 2)
            assert list(await pages.apage_range()) == [1, 2]
            assert await pages.avalidate_number(2) == 2
            first = Calls(await pages.apage(1))
            assert (await pages.aget_page(9)).number == 2
            assert len([page async for page in pages._owner]) == 2
            assert len(await first.aget_object_list()) == 2
            assert await first.ahas_next() and await first.ahas_other_pages()
            assert not await first.ahas_previous()
            assert await first.anext_page_number() == 2
            assert (await first.astart_index(), await first.aend_index()) == (1, 2)
            with pytest.raises(paginator.InvalidPage):
                await first.aprevious_page_number()
            first.check()
            assert [n async for n in pages.aget_elided_page_range(1)] == [1, 2]
            pages.check()

        run(main())
        assert threads == []


# --- Requests -----------------------------------------------------------------------------------


@pytest.fixture
def site_urls(settings: Any) -> None:
    settings.ROOT_URLCONF = "tests.contract.servers.urls"
    settings.TEMPLATES = [
        {**settings.TEMPLATES[0], "DIRS": ["tests/contract/servers/templates"]},
    ]


@asynccontextmanager
async def served(**kwargs: Any) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client of the project's ASGI application, made with the settings of the test."""
    transport = httpx.ASGITransport(app=ASGIHandler(), **kwargs)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


@pytest.mark.usefixtures("site_urls")
def test_class_based_views_templates_and_forms_need_no_thread(
    run: Runner, make_books: Books, threads: list[str]
) -> None:
    """The views are Django's generic ones, and a class of the project's with `async def get`."""
    book, *_ = make_books()
    tag = Tag.objects.get(name="new")
    page = "".join(f"book {n} by author {n}, 2 tags;" for n in range(3))

    async def main() -> None:
        async with served() as client:
            for path in ("shelf/", "page/", "my-shelf/async/"):
                assert (await client.get(f"/contract/{path}")).text.strip() == page, path
            form = await client.get("/contract/new/")
            assert "author 0" in form.text and "long" in form.text  # its ModelChoiceFields
            client.headers["X-CSRFToken"] = client.cookies["csrftoken"]
            data = {"title": "made", "author": str(book.author_id), "tags": str(tag.pk)}
            assert (await client.post("/contract/new/", data=data)).status_code == 302
            refused = await client.post("/contract/new/", data={"title": "", "author": "0"})
            assert "errorlist" in refused.text

    run(main())
    assert Book.objects.get(title="made").tags.get() == tag
    assert threads == []


@pytest.mark.usefixtures("site_urls")
@pytest.mark.parametrize("path", ["where/", "my-shelf/"])
def test_a_sync_view_of_the_projects_keeps_its_thread(
    run: Runner, make_books: Books, threads: list[str], path: str
) -> None:
    make_books()

    async def main() -> None:
        async with served() as client:
            answer = (await client.get(f"/contract/{path}")).text
            assert answer == "3 in a thread" or answer.strip().startswith("book 0 by author 0")

    run(main())
    assert threads != []


@pytest.mark.usefixtures("site_urls")
@pytest.mark.parametrize("path", ["several/?nonce=a", "where/", "shelf/"])
@pytest.mark.parametrize(
    "kinds",
    [
        "mixin sync async both",
        "mixin async sync both",
        "mixin async sync async",
        "mixin both async both",
    ],
)
def test_sync_and_async_middleware_query_in_any_order(
    run: Runner, make_books: Books, kinds: str, path: str, settings: Any
) -> None:
    make_books()
    names = {"mixin": "Mixin", "sync": "sync_only", "async": "async_only", "both": "both"}
    settings.MIDDLEWARE = [f"tests.contract.servers.middleware.{names[k]}" for k in kinds.split()]
    notes = [f"{kind} in" for kind in kinds.split()]
    notes += [f"{kind} out" for kind in kinds.split()[::-1] if kind != "both"]

    async def main() -> None:
        async with served() as client:
            answers = await asyncio.gather(*(client.get(f"/contract/{path}") for _ in range(3)))
            for answer in answers:
                assert answer.status_code == 200, answer.text
                assert answer.headers["X-Notes"].split(",") == notes

    run(main())
    for note in set(notes):
        assert Entry.objects.filter(text=note).count() == 3 * notes.count(note)


@pytest.mark.usefixtures("site_urls")
def test_an_async_response_queries_while_it_streams(
    run: Runner, make_books: Books, threads: list[str]
) -> None:
    make_books(5)

    async def main() -> None:
        async with served() as client:
            lines = (await client.get("/contract/stream/async/")).text.splitlines()
            assert lines == [f"book {n} by author {n}" for n in range(5)]

    run(main())
    assert threads == []


@pytest.mark.usefixtures("site_urls")
@pytest.mark.parametrize("path", ["sync/", "sync-view/"])
@pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume")
def test_a_sync_response_queries_while_it_streams(
    run: Runner, make_books: Books, path: str
) -> None:
    """Django reads a sync iterator in a thread, because it may block, and warns."""
    make_books(5)

    async def main() -> None:
        async with served() as client:
            lines = (await client.get(f"/contract/stream/{path}")).text.splitlines()
            assert lines == [f"book {n} by author {n}" for n in range(5)]

    run(main())


def test_the_admin_needs_no_thread(run: Runner, make_books: Books, threads: list[str]) -> None:
    """The admin's pages are Django's own sync views: the index, a list, a form, and saving it."""
    user = User.objects.create_superuser("ada", password="tested")
    group = Group.objects.create(name="readers")

    async def main() -> None:
        session = db.SessionStore()
        request = HttpRequest()
        request.session = session
        await auth.alogin(request, user, backend=django_settings.AUTHENTICATION_BACKENDS[0])
        await session.asave()
        threads.clear()
        async with served() as client:
            client.cookies["sessionid"] = session.session_key
            assert "readers" in (await client.get("/admin/auth/group/")).text
            assert (await client.get("/admin/")).status_code == 200
            url = f"/admin/auth/group/{group.pk}/change/"
            assert "Can add book" in (await client.get(url)).text
            client.headers["X-CSRFToken"] = client.cookies["csrftoken"]
            saved = await client.post(url, data={"name": "writers"})
            assert saved.status_code == 302, saved.text

    run(main())
    group.refresh_from_db()
    assert group.name == "writers"
    assert threads == []


def test_request_user_and_the_session_are_lazy_in_async_code(
    run: Runner, async_client: Any, threads: list[str]
) -> None:
    user = User.objects.create(username="ada")

    async def main() -> None:
        await async_client.aforce_login(user)
        assert (await async_client.get("/library/who/")).content == b"ada"
        await async_client.alogout()
        assert (await async_client.get("/library/who/")).content == b"nobody"

    run(main())
    assert threads == []


# --- Code that still needs a thread, and code that does not ---------------------------------------


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize("kind", ["table", "memory", "nothing"])
def test_every_a_method_of_a_cache_in_a_table_or_in_memory_runs_on_the_loop(
    run: Runner, threads: list[str], kind: str
) -> None:
    async def main() -> None:
        cache = Calls(caches[kind])
        keeps = kind != "nothing"
        await cache.aset("a", 1)
        assert await cache.aget("a") == (1 if keeps else None)
        assert await cache.aadd("b", 2)
        assert await cache.atouch("a", 60) is keeps
        assert await cache.ahas_key("b") is keeps
        assert await cache.aget_many(["a", "b"]) == ({"a": 1, "b": 2} if keeps else {})
        assert await cache.aget_or_set("c", lambda: 3) == 3
        assert await cache.aset_many({"d": 4}) == []
        await cache.adelete_many(["d"])
        if keeps:
            assert await cache.aincr("a") == 2
            assert await cache.adecr("a") == 1
            assert await cache.aincr_version("a") == 2
            assert await cache.adecr_version("a", version=2) == 1
        else:
            cache._missing -= {"aincr", "adecr", "aincr_version", "adecr_version"}
        await cache.adelete("a")
        await cache.aclear()
        await cache.aclose()
        cache.check()

    run(main())
    assert threads == []


@pytest.mark.usefixtures("cached")
def test_a_cache_of_files_keeps_its_thread(run: Runner, threads: list[str]) -> None:
    async def main() -> None:
        await caches["files"].aset("a", 1)
        assert await caches["files"].aget("a") == 1

    run(main())
    assert threads != []


@pytest.mark.usefixtures("site_urls")
def test_a_large_body_is_written_where_django_writes_it(
    run: Runner, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A body above a certain size is a file, which some versions of Django write in a thread."""
    settings.FILE_UPLOAD_MAX_MEMORY_SIZE = 1000
    settings.DATA_UPLOAD_MAX_MEMORY_SIZE = None
    settings.MIDDLEWARE = []
    written: list[tuple[bool, bool]] = []
    write = tempfile.SpooledTemporaryFile.write

    def recorded(self: Any, data: bytes) -> int:
        written.append((self._rolled, threading.current_thread() is threading.main_thread()))
        return write(self, data)

    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "write", recorded)

    async def body() -> AsyncIterator[bytes]:
        for _ in range(5):
            yield b"x" * 600

    async def main() -> None:
        async with served() as client:
            assert (await client.post("/contract/echo/", content=body())).text == "3000 0"

    in_thread = "async_write" in ASGIHandler.read_body.__code__.co_varnames
    run(main())
    assert {here for rolled, here in written if not rolled} == {True}
    assert {here for rolled, here in written if rolled} == {not in_thread}


def test_uvicorn_does_not_take_the_application_for_a_factory() -> None:
    """uvicorn calls the application without arguments, to find out whether it is a factory."""
    application = ASGIHandler()
    config = uvicorn.Config(application, lifespan="off", proxy_headers=False, log_config=None)
    config.load()
    assert (config.loaded_app, config.interface) == (application, "asgi3")


# --- Another engine beside it -------------------------------------------------------------------


def test_both_engines_serve_one_request_each_in_its_own_way(tmp_path: Path) -> None:
    """The project has a second alias on SQLite; its view reports what it saw, and where."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.contract.servers.two_engines"],
        env={
            **environment("two engines", "tests.contract.servers.settings_two"),
            "OTHER": str(tmp_path / "other.sqlite3"),
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {
        "here": ["here"],
        "there": ["there"],
        "refused": True,
        "in a thread": 1,
        "statements of a-methods": {"default": ["loop"], "other": ["thread"]},
        "receivers": [["started", 0, "thread"], ["spoken", 1, "thread"], ["finished", 1, "thread"]],
        "closed in its thread": True,
        "leased": 0,
    }


# --- Consumers ----------------------------------------------------------------------------------


@pytest.fixture
def asgirefs_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Replace the one thread of `sync_to_async` outside requests, as if it had not started."""
    with ThreadPoolExecutor(max_workers=1) as executor:
        monkeypatch.setattr(SyncToAsync, "single_thread_executor", executor)
        yield


@pytest.mark.usefixtures("asgirefs_thread")
def test_an_async_consumer_is_green_by_the_engine_alone(
    run: Runner, make_books: Books, threads: list[str]
) -> None:
    make_books(2)

    async def main() -> None:
        text = WebsocketCommunicator(consumers.Text.as_asgi(), "/")
        assert await text.connect(timeout=10) == (True, None)
        await text.send_to(text_data="book 1")
        assert await text.receive_from(timeout=10) == "book 1 by author 1"
        jsons = WebsocketCommunicator(consumers.Json.as_asgi(), "/")
        await jsons.connect(timeout=10)
        await jsons.send_json_to({"author": "a", "titles": ["x", "y"]})
        assert await jsons.receive_json_from(timeout=10) == {"made": ["x", "y"]}
        http = HttpCommunicator(consumers.Http.as_asgi(), "GET", "/")
        assert (await http.get_response(timeout=10))["body"] == b"book 0 book 1 x y"
        await text.disconnect(timeout=10)
        await jsons.disconnect(timeout=10)
        assert not await Tag.objects.filter(name="connected").aexists()

    run(main())
    assert threads == []


def test_a_sync_consumer_keeps_its_thread(
    run: Runner, make_books: Books, threads: list[str]
) -> None:
    make_books(1)

    async def main() -> None:
        sync = WebsocketCommunicator(consumers.Sync.as_asgi(), "/")
        await sync.connect(timeout=10)
        await sync.send_to(text_data="?")
        assert await sync.receive_from(timeout=10) == "book 0 in a thread"
        await sync.disconnect(timeout=10)

    run(main())
    assert threads != []


@pytest.mark.usefixtures("asgirefs_thread")
def test_old_connections_of_a_consumer_are_closed_in_its_thread_too(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`sync_to_async` in a consumer uses asgiref's one thread, where no request closes anything."""
    told: list[bool] = []
    tidy = aclose_old_connections.__globals__["close_old_connections"]

    def close_old_connections() -> None:
        told.append(threading.current_thread() is threading.main_thread())
        tidy()

    async def main() -> None:
        await aclose_old_connections()
        await sync_to_async(Tag.objects.count)()
        await aclose_old_connections()

    monkeypatch.setitem(
        aclose_old_connections.__globals__, "close_old_connections", close_old_connections
    )
    run(main())
    assert told == [True, True, False], "for a thread that is not there none is started"
