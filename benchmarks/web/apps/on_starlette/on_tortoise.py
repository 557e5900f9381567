"""Answers with Tortoise ORM on asyncpg."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tortoise import Tortoise, fields
from tortoise.expressions import F
from tortoise.models import Model
from tortoise.transactions import in_transaction

from benchmarks.web.apps import given
from benchmarks.web.apps.shape import LIST, PAGE, TEN, gate, row_json

from .database import POOL, credentials


class Row(Model):
    id = fields.IntField(primary_key=True)
    name = fields.CharField(max_length=40)
    number = fields.IntField()
    price = fields.DecimalField(max_digits=8, decimal_places=2)
    at = fields.DatetimeField()

    class Meta:
        table = "bench_row"


class Counter(Model):
    id = fields.IntField(primary_key=True)
    number = fields.IntField()

    class Meta:
        table = "bench_counter"


class Entry(Model):
    id = fields.BigIntField(primary_key=True)
    name = fields.CharField(max_length=40)
    number = fields.IntField()

    class Meta:
        table = "bench_entry"


class Author(Model):
    id = fields.IntField(primary_key=True)
    name = fields.CharField(max_length=40)

    class Meta:
        table = "bench_author"


class Book(Model):
    id = fields.IntField(primary_key=True)
    title = fields.CharField(max_length=80)
    author: Any = fields.ForeignKeyField("bench.Author", related_name="books")
    reviews: Any

    class Meta:
        table = "bench_book"


class Review(Model):
    id = fields.IntField(primary_key=True)
    stars = fields.IntField()
    text = fields.CharField(max_length=80)
    book: Any = fields.ForeignKeyField("bench.Book", related_name="reviews")

    class Meta:
        table = "bench_review"
        ordering = ("id",)


@asynccontextmanager
async def lifespan(application: Any) -> AsyncIterator[None]:
    reached = {
        **credentials("database"),
        "minsize": POOL["min_size"],
        "maxsize": POOL["max_size"],
        "application_name": given.application_name(),
    }
    await Tortoise.init(
        {
            "connections": {
                "default": {"engine": "tortoise.backends.asyncpg", "credentials": reached}
            },
            "apps": {"bench": {"models": [__name__], "default_connection": "default"}},
            "use_tz": True,
            "timezone": "UTC",
        },
        # Requests run in tasks of the server's, which do not inherit a context variable set here.
        _enable_global_fallback=True,
    )
    yield
    await Tortoise.close_connections()


async def one_answer(n: int) -> Any:
    return row_json(await Row.get(id=n))


async def ten_answer(n: int) -> Any:
    rows = [await Row.get(id=n + more) for more in TEN]
    return {"rows": [row_json(row) for row in rows]}


async def list_answer(n: int) -> Any:
    rows = await Row.filter(id__gt=n).order_by("id").limit(LIST)
    return {"rows": [row_json(row) for row in rows]}


async def update_answer(n: int) -> Any:
    return {"updated": await Counter.filter(id=n).update(number=F("number") + 1)}


async def insert_answer(n: int) -> Any:
    async with in_transaction():
        entry = await Entry.create(name=f"entry {n}", number=n)
    return {"inserted": entry.id is not None}


async def page_answer(n: int) -> Any:
    books = Book.filter(id__gt=n).order_by("id").limit(PAGE)
    return await books.select_related("author").prefetch_related("reviews")


async def wait_answer(n: int, *, seconds: float) -> Any:
    first = await Row.get(id=n)
    await asyncio.sleep(seconds)
    second = await Row.get(id=n + 1)
    return {"rows": [row_json(first), row_json(second)]}


async def park_answer(n: int) -> Any:
    first = await Row.get(id=n)
    await gate.wait()
    second = await Row.get(id=n + 1)
    return {"rows": [row_json(first), row_json(second)]}
