"""Tests that a request gets the wrapper object of an ended one, and nothing else of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.db import connection, connections, transaction
from django.http import HttpRequest, HttpResponse

from pgbackend.base import DatabaseWrapper
from pgbackend.fast import wrappers
from tests.conftest import Runner
from tests.library.models import Tag
from tests.support.exchange import Exchange, serve_by

__all__ = ["serve_by"]


@pytest.fixture(autouse=True)
def _none_is_kept() -> Iterator[None]:
    wrappers.forget()
    yield
    wrappers.forget()


@pytest.fixture
def objects_of_two_requests(run: Runner, serve_by: Any) -> Callable[..., list[Any]]:
    """Serve two requests, one after the other; return the wrapper object of each."""

    def serve(meddle: Callable[[Any], Any] = lambda wrapper: None) -> list[Any]:
        used: list[Any] = []

        async def view(request: HttpRequest) -> HttpResponse:
            used.append(connections["default"])
            answer = HttpResponse(str(Tag.objects.count()))
            meddle(used[-1])
            return answer

        async def main() -> None:
            serve_by(view)
            for _ in range(2):
                exchange = Exchange()
                await exchange.start()
                assert exchange.content == b"0"

        run(main())
        return used

    return serve


@pytest.mark.shortcut("wrappers")
def test_a_request_has_the_wrapper_of_one_that_has_ended(objects_of_two_requests: Any) -> None:
    first, second = objects_of_two_requests()
    assert first is second


def _share(wrapper: Any) -> None:
    wrapper.inc_thread_sharing()
    wrapper._close_own()


@pytest.mark.parametrize(
    "meddle",
    [
        lambda wrapper: setattr(wrapper, "cursor", wrapper.cursor),
        lambda wrapper: wrapper._own_scope.execute_wrappers.append(print),
        lambda wrapper: wrapper._own.run_on_commit.append(print),
        _share,
        lambda wrapper: wrappers.forget(),
    ],
    ids=["patch", "execute_wrapper", "on_commit", "thread sharing", "setting"],
)
def test_one_that_was_changed_serves_no_other(
    objects_of_two_requests: Any, meddle: Callable[[Any], Any]
) -> None:
    first, second = objects_of_two_requests(meddle)
    assert first is not second


@pytest.mark.shortcut("wrappers")
def test_what_others_have_set_on_it_is_gone_with_the_request(objects_of_two_requests: Any) -> None:
    seen: list[Any] = []

    def meddle(wrapper: Any) -> None:
        seen.append(getattr(wrapper, "tenant", None))
        wrapper.tenant = "a"

    first, second = objects_of_two_requests(meddle)
    assert first is second
    assert seen == [None, None]


def test_one_whose_settings_are_no_more_those_of_its_alias_serves_no_other(
    objects_of_two_requests: Any, monkeypatch: Any
) -> None:
    first, _ = objects_of_two_requests()
    monkeypatch.setitem(connections.settings, "default", {**connections.settings["default"]})
    assert wrappers.take("default") is None
    assert first.settings_dict is not connections.settings["default"]


def test_one_of_a_derived_class_serves_no_other(
    objects_of_two_requests: Any, monkeypatch: Any
) -> None:
    class OfTenants(DatabaseWrapper):
        pass

    with monkeypatch.context() as patched:
        patched.setattr("pgbackend.base.DatabaseWrapper", OfTenants)
        first, second = objects_of_two_requests()
    assert isinstance(first, OfTenants)
    assert isinstance(second, OfTenants)
    assert first is not second


def test_a_changed_setting_is_seen_by_the_next_request(
    objects_of_two_requests: Any, settings: Any
) -> None:
    zones: list[Any] = []
    objects_of_two_requests(lambda wrapper: zones.append(wrapper.timezone_name))
    settings.TIME_ZONE = "Asia/Tokyo"
    settings.USE_TZ = False
    objects_of_two_requests(lambda wrapper: zones.append(wrapper.timezone_name))
    assert zones == ["UTC", "UTC", "Asia/Tokyo", "Asia/Tokyo"]


@pytest.mark.shortcut("wrappers")
def test_what_a_request_has_left_running_shares_nothing_but_the_object(
    run: Runner, serve_by: Any
) -> None:
    used: list[Any] = []
    left: list[asyncio.Task[None]] = []

    async def work(begun: asyncio.Event, may_end: asyncio.Event) -> None:
        with transaction.atomic():
            Tag.objects.create(name="of the first")
            used.append(connections["default"])
            begun.set()
            await may_end.wait()

    async def main() -> None:
        begun, may_end = asyncio.Event(), asyncio.Event()

        async def view(request: HttpRequest) -> HttpResponse:
            used.append(connections["default"])
            seen = Tag.objects.count()
            if not left:
                left.append(asyncio.create_task(work(begun, may_end)))
            return HttpResponse(f"{seen} {connection.in_atomic_block}")

        serve_by(view)
        await Exchange().start()
        await begun.wait()
        exchange = Exchange()
        await exchange.start()
        assert exchange.content == b"0 False"
        may_end.set()
        await left[0]
        assert len(set(map(id, used))) == 1, "it was one object"
        assert await Tag.objects.acount() == 1

    run(main())


def test_a_request_within_a_request_keeps_its_own(run: Runner, serve_by: Any) -> None:
    """The inner request has inherited the object; no third one may get it while it is in use."""
    inner = Exchange()
    begun: list[HttpRequest] = []

    async def main() -> None:
        async def view(request: HttpRequest) -> HttpResponse:
            begun.append(request)
            mine = connections["default"]
            before = str(Tag.objects.count())
            if len(begun) == 1:
                await inner.serve()
                assert wrappers.take("default") is None
            assert connections["default"] is mine
            return HttpResponse(before)

        serve_by(view)
        outer = Exchange()
        await outer.start()
        assert outer.content == b"0"

    run(main())
    assert inner.content == b"0"
