"""Tests C15: declared session state holds for each statement of its block, and for no other.

The tenants of `tests/support/tenants.py` tell in which schema a statement of the ORM ran; `look()`
reads settings by raw SQL.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.db import DatabaseError, connection, connections, transaction

import pgbackend
from pgbackend import aio
from pgbackend.driver.session_settings import declared
from tests.conftest import Runner
from tests.library.models import Author
from tests.support.messages import messages
from tests.support.tenants import OUTSIDE, tenant, tenants  # noqa: F401 - pytest's

pytestmark = [pytest.mark.usefixtures("tenants")]

Body = Callable[[], Any]


def look(name: str = "app.tenant") -> Any:
    """Return the value of a setting; "" and None, of a name that is not set, are the same."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT current_setting(%s, true)", [name])
        return cursor.fetchone()[0] or None


def is_local() -> bool:
    """Return whether raw SQL must use SET LOCAL, for else its SET outlives the transaction."""
    return connection.in_atomic_block


def in_tenant(name: str, **settings: Any) -> Any:
    return pgbackend.session(search_path=[name, "public"], **settings)


@pytest.fixture(params=["sync", "green", "in atomic(), sync", "in atomic(), green", "in a thread"])
def do(request: pytest.FixtureRequest, run_once: Runner) -> Callable[[Body], Any]:
    """Return a function that calls another: in sync code, in green code, in a transaction."""

    def in_atomic(body: Body) -> Any:
        with transaction.atomic():
            return body()

    def in_thread(body: Body) -> Any:
        try:
            return body()
        finally:
            connections.close_all()

    return {
        "sync": lambda body: body(),
        "green": run_once.green,
        "in atomic(), sync": in_atomic,
        "in atomic(), green": lambda body: run_once.green(in_atomic, body),
        "in a thread": lambda body: run_once(sync_to_async(in_thread)(body)),
    }[request.param]


# --- In force inside, and only there ---


def test_a_setting_holds_for_the_statements_of_the_block_and_for_no_other(do: Any) -> None:
    def body() -> list[str]:
        seen = [tenant()]
        with in_tenant("one"):
            seen += [tenant(), tenant()]
        return [*seen, tenant()]

    assert do(body) == [OUTSIDE, "one", "one", OUTSIDE]


def test_blocks_nest_and_the_inner_one_wins(do: Any) -> None:
    def body() -> list[Any]:
        seen: list[Any] = []
        with in_tenant("one", **{"app.tenant": 1}):
            with in_tenant("two", application_name="inner"):
                seen.append((tenant(), look(), look("application_name")))
            seen.append((tenant(), look(), look("application_name") == "inner"))
            with pgbackend.session(**{"app.tenant": 3}):
                seen.append((tenant(), look()))
        return [*seen, (tenant(), look())]

    assert do(body) == [
        ("two", "1", "inner"), ("one", "1", False), ("one", "3"), (OUTSIDE, None),
    ]  # fmt: skip


def test_each_kind_of_statement_runs_with_the_settings(do: Any) -> None:
    def body() -> list[Any]:
        with in_tenant("one"):
            seen: list[Any] = [
                tenant(),
                [each.name for each in Author.objects.iterator(chunk_size=1)],
                [each.name for each in Author.objects.raw("SELECT * FROM library_author")],
                Author.objects.count(),
                Author.objects.filter(name="one").update(name="changed"),
            ]
            Author.objects.create(id=2, name="second")
            with connection.cursor() as cursor:
                cursor.executemany("UPDATE library_author SET name = %s WHERE id = %s", [("x", 2)])
                cursor.execute("SELECT name FROM library_author WHERE id = 2")
                seen += cursor.fetchone()
                with cursor.copy("COPY library_author (id, name) FROM STDIN") as copy:
                    copy.write_row((3, "copied"))
                seen += [row[0] for row in cursor.stream("SELECT count(*) FROM library_author")]
            Author.objects.filter(id__gt=1).delete()
            seen.append(Author.objects.get().name)
            Author.objects.update(name="one")
        return [*seen, [each.name for each in Author.objects.all()]]

    assert do(body) == ["one", ["one"], ["one"], 1, 1, "x", 3, "changed", [OUTSIDE]]


@pytest.mark.parametrize("fails", ["SELECT 1/0", "SELEC", "SELECT nothing", "VACUUM nothing"])
def test_a_statement_that_fails_undoes_no_setting(do: Any, fails: str) -> None:
    def body() -> list[str]:
        seen: list[str] = []
        with in_tenant("one"):
            for _ in range(2):
                with pytest.raises(DatabaseError), transaction.atomic(), connection.cursor() as c:
                    c.execute(fails)
                seen.append(tenant())
        with pytest.raises(DatabaseError), transaction.atomic(), connection.cursor() as cursor:
            cursor.execute(fails)
        return [*seen, tenant()]

    assert do(body) == ["one", "one", OUTSIDE]


def test_a_rollback_undoes_no_setting(do: Any) -> None:
    def body() -> list[str]:
        seen: list[str] = []
        with in_tenant("one"):
            for name in ("two", "three"):
                with transaction.atomic():
                    with in_tenant(name):
                        seen.append(tenant())
                    seen.append(tenant())
                    transaction.set_rollback(True)
                seen.append(tenant())
        with transaction.atomic():
            with in_tenant("two"):
                seen.append(tenant())
            with pytest.raises(ZeroDivisionError), transaction.atomic():
                seen.append(tenant())
                raise ZeroDivisionError
            seen.append(tenant())
        return [*seen, tenant()]

    assert do(body) == ["two", "one", "one", "three", "one", "one", "two", OUTSIDE, OUTSIDE, OUTSIDE]


def test_raw_sql_that_changes_a_declared_setting_lasts_for_one_statement(do: Any) -> None:
    def body() -> list[str]:
        seen: list[str] = []
        with in_tenant("one"):
            seen.append(tenant())
            with connection.cursor() as cursor:
                cursor.execute("SET LOCAL search_path TO two, public")
            seen.append(tenant())
            with connection.cursor() as cursor:
                cursor.execute("SELECT set_config('search_path', 'three', %s)", [is_local()])
            seen.append(tenant())
        return seen

    assert do(body) == ["one", "one", "one"]


def test_a_value_that_raw_sql_has_set_before_the_block_is_back_after_it() -> None:
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SET LOCAL app.tenant TO 'before'")
        with pgbackend.session(**{"app.tenant": "inside"}):
            assert look() == "inside"
        assert look() == "before"
    assert look() is None
    with connection.cursor() as cursor:
        cursor.execute("SET app.tenant TO 'raw'")
        with pgbackend.session(**{"app.tenant": "inside"}), transaction.atomic():
            assert look() == "inside"
        assert look() == "raw"
        cursor.execute("SET app.tenant TO 'other'")
        with pgbackend.session(**{"app.tenant": "inside"}):
            assert look() == "inside"
        assert look() == "other"
        cursor.execute("RESET app.tenant")


# --- Tasks, threads, contexts ---


def in_thread() -> str:
    """Return the tenant that a thread sees; close the thread's connection."""
    try:
        return tenant()
    finally:
        connections.close_all()


def test_tasks_and_threads_of_a_block_inherit_its_settings(run: Runner) -> None:
    async def main() -> list[Any]:
        inside = asyncio.Event()

        async def later() -> str:
            await inside.wait()
            return await Author.objects.values_list("name", flat=True).aget(pk=1)

        async with in_tenant("one"):
            outliving = asyncio.create_task(later())
            seen: list[Any] = list(
                await asyncio.gather(
                    aio.run(tenant), sync_to_async(in_thread)(), asyncio.to_thread(in_thread)
                )
            )
        seen.append(await aio.run(tenant))
        inside.set()
        return [*seen, await outliving]

    assert run(main()) == ["one", "one", "one", OUTSIDE, "one"]


def test_siblings_do_not_see_each_others_settings(run: Runner) -> None:
    async def one_of(name: str) -> list[str]:
        seen: list[str] = []
        async with in_tenant(name):
            for _ in range(5):
                seen.append(await aio.run(tenant))
                await asyncio.sleep(0)
        return [*seen, await aio.run(tenant)]

    async def main() -> Any:
        return await asyncio.gather(*map(one_of, ("one", "two", "three")))

    assert run(main()) == [[name] * 5 + [OUTSIDE] for name in ("one", "two", "three")]


def test_siblings_in_one_transaction_have_settings_of_their_own(run: Runner) -> None:
    async def one_of(name: str) -> list[str]:
        async with in_tenant(name):
            return [await aio.run(tenant) for _ in range(3)]

    async def main() -> Any:
        async with transaction.atomic():
            seen = await asyncio.gather(*map(one_of, ("one", "two", "three")))
            return [*seen, await aio.run(tenant)]

    assert run(main()) == [*[[name] * 3 for name in ("one", "two", "three")], OUTSIDE]
