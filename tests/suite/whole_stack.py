"""Lets the requests of Django's tests come through `pgbackend.get_asgi_application()`.

The test clients call the application as a server does: with a scope, `receive()` and `send()`. They
return the response that the application has sent, with its content as it was sent. What the tests
make by `get_asgi_application()`, or derive from `ASGIHandler`, is the whole stack too.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import django.core.asgi
import django.core.handlers.asgi
import django.test.client
from asgiref.sync import async_to_sync
from django.core.handlers.asgi import ASGIRequest
from django.core.handlers.wsgi import LimitedStream, WSGIRequest
from django.core.signals import request_finished, request_started
from django.db import close_old_connections
from django.test.client import (
    AsyncClientHandler,
    ClientHandler,
    FakePayload,
    conditional_content_removal,
)
from django.urls import get_script_prefix, set_script_prefix

from pgbackend.whole_stack import GreenHandler, get_asgi_application

#: How many requests of test clients the application has served.
served = 0


def install() -> None:
    """Rebind the names of Django's that test modules import."""
    django.core.asgi.get_asgi_application = get_asgi_application
    django.core.asgi.ASGIHandler = django.core.handlers.asgi.ASGIHandler = GreenHandler
    django.test.client.ClientHandler = _Client
    django.test.client.AsyncClientHandler = _AsyncClient


class _Application(GreenHandler):
    """The application, for one test client: keeps the response that it has sent."""

    sent: Any = None

    def __init__(self, client: Any) -> None:
        self.client = client
        super().__init__()

    def get_response(self, request: Any) -> Any:
        return self.client.get_response(request)  # a subclass may override it

    def create_request(self, scope: Any, body_file: Any) -> Any:
        return scope["request of the test"], None

    async def run_get_response(self, request: Any) -> Any:
        response = await super().run_get_response(request)
        conditional_content_removal(request, response)
        return response

    async def send_response(self, response: Any, send: Any) -> None:
        self.sent = response
        await super().send_response(response, send)


async def _exchange(application: _Application, scope: dict[str, Any]) -> Any:
    """Send one request to `application`; return its response, with the content that was sent."""
    global served  # noqa: PLW0603 - a process has one suite
    served += 1
    messages: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if not received:
            await asyncio.Event().wait()  # the client of a test never hangs up
        return received.pop()

    received = [{"type": "http.request", "body": b""}]

    async def send(message: dict[str, Any]) -> None:
        messages.append(message)

    # As the test clients do: the connection is the test's.
    request_started.disconnect(close_old_connections)
    request_finished.disconnect(close_old_connections)
    prefix = get_script_prefix()  # each request of a server sets it anew; tests of clients do not
    try:
        await application(scope, receive, send)
    finally:
        set_script_prefix(prefix)
        request_started.connect(close_old_connections)
        request_finished.connect(close_old_connections)
    response, application.sent = application.sent, None
    if response.streaming:
        pieces = [message["body"] for message in messages[1:] if message.get("body")]
        response._iterator = _each(pieces) if response.is_async else iter(pieces)
    return response


async def _each(pieces: list[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


class _Client(ClientHandler):
    def load_middleware(self, is_async: bool = False) -> None:
        self.application = _Application(self)
        self._middleware_chain = self.application._middleware_chain

    def __call__(self, environ: Any) -> Any:
        if self._middleware_chain is None:
            self.load_middleware()
        request = WSGIRequest(environ)
        request._dont_enforce_csrf_checks = not self.enforce_csrf_checks
        scope = {
            "type": "http",
            "path": environ.get("PATH_INFO", ""),
            "method": environ["REQUEST_METHOD"],
            "request of the test": request,
        }
        response = async_to_sync(_exchange)(self.application, scope)
        response.wsgi_request = request
        return response


class _AsyncClient(AsyncClientHandler):
    def load_middleware(self, is_async: bool = False) -> None:
        self.application = _Application(self)
        self._middleware_chain = self.application._middleware_chain

    async def __call__(self, scope: Any) -> Any:
        if self._middleware_chain is None:
            self.load_middleware()
        body = scope.pop("_body_file", None) or FakePayload("")
        request = ASGIRequest(scope, LimitedStream(body, len(body)))
        request._dont_enforce_csrf_checks = not self.enforce_csrf_checks
        response = await _exchange(self.application, {**scope, "request of the test": request})
        response.asgi_request = request
        return response
