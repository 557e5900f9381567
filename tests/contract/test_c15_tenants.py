"""Tests C15: fifty tenants by `session(search_path=...)`, over a pool of five connections."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from asgiref.sync import iscoroutinefunction, sync_to_async
from django.db import ProgrammingError, connection, connections, transaction
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.test import AsyncClient, Client
from django.urls import path
from django.utils.decorators import sync_and_async_middleware

import pgbackend
from pgbackend import aio
from tests.conftest import Runner
from tests.library.models import Author
from tests.support.fixtures import settings_of_default
from tests.support.messages import messages
from tests.support.tenants import OUTSIDE, make_schema, tenant

TENANTS = [f"tenant_{number}" for number in range(50)]


@pytest.fixture
def fifty(transactional_db: Any) -> Iterator[None]:
    for name in TENANTS:
        make_schema(name, row=name)
    Author.objects.create(id=1, name=OUTSIDE)
    yield
    with connection.cursor() as cursor:
        for name in TENANTS:
            cursor.execute(f"DROP SCHEMA {name} CASCADE")


def serve(name: str, number: int) -> list[str]:
    """Serve a request of a tenant; return the names in the rows that it has seen and changed."""
    seen = [tenant()]
    with transaction.atomic():
        Author.objects.create(id=number + 2, name=name)
        seen += Author.objects.filter(id__in=(1, number + 2)).values_list("name", flat=True)
        if number % 3 == 0:
            transaction.set_rollback(True)
    seen += [each.name for each in Author.objects.iterator(chunk_size=2)]
    Author.objects.filter(id=number + 2).delete()
    return seen


def options(size: int) -> dict[str, Any]:
    given = connections.settings["default"]["OPTIONS"]
    return {**given, "pool": {"min_size": size, "max_size": size, "timeout": 60}}


@pytest.mark.usefixtures("fifty")
@pytest.mark.parametrize("requests", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_tenants_under_load_see_their_own_rows_only(
    run: Runner, request: pytest.FixtureRequest, requests: int
) -> None:
    rng = random.Random(request.config.option.seed)
    seen: Counter[str] = Counter()

    async def request_of(name: str, number: int) -> None:
        async with pgbackend.session(search_path=[name, "public"]):
            found = await aio.run(serve, name, number)
        assert found
        seen[name if set(found) == {name} else "another's"] += 1
        if number % 10 == 0:  # a request without a tenant
            seen[await aio.run(tenant)] += 1

    async def main() -> None:
        tasks = [
            asyncio.create_task(request_of(rng.choice(TENANTS), number))
            for number in range(requests)
        ]
        cancelled = rng.sample(tasks, requests // 5)
        for task in cancelled:
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
            await _until_begun(rng)
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        errors = [each for each in results if isinstance(each, Exception)]
        assert not errors, errors[:3]
        seen["cancelled"] = sum(isinstance(each, asyncio.CancelledError) for each in results)

    async def _until_begun(rng: random.Random) -> None:
        await asyncio.sleep(rng.random() / 500)

    with settings_of_default(OPTIONS=options(5)):
        run(main(), timeout=110)
    assert seen["another's"] == 0
    assert seen["cancelled"] > requests // 10
    assert sum(seen[name] for name in TENANTS) >= requests - requests // 5
    assert seen.keys() <= {*TENANTS, OUTSIDE, "cancelled"}
    with connection.cursor() as cursor:
        for name in TENANTS:
            cursor.execute(f"SELECT DISTINCT name FROM {name}.library_author")
            assert cursor.fetchall() == [(name,)]


@pytest.mark.usefixtures("fifty")
def test_tenants_cost_no_message(run: Runner) -> None:
    def load(declare: Callable[[str], Any]) -> int:
        async def main() -> None:
            for number, name in enumerate(TENANTS * 2):
                async with declare(name):
                    await aio.run(serve, "x", number)

        with settings_of_default(OPTIONS=options(1)), messages() as sent:
            run(main())
        return len(sent)

    with_tenants = load(lambda name: pgbackend.session(search_path=[name, "public"]))
    without = load(lambda name: pgbackend.session())
    # The DECLARE of an iterator() shares no message, but comes after a statement of its tenant.
    assert with_tenants == without


# --- As docs/session.md shows it ---


@sync_and_async_middleware
def tenant_middleware(get_response: Any) -> Any:
    if iscoroutinefunction(get_response):

        async def middleware(request: HttpRequest) -> Any:
            async with pgbackend.session(search_path=[request.headers["tenant"], "public"]):
                return await get_response(request)
    else:

        def middleware(request: HttpRequest) -> Any:
            with pgbackend.session(search_path=[request.headers["tenant"], "public"]):
                return get_response(request)

    return middleware


def sync_view(request: HttpRequest) -> HttpResponse:
    return HttpResponse(in_thread())


async def async_view(request: HttpRequest) -> HttpResponse:
    names = await asyncio.gather(aio.run(tenant), sync_to_async(in_thread)())
    return HttpResponse("".join({tenant(), *names}))


def streaming_view(request: HttpRequest) -> StreamingHttpResponse:
    @pgbackend.session(search_path=[request.headers["tenant"], "public"])
    def rows() -> Iterator[str]:
        for author in Author.objects.iterator():
            yield author.name

    return StreamingHttpResponse(rows())


async def async_streaming_view(request: HttpRequest) -> StreamingHttpResponse:
    @pgbackend.session(search_path=[request.headers["tenant"], "public"])
    async def rows() -> AsyncIterator[str]:
        async for author in Author.objects.aiterator():
            yield author.name

    return StreamingHttpResponse(rows())


def in_thread() -> str:
    try:
        return tenant()
    finally:
        connection.close()


urlpatterns = [
    path("sync/", sync_view),
    path("async/", async_view),
    path("rows/", streaming_view),
    path("async-rows/", async_streaming_view),
]


@pytest.mark.usefixtures("tenants", "threads")
@pytest.mark.parametrize("others", [[], ["django.middleware.common.CommonMiddleware"]])
def test_a_middleware_of_ten_lines_serves_each_tenant(
    run: Runner, settings: Any, others: list[str]
) -> None:
    settings.ROOT_URLCONF = __name__
    settings.MIDDLEWARE = [*others, f"{__name__}.tenant_middleware", *others]
    names = ["one", "two", "three"] * 3

    async def get(url: str, name: str) -> str:
        response: Any = await AsyncClient().get(url, headers={"tenant": name})
        if not response.streaming:
            return response.content.decode()
        return b"".join([part async for part in response]).decode()

    async def main(url: str) -> Any:
        return await asyncio.gather(*(get(url, name) for name in names))

    for url in ("/sync/", "/async/", "/async-rows/"):
        assert run(main(url)) == names
    for url in ("/sync/", "/async/", "/rows/"):
        for name in names[:3]:
            response: Any = Client().get(url, headers={"tenant": name})
            assert b"".join(response).decode() == name
    assert tenant() == OUTSIDE


POLICY = """
CREATE ROLE reader;
GRANT SELECT ON library_author TO reader;
ALTER TABLE library_author ENABLE ROW LEVEL SECURITY;
CREATE POLICY tenant ON library_author USING (
    id = NULLIF(current_setting('app.tenant', true), '')::int
);
"""
NO_POLICY = """
DROP POLICY tenant ON library_author;
ALTER TABLE library_author DISABLE ROW LEVEL SECURITY;
REVOKE ALL ON library_author FROM reader;
DROP ROLE reader;
"""


@pytest.fixture
def policy(transactional_db: Any) -> Iterator[None]:
    Author.objects.bulk_create(Author(id=number, name=str(number)) for number in (1, 2, 3))
    with connection.cursor() as cursor:
        cursor.execute(POLICY)
        yield
        cursor.execute(NO_POLICY)


@pytest.mark.usefixtures("policy")
def test_row_level_security_shows_the_rows_of_the_tenant(do: Any) -> None:
    def names() -> list[str]:
        return [each.name for each in Author.objects.order_by("id")]

    def body() -> list[list[str]]:
        seen = []
        with pgbackend.session(role="reader"):
            seen.append(names())
            for number in (1, 2):
                with pgbackend.session(**{"app.tenant": number}):
                    seen += [names(), [each.name for each in Author.objects.iterator()]]
            with (
                pytest.raises(ProgrammingError, match="permission denied"),
                transaction.atomic(),
            ):
                Author.objects.create(id=4, name="4")
            seen.append(names())
        return [*seen, names()]

    assert do(body) == [[], ["1"], ["1"], ["2"], ["2"], [], ["1", "2", "3"]]


@pytest.mark.usefixtures("policy")
def test_a_server_side_cursor_fetches_as_the_code_that_iterates_it_declares(do: Any) -> None:
    """A policy is looked at for each row, when the row is fetched."""

    def body() -> list[str]:
        seen = []
        with pgbackend.session(role="reader", **{"app.tenant": 2}):
            rows = Author.objects.order_by("id").iterator(chunk_size=1)
            for row in rows:
                seen.append(row.name)
                with pgbackend.session(**{"app.tenant": 1}):
                    seen += [each.name for each in Author.objects.all()]
        return seen

    assert do(body) == ["2", "1"]
