"""Makes each kind of hang that docs/hang.md tells of, and prints what can be seen of it.

``python -m tests.docs.hangs`` uses the server of `DATABASE_URL`, or starts one. It makes a table in
the database of that server, and drops it.
"""

from __future__ import annotations

import asyncio
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import django
import psycopg
from django.conf import settings
from django.core.handlers.asgi import ASGIHandler
from django.db import OperationalError, connection, connections, transaction
from django.http import HttpRequest, HttpResponse
from django.urls import path

import pgbackend
from pgbackend import embedded
from tests.docs.snippets import ROOT
from tests.support.link import Link

_POOL = {"max_size": 2, "timeout": 0.5}
_WHO_BLOCKS = """
SELECT pid, state, wait_event_type, pg_blocking_pids(pid) AS blocked_by, left(query, 40) AS query
FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()
ORDER BY xact_start
"""


def blocking_view(request: HttpRequest) -> HttpResponse:
    time.sleep(0.6)
    return HttpResponse("served")


async def async_view(request: HttpRequest) -> HttpResponse:
    return blocking_view(request)


urlpatterns = [path("report/", async_view)]


# --- The hangs ------------------------------------------------------------------------------------


async def used_up() -> None:
    """Hold all connections by `pinned()` blocks that wait for something else."""
    go_on, held = asyncio.Event(), asyncio.Barrier(3)

    async def export() -> None:
        with pgbackend.pinned():
            await account().acount()
            await held.wait()
            await go_on.wait()  # for example for an answer by HTTP

    async with asyncio.TaskGroup() as group:
        for name in ("export-1", "export-2"):
            group.create_task(export(), name=name)
        await held.wait()
        with suppress(OperationalError):
            await shown(account().acount())
        print(pgbackend.dump())
        go_on.set()


async def deadlock() -> None:
    """Let each of two holders need a second connection."""
    held = asyncio.Barrier(2)

    async def transfer() -> None:
        async with pgbackend.atomic():
            await account().acount()
            await held.wait()
            await shown(pgbackend.detached(account().acount()))

    tasks = [asyncio.create_task(transfer(), name=f"transfer-{n}") for n in (1, 2)]
    await asyncio.gather(*tasks, return_exceptions=True)


async def lock() -> None:
    """Let a transaction wait for a row that another transaction has locked."""
    go_on, locked = asyncio.Event(), asyncio.Event()

    async def first() -> None:
        async with pgbackend.atomic():
            await account().select_for_update().afirst()
            locked.set()
            await go_on.wait()

    async with asyncio.TaskGroup() as group:
        group.create_task(first(), name="first")
        await locked.wait()
        group.create_task(account().aupdate(balance=1), name="second")
        while not (rows := [row for row in who_blocks() if row[3]]):
            await asyncio.sleep(0.01)
        print(pgbackend.dump())
        for row in [*who_blocks()]:
            print(" | ".join(map(str, row)))
        assert rows
        go_on.set()


async def blocked_loop() -> None:
    """Serve a request whose view blocks the event loop."""
    application = ASGIHandler()
    sent: list[dict[str, Any]] = []
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/report/",
        "headers": [],
        "query_string": b"",
    }

    async def receive() -> dict[str, Any]:
        if not sent:
            return {"type": "http.request", "body": b"", "more_body": False}
        return await asyncio.Future()

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await application(scope, receive, send)


async def forgotten() -> None:
    """Forget to await an a-method."""
    account().acreate(balance=7)  # the mistake
    print("rows:", await account().acount())


async def silent() -> None:
    """Let the network be silent while a statement is under way."""
    (link,) = links
    await account().acount()
    link.freeze()
    task = asyncio.create_task(account().acount(), name="report")
    await asyncio.sleep(0.3)
    print(pgbackend.dump())
    task.cancel()
    link.thaw()
    with suppress(asyncio.CancelledError):
        await task


HANGS: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
    "used up": used_up,
    "deadlock": deadlock,
    "lock": lock,
    "blocked loop": blocked_loop,
    "forgotten await": forgotten,
    "silent network": silent,
}


# --- The project ----------------------------------------------------------------------------------

#: The link to the server, while the network can be made silent.
links: list[Link] = []


def account() -> Any:
    from tests.docs.shop.models import Account

    return Account.objects


async def shown(coro: Coroutine[Any, Any, Any]) -> Any:
    """Await `coro`; print the error that it raises, and raise it."""
    try:
        return await coro
    except OperationalError as exc:
        print(f"{type(exc.__cause__).__name__}: {exc}")
        raise


def who_blocks() -> list[tuple[Any, ...]]:
    """Return the sessions of the database, as an operator sees them."""
    with psycopg.connect(_conninfo()) as conn:
        return conn.execute(_WHO_BLOCKS).fetchall()


def _conninfo() -> str:
    url = embedded.database_settings(server.url)
    return psycopg.conninfo.make_conninfo(
        dbname=url["NAME"],
        user=url["USER"],
        password=url.get("PASSWORD") or None,
        host=url["HOST"],
        port=url.get("PORT") or None,
    )


def _set_up() -> None:
    given = embedded.database_settings(server.url)
    settings.configure(
        DATABASES={"default": {**given, "ENGINE": "pgbackend", "OPTIONS": {"pool": _POOL}}},
        INSTALLED_APPS=["tests.docs.shop"],
        ROOT_URLCONF="tests.docs.hangs",
        ALLOWED_HOSTS=["*"],
        PGBACKEND_SLOW_STEP=0.2,
        USE_TZ=True,
    )
    django.setup()
    warnings.simplefilter("always")


def _run(name: str) -> None:
    print(f"== {name}", flush=True)
    if name == "silent network":
        links.append(link := Link(_conninfo()))
        connections.settings["default"].update(HOST="127.0.0.1", PORT=str(link.port))
        connections.settings["default"]["OPTIONS"]["sslmode"] = "disable"
    asyncio.run(HANGS[name](), debug=name == "forgotten await")
    for link in links:
        link.close()


def main() -> None:
    _set_up()
    from tests.docs.shop.models import Account

    with connection.schema_editor() as editor:
        editor.create_model(Account)
    with transaction.atomic():
        Account.objects.create(balance=0)
    try:
        for name in HANGS:
            _run(name)
    finally:
        connection.close()
        with psycopg.connect(_conninfo(), autocommit=True) as conn:
            conn.execute(f"DROP TABLE {Account._meta.db_table}")


class _Shortened:
    """Prints without what differs between two machines: the paths of the files."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        text = text.replace(f"{ROOT}/tests/docs/", "").replace(f"{ROOT}/", "")
        return int(self._stream.write(re.sub(r'"/[^"]*/lib/python[\d.]+/', '"', text)))

    def flush(self) -> None:
        self._stream.flush()


if __name__ == "__main__":
    sys.stdout = sys.stderr = _Shortened(sys.stdout)
    server = embedded.server()
    sys.modules["tests.docs.hangs"] = sys.modules["__main__"]
    threading.current_thread().name = "MainThread"
    main()
