"""Tests an existing project that switches by ENGINE alone; its async views use plain QuerySets."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.urls import reverse

import pgbackend
from tests.conftest import Runner
from tests.library import hashers
from tests.library.models import Author, Book, Entry, Note, Tag
from tests.support.fixtures import Site, pool_of_default


def test_lazy_relations_deferred_fields_forms_templates_and_sessions_work(
    run: Runner, site: Site, make_books: Callable[..., list[Book]], threads: list[str]
) -> None:
    book, other, _ = make_books()
    other.author = book.author
    other.save()
    User.objects.create_user("ada")

    async def main() -> None:
        async with site() as client:
            page = (await client.get("/library/books/")).text
            assert "book 0 by author 0: long new" in page
            later = (await client.get("/library/books/later/")).text
            assert "book 1 by author 0" in later
            detail = (await client.get(f"/library/books/{book.pk}/")).json()
            assert detail == {
                "title": "book 0",
                "author": "author 0",
                "tags": ["long", "new"],
                "text": 1000,
                "siblings": 1,
            }
            assert (await client.get(f"/library/authors/{book.author.pk}/")).text == "author 0"
            assert (await client.get("/library/from-middleware/")).text == "2 tags"
            assert (await client.get("/library/pause/")).json() == {"same": True}
            streamed = (await client.get("/library/stream/")).text
            assert streamed.splitlines()[2] == "book 2 by author 2"

    run(main())
    assert threads == []


def test_a_form_a_login_and_a_session_work_without_a_thread(
    run: Runner, site: Site, make_books: Callable[..., list[Book]], threads: list[str]
) -> None:
    book = make_books(1)[0]
    tag = Tag.objects.get(name="new")
    User.objects.create_user("ada")

    async def main() -> None:
        async with site() as client:
            form = await client.get("/library/books/new/")
            assert "author 0" in form.text
            client.headers["X-CSRFToken"] = client.cookies.get("csrftoken", "")
            await _sign_in(client)
            assert (await client.get("/library/who/")).text == "ada"
            data = {"title": "made", "author": str(book.author.pk), "tags": str(tag.pk)}
            made = await client.post("/library/books/new/", data=data)
            assert made.status_code == 200, made.text
            saved = await Book.objects.aget(pk=made.json()["pk"])
            assert saved.title == "made"
            assert [t.name async for t in saved.tags.all()] == ["new"]
            bad = await client.post("/library/books/new/", data={"title": ""})
            assert bad.status_code == 400

    run(main())
    assert threads == []


async def _sign_in(client: Any) -> None:
    login = await client.get(reverse("login"))
    token = client.cookies.get("csrftoken")
    assert login.status_code == 200 and token
    client.headers["X-CSRFToken"] = token
    signed_in = await client.post("/library/sign-in/", data={"name": "ada"})
    assert signed_in.text == "ok", signed_in.text
    client.headers["X-CSRFToken"] = client.cookies.get("csrftoken")


def test_atomic_rolls_back_in_an_async_view(run: Runner, site: Site, threads: list[str]) -> None:
    async def main() -> None:
        async with site() as client:
            answer = (await client.get("/library/give-back/")).json()
            assert answer == {"authors": ["kept"]}

    run(main())
    assert not Tag.objects.filter(name="lost").exists()
    # The receiver of a signal wrote in the transaction of the sender, and was rolled back with it.
    assert [entry.text for entry in Entry.objects.all()] == ["new kept"]
    assert threads == []


@pytest.mark.slow
def test_iterator_reads_50_000_rows_in_bounded_memory(
    run_once: Runner, site: Site, threads: list[str]
) -> None:
    author = Author.objects.create(name="prolific")
    Book.objects.bulk_create(
        Book(title=f"book {n}" + "x" * 60, author=author) for n in range(50_000)
    )

    async def main() -> None:
        async with site() as client:
            await client.get("/library/who/")
            before = _reset_peak()
            assert (await client.get("/library/walk/")).json() == {"rows": 50_000}
            # All rows at once would take some 45 MB more.
            assert _peak() - before < 12_000, "kB"

    run_once(main())
    assert Tag.objects.count() == 5, "statements in the loop's body share its connection"
    assert threads == []


def _peak() -> int:
    """Return the largest memory of this process since `_reset_peak()`, in kB."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def _reset_peak() -> int:
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")
    return _peak()


def test_every_a_method_runs_on_the_loop(
    run: Runner, make_books: Callable[..., list[Book]], threads: list[str]
) -> None:
    make_books()

    async def main() -> None:
        await _querysets()
        await _instances()
        await _related_managers()
        await _sessions_and_auth()

    run(main())
    assert threads == []


async def _querysets() -> None:
    from django.db.models import Count, aprefetch_related_objects
    from django.shortcuts import aget_list_or_404, aget_object_or_404

    books = Book.objects.order_by("pk")
    first = await books.afirst()
    assert first is not None
    assert first == await books.aget(pk=first.pk) == await books.aearliest("pk")
    assert await books.acount() == 3
    assert await books.aexists()
    assert await books.acontains(first)
    assert (await books.alast()) == (await books.alatest("pk"))
    assert (await books.aaggregate(n=Count("pk"))) == {"n": 3}
    assert list(await books.ain_bulk([first.pk])) == [first.pk]
    assert "Scan" in await books.aexplain() or "Sort" in await books.aexplain()
    assert [b.title async for b in books] == [f"book {n}" for n in range(3)]
    assert [b.title async for b in books.prefetch_related("tags").aiterator(chunk_size=2)]
    assert len([b async for b in Book.objects.raw("SELECT * FROM library_book")]) == 3
    assert await aget_object_or_404(Book, pk=first.pk) == first
    assert len(await aget_list_or_404(Book)) == 3
    await aprefetch_related_objects([first], "tags")
    made = await Tag.objects.acreate(name="made")
    assert (await Tag.objects.aget_or_create(name="made")) == (made, False)
    assert (await Tag.objects.aupdate_or_create(name="other"))[1]
    several = await Tag.objects.abulk_create([Tag(name="b1"), Tag(name="b2")])
    several[0].name = "b0"
    assert await Tag.objects.abulk_update(several, ["name"]) == 2
    assert await Tag.objects.filter(name="b0").aupdate(name="b9") == 1
    assert (await Tag.objects.filter(name__startswith="b").adelete())[0] == 2


async def _instances() -> None:
    author = Author(name="new one")
    await author.asave()
    assert await Entry.objects.filter(text="new new one").aexists(), "signals are sent"
    book = await Book.objects.acreate(title="its", author=author)
    assert book.saves == 1, "save() overrides are called"
    await book.asave(update_fields=["title"])
    await book.arefresh_from_db()
    assert book.saves == 2
    await book.adelete()
    await author.adelete()


async def _related_managers() -> None:
    author = await Author.objects.afirst()
    assert author is not None
    book = await author.books.acreate(title="related")
    assert (await author.books.aget_or_create(title="related"))[1] is False
    assert (await author.books.aupdate_or_create(title="related"))[1] is False
    other = await Author.objects.alast()
    await other.books.aadd(book)
    await other.books.aset([book])
    tag = await Tag.objects.acreate(name="rel")
    await book.tags.aadd(tag)
    await book.tags.aset([tag])
    await book.tags.aremove(tag)
    await book.tags.acreate(name="through")
    await book.tags.aclear()
    note = await book.notes.acreate(text="generic")
    await book.notes.aset([note])
    await book.notes.aremove(note)
    assert not await Note.objects.aexists()


async def _sessions_and_auth() -> None:
    from django.contrib.auth import aget_user
    from django.contrib.sessions.backends.db import SessionStore
    from django.http import HttpRequest

    session = SessionStore()
    await session.aset("a", 1)
    await session.asave()
    assert await SessionStore(session.session_key).aget("a") == 1
    assert await session.aexists(session.session_key)
    await session.acycle_key()
    await session.aflush()
    user = await User.objects.acreate_user("bob", password="tested")
    assert await user.ahas_perm("library.add_book") is False
    request = HttpRequest()
    request.session = session
    assert (await aget_user(request)).is_anonymous


def test_the_async_test_client_needs_no_thread(
    run: Runner, async_client: Any, make_books: Callable[..., list[Book]], threads: list[str]
) -> None:
    make_books(1)

    async def main() -> None:
        response = await async_client.get("/library/books/")
        assert b"book 0" in response.content

    run(main())
    assert threads == []


def test_sync_views_keep_their_thread(
    run: Runner, site: Site, make_books: Callable[..., list[Book]], threads: list[str]
) -> None:
    make_books(2)

    async def main() -> None:
        async with site() as client:
            assert (await client.get("/library/sync/")).text == "2"

    run(main())
    assert threads, "a view that may block must not run on the loop"


@pytest.mark.slow
def test_hundreds_of_requests_share_four_connections(
    run_once: Runner, site: Site, make_books: Callable[..., list[Book]], threads: list[str]
) -> None:
    make_books(2)

    async def main() -> None:
        async with site() as client:
            answers = await asyncio.gather(
                *(client.get("/library/pause/?seconds=0.5") for _ in range(300))
            )
            assert all(answer.json() == {"same": True} for answer in answers)
            (pool,) = pgbackend.statistics()
            assert pool.size <= pool.max_size == 4
            assert pool.leased == pool.waiting == 0

    with pool_of_default(max_size=4, timeout=20):  # reached only on a busy machine
        run_once(main())
    assert threads == []


@pytest.mark.parametrize("path", ["/library/books/99999/", "/nowhere/"])
def test_errors_are_answered_without_a_thread(
    run_once: Runner, site: Site, path: str, threads: list[str]
) -> None:
    async def main() -> None:
        async with site() as client:
            assert (await client.get(path)).status_code == 404

    run_once(main())
    assert threads == []


@pytest.mark.parametrize("page", ["login", "admin:login"])
def test_passwords_are_hashed_in_a_thread(
    run_once: Runner, site: Site, page: str, settings: Any
) -> None:
    """Hashing is work, not waiting: on the loop it would stop every other request."""
    settings.PASSWORD_HASHERS = ["tests.library.hashers.TellingHasher"]
    User.objects.create_superuser("ada", password="tested")
    hashers.threads.clear()

    async def main() -> None:
        async with site() as client:
            url = reverse(page)
            await client.get(url)
            client.headers["X-CSRFToken"] = client.cookies["csrftoken"]
            data = {"username": "ada", "password": "tested"}
            assert (await client.post(url, data=data)).status_code == 302

    run_once(main())
    assert hashers.threads
    assert threading.main_thread().name not in hashers.threads
