"""Serves requests with a patch on a function that Django's handler, or a signal of it, calls.

Run as a program, it prints how often Django's own handler calls each function: a JSON object.
"""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import ExitStack
from typing import Any
from unittest import mock

import django
from django.conf import settings
from django.core.handlers.asgi import ASGIHandler
from django.core.signals import request_finished, request_started
from django.http import HttpRequest, HttpResponse
from django.urls import path

from pgbackend import embedded
from pgbackend.fast.fingerprints import find
from pgbackend.fast.registry import SHORTCUTS
from tests.support.counting import Counting
from tests.support.exchange import Exchange

_CALLED_BY = ("django.core.handlers.asgi:", "django.dispatch.dispatcher:")
CALLED = sorted(
    name
    for name in {name for each in SHORTCUTS.values() for name in each.bypasses}
    if name.startswith(_CALLED_BY) and find(name) is not None
)


async def answer(request: HttpRequest) -> HttpResponse:
    return HttpResponse("answered")


async def calls(name: str, on: str) -> int:
    """Return how often one request calls a function, patched on its class or on each object."""
    handler = ASGIHandler()
    if on != "object":
        with Counting(name, "function" if on == "class" else "proxy") as counting:
            await _serve(handler)
        return counting.calls
    method = name.rpartition(".")[2]
    objects: list[Any] = [handler]
    if ":Signal." in name:
        objects = [request_started, request_finished]
    with ExitStack() as patches:
        mocks = [
            patches.enter_context(mock.patch.object(each, method, _counting(each, method)))
            for each in objects
        ]
        await _serve(handler)
    return sum(each.call_count for each in mocks)


def _counting(owner: Any, name: str) -> Any:
    return mock.Mock(side_effect=getattr(owner, name))


async def _serve(handler: Any) -> None:
    exchange = Exchange()
    await handler(exchange.scope, exchange.receive, exchange.send)
    assert exchange.content == b"answered"


class _Urls:
    urlpatterns = [path("", answer)]


def main() -> None:
    server = embedded.database_settings(os.environ["DATABASE_URL"])
    settings.configure(
        DATABASES={"default": {**server, "ENGINE": "django.db.backends.postgresql"}},
        MIDDLEWARE=[],
        ROOT_URLCONF=_Urls,
    )
    django.setup()
    counts = {f"{name} {on}": asyncio.run(calls(name, on)) for name in CALLED for on in _WHERE}
    print(json.dumps(counts))


_WHERE = ("class", "class, by a proxy", "object")

if __name__ == "__main__":
    main()
