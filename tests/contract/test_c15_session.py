"""Tests C15: declared session state holds for each statement of its block, and for no other.

The tenants of `tests/support/tenants.py` tell in which schema a statement of the ORM ran; `look()`
reads settings by raw SQL.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.db import DatabaseError, connection, connections, transaction

import pgbackend
from pgbackend import aio
from pgbackend.base import DatabaseWrapper
from tests.conftest import Runner
from tests.library.models import Author
from tests.support.fixtures import settings_of_default
from tests.support.messages import messages
from tests.support.sweep import CANCELLING, Mode, Outcome, sweep
from tests.support.tenants import OUTSIDE, look, tenant

pytestmark = [pytest.mark.usefixtures("tenants")]

Body = Callable[[], Any]


def is_local() -> bool:
    """Return whether raw SQL must use SET LOCAL, for else its SET outlives the transaction."""
    return connection.in_atomic_block


def in_tenant(name: str, **settings: Any) -> Any:
    return pgbackend.session(search_path=[name, "public"], **settings)


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

    inside = ["two", "one", "one", "three", "one", "one"]
    assert do(body) == [*inside, "two", OUTSIDE, OUTSIDE, OUTSIDE]


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


@pytest.mark.sweep(one_in=3)
@pytest.mark.parametrize("mode", CANCELLING, ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("in_transaction", [False, True], ids=["autocommit", "atomic"])
def test_a_cancellation_at_any_wait_leaves_no_setting_behind(
    run: Runner, mode: Mode, in_transaction: bool
) -> None:
    def work() -> None:
        with in_tenant("one", statement_timeout="9s"):
            assert tenant() == "one"
            with in_tenant("two"):
                assert [each.name for each in Author.objects.iterator()] == ["two"]
            assert tenant() == "one"
        assert tenant() == OUTSIDE

    def in_block() -> None:
        with transaction.atomic():
            work()

    async def check(outcome: Outcome) -> None:
        def others() -> list[Any]:
            with in_tenant("three"):
                seen = [tenant(), look("statement_timeout")]
            return [*seen, tenant(), look("statement_timeout")]

        assert await aio.run(others) == ["three", "0", OUTSIDE, "0"], outcome

    async def main() -> None:
        assert await sweep(lambda: aio.run(in_block if in_transaction else work), mode, check) > 3

    with settings_of_default(OPTIONS=one_connection()):
        run(main(), timeout=60)


def one_connection() -> dict[str, Any]:
    given = connections.settings["default"]["OPTIONS"]
    return {**given, "pool": {"min_size": 1, "max_size": 1}}


# --- What is sent ---


def queries(sent: list[str]) -> list[str]:
    """Return the SQL of the messages that have some; drop what sets a connection up."""
    return [message.split('"', 1)[1] for message in sent if '"' in message]


def test_settings_travel_in_the_message_of_the_statement_that_needs_them(run: Runner) -> None:
    def work() -> None:
        with in_tenant("one"):
            for _ in range(3):
                tenant()
        with in_tenant("two"), transaction.atomic():
            tenant()
            tenant()
        tenant()

    with settings_of_default(OPTIONS=one_connection()), messages() as sent:
        run(aio.run(work))
    selects = [query for query in queries(sent) if "library_author" in query]
    assert ["search_path" in query for query in selects] == [1, 0, 0, 1, 0, 1]
    assert not [query for query in queries(sent) if "path" in query and query not in selects]


def count_messages(run: Runner, work: Body) -> int:
    """Return how many messages `work` needs, green, on a connection that is set up."""
    with settings_of_default(OPTIONS=one_connection()), messages() as sent:

        async def main() -> None:
            await aio.run(tenant)  # sets the connection up
            await aio.run(work)
            await aio.run(tenant)  # waits until the connection is reset, if raw SQL ran

        run(main())
    return len(sent)


def test_settings_cost_no_message(run: Runner) -> None:
    def load() -> None:
        for number in range(4):
            with pgbackend.session(**declare(number)):
                tenant()
                Author.objects.filter(pk=1).update(name="x")
                with transaction.atomic():
                    list(Author.objects.all())
                    Author.objects.create(id=1000, name="y").delete()
                list(Author.objects.raw("SELECT * FROM library_author"))

    def declare(number: int) -> dict[str, Any]:
        return (
            {"app.tenant": number, "application_name": f"number {number}"} if tenants_differ else {}
        )

    tenants_differ = True
    with_tenants = count_messages(run, load)
    tenants_differ = False
    assert with_tenants == count_messages(run, load)


def test_a_block_without_statements_sends_nothing(run: Runner) -> None:
    def work() -> None:
        with in_tenant("one"):
            pass

    assert count_messages(run, work) == count_messages(run, lambda: None)


@pytest.mark.parametrize("green", [False, True], ids=["sync", "green"])
def test_statements_that_cannot_share_a_message_run_with_the_settings(
    run_once: Runner, green: bool
) -> None:
    def body() -> list[Any]:
        seen: list[Any] = []
        with in_tenant("one"):
            for sql in (
                "VACUUM library_author",
                "CREATE INDEX CONCURRENTLY i ON library_author (id)",
            ):
                with connection.cursor() as cursor:
                    cursor.execute(sql)
            with connection.cursor() as cursor:
                cursor.execute("SELECT schemaname FROM pg_indexes WHERE indexname = 'i'")
                seen += cursor.fetchall()
        return [*seen, tenant()]

    assert (run_once.green(body) if green else body()) == [("one",), OUTSIDE]


# --- Functions, generators ---


def test_functions_of_all_kinds_are_decorated(run: Runner) -> None:
    declares_one = in_tenant("one")

    @declares_one
    def function(times: int) -> list[str]:
        return [tenant() for _ in range(times)]

    @declares_one
    async def coroutine() -> str:
        return await aio.run(tenant)

    @declares_one
    def generator() -> Iterator[str]:
        with suppress(ZeroDivisionError):
            yield tenant()
        yield tenant()
        return

    @declares_one
    async def async_generator() -> AsyncIterator[str]:
        yield await aio.run(tenant)
        yield await aio.run(tenant)

    def in_sync_code() -> list[str]:
        seen = function(2)
        made = generator()
        seen += [next(made), tenant(), made.throw(ZeroDivisionError), tenant()]  # type: ignore[attr-defined]
        made.close()  # type: ignore[attr-defined]
        return [*seen, tenant()]

    async def main() -> list[str]:
        seen = [await coroutine(), await aio.run(tenant)]
        async for name in async_generator():
            seen += [name, await aio.run(tenant)]
        return seen

    assert in_sync_code() == ["one", "one", "one", OUTSIDE, "one", OUTSIDE, OUTSIDE]
    assert run.green(in_sync_code) == ["one", "one", "one", OUTSIDE, "one", OUTSIDE, OUTSIDE]
    assert run(main()) == ["one", OUTSIDE, "one", OUTSIDE, "one", OUTSIDE]
    assert function.__name__ == "function"
    assert inspect.iscoroutinefunction(coroutine)
    assert inspect.isgeneratorfunction(generator)
    assert inspect.isasyncgenfunction(async_generator)


def test_a_generator_may_not_leave_its_settings_with_the_code_between_its_steps(
    run: Runner,
) -> None:
    def generator() -> Iterator[str]:
        with in_tenant("one"):
            yield tenant()

    @contextmanager
    def manager() -> Iterator[None]:
        with in_tenant("one"):
            yield

    def through_a_manager() -> Iterator[str]:
        with manager():
            yield tenant()

    async def async_generator() -> AsyncIterator[str]:
        async with in_tenant("one"):
            yield await aio.run(tenant)

    async def main() -> None:
        with pytest.raises(RuntimeError, match="in the generator 'async_generator'"):
            async for _ in async_generator():
                pass
        assert await aio.run(tenant) == OUTSIDE

    with pytest.raises(RuntimeError, match="in the generator 'generator' would hold"):
        next(generator())
    with pytest.raises(RuntimeError, match="in the generator 'through_a_manager' would hold"):
        next(through_a_manager())
    with manager():
        assert tenant() == "one"
    run(main())
    assert tenant() == OUTSIDE


def test_a_block_that_ends_in_another_context_is_refused() -> None:
    block = in_tenant("one")
    contextvars.copy_context().run(block.__enter__)
    with pytest.raises(RuntimeError, match="ends in another context"):
        block.__exit__(None, None, None)


def test_blocks_may_end_in_any_order() -> None:
    outer, inner = in_tenant("one"), in_tenant("two")
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert tenant() == "two"
    inner.__exit__(None, None, None)
    assert tenant() == OUTSIDE


def test_one_block_object_serves_many_at_once(run: Runner) -> None:
    block = in_tenant("one")

    async def use() -> list[str]:
        async with block:
            seen = [await aio.run(tenant)]
            with block:
                seen.append(await aio.run(tenant))
            seen.append(await aio.run(tenant))
        return [*seen, await aio.run(tenant)]

    async def main() -> Any:
        return await asyncio.gather(*(use() for _ in range(5)))

    assert run(main()) == [["one", "one", "one", OUTSIDE]] * 5


# --- Databases and wrappers ---


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_settings_are_those_of_one_alias(do: Any, other_alias: str) -> None:
    def there() -> str:
        return Author.objects.using(other_alias).get(pk=1).name

    def body() -> list[str]:
        with pgbackend.session(other_alias, search_path=["two", "public"]):
            seen = [tenant(), there()]
            with in_tenant("one"), transaction.atomic(using=other_alias):
                seen += [tenant(), there()]
            seen += [tenant(), there()]
        return [*seen, tenant(), there()]

    assert do(body) == [OUTSIDE, "two", "one", "two", OUTSIDE, "two", OUTSIDE, OUTSIDE]


class SetsPath(DatabaseWrapper):
    """A wrapper that sets its tenant's schema for each cursor by raw SQL, as packages do."""

    schema = "three"

    def _cursor(self, name: str | None = None) -> Any:
        cursor = super()._cursor(name)
        with super()._cursor() as setting:
            setting.execute(f"SET search_path TO {self.schema}, public")
        return cursor


def test_a_derived_wrapper_may_set_what_a_block_declares(run_once: Runner) -> None:
    """The block wins for the statements of its code, and the wrapper for those outside of it."""

    def body() -> list[str]:
        seen = [tenant()]
        with in_tenant("one"):
            seen += [tenant(), tenant()]
            with transaction.atomic():
                seen.append(tenant())
        return [*seen, tenant()]

    async def main() -> Any:
        connections["default"] = SetsPath(connections.settings["default"], "default")
        return await aio.run(body)

    assert run_once(main()) == ["three", "one", "one", "one", "three"]
    assert tenant() == OUTSIDE
