"""Tests `transaction.atomic` in all its forms, and the tasks that take part in it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.db import IntegrityError, connection, transaction
from django.db.transaction import TransactionManagementError

import pgbackend
from pgbackend import aio, state
from tests.conftest import Runner
from tests.library.models import Tag
from tests.support.tags import Oops, anames, names

# --- Forms ---


def test_with_in_an_async_def(run: Runner) -> None:
    async def main() -> None:
        with transaction.atomic():
            Tag.objects.create(name="kept")
        with pytest.raises(Oops), transaction.atomic():
            Tag.objects.create(name="lost")
            await asyncio.sleep(0)
            raise Oops

    run(aio.portal(main()))
    assert names() == ["kept"]


def test_async_with_on_the_loop(run: Runner) -> None:
    async def main() -> None:
        async with transaction.atomic():
            await Tag.objects.acreate(name="kept")
            with pytest.raises(Oops):
                async with transaction.atomic():
                    await Tag.objects.acreate(name="lost")
                    raise Oops

    run(main())
    assert names() == ["kept"]


def test_decorator_of_an_async_def(run: Runner) -> None:
    @transaction.atomic
    async def write(name: str, fail: bool) -> str:
        await Tag.objects.acreate(name=name)
        if fail:
            raise Oops
        return name

    async def main() -> None:
        assert await write("kept", False) == "kept"
        with pytest.raises(Oops):
            await write("lost", True)

    run(main())
    assert names() == ["kept"]


def test_decorator_of_a_function(run: Runner) -> None:
    @transaction.atomic
    def write() -> None:
        Tag.objects.create(name="lost")
        raise Oops

    with pytest.raises(Oops):
        run.green(write)
    assert names() == []


def test_plain_with_on_the_loop_names_the_cure(run_once: Runner) -> None:
    from django.core.exceptions import SynchronousOnlyOperation

    async def main() -> None:
        with pytest.raises(SynchronousOnlyOperation, match="async with transaction.atomic"):
            with transaction.atomic():
                raise AssertionError("not reached")

    run_once(main())


def test_savepoint_false_dooms_the_whole_block(run: Runner) -> None:
    def write() -> None:
        with pytest.raises(TransactionManagementError), transaction.atomic():
            Tag.objects.create(name="lost")
            with pytest.raises(Oops), transaction.atomic(savepoint=False):
                raise Oops
            Tag.objects.count()

    run.green(write)
    assert names() == []


def test_durable_refuses_to_be_nested(run: Runner) -> None:
    def write() -> None:
        with transaction.atomic(), pytest.raises(RuntimeError, match="durable"):
            with transaction.atomic(durable=True):
                raise AssertionError("not reached")
        with transaction.atomic(durable=True):
            Tag.objects.create(name="kept")

    run.green(write)
    assert names() == ["kept"]


def test_manual_transaction_management(run: Runner) -> None:
    def write() -> None:
        transaction.set_autocommit(False)
        try:
            Tag.objects.create(name="committed")
            transaction.commit()
            Tag.objects.create(name="lost")
            transaction.rollback()
            with transaction.atomic():
                Tag.objects.create(name="also lost")
            transaction.rollback()
        finally:
            transaction.set_autocommit(True)
        assert connection.connection is None

    run.green(write)
    assert names() == ["committed"]


def test_the_connection_is_leased_at_the_first_statement(run: Runner) -> None:
    def write() -> None:
        with transaction.atomic():
            assert connection.connection is None
            assert connection.in_atomic_block
            Tag.objects.count()
            assert connection.connection is not None
        assert connection.connection is None

    run.green(write)


def test_select_for_update_locks_rows(run: Runner) -> None:
    Tag.objects.create(name="contested")

    async def main() -> None:
        order: list[str] = []
        first_has_it = asyncio.Event()

        async def first() -> None:
            async with transaction.atomic():
                await Tag.objects.select_for_update().aget(name="contested")
                first_has_it.set()
                for _ in range(20):
                    await asyncio.sleep(0)
                order.append("first")

        async def second() -> None:
            await first_has_it.wait()
            async with transaction.atomic():
                await Tag.objects.select_for_update().aget(name="contested")
                order.append("second")

        await asyncio.gather(first(), second())
        assert order == ["first", "second"]

    run(main())


# --- Hooks on commit ---


def test_hooks_run_in_order_after_the_connection_has_gone_back(run: Runner) -> None:
    seen: list[Any] = []

    def hook(name: str) -> Callable[[], None]:
        def call() -> None:
            seen.append((name, connection.connection, connection.in_atomic_block, names()))

        return call

    async def async_hook() -> None:
        await asyncio.sleep(0)
        seen.append(("async", None, False, await anames()))
        transaction.on_commit(lambda: seen.append("nested"))

    def write() -> None:
        with transaction.atomic():
            Tag.objects.create(name="t")
            transaction.on_commit(hook("first"))
            transaction.on_commit(async_hook)
            with pytest.raises(Oops), transaction.atomic():
                transaction.on_commit(hook("rolled back"))
                raise Oops
            transaction.on_commit(hook("last"))

    run.green(write)
    here = (None, False, ["t"])
    assert seen == [("first", *here), ("async", *here), "nested", ("last", *here)]


def test_a_robust_hook_that_fails_lets_the_others_run(
    run: Runner, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[str] = []

    async def fail() -> None:
        raise Oops

    def write() -> None:
        with transaction.atomic():
            transaction.on_commit(fail, robust=True)
            transaction.on_commit(lambda: seen.append("ran"))

    run.green(write)
    assert seen == ["ran"]
    assert "on_commit" in caplog.text


def test_a_coroutine_hook_runs_in_sync_code_too() -> None:
    seen: list[str] = []

    async def hook() -> None:
        await asyncio.sleep(0)
        seen.extend(names())

    with transaction.atomic():
        Tag.objects.create(name="t")
        transaction.on_commit(hook)
    assert seen == ["t"]


# --- Tasks inside a block ---


def test_tasks_inside_a_block_take_part_in_it(run: Runner) -> None:
    async def main() -> None:
        with pytest.raises(Oops):
            async with transaction.atomic():
                await Tag.objects.acreate(name="parent")
                await asyncio.gather(*(Tag.objects.acreate(name=f"c{n}") for n in range(100)))
                assert await Tag.objects.acount() == 101
                raise Oops
        assert await anames() == []

    run(main())


def test_nested_blocks_of_siblings_never_overlap(run: Runner) -> None:
    """One sibling's block fails; only its rows are lost."""

    async def sibling(number: int) -> None:
        with pytest.raises(Oops):
            async with transaction.atomic():
                await Tag.objects.acreate(name=f"lost {number}")
                await asyncio.sleep(0)
                raise Oops
        async with transaction.atomic():
            await Tag.objects.acreate(name=f"kept {number}")
            await asyncio.sleep(0)
            async with transaction.atomic():
                await Tag.objects.acreate(name=f"deep {number}")

    async def main() -> None:
        async with transaction.atomic():
            await asyncio.gather(*(sibling(n) for n in range(4)))

    run(main())
    assert names() == sorted([*(f"kept {n}" for n in range(4)), *(f"deep {n}" for n in range(4))])


def test_a_failed_statement_dooms_the_block_for_all(run: Runner) -> None:
    async def main() -> None:
        await Tag.objects.acreate(name="taken")
        with pytest.raises(IntegrityError):
            async with transaction.atomic():
                await Tag.objects.acreate(name="lost")
                results = await asyncio.gather(
                    Tag.objects.acreate(name="taken"), return_exceptions=True
                )
                raise results[0]

    run(main())
    assert names() == ["taken"]


def test_waiting_too_long_for_a_turn_names_both_tasks(run: Runner) -> None:
    async def holder(opened: asyncio.Event, done: asyncio.Event) -> None:
        async with transaction.atomic():
            opened.set()
            await done.wait()

    async def main() -> None:
        opened, done = asyncio.Event(), asyncio.Event()
        async with transaction.atomic():
            task = asyncio.create_task(holder(opened, done), name="the holder")
            await opened.wait()
            shared = state.current_block(connection).transaction
            shared.settings_dict = {"OPTIONS": {"pool": {"timeout": 0.05}}}
            with pytest.raises(TransactionManagementError, match="the holder") as caught:
                await Tag.objects.acount()
            assert asyncio.current_task().get_name() in str(caught.value)
            done.set()
            await task

    run(main())


def test_a_task_that_outlives_its_block_is_refused(run: Runner) -> None:
    async def late(go: asyncio.Event) -> None:
        await go.wait()
        await Tag.objects.acreate(name="late")

    async def main() -> None:
        go = asyncio.Event()
        async with transaction.atomic():
            await Tag.objects.acreate(name="kept")
            task = asyncio.create_task(late(go))
            await asyncio.sleep(0)
        go.set()
        with pytest.raises(TransactionManagementError, match="has ended"):
            await task

    run(main())
    assert names() == ["kept"]


def test_detached_steps_out(run: Runner) -> None:
    async def background(go: asyncio.Event) -> None:
        await go.wait()
        await Tag.objects.acreate(name="background")

    async def main() -> None:
        go = asyncio.Event()
        with pytest.raises(Oops):
            async with transaction.atomic():
                await Tag.objects.acreate(name="lost")
                task = asyncio.create_task(pgbackend.detached(background(go)))
                with pgbackend.detached():
                    await Tag.objects.acreate(name="outside")
                # READ COMMITTED: rows written outside are visible, and not part of this
                # transaction.
                assert await anames() == ["lost", "outside"]
                raise Oops
        go.set()
        await task

    run(main())
    assert names() == ["background", "outside"]


def test_threads_that_asgiref_starts_take_part(run: Runner) -> None:
    async def main() -> None:
        with pytest.raises(Oops):
            async with transaction.atomic():
                await Tag.objects.acreate(name="loop")
                await sync_to_async(Tag.objects.create)(name="thread")
                await sync_to_async(Tag.objects.create, thread_sensitive=False)(name="other")
                assert await anames() == ["loop", "other", "thread"]
                raise Oops

    run(main())
    assert names() == []


def test_the_first_statement_may_be_a_threads(run: Runner) -> None:
    async def main() -> None:
        async with transaction.atomic():
            await sync_to_async(Tag.objects.create)(name="thread")
            await Tag.objects.acreate(name="loop")

    run(main())
    assert names() == ["loop", "thread"]


def test_a_loop_inside_a_sync_block_takes_part(run_once: Runner) -> None:
    async def inside() -> None:
        await Tag.objects.acreate(name="loop")
        assert await Tag.objects.acount() == 2

    with pytest.raises(Oops), transaction.atomic():
        Tag.objects.create(name="sync")
        async_to_sync(inside)()
        asyncio.run(inside_same_thread())
        assert names() == ["loop", "same thread", "sync"]
        raise Oops
    assert names() == []


async def inside_same_thread() -> None:
    await Tag.objects.acreate(name="same thread")


def test_atomic_requests_works_with_async_views(
    run_once: Runner, async_client: Any, settings: Any
) -> None:
    from django.db import connections
    from django.http import HttpResponse

    from tests import urls

    async def view(request: Any) -> HttpResponse:
        Tag.objects.create(name="lost")
        assert connection.in_atomic_block
        raise Oops

    from django.urls import path

    connections.settings["default"]["ATOMIC_REQUESTS"] = True
    urls.urlpatterns.append(path("atomic-requests/", view))
    try:
        with pytest.raises(Oops):
            run_once(async_client.get("/atomic-requests/"))
    finally:
        urls.urlpatterns.pop()
        connections.settings["default"]["ATOMIC_REQUESTS"] = False
    assert names() == []


# --- Cancellation ---


def test_a_cancelled_block_rolls_back_wherever_it_was(run: Runner, admin: Any) -> None:
    """The test cancels at every step of the loop, until the block completes and is all there."""

    async def write(name: str) -> None:
        async with transaction.atomic():
            await Tag.objects.acreate(name=f"{name} a")
            async with transaction.atomic():
                await Tag.objects.acreate(name=f"{name} b")

    async def cancel_after(steps: int, times: int) -> bool:
        task = asyncio.create_task(write(f"{times} {steps}"))
        for _ in range(steps):
            await asyncio.sleep(0)
        for _ in range(times):
            task.cancel()
            await asyncio.sleep(0)
        await asyncio.wait([task], timeout=2)
        assert task.done(), "cancellation ends within the budget"
        return task.cancelled()

    async def main() -> None:
        for times in (1, 2):
            steps = 0
            while await cancel_after(steps, times):
                steps += 1
            assert steps > 5
        (stats,) = pgbackend.statistics()
        assert stats.leased == stats.waiting == 0
        async with asyncio.timeout(2):  # the pool rolls back in its own time
            while idle_in_transaction():
                await asyncio.sleep(0.01)

    def idle_in_transaction() -> int:
        return admin.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'"
        ).fetchone()[0]

    run(main(), timeout=60)
    by_run: dict[str, int] = {}
    for name in names():
        by_run[name[:-2]] = by_run.get(name[:-2], 0) + 1
    assert set(by_run.values()) == {2}, "both rows of a block, or none"


def test_closing_the_connection_ends_manual_transaction_management(run: Runner) -> None:
    def write() -> None:
        transaction.set_autocommit(False)
        Tag.objects.create(name="lost")
        connection.close()
        assert connection.get_autocommit()
        Tag.objects.create(name="kept")

    run.green(write)
    assert names() == ["kept"]
    Tag.objects.all().delete()
    write()
    assert names() == ["kept"]
