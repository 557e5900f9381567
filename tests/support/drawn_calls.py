"""Records the calls that three requests make: ``drawn_calls.py`` prints them as a JSON object.

The requests are those of docs/drawings.md: a ``get()``, an ``atomic()`` with a ``save()``, and a
statement whose client hangs up. Each call is printed with the participant of the drawings that it
belongs to, its name, and the participants that are below it on the stack. A file of pgbackend is a
participant; Django, psycopg and asyncio are one each.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import django
import psycopg
import psycopg_pool
from django.conf import settings
from django.http import HttpRequest, HttpResponse
from django.urls import path

import pgbackend
from pgbackend import embedded
from tests.support.exchange import Exchange

#: The participant, the name, and the participants below.
Call = tuple[str, str, list[str]]

#: The directories whose files are one participant together.
PARTICIPANTS = {
    Path(package.__file__).parent: name
    for package, name in (
        (asyncio, "event loop"),
        (django, "Django"),
        (psycopg, "psycopg"),
        (psycopg_pool, "psycopg"),
    )
}
ENGINE = Path(pgbackend.__file__).parent
#: The requests that are drawn, in the order of the page.
DRAWN = ("get", "save", "cancelled")
#: The function in which a statement is waited for.
WATCHED = ("driver/socket_watch.py", "Watch.wait")


def configure() -> None:
    database = embedded.database_settings(os.environ["DATABASE_URL"])
    settings.configure(
        DATABASES={"default": {**database, "ENGINE": "pgbackend"}},
        MIDDLEWARE=[],
        ROOT_URLCONF=Urls,
        USE_TZ=True,
    )
    django.setup()


class Urls:
    urlpatterns: list[Any] = []


@contextmanager
def author() -> Iterator[Any]:
    """Make a table with one row; give its model."""
    from django.db import connection, models

    class Author(models.Model):
        name = models.CharField(max_length=100)

        class Meta:
            app_label = "drawn"
            db_table = "drawn_author"

        def __str__(self) -> str:
            return self.name

    with connection.schema_editor() as editor:
        editor.execute("DROP TABLE IF EXISTS drawn_author")
        editor.create_model(Author)
    Author.objects.create(name="Ada")
    yield Author
    with connection.schema_editor() as editor:
        editor.delete_model(Author)


@cache
def participant(filename: str) -> str | None:
    """Return the participant whose code is in a file."""
    file = Path(filename)
    if file.is_relative_to(ENGINE):
        return file.relative_to(ENGINE).as_posix()
    return next((name for each, name in PARTICIPANTS.items() if file.is_relative_to(each)), None)


class Recorder:
    """Records the calls in one thread, from `start()` to `stop()`."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.watched = False

    def start(self) -> None:
        sys.setprofile(self._look)

    def stop(self) -> None:
        sys.setprofile(None)

    def _look(self, frame: FrameType, event: str, arg: object) -> None:
        here = participant(frame.f_code.co_filename)
        if event != "call" or here is None or here == "event loop":
            return
        name = frame.f_code.co_qualname.replace(".<locals>", "")
        below, outer = set(), frame.f_back
        while outer is not None:
            below.add(participant(outer.f_code.co_filename))
            outer = outer.f_back  # None at the first frame of a greenlet
        self.calls.append((here, name, sorted(below - {None})))
        self.watched = self.watched or (here, name) == WATCHED


def views(model: Any) -> dict[str, Callable[[HttpRequest], Awaitable[HttpResponse]]]:
    """Return the views of the drawings by name; they use the author of `model`."""
    from django.db import connection, transaction

    author = model.objects.get(pk=1)

    async def get(request: HttpRequest) -> HttpResponse:
        return HttpResponse(model.objects.get(pk=1).name)

    async def save(request: HttpRequest) -> HttpResponse:
        with transaction.atomic():
            author.save()
        return HttpResponse("saved")

    async def cancelled(request: HttpRequest) -> HttpResponse:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_sleep(60)")
        return HttpResponse("slept")

    return {"get": get, "save": save, "cancelled": cancelled}


async def serve(name: str, *, hang_up: bool) -> list[Call]:
    """Return the calls of a request; if `hang_up` is True, its client goes during a statement."""
    exchange, recorder = Exchange(), Recorder()
    exchange.scope["path"] = f"/{name}"
    recorder.start()
    try:
        serving = exchange.start()
        while hang_up and not recorder.watched:
            await asyncio.sleep(0.001)
        if hang_up:
            exchange.hang_up()
        await serving
        while not all(each.idle == each.size for each in pgbackend.statistics()):
            await asyncio.sleep(0.001)
    finally:
        recorder.stop()
    assert bool(exchange.content) is not hang_up
    return recorder.calls


async def record() -> dict[str, list[Call]]:
    """Return the calls of each drawing, on a connection that an earlier request has opened."""
    async with asyncio.timeout(60):
        await serve("get", hang_up=False)
        return {name: await serve(name, hang_up=name == "cancelled") for name in DRAWN}


def main() -> None:
    configure()
    with author() as model:
        Urls.urlpatterns = [path(name, view) for name, view in views(model).items()]
        print(json.dumps(asyncio.run(record())))


if __name__ == "__main__":
    main()
