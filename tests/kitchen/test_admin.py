"""Tests the admin, the menu's command, and their effects on the board."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from django.core.management import call_command
from django.db import IntegrityError, transaction
from django.test import AsyncClient

from kitchen import sse
from kitchen.models import Dish, Order, Section
from tests.kitchen.test_board import next_of, watching


@pytest.mark.parametrize(
    "page",
    [
        "",
        "kitchen/order/",
        "kitchen/order/?q=Broth",
        "kitchen/order/add/",
        "kitchen/order/{order}/change/",
        "kitchen/order/{order}/delete/",
        "kitchen/dish/",
        "kitchen/dish/{dish}/change/",
        "kitchen/section/",
        "auth/user/",
    ],
)
def test_its_pages_load(page, desk, order, chef) -> None:
    path = f"/admin/{page.format(order=order().pk, dish=Dish.objects.first().pk)}"

    async def main() -> Any:
        client = AsyncClient()
        await client.aforce_login(chef)
        return await client.get(path)

    response = desk(main())
    assert response.status_code == 200
    assert b"kitchen/admin.css" in response.content


def test_lists_say_what_an_order_is_worth(desk, order, chef) -> None:
    order("Ada", promised_minutes=14)

    async def main() -> str:
        client = AsyncClient()
        await client.aforce_login(chef)
        return (await client.get("/admin/kitchen/order/")).content.decode()

    page = desk(main())
    assert "€ 13.60" in page
    assert "14 min" in page


def test_a_change_in_the_admin_is_news_for_the_board(desk, order, chef) -> None:
    pk = order("Ada").pk

    async def main() -> None:
        client = AsyncClient()
        await client.aforce_login(chef)
        chosen = {"action": "mark_served", "_selected_action": [pk]}
        async with watching() as events:
            assert (await client.post("/admin/kitchen/order/", chosen)).status_code == 302
            assert '"label": "Served"' in await next_of(events)

    desk(main())
    assert Order.objects.get().status == "served"


def test_clearing_the_board_is_one_piece_of_news(desk, order, chef) -> None:
    order(), order()

    async def main() -> None:
        client = AsyncClient()
        await client.aforce_login(chef)
        async with watching() as events:
            await client.post("/board/clear/")
            assert await next_of(events) == sse.event("refresh", {"cleared": 2})

    desk(main())


def test_the_menu_is_seeded_once_and_keeps_what_was_edited() -> None:
    call_command("seed_menu", verbosity=0)
    dishes = Dish.objects.count()
    Dish.objects.filter(name="Quince tart").update(price=Decimal("1.00"))
    call_command("seed_menu", verbosity=0)
    assert Dish.objects.count() == dishes > 15
    assert Dish.objects.get(name="Quince tart").price == Decimal("1.00")


def test_the_database_refuses_what_no_form_lets_through(menu, order) -> None:
    line = order().lines.get()
    wrong = (
        lambda: Order.objects.create(table="7", status="lost"),
        lambda: Dish.objects.filter(pk=menu["Bread"].pk).update(price=-1),
        lambda: line.__class__.objects.update(quantity=21),
        lambda: line.order.lines.create(dish=line.dish, quantity=1, price=1),
        lambda: Section.objects.create(name="To start"),
    )
    for attempt in wrong:
        with pytest.raises(IntegrityError), transaction.atomic():
            attempt()
