"""Tests C7: a COMMIT whose answer is lost has an unknown outcome, and the server knows it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import psycopg
import pytest
from django.db import connection, connections, transaction

from pgbackend import OutcomeUnknown, Verdict, aio
from tests.conftest import Runner
from tests.library.models import Tag
from tests.support.cutting import ANSWERED, ASKED, CuttingLink
from tests.support.fixtures import by_link

#: The commits of one case; there are 2 kinds of code with ten cases each: 500 commits in all.
COMMITS = 25
CASES = range(10)


@pytest.fixture
def link(conninfo: str) -> Iterator[CuttingLink]:
    opened = CuttingLink(conninfo)
    forget_connections()
    with by_link(opened, commit_id=True):
        yield opened
        forget_connections()
    opened.close()


def forget_connections() -> None:
    """Close the connection of this thread, and the pools: their settings have changed."""
    connection.close()
    connection.close_pool()


def direct(conninfo: str) -> psycopg.Connection[Any]:
    """Open a connection to Django's database that does not go through a link."""
    name = connections["default"].settings_dict["NAME"]
    return psycopg.connect(conninfo, dbname=name, autocommit=True)


def lost(name: str) -> OutcomeUnknown:
    """Write a row in a block whose COMMIT is cut, and return the error."""
    with pytest.raises(OutcomeUnknown) as caught, transaction.atomic():
        Tag.objects.create(name=name)
    return caught.value


def in_sync_code(names: list[str], run: Runner) -> dict[str, Verdict]:
    return {name: lost(name).verdict() for name in names}


def in_green_code(names: list[str], run: Runner) -> dict[str, Verdict]:
    async def one(name: str) -> Verdict:
        return await (await aio.run(lost, name)).averdict()

    async def main() -> dict[str, Verdict]:
        found: dict[str, Verdict] = {}
        for at in range(0, len(names), 5):
            some = names[at : at + 5]
            found |= zip(some, await asyncio.gather(*map(one, some)), strict=True)
        return found

    return run(main())


@pytest.mark.sweep(one_in=10)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("verdicts", [in_sync_code, in_green_code])
def test_each_verdict_on_a_commit_that_was_cut_at_a_random_byte_is_right(
    run: Runner,
    link: CuttingLink,
    conninfo: str,
    verdicts: Callable[[list[str], Runner], dict[str, Verdict]],
    case: int,
) -> None:
    random = Random(case)
    link.cut_at(random.randrange(ASKED + ANSWERED) for _ in range(COMMITS))
    found = verdicts([f"{case} {number}" for number in range(COMMITS)], run)
    with direct(conninfo) as admin:
        written = {name for (name,) in admin.execute("SELECT name FROM library_tag")}
    assert not link.plan, "each COMMIT was cut"
    assert found == {
        name: Verdict.COMMITTED if name in written else Verdict.ABORTED for name in found
    }
    count = Counter(found.values())
    assert min(count[Verdict.COMMITTED], count[Verdict.ABORTED]) >= 4, count
