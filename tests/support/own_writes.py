"""Tries, many times, whether a read sees what its own unit of work has written just before.

    python -m tests.support.own_writes --tries 10000

with the settings of the environment (DJANGO_SETTINGS_MODULE), whose DATABASE_ROUTERS has a
`ReplicaRouter`, and in which `tests.library` is installed and migrated. Its exit code is 1 if a
read was stale.
"""

from __future__ import annotations

import argparse
import asyncio
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import sleep
from typing import Any
from uuid import uuid4

STALE = "stale"


#: In every 25th try, the last read is repeated until a replica has it, or so many times.
_REPEATED, _PAUSES = 25, 10


def _one_try(model: Any, number: int, pause: Callable[[], object]) -> str:
    """Write, read, change and read again; return where the last read went, or `STALE`."""
    from pgbackend import routers

    name = f"{uuid4()} {number}"
    with routers.use_token():
        made = model.objects.create(name=name)
        if model.objects.filter(name=name).first() is None:
            return STALE
        model.objects.filter(pk=made.pk).update(name=f"{name}!")
        found = model.objects.filter(name=f"{name}!").first()
        for _ in range(0 if number % _REPEATED else _PAUSES):
            if found is None or found._state.db != made._state.db:
                break
            pause()
            found = model.objects.filter(name=f"{name}!").first()
    return STALE if found is None else str(found._state.db)


def in_threads(model: Any, tries: int, threads: int = 4) -> Counter[str]:
    """Try in sync code; return how many reads went to which alias, or were stale."""
    from django.db import connections

    def several(first: int) -> list[str]:
        try:
            tried = range(first, tries, threads)
            return [_one_try(model, number, lambda: sleep(0.005)) for number in tried]
        finally:
            connections.close_all()

    with ThreadPoolExecutor(threads) as pool:
        return Counter(each for found in pool.map(several, range(threads)) for each in found)


async def in_tasks(model: Any, tries: int, tasks: int = 8) -> Counter[str]:
    """Try in green code; return how many reads went to which alias, or were stale."""
    from pgbackend import aio
    from pgbackend.driver.bridge import await_

    def several(first: int) -> list[str]:
        tried = range(first, tries, tasks)
        return [_one_try(model, number, lambda: await_(asyncio.sleep(0.005))) for number in tried]

    found = await asyncio.gather(*(aio.run(several, first) for first in range(tasks)))
    return Counter(each for some in found for each in some)


def main() -> int:
    """Run the tries that the command line asks for, and print what they found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tries", type=int, default=10_000)
    tries = parser.parse_args().tries // 2

    import django

    django.setup()
    from tests.library.models import Tag

    run: dict[str, Callable[[], Counter[str]]] = {
        "green": lambda: asyncio.run(in_tasks(Tag, tries)),
        "sync": lambda: in_threads(Tag, tries),
    }
    stale = 0
    for kind, tried in run.items():
        found = tried()
        stale += found[STALE]
        print(f"{kind}: {found.total()} tries, {found[STALE]} stale; read from {dict(found)}")
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
