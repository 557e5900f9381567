"""Tests ordering at the page: the rows written, the promise, the refusals."""

from __future__ import annotations

import asyncio
import socket
from decimal import Decimal
from io import BytesIO
from typing import Any

import pytest
from django.core.handlers.asgi import ASGIRequest
from django.db import IntegrityError
from django.test import AsyncClient

import pgbackend
from kitchen import service
from kitchen.models import Dish, Order
from pgbackend import aio
from tests.kitchen.conftest import http, kitchen_service


async def twelve_minutes() -> bytes:
    return http('{"minutes": 12}')


async def place(client: AsyncClient, menu: dict[str, Any], **data: Any) -> Any:
    given = {"table": "7", f"dish_{menu['Broth'].pk}": 2, f"dish_{menu['Bread'].pk}": 1}
    return await client.post("/", given | data)


def test_an_order_is_written_and_promised(desk, menu, settings) -> None:
    async def main() -> None:
        client = AsyncClient()
        async with kitchen_service(twelve_minutes) as settings.KITCHEN_SERVICE_URL:
            response = await place(client, menu, note="no salt")
        order = await Order.objects.aget()
        assert response.status_code == 302
        assert response.url == order.get_absolute_url()
        assert (order.table, order.note, order.status) == ("7", "no salt", "accepted")
        assert order.promised_minutes == 12
        lines = [(line.dish_id, line.quantity, line.price) async for line in order.lines.all()]
        assert lines == [
            (menu["Bread"].pk, 1, Decimal("4.50")),
            (menu["Broth"].pk, 2, Decimal("6.80")),
        ]
        page = (await client.get(response.url)).content.decode()
        assert "About 12 minutes" in page
        assert "€ 18.10" in page

    desk(main())


def test_the_price_is_the_one_of_the_day_of_the_order(desk, menu, settings) -> None:
    async def main() -> None:
        async with kitchen_service(twelve_minutes) as settings.KITCHEN_SERVICE_URL:
            await place(AsyncClient(), menu)
        await Dish.objects.aupdate(price=99)
        order = await Order.objects.with_lines().aget()
        assert order.total == Decimal("18.10")

    desk(main())


def test_the_desk_remembers_its_guest(desk, menu, settings) -> None:
    async def main() -> None:
        client = AsyncClient()
        async with kitchen_service(twelve_minutes) as settings.KITCHEN_SERVICE_URL:
            await place(client, menu, table="Ada")
        page = (await client.get("/")).content.decode()
        assert 'value="Ada"' in page
        assert f"no. {(await Order.objects.aget()).pk}, new" in page

    desk(main())


def test_an_order_is_its_guests_and_the_staffs_to_see(desk, order, chef) -> None:
    url = order().get_absolute_url()

    async def main() -> None:
        client = AsyncClient()
        stranger = await client.get(url)
        assert stranger.status_code == 404
        assert b"That is not on the menu" in stranger.content
        await client.aforce_login(chef)
        assert (await client.get(url)).status_code == 200

    desk(main())


def test_no_connection_is_held_while_the_kitchen_thinks(desk, menu, settings) -> None:
    leased = []

    async def look() -> bytes:
        leased.append([pool.leased for pool in pgbackend.statistics("default")])
        return await twelve_minutes()

    async def main() -> None:
        async with kitchen_service(look) as settings.KITCHEN_SERVICE_URL:
            await place(AsyncClient(), menu)

    desk(main())
    assert leased == [[0]]


def test_a_promise_undoes_nothing_that_happened_meanwhile(desk, menu, settings) -> None:
    async def cooked_already() -> bytes:
        await Order.objects.aupdate(status=Order.Status.COOKING)
        return await twelve_minutes()

    async def main() -> None:
        async with kitchen_service(cooked_already) as settings.KITCHEN_SERVICE_URL:
            await place(AsyncClient(), menu)
        order = await Order.objects.aget()
        assert (order.status, order.promised_minutes) == ("cooking", 12)

    desk(main())


# --- The kitchen service fails -----------------------------------------------------------------


async def never() -> bytes:
    await asyncio.Event().wait()
    return b""


FAILURES = {
    "is slow": never,
    "has an error": lambda: asyncio.sleep(0, http("oh", "500 Oh")),
    "hangs up": lambda: asyncio.sleep(0, b""),
    "is no JSON": lambda: asyncio.sleep(0, http("soon")),
    "has no minutes": lambda: asyncio.sleep(0, http("[]")),
    "has no sense": lambda: asyncio.sleep(0, http('{"minutes": -1}')),
}


@pytest.mark.parametrize("answer", FAILURES.values(), ids=FAILURES)
def test_an_order_stands_when_the_service(answer, desk, menu, settings, caplog) -> None:
    settings.KITCHEN_SERVICE_TIMEOUT = 0.2 if answer is never else 5

    async def main() -> None:
        client = AsyncClient()
        async with kitchen_service(answer) as settings.KITCHEN_SERVICE_URL:
            response = await place(client, menu)
        order = await Order.objects.aget()
        assert (order.status, order.promised_minutes) == ("accepted", None)
        page = (await client.get(response.url)).content.decode()
        assert "has not told us a time yet" in page

    desk(main())
    assert "no promise from the kitchen service" in caplog.text


def test_an_order_stands_when_the_service_is_down(desk, menu, settings) -> None:
    async def main(port: int) -> None:
        settings.KITCHEN_SERVICE_URL = f"http://127.0.0.1:{port}/"
        assert (await place(AsyncClient(), menu)).status_code == 302
        assert (await Order.objects.aget()).promised_minutes is None

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        desk(main(taken.getsockname()[1]))


def request_at(*server: Any) -> ASGIRequest:
    headers = [(b"host", b"evil.example")]
    scope = {"type": "http", "method": "GET", "path": "/", "headers": headers, "server": server}
    return ASGIRequest(scope, BytesIO())


@pytest.mark.parametrize(
    ("host", "url"), [("10.0.0.5", "http://10.0.0.5:8000"), ("::1", "http://[::1]:8000")]
)
def test_the_server_asks_itself_and_not_whom_a_client_names(host, url) -> None:
    assert service.own_address(request_at(host, 8000)) == url


def test_a_server_on_a_unix_socket_is_told_what_to_set() -> None:
    with pytest.raises(ValueError, match="set KITCHEN_SERVICE_URL"):
        service.own_address(request_at("/run/desk.sock", None))


# --- Refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"table": ""}, "This field is required."),
        ({"table": "x" * 41}, "at most 40 characters"),
        ({"Broth": 21}, "less than or equal to 20"),
        ({"Broth": -1}, "greater than or equal to 0"),
        ({"Broth": "two"}, "Enter a whole number."),
        ({"Broth": 0, "Bread": ""}, "Choose at least one dish."),
    ],
)
def test_a_wrong_order_is_refused_with_the_reason(wrong, message, desk, menu) -> None:
    data = {f"dish_{menu[name].pk}" if name in menu else name: wrong[name] for name in wrong}

    async def main() -> None:
        response = await place(AsyncClient(), menu, note="kept", **data)
        page = response.content.decode()
        assert response.status_code == 422
        assert 'role="alert"' in page
        assert message in page
        assert "kept" in page
        assert not await Order.objects.aexists()

    desk(main())


def test_what_is_not_on_offer_cannot_be_ordered(desk, menu) -> None:
    async def main() -> None:
        client = AsyncClient()
        assert b"Oysters" not in (await client.get("/")).content
        data = {"table": "7", f"dish_{menu['Oysters'].pk}": 1}
        assert (await client.post("/", data)).status_code == 422

    desk(main())


def test_an_order_is_written_whole_or_not_at_all(desk, menu) -> None:
    from kitchen.forms import OrderForm
    from kitchen.models import Section
    from kitchen.placing import place as place_form

    def main() -> OrderForm:
        form = OrderForm.from_json(
            {"table": "7", "lines": [{"dish": menu["Bread"].pk, "quantity": 1}]},
            menu=list(Section.objects.menu()),
        )
        assert form.is_valid()
        menu["Bread"].delete()
        return form

    async def placed() -> None:
        form = await aio.run(main)
        with pytest.raises(IntegrityError):
            await aio.portal(place_form(request_at("127.0.0.1", 80), form))
        assert not await Order.objects.aexists()

    desk(placed())


def test_an_empty_menu_says_so(desk) -> None:
    async def main() -> None:
        response = await AsyncClient().get("/")
        assert response.status_code == 200
        assert b"The menu is still being written" in response.content

    desk(main())
