"""Tells how each snippet of the pages is run: with which names, and what is looked at then."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, Self

from asgiref.sync import async_to_sync
from django.apps import AppConfig
from django.db import transaction
from django.http import HttpResponse
from django.shortcuts import get_object_or_404
from django.test import RequestFactory
from django.urls import include, path
from django.urls.resolvers import RegexPattern, URLResolver

import pgbackend
from pgbackend.routers import ReplicaRouter
from tests.docs import switching
from tests.docs.running import Names, Runner, code, settings
from tests.docs.shop.models import Account, Customer, Order, Receipt, Table

# --- What snippets speak of -----------------------------------------------------------------------


def _order(**fields: Any) -> Order:
    order = Order.objects.create(
        table=Table.objects.create(), customer=Customer.objects.create(), **fields
    )
    order.lines.create(dish="Broth")
    return order


def _request() -> Any:
    request: Any = RequestFactory().get("/")
    request.user = SimpleNamespace(tenant_id=7)
    return request


def _render(request: Any, template: str, context: Names) -> HttpResponse:
    """Return a page without the file of its template; as a template does, it reads QuerySets."""
    assert template == "order.html"
    lines = " ".join(line.dish for line in context.get("lines", ()))
    return HttpResponse(f"{context['order'].promise} {lines}")


class _Supplier:
    """An HTTP client of a supplier that promises 20 minutes."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None: ...

    async def get(self, url: str) -> Any:
        assert pgbackend.statistics()[0].leased == 0, "the snippet says that none is held meanwhile"
        return SimpleNamespace(json=lambda: {"minutes": 20})


class _Celery:
    """An app of Celery's kind, which runs tasks at once."""

    @staticmethod
    def task(function: Any) -> Any:
        function.delay = function
        return function


def _shop() -> Names:
    return {"Account": Account, "Order": Order, "Receipt": Receipt}


def _views() -> Names:
    return {**_shop(), "get_object_or_404": get_object_or_404, "render": _render}


def _view_with_supplier() -> Names:
    return {**_views(), "httpx": SimpleNamespace(AsyncClient=_Supplier), "SUPPLIER": "/minutes"}


def _account() -> Names:
    return {**_shop(), "pk": Account.objects.create().pk}


def _first_order() -> Names:
    Order.objects.create(pk=1)
    return _shop()


def _order_to_bill() -> Names:
    def send_invoice(pk: int, token: str | None) -> None: ...

    send_invoice.delay = send_invoice  # type: ignore[attr-defined]
    return {**_shop(), "app": _Celery, "order": _order(), "send_invoice": send_invoice}


class _Package:
    """A package with a middleware."""

    class TenantMiddleware:
        """A middleware of a package."""

        def __init__(self, get_response: Any) -> None:
            self.get_response = get_response


def _requests() -> Names:
    """Return names like those of the library `requests`, whose functions block."""

    def get(url: str, timeout: float) -> str:
        return url

    return {"requests": SimpleNamespace(get=get), "url": "http://127.0.0.1/"}


def _sites() -> Names:
    from django.contrib.admin import AdminSite

    return {"my_site": AdminSite("mine")}


def _urls() -> Names:
    return {"path": path, "include": include, "AppConfig": AppConfig}


def _payment() -> Names:
    return {"order": SimpleNamespace(pay=lambda: None, pay_again=lambda: None)}


def _saved_order() -> Names:
    return {"transaction": transaction, "order": _order()}


def _advisory_locks() -> Names:
    import pglock

    return {"pglock": pglock}


def _retries() -> Names:
    import pgtransaction

    return {"pgtransaction": pgtransaction, "seat": 1}


def _orders_to_feed() -> Names:
    async def all_orders() -> str:
        return "all"

    async def one_order(number: str) -> str:
        return number

    return {"all_orders": all_orders, "one_order": one_order}


# --- What is looked at then -----------------------------------------------------------------------


async def _promises(names: Names) -> None:
    response = await names["order"](_request(), _order().pk)
    assert response.content == b"20 Broth"


async def _renders(names: Names) -> None:
    response = await names["order"](_request(), _order(promise=5).pk)
    assert response.content == b"5 "


async def _receipts(names: Names) -> None:
    receipt = await names["pay"](_order())
    assert Receipt.objects.filter(pk=receipt.pk).exists()


def _knows_stock(names: Names) -> None:
    model = SimpleNamespace(_meta=SimpleNamespace(app_label="stock"))
    assert names["Router"]().primary_for(model) == "stock"


def _is_an_application(names: Names) -> None:
    assert callable(names["application"])


def _counts_in_tests(names: Names) -> None:
    """See only that the snippet is a test with the fixture `db`; tests/testcases runs such ones."""
    assert names["test_it"].__code__.co_varnames[:1] == ("db",)


async def _feeds(names: Names) -> None:
    feed = names["feed"](_request())
    assert await anext(feed) == "all"
    pgbackend.notify("orders", "7")
    assert await anext(feed) == "7"
    await feed.aclose()
    await anext(feed, None)


def _is_registered(names: Names) -> None:
    from pgbackend.models import Connections

    assert names["my_site"].is_registered(Connections)


async def _tells_health(names: Names) -> None:
    for name in ("live", "ready"):
        found = URLResolver(RegexPattern(""), names["urlpatterns"]).resolve(f"health/{name}/")
        response = await found.func(_request(), *found.args, **found.kwargs)
        assert response.status_code == 200


def _shows_metrics(names: Names) -> None:
    names["ShopConfig"].ready(None)
    try:
        found = URLResolver(RegexPattern(""), names["urlpatterns"]).resolve("metrics")
        assert b"pgbackend_pool" in found.func(_request()).content
    finally:
        names["prometheus"].unregister()


def _is_instrumented(names: Names) -> None:
    names["opentelemetry"].uninstrument()


# --- The cases ------------------------------------------------------------------------------------

#: Pages whose snippets are run as a whole, by a test of their own.
WHOLE = {"docs/start.md": "test_start.py", "docs/start-wagtail.md": "test_start.py"}
#: The cases, one for each snippet: its page, a text that only it has there, and its runner.
CASES: list[tuple[str, str, Runner]] = [
    *switching.CASES,
    ("README.md", "client.get(SUPPLIER)", code(_view_with_supplier, _promises)),
    ("README.md", 'was "django.db.backends', settings()),
    ("docs/admin-page.md", "INSTALLED_APPS", settings()),
    ("docs/admin-page.md", "my_site", code(_sites, _is_registered)),
    ("docs/health.md", "# urls.py", code(_urls, _tells_health)),
    ("docs/health.md", "health.readiness", code(_urls, _tells_health)),
    ("docs/index.md", "client.get(SUPPLIER)", code(_view_with_supplier, _promises)),
    ("docs/install.md", "async def pay", code(_shop, _receipts)),
    ("docs/listen.md", "async def feed", code(_orders_to_feed, _feeds)),
    ("docs/listen.md", "pgbackend.notify", code(_saved_order)),
    ("docs/listen.md", '"listen": {', settings()),
    ("docs/monitoring.md", "ShopConfig", code(_urls, _shows_metrics)),
    ("docs/monitoring.md", "opentelemetry.instrument()", code(dict, _is_instrumented)),
    ("docs/operating.md", "INSTALLED_APPS", settings()),
    ("docs/outcome.md", '"commit_id": True', settings()),
    ("docs/outcome.md", "error.verdict()", code(_payment)),
    ("docs/packages.md", "pglock.advisory", code(_advisory_locks)),
    ("docs/packages.md", "pgtransaction.atomic", code(_retries)),
    ("docs/poolers.md", '"pooler": "transaction"', settings()),
    ("docs/poolers.md", '"direct"', settings(DATABASES={"default": {"ENGINE": "pgbackend"}})),
    ("docs/replicas.md", "DATABASE_ROUTERS", settings()),
    ("docs/replicas.md", "with pgbackend.on_primary()", code(_account)),
    (
        "docs/replicas.md",
        "class Router",
        code(lambda: {"ReplicaRouter": ReplicaRouter}, _knows_stock),
    ),
    ("docs/replicas.md", "routers.token()", code(_order_to_bill)),
    ("docs/requests.md", "PGBACKEND_THREAD_LOCALS", settings()),
    ("docs/scale-out.md", '"max_size": 10', settings()),
    ("docs/scale-out.md", '"PORT": 6432', settings()),
    ("docs/scale-out.md", "DATABASE_ROUTERS", settings()),
    ("docs/session.md", "async def report", code(_first_order)),
    (
        "docs/session.md",
        '"app.tenant": request',
        code(lambda: {"request": _request(), "schema": "tenant_7"}),
    ),
    ("docs/session.md", "async def search", code(dict, lambda names: names["search"](None))),
    ("docs/session.md", "permission denied", code()),
    ("docs/settings.md", "async def token", settings()),
    ("docs/settings.md", "db1.example.org", settings()),
    ("docs/sync-views.md", "def order", code(_views, _renders)),
    (
        "docs/sync-views.md",
        "class RequestIdMiddleware",
        code(lambda: {"package": SimpleNamespace(middleware=_Package)}),
    ),
    ("docs/sync-views.md", "# asgi.py", code(dict, _is_an_application)),
    ("docs/sync-views.md", "asyncio.to_thread", code(_requests)),
    (
        "docs/tests.md",
        "def test_it",
        code(lambda: {"asyncio": asyncio, "async_to_sync": async_to_sync}, _counts_in_tests),
    ),
    ("docs/tests.md", "embedded.server", settings()),
]
