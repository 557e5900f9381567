"""Tests when thread-locals of modules that are loaded late begin to follow requests."""

from __future__ import annotations

import asyncio
import sys
import threading
from types import ModuleType
from typing import Any

import pytest
from channels.consumer import AsyncConsumer

from tests.conftest import Runner


def test_those_of_modules_loaded_before_a_consumer_runs_follow_it(
    run_once: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Consumers are imported after the handler of requests is made: channels' page says so."""
    late: Any = ModuleType("late_module_of_consumers")
    late.local = threading.local()
    monkeypatch.setitem(sys.modules, late.__name__, late)

    class Consumer(AsyncConsumer):
        async def websocket_connect(self, message: dict[str, str]) -> None:
            late.local.user = message["user"]
            await met.wait()
            seen.append((message["user"], late.local.user))

    met, seen = asyncio.Barrier(2), []

    async def connect(user: str) -> None:
        messages = [{"type": "websocket.connect", "user": user}]

        async def receive() -> dict[str, str]:
            return messages.pop() if messages else await asyncio.Event().wait()

        async with asyncio.timeout(5):
            task = asyncio.create_task(Consumer.as_asgi()({"type": "websocket"}, receive, None))
            while len(seen) < 2:
                await asyncio.sleep(0)
            task.cancel()

    async def main() -> None:
        await asyncio.gather(connect("ann"), connect("bob"), return_exceptions=True)

    run_once(main())
    assert sorted(seen) == [("ann", "ann"), ("bob", "bob")]
