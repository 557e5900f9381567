"""Holds connections of the pool of 'default', and lets other tasks wait for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pgbackend
from tests.library.models import Tag


async def hold(go_on: asyncio.Event, held: asyncio.Event) -> None:
    async with pgbackend.atomic():
        await Tag.objects.acount()
        held.set()
        await go_on.wait()


@asynccontextmanager
async def holders(count: int, queued: int = 0) -> AsyncIterator[list[asyncio.Event]]:
    """Hold `count` connections inside the block, for which `queued` other tasks wait.

    The block gets the events that end the holds.
    """
    ends = [asyncio.Event() for _ in range(count + queued)]
    async with asyncio.TaskGroup() as group:
        for go_on in ends[:count]:
            group.create_task(hold(go_on, held := asyncio.Event()))
            await held.wait()
        for go_on in ends[count:]:
            group.create_task(hold(go_on, asyncio.Event()))
        try:
            await waiting(queued)
            yield ends
        finally:
            for go_on in ends:
                go_on.set()


async def waiting(count: int) -> None:
    while pgbackend.statistics()[0].waiting != count:
        await asyncio.sleep(0)
