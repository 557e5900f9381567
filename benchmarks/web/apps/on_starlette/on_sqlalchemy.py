"""Answers with SQLAlchemy's async ORM, a session for each request.

As in Django, a single statement is no transaction: the engine is in autocommit, and only `insert`
and the server-side cursor of `stream` have one. That is less work than SQLAlchemy's default.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import BigInteger, DateTime, ForeignKey, Numeric, String, select, update
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    joinedload,
    mapped_column,
    relationship,
    selectinload,
)

from benchmarks.web.apps import given
from benchmarks.web.apps.shape import CHUNK, LIST, PAGE, TEN, row_json

from .database import POOL, credentials


class Base(DeclarativeBase):
    pass


class Row(Base):
    __tablename__ = "bench_row"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(40))
    number: Mapped[int]
    price: Mapped[Decimal] = mapped_column(Numeric(8, 2))
    at: Mapped[datetime] = mapped_column(DateTime(timezone=True))


class Counter(Base):
    __tablename__ = "bench_counter"
    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int]


class Entry(Base):
    __tablename__ = "bench_entry"
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    name: Mapped[str] = mapped_column(String(40))
    number: Mapped[int]


class Author(Base):
    __tablename__ = "bench_author"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(40))


class Book(Base):
    __tablename__ = "bench_book"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(String(80))
    author_id: Mapped[int] = mapped_column(ForeignKey("bench_author.id"))
    author: Mapped[Author] = relationship()
    reviews: Mapped[list[Review]] = relationship(order_by="Review.id")


class Review(Base):
    __tablename__ = "bench_review"
    id: Mapped[int] = mapped_column(primary_key=True)
    stars: Mapped[int]
    text: Mapped[str] = mapped_column(String(80))
    book_id: Mapped[int] = mapped_column(ForeignKey("bench_book.id"))


_DRIVER = given.stack()["driver"]
_NAME = given.application_name()
_ARGUMENTS = {
    "asyncpg": lambda: {
        **credentials("database"),
        "server_settings": {"application_name": _NAME},
    },
    "psycopg": lambda: {**credentials("dbname"), "application_name": _NAME},
}
engine = create_async_engine(
    f"postgresql+{_DRIVER}://",
    connect_args=_ARGUMENTS[_DRIVER](),
    isolation_level="AUTOCOMMIT",
    pool_size=POOL["max_size"],
    max_overflow=0,
    pool_timeout=POOL["timeout"],
)
Session = async_sessionmaker(engine, expire_on_commit=False)
Transaction = async_sessionmaker(
    engine.execution_options(isolation_level="READ COMMITTED"), expire_on_commit=False
)


@asynccontextmanager
async def lifespan(application: Any) -> AsyncIterator[None]:
    yield
    await engine.dispose()


async def one_answer(n: int) -> Any:
    async with Session() as session:
        return row_json(await session.get_one(Row, n))


async def ten_answer(n: int) -> Any:
    async with Session() as session:
        rows = [await session.get_one(Row, n + more) for more in TEN]
    return {"rows": [row_json(row) for row in rows]}


async def list_answer(n: int) -> Any:
    async with Session() as session:
        rows = await session.scalars(select(Row).where(Row.id > n).order_by(Row.id).limit(LIST))
        return {"rows": [row_json(row) for row in rows]}


async def update_answer(n: int) -> Any:
    async with Session() as session:
        done = await session.execute(
            update(Counter).where(Counter.id == n).values(number=Counter.number + 1)
        )
    return {"updated": done.rowcount}


async def insert_answer(n: int) -> Any:
    entry = Entry(name=f"entry {n}", number=n)
    async with Transaction.begin() as session:
        session.add(entry)
    return {"inserted": entry.id is not None}


async def page_answer(n: int) -> Any:
    books = select(Book).options(joinedload(Book.author), selectinload(Book.reviews))
    async with Session() as session:
        found = await session.scalars(books.where(Book.id > n).order_by(Book.id).limit(PAGE))
        return found.all()


async def wait_answer(n: int, *, seconds: float) -> Any:
    async with Session() as session:
        first = await session.get_one(Row, n)
        await asyncio.sleep(seconds)
        second = await session.get_one(Row, n + 1)
    return {"rows": [row_json(first), row_json(second)]}


async def stream_answer(n: int) -> Any:
    rows = total = 0
    query = select(Row).order_by(Row.id).execution_options(yield_per=CHUNK)
    async with Transaction() as session:
        found = await session.stream_scalars(query)
        # Row by row, each row would cost a switch of greenlets.
        async for chunk in found.partitions():
            for row in chunk:
                rows += 1
                total += row.number
    return {"rows": rows, "total": total}
