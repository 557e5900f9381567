"""Tests the order desk served as a whole green stack: its sync views need no thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

import pgbackend
from kitchen.views import takings
from tests.support.fixtures import threads

__all__ = ["threads"]

LINES = "day,dish,portions,amount\r\n{day},Bread,1,4.50\r\n{day},Broth,4,27.20\r\n"


@pytest.fixture
def sold(order: Callable[..., Any], menu: dict[str, Any]) -> str:
    """Sell something; return the file of the takings."""
    first = order()
    first.lines.create(dish=menu["Bread"], quantity=1, price="4.50")
    order()
    return LINES.format(day=first.created_at.date())


def client_of(application: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=application)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


@pytest.mark.parametrize("green", [True, False])
def test_the_takings_are_served_on_the_loop_or_in_a_thread(
    desk: Any, chef: Any, sold: str, threads: list[str], monkeypatch: Any, green: bool
) -> None:
    chef.set_password("quince")  # by the hasher of the tests' settings
    chef.save()
    places: list[bool] = []
    pages = takings._pages

    def noted() -> Any:
        places.append(threading.current_thread() is threading.main_thread())
        yield from pages()

    monkeypatch.setattr(takings, "_pages", noted)

    async def main() -> None:
        from proj import asgi, asgi_green

        async with client_of((asgi_green if green else asgi).application) as client:
            assert (await client.get("/takings.csv")).status_code == 403
            await _sign_in(client)
            threads.clear()
            answer = await client.get("/takings.csv")
            assert answer.headers["content-disposition"] == 'attachment; filename="takings.csv"'
            assert answer.text == sold
            page = await client.get("/admin/kitchen/order/")
            assert page.status_code == 200
            assert (threads == []) is green
        assert all(record.leased == 0 for record in pgbackend.statistics())

    if green:
        desk(main())
    else:
        with pytest.warns(Warning, match="must consume synchronous iterators"):
            desk(main())
    assert places == [green]


async def _sign_in(client: httpx.AsyncClient) -> None:
    page = await client.get("/sign-in/")
    token = page.cookies["csrftoken"]
    form = {"username": "chef", "password": "quince", "csrfmiddlewaretoken": token}
    signed_in = await client.post("/sign-in/", data=form)
    assert signed_in.status_code == 302


def test_the_pages_of_the_desk_are_served_by_the_green_stack_too(
    desk: Any, menu: dict[str, Any], chef: Any, threads: list[str]
) -> None:
    async def main() -> None:
        from proj.asgi_green import application

        async with client_of(application) as client:
            for path in ("/", "/board/", "/status/", "/api/menu/", "/sign-in/"):
                assert (await client.get(path)).status_code == 200, path
            assert "Broth" in (await client.get("/")).text

    desk(main())
    assert threads == []
