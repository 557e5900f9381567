"""Compares requests with a shortcut and without it: `handler`, `signals`, `wrappers`.

Each request is served by Django's ASGI handler. Compared are the messages to the server, the errors
that reach it, the log, who is told of the request's start and end, when, by whom and in which
thread, and all that the next request finds on the `connection`.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import django
import pytest
from django.core.exceptions import BadRequest, PermissionDenied, RequestAborted
from django.core.handlers.asgi import ASGIHandler
from django.core.signals import got_request_exception, request_finished, request_started
from django.db import close_old_connections, connection, connections, reset_queries, transaction
from django.dispatch import Signal
from django.http import Http404, HttpRequest, HttpResponse, StreamingHttpResponse
from django.urls import path

import pgbackend
from pgbackend.driver import bridge
from pgbackend.fast import wrappers
from tests.conftest import Runner
from tests.library.models import Entry, Tag
from tests.support.both_ways import compare, error_of, told_error

from .test_comparisons import empty, named

Seen = list[Any]
variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


# Django 5.2 leaves the body of a request open if it cannot be answered.
pytestmark = pytest.mark.filterwarnings("ignore:Unclosed file:ResourceWarning")


@pytest.fixture(autouse=True)
def _nothing_is_kept() -> Iterator[None]:
    wrappers.forget()
    yield
    wrappers.forget()
    gc.collect()


def context_value() -> Any:
    """Return the value of a context variable, if Django's handler runs views in its own task."""
    return variable.get() if django.VERSION >= (6, 1) else None


# --- Who is told ----------------------------------------------------------------------------------


@contextmanager
def told(seen: Seen) -> Iterator[None]:
    """Record the signals of requests: the sender, the arguments, the place, the context."""

    def record(name: str) -> Callable[..., str]:
        def receiver(sender: Any, signal: Any, **kwargs: Any) -> str:
            place = (
                threading.current_thread() is threading.main_thread(),
                bridge.green() is not None,
            )
            seen.append((name, sender, sorted(kwargs), place, context_value()))
            variable.set(f"set by {name}")
            return name

        return receiver

    made = [
        (request_started, record("started")), (request_finished, record("finished")),
        (got_request_exception, record("exception")),
    ]  # fmt: skip
    with ExitStack() as stack:
        for signal, receiver in made:
            signal.connect(receiver)
            stack.callback(signal.disconnect, receiver)
        yield


class _Log(logging.Handler):
    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info and record.exc_info[1]
        self.seen.append((record.levelname, record.getMessage(), told_error(error or None)))


@contextmanager
def logged(seen: Seen) -> Iterator[None]:
    handler, loggers = (
        _Log(seen),
        [logging.getLogger(f"django.{name}") for name in ("request", "security")],
    )
    for logger in loggers:
        logger.addHandler(handler)
    yield
    for logger in loggers:
        logger.removeHandler(handler)


# --- One request ----------------------------------------------------------------------------------


class Client:
    """Sends a request in messages, and records those that it gets; it may hang up."""

    def __init__(self, *messages: Any, url: str = "/", **scope: Any) -> None:
        self.scope = {
            "type": "http", "method": "GET", "path": url, "headers": [], "query_string": b"",
            **scope,
        }  # fmt: skip
        self.incoming: asyncio.Queue[Any] = asyncio.Queue()
        for message in messages or ({"type": "http.request"},):
            self.incoming.put_nowait(message)
        self.sent: list[Any] = []
        self.fails_to_send: Exception | None = None
        self.hangs_up_after = -1

    async def receive(self) -> Any:
        return await self.incoming.get()

    async def send(self, message: Any) -> None:
        if self.fails_to_send is not None:
            raise self.fails_to_send
        self.sent.append(message)
        if len(self.sent) == self.hangs_up_after:
            self.hang_up()
            await asyncio.sleep(0.005)

    def hang_up(self) -> None:
        self.incoming.put_nowait({"type": "http.disconnect"})

    async def serve(self) -> Any:
        """Serve the request in a task of its own; return the messages, and how the task ended."""
        task = asyncio.create_task(ASGIHandler()(self.scope, self.receive, self.send))
        [ended] = await asyncio.gather(task, return_exceptions=True)
        how = _told(ended) if isinstance(ended, BaseException) else ended
        return self.sent, how, task.cancelled(), task.cancelling()


def _told(error: BaseException) -> Any:
    """Tell an error without its context, which is that of a `TaskGroup` in Django's handler."""
    return told_error(error)[0], error.__cause__


def body(*parts: bytes) -> list[dict[str, Any]]:
    """Return the messages of a request with a body in parts."""
    return [
        {"type": "http.request", "body": part, "more_body": n < len(parts) - 1}
        for n, part in enumerate(parts)
    ]


class View:
    """Answers requests by the method that their path names, and records what happens."""

    def __init__(self, seen: Seen) -> None:
        self.seen = seen
        self.client: Any = None

    async def __call__(self, request: HttpRequest, name: str) -> Any:
        self.seen.append((name, context_value(), bridge.green() is not None))
        variable.set(f"set by {name}")
        return await getattr(self, name)(request)

    def urls(self) -> Any:
        async def view(request: HttpRequest, name: str) -> Any:
            return await self(request, name)

        def sync(request: HttpRequest) -> HttpResponse:
            self.seen.append(
                (threading.current_thread() is threading.main_thread(), context_value())
            )
            return HttpResponse(str(Tag.objects.count()))

        class urls:  # noqa: N801 - a module
            urlpatterns = [path("sync", sync), path("<name>", view)]

        return urls

    async def answer(self, request: HttpRequest) -> HttpResponse:
        await Entry.objects.acreate(text="of a request")
        response = HttpResponse(await Entry.objects.acount(), headers={"X-Own": "1"})
        response.set_cookie("name", "value")
        return response

    async def read(self, request: HttpRequest) -> HttpResponse:
        self.seen.append((request.method, request.path, request.META.get("CONTENT_LENGTH")))
        return HttpResponse(f"{len(request.body)} {request.GET.dict()} {request.POST.dict()}")

    async def stream_in(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse(b"|".join([request.read(3), request.readline(), *request]))

    async def closers(self, request: HttpRequest) -> HttpResponse:
        response = HttpResponse("closed")

        class Closer:
            def __init__(inner, name: str) -> None:  # noqa: N805
                inner.name = name  # type: ignore[attr-defined]

            def close(inner) -> None:  # noqa: N805
                self.seen.append(("close", inner.name, response.closed))  # type: ignore[attr-defined]

        response._resource_closers += [Closer("one").close, Closer("two").close]  # type: ignore[attr-defined]
        return response

    async def fail(self, request: HttpRequest) -> HttpResponse:
        with transaction.atomic():
            Tag.objects.create(name="lost")
            raise ZeroDivisionError("in a view")

    async def missing(self, request: HttpRequest) -> HttpResponse:
        raise Http404("nothing")

    async def denied(self, request: HttpRequest) -> HttpResponse:
        raise PermissionDenied("no")

    async def bad(self, request: HttpRequest) -> HttpResponse:
        raise BadRequest("bad")

    async def nothing(self, request: HttpRequest) -> Any:
        return None

    async def aborted(self, request: HttpRequest) -> HttpResponse:
        raise RequestAborted("by the view")

    async def cancels(self, request: HttpRequest) -> HttpResponse:
        raise asyncio.CancelledError("by the view")

    async def stream(self, request: HttpRequest) -> StreamingHttpResponse:
        async def parts() -> AsyncIterator[str]:
            try:
                for n in range(3):
                    yield f"part {n} {await Tag.objects.acount()} "
            finally:
                self.seen.append("the stream has ended")

        return StreamingHttpResponse(parts())

    async def broken_stream(self, request: HttpRequest) -> StreamingHttpResponse:
        async def parts() -> AsyncIterator[bytes]:
            yield b"one"
            raise ZeroDivisionError("in a stream")

        return StreamingHttpResponse(parts())

    async def sync_stream(self, request: HttpRequest) -> StreamingHttpResponse:
        return StreamingHttpResponse(iter(["a", "b"]))

    async def waits(self, request: HttpRequest) -> HttpResponse:
        try:
            with transaction.atomic():
                Tag.objects.create(name="lost")
                self.client.hang_up()
                await asyncio.sleep(10)
        except BaseException as exc:
            self.seen.append(("ended by", type(exc), connection.in_atomic_block))
            raise
        return HttpResponse("never")

    async def answers_though_cancelled(self, request: HttpRequest) -> HttpResponse:
        self.client.hang_up()
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            self.seen.append(("cancelled", await Tag.objects.acount()))
        return HttpResponse("late")

    async def fails_as_it_is_cancelled(self, request: HttpRequest) -> HttpResponse:
        self.client.hang_up()
        try:
            await asyncio.sleep(10)
        finally:
            raise ZeroDivisionError("cancelled")


def clients() -> Iterator[tuple[str, Client]]:
    """Return a client for each kind of request."""
    alone = (
        "answer closers fail missing denied bad nothing stream broken_stream sync_stream sync "
        "aborted waits answers_though_cancelled fails_as_it_is_cancelled nowhere/at/all"
    )
    for name in alone.split():
        yield name, Client(url=f"/{name}")
    form = {"method": "POST", "headers": [(b"content-type", b"application/x-www-form-urlencoded")]}
    yield "head", Client(url="/answer", method="HEAD")
    yield "form", Client(*body(b"a=1&b=%20"), url="/read", query_string=b"q=1", **form)
    yield "parts", Client(*body(b"a=", b"1", b"&b=2"), url="/read", **form)
    yield "read in parts", Client(*body(b"abc", b"defg\nhi", b"j"), url="/stream_in", method="PUT")
    yield "large", Client(*body(b"a" * 3_000_000), url="/stream_in", method="PUT")
    yield "too large", Client(*body(b"a" * 3_000_000), url="/read", **form)
    yield "prefix", Client(url="/x/read", root_path="/x")
    yield "hangs up at once", Client({"type": "http.disconnect"}, url="/answer")
    yield (
        "hangs up in its body",
        Client({**body(b"a", b"")[0]}, {"type": "http.disconnect"}, url="/read"),
    )
    yield "not http", Client(url="/answer", type="websocket")
    yield "not decoded", Client(url="/answer", headers=[(b"cookie", b"\xff"), (b"host", b"a b")])
    yield "strange", Client({"type": "http.request"}, {"type": "strange"}, url="/waits")
    broken = Client(url="/answer")
    broken.fails_to_send = OSError("send")
    yield "not sent", broken
    leaving = Client(url="/stream")
    leaving.hangs_up_after = 2
    yield "hangs up in a stream", leaving


#: Requests that Django 6.1 ends in another way than earlier ones; the shortcut does it as 6.1 does.
CHANGED = {"aborted", "not sent", "strange"}


@pytest.mark.sweep(one_in=3)
@pytest.mark.parametrize(
    ("name", "watched"),
    [
        pytest.param(name, watched, id=f"{name}{'-watched' * watched}", marks=named(name).marks)
        for watched, names in {
            True: ["handler", "wrappers", "all"],  # own receivers are told by Django's `send()`
            False: ["handler", "signals", "wrappers", "all"],
        }.items()
        for name in names
    ],
)
def test_requests_are_answered_alike(
    run_once: Runner, settings: Any, name: str, watched: bool
) -> None:
    settings.MIDDLEWARE = []
    settings.TEMPLATES = [{"BACKEND": "django.template.backends.django.DjangoTemplates"}]
    settings.DEBUG_PROPAGATE_EXCEPTIONS = not watched

    def once() -> Any:
        all_seen: Seen = []

        async def main() -> None:
            for each, client in clients():
                if each in CHANGED and django.VERSION < (6, 1) and name in ("handler", "all"):
                    continue
                seen: Seen = []
                view = View(seen)
                view.client = client
                settings.ROOT_URLCONF = view.urls()
                with told(seen) if watched else nullcontext(), logged(seen):
                    try:
                        async with asyncio.timeout(5):
                            answered = await client.serve()
                    except TimeoutError:
                        answered = "never"
                numbers = [record.leased for record in pgbackend.statistics()]
                all_seen.append((each, answered, seen, await Tag.objects.acount(), numbers))

        empty()
        connection.close()
        run_once(main())
        return all_seen

    compare(name, once)


# --- Receivers that come and go -------------------------------------------------------------------


class Owner:
    def __init__(self, seen: Seen) -> None:
        self.seen = seen

    def receive(self, **kwargs: Any) -> str:
        self.seen.append("method")
        return "of a method"


def sends() -> list[tuple[str, Callable[[], Any]]]:
    """Return ways to send the signals of requests, as code other than a handler does it."""

    def results(found: Any) -> Any:
        return [
            (receiver.__qualname__, told_error(each) if isinstance(each, Exception) else each)
            for receiver, each in found
        ]

    return [
        (f"{how} {n}", lambda how=how, its=signal: results(getattr(its, how)(sender=Owner, x=1)))
        for n, signal in enumerate((request_started, request_finished))
        for how in ("send", "send_robust")
    ]  # fmt: skip


@pytest.mark.parametrize("name", [named("signals"), named("all")])
def test_receivers_are_told_alike(run_once: Runner, name: str) -> None:
    def work() -> Seen:
        seen: Seen = []

        def plain(**kwargs: Any) -> None:
            seen.append(("plain", sorted(kwargs)))

        async def waiting(**kwargs: Any) -> str:
            seen.append("async")
            return "of a coroutine"

        def failing(**kwargs: Any) -> None:
            raise ZeroDivisionError("receiver")

        def send_all(when: str) -> None:
            for how, send in sends():
                seen.append((when, how, error_of(send)))
            seen.append(request_finished.has_listeners(Owner))

        owner: Any = Owner(seen)
        for signal in (request_started, request_finished):
            send_all("none")
            signal.connect(plain)
            send_all("a function")
            signal.connect(owner.receive)
            send_all("a method")
            owner = None
            owner = Owner(seen)
            send_all("a method that is gone")
            signal.connect(failing, sender=Owner)
            send_all("one that fails")
            signal.connect(failing, sender=Signal)
            signal.disconnect(failing, sender=Owner)
            send_all("one for others")
            signal.disconnect(failing, sender=Signal)
            signal.connect(waiting)
            send_all("a coroutine")
            signal.disconnect(waiting)
            signal.disconnect(plain)
            for own in (close_old_connections, reset_queries):
                if signal.disconnect(own):
                    send_all(f"without {own.__name__}")
                    signal.connect(own)
            signal.connect(plain, dispatch_uid="one")
            signal.connect(plain, dispatch_uid="one")
            send_all("once")
            signal.disconnect(dispatch_uid="one")
            send_all("none again")
        return seen

    def once() -> Any:
        before = [(signal, [*signal.receivers]) for signal in (request_started, request_finished)]
        try:
            return run_once.green(work)
        finally:
            for signal, receivers in before:
                signal.receivers = receivers
                signal.sender_receivers_cache.clear()

    compare(name, once)


@pytest.mark.parametrize("name", [named("signals"), named("handler"), named("all")])
def test_what_django_tidies_up_is_tidied_up(run_once: Runner, settings: Any, name: str) -> None:
    """The log of queries is emptied, an old connection closed, whether or not a request used it."""
    settings.MIDDLEWARE = []
    settings.DEBUG = True

    def once() -> Any:
        seen: Seen = []

        async def main() -> None:
            view = View(seen)
            settings.ROOT_URLCONF = view.urls()
            for url in ("/answer", "/sync", "/closers", "/answer"):
                await Tag.objects.acount()
                seen.append(len(connection.queries_log))
                seen.append(await Client(url=url).serve())
                seen.append([each["sql"] for each in connection.queries])
            own = connections["default"]
            own.close_at = 0
            seen.append(await Client(url="/answer").serve())
            seen.append((own.connection is None, own.close_at))

        empty()
        connection.close()
        run_once(main())
        connection.queries_log.clear()
        return seen

    compare(name, once)
