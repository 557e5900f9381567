"""Tests C5: `transaction.atomic` is Django's own, in all its forms."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.core.exceptions import SynchronousOnlyOperation
from django.db import DatabaseError, IntegrityError, connection, connections, transaction
from django.db.transaction import TransactionManagementError
from django.http import HttpResponse, StreamingHttpResponse
from django.urls import path
from django.utils.asyncio import async_unsafe
from django.views import View

import pgbackend
from pgbackend import aio
from pgbackend.base import DatabaseWrapper
from tests.conftest import Runner
from tests.library.models import Tag
from tests.support.fixtures import Site, pool_of_default
from tests.support.tags import Oops, anames, names


def leased() -> int:
    return sum(record.leased for record in pgbackend.statistics())


def create(name: str) -> None:
    Tag.objects.create(name=name)


async def acreate(name: str) -> None:
    await Tag.objects.acreate(name=name)


# --- Forms ----------------------------------------------------------------------------------------
#
# Each form runs `body` in a block, and lets the errors of `body` out of the block.

Body = Callable[[], Coroutine[Any, Any, Any]]
Form = Callable[..., Coroutine[Any, Any, Any]]


async def with_in_an_async_def(body: Body, **options: Any) -> None:
    with transaction.atomic(**options):
        await body()


async def async_with(body: Body, **options: Any) -> None:
    async with transaction.atomic(**options):
        await body()


async def decorated_async_def(body: Body, **options: Any) -> None:
    @transaction.atomic(**options)
    async def decorated() -> None:
        await body()

    await decorated()


async def decorated_with_nothing(body: Body, **options: Any) -> None:
    if options:
        await decorated_async_def(body, **options)
        return

    @transaction.atomic
    async def decorated() -> None:
        await body()

    await decorated()


async def decorated_function(body: Body, **options: Any) -> None:
    async def awaited() -> None:
        await body()

    @transaction.atomic(**options)
    def decorated() -> None:
        async_to_sync(awaited)()

    await aio.run(decorated)


FORMS: list[Form] = [
    with_in_an_async_def,
    async_with,
    decorated_async_def,
    decorated_with_nothing,
    decorated_function,
]


@pytest.fixture(params=FORMS, ids=lambda form: form.__name__)
def form(request: pytest.FixtureRequest) -> Form:
    return request.param


def test_a_block_commits_and_rolls_back_as_one(run: Runner, form: Form, leases: list[Any]) -> None:
    async def kept() -> None:
        await acreate("kept 1")
        await asyncio.sleep(0)
        await acreate("kept 2")

    async def lost() -> None:
        await acreate("lost")
        await asyncio.sleep(0)
        raise Oops

    async def main() -> None:
        await form(kept)
        assert leased() == 0 and len(leases) == 2
        with pytest.raises(Oops):
            await form(lost)
        assert leased() == 0 and len(leases) == 4

    run(aio.portal(main()))
    assert names() == ["kept 1", "kept 2"]


@pytest.mark.parametrize("failing", [None, 1, 2, 3])
def test_nested_blocks_are_savepoints(run: Runner, form: Form, failing: int | None) -> None:
    async def level(depth: int) -> None:
        await acreate(f"before {depth}")
        if depth < 3:
            try:
                await form(lambda: level(depth + 1))
            except Oops:
                if depth + 1 != failing:
                    raise
        await acreate(f"after {depth}")
        if depth == failing:
            raise Oops

    async def main() -> None:
        try:
            await form(lambda: level(1))
        except Oops:
            assert failing == 1

    run(aio.portal(main()))
    depths = range(1, failing or 4)
    assert names() == sorted(f"{word} {depth}" for word in ("before", "after") for depth in depths)


def test_savepoint_false_dooms_the_block_around_it(run: Runner, form: Form) -> None:
    async def outer() -> None:
        await acreate("lost")
        with pytest.raises(Oops):
            await form(fail, savepoint=False)
        with pytest.raises(TransactionManagementError, match="You can't execute queries until"):
            await Tag.objects.acount()

    async def fail() -> None:
        raise Oops

    async def main() -> None:
        await form(outer)
        await acreate("after")

    run(aio.portal(main()))
    assert names() == ["after"]


def test_durable_refuses_to_be_nested(run: Runner, form: Form) -> None:
    async def nothing() -> None:
        raise AssertionError("not reached")

    async def outer() -> None:
        with pytest.raises(RuntimeError, match="durable atomic block cannot be nested"):
            await form(nothing, durable=True)
        await acreate("outer")

    async def main() -> None:
        await form(outer)
        await form(lambda: acreate("durable"), durable=True)

    run(aio.portal(main()))
    assert names() == ["durable", "outer"]


def test_a_failed_statement_dooms_its_block_only(run: Runner, form: Form) -> None:
    async def inner() -> None:
        await acreate("lost too")
        with pytest.raises(IntegrityError):
            await acreate("taken")
        with pytest.raises(TransactionManagementError, match="until the end of the 'atomic'"):
            await Tag.objects.acount()

    async def outer() -> None:
        await acreate("kept")
        await form(inner)
        assert await Tag.objects.acount() == 2

    async def main() -> None:
        await acreate("taken")
        await form(outer)

    run(aio.portal(main()))
    assert names() == ["kept", "taken"]


def test_set_rollback_and_get_rollback(run: Runner, form: Form) -> None:
    async def body() -> None:
        await acreate("lost")
        assert not await aio.run(transaction.get_rollback)
        await aio.run(transaction.set_rollback, True)
        assert await aio.run(transaction.get_rollback)

    async def main() -> None:
        await form(body)
        with pytest.raises(TransactionManagementError, match="doesn't work outside of an 'atomic'"):
            await aio.run(transaction.set_rollback, True)

    run(aio.portal(main()))
    assert names() == []


def test_the_connection_is_leased_at_the_first_statement_and_not_at_entry(
    run: Runner, form: Form, leases: list[Any]
) -> None:
    async def body() -> None:
        assert leased() == 0 and not leases
        assert await aio.run(lambda: connection.in_atomic_block)
        await asyncio.sleep(0)
        assert leased() == 0
        await acreate("t")
        await asyncio.sleep(0)
        assert leased() == 1

    async def nothing() -> None:
        await asyncio.sleep(0)

    async def main() -> None:
        await form(body)
        assert leased() == 0 and len(leases) == 2
        await form(nothing)
        await form(lambda: form(nothing, savepoint=False))
        assert len(leases) == 2, "a block without a statement needs no connection"

    run(aio.portal(main()))


def test_blocks_can_be_used_again_and_recursively(run: Runner) -> None:
    @transaction.atomic
    async def countdown(number: int) -> None:
        await acreate(str(number))
        if number:
            await countdown(number - 1)

    async def main() -> None:
        await asyncio.gather(countdown(2), _other())
        await acreate("after")

    async def _other() -> None:
        await asyncio.sleep(0)

    run(main())
    assert names() == ["0", "1", "2", "after"]


def test_a_decorated_async_def_is_one_still() -> None:
    @transaction.atomic
    async def decorated(number: int) -> int:
        """Return the number."""
        return number

    import inspect

    assert inspect.iscoroutinefunction(decorated)
    assert (decorated.__name__, decorated.__doc__) == ("decorated", "Return the number.")


class Guarded(DatabaseWrapper):
    """Derives from our backend, and guards its overrides as Django does."""

    @async_unsafe
    def commit(self) -> None:
        super().commit()

    @async_unsafe
    def rollback(self) -> None:
        super().rollback()

    @async_unsafe
    def savepoint_rollback(self, sid: str) -> None:
        super().savepoint_rollback(sid)


def test_a_derived_backend_may_guard_its_methods_as_django_does(run: Runner, form: Form) -> None:
    async def fail() -> None:
        await acreate("lost")
        raise Oops

    async def half() -> None:
        await acreate("kept")
        with pytest.raises(Oops):
            await form(fail)

    async def main() -> None:
        connections["default"] = Guarded(connections.settings["default"], "default")
        with pytest.raises(Oops):
            await form(fail)
        await form(half)

    run(aio.portal(main()))
    assert names() == ["kept"]


def test_a_plain_with_on_the_loop_names_the_cure(run: Runner) -> None:
    async def main() -> None:
        with pytest.raises(SynchronousOnlyOperation, match="async with transaction.atomic"):
            with transaction.atomic():
                raise AssertionError("not reached")

    run(main())


def test_a_block_in_an_async_generator_lasts_from_its_first_row_to_its_end(run: Runner) -> None:
    async def rows(fail: bool) -> AsyncIterator[str]:
        async with transaction.atomic():
            for number in range(3):
                name = f"{'lost' if fail else 'kept'} {number}"
                await acreate(name)
                yield name
            if fail:
                raise Oops

    async def main() -> None:
        assert [row async for row in rows(fail=False)] == ["kept 0", "kept 1", "kept 2"]
        with pytest.raises(Oops):
            [row async for row in rows(fail=True)]
        left = rows(fail=True)
        await anext(left)
        await left.aclose()
        assert leased() == 0
        await acreate("after")

    run(aio.portal(main()))
    assert names() == ["after", "kept 0", "kept 1", "kept 2"]


def test_a_block_in_sync_code_under_a_loop_is_the_same(run: Runner) -> None:
    def generator() -> Iterator[str]:
        with transaction.atomic():
            create("kept")
            yield "kept"

    # Django 6.1 has a new name for it.
    savepoint = getattr(transaction, "savepoint_create", None) or transaction.savepoint

    def work() -> None:
        assert list(generator()) == ["kept"]
        rows = generator()
        with pytest.raises(IntegrityError):
            next(rows)
        with transaction.atomic():
            sid = savepoint()
            create("lost")
            transaction.savepoint_rollback(sid)
            sid = savepoint()
            create("kept too")
            transaction.savepoint_commit(sid)
            transaction.clean_savepoints()
        assert leased() == 0

    run.green(work)
    assert names() == ["kept", "kept too"]


# --- By hand --------------------------------------------------------------------------------------


def test_set_autocommit_false_begins_a_transaction_that_is_managed_by_hand(
    run: Runner, leases: list[Any]
) -> None:
    async def main() -> None:
        transaction.set_autocommit(False)
        assert not transaction.get_autocommit() and not leases
        create("committed")
        await asyncio.sleep(0)
        transaction.commit()
        await acreate("lost")
        transaction.rollback()
        with transaction.atomic():
            create("committed in a block")
        with pytest.raises(Oops), transaction.atomic():
            create("lost in a block")
            raise Oops
        transaction.commit()
        create("lost at the end")
        with pytest.raises(DatabaseError):
            transaction.set_autocommit(True)  # psycopg refuses: in a transaction
        transaction.rollback()
        transaction.set_autocommit(True)
        assert leased() == 0 and len(leases) == 2
        create("after")

    run(aio.portal(main()))
    assert names() == ["after", "committed", "committed in a block"]


def test_a_transaction_by_hand_that_is_doomed_stays_so_until_it_is_rolled_back(run: Runner) -> None:
    def green() -> None:
        transaction.set_autocommit(False)
        with pytest.raises(Oops), transaction.atomic(savepoint=False):
            raise Oops
        transaction.commit()
        transaction.set_autocommit(True)
        with pytest.raises(TransactionManagementError, match="until the end of the 'atomic'"):
            Tag.objects.count()
        transaction.rollback()
        assert Tag.objects.count() == 0

    run.green(green)


def test_commit_and_rollback_are_refused_in_a_block(run: Runner, form: Form) -> None:
    async def body() -> None:
        for forbidden in (
            transaction.commit,
            transaction.rollback,
            lambda: transaction.set_autocommit(False),
            lambda: transaction.set_autocommit(True),
        ):
            with pytest.raises(
                TransactionManagementError, match="forbidden when an 'atomic' block"
            ):
                await aio.run(forbidden)
        await acreate("kept")

    run(aio.portal(form(body)))
    assert names() == ["kept"]


def test_select_for_update_needs_a_block_and_locks_its_rows(run: Runner) -> None:
    order: list[str] = []

    async def locking(name: str, has_it: asyncio.Event, go: asyncio.Event) -> None:
        async with transaction.atomic():
            await Tag.objects.select_for_update().aget(name="contested")
            order.append(f"{name} has it")
            has_it.set()
            await go.wait()
            order.append(f"{name} lets go")

    async def main() -> None:
        await acreate("contested")
        with pytest.raises(TransactionManagementError, match="outside of a transaction"):
            await Tag.objects.select_for_update().aget(name="contested")
        first, second, go = asyncio.Event(), asyncio.Event(), asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(locking("one", first, go))
            await first.wait()
            group.create_task(locking("the other", second, go))
            async with transaction.atomic():
                with pytest.raises(DatabaseError, match="could not obtain lock"):
                    await Tag.objects.select_for_update(nowait=True).aget(name="contested")
            free = Tag.objects.select_for_update(skip_locked=True)
            async with transaction.atomic():
                assert [tag async for tag in free] == []
            go.set()

    run(main())
    assert order == ["one has it", "one lets go", "the other has it", "the other lets go"]


# --- Hooks on commit ------------------------------------------------------------------------------


def test_hooks_run_in_order_after_the_connection_has_gone_back(
    run: Runner, form: Form, leases: list[Any]
) -> None:
    seen: list[str] = []

    def hook(name: str) -> Callable[[], None]:
        def call() -> None:
            assert leased() == 0 and not connection.in_atomic_block
            assert names() == ["kept"], "what was committed is there"
            seen.append(name)

        return call

    async def coroutine_hook() -> None:
        assert leased() == 0
        await asyncio.sleep(0)
        assert await anames() == ["kept"]
        async with transaction.atomic():
            await Tag.objects.aexists()
        seen.append("coroutine")

    async def lost() -> None:
        transaction.on_commit(hook("rolled back"))
        raise Oops

    async def body() -> None:
        transaction.on_commit(hook("before the first statement"))
        await acreate("kept")
        transaction.on_commit(coroutine_hook)
        with pytest.raises(Oops):
            await form(lost)
        await form(_register(hook("in a nested block")))
        transaction.on_commit(hook("last"))
        assert seen == []

    run(aio.portal(form(body)))
    assert seen == ["before the first statement", "coroutine", "in a nested block", "last"]


def _register(hook: Callable[[], Any], **options: Any) -> Body:
    async def body() -> None:
        transaction.on_commit(hook, **options)

    return body


def test_hooks_of_a_block_that_is_rolled_back_never_run(run: Runner, form: Form) -> None:
    async def body() -> None:
        await acreate("lost")
        transaction.on_commit(lambda: seen.append("hook"))
        raise Oops

    async def doomed() -> None:
        transaction.on_commit(lambda: seen.append("hook"))
        await aio.run(transaction.set_rollback, True)

    async def main() -> None:
        with pytest.raises(Oops):
            await form(body)
        await form(doomed)
        await form(lambda: acreate("after"))

    seen: list[str] = []
    run(aio.portal(main()))
    assert seen == [] and names() == ["after"]


@pytest.mark.parametrize("kind", ["function", "coroutine function"])
@pytest.mark.parametrize("robust", [False, True], ids=["fragile", "robust"])
def test_a_hook_that_raises_undoes_no_commit_and_stops_the_rest_unless_robust(
    run: Runner, form: Form, caplog: pytest.LogCaptureFixture, robust: bool, kind: str
) -> None:
    seen: list[str] = []

    def fail() -> None:
        raise Oops("in the hook")

    async def afail() -> None:
        await asyncio.sleep(0)
        raise Oops("in the hook")

    async def body() -> None:
        await acreate("kept")
        transaction.on_commit(fail if kind == "function" else afail, robust=robust)
        transaction.on_commit(lambda: seen.append("the next one"))

    async def main() -> None:
        if robust:
            await form(body)
        else:
            with pytest.raises(Oops, match="in the hook"):
                await form(body)
        assert leased() == 0
        assert await aio.run(lambda: connection.run_on_commit) == []
        await acreate("after")

    with caplog.at_level(logging.ERROR, "django.db.backends.base"):
        run(aio.portal(main()))
    assert seen == (["the next one"] if robust else [])
    assert ("in the hook" in caplog.text) == robust
    assert names() == ["after", "kept"]


def test_a_hook_may_register_more_hooks_and_open_blocks(run: Runner, form: Form) -> None:
    """Outside of a block a hook runs at once; in a hook's own block, when that is committed."""
    seen: list[str] = []

    async def first() -> None:
        seen.append("first begins")
        transaction.on_commit(lambda: seen.append("at once"))
        await form(inner)
        seen.append("first ends")

    async def inner() -> None:
        await acreate("from the hook")
        transaction.on_commit(lambda: seen.append("of the hook's block"))
        transaction.on_commit(second)
        seen.append("inner ends")

    async def second() -> None:
        assert leased() == 0
        seen.append("second")

    async def body() -> None:
        await acreate("kept")
        transaction.on_commit(first)
        transaction.on_commit(lambda: seen.append("last"))

    run(aio.portal(form(body)))
    assert seen == [
        "first begins",
        "at once",
        "inner ends",
        "of the hook's block",
        "second",
        "first ends",
        "last",
    ]
    assert names() == ["from the hook", "kept"]


def test_a_hook_outside_of_a_block_runs_at_once_and_may_be_a_coroutine_function(
    run: Runner,
) -> None:
    seen: list[str] = []

    async def hook() -> None:
        await acreate("hook")
        seen.append("hook")

    def work() -> None:
        transaction.on_commit(hook)
        assert seen == ["hook"]
        with pytest.raises(TypeError, match="must be a callable"):
            transaction.on_commit("hook")
        transaction.set_autocommit(False)
        try:
            with pytest.raises(TransactionManagementError, match="cannot be used in manual"):
                transaction.on_commit(hook)
        finally:
            transaction.set_autocommit(True)

    run.green(work)
    assert names() == ["hook"]


def test_a_hook_sees_no_transaction_and_one_free_connection_is_enough(run: Runner) -> None:
    """A hook that needed a connection while its block still held it would wait for itself."""

    async def hook() -> None:
        await asyncio.gather(*(acreate(f"hook {number}") for number in range(5)))

    async def main() -> None:
        async with transaction.atomic():
            await acreate("kept")
            transaction.on_commit(hook)

    with pool_of_default(max_size=1):
        run(main())
    assert len(names()) == 6


# --- ATOMIC_REQUESTS ------------------------------------------------------------------------------


async def function_view(request: Any, name: str) -> HttpResponse:
    assert connection.in_atomic_block and leased() == 0
    create(name)
    transaction.on_commit(lambda: create(f"hook of {name}"))
    await asyncio.gather(acreate(f"{name} 1"), acreate(f"{name} 2"))
    if name == "lost":
        raise Oops
    return HttpResponse(name)


class ClassView(View):
    async def get(self, request: Any, name: str) -> HttpResponse:
        return await function_view(request, name)


@transaction.non_atomic_requests
async def exempt_view(request: Any, name: str) -> HttpResponse:
    assert not connection.in_atomic_block
    create(name)
    raise Oops


async def streaming_view(request: Any, name: str) -> StreamingHttpResponse:
    create(name)

    async def lines() -> AsyncIterator[str]:
        # As in Django, the transaction covers the view, and not the streaming of its response.
        assert not await aio.run(lambda: connection.in_atomic_block)
        for found in await anames():
            yield f"{found}\n"

    return StreamingHttpResponse(lines())


def sync_view(request: Any, name: str) -> HttpResponse:
    assert connection.in_atomic_block
    create(name)
    if name == "lost":
        raise Oops
    return HttpResponse(name)


@pytest.fixture
def _atomic_requests() -> Iterator[None]:
    from tests import urls

    settings_dict = connections.settings["default"]
    settings_dict["ATOMIC_REQUESTS"] = True
    views = [
        path("atomic/function/<name>/", function_view),
        path("atomic/class/<name>/", ClassView.as_view()),
        path("atomic/exempt/<name>/", exempt_view),
        path("atomic/streaming/<name>/", streaming_view),
        path("atomic/sync/<name>/", sync_view),
    ]
    urls.urlpatterns.extend(views)
    yield
    del urls.urlpatterns[-len(views) :]
    settings_dict["ATOMIC_REQUESTS"] = False


@pytest.mark.usefixtures("_atomic_requests")
@pytest.mark.parametrize("view", ["function", "class"])
def test_atomic_requests_commits_an_async_view_and_rolls_it_back_when_it_fails(
    run: Runner, async_client: Any, view: str
) -> None:
    async def main() -> None:
        response = await async_client.get(f"/atomic/{view}/kept/")
        assert response.status_code == 200
        with pytest.raises(Oops):
            await async_client.get(f"/atomic/{view}/lost/")
        assert leased() == 0

    run(main())
    assert names() == ["hook of kept", "kept", "kept 1", "kept 2"]


@pytest.mark.usefixtures("_atomic_requests")
def test_atomic_requests_leaves_alone_what_is_exempt_streamed_or_sync(
    run: Runner, site: Site
) -> None:
    async def main() -> None:
        async with site() as client:
            assert (await client.get("/atomic/exempt/kept/")).status_code == 500
            response = await client.get("/atomic/streaming/streamed/")
            assert response.text == "kept\nstreamed\n"
            assert (await client.get("/atomic/sync/sync/")).status_code == 200
            assert (await client.get("/atomic/sync/lost/")).status_code == 500

    run(main())
    assert names() == ["kept", "streamed", "sync"]


@pytest.mark.usefixtures("_atomic_requests")
def test_atomic_requests_keeps_requests_that_overlap_apart(run: Runner, async_client: Any) -> None:
    async def main() -> None:
        answers = await asyncio.gather(
            *(async_client.get(f"/atomic/function/{n}/") for n in range(8)),
            *(async_client.get("/atomic/function/lost/") for _ in range(8)),
        )
        assert [answer.status_code for answer in answers] == [200] * 8 + [500] * 8
        assert leased() == 0

    async_client.raise_request_exception = False  # the client would keep one error for all requests
    run(main())
    assert not [name for name in names() if "lost" in name]
    assert len(names()) == 8 * 4
