"""Answers with asyncpg and no ORM: SQL by hand, on asyncpg's own pool."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

from benchmarks.web.apps import given
from benchmarks.web.apps.shape import CHUNK, LIST, PAGE, TEN, gate

from .database import POOL, credentials

_ROW = "SELECT id, name, number, price, at FROM bench_row"
_ONE = f"{_ROW} WHERE id = $1"
_LIST = f"{_ROW} WHERE id > $1 ORDER BY id LIMIT $2"
_BOOKS = (
    "SELECT b.id, b.title, a.name FROM bench_book b JOIN bench_author a ON a.id = b.author_id "
    "WHERE b.id > $1 ORDER BY b.id LIMIT $2"
)
_REVIEWS = "SELECT id, stars, text, book_id FROM bench_review WHERE book_id = ANY($1) ORDER BY id"

pool: asyncpg.Pool


@asynccontextmanager
async def lifespan(application: Any) -> AsyncIterator[None]:
    global pool  # noqa: PLW0603 - one a process
    pool = await asyncpg.create_pool(
        **credentials("database"),
        min_size=POOL["min_size"],
        max_size=POOL["max_size"],
        server_settings={"application_name": given.application_name()},
    )
    yield
    await pool.close()


def _row_json(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": row["id"],
        "name": row["name"],
        "number": row["number"],
        "price": str(row["price"]),
        "at": row["at"].isoformat(),
    }


async def one_answer(n: int) -> Any:
    return _row_json(await pool.fetchrow(_ONE, n))


async def ten_answer(n: int) -> Any:
    async with pool.acquire() as connection:
        rows = [await connection.fetchrow(_ONE, n + more) for more in TEN]
    return {"rows": [_row_json(row) for row in rows]}


async def list_answer(n: int) -> Any:
    return {"rows": [_row_json(row) for row in await pool.fetch(_LIST, n, LIST)]}


async def update_answer(n: int) -> Any:
    done = await pool.execute("UPDATE bench_counter SET number = number + 1 WHERE id = $1", n)
    return {"updated": int(done.split()[1])}


async def insert_answer(n: int) -> Any:
    async with pool.acquire() as connection, connection.transaction():
        key = await connection.fetchval(
            "INSERT INTO bench_entry (name, number) VALUES ($1, $2) RETURNING id", f"entry {n}", n
        )
    return {"inserted": key is not None}


async def page_answer(n: int) -> Any:
    async with pool.acquire() as connection:
        found = await connection.fetch(_BOOKS, n, PAGE)
        reviews = await connection.fetch(_REVIEWS, [row["id"] for row in found])
    books = {
        row["id"]: {"title": row["title"], "author": {"name": row["name"]}, "reviews": []}
        for row in found
    }
    for review in reviews:
        books[review["book_id"]]["reviews"].append(review)
    return books.values()


async def wait_answer(n: int, *, seconds: float) -> Any:
    first = await pool.fetchrow(_ONE, n)
    await asyncio.sleep(seconds)
    second = await pool.fetchrow(_ONE, n + 1)
    return {"rows": [_row_json(first), _row_json(second)]}


async def stream_answer(n: int) -> Any:
    rows = total = 0
    async with pool.acquire() as connection, connection.transaction():
        async for row in connection.cursor(f"{_ROW} ORDER BY id", prefetch=CHUNK):
            rows += 1
            total += row["number"]
    return {"rows": rows, "total": total}


async def park_answer(n: int) -> Any:
    first = await pool.fetchrow(_ONE, n)
    await gate.wait()
    second = await pool.fetchrow(_ONE, n + 1)
    return {"rows": [_row_json(first), _row_json(second)]}
