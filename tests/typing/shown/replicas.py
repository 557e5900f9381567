"""The names of docs/replicas.md, as a project uses them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, assert_type

from django.http import HttpRequest, HttpResponse

import pgbackend
from pgbackend import routers
from pgbackend.routers import ReadYourWritesMiddleware, ReplicaRouter


class Router(ReplicaRouter):
    max_lag = 3.0

    def primary_for(self, model: Any, **hints: Any) -> str | None:
        return "stock" if model.__name__ == "Stock" else super().primary_for(model, **hints)


class Middleware(ReadYourWritesMiddleware):
    cookie_name = "writes"
    max_age = 30


ROUTERS = [Router(max_lag=2), ReplicaRouter()]


def on_primary() -> None:
    with pgbackend.on_primary(), pgbackend.on_primary("other") as block:
        assert_type(block, pgbackend.on_primary)


async def on_primary_of_a_task() -> None:
    async with pgbackend.on_primary(using="other"):
        pass


@pgbackend.on_primary()
def decorated(request: HttpRequest) -> HttpResponse:
    return HttpResponse()


@pgbackend.on_primary()
async def decorated_coroutine(number: int) -> int:
    return number


@pgbackend.on_primary()
def decorated_generator() -> Iterator[int]:
    yield 1


async def tokens() -> None:
    assert_type(decorated(HttpRequest()), HttpResponse)
    assert_type(await decorated_coroutine(1), int)
    assert_type([*decorated_generator()], list[int])
    made = routers.token()
    assert_type(made, str | None)
    with routers.use_token(made, max_age=10):
        pass
    for state in routers.replica_states():
        assert_type(state.why_not, str | None)
