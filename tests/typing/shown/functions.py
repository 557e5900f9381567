"""The functions that the pages name, as a project uses them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator
from datetime import timedelta
from typing import Any, Literal, assert_type

from django.core.handlers.asgi import ASGIHandler
from django.db import connection, transaction
from django.http import HttpRequest, HttpResponse

import pgbackend
from pgbackend import PoolStatistics, aio, metrics
from pgbackend.driver import errors

logger = logging.getLogger(__name__)


def count(table: str, *, minimum: int = 0) -> int:
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT count(*) FROM {table}")
        (number,) = cursor.fetchone()
    return max(minimum, int(number))


async def send_mail(address: str) -> bool:
    return bool(address)


# aio.run, aio.as_async, aio.portal


@aio.as_async
def sync_view(request: HttpRequest, pk: int) -> HttpResponse:
    return HttpResponse(f"{request.path} {pk}")


async def async_view(request: HttpRequest) -> HttpResponse:
    number = await pgbackend.aio.run(count, "shop_order", minimum=1)
    assert_type(number, int)
    response = await sync_view(request, number)
    assert_type(response, HttpResponse)
    return response


async def main() -> int:
    return count("shop_order")


def worker() -> int:
    result = asyncio.run(pgbackend.aio.portal(main()))
    assert_type(result, int)
    return result


# aio.hybrid_middleware, get_asgi_application


@aio.hybrid_middleware
def request_id(get_response: Callable[[HttpRequest], HttpResponse]) -> Any:
    def middleware(request: HttpRequest) -> HttpResponse:
        return get_response(request)

    return middleware


def whole_stack() -> ASGIHandler:
    return pgbackend.get_asgi_application()


# pinned, detached


def in_one_session() -> None:
    with pgbackend.pinned():
        count("a_temporary_table")


async def in_one_session_of_a_replica() -> None:
    async with pgbackend.pinned("replica"), pgbackend.pinned(using="other") as pinned:
        assert_type(pinned, pgbackend.pinned)


async def background(tasks: set[asyncio.Task[bool]]) -> None:
    with transaction.atomic():
        outside = pgbackend.detached(send_mail("a@a"))
        task = asyncio.create_task(assert_type(outside, Coroutine[Any, Any, bool]))
        assert_type(task, asyncio.Task[bool])
        tasks.add(task)
        tasks.add(asyncio.create_task(pgbackend.detached(send_mail("b@b"), using="default")))
    with pgbackend.detached():
        count("shop_log")
    async with pgbackend.detached(using="replica"):
        await aio.run(count, "shop_log")


# statistics, hooks


def largest() -> PoolStatistics | None:
    pgbackend.drain()
    pgbackend.drain(using="default")
    pools = pgbackend.statistics(using="default")
    assert_type(pools, list[PoolStatistics])
    waiting: int = sum(pool.waiting + pool.leased for pool in pgbackend.statistics())
    logger.info("%d tasks wait or hold a connection", waiting)
    return max(pools, key=lambda pool: pool.requests_wait_ms, default=None)


def hang() -> str:
    return pgbackend.dump()


def open_and_most() -> tuple[int, int | None]:
    connections = pgbackend.metrics.connections()
    assert_type(connections, metrics.Connections)
    return connections.open, connections.max


async def news() -> None:
    async with pgbackend.listen("orders", "dishes", using="default") as items:
        async for item in items:
            match item:
                case pgbackend.Gap(reason=reason):
                    assert_type(reason, Literal["started", "reconnected", "overflow"])
                case pgbackend.Notification():
                    assert_type(item.payload, str)
    async with pgbackend.listen("orders", callback=print):
        await pgbackend.anotify("orders", "1")
    listener = pgbackend.listen("orders", callback=heard, queue_size=10)
    await listener.start()
    await listener.aclose()
    pgbackend.notify("orders")


async def heard(item: pgbackend.Gap | pgbackend.Notification) -> None: ...


def log_events(event: metrics.Event) -> None:
    match event:
        case metrics.Leased(pool=pool, waited=waited):
            assert_type(pool, str)
            assert_type(waited, float)
        case metrics.Released():
            assert_type(event.held, float)
            assert_type(event.discarded, bool)


class Listener:
    """A hook that is no function."""

    def __call__(self, event: metrics.Leased | metrics.Released, /) -> int:
        return event.backend_pid


hooks: list[metrics.Hook] = [log_events, Listener()]
for hook in hooks:
    pgbackend.add_hook(hook)
    pgbackend.remove_hook(hook)
metrics.add_hook(log_events)
metrics.remove_hook(log_events)
assert_type(metrics.statistics(), list[metrics.PoolStatistics])


# Errors


async def with_patience() -> int:
    try:
        return await aio.run(count, "shop_order")
    except errors.PoolTimeout as error:
        raise RuntimeError("try again") from error
    except errors.UniqueViolation as error:  # psycopg's
        return len(error.diag.message_primary or "")


# session


def tenant_of_a_block(schema: str) -> None:
    with pgbackend.session(search_path=[schema, "public"], statement_timeout="5s"):
        count("shop_order")
    settings: dict[str, int] = {"app.tenant": 7}
    with pgbackend.session("other", role="reader", **settings):
        count("shop_order")


async def tenant_of_an_async_block() -> None:
    async with pgbackend.session(lock_timeout=timedelta(seconds=1), work_mem=1024):
        await aio.run(count, "shop_order")


@pgbackend.session(role="reader")
def decorated_function(table: str) -> int:
    return count(table)


@pgbackend.session(role="reader")
async def decorated_coroutine(table: str) -> int:
    return await aio.run(count, table)


@pgbackend.session(role="reader")
def decorated_generator() -> Iterator[int]:
    yield count("shop_order")


async def call_what_is_decorated() -> None:
    assert_type(decorated_function("a"), int)
    assert_type(await decorated_coroutine("a"), int)
    assert_type(list(decorated_generator()), list[int])
