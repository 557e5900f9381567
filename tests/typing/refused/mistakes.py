"""Mistakes with the public names: type checkers refuse each line with a mark, and no other."""

from __future__ import annotations

import asyncio

import pgbackend
from pgbackend import aio, embedded, metrics
from pgbackend.driver import errors


async def number(text: str) -> int:
    return len(text)


@pgbackend.atomic
async def decorated(text: str) -> int:
    return len(text)


@aio.as_async
def view(text: str) -> int:
    return len(text)


def hook_without_event() -> None: ...


def hook_of_releases_only(event: metrics.Released) -> None: ...


def hook_that_asks_nobody(event: metrics.Event) -> float:
    return event.held  # refused


def sync_code() -> None:
    with aio.portal(number("a")):  # refused
        pass
    pgbackend.nothing  # refused
    pgbackend.pinned(1)  # refused
    pgbackend.on_primary(1)  # refused
    pgbackend.session(app=object())  # refused
    pgbackend.session("default", "schema")  # refused
    pgbackend.add_hook(hook_without_event)  # refused
    pgbackend.add_hook(hook_of_releases_only)  # refused
    pgbackend.statistics(1)  # refused
    pgbackend.statistics()[0].size = 1  # refused
    metrics.connections().open = 1  # refused
    embedded.server(settings={"max_connections": 50})  # refused
    embedded.database_settings(None)  # refused
    asyncio.run(pgbackend.detached(number))  # refused
    pgbackend.get_asgi_application(True)  # refused
    aio.hybrid_middleware("middleware")  # refused


def error_of_another_name() -> None:
    raise errors.NoSuchError  # refused


async def overlooks_a_gap() -> None:
    async for item in pgbackend.listen("orders"):
        print(item.payload)  # refused
    async for _ in pgbackend.listen("orders", callback=print):  # refused
        pass
    pgbackend.listen(1)  # refused
    pgbackend.notify("orders", 1)  # refused


async def async_code() -> str:
    await aio.run(len, 1)  # refused
    await aio.run(len)  # refused
    await view(1)  # refused
    await decorated(1)  # refused
    await decorated("a", "b")  # refused
    await pgbackend.detached("default")  # refused
    await pgbackend.detached(number("a"), using=1)  # refused
    await pgbackend.detached()  # refused
    async with pgbackend.detached(number("a")):  # refused
        pass
    async with pgbackend.atomic(savepoint="a"):  # refused
        pass
    async with pgbackend.atomic:  # refused
        pass
    return await pgbackend.detached(number("a"))  # refused
