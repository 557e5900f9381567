"""Tests C17 behind a pooler that refuses statements while it reaches no server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from django.db import connections
from django.db.utils import OperationalError
from psycopg.conninfo import make_conninfo

import pgbackend
from tests.conftest import Runner
from tests.library.models import Tag
from tests.support.fixtures import pool_of_default, settings_of_default
from tests.support.link import Link
from tests.support.pgbouncer import pgbouncer, program

pytestmark = pytest.mark.django_db(transaction=True)

REFUSAL = "server login has been failing"


@pytest.fixture
def link(request: pytest.FixtureRequest, conninfo: str) -> Iterator[Link]:
    """Lead through PgBouncer to the server; the link between these two can be cut."""
    if program() is None and not request.config.option.require_servers:
        pytest.skip("no PgBouncer here: 'make pgbouncer' installs it")
    link = Link(conninfo)
    try:
        behind = make_conninfo(conninfo, host="127.0.0.1", port=link.port)
        with pgbouncer(behind, server_login_retry="0.1") as way:
            options = {
                **connections.settings["default"]["OPTIONS"],
                "sslmode": "disable",
                "gssencmode": "disable",
            }
            changes = {"HOST": way["host"], "PORT": way["port"], "USER": way["user"]}
            with settings_of_default(**changes, PASSWORD="", OPTIONS=options):
                yield link
    finally:
        link.close()


async def until_it_refuses() -> list[asyncio.Task[int]]:
    """Send statements until PgBouncer refuses one; return those that wait inside PgBouncer.

    Statements that arrive while an attempt to reach the server is under way wait for its end, and
    for a server; those that arrive after it has failed are refused. What waits may be refused, too.
    """
    sent: list[asyncio.Task[int]] = []
    async with asyncio.timeout(10):
        while not any(each.done() and REFUSAL in str(each.exception()) for each in sent):
            sent.append(asyncio.create_task(Tag.objects.acount()))
            await asyncio.wait(sent, timeout=0.3, return_when=asyncio.FIRST_COMPLETED)
            sent = [each for each in sent if not _has_other_end(each)]
    return [each for each in sent if not each.done()]


def _has_other_end(task: asyncio.Task[int]) -> bool:
    return task.done() and REFUSAL not in str(task.exception())


def waiting() -> int:
    return sum(pool.waiting for pool in pgbackend.statistics())


def test_a_short_outage_behind_a_pooler_fails_only_what_it_interrupts(
    run: Runner, link: Link
) -> None:
    async def main() -> None:
        await Tag.objects.acount()
        link.cut()
        within = await until_it_refuses()
        asked = [asyncio.create_task(Tag.objects.acount()) for _ in range(5)]
        async with asyncio.timeout(5):
            while waiting() < 5:
                assert not [each for each in asked if each.done()]
                await asyncio.sleep(0.001)
        link.restore()
        assert await asyncio.gather(*asked) == [0] * 5
        await asyncio.gather(*within, return_exceptions=True)

    run(main())


def test_a_long_outage_behind_a_pooler_is_told_at_once_until_it_ends(
    run: Runner, link: Link
) -> None:
    async def main() -> None:
        await Tag.objects.acount()
        link.cut()
        within = await until_it_refuses()
        with pytest.raises(OperationalError, match=REFUSAL):
            await Tag.objects.acount()
        for _ in range(20):
            with pytest.raises(OperationalError, match=REFUSAL):
                await Tag.objects.acount()
        link.restore()
        async with asyncio.timeout(5):
            while not await _succeeds():
                await asyncio.sleep(0.01)
        others = (Tag.objects.acount() for _ in range(20))
        assert await asyncio.gather(*others) == [0] * 20
        await asyncio.gather(*within, return_exceptions=True)

    with pool_of_default(outage_grace=0):
        run(main())


async def _succeeds() -> bool:
    try:
        await Tag.objects.acount()
    except OperationalError:
        return False
    return True
