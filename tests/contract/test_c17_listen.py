"""Tests C17 of `listen()`: one connection, no silent loss, and nothing left at the loop's end."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import psycopg
import pytest
from django.db import (
    NotSupportedError,
    OperationalError,
    close_old_connections,
    connection,
    connections,
    transaction,
)
from psycopg import sql

import pgbackend
from pgbackend import Gap, Notification, aio, anotify, listen, metrics, notify
from pgbackend.driver import errors, listening, loops
from tests.conftest import Runner, wait_for
from tests.library.models import Tag
from tests.support.fixtures import by_link, settings_of_default
from tests.support.link import Link
from tests.support.replication import Replication, replication

STARTED, RECONNECTED, OVERFLOW = Gap("started"), Gap("reconnected"), Gap("overflow")

_QUERIES = "SELECT query FROM pg_stat_activity WHERE query ~ '^(SELECT pg_notify|DISCARD)'"
LISTENING = "SELECT pid FROM pg_stat_activity WHERE application_name LIKE %s"


def pids(admin: psycopg.Connection[Any]) -> list[int]:
    """Return the processes of the server that listen for pgbackend."""
    return [pid for (pid,) in admin.execute(LISTENING, ["%(listens)"])]


@pytest.fixture(autouse=True)
def _short_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the connection close soon after its last listener has left."""
    monkeypatch.setattr(listening, "LINGER", 0.05)


async def payloads(listener: Any, number: int) -> list[str]:
    """Return the payloads of the next notifications, with the reasons of gaps in brackets."""
    found = []
    async with asyncio.timeout(20):
        for _ in range(number):
            item = await anext(listener)
            found.append(item.payload if isinstance(item, Notification) else f"<{item.reason}>")
    return found


async def until(condition: Any, seconds: float = 20) -> None:
    """Wait on the loop for what happens in another process."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


# --- What is delivered ----------------------------------------------------------------------------


def test_a_listener_gets_a_gap_and_then_what_is_sent(run: Runner) -> None:
    async def main() -> None:
        async with listen("orders", "Dishes") as items:
            await anotify("orders", "1")
            await anotify("other", "-")
            await anotify("Dishes", "2")
            await anotify("orders")
            assert await anext(items) == STARTED
            found = [await anext(items) for _ in range(3)]
        assert [(each.channel, each.payload) for each in found] == [
            ("orders", "1"),
            ("Dishes", "2"),
            ("orders", ""),
        ]

    run(main())


def test_iterating_alone_begins_to_listen_too(run: Runner) -> None:
    async def main() -> list[str]:
        found = []
        async for item in listen("orders"):
            if isinstance(item, Gap):
                await anotify("orders", "after the gap")
                continue
            found.append(item.payload)
            break
        return found

    assert run(main()) == ["after the gap"]


def test_a_notification_is_delivered_when_its_transaction_commits(run: Runner) -> None:
    async def main() -> None:
        async with listen("orders") as items:
            with transaction.atomic():
                notify("orders", "kept")
            with pytest.raises(ZeroDivisionError), transaction.atomic():
                notify("orders", "rolled back")
                1 / 0
            async with transaction.atomic():
                await anotify("orders", "last")
                assert await payloads(items, 2) == ["<started>", "kept"]
            assert await payloads(items, 1) == ["last"]

    run(aio.portal(main()))


def test_sync_and_green_code_notify_and_no_session_is_reset_for_it(
    run: Runner, admin: psycopg.Connection[Any]
) -> None:
    async def main() -> None:
        async with listen("orders") as items:
            await asyncio.to_thread(_in_thread)
            await aio.run(notify, "orders", "green")
            assert await payloads(items, 3) == ["<started>", "thread", "green"]
            queries = {query for (query,) in admin.execute(_QUERIES)}
            assert len(queries) == 2
            assert not any("DISCARD" in query for query in queries)

    def _in_thread() -> None:
        notify("orders", "thread")
        connection.close()

    run(main())


def test_the_body_of_the_iteration_uses_the_orm(run: Runner) -> None:
    async def main() -> None:
        async with listen("tags") as items:
            await Tag.objects.acreate(name="a")
            await anotify("tags", "a")
            async for item in items:
                if isinstance(item, Notification):
                    assert (await Tag.objects.aget(name=item.payload)).name == "a"
                    break

    run(main())


AWKWARD = ['quo"ted', "Upper", "a b;c", "ü" * 31, "x" * 63, "select", "%s", "\\"]


def test_awkward_names_of_channels_are_taken_as_they_are(run: Runner) -> None:
    async def main() -> None:
        async with listen(*AWKWARD) as items:
            for channel in AWKWARD:
                await anotify(channel, channel)
            assert await payloads(items, 1 + len(AWKWARD)) == ["<started>", *AWKWARD]

    run(main())


@pytest.mark.parametrize(
    ("channel", "payload", "error", "says"),
    [
        ("", "", ValueError, "0 bytes"),
        ("x" * 64, "", ValueError, "64 bytes"),
        ("ü" * 32, "", ValueError, "64 bytes"),
        ("a\0b", "", ValueError, "channel"),
        (b"a", "", TypeError, "bytes"),
        ("a", "x" * 8000, ValueError, "8000 bytes"),
        ("a", "ü" * 4000, ValueError, "8000 bytes"),
        ("a", "\ud800", ValueError, "payload"),
        ("a", 1, TypeError, "int"),
    ],
)
def test_what_postgresql_cannot_send_is_refused_at_once(
    channel: Any, payload: Any, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        notify(channel, payload)
    if payload == "":
        with pytest.raises(error, match=says):
            listen(channel)


def test_the_longest_payload_is_sent(run: Runner) -> None:
    async def main() -> None:
        async with listen("x") as items:
            await anotify("x", "p" * 7999)
            assert await payloads(items, 2) == ["<started>", "p" * 7999]

    run(main())


def test_wrong_arguments_of_listen_are_refused_at_once() -> None:
    with pytest.raises(TypeError, match="at least one channel"):
        listen()
    with pytest.raises(ValueError, match="queue_size is 0"):
        listen("a", queue_size=0)
    with pytest.raises(TypeError, match="must be a function"):
        listen("a", callback="x")  # type: ignore[call-overload]
    with pytest.raises(Exception, match="The connection 'nope' doesn't exist"):
        listen("a", using="nope")


# --- One connection -------------------------------------------------------------------------------


def test_a_thousand_listeners_share_one_connection(
    run: Runner, admin: psycopg.Connection[Any]
) -> None:
    async def main() -> None:
        listeners = [listen("all", f"own {n % 100}") for n in range(1000)]
        await asyncio.gather(*(each.start() for each in listeners))
        assert len(pids(admin)) == 1
        assert metrics.connections().listening == 1
        assert "1000 listeners to 101 channels" in pgbackend.dump()
        await anotify("all", "hello")
        found = await asyncio.gather(*(payloads(each, 2) for each in listeners))
        assert found == [["<started>", "hello"]] * 1000
        for each in listeners:
            await each.aclose()
        await until(lambda: not pids(admin))
        assert metrics.connections().listening == 0

    run(main())


def test_the_connection_is_beside_the_pool_and_survives_what_closes_connections(
    run: Runner, admin: psycopg.Connection[Any]
) -> None:
    async def main() -> None:
        async with listen("a") as items:
            before = pids(admin)
            assert await Tag.objects.acount() == 0
            (record,) = pgbackend.statistics("default")
            assert record.size == 1
            counted = metrics.connections()
            assert (counted.async_open, counted.listening) == (1, 1)
            assert counted.open == 2 + counted.sync_open
            assert counted.max == 1 + counted.async_max + counted.sync_max
            await aio.run(close_old_connections)
            await aio.run(connections.close_all)
            await anotify("a", "1")
            assert await payloads(items, 2) == ["<started>", "1"]
            assert pids(admin) == before

    connection.close()
    run(main())


def test_channels_are_left_when_their_last_listener_leaves(
    run: Runner, admin: psycopg.Connection[Any]
) -> None:
    async def main() -> None:
        async with listen("a") as first:
            async with listen("a", "b"):
                pass
            async with listen("b") as again:
                await anotify("b", "1")
                assert await payloads(again, 2) == ["<started>", "1"]
            await anotify("a", "2")
            await anotify("b", "-")
            await anotify("a", "3")
            assert await payloads(first, 3) == ["<started>", "2", "3"]
            (hub,) = loops.open_hubs()
            await until(lambda: hub._link is not None and hub._link.channels == {"a"})
            assert len(pids(admin)) == 1

    run(main())


def test_two_loops_have_a_connection_each(run: Runner, admin: psycopg.Connection[Any]) -> None:
    both = threading.Barrier(2, timeout=20)
    counts = []

    async def main() -> None:
        async with listen("a") as items:
            await asyncio.to_thread(both.wait)
            counts.append(len(pids(admin)))
            await asyncio.to_thread(both.wait)
            await anotify("a", "1")
            assert (await payloads(items, 2))[0] == "<started>"

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    run(main())
    thread.join()
    assert counts == [2, 2]


def test_a_listener_that_was_closed_does_not_seem_to_begin_again(run: Runner) -> None:
    async def main() -> None:
        unused, items = listen("a"), listen("a")
        await unused.aclose()
        async with items:
            assert await anext(items) == STARTED
        for closed in (unused, items):
            with pytest.raises(RuntimeError, match="is closed, for good: make another one"):
                async with closed:
                    pass
            assert [item async for item in closed] == []

    run(main())


def test_a_listener_of_another_loop_is_refused(run: Runner) -> None:
    """Nothing would wake the other loop."""

    async def elsewhere() -> None:
        async with asyncio.timeout(5):
            await anext(listener)

    async def main() -> None:
        await listener.start()
        assert await anext(listener) == STARTED
        with pytest.raises(RuntimeError, match="belongs to another event loop"):
            await asyncio.to_thread(asyncio.run, elsewhere())
        await listener.aclose()

    listener = listen("a")
    run(main())


# --- Slow, cancelled and dropped listeners --------------------------------------------------------


def test_a_slow_listener_is_told_that_it_has_missed_some(run: Runner) -> None:
    async def main() -> None:
        async with listen("a", queue_size=3) as slow, listen("a") as other:
            for number in range(4):
                await anotify("a", str(number))
            assert await payloads(other, 5) == ["<started>", "0", "1", "2", "3"]
            assert await payloads(slow, 2) == ["<overflow>", "3"]
            await anotify("a", "4")
            assert await payloads(slow, 1) == ["4"]

    run(main())


def test_a_cancelled_wait_loses_nothing(run: Runner) -> None:
    async def main() -> None:
        async with listen("a") as items:
            assert await anext(items) == STARTED
            for number in range(5):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0):
                        await anext(items)
                waits = asyncio.ensure_future(anext(items))
                await asyncio.sleep(0)
                await anotify("a", str(number))
                waits.cancel()
                try:
                    item = await waits
                except asyncio.CancelledError:
                    item = await anext(items)
                assert item.payload == str(number)

    run(main())


def test_two_tasks_cannot_wait_for_one_listener(run: Runner) -> None:
    async def main() -> None:
        async with listen("a") as items:
            await anext(items)
            waits = asyncio.ensure_future(anext(items))
            while items._mailbox._waiter is None:
                await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="another task waits"):
                await anext(items)
            await items.aclose()
            with pytest.raises(StopAsyncIteration):
                await waits
            assert [item async for item in items] == []

    run(main())


@pytest.mark.parametrize("how", ["dropped", "in a cycle", "task cancelled", "never started"])
def test_an_abandoned_listener_leaves(
    run: Runner, admin: psycopg.Connection[Any], how: str
) -> None:
    async def consume() -> None:
        async for _ in listen("a"):
            if how == "dropped":
                break

    async def main() -> None:
        if how == "never started":
            listen("a")
            assert loops.open_hubs() == []
            return
        task = asyncio.ensure_future(consume())
        if how == "task cancelled":
            await until(lambda: pids(admin))
            task.cancel()
            await asyncio.wait([task])
            del task  # with its error, whose traceback refers to the listener
            gc.collect()
        elif how == "in a cycle":
            task.cancel()
            listener: Any = listen("a")
            await listener.start()
            listener.itself = listener
            del listener
            await asyncio.to_thread(gc.collect)
        else:
            await task
        await until(lambda: not loops.open_hubs())
        await until(lambda: not pids(admin))

    run(main())


@pytest.mark.parametrize("times", range(6))
def test_a_cancelled_start_leaves_nothing(run: Runner, times: int) -> None:
    async def enter() -> None:
        async with listen("a"):
            await asyncio.sleep(60)

    async def main() -> None:
        task = asyncio.ensure_future(enter())
        for _ in range(times * 2):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert all(not hub._mailboxes for hub in loops.open_hubs())
        async with listen("a") as items:
            assert await anext(items) == STARTED

    run(main())


# --- Callbacks ------------------------------------------------------------------------------------


def test_callbacks_of_both_kinds_get_the_items_in_order(
    run: Runner, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        found: list[Any] = []
        ended = {"sync": asyncio.Event(), "async": asyncio.Event()}

        def sync(item: Gap | Notification) -> None:
            found.append(("sync", item if isinstance(item, Gap) else item.payload))
            assert Tag.objects.count() == 0, "it is green"
            if isinstance(item, Notification) and item.payload == "bad":
                raise ZeroDivisionError
            if isinstance(item, Notification) and item.payload == "end":
                ended["sync"].set()

        async def coroutine(item: Gap | Notification) -> None:
            await Tag.objects.acount()
            assert not connection.in_atomic_block
            found.append(("async", item if isinstance(item, Gap) else item.payload))
            if isinstance(item, Notification) and item.payload == "end":
                ended["async"].set()

        async with transaction.atomic():
            callbacks = [listen("a", callback=sync), listen("a", callback=coroutine)]
            for each in callbacks:
                await each.start()
            assert connection.in_atomic_block
        for payload in ("1", "bad", "end"):
            await anotify("a", payload)
        for event in ended.values():
            await event.wait()
        for each in callbacks:
            await each.aclose()
        for kind in ("sync", "async"):
            items = [item for each, item in found if each == kind]
            assert items == [STARTED, "1", "bad", "end"]

    with caplog.at_level(logging.ERROR, "pgbackend"):
        run(main())
    (record,) = caplog.records
    assert "sync has failed with Notification(channel='a', payload='bad'" in record.getMessage()


def test_a_callback_that_is_ended_before_its_first_turn_leaves_no_warning(run: Runner) -> None:
    """The loop may end, or cancel its tasks, just when the listener has begun."""

    async def main() -> None:
        listener = listen("a", callback=print)
        await listener.start()
        task = listener._task
        assert task is not None
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        await listener.aclose()

    run(main())
    gc.collect()


def test_a_callback_may_end_its_own_listener_and_is_never_cut_off(run: Runner) -> None:
    async def main() -> None:
        ended = asyncio.Event()
        found = []

        async def callback(item: Gap | Notification) -> None:
            if isinstance(item, Notification):
                await listener.aclose()
                await asyncio.sleep(0.01)
                found.append(item.payload)
                ended.set()

        listener = listen("a", callback=callback)
        await listener.start()
        await anotify("a", "1")
        await ended.wait()
        await listener.aclose()
        assert found == ["1"]

    run(main())


def test_a_callback_goes_on_after_what_it_awaits_was_cancelled(
    run: Runner, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        ended = asyncio.Event()

        async def callback(item: Gap | Notification) -> None:
            if isinstance(item, Gap):
                other = asyncio.ensure_future(asyncio.Event().wait())
                other.cancel()
                await other
            ended.set()

        async with listen("a", callback=callback):
            await anotify("a", "1")
            async with asyncio.timeout(10):
                await ended.wait()

    with caplog.at_level(logging.ERROR, "pgbackend"):
        run(main())
    (record,) = caplog.records
    assert "callback has failed with Gap(reason='started')" in record.getMessage()


def test_a_callback_listener_that_begins_is_not_begun_again(run: Runner) -> None:
    async def main() -> None:
        found = []
        listener = listen("a", callback=found.append)
        first, second = await asyncio.gather(
            listener.start(), listener.start(), return_exceptions=True
        )
        assert first is None
        assert "has been started already" in str(second)
        async with listen("a") as other:
            await anotify("a", "1")
            await payloads(other, 2)
        await until(lambda: len(found) == 2)
        await listener.aclose()

    run(main())


@pytest.mark.parametrize("callback", [None, print])
def test_a_listener_that_could_not_begin_is_closed_for_good(run: Runner, callback: Any) -> None:
    async def main() -> None:
        listener: Any = listen("a", callback=callback) if callback else listen("a")
        with settings_of_default(HOST="127.0.0.1", PORT="1", OPTIONS=options):
            with pytest.raises(OperationalError, match="refused"):
                await listener.start()
            await until(lambda: not loops.open_hubs())
        with pytest.raises(RuntimeError, match="closed, for good") as told:
            await listener.start()
        assert "refused" in str(told.value.__cause__)

    given = connections.settings["default"]["OPTIONS"]
    options = {**given, "pool": {"timeout": 3.0, "outage_grace": 0.2}}
    run(main())


# --- Losses ---------------------------------------------------------------------------------------


def test_a_killed_connection_is_replaced_and_each_listener_told(
    run: Runner, admin: psycopg.Connection[Any], caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with listen("a") as first, listen("b") as second:
            for number in range(2):
                (old,) = pids(admin)
                admin.execute("SELECT pg_terminate_backend(%s)", [old])
                expected = ["<started>"] * (number == 0) + ["<reconnected>"]
                assert await payloads(first, len(expected)) == expected
                assert await payloads(second, len(expected)) == expected
                await anotify("a", "1")
                await anotify("b", "2")
                assert await payloads(first, 1) == ["1"]
                assert await payloads(second, 1) == ["2"]

    with caplog.at_level(logging.WARNING, "pgbackend"):
        run(main())
    texts = [record.getMessage() for record in caplog.records]
    assert sum("was lost, and is opened again" in text for text in texts) == 2
    assert sum("listens on 'default' again" in text for text in texts) == 2


def test_drain_replaces_the_connection_and_tells_the_gap(
    run: Runner, admin: psycopg.Connection[Any]
) -> None:
    async def main() -> None:
        async with listen("a") as items:
            before = pids(admin)
            await asyncio.to_thread(pgbackend.drain)
            assert await payloads(items, 2) == ["<started>", "<reconnected>"]
            await until(lambda: pids(admin) and pids(admin) != before)

    run(main())


def test_close_pool_ends_the_listeners_with_an_error(
    run: Runner, admin: psycopg.Connection[Any]
) -> None:
    async def main() -> None:
        async with listen("a") as items:
            await asyncio.to_thread(connections["default"].close_pool)
            assert await anext(items) == STARTED
            with pytest.raises(OperationalError, match="was closed") as told:
                await anext(items)
            assert isinstance(told.value.__cause__, errors.PoolClosed)
            async with listen("a") as again:
                assert await anext(again) == STARTED
        await until(lambda: not pids(admin))

    run(main())


@pytest.fixture
def link(conninfo: str) -> Iterator[Link]:
    """Relay to the server, by a link that can fail."""
    relay = Link(conninfo)
    yield relay
    relay.close()


def test_a_silent_link_is_noticed_by_the_heartbeat(
    run: Runner, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with listen("a") as items:
            assert await anext(items) == STARTED
            link.freeze(new=False)
            item = asyncio.ensure_future(anext(items))
            assert await item == RECONNECTED
            assert link.attempts > before + 1
            link.thaw()

    monkeypatch.setattr(listening, "HEARTBEAT", 0.05)
    monkeypatch.setattr("pgbackend.driver.listening_link.ANSWER_LIMIT", 0.1)
    with by_link(link):
        before = link.attempts
        run(main())


@pytest.mark.slow
def test_an_outage_is_asked_twice_a_second_at_most(run: Runner, link: Link) -> None:
    async def main() -> None:
        async with listen("a") as items:
            assert await anext(items) == STARTED
            link.cut()
            await asyncio.sleep(2)
            assert link.attempts - before <= 6
            link.restore()
            assert await payloads(items, 1) == ["<reconnected>"]

    with by_link(link):
        before = link.attempts
        run(main())


def test_a_server_that_cannot_be_reached_is_told_after_the_grace(run: Runner) -> None:
    async def main() -> None:
        with pytest.raises(OperationalError, match="refused"):
            async with listen("a"):
                pass
        await until(lambda: not loops.open_hubs())

    given = connections.settings["default"]["OPTIONS"]
    options = {**given, "pool": {"timeout": 3.0, "outage_grace": 0.2}}
    with settings_of_default(HOST="127.0.0.1", PORT="1", OPTIONS=options):
        run(main())


def test_a_wrong_role_is_told_at_once_and_no_password_is_shown(run: Runner) -> None:
    async def main() -> None:
        with pytest.raises(OperationalError, match="nobody") as told:
            async with listen("a"):
                pass
        trace = told.value.__traceback__
        exc: BaseException | None = told.value
        while exc is not None:
            trace = exc.__traceback__
            while trace is not None:
                assert "hunter2" not in str(
                    {
                        name: value
                        for name, value in trace.tb_frame.f_locals.items()
                        if "pgbackend" in trace.tb_frame.f_code.co_filename
                    }
                )
                trace = trace.tb_next
            exc = exc.__cause__

    with settings_of_default(USER="nobody", PASSWORD="hunter2"):
        run(main())


# --- The end of a loop ----------------------------------------------------------------------------


def test_nothing_is_left_at_the_end_of_a_loop(run: Runner, admin: psycopg.Connection[Any]) -> None:
    kept = []

    async def main() -> None:
        listener = listen("a")
        kept.append(listener)
        await listener.start()
        kept.append(listen("a", callback=lambda item: None))
        await kept[-1].start()
        asyncio.ensure_future(anext(listener)).add_done_callback(lambda _: None)
        assert len(pids(admin)) == 1

    run(main())
    wait_for(lambda: not pids(admin), "the connection is closed")
    assert loops.open_hubs() == []
    kept.clear()


def test_a_loop_that_is_closed_without_a_runner_leaves_nothing(
    admin: psycopg.Connection[Any],
) -> None:
    loop = asyncio.new_event_loop()
    listener = listen("a")
    loop.run_until_complete(listener.start())
    loop.close()
    del listener
    assert loops.open_hubs() == [] or loops.statistics() == []

    async def main() -> None:
        await Tag.objects.acount()

    asyncio.run(main())
    wait_for(lambda: not pids(admin), "the connection is closed")


# --- Poolers, replicas and other aliases ----------------------------------------------------------


@contextmanager
def through(**options: Any) -> Iterator[None]:
    given = connections.settings["default"]
    with settings_of_default(OPTIONS={**given["OPTIONS"], **options}):
        yield


def test_listening_needs_a_way_round_a_transaction_pooler(run: Runner, conninfo: str) -> None:
    async def main() -> None:
        with pytest.raises(NotSupportedError, match=r"Set OPTIONS\['listen'\]"):
            async with listen("a"):
                pass

    given = connections.settings["default"]["OPTIONS"]
    without = {name: value for name, value in given.items() if name != "session_reset"}
    with settings_of_default(OPTIONS={**without, "pooler": "transaction"}):
        run(main())


def test_a_replica_cannot_listen(run: Runner, other_alias: str) -> None:
    async def main() -> None:
        with pytest.raises(NotSupportedError, match=r"use listen\(using='other'\)"):
            async with listen("a"):
                pass

    with through(replica_of=other_alias):
        run(main())


class TestItsOwnWay:
    """`OPTIONS["listen"]` leads to another host and port than the alias."""

    kinds: ClassVar = ["a dictionary", "a string"]

    @pytest.mark.parametrize("kind", kinds)
    def test_it_is_used(
        self, run: Runner, link: Link, admin: psycopg.Connection[Any], kind: str
    ) -> None:
        async def main() -> None:
            async with listen("a") as items:
                assert link.attempts == 1
                await anotify("a", "1")
                assert await payloads(items, 2) == ["<started>", "1"]
                assert link.attempts == 1

        own: Any = {"host": "127.0.0.1", "port": link.port, "sslmode": "disable"}
        if kind == "a string":
            own = f"host=127.0.0.1 port={link.port} sslmode=disable"
        with through(listen=own):
            run(main())


def test_a_name_that_the_database_cannot_store_fails_its_own_listener_only(
    run: Runner, admin: psycopg.Connection[Any], conninfo: str
) -> None:
    name = sql.Identifier("test_latin1_listen")
    admin.execute(sql.SQL("DROP DATABASE IF EXISTS {}").format(name))
    admin.execute(
        sql.SQL("CREATE DATABASE {} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0").format(name)
    )

    async def main() -> None:
        async with listen("ä") as items:
            with pytest.raises(Exception, match="no equivalent in encoding"):
                async with listen("ä", "漢"):
                    pass
            assert await anext(items) == STARTED
            await anotify("ä", "ö")
            assert await payloads(items, 1) == ["ö"]

    try:
        with settings_of_default(NAME="test_latin1_listen"):
            run(main())
    finally:
        connections["default"].close_pool()
        admin.execute(sql.SQL("DROP DATABASE {}").format(name))


# --- Restart and failover of real servers ---------------------------------------------------------


@pytest.fixture(scope="module")
def servers() -> Iterator[Replication]:
    with replication() as pair:
        yield pair


@pytest.mark.slow
def test_a_restart_and_a_failover_are_told_to_a_thousand_listeners(
    run: Runner, servers: Replication
) -> None:
    async def round_of(listeners: list[Any], expected: list[str]) -> None:
        found = await asyncio.gather(*(payloads(each, len(expected)) for each in listeners))
        assert found == [expected] * len(listeners)

    async def main() -> None:
        listeners = [listen("all", f"own {n % 100}") for n in range(1000)]
        await asyncio.gather(*(each.start() for each in listeners))
        await anotify("all", "before")
        await round_of(listeners, ["<started>", "before"])

        await asyncio.to_thread(servers.primary.stop)
        await asyncio.to_thread(servers.primary.start)
        await round_of(listeners, ["<reconnected>"])
        await anotify("all", "after the restart")
        await round_of(listeners, ["after the restart"])
        await asyncio.to_thread(servers.wait_for_standby)

        await asyncio.to_thread(servers.primary.stop)
        servers.primary.follow(servers.standby)
        await asyncio.to_thread(servers.promote)
        await round_of(listeners, ["<reconnected>"])
        await anotify("all", "after the failover")
        await round_of(listeners, ["after the failover"])
        count = await asyncio.to_thread(
            servers.primary.execute, LISTENING.replace("pid", "count(*)"), "%(listens)"
        )
        assert count == 1
        await asyncio.to_thread(servers.standby.start)
        await asyncio.to_thread(servers.wait_for_standby)

    ports = f"{servers.primary.port},{servers.standby.port}"
    options = {"sslmode": "disable", "gssencmode": "disable", "pool": {}}
    with settings_of_default(
        HOST="127.0.0.1,127.0.0.1",
        PORT=ports,
        USER="postgres",
        PASSWORD="",
        NAME="postgres",
        OPTIONS={**options, "target_session_attrs": "read-write"},
    ):
        run(main(), timeout=90)
    assert loops.open_hubs() == []
