"""Provides what cases need in each context: calls at once, meetings, a session of one's own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from asgiref.sync import async_to_sync
from django.db import connections

from tests.packages.project import STOCK, execute, green

#: How long anything in a case may take, in seconds.
LIMIT = 20


def is_green() -> bool:
    return asyncio._get_running_loop() is not None


def at_once(*functions: Callable[[], Any]) -> list[Any]:
    """Call sync functions at once: in threads, or in green code by tasks of the loop."""
    if is_green():
        return async_to_sync(_gather)(functions)
    with ThreadPoolExecutor(len(functions)) as threads:
        return [*threads.map(_call_and_close, functions)]


async def _gather(functions: tuple[Callable[[], Any], ...]) -> list[Any]:
    return await asyncio.gather(*(green(function) for function in functions))


def _call_and_close(function: Callable[[], Any]) -> Any:
    try:
        return function()
    finally:
        connections.close_all()


class Meeting:
    """Makes `number` functions that `at_once()` calls wait for each other, once."""

    def __init__(self, number: int = 2) -> None:
        self.missing = number
        self.lock = threading.Lock()
        self.all_here = threading.Event()

    def wait(self) -> None:
        with self.lock:
            self.missing -= 1
            if not self.missing:
                self.all_here.set()
        if is_green():
            async_to_sync(self._poll)()
        else:
            assert self.all_here.wait(LIMIT)

    async def _poll(self) -> None:
        async with asyncio.timeout(LIMIT):
            while not self.all_here.is_set():
                await asyncio.sleep(0)


def pinned() -> AbstractContextManager[None]:
    """Hold one connection, as sync code does anyway, on stock too."""
    if STOCK:
        return nullcontext()
    import pgbackend

    return pgbackend.pinned()


def is_free(lock: int) -> bool:
    """Return whether another session can take the advisory lock."""
    return bool(execute("SELECT pg_try_advisory_lock(%s)", lock)[0][0])
