"""Forks while pools are open: ``python forks.py SCENARIO``, with ``DATABASE_URL`` set.

The parent's sessions must not change: same processes, same last statement, transaction alive.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import sys
from typing import Any

import psycopg
from django.conf import settings

from tests.contract.probes.exits import configure


def pid() -> int:
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        return int(cursor.fetchone()[0])


async def green() -> int:
    from pgbackend import aio

    return await aio.run(pid)


def sessions(pids: set[int]) -> Any:
    """Return the server's view of these sessions, which any byte from the child would change."""
    with psycopg.connect(os.environ["DATABASE_URL"]) as admin:
        return admin.execute(
            "SELECT pid, backend_start, state_change, query, state FROM pg_stat_activity "
            "WHERE pid = ANY(%s) ORDER BY pid",
            [list(pids)],
        ).fetchall()


def child_work(parents: set[int]) -> None:
    """Work as a server's worker does: async code, sync code, and async code again."""
    assert asyncio.run(green()) not in parents
    assert pid() not in parents
    assert asyncio.run(green()) not in parents


def fork_and_wait(parents: set[int], leave: str) -> None:
    before = sessions(parents)
    assert len(before) == len(parents)
    if (child := os.fork()) == 0:
        child_work(parents)
        if leave == "_exit":
            os._exit(0)
        raise SystemExit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert sessions(parents) == before


def say_farewell(loop: asyncio.AbstractEventLoop) -> None:
    """Do the last steps of `asyncio.run()`."""
    loop.run_until_complete(loop.shutdown_asyncgens())
    for task in asyncio.all_tasks(loop):  # the pool's tasks, which the step before has cancelled
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)
    loop.close()


def preload() -> None:
    """Load the application and query, as a server does, and then fork workers."""
    loop = asyncio.new_event_loop()
    parents = {loop.run_until_complete(green())}
    for leave in ("_exit", "exit", "exit"):
        fork_and_wait(parents, leave)
    assert loop.run_until_complete(green()) in parents
    say_farewell(loop)


def by_multiprocessing() -> None:
    loop = asyncio.new_event_loop()
    parents = {loop.run_until_complete(green())}
    before = sessions(parents)
    for method in ("fork", "spawn"):
        target = child_work if method == "fork" else spawned
        process = multiprocessing.get_context(method).Process(target=target, args=(parents,))
        process.start()
        process.join(30)
        assert process.exitcode == 0, method
        assert sessions(parents) == before, method
    assert loop.run_until_complete(green()) in parents
    say_farewell(loop)


def spawned(parents: set[int]) -> None:
    configure("spawned", min_size=0)
    child_work(parents)


def in_a_transaction() -> None:
    """Fork green code in the midst of a block; the child works and exits."""
    from django.db import connection, transaction

    def txid() -> int:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_current_xact_id()::text")
            return int(cursor.fetchone()[0])

    def work() -> None:
        with transaction.atomic():
            before = txid()
            parents = {pid()}
            for leave in ("_exit", "exit"):
                fork_and_wait(parents, leave)
            process = multiprocessing.get_context("fork").Process(
                target=child_work, args=(parents,)
            )
            process.start()
            process.join(30)
            assert process.exitcode == 0
            assert (txid(), {pid()}) == (before, parents), "the transaction lives"

    async def main() -> None:
        from pgbackend import aio

        await aio.run(work)

    asyncio.run(main())


if __name__ == "__main__":
    configure("forks", min_size=0, max_size=1)
    # A reset that its stopped loop does not end in time would cost the connection.
    settings.DATABASES["default"]["OPTIONS"]["session_reset"] = "never"
    scenario = {f.__name__: f for f in (preload, by_multiprocessing, in_a_transaction)}
    scenario[sys.argv[1]]()
