"""Tests C11: sync and async code call each other, in one task and in one transaction."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from asgiref.sync import ThreadSensitiveContext, async_to_sync, sync_to_async
from django.core.exceptions import SynchronousOnlyOperation
from django.core.handlers.asgi import ASGIHandler
from django.core.management import BaseCommand, call_command
from django.core.signals import request_finished, request_started
from django.db import connection, connections, transaction
from django.dispatch import Signal
from django.http import HttpRequest, HttpResponse
from django.urls import path
from django.views import View

import pgbackend
from pgbackend import aio
from tests.conftest import Runner
from tests.library.models import Author, Entry, Tag

spoken = Signal()


def pid() -> int:
    """Return the id of the server process that serves the caller."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        (found,) = cursor.fetchone()
        return int(found)


def on_the_loop() -> bool:
    """Return whether the caller is in the thread of the loop."""
    return threading.current_thread() is threading.main_thread()


# --- async_to_sync ------------------------------------------------------------------------------


def test_in_a_green_context_async_to_sync_runs_on_the_running_loop(
    run: Runner, threads: list[str]
) -> None:
    async def inner(name: str) -> tuple[Any, ...]:
        await asyncio.sleep(0)
        tag = await Tag.objects.acreate(name=name)
        assert list(Tag.objects.all()) == [tag], "below it, sync code is green as well"
        return asyncio.get_running_loop(), asyncio.current_task(), pid()

    def outer() -> None:
        here = (asyncio.get_running_loop(), asyncio.current_task())
        with transaction.atomic():
            assert async_to_sync(inner)("a") == (*here, pid())
            transaction.set_rollback(True)
        assert not Tag.objects.exists(), "it was the same transaction"

    run.green(outer)
    assert threads == []


class Desk:
    @async_to_sync
    async def order(self, *, name: str) -> str:
        return (await Tag.objects.acreate(name=name)).name


def test_it_serves_as_a_decorator_of_methods_and_passes_errors_on(
    run: Runner, threads: list[str]
) -> None:
    async def fails() -> None:
        await asyncio.sleep(0)
        raise LookupError("by itself")

    def outer() -> None:
        assert Desk().order(name="a") == "a"
        with pytest.raises(LookupError, match="by itself"):
            async_to_sync(fails)()

    run.green(outer)
    assert threads == []


def test_sync_and_async_code_are_nested_as_deep_as_one_likes(
    run: Runner, threads: list[str]
) -> None:
    def sync(depth: int) -> int:
        Tag.objects.create(name=f"sync {depth}")
        return async_to_sync(an_async)(depth - 1) if depth else Tag.objects.count()

    async def an_async(depth: int) -> int:
        await Tag.objects.acreate(name=f"async {depth}")
        return await aio.run(sync, depth)

    assert run(an_async(20)) == 42
    assert threads == []


def test_other_tasks_go_on_while_async_to_sync_waits(run: Runner) -> None:
    async def main() -> None:
        event = asyncio.Event()

        async def waits() -> str:
            await event.wait()
            return "woken"

        waiting = asyncio.create_task(aio.run(async_to_sync(waits)))
        await asyncio.sleep(0)
        event.set()
        assert await waiting == "woken"

    run(main())


def test_elsewhere_async_to_sync_keeps_asgirefs_meaning(run: Runner) -> None:
    async def inner() -> bool:
        return on_the_loop()

    async def main() -> None:
        with pytest.raises(RuntimeError, match="same thread as an async event loop"):
            async_to_sync(inner)()
        assert await sync_to_async(async_to_sync(inner))(), "back on the loop that waits"

    run(main())
    assert not async_to_sync(inner)(), "on a loop of its own, in a thread"
    assert async_to_sync(Tag.objects.all().acount)() == 0


# --- sync_to_async ------------------------------------------------------------------------------


@pytest.mark.parametrize("green", [False, True], ids=["loop", "green"])
def test_sync_to_async_runs_in_a_thread_in_the_same_transaction(run: Runner, green: bool) -> None:
    def in_thread() -> int:
        assert not on_the_loop()
        assert connection.in_atomic_block
        assert Tag.objects.get().name == "outer"
        with transaction.atomic():
            Tag.objects.create(name="inner")
        return pid()

    async def main() -> None:
        async with transaction.atomic():
            await Tag.objects.acreate(name="outer")
            theirs = await sync_to_async(in_thread)()
            assert theirs == await aio.run(pid)
            assert await Tag.objects.acount() == 2
            await aio.run(transaction.set_rollback, True)
        assert await Tag.objects.acount() == 0

    run(aio.portal(main()) if green else main())


def test_a_failure_in_the_thread_dooms_the_block_around_it(run: Runner) -> None:
    def in_thread() -> None:
        with transaction.atomic(savepoint=False):
            Tag.objects.create(name="a")
            raise LookupError

    async def main() -> None:
        async with transaction.atomic():
            with pytest.raises(LookupError):
                await sync_to_async(in_thread)()
            with pytest.raises(transaction.TransactionManagementError):
                await Tag.objects.acount()
        assert await Tag.objects.acount() == 0

    run(main())


def test_several_threads_of_one_block_take_turns(run: Runner) -> None:
    def in_thread(number: int) -> None:
        with transaction.atomic():
            tag = Tag.objects.create(name=f"{number}")
            assert Tag.objects.get(pk=tag.pk).name == f"{number}"
            if number % 2:
                transaction.set_rollback(True)

    async def main() -> None:
        call = sync_to_async(in_thread, thread_sensitive=False)
        async with transaction.atomic():
            await asyncio.gather(*(call(number) for number in range(8)))

    run(main())
    assert sorted(Tag.objects.values_list("name", flat=True)) == ["0", "2", "4", "6"]


def test_outside_a_block_the_thread_has_its_own_connection(run: Runner) -> None:
    def in_thread() -> int:
        try:
            return pid()
        finally:
            connection.close()

    async def main() -> None:
        async with pgbackend.pinned():
            mine = await aio.run(pid)
            assert await sync_to_async(in_thread)() != mine

    run(main())


def test_a_task_keeps_its_session_when_a_thread_comes_back_to_the_loop(run: Runner) -> None:
    """asgiref copies the context of the task that served the thread to the task that waits."""

    async def on_the_loop_again() -> int:
        return await aio.run(pid)

    async def main() -> None:
        async with pgbackend.pinned():
            mine = await aio.run(pid)
            assert await sync_to_async(async_to_sync(on_the_loop_again))() != mine
            assert await aio.run(pid) == mine
        (record,) = pgbackend.statistics()
        assert record.leased == 0

    run(main())


# --- Signals ------------------------------------------------------------------------------------


@contextmanager
def receivers(signal: Signal, *fns: Callable[..., Any]) -> Iterator[None]:
    for fn in fns:
        signal.connect(fn)
    try:
        yield
    finally:
        for fn in fns:
            signal.disconnect(fn)


@pytest.mark.parametrize("how", ["send", "send_robust", "asend", "asend_robust"])
def test_sync_receivers_run_in_place_and_async_ones_are_awaited(
    run: Runner, threads: list[str], how: str
) -> None:
    told: list[Any] = []

    def sync_receiver(**kwargs: Any) -> None:
        told.append(("sync", on_the_loop(), pid()))
        Entry.objects.create(text="sync")

    async def async_receiver(**kwargs: Any) -> None:
        await asyncio.sleep(0)
        told.append(("async", on_the_loop(), pid()))
        Entry.objects.create(text="async")

    async def main() -> None:
        async with transaction.atomic():
            with receivers(spoken, sync_receiver, async_receiver):
                if how.startswith("a"):
                    answers = await getattr(spoken, how)(sender=None)
                else:
                    answers = getattr(spoken, how)(sender=None)
            mine = pid()
            assert sorted(told) == [("async", True, mine), ("sync", True, mine)]
            assert [answer for _, answer in answers] == [None, None]
            transaction.set_rollback(True)
        assert not Entry.objects.exists(), "they were part of the sender's transaction"

    run(aio.portal(main()))
    assert threads == []


def test_on_the_bare_loop_asend_is_green_for_its_receivers(run: Runner, threads: list[str]) -> None:
    def receiver(**kwargs: Any) -> None:
        Entry.objects.create(text="told")

    async def main() -> None:
        with receivers(spoken, receiver):
            await spoken.asend(sender=None)

    run(main())
    assert Entry.objects.count() == 1
    assert threads == []


# --- aio.run and aio.as_async -------------------------------------------------------------------


def sync_view(request: HttpRequest) -> HttpResponse:
    with transaction.atomic():
        author = Author.objects.create(name="in a sync view")
        author.books.create(title="its")
    assert on_the_loop()
    return HttpResponse(f"{author.books.get().title} {Entry.objects.count()}")


class SyncView(View):
    def get(self, request: HttpRequest) -> HttpResponse:
        return sync_view(request)


urlpatterns = [
    path("function/", aio.as_async(sync_view)),
    path("class/", aio.as_async(SyncView.as_view())),
]


@pytest.mark.parametrize("url", ["/function/", "/class/"])
@pytest.mark.urls(__name__)
def test_a_sync_view_runs_green_with_as_async(
    run: Runner, async_client: Any, threads: list[str], url: str, settings: Any
) -> None:
    settings.MIDDLEWARE = []

    async def main() -> None:
        response = await async_client.get(url)
        assert response.content == b"its 1"

    run(main())
    assert threads == []


class Command(BaseCommand):
    """Writes a tag for each of its arguments."""

    def add_arguments(self, parser: Any) -> None:
        parser.add_argument("names", nargs="*")

    def handle(self, *args: Any, **options: Any) -> str:
        for name in options["names"]:
            Tag.objects.create(name=name)
        return f"{Tag.objects.count()} {on_the_loop()}"


def test_a_management_command_runs_green(run: Runner, threads: list[str]) -> None:
    async def main() -> None:
        assert await aio.run(call_command, Command(), "a", "b") == "2 True"
        assert await aio.as_async(call_command)(Command(), "c") == "3 True"
        await aio.run(call_command, "seed_menu", verbosity=0)

    run(main())
    assert threads == []


variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


def test_a_green_function_shares_the_context_of_its_task(run: Runner) -> None:
    def green(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        assert variable.get() == "by the task"
        variable.set("by the function")
        return args, kwargs, asyncio.current_task()

    async def main() -> None:
        variable.set("by the task")
        assert await aio.run(green, 1, a=2) == ((1,), {"a": 2}, asyncio.current_task())
        assert variable.get() == "by the function"

    run(main())


def test_an_error_in_a_green_function_keeps_its_traceback(run: Runner) -> None:
    @aio.as_async
    def fails() -> None:
        Tag.objects.get(name="nowhere")

    async def main() -> None:
        with pytest.raises(Tag.DoesNotExist) as caught:
            await fails()
        assert caught.traceback[-1].name == "get"
        assert any(entry.name == "fails" for entry in caught.traceback)

    run(main())


def test_two_green_functions_of_one_task_group_overlap(run: Runner, leases: list[Any]) -> None:
    """One function waits, and the other goes on meanwhile."""
    order: list[str] = []

    async def main() -> None:
        first_waits = asyncio.Event()

        def first() -> None:
            order.append("first begins")
            async_to_sync(first_waits.wait)()
            order.append("first ends")

        def second() -> None:
            Tag.objects.create(name="a")
            order.append("second")
            first_waits.set()

        async with asyncio.TaskGroup() as group:
            group.create_task(aio.run(first))
            group.create_task(aio.run(second))

    run(main())
    assert order[-1] == "first ends"


def test_on_the_bare_loop_sync_use_is_refused_with_the_cure(run: Runner) -> None:
    async def main() -> None:
        with pytest.raises(SynchronousOnlyOperation, match=r"pgbackend\.aio\.run"):
            Tag.objects.count()

    run(main())


# --- The two signals of a request ---------------------------------------------------------------


class Requests:
    """Serves requests, and records what their signals' receivers saw."""

    def __init__(self) -> None:
        self.told: list[tuple[str, bool]] = []
        self.in_thread: Any = None

    def sync_receiver(self, signal: Signal, **kwargs: Any) -> None:
        name = "started" if signal is request_started else "finished"
        self.told.append((name, on_the_loop()))

    async def async_receiver(self, signal: Signal, **kwargs: Any) -> None:
        Entry.objects.create(text="from an async receiver")

    async def get(self, *views: Any, **options: Any) -> None:
        """Request each view once."""
        handler = ASGIHandler()
        transport = httpx.ASGITransport(app=handler)
        client = httpx.AsyncClient(transport=transport, base_url="http://localhost")
        for signal in (request_started, request_finished):
            signal.connect(self.sync_receiver)
            signal.connect(self.async_receiver)
        try:
            async with client:
                for number, _ in enumerate(views):
                    assert (await client.get(f"/{number}/")).status_code == 200
        finally:
            for signal in (request_started, request_finished):
                signal.disconnect(self.sync_receiver)
                signal.disconnect(self.async_receiver)


@pytest.fixture
def ask(run: Runner, settings: Any) -> Callable[..., Requests]:
    """Return a function that requests each of its views, in one loop."""
    settings.MIDDLEWARE = []

    def ask(*views: Any) -> Requests:
        class urls:  # noqa: N801 - a module
            urlpatterns = [path(f"{number}/", view) for number, view in enumerate(views)]

        settings.ROOT_URLCONF = urls
        requests = Requests()

        async def main() -> None:
            await requests.get(*views)
            assert all(record.leased == 0 for record in pgbackend.statistics())

        run(main())
        return requests

    return ask


def test_each_receiver_of_a_requests_signals_is_called_once_and_in_place(
    ask: Callable[..., Requests], threads: list[str]
) -> None:
    async def view(request: HttpRequest) -> HttpResponse:
        return HttpResponse(f"{Tag.objects.count()}")

    assert ask(view).told == [("started", True), ("finished", True)]
    assert Entry.objects.count() == 2
    assert threads == []


def test_a_request_with_a_thread_is_tidied_up_there_and_in_place(
    ask: Callable[..., Requests],
) -> None:
    """A user's receiver is still called once: where Django calls it, in that thread."""
    seen: dict[str, Any] = {}

    def in_thread() -> None:
        assert not on_the_loop()
        Tag.objects.count()
        seen["wrapper"] = connections["default"]
        assert connection.connection is not None

    async def view(request: HttpRequest) -> HttpResponse:
        await sync_to_async(in_thread)()
        transaction.set_autocommit(False)  # and the view forgets it
        Tag.objects.create(name="never committed")
        return HttpResponse()

    assert ask(view).told == [("started", True), ("finished", False)]
    assert Entry.objects.count() == 2
    assert seen["wrapper"]._own.connection is None, "close_old_connections() in the thread"
    assert not Tag.objects.exists()


def test_each_request_begins_with_an_empty_query_log_also_beside_a_thread(
    run: Runner, settings: Any
) -> None:
    """An ASGI middleware may keep one thread for all its requests."""
    logs = []

    async def view(request: HttpRequest) -> HttpResponse:
        logs.append(len(connection.queries))
        return HttpResponse(f"{Tag.objects.count()} {await sync_to_async(in_thread)()}")

    def in_thread() -> int:
        logs.append(len(connection.queries))
        return Tag.objects.count()

    class urls:  # noqa: N801 - a module
        urlpatterns = [path("0/", view), path("1/", view)]

    settings.ROOT_URLCONF, settings.MIDDLEWARE, settings.DEBUG = urls, [], True

    async def main() -> None:
        async with ThreadSensitiveContext(), pgbackend.pinned():
            requests = Requests()
            await requests.get(view, view)
            assert [name for name, _ in requests.told] == ["started", "finished"] * 2

    run(main())
    assert logs == [0] * 4


def test_manual_transactions_that_a_request_forgets_end_with_it(
    ask: Callable[..., Requests], threads: list[str]
) -> None:
    async def view(request: HttpRequest) -> HttpResponse:
        transaction.set_autocommit(False)
        Tag.objects.create(name="never committed")
        return HttpResponse()

    assert len(ask(*[view] * 6).told) == 12
    assert not Tag.objects.exists()
    assert threads == []


def test_a_receiver_may_query_whatever_thread_the_request_has(
    ask: Callable[..., Requests], settings: Any
) -> None:
    """Below a sync middleware too, a signal's receivers run in place, not in its thread."""
    seen = []

    def receiver(**kwargs: Any) -> None:
        seen.append((on_the_loop(), Tag.objects.count()))

    async def view(request: HttpRequest) -> HttpResponse:
        with receivers(spoken, receiver):
            await spoken.asend(sender=None)
        return HttpResponse()

    settings.MIDDLEWARE = ["tests.contract.servers.middleware.sync_only"]
    ask(view)
    assert seen == [(True, 0)]


def test_a_manual_transaction_ends_with_the_task_that_began_it(run: Runner) -> None:
    async def forgets(number: int) -> None:
        transaction.set_autocommit(False)
        Tag.objects.create(name=f"{number}")

    async def main() -> None:
        for number in range(6):  # more than the pool is large
            await asyncio.create_task(forgets(number))
        await asyncio.sleep(0)  # the clean-up of the last task's end comes after this one
        (record,) = pgbackend.statistics()
        assert record.leased == 0
        assert not Tag.objects.exists()

    run(aio.portal(main()))


def test_a_task_may_manage_many_transactions_by_hand(run: Runner) -> None:
    async def main() -> None:
        task: Any = asyncio.current_task()
        for number in range(10):
            transaction.set_autocommit(False)
            Tag.objects.create(name=f"{number}")
            transaction.rollback() if number % 2 else transaction.commit()
            transaction.set_autocommit(True)
        assert not [c for c in getattr(task, "_callbacks", None) or () if "_task_done" in repr(c)]

    run(aio.portal(main()))
    assert Tag.objects.count() == 5
