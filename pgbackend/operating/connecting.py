"""Connects as the settings say: as sync code, through Django's pool, and through the async pool.

Each attempt ends soon, and each failure is told: psycopg_pool alone would say after 30 s that no
connection came, and not why.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from django.db import connections

from pgbackend import aio

#: Seconds that an attempt to connect to one host may take, unless OPTIONS say something else.
LIMIT = 5


def is_on_a_loop() -> bool:
    """Return whether the caller runs on an event loop, where nothing of this module can."""
    return asyncio._get_running_loop() is not None


@contextmanager
def connected(alias: str) -> Iterator[Any]:
    """Yield a connected copy of the wrapper of `alias`, without a pool; close it afterwards."""
    wrapper: Any = connections[alias].copy()
    options = wrapper.settings_dict["OPTIONS"]
    options.pop("pool", None)
    options.setdefault("connect_timeout", LIMIT)
    try:
        wrapper.ensure_connection()
        yield wrapper
    finally:
        wrapper.close()


def through_sync_pool(alias: str) -> None:
    """Connect as sync code does if `OPTIONS["pool"]` is set: by Django's pool."""
    wrapper: Any = connections[alias].copy(f"{alias} (sync pool)")
    options = wrapper.settings_dict["OPTIONS"]
    given = {} if options["pool"] is True else dict(options["pool"])
    given["timeout"] = min(given.get("timeout", LIMIT), LIMIT)
    options["pool"] = given
    options.pop("replica_of", None)  # the alias of the copy is not in DATABASES
    try:
        _select(wrapper)
    finally:
        wrapper.close()
        wrapper.close_pool()


def through_async_pool(alias: str) -> None:
    """Connect as async code does: by a pool of an event loop, which ends with this call."""
    asyncio.run(_in_time(alias))


async def _in_time(alias: str) -> None:
    async with asyncio.timeout(LIMIT):
        await aio.run(_select, connections[alias])


def _select(wrapper: Any) -> None:
    with wrapper.cursor() as cursor:
        cursor.execute("SELECT 1")
