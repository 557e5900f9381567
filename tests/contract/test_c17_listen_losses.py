"""Tests C17 of `listen()` by properties: wherever the link breaks, no change goes unnoticed."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from django.db import connection, connections, transaction
from psycopg.conninfo import conninfo_to_dict

import pgbackend
from pgbackend import Gap, anotify, listen
from pgbackend.driver import attempts, listening, listening_link, loops
from pgbackend.driver.asking import ConnectArguments
from tests.conftest import Runner, wait_for
from tests.contract.test_c17_listen import pids
from tests.library.models import Tag
from tests.support.fixtures import by_link, settings_of_default
from tests.support.link import Link


@pytest.fixture
def link(conninfo: str) -> Iterator[Link]:
    """Relay to the server, by a link that can fail."""
    relay = Link(conninfo)
    yield relay
    relay.close()


@pytest.fixture
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let attempts to connect follow each other at once, so that many cases take little time."""
    monkeypatch.setattr(listening, "FAILURE_WINDOW", 0.01)
    monkeypatch.setattr(attempts, "FAILURE_WINDOW", 0.01)


class Follower:
    """Follows the names of all tags, as docs/listen.md says."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.gaps: list[str] = []

    async def follow(self, listener: Any) -> None:
        """Return when the tag "last" is known."""
        async for item in listener:
            if isinstance(item, Gap):
                self.gaps.append(item.reason)
                self.names |= {name async for name in Tag.objects.values_list("name", flat=True)}
            else:
                self.names.add(item.payload)
            if "last" in self.names:
                return


async def tag(name: str) -> None:
    """Make a tag, and notify in the same transaction."""
    async with transaction.atomic():
        await Tag.objects.acreate(name=name)
        await anotify("tags", name)


#: A notification has 16 bytes here, the last 19.
@pytest.mark.sweep(one_in=20)
@pytest.mark.parametrize("after", range(70))
def test_a_link_that_breaks_at_any_byte_hides_no_change(
    run: Runner, link: Link, without_pauses: None, after: int
) -> None:
    async def main() -> None:
        follower = Follower()
        async with listen("tags") as listener:
            link.truncate(after)
            async with asyncio.timeout(20):
                following = asyncio.ensure_future(follower.follow(listener))
                for number in range(3):
                    await tag(str(number))
                await tag("last")
                await following
        assert follower.names == {"0", "1", "2", "last"}

    own = {"host": "127.0.0.1", "port": link.port, "sslmode": "disable", "gssencmode": "disable"}
    given = connections.settings["default"]["OPTIONS"]
    with settings_of_default(OPTIONS={**given, "listen": own}):
        run(main())


@pytest.mark.sweep(one_in=20)
@pytest.mark.parametrize("after", range(0, 700, 25))
def test_an_attempt_that_breaks_at_any_byte_is_made_again(
    run: Runner, link: Link, without_pauses: None, after: int
) -> None:
    async def main() -> None:
        link.truncate(after, new=True)
        follower = Follower()
        async with asyncio.timeout(20):
            starting = asyncio.ensure_future(follower.follow(listen("tags")))
            while link.attempts == before:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0)
            link.thaw()
            await tag("last")
            await starting
        assert follower.names == {"last"}

    own = {"host": "127.0.0.1", "port": link.port, "sslmode": "disable", "gssencmode": "disable"}
    given = connections.settings["default"]["OPTIONS"]
    before = link.attempts
    with settings_of_default(OPTIONS={**given, "listen": own}):
        run(main())


@pytest.mark.sweep(one_in=10)
@pytest.mark.parametrize("turns", range(0, 60, 3))
def test_a_listener_cancelled_at_any_turn_leaves_nothing_and_harms_no_other(
    run: Runner, turns: int
) -> None:
    async def consume() -> None:
        async with listen("tags", f"turn {turns}") as items:
            async for _ in items:
                pass

    async def main() -> None:
        follower = Follower()
        async with listen("tags") as other:
            following = asyncio.ensure_future(follower.follow(other))
            task = asyncio.ensure_future(consume())
            sender = asyncio.ensure_future(tag("1"))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task, sender])
            assert task.cancelled()
            (hub,) = loops.open_hubs()
            assert len(hub._mailboxes) == 1
            await tag("last")
            await following
        assert follower.gaps == ["started"]
        assert follower.names == {"1", "last"}

    run(main())


def test_a_link_that_breaks_in_a_command_leaves_its_socket_to_nobody(
    run: Runner, link: Link, conninfo: str
) -> None:
    """libpq closes the socket then, and the next one of the process gets its number."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        opened = await listening_link.Link.open(own, lambda *_: None, lambda: None)

        async def command() -> bool:
            with pytest.raises(psycopg.OperationalError):
                await opened.run("SELECT pg_sleep(20)")
            opened.close()
            return loop.remove_reader(opened._fd)

        running = asyncio.ensure_future(command())
        await asyncio.sleep(0)
        link.reset()
        assert not await running

    given: dict[str, Any] = conninfo_to_dict(conninfo)
    given.pop("hostaddr", None)
    own = ConnectArguments(given, host="127.0.0.1", port=link.port, sslmode="disable")
    run(main())


def test_the_password_is_asked_for_at_each_connect(
    run: Runner, admin: psycopg.Connection[Any], without_pauses: None
) -> None:
    async def password() -> str:
        asked.append(1)
        return "not needed"

    async def main() -> None:
        async with listen("a") as items:
            await anext(items)
            before = len(asked)
            admin.execute("SELECT pg_terminate_backend(%s)", pids(admin))
            assert await anext(items) == Gap("reconnected")
            assert len(asked) == before + 1 >= 2

    asked: list[int] = []
    with settings_of_default(PASSWORD=password):
        run(main())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_leaves_the_connection_to_its_parent(
    run: Runner, admin: psycopg.Connection[Any]
) -> None:
    async def main() -> None:
        listener = listen("a")
        await listener.start()
        if (child := os.fork()) == 0:
            status = 1
            try:
                assert loops.open_hubs() == []
                del listener
                gc.collect()
                status = 0
            finally:
                os._exit(status)
        assert (await asyncio.to_thread(os.waitpid, child, 0))[1] == 0
        await anotify("a", "still here")
        assert await anext(listener) == Gap("started")
        item = await anext(listener)
        assert isinstance(item, pgbackend.Notification)
        assert item.payload == "still here"

    run(main())
    wait_for(lambda: not pids(admin), "the connection is closed")


def test_an_overdue_gap_comes_before_what_is_sent_later(
    run: Runner, link: Link, without_pauses: None
) -> None:
    async def main() -> None:
        async with listen("a") as items, listen("a", queue_size=1) as short:
            link.reset()
            for number in range(3):
                await anotify("a", str(number))
            assert await anext(items) == Gap("started")
            link.thaw()
            while (await anext(items)) != Gap("reconnected"):
                pass
            assert await anext(short) == Gap("overflow")

    own = {"host": "127.0.0.1", "port": link.port, "sslmode": "disable", "gssencmode": "disable"}
    given = connections.settings["default"]["OPTIONS"]
    with settings_of_default(OPTIONS={**given, "listen": own}):
        run(main())
    connection.close()


def test_a_link_through_the_alias_itself_is_used(run: Runner, link: Link) -> None:
    async def main() -> None:
        async with listen("a"):
            assert link.attempts == before + 1

    before = link.attempts
    with by_link(link):
        run(main())
