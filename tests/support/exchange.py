"""Sends one request to Django's ASGI handler, with a client that can hang up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from django.core.handlers.asgi import ASGIHandler
from django.http import HttpRequest
from django.urls import path

View = Callable[[HttpRequest], Any]


@pytest.fixture
def serve_by(settings: Any) -> Callable[[View], None]:
    """Let a view answer all requests for ``/``."""
    settings.MIDDLEWARE = []

    def serve_by(view: View) -> None:
        class urls:  # noqa: N801 - a module
            urlpatterns = [path("", view)]

        settings.ROOT_URLCONF = urls

    return serve_by


class Exchange:
    """Holds one request, and what the server and the receivers of its signals saw of it."""

    def __init__(self, body: bytes = b"", *, application: Any = None) -> None:
        #: Serves the request; by default Django's handler.
        self.application = application
        self.scope: dict[str, Any] = {
            "type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b"",
        }  # fmt: skip
        self.incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.incoming.put_nowait({"type": "http.request", "body": body})
        self.sent: list[dict[str, Any]] = []
        #: Set when the handler has read the request, and waits for more messages.
        self.listening = asyncio.Event()
        self.may_send = asyncio.Event()
        self.may_send.set()
        #: Set when the handler has begun to send the response.
        self.sending = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        if self.incoming.empty():
            self.listening.set()
        return await self.incoming.get()

    async def send(self, message: dict[str, Any]) -> None:
        self.sending.set()
        await self.may_send.wait()
        self.sent.append(message)

    def hang_up(self) -> None:
        self.incoming.put_nowait({"type": "http.disconnect"})

    async def serve(self) -> None:
        application = self.application or ASGIHandler()
        await application(self.scope, self.receive, self.send)

    def start(self) -> asyncio.Task[None]:
        return asyncio.create_task(self.serve())

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def content(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)
