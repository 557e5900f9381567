"""Defines fixtures of the backend's and the contract's tests: a site, books, observers."""

from __future__ import annotations

import asyncio
import functools
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from django.db import connection, connections

import pgbackend
from tests.support.link import Link

Site = Callable[[], AbstractAsyncContextManager[httpx.AsyncClient]]


@pytest.fixture
def site() -> Site:
    """Serve the project with uvicorn on the running loop; the blocks of the site have a client."""

    @asynccontextmanager
    async def serve() -> AsyncIterator[httpx.AsyncClient]:
        from proj.asgi import application

        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            config = uvicorn.Config(application, lifespan="off", log_level="warning")
            server = uvicorn.Server(config)
            server.capture_signals = _no_signals  # type: ignore[method-assign]
            serving = asyncio.create_task(server.serve(sockets=[sock]))
            try:
                async with httpx.AsyncClient(
                    base_url=f"http://127.0.0.1:{sock.getsockname()[1]}",
                    timeout=30,
                    limits=httpx.Limits(max_connections=None),
                    trust_env=False,
                ) as client:
                    yield client
            finally:
                server.should_exit = True
                await serving

    return serve


class _no_signals:  # noqa: N801
    """Keeps the server from taking the signals, which are the test runner's."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc_info: object) -> None:
        pass


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Record the names of started threads, and of the functions submitted to thread pools."""
    seen: list[str] = []
    start, submit = threading.Thread.start, ThreadPoolExecutor.submit

    def recorded_start(self: threading.Thread) -> None:
        seen.append(self.name)
        start(self)

    def recorded_submit(self: ThreadPoolExecutor, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        seen.append(f"{self._thread_name_prefix}: {args[0] if args else fn}")
        return submit(self, fn, *args, **kwargs)

    monkeypatch.setattr(threading.Thread, "start", recorded_start)
    monkeypatch.setattr(ThreadPoolExecutor, "submit", recorded_submit)
    yield seen


@pytest.fixture
def transactional_db(django_db_setup: None, django_db_blocker: Any) -> Iterator[None]:
    """Let tests commit, and empty only the tables that a test has written to.

    pytest-django's fixture of this name empties every table, and makes Django's own rows again;
    there are thousands of tests here.
    """
    with django_db_blocker.unblock():
        yield
        _empty_tables()


@pytest.fixture(autouse=True)
def fresh_tables(transactional_db: None) -> Iterator[None]:
    """Let each test commit."""
    yield


def _empty_tables() -> None:
    from django.contrib.contenttypes.models import ContentType

    written = " UNION ALL ".join(
        f"SELECT '{name}' WHERE EXISTS (SELECT FROM {name})" for name in _tables()
    )
    try:
        with connection.cursor() as cursor:
            cursor.execute(written)
            if names := [name for (name,) in cursor.fetchall()]:
                cursor.execute(f"TRUNCATE {', '.join(names)} CASCADE")
    finally:  # if this session has died, the next test gets another
        connection.close()
    ContentType.objects.clear_cache()


@functools.cache
def _tables() -> list[str]:
    """Return the tables of all models, except for those that Django has filled itself."""
    kept = {"django_content_type", "auth_permission"}
    return sorted(set(connection.introspection.django_table_names()) - kept)


@pytest.fixture
def make_books(transactional_db: None) -> Callable[..., list[Any]]:
    """Return a function that writes some books, each with an author and two tags."""
    from tests.library.models import Author, Book, Tag

    def make(count: int = 3) -> list[Any]:
        tags = [Tag.objects.create(name=name) for name in ("long", "new")]
        books = []
        for number in range(count):
            author = Author.objects.create(name=f"author {number}")
            book = Book.objects.create(title=f"book {number}", author=author, text="x" * 1000)
            book.tags.set(tags)
            books.append(book)
        return books

    return make


@pytest.fixture
def leases() -> Iterator[list[Any]]:
    """Record the leases and releases of all pools, in order."""
    events: list[Any] = []
    pgbackend.add_hook(events.append)
    yield events
    pgbackend.remove_hook(events.append)


@contextmanager
def settings_of_default(**changes: Any) -> Iterator[None]:
    """Change DATABASES['default'] in place; a pool made meanwhile is made from it.

    In a run through a pooler (``pytest --pooler``), the options of that stay.
    """
    settings_dict = connections.settings["default"]
    before = dict(settings_dict)
    if "OPTIONS" in changes and "pooler" in before["OPTIONS"]:
        names = ("gssencmode", "listen", "pooler", "sslmode")
        stay = {name: before["OPTIONS"][name] for name in names if name in before["OPTIONS"]}
        changes["OPTIONS"] = {**stay, **changes["OPTIONS"]}
    # A primary's name is written into TEST: of a copy, so that it goes with the changes.
    settings_dict.update({"TEST": dict(before["TEST"]), **changes})
    try:
        yield
    finally:
        settings_dict.clear()
        settings_dict.update(before)


@contextmanager
def pool_of_default(**options: Any) -> Iterator[None]:
    """Change options of the pool of 'default', for loops that start inside the block."""
    given = connections.settings["default"]["OPTIONS"]
    with settings_of_default(OPTIONS={**given, "pool": {**given["pool"], **options}}):
        yield


@contextmanager
def by_link(link: Link, **options: Any) -> Iterator[None]:
    """Lead 'default' through `link`; change `options` of its OPTIONS."""
    given = connections.settings["default"]["OPTIONS"]
    plain = {"sslmode": "disable", "gssencmode": "disable"}
    with settings_of_default(
        HOST="127.0.0.1", PORT=str(link.port), OPTIONS={**given, **plain, **options}
    ):
        yield
