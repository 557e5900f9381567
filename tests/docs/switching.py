"""Tells how the snippets of the pages are run that switch, deploy and keep tenants apart."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from asgiref.sync import sync_to_async
from django.apps import apps
from django.core.management import call_command
from django.db import (
    OperationalError,
    ProgrammingError,
    connection,
    connections,
    migrations,
    transaction,
)
from django.db import models as django_models
from django.db.models.expressions import RawSQL
from django.http import JsonResponse
from django.shortcuts import get_object_or_404
from django.test import RequestFactory
from django.utils import timezone
from psycopg import sql

import pgbackend
from tests.docs.running import Names, Runner, code, compiles, settings, sync_code
from tests.docs.shop.models import Customer, Order
from tests.docs.snippets import ROOT

# --- Switch ---------------------------------------------------------------------------------------


def _orders() -> Names:
    Order.objects.create(pk=1)
    return {"JsonResponse": JsonResponse, "Order": Order, "sync_to_async": sync_to_async}


async def _gives_one_order(names: Names) -> None:
    response = await names["order"](None, 1)
    assert response.content == b'{"equal": true}'
    await sync_to_async(connections.close_all)()


@contextmanager
def _models() -> Iterator[Names]:
    """Let a snippet define models of the app `shop`, in a schema of their own; forget them then."""
    models = apps.all_models["shop"]
    before = dict(models)
    models.clear()
    told: list[int] = []
    _execute("CREATE SCHEMA elsewhere")
    try:
        with pgbackend.session(search_path="elsewhere"):
            yield {
                "__name__": "tests.docs.shop.elsewhere",
                "tell_warehouse": told.append,
                "told": told,
                "JsonResponse": JsonResponse,
                "get_object_or_404": get_object_or_404,
                "models": django_models,
                "timezone": timezone,
                "transaction": transaction,
            }
    finally:
        _execute("DROP SCHEMA elsewhere CASCADE")
        models.clear()
        models.update(before)
        apps.clear_cache()


def _execute(statement: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(statement)


def _create_tables(*models: Any) -> None:
    with connection.schema_editor() as editor:
        for model in models:
            editor.create_model(model)


async def _sells_books(names: Names) -> None:
    _create_tables(names["Author"], names["Book"])
    author = names["Author"].objects.create(name="Ada")
    book = author.books.create(title="Notes", stock=3)
    response = await names["books"](None, author.pk)
    assert response.content == b'{"author": "Ada", "books": ["Notes"]}'
    assert (await names["buy"](None, book.pk)).content == b'{"stock": 2}'
    assert names["told"] == [book.pk]
    assert (await names["total"](None)).content == b'{"stock": 2}'


async def _takes_payments(names: Names) -> None:
    _create_tables(names["Order"], names["Line"])
    order = names["Order"].objects.create(table="7")
    order.lines.create(dish="Broth")
    response = await names["order"](None, order.pk)
    assert response.content == b'{"table": "7", "lines": ["Broth"]}'
    paid = (await names["pay"](None, order.pk)).content
    assert paid != b'{"paid_at": null}'
    assert paid == (await names["pay"](None, order.pk)).content


# --- Deploy ---------------------------------------------------------------------------------------


@contextmanager
def _consumers() -> Iterator[Names]:
    """Let a snippet import the consumers of a project."""
    module = ModuleType("shop.consumers")
    module.__dict__["websocket_urlpatterns"] = []
    with mock.patch.dict(sys.modules, {"shop": ModuleType("shop"), "shop.consumers": module}):
        yield {}


def _is_an_application(names: Names) -> None:
    assert callable(names["application"])


async def _answers_lifespan(names: Names) -> None:
    events = iter(["lifespan.startup", "lifespan.shutdown"])
    sent: list[str] = []

    async def receive() -> Names:
        return {"type": next(events)}

    async def send(message: Names) -> None:
        sent.append(message["type"])

    await names["application"]({"type": "lifespan"}, receive, send)
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


@contextmanager
def _url() -> Iterator[Names]:
    url = "postgresql://web:p%40ss@db.example.org:5433/shop?sslmode=require"
    with mock.patch.dict(os.environ, DATABASE_URL=url):
        yield {"os": os}


def _reads_the_url(names: Names) -> None:
    entry = names["DATABASES"]["default"]
    assert entry["ENGINE"] == "pgbackend"
    assert (entry["PASSWORD"], entry["NAME"], str(entry["PORT"])) == ("p@ss", "shop", "5433")
    assert entry["OPTIONS"] == {"sslmode": "require"}


def _sets_options(names: Names) -> None:
    assert names["DATABASES"]["default"]["OPTIONS"]["pool"]["max_size"] == 20


# --- Timeouts -------------------------------------------------------------------------------------


def _slow() -> Names:
    order = Order.objects.create()
    asleep = RawSQL("SELECT pg_sleep(30)::text::int", [])
    return {
        "JsonResponse": JsonResponse,
        "OperationalError": OperationalError,
        "Order": Order,
        "asyncio": asyncio,
        "order": order,
        "slow_number": lambda: asleep,
        "slow_orders": lambda: Order.objects.filter(number=asleep),
        "started": monotonic(),
        "transaction": transaction,
    }


def _was_cancelled(names: Names) -> None:
    assert names["count"] is None
    assert monotonic() - names["started"] < 10


async def _suggests_nothing(names: Names) -> None:
    response = await names["suggestions"](None)
    assert response.content == b'{"found": 0}'
    assert monotonic() - names["started"] < 10


def _finds_the_free_one(names: Names) -> None:
    assert names["free"] == names["order"]


# --- Tenants --------------------------------------------------------------------------------------


@contextmanager
def _schemas() -> Iterator[Names]:
    """Make the schemas of two tenants: the first has one order, the second two."""
    for orders, schema in enumerate(["tenant_7", "tenant_8"], start=1):
        _execute(f"CREATE SCHEMA {schema}")
        _execute(f"CREATE TABLE {schema}.shop_order (LIKE shop_order INCLUDING ALL)")
        _execute(
            f"INSERT INTO {schema}.shop_order (id, number)"
            f" SELECT n, n FROM generate_series(1, {orders}) AS n"
        )
    try:
        yield {"Order": Order, "schema_of": lambda request: request.schema}
    finally:
        _execute("DROP SCHEMA tenant_7 CASCADE; DROP SCHEMA tenant_8 CASCADE")


async def _serves_each_tenant(names: Names) -> None:
    def count(request: Any) -> int:
        return Order.objects.count()

    async def acount(request: Any) -> int:
        return await Order.objects.acount()

    one, two = SimpleNamespace(schema="tenant_7"), SimpleNamespace(schema="tenant_8")
    middleware = names["tenants"](acount)
    assert await asyncio.gather(*map(middleware, [one, two, one, two])) == [1, 2, 1, 2]
    middleware = names["tenants"](count)
    assert [middleware(one), await sync_to_async(middleware)(two)] == [1, 2]
    await sync_to_async(connections.close_all)()
    assert not Order.objects.exists()


def _counted_each_tenant(names: Names) -> None:
    assert names["orders"] == {"tenant_7": 1, "tenant_8": 2}


def _commands() -> Names:
    def migrate_one_app(name: str, **options: Any) -> None:
        call_command(name, "contenttypes", **options)  # all apps would take a second

    return {"call_command": migrate_one_app, "connection": connection, "sql": sql}


def _creates_a_tenant(names: Names) -> None:
    names["create_tenant"]("tenant_9")
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'tenant_9'")
            found = {name for (name,) in cursor.fetchall()}
        assert found == {"django_migrations", "django_content_type"}
    finally:
        _execute("DROP SCHEMA tenant_9 CASCADE")


def _customers() -> Names:
    for pk in (1, 2):
        Order.objects.create(customer=Customer.objects.create(pk=pk))
    return {"customer_of": lambda request: request.customer}


async def _filters_by_customer(names: Names) -> None:
    orders = names["OfCustomer"]()
    orders.model = Order

    async def seen(request: Any) -> list[int]:
        await asyncio.sleep(0)
        return [order.customer_id async for order in orders.all()]

    middleware = names["of_customer"](seen)
    requests = [SimpleNamespace(customer=pk) for pk in (1, 2, 1)]
    assert await asyncio.gather(*map(middleware, requests)) == [[1], [2], [1]]
    with pytest.raises(LookupError):
        orders.all()


# --- Row-level security ---------------------------------------------------------------------------

_SECURITY = (ROOT / "docs/row-level-security.md").read_text()
_STATEMENTS = re.findall(r"^```sql\n(.*?)^```$", _SECURITY, re.MULTILINE | re.DOTALL)


def _migration(text: str = _SECURITY) -> Any:
    """Return the migration of the page."""
    (found,) = re.findall(r"^```python\n(class Migration.*?)^```$", text, re.MULTILINE | re.DOTALL)
    names: Names = {"migrations": migrations}
    exec(compile(found, "docs/row-level-security.md", "exec"), names)
    return names["Migration"]("0002_policy", "shop")


def _migrate(migration: Any, *, back: bool = False) -> None:
    from django.db.migrations.state import ProjectState

    with connection.schema_editor() as editor:
        way = migration.unapply if back else migration.apply
        way(ProjectState(), editor)


@contextmanager
def _policies() -> Iterator[Names]:
    """Put the page's migration, role and policies in force, with orders of two customers."""
    for pk in (1, 2):
        Order.objects.create(pk=pk, customer=Customer.objects.create(pk=pk))
    migration = _migration()
    _migrate(migration)
    try:
        for statements in _STATEMENTS:
            _execute(statements)
        yield {"JsonResponse": JsonResponse, "Order": Order}
    finally:
        _execute("DROP POLICY IF EXISTS staff ON shop_order; DROP OWNED BY web; DROP ROLE web")
        _migrate(migration, back=True)


def _security_is_gone(names: Names) -> None:
    assert names["Migration"].operations
    _migrate(_migration())
    _migrate(_migration(), back=True)
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT relrowsecurity OR relforcerowsecurity"
            " OR EXISTS (SELECT FROM pg_policy WHERE polrelid = c.oid)"
            " FROM pg_class AS c WHERE oid = 'shop_order'::regclass"
        )
        assert cursor.fetchone() == (False,)


async def _hides_the_others(names: Names) -> None:
    async def auser(pk: int | None) -> Any:
        return SimpleNamespace(pk=pk)

    async def seen(request: Any) -> list[int]:
        await asyncio.sleep(0)
        return [order.pk for order in Order.objects.all()]

    async def add(request: Any) -> None:
        Order.objects.create(pk=3, customer_id=2)

    def request(pk: int | None) -> Any:
        found: Any = RequestFactory().get("/")
        found.auser = lambda: auser(pk)
        return found

    middleware = names["row_level_security"](seen)
    async with pgbackend.session(role="web"):
        requests = [request(1), request(2), request(None), request(1)]
        assert await asyncio.gather(*map(middleware, requests)) == [[1], [2], [], [1]]
        assert await seen(None) == []
        with pytest.raises(ProgrammingError, match="row-level security"):
            await names["row_level_security"](add)(request(1))


async def _lists_orders(names: Names) -> None:
    async with pgbackend.session(role="web", **{"app.customer": 2}):
        assert (await names["orders"](None)).content == b'{"orders": [2]}'


def _tests_customers(names: Names) -> None:
    names["test_customers_do_not_see_each_other"](None)
    _execute(
        "DROP POLICY customer ON shop_order; CREATE POLICY customer ON shop_order USING (true)"
    )
    with pytest.raises(AssertionError):
        names["test_customers_do_not_see_each_other"](None)


@contextmanager
def _policies_for_web() -> Iterator[Names]:
    with _policies() as names, pgbackend.session(role="web"):
        yield names


def _counts_all(names: Names) -> None:
    assert names["total"] == 2
    assert not Order.objects.exists()


# --- The cases ------------------------------------------------------------------------------------

SWITCH, DEPLOY, TIMEOUTS = "docs/switch.md", "docs/deploy.md", "docs/timeouts.md"
TENANTS, SECURITY, URL = "docs/tenants.md", "docs/row-level-security.md", "docs/database-url.md"
ASYNC_BACKEND = "docs/from-django-async-backend.md"
ORMS = "docs/from-sqlalchemy-tortoise.md"
#: A snippet of settings that goes on with those before it.
_ENTRY: Names = {"DATABASES": {"default": {"ENGINE": "pgbackend"}}}

CASES: list[tuple[str, str, Runner]] = [
    (SWITCH, "DATABASE_ENGINE", settings(os=os)),
    (SWITCH, "sync_to_async(Order.objects.get)", code(_orders, _gives_one_order)),
    (ASYNC_BACKEND, 'was "django_async_backend', settings()),
    (ASYNC_BACKEND, "AsyncModelMixin", compiles()),
    (ASYNC_BACKEND, "class Book(models.Model)", code(_models, _sells_books)),
    (ORMS, "DeclarativeBase", compiles()),
    (ORMS, "in_transaction()", compiles()),
    (ORMS, "models.Model", code(_models, _takes_payments)),
    (DEPLOY, '"shop.settings")\n\napplication', code(dict, _is_an_application)),
    (DEPLOY, "ProtocolTypeRouter", code(_consumers, _is_an_application)),
    (DEPLOY, '"lifespan"', code(dict, _answers_lifespan)),
    ("docs/cluster.md", "target_session_attrs", settings()),
    (URL, "import dj_database_url", code(_url, _reads_the_url)),
    (URL, "import environ", code(_url, _reads_the_url)),
    (URL, "embedded.database_settings", code(_url, _reads_the_url)),
    (URL, "setdefault", code(lambda: dict(_ENTRY), _sets_options)),
    (TIMEOUTS, "statement_timeout=10s", settings()),
    (TIMEOUTS, "async def search", code(dict, lambda names: names["search"](None))),
    (TIMEOUTS, "slow_number()", code(_slow, _was_cancelled)),
    (TIMEOUTS, "async def suggestions", code(_slow, _suggests_nothing)),
    (TIMEOUTS, "skip_locked", code(_slow, _finds_the_free_one)),
    (TENANTS, "def tenants", code(_schemas, _serves_each_tenant)),
    (TENANTS, "orders[schema]", code(_schemas, _counted_each_tenant)),
    (TENANTS, "def create_tenant", sync_code(_commands, _creates_a_tenant)),
    (TENANTS, "ORIGINAL_BACKEND", settings()),
    (TENANTS, "current_customer", code(_customers, _filters_by_customer)),
    (
        SECURITY,
        "class Migration",
        sync_code(lambda: {"migrations": migrations}, _security_is_gone),
    ),
    (SECURITY, "def row_level_security", code(_policies, _hides_the_others)),
    (SECURITY, "async def orders", code(_policies, _lists_orders)),
    (SECURITY, '"app.staff"', code(_policies_for_web, _counts_all)),
    (SECURITY, "def test_customers", code(_policies, _tests_customers)),
]
