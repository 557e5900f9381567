"""Tests C15: fifty tenants by `session(search_path=...)`, over a pool of five connections."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.db import connection, connections, transaction

import pgbackend
from pgbackend import aio
from tests.conftest import Runner
from tests.library.models import Author
from tests.support.fixtures import settings_of_default
from tests.support.messages import messages
from tests.support.tenants import OUTSIDE, make_schema, tenant

TENANTS = [f"tenant_{number}" for number in range(50)]
REQUESTS = 2000


@pytest.fixture
def fifty(transactional_db: Any) -> Iterator[None]:
    for name in TENANTS:
        make_schema(name, row=name)
    Author.objects.create(id=1, name=OUTSIDE)
    yield
    with connection.cursor() as cursor:
        for name in TENANTS:
            cursor.execute(f"DROP SCHEMA {name} CASCADE")


def serve(name: str, number: int) -> list[str]:
    """Serve a request of a tenant; return the names in the rows that it has seen and changed."""
    seen = [tenant()]
    with transaction.atomic():
        Author.objects.create(id=number + 2, name=name)
        seen += Author.objects.filter(id__in=(1, number + 2)).values_list("name", flat=True)
        if number % 3 == 0:
            transaction.set_rollback(True)
    seen += [each.name for each in Author.objects.iterator(chunk_size=2)]
    Author.objects.filter(id=number + 2).delete()
    return seen


def options(size: int) -> dict[str, Any]:
    given = connections.settings["default"]["OPTIONS"]
    return {**given, "pool": {"min_size": size, "max_size": size, "timeout": 60}}


@pytest.mark.usefixtures("fifty")
def test_tenants_under_load_see_their_own_rows_only(
    run: Runner, request: pytest.FixtureRequest
) -> None:
    rng = random.Random(request.config.option.seed)
    seen: Counter[str] = Counter()

    async def request_of(name: str, number: int) -> None:
        async with pgbackend.session(search_path=[name, "public"]):
            found = await aio.run(serve, name, number)
        assert found
        seen[name if set(found) == {name} else "another's"] += 1
        if number % 10 == 0:  # a request without a tenant
            seen[await aio.run(tenant)] += 1

    async def main() -> None:
        tasks = [
            asyncio.create_task(request_of(rng.choice(TENANTS), number))
            for number in range(REQUESTS)
        ]
        cancelled = rng.sample(tasks, REQUESTS // 5)
        for task in cancelled:
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
            await _until_begun(rng)
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        errors = [each for each in results if isinstance(each, Exception)]
        assert not errors, errors[:3]
        seen["cancelled"] = sum(isinstance(each, asyncio.CancelledError) for each in results)

    async def _until_begun(rng: random.Random) -> None:
        await asyncio.sleep(rng.random() / 500)

    with settings_of_default(OPTIONS=options(5)):
        run(main(), timeout=110)
    assert seen["another's"] == 0
    assert seen["cancelled"] > REQUESTS // 10
    assert sum(seen[name] for name in TENANTS) >= REQUESTS - REQUESTS // 5
    assert seen.keys() <= {*TENANTS, OUTSIDE, "cancelled"}
    with connection.cursor() as cursor:
        for name in TENANTS:
            cursor.execute(f"SELECT DISTINCT name FROM {name}.library_author")
            assert cursor.fetchall() == [(name,)]


@pytest.mark.usefixtures("fifty")
def test_tenants_cost_no_message(run: Runner) -> None:
    def load(declare: Callable[[str], Any]) -> int:
        async def main() -> None:
            for number, name in enumerate(TENANTS * 2):
                async with declare(name):
                    await aio.run(serve, "x", number)

        with settings_of_default(OPTIONS=options(1)), messages() as sent:
            run(main())
        return len(sent)

    with_tenants = load(lambda name: pgbackend.session(search_path=[name, "public"]))
    without = load(lambda name: pgbackend.session())
    # The DECLARE of an iterator() shares no message, but comes after a statement of its tenant.
    assert with_tenants == without
