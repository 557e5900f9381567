"""Measures the cost of `OPTIONS["session_reset"]`: ``python benchmarks/session_settings.py``.

Statements of the ORM and raw ones run, each on a lease of its own, under the three settings; one
after the other, and four at a time on a pool of four. The output is microseconds a statement, and
the ratio to `never`, from this run. The rounds take turns, and the best of them counts. The program
starts a server of its own, or uses that of ``DATABASE_URL``.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import django
from django.conf import settings

sys.path.insert(0, str(Path(__file__).parents[1]))

from pgbackend import embedded

RESETS = ("never", "dirty", "always")
ROUNDS = 7
STATEMENTS = 200


def orm(alias: str) -> None:
    from django.contrib.contenttypes.models import ContentType

    list(ContentType.objects.using(alias).filter(pk=-1))


def raw(alias: str) -> None:
    from django.db import connections

    with connections[alias].cursor() as cursor:
        cursor.execute("SELECT 1")
        cursor.fetchone()


async def one_round(work: Callable[[str], None], alias: str, tasks: int) -> float:
    """Return the seconds that one statement takes."""
    from pgbackend import aio

    async def client() -> None:
        for _ in range(STATEMENTS // tasks):
            await aio.run(work, alias)

    started = perf_counter()
    await asyncio.gather(*(client() for _ in range(tasks)))
    return (perf_counter() - started) / STATEMENTS


async def measure(work: Callable[[str], None], tasks: int) -> dict[str, float]:
    best = dict.fromkeys(RESETS, float("inf"))
    for _ in range(ROUNDS):
        for reset in RESETS:
            best[reset] = min(best[reset], await one_round(work, reset, tasks))
    return best


def configure(url: str) -> None:
    given = embedded.database_settings(url)
    options = {**given.pop("OPTIONS", {}), "pool": {"max_size": 4}}
    databases: dict[str, Any] = {
        reset: {**given, "ENGINE": "pgbackend", "OPTIONS": {**options, "session_reset": reset}}
        for reset in RESETS
    }
    settings.configure(
        DATABASES={"default": databases["dirty"], **databases},
        INSTALLED_APPS=["django.contrib.contenttypes"],
    )
    django.setup()


def main() -> None:
    with embedded.server() as server:
        configure(server.url)
        from django.core.management import call_command

        call_command("migrate", verbosity=0)
        for name, work in (("a statement of the ORM", orm), ("a raw statement", raw)):
            for tasks in (1, 4):
                best = asyncio.run(measure(work, tasks))
                cells = ", ".join(
                    f"{reset} {seconds * 1e6:.0f} µs ({seconds / best['never']:.2f})"
                    for reset, seconds in best.items()
                )
                print(f"{name}, {tasks} at a time: {cells}")


if __name__ == "__main__":
    main()
