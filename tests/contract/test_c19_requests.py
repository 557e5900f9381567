"""Tests C19: requests of the whole stack run beside each other, and each has its own values."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.db import connection
from django.http import HttpRequest, HttpResponse

import pgbackend
from tests.conftest import Runner
from tests.contract.test_c19_whole_stack import KINDS, Urls
from tests.library.models import Author
from tests.support.exchange import Exchange

HERE = __name__

of_request = threading.local()
of_context: contextvars.ContextVar[str] = contextvars.ContextVar("of_context", default="nobody")


def names_the_user(get_response: Any) -> Any:
    def middleware(request: Any) -> Any:
        assert not hasattr(of_request, "user")
        assert of_context.get() == "nobody"
        of_request.user = connection.user = request.GET["user"]
        of_context.set(request.GET["user"])
        return get_response(request)

    return middleware


def who(request: HttpRequest) -> HttpResponse:
    """Tell the user three times, with other requests in between."""
    name = request.GET["user"]
    for _ in range(3):
        Author.objects.create(name=name)
        async_to_sync(asyncio.sleep)(0)
        assert (of_request.user, connection.user, of_context.get()) == (name, name, name)
    return HttpResponse(name)


async def who_async(request: HttpRequest) -> HttpResponse:
    return who(request)


@pytest.mark.parametrize("chain", [(), ("async",)])
@pytest.mark.parametrize("view", [who, who_async])
def test_each_of_many_requests_has_its_own_values(
    settings: Any, run: Runner, leases: list[Any], view: Any, chain: tuple[str, ...]
) -> None:
    settings.MIDDLEWARE = [f"{HERE}.names_the_user", *(KINDS[kind] for kind in chain)]
    settings.ROOT_URLCONF = Urls(view)

    async def main() -> None:
        application = pgbackend.get_asgi_application()
        exchanges = [Exchange(application=application) for _ in range(40)]
        for number, exchange in enumerate(exchanges):
            exchange.scope["query_string"] = f"user=u{number}".encode()
        await asyncio.gather(*(exchange.serve() for exchange in exchanges))
        assert [each.content.decode() for each in exchanges] == [f"u{n}" for n in range(40)]
        assert not hasattr(of_request, "user")

    run(main())
    assert Author.objects.count() == 120
    leased = [event for event in leases if type(event).__name__ == "Leased"]
    assert len(leased) >= 120, "each statement, or its transaction, has a lease of its own"


def declares(get_response: Any) -> Any:
    def middleware(request: Any) -> Any:
        with pgbackend.session(**{"app.tenant": request.GET["user"]}):
            return get_response(request)

    return middleware


def tenant_of(request: HttpRequest) -> HttpResponse:
    """Tell the tenant of three statements, with other requests in between."""
    found = set()
    for _ in range(3):
        with connection.cursor() as cursor:
            cursor.execute("SELECT current_setting('app.tenant', true)")
            found.update(*cursor.fetchall())
        async_to_sync(asyncio.sleep)(0)
    return HttpResponse(",".join(found))


def test_a_session_that_sync_middleware_declares_holds_for_its_request_only(
    settings: Any, run: Runner
) -> None:
    settings.MIDDLEWARE = [f"{HERE}.declares"]
    settings.ROOT_URLCONF = Urls(tenant_of)

    async def main() -> None:
        application = pgbackend.get_asgi_application()
        exchanges = [Exchange(application=application) for _ in range(40)]
        for number, exchange in enumerate(exchanges):
            exchange.scope["query_string"] = f"user=u{number}".encode()
        await asyncio.gather(*(exchange.serve() for exchange in exchanges))
        assert [each.content.decode() for each in exchanges] == [f"u{n}" for n in range(40)]

    run(main())


def test_requests_wait_for_a_statement_each_and_not_for_one_another(
    settings: Any, run: Runner
) -> None:
    """Sixteen sync views sleep in the server over a pool of four, all in about four turns."""
    settings.MIDDLEWARE = []

    def view(request: HttpRequest) -> HttpResponse:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_sleep(0.05)")
        return HttpResponse()

    settings.ROOT_URLCONF = Urls(view)

    async def main() -> float:
        application = pgbackend.get_asgi_application()
        time = asyncio.get_running_loop().time
        began = time()
        async with asyncio.TaskGroup() as group:
            for _ in range(16):
                group.create_task(Exchange(application=application).serve())
        return time() - began

    assert run(main()) < 16 * 0.05
