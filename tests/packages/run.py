"""Plays the matrix of one project: ``python -m tests.packages.run with_crum``.

The output is a JSON object: for each cell (`sync middleware, async view, gather`) the number of its
requests that were answered wrongly, and the first wrong answer.

All requests of a cell wait for each other in the view: each has passed the middleware before any of
them goes on.
"""

import asyncio
import copy
import importlib
import itertools
import json
import logging
import os
import sys
import threading
import traceback

from asgiref.sync import async_to_sync, sync_to_async
from django.core.handlers.asgi import ASGIHandler
from django.http import JsonResponse
from django.test import override_settings
from django.urls import path

from tests.packages.project import LAST, STOCK, WHO, create_tables, create_users, database

REQUESTS = 20
KINDS = ["sync", "async"]
VIEWS = os.environ.get("PACKAGES_VIEWS", "sync async").split()
WAYS = ["alone", "gather", "TaskGroup"]


# --- The views ------------------------------------------------------------------------------------


class Meeting:
    """Makes the requests of a cell wait for each other."""

    def __init__(self, number):
        self.barrier = threading.Barrier(number)
        self.missing = number
        self.all_here = asyncio.Event()

    def wait(self):
        self.barrier.wait(20)

    async def await_(self):
        self.missing -= 1
        if not self.missing:
            self.all_here.set()
        async with asyncio.timeout(20):
            await self.all_here.wait()


class _Playing:
    """Holds the project that is played, and the meeting of the running cell's requests."""

    project = None
    meeting = None


def sync_view(request, way):
    _Playing.meeting.wait()
    who = request.headers["who"]
    if way == "alone":
        seen = [_Playing.project.work(request, who, 0)]
    else:
        seen = async_to_sync(children)(request, who, way)
    seen.append(_Playing.project.work(request, who, LAST))
    return JsonResponse(seen, safe=False)


async def async_view(request, way):
    await _Playing.meeting.await_()
    who = request.headers["who"]
    seen = await children(request, who, way)
    seen.append(await _Playing.project.awork(request, who, LAST))
    return JsonResponse(seen, safe=False)


async def children(request, who, way):
    """Return the results of the work, done alone or by three tasks: two async, one in a thread."""
    awork, work = _Playing.project.awork, sync_to_async(_Playing.project.work)
    if STOCK and request.path.startswith("/sync/"):
        awork = work  # the reference is sync code, in the request's thread
    if way == "alone":
        return [await awork(request, who, 0)]
    coroutines = [
        awork(copy.copy(request), who, 0),
        work(copy.copy(request), who, 1),
        awork(copy.copy(request), who, 2),
    ]
    if way == "gather":
        return [*await asyncio.gather(*coroutines)]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(each) for each in coroutines]
    return [task.result() for task in tasks]


urlpatterns = [path("sync/<way>", sync_view), path("async/<way>", async_view)]


# --- The requests ---------------------------------------------------------------------------------


async def ask(application, path, headers, left=None):
    """Send one request as an ASGI server does; return what the view has seen.

    Returns None if there is no answer, because the client has left: it does when `left` is set.
    """
    left = left or asyncio.Event()
    requests = [{"type": "http.request", "body": b"", "more_body": False}]
    body = []

    async def receive():
        if requests:
            return requests.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        if message["type"] == "http.response.start":
            assert message["status"] == 200, message
        else:
            body.append(message["body"])

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "path": path,
        "query_string": b"",
        "headers": [(name.encode(), text.encode()) for name, text in headers.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    await application(scope, receive, send)
    return json.loads(b"".join(body)) if body else None


async def one_cell(middleware, view, way):
    """Send the requests of one cell at once; return the fault of each, or None."""
    _Playing.meeting = Meeting(REQUESTS)
    with override_settings(MIDDLEWARE=_Playing.project.project.middleware_among(middleware)):
        application = ASGIHandler()
    users = list(itertools.islice(itertools.cycle(WHO), REQUESTS))
    answers = await asyncio.gather(
        *(
            asyncio.create_task(
                ask(application, f"/{view}/{way}", {"who": who, "host": f"{who}.test"})
            )
            for who in users
        ),
        return_exceptions=True,
    )
    return [what_is_wrong(who, answer) for who, answer in zip(users, answers, strict=True)]


def what_is_wrong(who, answer):
    if isinstance(answer, BaseException):
        frame = traceback.extract_tb(answer.__traceback__)[-1]
        return f"{type(answer).__name__}: {answer} ({frame.name}:{frame.lineno})"[:400]
    return None if {*answer} == {who} else f"{who} sees {answer}"


def play():
    cells = {}
    for middleware, view, way in itertools.product(KINDS, VIEWS, WAYS):
        play_cell = getattr(_Playing.project, "one_cell", one_cell)
        wrong = [each for each in asyncio.run(play_cell(middleware, view, way)) if each]
        wrong += getattr(_Playing.project, "wrong_rows", list)()
        cells[f"{middleware} middleware, {view} view, {way}"] = {
            "wrong": len(wrong),
            "first": wrong[0] if wrong else None,
        }
    return cells


def main():
    # Errors are answers here; the log need not repeat them.
    logging.disable(logging.CRITICAL)
    project = _Playing.project = importlib.import_module(f"tests.packages.{sys.argv[1]}")
    if hasattr(project, "main"):
        project.main()
        return
    with database():
        getattr(project, "create_tables", create_tables)()
        create_users()
        getattr(project, "create_rows", int)()
        from django.db import connections

        connections.close_all()
        print(json.dumps({**project.project.told(), "cells": play()}))
        connections.close_all()


if __name__ == "__main__":
    # The module of the URLs is this one, and not another copy of it.
    sys.modules["tests.packages.run"] = sys.modules["__main__"]
    main()
