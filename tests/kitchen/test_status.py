"""Tests the status page's numbers, and the permission to start a rush."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from django.test import AsyncClient

from kitchen import inflight, rush, status
from kitchen.models import Order
from tests.kitchen.conftest import http, kitchen_service


@pytest.fixture
def counters(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replace the counters by fresh ones: a process counts all its requests."""
    monkeypatch.setattr(inflight, "requests", inflight.InFlight())
    monkeypatch.setattr(inflight, "service_calls", inflight.InFlight())
    return inflight


def test_the_numbers_are_those_of_the_pool(desk) -> None:
    async def main() -> dict[str, Any]:
        await asyncio.gather(*(Order.objects.acount() for _ in range(6)))
        return status.numbers()

    pool = desk(main())["pool"]
    assert pool["requests"] == 6
    assert 1 <= pool["size"] <= pool["max_size"] == 4
    assert (pool["leased"], pool["waiting"]) == (0, 0)


def test_requests_are_counted_while_they_are_answered(desk, menu, settings, counters) -> None:
    seen = []

    async def look() -> bytes:
        seen.append(counters.requests.now)
        return http('{"minutes": 5}')

    async def main() -> None:
        data = {"table": "7", f"dish_{menu['Bread'].pk}": 1}
        async with kitchen_service(look) as settings.KITCHEN_SERVICE_URL:
            await asyncio.gather(*(AsyncClient().post("/", data) for _ in range(3)))

    desk(main())
    assert max(seen) == counters.requests.peak == 3
    assert (counters.requests.now, counters.requests.answered) == (0, 3)


def test_streams_and_the_service_do_not_count_as_requests(desk, settings, counters) -> None:
    settings.KITCHEN_SERVICE_SECONDS = 0

    async def main() -> None:
        client = AsyncClient()
        for path in ("/board/events/", "/status/feed/"):
            (await client.get(path)).close()
        await client.post("/kitchen/estimate/", {"lines": []}, content_type="application/json")

    desk(main())
    assert counters.requests.answered == 0
    assert counters.service_calls.answered == 1


def test_a_request_that_fails_is_over_too(desk, counters) -> None:
    async def main() -> None:
        await AsyncClient().get("/nowhere/")

    desk(main())
    assert (counters.requests.now, counters.requests.answered) == (0, 1)


@pytest.mark.parametrize(
    ("open_to_all", "size", "code"),
    [
        (False, 5, 403),
        (True, 0, 400),
        (True, rush.MAX_SIZE + 1, 400),
        (True, "many", 400),
        (True, 5, 409),  # nothing on the menu
    ],
)
def test_a_rush_is_refused_with_the_reason(open_to_all, size, code, desk, settings) -> None:
    settings.KITCHEN_RUSH_OPEN = open_to_all

    async def main() -> Any:
        headers = {"accept": "application/json"}
        return await AsyncClient().post("/status/rush/", {"size": size}, headers=headers)

    response = desk(main())
    assert response.status_code == code
    assert response.json()["message"]


def test_the_page_shows_the_numbers_without_a_script(desk, menu, chef) -> None:
    async def main() -> tuple[str, str]:
        client = AsyncClient()
        guest = await client.get("/status/")
        await client.aforce_login(chef)
        staff = await client.get("/status/")
        return guest.content.decode(), staff.content.decode()

    guest, staff = desk(main())
    assert '<dd data-number="in_flight">1</dd>' in guest
    assert "Send them in" not in guest
    assert "Send them in" in staff
