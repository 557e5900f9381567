"""Tests how a request is served: the client may leave at any point, and nothing is left open."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from types import FunctionType
from typing import Any
from unittest import mock

import pytest
from django.core import cache
from django.core.exceptions import RequestAborted
from django.core.handlers.asgi import ASGIHandler
from django.core.signals import request_finished, request_started
from django.db import connection, transaction
from django.dispatch import Signal
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse

import pgbackend
from pgbackend import aio, state
from pgbackend.fast import handler, signals
from tests.conftest import Runner
from tests.library.models import Tag
from tests.support.exchange import Exchange, serve_by

__all__ = ["serve_by"]


@pytest.fixture(autouse=True)
def _leaves_no_task_and_no_lease(run: Runner) -> Iterator[None]:
    yield

    async def look() -> None:
        assert all(record.leased == 0 for record in pgbackend.statistics())
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(look())


@pytest.fixture
def told() -> Iterator[list[str]]:
    """Record the signals of requests, in order."""
    said: list[str] = []

    def started(**kwargs: Any) -> None:
        said.append("started")

    def finished(**kwargs: Any) -> None:
        said.append("finished")

    request_started.connect(started)
    request_finished.connect(finished)
    yield said
    request_started.disconnect(started)
    request_finished.disconnect(finished)


class Waiting:
    """Waits in a transaction, as a view, and records how the wait ends."""

    def __init__(self) -> None:
        self.waits = asyncio.Event()
        self.ended_by: type[BaseException] | None = None

    async def answer(self, request: HttpRequest) -> HttpResponse:
        try:
            with transaction.atomic():
                Tag.objects.create(name="never committed")
                self.waits.set()
                await asyncio.Event().wait()
        except BaseException as exc:
            self.ended_by = type(exc)
            raise
        raise AssertionError("nothing wakes it")


@pytest.mark.shortcut("handler")
def test_djangos_own_handler_is_the_one_that_is_replaced() -> None:
    assert ASGIHandler.handle is handler.handle


def test_the_view_runs_in_the_servers_task_and_needs_no_other_for_its_answer(
    run: Runner, serve_by: Any, told: list[str]
) -> None:
    tasks: list[Any] = []

    async def view(request: HttpRequest) -> HttpResponse:
        tasks.append(asyncio.current_task())
        return HttpResponse(request.body + str(Tag.objects.count()).encode())

    async def main() -> None:
        serve_by(view)
        exchange = Exchange(b"tags: ")
        task = exchange.start()
        await task
        assert tasks == [task]
        assert exchange.content == b"tags: 0"
        assert told == ["started", "finished"]

    run(main())


def test_a_client_that_goes_cancels_the_view_whose_transaction_is_rolled_back(
    run: Runner, serve_by: Any, told: list[str]
) -> None:
    async def main() -> None:
        view = Waiting()
        serve_by(view.answer)
        exchange = Exchange()
        task = exchange.start()
        await view.waits.wait()
        exchange.hang_up()
        await task
        assert view.ended_by is asyncio.CancelledError
        assert (task.cancelled(), task.cancelling()) == (False, 0)
        assert exchange.sent == []
        assert told == ["started", "finished"]
        assert not await Tag.objects.aexists()

    run(main())


def test_a_client_that_goes_while_it_is_answered_ends_the_request_as_an_answer_does(
    run: Runner, serve_by: Any, told: list[str]
) -> None:
    closed: list[str] = []

    class Response(HttpResponse):
        def close(self) -> None:
            closed.append("response")
            super().close()

    async def view(request: HttpRequest) -> HttpResponse:
        return Response("never read")

    async def main() -> None:
        serve_by(view)
        exchange = Exchange()
        exchange.may_send.clear()
        task = exchange.start()
        await exchange.sending.wait()
        exchange.hang_up()
        await task
        assert exchange.sent == []
        assert (closed, told) == (["response"], ["started", "finished"])

    run(main())


def test_a_client_that_goes_before_its_request_is_read_is_not_served(
    run: Runner, told: list[str]
) -> None:
    async def main() -> None:
        exchange = Exchange()
        exchange.incoming.get_nowait()
        exchange.hang_up()
        await exchange.serve()
        assert (exchange.sent, told) == ([], [])

    run(main())


def test_a_view_that_answers_although_it_was_cancelled_is_let_do_so(
    run: Runner, serve_by: Any, told: list[str]
) -> None:
    waits = asyncio.Event()

    async def view(request: HttpRequest) -> HttpResponse:
        try:
            waits.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return HttpResponse(str(await Tag.objects.acount()))
        raise AssertionError("nothing wakes it")

    async def main() -> None:
        serve_by(view)
        exchange = Exchange()
        task = exchange.start()
        await waits.wait()
        exchange.hang_up()
        await task
        assert exchange.content == b"0"
        assert (told, task.cancelling()) == (["started", "finished"], 0)

    run(main())


def test_a_view_that_fails_as_it_is_cancelled_fails_as_in_django(
    run: Runner, serve_by: Any
) -> None:
    waits = asyncio.Event()

    async def content() -> Any:
        try:
            waits.set()
            await asyncio.Event().wait()
        finally:
            raise LookupError("of the stream's own")
        yield b""

    async def view(request: HttpRequest) -> StreamingHttpResponse:
        return StreamingHttpResponse(content())

    async def main() -> None:
        serve_by(view)
        exchange = Exchange()
        task = exchange.start()
        await waits.wait()
        exchange.hang_up()
        with pytest.raises(LookupError, match="of the stream's own"):
            await task
        assert task.cancelling() == 0

    run(main())


@pytest.mark.parametrize("client_goes", [False, True])
def test_a_server_that_cancels_a_request_is_not_taken_for_its_client(
    run: Runner, serve_by: Any, client_goes: bool
) -> None:
    """Client and server end the request at once: only the server's cancellation is raised."""

    async def main() -> None:
        view = Waiting()
        serve_by(view.answer)
        exchange = Exchange()
        task = exchange.start()
        await view.waits.wait()
        if client_goes:
            exchange.hang_up()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert view.ended_by is asyncio.CancelledError

    run(main())


def test_a_server_that_cancels_after_the_client_went_is_heard(run: Runner, serve_by: Any) -> None:
    cancelled, may_go_on = asyncio.Event(), asyncio.Event()

    async def view(request: HttpRequest) -> HttpResponse:
        try:
            cancelled.set()
            await asyncio.Event().wait()
        finally:
            cancelled.set()
            await may_go_on.wait()

    async def main() -> None:
        serve_by(view)
        exchange = Exchange()
        task = exchange.start()
        await cancelled.wait()
        cancelled.clear()
        exchange.hang_up()
        await cancelled.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())


def test_what_is_no_message_of_a_client_is_the_servers_fault(run: Runner, serve_by: Any) -> None:
    async def main() -> None:
        view = Waiting()
        serve_by(view.answer)
        exchange = Exchange()
        task = exchange.start()
        await view.waits.wait()
        exchange.incoming.put_nowait({"type": "http.request", "body": b"more"})
        with pytest.raises(AssertionError, match="Invalid ASGI message"):
            await task
        assert view.ended_by is asyncio.CancelledError

    run(main())


class Heard:
    """Ends a listener with an error, in the very step in which the block ends."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.begun, self.may_end, self.done = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def __call__(self) -> None:
        self.begun.set()
        await self.may_end.wait()
        self.done.set()
        raise self.error


@pytest.mark.parametrize("error", [RequestAborted(), AssertionError("of the server")])
def test_what_is_heard_in_the_very_step_in_which_the_answer_is_sent_counts(
    run: Runner, error: Exception
) -> None:
    heard = Heard(error)

    async def block() -> None:
        with handler._Connected(heard):
            await heard.begun.wait()
            heard.may_end.set()
            await heard.done.wait()  # wakes before the listener's callbacks are called

    async def main() -> None:
        if isinstance(error, RequestAborted):
            await block()
        else:
            with pytest.raises(AssertionError, match="of the server"):
                await block()
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0

    run(main())


# Django looks the charset up as the client names it, of which Python 3.15 warns.
@pytest.mark.filterwarnings("ignore:Support for non-ascii encoding names:DeprecationWarning")
def test_a_request_that_cannot_be_read_is_answered(run: Runner, told: list[str]) -> None:
    async def main() -> None:
        exchange = Exchange()
        exchange.scope["query_string"] = exchange.scope["path"] = ""
        exchange.scope["headers"] = [(b"content-type", b"a; charset=\xff")]
        await exchange.serve()
        assert exchange.sent[0]["status"] == 400
        assert told[0] == "started"

    run(main())


@pytest.mark.shortcut("handler")
def test_a_request_leaves_nothing_to_the_garbage_collector(run: Runner, serve_by: Any) -> None:
    exchanges = [Exchange(), Exchange()]
    reading = iter(exchanges)

    async def view(request: HttpRequest) -> HttpResponse:
        await next(reading).listening.wait()
        with transaction.atomic():
            Tag.objects.create(name="a")
        return HttpResponse(str(list(Tag.objects.all())))

    async def main() -> None:
        serve_by(view)
        await exchanges[0].start()
        gc.collect()
        gc.disable()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            await exchanges[1].start()
            await asyncio.sleep(0)  # the listener ends
            gc.collect()
            left = [type(each).__qualname__ for each in gc.garbage]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
        assert left == []

    run(main())


def test_a_handler_that_somebody_has_derived_is_asked(run: Runner, serve_by: Any) -> None:
    steps: list[str] = []

    class Handler(ASGIHandler):
        async def listen_for_disconnect(self, receive: Any) -> None:
            steps.append("listen")
            await super().listen_for_disconnect(receive)

        async def run_get_response(self, request: Any) -> Any:
            steps.append("respond")
            return await super().run_get_response(request)

        async def send_response(self, response: Any, send: Any) -> None:
            steps.append("send")
            await super().send_response(response, send)

    exchange = Exchange()

    async def view(request: HttpRequest) -> HttpResponse:
        await exchange.listening.wait()
        return HttpResponse(str(connection.in_atomic_block))

    async def main() -> None:
        serve_by(view)
        await Handler()(exchange.scope, exchange.receive, exchange.send)
        assert steps == ["respond", "listen", "send"]

    run(main())


@pytest.mark.shortcut("handler")
def test_no_task_listens_and_what_the_server_waits_for_may_end_with_the_answer(
    run: Runner, serve_by: Any
) -> None:
    """uvicorn does so: the last part of an answer ends the server's wait for the client."""
    answered = asyncio.Event()
    complaints: list[Any] = []

    class Served(Exchange):
        async def receive(self) -> dict[str, Any]:
            if not self.incoming.empty():
                return await super().receive()
            self.listening.set()
            await answered.wait()
            return {"type": "http.disconnect"}

        async def send(self, message: dict[str, Any]) -> None:
            await super().send(message)
            if message["type"] == "http.response.body":
                answered.set()

    exchange = Served()

    async def view(request: HttpRequest) -> HttpResponse:
        await exchange.listening.wait()
        assert len(asyncio.all_tasks()) == 2, "the server's, and this test"
        return HttpResponse("answered")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: complaints.append(context))
        serve_by(view)
        await exchange.start()
        for _ in range(3):  # let the loop call what is scheduled
            await asyncio.sleep(0)
        loop.set_exception_handler(None)

    run(main())
    assert (exchange.content, complaints) == (b"answered", [])


def test_a_wrapped_receive_may_need_a_task(run: Runner, serve_by: Any, told: list[str]) -> None:
    """A timeout belongs to one task: that of an ASGI middleware does not cancel the view."""
    ended: list[Any] = []

    class Served(Exchange):
        async def receive(self) -> dict[str, Any]:
            while True:
                try:
                    async with asyncio.timeout(0.01):
                        return await super().receive()
                except TimeoutError:
                    ended.append(asyncio.current_task())

    exchange = Served()
    view = Waiting()

    async def main() -> None:
        serve_by(view.answer)
        task = exchange.start()
        await view.waits.wait()
        while not ended:
            await asyncio.sleep(0.01)
        assert view.ended_by is None
        exchange.hang_up()
        await task
        assert view.ended_by is asyncio.CancelledError
        assert None not in ended
        assert task not in ended

    run(main())


@pytest.mark.shortcut("handler")
def test_a_wrapped_receive_may_use_the_a_methods(run: Runner, serve_by: Any) -> None:
    """The query of the wrapper needs a task to hold its connection: `receive()` restarts in one."""
    began: list[Any] = []
    ended: list[Any] = []

    class Served(Exchange):
        async def receive(self) -> dict[str, Any]:
            if self.incoming.empty():
                began.append(asyncio.current_task())
                await Tag.objects.acount()
                ended.append(began[-1])
            return await super().receive()

    exchange = Served()

    async def view(request: HttpRequest) -> HttpResponse:
        await exchange.listening.wait()
        return HttpResponse(str(await Tag.objects.acount()))

    async def main() -> None:
        serve_by(view)
        await exchange.serve()
        await asyncio.sleep(0)  # the listener ends
        assert exchange.content == b"0"
        assert ended == began[1:]
        assert None not in ended

    run(main())


def test_what_a_receive_does_when_it_is_cancelled_may_take_time(run: Runner, serve_by: Any) -> None:
    steps: list[str] = []

    class Served(Exchange):
        async def receive(self) -> dict[str, Any]:
            try:
                return await super().receive()
            except asyncio.CancelledError:
                steps.append("cancelled")
                await asyncio.sleep(0)
                raise
            finally:
                steps.append("ended")

    exchange = Served()

    async def view(request: HttpRequest) -> HttpResponse:
        await exchange.listening.wait()
        return HttpResponse("answered")

    async def main() -> None:
        serve_by(view)
        await exchange.serve()
        for _ in range(4):
            await asyncio.sleep(0)

    run(main())
    assert exchange.content == b"answered"
    assert steps == ["ended", "cancelled", "ended"]


def test_a_receive_that_is_cancelled_may_say_that_the_client_has_gone(
    run: Runner, serve_by: Any, told: list[str]
) -> None:
    class Served(Exchange):
        async def receive(self) -> dict[str, Any]:
            try:
                return await super().receive()
            except asyncio.CancelledError:
                return {"type": "http.disconnect"}

    exchange = Served()

    async def view(request: HttpRequest) -> HttpResponse:
        await exchange.listening.wait()
        return HttpResponse("answered")

    async def main() -> None:
        serve_by(view)
        await exchange.serve()

    run(main())
    assert (exchange.content, told) == (b"answered", ["started", "finished"])


def test_what_a_receive_does_when_it_is_cancelled_may_fail(run: Runner, serve_by: Any) -> None:
    class Served(Exchange):
        async def receive(self) -> dict[str, Any]:
            try:
                return await super().receive()
            finally:
                if self.sent:
                    raise LookupError("of the server's own")

    exchange = Served()

    async def view(request: HttpRequest) -> HttpResponse:
        await exchange.listening.wait()
        return HttpResponse("answered")

    async def main() -> None:
        serve_by(view)
        with pytest.raises(LookupError, match="of the server's own"):
            await exchange.serve()

    run(main())
    assert exchange.content == b"answered"


# --- Reading the request --------------------------------------------------------------------------


@pytest.mark.shortcut("handler")
@pytest.mark.parametrize(
    ("parts", "in_memory"),
    [([b""], True), ([b"all"], True), ([b"a", b"ll"], False), ([b"more than ten"], False)],
)
def test_a_body_is_read_whether_or_not_it_comes_at_once(
    run: Runner, serve_by: Any, settings: Any, parts: list[bytes], in_memory: bool
) -> None:
    settings.FILE_UPLOAD_MAX_MEMORY_SIZE = 10
    streams: list[Any] = []

    async def view(request: HttpRequest) -> HttpResponse:
        streams.append(request._stream)
        return HttpResponse(request.body)

    async def main() -> None:
        serve_by(view)
        exchange = Exchange(parts[0])
        exchange.incoming.get_nowait()
        for part in parts:
            message = {"type": "http.request", "body": part, "more_body": part is not parts[-1]}
            exchange.incoming.put_nowait(message)
        await exchange.serve()
        assert exchange.content == b"".join(parts)
        assert (type(streams[0]) is BytesIO) == in_memory
        assert streams[0].closed

    run(main())


def test_a_handler_that_reads_in_its_own_way_is_asked(run: Runner, serve_by: Any) -> None:
    class Handler(ASGIHandler):
        async def read_body(self, receive: Any) -> BytesIO:
            with await super().read_body(receive) as body:
                return BytesIO(body.read().upper())

    async def view(request: HttpRequest) -> HttpResponse:
        return HttpResponse(request.body)

    async def main() -> None:
        serve_by(view)
        exchange = Exchange(b"loud")
        await Handler()(exchange.scope, exchange.receive, exchange.send)
        assert exchange.content == b"LOUD"

    run(main())


# --- Note [Busy requests]


@pytest.mark.shortcut("handler")
def test_a_request_that_waits_for_its_database_only_and_not_for_long_does_not_listen(
    run: Runner, serve_by: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handler, "LISTEN_AFTER", 60.0)
    exchange = Exchange()

    async def view(request: HttpRequest) -> HttpResponse:
        with transaction.atomic():
            Tag.objects.create(name="a")
        return HttpResponse(f"tags: {Tag.objects.count()}")

    async def main() -> None:
        serve_by(view)
        await aio.run(Tag.objects.count)  # open the pool
        await exchange.start()
        assert not handler._busy.requests
        assert not exchange.listening.is_set()
        assert exchange.content == b"tags: 1"

    run(main())


@pytest.mark.parametrize("waits_for", ["database", "other"])
def test_a_client_that_has_gone_is_noticed_whatever_the_view_waits_for(
    run: Runner, serve_by: Any, waits_for: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if waits_for == "other":  # it is noticed without the timer
        monkeypatch.setattr(handler, "LISTEN_AFTER", 60.0)
    value = contextvars.ContextVar("value", default="the loop's")
    heard: list[str] = []
    ended: list[type[BaseException]] = []

    class Served(Exchange):
        async def receive(self) -> dict[str, Any]:
            heard.append(value.get())
            return await super().receive()

        async def serve(self) -> None:
            value.set("the request's")
            await super().serve()

    async def view(request: HttpRequest) -> HttpResponse:
        try:
            if waits_for == "other":
                await asyncio.Event().wait()
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_sleep(20)")
        except BaseException as exc:
            ended.append(type(exc))
            raise
        raise AssertionError("the client has gone")

    async def main() -> None:
        serve_by(view)
        await aio.run(Tag.objects.count)  # open the pool
        first, second = Served(), Served()
        for exchange in (first, second):
            exchange.hang_up()
        async with asyncio.timeout(10):
            await asyncio.gather(first.start(), second.start())
        assert ended == [asyncio.CancelledError] * 2
        assert heard == ["the request's"] * 4
        assert not handler._busy.requests

    run(main())


def test_a_client_that_has_gone_is_noticed_as_soon_as_the_readme_says() -> None:
    """The second look after `LISTEN_AFTER` finds it at the latest; looks are half of that apart."""
    assert handler.LISTEN_AFTER * 1.5 < 0.1


@pytest.mark.shortcut("handler")
def test_a_busy_request_whose_coroutine_is_closed_is_forgotten(run: Runner, serve_by: Any) -> None:
    waits = asyncio.Event()

    async def view(request: HttpRequest) -> HttpResponse:
        waits.set()
        return HttpResponse(f"tags: {Tag.objects.count()}")

    async def main() -> None:
        serve_by(view)
        await aio.run(Tag.objects.count)  # open the pool
        serving = Exchange().serve()
        waits_for = serving.send(None)
        assert waits.is_set()
        assert len(handler._busy.requests) == 1
        serving.close()
        del waits_for
        assert not handler._busy.requests

    run(main())


@pytest.mark.shortcut("handler")
def test_a_request_in_a_request_leaves_the_outer_one_listening(
    run: Runner, serve_by: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handler, "LISTEN_AFTER", 60.0)
    outer, inner = Exchange(), Exchange()
    exchanges = iter((outer, inner))

    async def view(request: HttpRequest) -> HttpResponse:
        if next(exchanges) is inner:
            return HttpResponse(f"tags: {Tag.objects.count()}")
        await inner.serve()
        await asyncio.Event().wait()
        raise AssertionError("the client has gone")

    async def main() -> None:
        serve_by(view)
        await aio.run(Tag.objects.count)  # open the pool
        outer.hang_up()
        async with asyncio.timeout(10):
            await outer.start()
        assert (inner.content, outer.content) == (b"tags: 0", b"")

    run(main())


def test_requests_of_a_loop_that_has_ended_are_not_listened_to_on_the_next(
    run: Runner, serve_by: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The timer of an ended loop never fires: the next loop needs a timer of its own."""

    async def view(request: HttpRequest) -> HttpResponse:
        return HttpResponse(f"tags: {Tag.objects.count()}")

    async def slow(request: HttpRequest) -> HttpResponse:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_sleep(20)")
        raise AssertionError("the client has gone")

    async def main(view: Any, exchange: Exchange) -> None:
        serve_by(view)
        await aio.run(Tag.objects.count)  # open the pool
        await exchange.start()

    run(main(view, Exchange()))
    gone = Exchange()
    gone.hang_up()
    run(asyncio.wait_for(main(slow, gone), 10))
    assert gone.sent == []


# --- Clean-up -----------------------------------------------------------------------------------


def test_a_second_request_in_one_task_begins_with_an_empty_query_log(
    run: Runner, serve_by: Any, settings: Any
) -> None:
    settings.DEBUG = True

    async def view(request: HttpRequest) -> HttpResponse:
        Tag.objects.count()
        return HttpResponse(str(len(connection.queries)))

    async def main() -> None:
        serve_by(view)
        for _ in range(2):
            exchange = Exchange()
            await exchange.serve()
            assert exchange.content == b"1"

    run(main())


def test_a_request_empties_the_log_of_who_watches_it_as_in_django(
    run: Runner, serve_by: Any
) -> None:
    async def view(request: HttpRequest) -> HttpResponse:
        return HttpResponse(str(Tag.objects.count()))

    async def main() -> None:
        serve_by(view)
        connection.force_debug_cursor = True
        await Tag.objects.acount()
        await Tag.objects.acount()
        await Exchange().start()
        assert len(connection.queries) == 1
        connection.force_debug_cursor = False

    run(main())


def test_what_a_wrapper_has_of_its_own_is_tidied_up(run: Runner) -> None:
    def green() -> None:
        assert state.is_at_rest()
        connection.inc_thread_sharing()
        try:
            Tag.objects.count()
            assert not state.is_at_rest()
        finally:
            connection.dec_thread_sharing()

    run.green(green)


# --- Signals ------------------------------------------------------------------------------------


def test_who_is_told_of_a_request_may_change(run: Runner, serve_by: Any) -> None:
    told: list[str] = []

    def note(**kwargs: Any) -> None:
        told.append("note")

    async def later(**kwargs: Any) -> None:
        told.append("later")

    class Noter:
        def note(self, **kwargs: Any) -> None:
            told.append("noter")

    def like_djangos(**kwargs: Any) -> None:
        told.append("like Django's")

    like_djangos.__module__ = "django.test.client"

    async def view(request: HttpRequest) -> HttpResponse:
        return HttpResponse("answered")

    async def tell() -> list[str]:
        told.clear()
        await Exchange().serve()
        return sorted(told)

    async def main() -> None:
        nonlocal like_djangos
        serve_by(view)
        for signal in (request_started, request_finished):
            signals._known.clear()
            assert await tell() == []
            signal.connect(note, sender=ASGIHandler)
            signal.connect(later, sender=Noter)
            assert await tell() == ["note"]
            signal.disconnect(note, sender=ASGIHandler)
            signal.disconnect(later, sender=Noter)
            for receiver, name in ((note, "note"), (later, "later")):
                signal.connect(receiver)
                assert await tell() == [name]
                signal.disconnect(receiver)
                assert await tell() == []
        noter = Noter()
        request_finished.connect(noter.note)
        request_started.connect(like_djangos)
        assert await tell() == ["like Django's", "noter"]
        del noter, like_djangos
        gc.collect()
        assert await tell() == []

    run(main())


def test_a_receiver_is_told_for_as_long_as_it_lives_although_django_has_made_it(
    run: Runner, serve_by: Any
) -> None:
    told: list[str] = []

    def note(**kwargs: Any) -> None:
        told.append("started")

    made = FunctionType(note.__code__, vars(cache), "made", None, note.__closure__)

    async def view(request: HttpRequest) -> HttpResponse:
        return HttpResponse("answered")

    async def main() -> None:
        nonlocal made
        serve_by(view)
        request_started.connect(made)
        await Exchange().serve()
        del made
        gc.collect()
        await Exchange().serve()
        assert told == ["started"]

    run(main())


def test_receivers_that_a_test_takes_away_for_a_while_are_not_told(
    run: Runner, serve_by: Any, told: list[str]
) -> None:
    async def view(request: HttpRequest) -> HttpResponse:
        return HttpResponse("answered")

    async def main() -> None:
        serve_by(view)
        await Exchange().serve()
        with mock.patch.object(request_started, "receivers", request_started.receivers[:-1]):
            await Exchange().serve()
        await Exchange().serve()
        assert told == ["started", "finished", "finished", "started", "finished"]

    run(main())


@pytest.mark.parametrize(
    ("name", "times"),
    [
        ("django.core.handlers.asgi.get_script_prefix", 2),  # the request calls it, too
        ("django.core.handlers.asgi.set_script_prefix", 1),
        ("django.core.signals.request_started", 1),
    ],
)
def test_a_name_that_djangos_handler_looks_up_may_be_patched(
    run: Runner, serve_by: Any, name: str, times: int
) -> None:
    async def view(request: HttpRequest) -> HttpResponse:
        return HttpResponse("answered")

    async def main() -> None:
        serve_by(view)
        module, _, attribute = name.rpartition(".")
        found = getattr(importlib.import_module(module), attribute)
        kind = mock.Mock if callable(found) else mock.NonCallableMock
        replaced = kind(wraps=found)
        with mock.patch(name, replaced):
            await Exchange().serve()
        assert len(replaced.mock_calls) == times

    run(main())


def test_a_receiver_without_a_hash_is_told(run: Runner, serve_by: Any) -> None:
    told: list[str] = []

    @dataclass
    class Receiver:
        name: str

        def __call__(self, **kwargs: Any) -> None:
            told.append(self.name)

    async def view(request: HttpRequest) -> HttpResponse:
        return HttpResponse("answered")

    async def main() -> None:
        serve_by(view)
        exchange = Exchange()
        await exchange.serve()
        assert exchange.content == b"answered"

    started, finished = Receiver("started"), Receiver("finished")
    request_started.connect(started)
    request_finished.connect(finished)
    try:
        run(main())
    finally:
        request_started.disconnect(started)
        request_finished.disconnect(finished)
    assert told == ["started", "finished"]


def test_who_patches_how_receivers_are_found_is_asked(
    run: Runner, serve_by: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sentry patches this method."""
    asked: list[Any] = []
    find = Signal._live_receivers

    def patched(signal: Signal, sender: Any) -> Any:
        asked.append(signal)
        return find(signal, sender)

    async def view(request: HttpRequest) -> HttpResponse:
        return HttpResponse("answered")

    async def main() -> None:
        serve_by(view)
        await Exchange().serve()
        monkeypatch.setattr(Signal, "_live_receivers", patched)
        await Exchange().serve()
        assert {request_started, request_finished} <= set(asked)

    run(main())


def test_a_function_of_djangos_that_is_told_of_the_start_is_told(
    run: Runner, serve_by: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def close_caches(**kwargs: Any) -> None:
        told.append("started")

    close_caches.__module__ = "django.core.cache"
    monkeypatch.setattr("django.core.cache.close_caches", close_caches)

    async def view(request: HttpRequest) -> HttpResponse:
        return HttpResponse("answered")

    async def main() -> None:
        serve_by(view)
        await Exchange().serve()

    request_started.connect(close_caches)
    try:
        run(main())
    finally:
        request_started.disconnect(close_caches)
    assert told == ["started"]
