"""Tests the desk under uvicorn and load: a rush, boards that come and go, a lost database."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import psycopg
import pytest

from kitchen.models import Order
from tests.conftest import wait_for
from tests.kitchen.conftest import SERVED, parsed


@pytest.fixture
def client(served: str) -> Iterator[httpx.Client]:
    limits = httpx.Limits(max_connections=None)
    with httpx.Client(base_url=served, trust_env=False, timeout=30, limits=limits) as client:
        yield client


@pytest.fixture
def numbers(client: httpx.Client) -> Callable[[], dict[str, Any]]:
    """Return a function that reads the current numbers from the status page's feed."""

    def read() -> dict[str, Any]:
        with client.stream("GET", "/status/feed/") as stream:
            return next(data for name, data in parsed(stream.iter_lines()) if name == "numbers")

    return read


def watch(client: httpx.Client, stack: ExitStack) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the events of a board that stays open until the stack is closed."""
    stream = stack.enter_context(client.stream("GET", "/board/events/"))
    return parsed(stream.iter_lines())


@pytest.mark.sweep(one_in=2)
def test_two_hundred_orders_at_once_need_four_connections(client, numbers, menu) -> None:
    client.get("/status/")
    answer = client.post(
        "/status/rush/",
        data={"size": 200, "csrfmiddlewaretoken": client.cookies["csrftoken"]},
        headers={"accept": "application/json"},
    )
    assert answer.status_code == 202
    seen = []
    with client.stream("GET", "/status/feed/") as stream:
        for name, data in parsed(stream.iter_lines()):
            assert name == "numbers"
            seen.append(data)
            if not data["rush"]["running"]:
                break
    rush = seen[-1]["rush"]
    assert (rush["promised"], rush["unpromised"], rush["failed"]) == (200, 0, 0)
    assert Order.objects.filter(promised_minutes__isnull=False).count() == 200
    assert seen[-1]["peak"] >= 100, "they did wait at the same time"
    assert max(data["pool"]["leased"] for data in seen) <= 4
    assert {data["pool"]["max_size"] for data in seen} == {4}
    wait_for(lambda: numbers()["in_flight"] == 0, "each request to end", seconds=20)
    assert numbers()["pool"]["leased"] == 0


def test_a_second_rush_waits_for_the_first_to_end(client, menu, numbers) -> None:
    client.get("/status/")
    send = {
        "data": {"size": 20, "csrfmiddlewaretoken": client.cookies["csrftoken"]},
        "headers": {"accept": "application/json"},
    }
    assert client.post("/status/rush/", **send).status_code == 202
    assert client.post("/status/rush/", **send).status_code == 409
    wait_for(lambda: not numbers()["rush"]["running"], "the rush to end", seconds=20)
    assert Order.objects.count() == 20


def test_boards_that_close_are_forgotten(client, numbers, admin) -> None:
    with ExitStack() as stack:
        boards = [watch(client, stack) for _ in range(20)]
        for board in boards:
            assert next(board) == ("refresh", {})
        assert numbers()["watching"] == 20
        assert len(listening(admin)) == 1
    wait_for(lambda: numbers()["watching"] == 0, "the boards to be forgotten", seconds=20)
    wait_for(lambda: not listening(admin), "the listening connection to close", seconds=20)


def listening(admin: psycopg.Connection[Any]) -> list[int]:
    query = "SELECT pid FROM pg_stat_activity WHERE application_name = %s"
    return [pid for (pid,) in admin.execute(query, [f"{SERVED} (listens)"])]


def test_a_database_that_went_away_is_found_again(client, admin, menu) -> None:
    everyone = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name ^@ %s"
    order = {"table": "7", "lines": [{"dish": menu["Bread"].pk, "quantity": 1}]}
    with ExitStack() as stack:
        events = watch(client, stack)
        assert next(events) == ("refresh", {})
        admin.execute(everyone, [SERVED])
        assert next(events)[0] == "refresh"
        assert client.post("/api/orders/", json=order).status_code == 201
        assert next(events)[1]["guest"] == "Table 7"


def test_orders_from_everywhere_reach_every_board(client, menu) -> None:
    order = {"table": "7", "lines": [{"dish": menu["Bread"].pk, "quantity": 1}]}
    with ExitStack() as stack, ThreadPoolExecutor(10) as guests:
        boards = [watch(client, stack) for _ in range(3)]
        for board in boards:
            assert next(board)[0] == "refresh"
        placed = guests.map(lambda _: client.post("/api/orders/", json=order), range(10))
        ids = {answer.json()["id"] for answer in placed}
        assert len(ids) == 10
        for board in boards:
            promised: set[int] = set()
            while promised != ids:
                name, data = next(board)
                assert name == "order"
                if data["promised"]:
                    promised.add(data["id"])


def test_a_guest_who_hangs_up_leaves_the_order_and_no_lease(client, menu, numbers, served) -> None:
    body = {"table": "7", "lines": [{"dish": menu["Bread"].pk, "quantity": 1}]}
    guest = http.client.HTTPConnection(served.removeprefix("http://"), timeout=20)
    guest.request("POST", "/api/orders/", json.dumps(body))
    wait_for(Order.objects.exists, "the order to be written down", seconds=20)
    guest.close()  # while the kitchen thinks
    wait_for(lambda: numbers()["in_flight"] == 0, "the request to end", seconds=20)
    assert numbers()["pool"]["leased"] == 0
    assert Order.objects.get().status == "accepted"
