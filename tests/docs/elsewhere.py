"""Runs the snippets of other projects' code on the pages for those who come from there.

    python -m tests.docs.elsewhere

They need django-async-backend, SQLAlchemy and Tortoise, which are in the environment of
`benchmarks.web` (it is made if it is missing), and a server: that of ``DATABASE_URL``, or one of
its own. The tests only compile these snippets.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.web.environment import interpreter
from pgbackend import embedded
from tests.docs.snippets import ROOT, collected

_NAMES_OF_SQLALCHEMY = """
import asyncio, os
from datetime import UTC, datetime
from sqlalchemy import DateTime, ForeignKey
from sqlalchemy.exc import MissingGreenlet
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship, selectinload
URL = os.environ["DATABASE_URL"].replace("postgresql://", "postgresql+asyncpg://").split("?")[0]
"""
_RUN_ON_SQLALCHEMY = """
async def main():
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    try:
        async with Session.begin() as session:
            session.add(Order(id=1, table="7", lines=[Line(dish="Broth")]))
        assert await order(1) == {"table": "7", "lines": ["Broth"]}
        paid = await pay(1)
        assert paid["paid_at"] and paid == await pay(1)
        async with Session() as session:
            one = await session.get_one(Order, 1)
            try:
                one.lines
            except MissingGreenlet:
                pass
            else:
                raise AssertionError("lazy loading is told to raise")
    finally:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.drop_all)
        await engine.dispose()

asyncio.run(main())
"""
_NAMES_OF_TORTOISE = """
import asyncio, os
from datetime import UTC, datetime
from tortoise import Tortoise, fields
from tortoise.exceptions import NoValuesFetched
from tortoise.models import Model
from tortoise.transactions import in_transaction
URL = os.environ["DATABASE_URL"].replace("postgresql://", "asyncpg://").split("?")[0]
"""
_RUN_ON_TORTOISE = """
async def main():
    await Tortoise.init(db_url=URL, modules={"orders": ["__main__"]})
    await Tortoise.generate_schemas()
    connection = Tortoise.get_connection("default")
    try:
        await Line.create(order=await Order.create(id=1, table="7"), dish="Broth")
        assert await order(1) == {"table": "7", "lines": ["Broth"]}
        paid = await pay(1)
        assert paid["paid_at"] and paid == await pay(1)
        one = await Order.get(id=1)
        try:
            len(one.lines)
        except NoValuesFetched:
            pass
        else:
            raise AssertionError("a relation that is not fetched is told to raise")
        assert [line.dish for line in await one.lines] == ["Broth"]
        counted = await connection.execute_query_dict("SELECT count(*) FROM orders_line")
        assert counted == [{"count": 1}]
    finally:
        await connection.execute_script("DROP TABLE orders_line; DROP TABLE orders_order")
        await Tortoise.close_connections()

asyncio.run(main())
"""
_NAMES_OF_ASYNC_BACKEND = """
import asyncio, json, os, sys, tempfile
from pathlib import Path
import django
from django.conf import settings
from pgbackend import embedded

home = tempfile.TemporaryDirectory()
(Path(home.name) / "shop").mkdir()
(Path(home.name) / "shop" / "__init__.py").touch()
sys.path.insert(0, home.name)
url = embedded.database_settings(os.environ["DATABASE_URL"])
settings.configure(
    DATABASES={"default": {"ENGINE": "django_async_backend.db.backends.postgresql", **url}},
    INSTALLED_APPS=["django_async_backend", "shop"],
)
django.setup()
__name__ = "shop.models"
told = []

async def tell_warehouse(pk):
    told.append(pk)
"""
_RUN_ON_ASYNC_BACKEND = """
from django.db import connection

def answer(response):
    return json.loads(response.content)

async def main():
    author = await Author.async_objects.acreate(name="Ada")
    book = await Book.async_objects.acreate(title="Notes", stock=3, author=author)
    assert answer(await books(None, author.pk)) == {"author": "Ada", "books": ["Notes"]}
    assert answer(await buy(None, book.pk)) == {"stock": 2}
    assert told == [book.pk]
    assert answer(await total(None)) == {"stock": 2}
    try:
        author.books.first()
    except django.core.exceptions.SynchronousOnlyOperation:
        pass
    else:
        raise AssertionError("related managers are told to be missing")
    await async_connections["default"].close()

with connection.schema_editor() as editor:
    editor.create_model(Author)
    editor.create_model(Book)
try:
    asyncio.run(main())
finally:
    with connection.schema_editor() as editor:
        editor.delete_model(Book)
        editor.delete_model(Author)
"""
#: The page of each snippet, a text that only it has there, and the code before and after it.
ELSEWHERE = [
    (
        "docs/from-sqlalchemy-tortoise.md",
        "DeclarativeBase",
        _NAMES_OF_SQLALCHEMY,
        _RUN_ON_SQLALCHEMY,
    ),
    ("docs/from-sqlalchemy-tortoise.md", "in_transaction()", _NAMES_OF_TORTOISE, _RUN_ON_TORTOISE),
    (
        "docs/from-django-async-backend.md",
        "AsyncModelMixin",
        _NAMES_OF_ASYNC_BACKEND,
        _RUN_ON_ASYNC_BACKEND,
    ),
]


def main(python: Path) -> int:
    """Run all snippets with an interpreter; return how many have failed."""
    failed = 0
    with embedded.server() as server:
        environ = {**os.environ, "DATABASE_URL": server.url, "PYTHONPATH": str(ROOT)}
        for page, text, before, after in ELSEWHERE:
            (snippet,) = [each for each in collected() if each.page == page and text in each.text]
            code = f"{before}\n{snippet.text}\n{after}"
            done = subprocess.run([str(python), "-c", code], env=environ, check=False)
            failed += done.returncode != 0
            print(f"{snippet}: {'failed' if done.returncode else 'runs'}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(interpreter()))
