"""Ends interpreters in each state that a pool may be in: ``python -X dev exits.py``.

One process loads everything, and forks a child for each state; each child goes on to the end of its
main program and is finalised like any interpreter. The children's output and exit statuses are
printed as JSON. ``DATABASE_URL`` names the server, and each child's sessions are named after its
state.
"""

from __future__ import annotations

import asyncio
import atexit
import faulthandler
import json
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import django
import uvloop
from django.conf import settings
from psycopg.conninfo import conninfo_to_dict

STATES: dict[str, Callable[[], Any]] = {}
KEPT: list[Any] = []
STOPPED_AT_EXIT: list[Any] = []


@atexit.register
def stop_at_exit() -> None:
    if STOPPED_AT_EXIT:
        loop, stop, thread = STOPPED_AT_EXIT
        loop.call_soon_threadsafe(stop.set)
        thread.join()


def state(fn: Callable[[], Any]) -> Callable[[], Any]:
    STATES[fn.__name__] = fn
    return fn


def configure(name: str, **pool: int) -> None:
    given = conninfo_to_dict(os.environ["DATABASE_URL"])
    settings.configure(
        DATABASES={
            "default": {
                "ENGINE": "pgbackend",
                "NAME": given.get("dbname"),
                "USER": given.get("user"),
                "PASSWORD": given.get("password", ""),
                "HOST": given.get("host"),
                "PORT": given.get("port"),
                "OPTIONS": {"application_name": name, "pool": {"max_size": 2, **pool}},
            }
        }
    )
    django.setup()
    # On a busy machine a step may take long; warnings of that do not matter here.
    logging.getLogger("asyncio").addFilter(lambda record: not record.msg.startswith("Executing"))
    from django.db import connections, models, transaction  # noqa: F401

    import pgbackend.aio
    import pgbackend.metrics  # noqa: F401

    assert connections["default"].vendor == "postgresql"  # load the engine


def query() -> int:
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
        return int(cursor.fetchone()[0])


async def green() -> int:
    from pgbackend import aio

    return await aio.run(query)


async def hold(held: asyncio.Event, block: str) -> None:
    from django.db import transaction

    import pgbackend

    async with transaction.atomic() if block == "atomic" else pgbackend.pinned():
        await green()
        held.set()
        await asyncio.Event().wait()


async def start_holding(block: str, count: int = 1) -> None:
    for _ in range(count):
        held = asyncio.Event()
        KEPT.append(asyncio.create_task(hold(held, block)))
        await held.wait()


@state
def pool_open() -> None:
    asyncio.run(green())


@state
def pool_open_on_uvloop() -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(green())


@state
def leased() -> None:
    asyncio.run(start_holding("pinned"))


@state
def in_atomic() -> None:
    asyncio.run(start_holding("atomic"))


@state
def pending_waiter() -> None:
    async def main() -> None:
        await start_holding("pinned", 2)
        KEPT.append(asyncio.create_task(green()))
        for _ in range(10):
            await asyncio.sleep(0)

    asyncio.run(main())


@state
def in_atexit() -> None:
    atexit.register(lambda: asyncio.run(green()))
    atexit.register(query)


@state
def in_a_thread() -> None:
    thread = threading.Thread(target=lambda: asyncio.run(start_holding("atomic")))
    thread.start()


@state
def in_a_daemon_thread() -> None:
    ready = threading.Event()

    async def main() -> None:
        await start_holding("atomic")
        ready.set()
        await asyncio.Event().wait()

    threading.Thread(target=lambda: asyncio.run(main()), daemon=True).start()
    ready.wait(20)


@state
def busy_in_a_daemon_thread() -> None:
    """Run a thread that is in the midst of green code whenever the interpreter checks it."""
    from pgbackend import aio

    ready = threading.Event()

    def work() -> None:
        query()
        ready.set()
        sum(range(300_000))

    async def main() -> None:
        while True:
            await aio.run(work)

    threading.Thread(target=lambda: asyncio.run(main()), daemon=True).start()
    ready.wait(20)


@state
def forked_beside_a_daemon_thread() -> None:
    """Fork: the child does not have the thread, and must not wait for it at its end."""
    in_a_daemon_thread()
    faulthandler.cancel_dump_traceback_later()  # the child would wait for the timer's thread
    if child := os.fork():
        os.waitpid(child, 0)
    else:
        from pgbackend.driver.exits import _loops

        assert not list(_loops), "the end of the child waits for loops of its parent"


@state
def stopped_by_what_is_called_at_exit() -> None:
    """Stop a loop by an exit handler registered before the engine's, so called after them."""
    assert STOPPED_AT_EXIT == []
    ready = threading.Event()

    async def main() -> None:
        stop = asyncio.Event()
        STOPPED_AT_EXIT.extend([asyncio.get_running_loop(), stop, threading.current_thread()])
        await green()
        ready.set()
        await stop.wait()

    threading.Thread(target=lambda: asyncio.run(main()), daemon=True).start()
    ready.wait(20)


@state
def closed_without_farewell() -> None:
    loop = asyncio.new_event_loop()
    loop.run_until_complete(green())
    loop.close()


@state
def closed_without_farewell_on_uvloop() -> None:
    loop = uvloop.new_event_loop()
    loop.run_until_complete(green())
    loop.close()


@state
def sync_and_async() -> None:
    query()
    asyncio.run(green())
    query()


@state
def by_sys_exit_in_a_task() -> None:
    async def main() -> None:
        await start_holding("atomic")
        sys.exit(0)

    asyncio.run(main())


def parent(name: str) -> None:
    children = {}
    for one, work in STATES.items():
        log, path = tempfile.mkstemp()
        if (child := os.fork()) == 0:
            os.dup2(log, 2)
            os.dup2(log, 1)
            faulthandler.dump_traceback_later(15, exit=True)  # a child that hangs prints where
            settings.DATABASES["default"]["OPTIONS"]["application_name"] = f"{name} {one}"
            work()
            return  # go on to the end of the program
        os.close(log)
        children[one] = child, Path(path)
    found = {}
    for one, (child, log) in children.items():
        _, status = os.waitpid(child, 0)
        found[one] = os.waitstatus_to_exitcode(status), log.read_text()
        log.unlink()
    print(json.dumps(found))


if __name__ == "__main__":
    configure(sys.argv[1], min_size=1)
    parent(sys.argv[1])
