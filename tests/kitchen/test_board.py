"""Tests the board: its content, its permissions, and how news of it travels."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from django.db import connection, transaction
from django.test import AsyncClient

from kitchen import board, sse
from kitchen.models import Order
from kitchen.views.board import LIMIT, LIMIT_SERVED, columns
from pgbackend import aio
from tests.kitchen.conftest import url_of

JSON = "application/json"
LISTENING = (
    "SELECT pid FROM pg_stat_activity WHERE datname = %s AND application_name LIKE '%%(listens)'"
)


@pytest.fixture
def listening(admin: psycopg.Connection[Any]) -> Any:
    """Return the processes of the database server that listen for the board."""
    name = connection.settings_dict["NAME"]
    return lambda: [pid for (pid,) in admin.execute(LISTENING, [name])]


# --- Shown -------------------------------------------------------------------------------------


def test_orders_stand_in_the_column_of_their_status_first_come_first(order) -> None:
    first, second = order(), order()
    cooking, served = order(status="cooking"), order(status="served")
    shown = {column["status"].value: column["orders"] for column in columns()}
    assert shown == {
        "accepted": [first, second],
        "cooking": [cooking],
        "ready": [],
        "served": [served],
    }


def test_a_long_queue_shows_its_head_and_counts_all(desk, order) -> None:
    first = [order().pk for _ in range(LIMIT + 2)]
    served = [order(status="served").pk for _ in range(LIMIT_SERVED + 1)]
    new, _, _, done = columns()
    assert [one.pk for one in new["orders"]] == first[:LIMIT]
    assert (new["count"], new["more"]) == (LIMIT + 2, 2)
    assert [one.pk for one in done["orders"]] == served[:0:-1]
    page = desk(get("/board/")).content.decode()
    assert "and 2 more" in page
    assert f"The latest {LIMIT_SERVED} of {LIMIT_SERVED + 1}" in page


async def get(path: str, user: Any = None) -> Any:
    client = AsyncClient()
    if user:
        await client.aforce_login(user)
    return await client.get(path)


def test_the_number_of_statements_does_not_grow_with_the_board(
    order, django_assert_num_queries
) -> None:
    for _ in range(5):
        order()
        order(status="served")
    with django_assert_num_queries(7):
        for column in columns():
            [(line.dish.name, one.total) for one in column["orders"] for line in one.lines.all()]


def test_an_empty_board_says_so(desk) -> None:
    page = desk(get("/board/")).content.decode()
    assert "No new orders. They appear here the moment they are placed." in page


def test_buttons_are_for_the_staff(desk, order, chef) -> None:
    order()
    assert b"Start cooking" not in desk(get("/board/")).content
    assert b"Start cooking" in desk(get("/board/", chef)).content


def test_what_guests_write_is_text(desk, order) -> None:
    order("<script>alert(1)</script>", note="<b>bold</b>")
    page = desk(get("/board/")).content.decode()
    assert "&lt;script&gt;" in page
    assert "<b>" not in page


# --- Moved -------------------------------------------------------------------------------------


async def post(path: str, user: Any = None, *, accept: str = "text/html", **data: Any) -> Any:
    client = AsyncClient()
    if user:
        await client.aforce_login(user)
    return await client.post(path, data, headers={"accept": accept})


def test_staff_move_an_order_all_the_way(desk, order, chef) -> None:
    pk = order().pk
    for seen, then in (("accepted", "cooking"), ("cooking", "ready"), ("ready", "served")):
        response = desk(post(f"/board/orders/{pk}/move/", chef, seen=seen))
        assert (response.status_code, response.url) == (302, "/board/")
        assert Order.objects.get(pk=pk).status == then
    assert desk(post(f"/board/orders/{pk}/move/", chef, seen="served")).status_code == 302
    assert Order.objects.get(pk=pk).status == "served"


def test_of_two_who_move_one_order_one_does(desk, order, chef, admin) -> None:
    path = f"/board/orders/{order().pk}/move/"
    name = connection.settings_dict["NAME"]
    waits = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = %s"

    async def main(quicker: psycopg.Connection[Any]) -> Any:
        quicker.execute("UPDATE kitchen_order SET status = 'cooking'")
        slower = asyncio.create_task(post(path, chef, accept=JSON, seen="accepted"))
        async with asyncio.timeout(5):
            while not admin.execute(waits, [name]).fetchone():
                await asyncio.sleep(0.01)
        quicker.commit()
        return await slower

    with psycopg.connect(url_of(name)) as quicker:
        assert desk(main(quicker)).status_code == 409
    assert Order.objects.get().status == "cooking"


def test_who_waits_too_long_for_a_colleague_is_told_so(desk, order, chef, monkeypatch) -> None:
    path = f"/board/orders/{order().pk}/move/"
    monkeypatch.setattr("kitchen.placing.LOCK_TIMEOUT", timedelta(milliseconds=50))
    with psycopg.connect(url_of(connection.settings_dict["NAME"])) as colleague:
        colleague.execute("UPDATE kitchen_order SET status = 'cooking'")
        answer = desk(post(path, chef, accept=JSON, seen="accepted"))
        colleague.rollback()
    assert answer.status_code == 409
    assert "try again" in answer.json()["message"]
    assert Order.objects.get().status == "accepted"
    with connection.cursor() as cursor:
        cursor.execute("SHOW lock_timeout")
        assert cursor.fetchone() == ("0",)


@pytest.mark.parametrize("action", ["orders/{}/move", "clear"])
def test_guests_change_nothing(action, desk, order) -> None:
    path = f"/board/{action.format(order().pk)}/"
    page = desk(post(path, seen="accepted"))
    script = desk(post(path, accept=JSON, seen="accepted"))
    assert (page.status_code, page.url) == (302, "/sign-in/")
    assert script.status_code == 403
    assert Order.objects.get().status == "accepted"


def test_an_order_that_is_gone_is_said_to_be(desk, chef) -> None:
    assert desk(post("/board/orders/1/move/", chef, accept=JSON)).status_code == 404


def test_the_board_can_be_cleared(desk, order, chef) -> None:
    order(), order(status="ready"), order(status="served")
    answer = desk(post("/board/clear/", chef, accept=JSON))
    assert answer.json() == {"message": "2 orders marked as served."}
    assert not Order.objects.open().exists()


# --- News --------------------------------------------------------------------------------------


async def next_of(events: AsyncIterator[str]) -> str:
    async with asyncio.timeout(5):
        return await anext(events)


@asynccontextmanager
async def watching(**kwargs: Any) -> AsyncIterator[Any]:
    """Yield the events of the board to a browser that has just come and heard the first refresh."""
    watcher = board.listener.get().watch(**kwargs)
    events = aiter(watcher)
    assert (await next_of(events)).startswith("retry: ")
    assert await next_of(events) == sse.event("refresh", {})
    try:
        yield events
    finally:
        await events.aclose()


def test_an_order_is_heard_of_when_it_is_committed(desk, order) -> None:
    def write() -> None:
        with transaction.atomic():
            order("Ada")
            transaction.set_rollback(True)
        with transaction.atomic():
            order("Bob", promised_minutes=3)

    async def main() -> None:
        async with watching() as events:
            await aio.run(write)
            heard = await next_of(events)
        assert heard.startswith("event: order\ndata: {")
        assert '"guest": "Bob", "status": "accepted", "label": "New", "promised": 3' in heard

    desk(main())


def test_one_order_can_be_watched(desk, order) -> None:
    mine, other = order("mine"), order("other")

    def write() -> None:
        other.save()
        mine.save()

    async def main() -> None:
        async with watching(order_id=mine.pk) as events:
            await aio.run(write)
            assert '"guest": "mine"' in await next_of(events)

    desk(main())


def test_all_watchers_share_one_connection_that_goes_with_the_last(desk, listening) -> None:
    async def main() -> None:
        async with watching(), watching(), watching():
            assert len(listening()) == 1
            assert board.listener.get().watchers == 3
        async with asyncio.timeout(5):
            while listening():
                await asyncio.sleep(0.01)

    desk(main())


def test_a_lost_connection_is_found_again(desk, listening, admin, order, caplog) -> None:
    async def main() -> None:
        async with watching() as events:
            admin.execute("SELECT pg_terminate_backend(%s)", listening())
            assert await next_of(events) == sse.event("refresh", {})
            await aio.run(order)
            assert (await next_of(events)).startswith("event: order")

    desk(main())
    assert "was lost, and is opened again" in caplog.text


def test_what_is_not_ours_is_ignored(desk, order) -> None:
    def write() -> None:
        with connection.cursor() as cursor:
            for payload in ("{", "[]", "7", '"x"'):
                cursor.execute("SELECT pg_notify(%s, %s)", [board.CHANNEL, payload])
        order("Ada")

    async def main() -> None:
        async with watching() as events:
            await aio.run(write)
            assert '"guest": "Ada"' in await next_of(events)

    desk(main())


def test_who_falls_behind_gets_a_refresh_for_all_that_was_missed(run_once) -> None:
    async def main() -> list[str]:
        watcher = sse.Watcher(on_close=lambda watcher: None, size=3)
        events = aiter(watcher)
        for number in range(4):
            watcher.put("order", {"id": number})
        watcher.put("order", {"id": 4})
        heard = [await next_of(events) for _ in range(3)]
        await events.aclose()
        return heard[1:]

    assert run_once(main()) == [sse.event("refresh", {}), sse.event("order", {"id": 4})]


def test_a_silent_stream_shows_that_it_lives(run_once, monkeypatch) -> None:
    monkeypatch.setattr(sse, "HEARTBEAT", 0.01)

    async def main() -> str:
        events = aiter(sse.Watcher(on_close=lambda watcher: None))
        heard = [await next_of(events) for _ in range(2)]
        await events.aclose()
        return heard[1]

    assert run_once(main()) == ": still here\n\n"


def test_a_cancelled_stream_frees_its_watcher_at_once(desk) -> None:
    async def main() -> None:
        hub = board.listener.get()
        watcher = hub.watch()

        async def read() -> None:
            async for _ in watcher:
                pass

        task = asyncio.create_task(read())
        await asyncio.sleep(0)
        assert hub.watchers == 1
        task.cancel()
        await asyncio.wait([task])
        await asyncio.sleep(0)
        assert hub.watchers == 0

    desk(main())


def test_a_response_that_is_never_read_frees_its_watcher(desk) -> None:
    async def main() -> None:
        hub = board.listener.get()
        response = sse.stream(hub.watch())
        await asyncio.to_thread(response.close)  # as Django does
        async with asyncio.timeout(5):
            while hub.watchers:
                await asyncio.sleep(0)

    desk(main())


def test_streams_end_when_the_server_does(desk) -> None:
    async def main() -> None:
        async with watching() as events:
            sse.end_all()
            with pytest.raises(StopAsyncIteration):
                await next_of(events)

    desk(main())


def test_the_stream_is_an_event_stream(desk) -> None:
    async def main() -> Any:
        response = await AsyncClient().get("/board/events/?order=1")
        response.close()
        return response

    response = desk(main())
    assert response["Content-Type"] == "text/event-stream"
    assert response["Cache-Control"] == "no-store"
    assert desk(get("/board/events/?order=x")).status_code == 400
