"""Tests the warning of code that holds the event loop: what it tells, and when there is none."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.core.handlers.asgi import ASGIHandler
from django.db import connection
from django.http import HttpRequest, HttpResponse

import pgbackend
from pgbackend import aio, blocking, conf
from tests.conftest import Runner
from tests.library.models import Tag
from tests.support.exchange import Exchange, serve_by

__all__ = ["serve_by"]

BOUND = 0.05


class Warnings(logging.Handler):
    """Collects the warnings, and says when one has come."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.came = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())
        self.came.set()


@pytest.fixture
def warned() -> Iterator[Warnings]:
    collected = Warnings()
    logger = logging.getLogger("pgbackend.blocking")
    logger.addHandler(collected)
    yield collected
    logger.removeHandler(collected)
    blocking.stop()
    blocking._bound = None


def blocks_until(warned: Warnings) -> None:
    assert warned.came.wait(10)  # this line blocks the loop


def be_slow(seconds: float) -> None:
    time.sleep(seconds)


@pytest.mark.parametrize("whole", [False, True])
def test_the_line_that_blocks_is_told_while_it_blocks(
    run: Runner, settings: Any, serve_by: Any, warned: Warnings, whole: bool
) -> None:
    """The view goes on only after the warning; the warning names the request and the line."""
    settings.PGBACKEND_SLOW_STEP = BOUND

    def view(request: HttpRequest) -> HttpResponse:
        Tag.objects.count()
        blocks_until(warned)
        return HttpResponse("at last")

    async def async_view(request: HttpRequest) -> HttpResponse:
        return view(request)

    async def main() -> None:
        serve_by(view if whole else async_view)
        application = pgbackend.get_asgi_application() if whole else ASGIHandler()
        exchange = Exchange(application=application)
        await exchange.serve()
        assert exchange.content == b"at last"

    run(main())
    (text,) = warned.texts
    first, *stack = text.splitlines()
    assert first.startswith("GET / has held the event loop for 0.")
    place = next(n for n, line in enumerate(stack) if "this line blocks the loop" in line)
    assert f'{__file__}", line {blocks_until.__code__.co_firstlineno + 1}, in' in stack[place - 1]


def test_waits_and_short_steps_are_not_told(
    run: Runner, settings: Any, serve_by: Any, warned: Warnings
) -> None:
    """The request lasts longer than the bound, but no step of it does."""
    settings.PGBACKEND_SLOW_STEP = 0.5  # a busy machine may make a step longer than it is

    async def view(request: HttpRequest) -> HttpResponse:
        await asyncio.sleep(0.7)
        be_slow(0.01)
        return HttpResponse(str(Tag.objects.count()))

    async def main() -> None:
        serve_by(view)
        await Exchange().serve()

    run(main())
    assert warned.texts == []


@pytest.mark.sweep(one_in=2)
def test_a_task_of_a_request_is_watched_too_and_a_wait_in_it_is_not_told(
    run: Runner, settings: Any, serve_by: Any, warned: Warnings
) -> None:
    settings.PGBACKEND_SLOW_STEP = 0.5

    async def blocks() -> int:
        blocks_until(warned)
        return await Tag.objects.acount()

    async def waits() -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_sleep(0.8)")

    async def view(request: HttpRequest) -> HttpResponse:
        await asyncio.gather(waits(), aio.portal(waits()))
        assert warned.texts == []
        (count,) = await asyncio.gather(blocks())
        return HttpResponse(f"{count}")

    async def main() -> None:
        serve_by(view)
        exchange = Exchange()
        await exchange.serve()
        assert exchange.content == b"0"

    run(main())
    (text,) = warned.texts
    assert text.startswith("GET / has held")
    assert "this line blocks the loop" in text


def test_a_step_is_told_once_and_the_next_again(
    run: Runner, settings: Any, serve_by: Any, warned: Warnings
) -> None:
    settings.PGBACKEND_SLOW_STEP = BOUND

    async def view(request: HttpRequest) -> HttpResponse:
        for _ in range(2):
            blocks_until(warned)
            warned.came.clear()
            be_slow(2 * BOUND)
            await asyncio.sleep(0)
        return HttpResponse()

    async def main() -> None:
        serve_by(view)
        await Exchange().serve()

    run(main())
    assert len(warned.texts) == 2


@pytest.mark.parametrize("setting", [None, 0])
def test_by_default_no_request_is_watched(
    run: Runner, settings: Any, serve_by: Any, threads: list[str], setting: Any
) -> None:
    settings.PGBACKEND_SLOW_STEP = setting

    async def view(request: HttpRequest) -> HttpResponse:
        assert not blocking._steps
        return HttpResponse()

    async def main() -> None:
        asyncio.get_running_loop().set_debug(setting == 0)
        serve_by(view)
        await Exchange().serve()

    run(main())
    assert threads == []


def test_asyncios_debug_mode_watches_with_asyncios_bound(
    run: Runner, serve_by: Any, warned: Warnings
) -> None:
    async def view(request: HttpRequest) -> HttpResponse:
        blocks_until(warned)
        return HttpResponse()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_debug(True)
        loop.slow_callback_duration = BOUND
        serve_by(view)
        logging.getLogger("asyncio").disabled = True  # it tells the same, afterwards
        try:
            await Exchange().serve()
        finally:
            logging.getLogger("asyncio").disabled = False

    run(main())
    assert len(warned.texts) == 1


def test_errors_results_and_cancellations_pass_through(
    run: Runner, settings: Any, serve_by: Any, warned: Warnings
) -> None:
    settings.PGBACKEND_SLOW_STEP = 10
    ended: list[type[BaseException]] = []
    waits = asyncio.Event()

    async def view(request: HttpRequest) -> HttpResponse:
        if request.method == "DELETE":
            raise LookupError  # answered with 500
        try:
            waits.set()
            await asyncio.Event().wait()
        except BaseException as exc:
            ended.append(type(exc))
            raise
        return HttpResponse()

    async def main() -> None:
        serve_by(view)
        exchange = Exchange()
        exchange.scope["method"] = "DELETE"
        await exchange.serve()
        assert exchange.status == 500
        exchange = Exchange()
        task = exchange.start()
        await waits.wait()
        exchange.hang_up()
        await task
        assert ended == [asyncio.CancelledError]
        assert not blocking._steps

    run(main())


def test_the_watchdog_ends_when_there_is_nothing_to_watch(
    run: Runner, settings: Any, serve_by: Any, warned: Warnings, monkeypatch: Any
) -> None:
    settings.PGBACKEND_SLOW_STEP = BOUND
    monkeypatch.setattr(blocking._Watchdog, "IDLE", 0.0)

    async def view(request: HttpRequest) -> HttpResponse:
        return HttpResponse()

    async def main() -> None:
        serve_by(view)
        await Exchange().serve()

    run(main())
    deadline = time.monotonic() + 5
    while blocking._watchdog._thread is not None:
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("value", ["1", -1, True, [1]])
def test_a_wrong_setting_is_told(settings: Any, value: Any) -> None:
    settings.PGBACKEND_SLOW_STEP = value
    with pytest.raises(ImproperlyConfigured, match=r"PGBACKEND_SLOW_STEP is .*number of seconds"):
        conf.slow_step()
