"""Tests ordering by programs, and the kitchen service that the project plays itself."""

from __future__ import annotations

import json
from typing import Any

import pytest
from django.test import AsyncClient

from kitchen.models import Order
from tests.kitchen.conftest import http, kitchen_service


async def post(body: Any, path: str = "/api/orders/") -> tuple[int, Any]:
    content = body if isinstance(body, str) else json.dumps(body)
    client = AsyncClient(enforce_csrf_checks=True)
    response = await client.post(path, content, content_type="application/json")
    return response.status_code, response.json()


def test_an_order_is_placed(desk, menu, settings) -> None:
    async def promise() -> bytes:
        return http('{"minutes": 9}')

    async def main() -> None:
        bread = {"dish": menu["Bread"].pk, "quantity": 2}
        async with kitchen_service(promise) as settings.KITCHEN_SERVICE_URL:
            status, answer = await post({"table": 4, "lines": [bread, bread]})
        order = await Order.objects.aget()
        assert status == 201
        assert answer == {"id": order.pk, "promised_minutes": 9, "status": "accepted"}
        assert (await order.lines.aget()).quantity == 4

    desk(main())


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ("{", "__all__"),
        ("[]", "__all__"),
        ('{"table": "\\ud800", "lines": []}', "__all__"),
        ({"table": "7"}, "__all__"),
        ({"table": "7", "lines": []}, "__all__"),
        ({"table": "7", "lines": [7]}, "__all__"),
        ({"table": "7", "lines": [{"dish": "1", "quantity": 1}]}, "__all__"),
        ({"table": "7", "lines": [{"dish": 1, "quantity": True}]}, "__all__"),
        ({"table": "7", "lines": [{"dish": 10**30, "quantity": 1}]}, "__all__"),
        ({"table": "", "lines": []}, "table"),
        ({"table": None, "lines": []}, "table"),
        ({"table": "a\0b", "lines": []}, "table"),
    ],
)
def test_a_wrong_order_is_refused_with_the_reason(body, where, desk, menu) -> None:
    status, answer = desk(post(body))
    assert status == 400
    assert answer["errors"][where]
    assert not Order.objects.exists()


def test_a_quantity_out_of_range_names_its_dish(desk, menu) -> None:
    bread = menu["Bread"].pk
    lines = [{"dish": bread, "quantity": 11}, {"dish": bread, "quantity": 10}]
    status, answer = desk(post({"table": "7", "lines": lines}))
    assert status == 400
    assert list(answer["errors"]) == [f"dish_{bread}"]


def test_the_menu_can_be_read(desk, menu) -> None:
    async def main() -> Any:
        return (await AsyncClient().get("/api/menu/")).json()

    dishes = desk(main())["dishes"]
    assert [(dish["name"], dish["price"]) for dish in dishes] == [
        ("Bread", "4.50"),
        ("Broth", "6.80"),
    ]


def test_the_service_promises_more_for_more(desk, settings) -> None:
    settings.KITCHEN_SERVICE_SECONDS = 0
    small = desk(post({"lines": [{"quantity": 1}]}, "/kitchen/estimate/"))
    large = desk(post({"lines": [{"quantity": 9}]}, "/kitchen/estimate/"))
    assert small == (200, {"minutes": 10})
    assert large == (200, {"minutes": 26})


@pytest.mark.parametrize("body", ["{", "[]", "{}", '{"lines": 1}', '{"lines": [{}]}'])
def test_the_service_refuses_what_it_does_not_understand(body, desk) -> None:
    status, _ = desk(post(body, "/kitchen/estimate/"))
    assert status == 400
