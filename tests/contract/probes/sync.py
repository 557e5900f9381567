"""Prints what sync code sees of a backend, as JSON: run once with each engine, and compared.

``python sync.py ENGINE``, with ``DATABASE_URL`` and ``PGSERVICEFILE`` set. Each function decorated
with `fact` is one scenario; values that differ from run to run (process ids, times) become true or
false.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import django
from django.conf import settings
from psycopg.conninfo import conninfo_to_dict

FACTS: dict[str, Callable[[], Any]] = {}


def fact(fn: Callable[[], Any]) -> Callable[[], Any]:
    FACTS[fn.__name__] = fn
    return fn


def configure(engine: str) -> None:
    given = conninfo_to_dict(os.environ["DATABASE_URL"])
    plain = {
        "ENGINE": engine,
        "NAME": given.get("dbname"),
        "USER": given.get("user"),
        "PASSWORD": given.get("password", ""),
        "HOST": given.get("host"),
        "PORT": given.get("port"),
    }

    def but(options: Any = None, **changes: Any) -> dict[str, Any]:
        return {**plain, **changes, "OPTIONS": options or {}}

    pool = {"min_size": 0, "max_size": 1, "timeout": 0.05}
    settings.configure(
        # Two aliases are wrong, to see with which errors they fail.
        SILENCED_SYSTEM_CHECKS=["pgbackend.E006", "pgbackend.E008"],
        DATABASES={
            "default": but(),
            "aged": but(CONN_MAX_AGE=60),
            "kept": but(CONN_MAX_AGE=None),
            "checked": but(CONN_MAX_AGE=None, CONN_HEALTH_CHECKS=True),
            "pool": but({"pool": pool}),
            "aged_pool": but({"pool": True}, CONN_MAX_AGE=60),
            "client_side": but(DISABLE_SERVER_SIDE_CURSORS=True),
            "role": but({"assume_role": "probed"}),
            "serializable": but({"isolation_level": 4}),
            "bad_level": but({"isolation_level": 99}),
            "binding": but({"server_side_binding": True}),
            "prepared": but({"server_side_binding": True, "prepare_threshold": 0}),
            "service": {"ENGINE": engine, "OPTIONS": {"service": "probed"}},
            "no_service": {"ENGINE": engine, "OPTIONS": {"service": "nowhere"}},
            "manual": but(AUTOCOMMIT=False),
            "unknown": but(NAME="no_such_database"),
            "tokyo": but(TIME_ZONE="Asia/Tokyo"),
        },
        USE_TZ=True,
        DEBUG=True,
    )
    django.setup()


def define_models() -> None:
    """Define models of the server's own tables, so that no table needs to be made."""
    from django.db import models

    class Type(models.Model):
        oid = models.BigIntegerField(primary_key=True)
        typname = models.TextField()

        class Meta:
            app_label = "probe"
            managed = False
            db_table = "pg_type"

        def __str__(self):
            return self.typname

    globals()["Type"] = Type


def one(alias: str, sql: str = "SELECT pg_backend_pid()", params: Any = None) -> Any:
    from django.db import connections

    with connections[alias].cursor() as cursor:
        cursor.execute(sql, params)
        row = cursor.fetchone()
        return row[0] if len(row) == 1 else list(row)


def alive(pid: int) -> bool:
    return bool(one("default", "SELECT count(*) FROM pg_stat_activity WHERE pid = %s", [pid]))


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while alive(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def kill(pid: int) -> None:
    one("default", "SELECT pg_terminate_backend(%s, 5000)", [pid])


def request() -> None:
    """Send the signals of the end of one request and the start of the next."""
    from django.core import signals

    signals.request_finished.send(sender=None)
    signals.request_started.send(sender=None)


def error(fn: Callable[[], Any]) -> Any:
    """Return the name, cause and first line of the exception that `fn` raises."""
    try:
        return ["no error", fn()]
    except Exception as exc:
        cause = exc.__cause__
        return [
            type(exc).__module__,
            type(exc).__name__,
            str(exc).partition("\n")[0].partition("@")[0].partition('"/')[0],
            None if cause is None else type(cause).__name__,
            getattr(cause, "sqlstate", None),
        ]


def in_thread(fn: Callable[[], Any]) -> Any:
    results: list[Any] = []

    def target() -> None:
        try:
            results.append(fn())
        finally:
            from django.db import connections

            connections.close_all()

    thread = threading.Thread(target=target)
    thread.start()
    thread.join(20)
    return results[0]


# --- Connections --------------------------------------------------------------------------------


@fact
def a_thread_has_one_connection_of_its_own() -> Any:
    both = threading.Barrier(2)

    def work() -> Any:
        first = one("default")
        both.wait(10)
        pids = {one("default") for _ in range(3)}
        both.wait(10)
        return first, pids == {first}

    theirs: list[Any] = []
    threads = [threading.Thread(target=lambda: theirs.append(in_thread(work))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    mine = one("default")
    pids = {mine, *(first for first, _ in theirs)}
    return len(pids), [same for _, same in theirs], [gone(first) for first, _ in theirs]


@fact
def conn_max_age() -> Any:
    from django.db import connections

    found = {}
    for alias in ("default", "aged", "kept"):
        before = one(alias)
        request()
        found[alias] = connections[alias].connection is not None and one(alias) == before
    connections["aged"].close_at = time.monotonic() - 1
    request()
    found["too old"] = connections["aged"].connection is None
    return found


@fact
def conn_health_checks() -> Any:
    pid = one("checked")
    request()
    kill(pid)
    checked = one("checked") != pid
    pid = one("kept")
    request()
    kill(pid)
    unchecked = error(lambda: one("kept"))[:2]
    request()
    return checked, unchecked, one("kept") != pid


@fact
def close_old_connections_and_close_all() -> Any:
    from django.db import close_old_connections, connections, transaction

    pid = one("aged")
    close_old_connections()
    kept = one("aged") == pid
    with transaction.atomic("aged"):
        close_old_connections()
        in_block = error(lambda: one("aged"))
    connections["aged"].close_at = 0
    close_old_connections()
    closed = connections["aged"].connection is None
    one("aged")
    connections.close_all()
    return (
        kept,
        in_block,
        closed,
        [conn.connection is None for conn in connections.all()],
        gone(pid),
    )


@fact
def the_pool_of_options() -> Any:
    from django.db import connections

    pid = one("pool")
    busy = in_thread(lambda: error(lambda: one("pool")))
    request()
    again = in_thread(lambda: one("pool")) == pid
    pool = connections["pool"].pool
    facts = [pool.max_size, pool.min_size, pool.timeout, pool.get_stats()["pool_size"]]
    facts.append(type(pool).__name__)
    connections["pool"].close()
    connections["pool"].close_pool()
    return busy, again, facts, gone(pid), error(lambda: one("aged_pool"))


# --- Server-side cursors ------------------------------------------------------------------------


@fact
def server_side_cursors() -> Any:
    from django.db import connections, transaction

    look = (
        "SELECT count(*), count(*) FILTER (WHERE is_holdable) FROM pg_cursors "
        "WHERE name LIKE '_django_curs_%%'"
    )

    def stream(alias: str) -> Any:
        rows = Type.objects.using(alias).order_by("oid").iterator(chunk_size=10)  # noqa: F821
        next(rows)
        found = one(alias, look)
        rows.close()
        return found, one(alias, look)

    found = {alias: stream(alias) for alias in ("default", "client_side", "binding")}
    with transaction.atomic():
        found["in a block"] = stream("default")
    with connections["default"].chunked_cursor() as cursor:
        cursor.execute("SELECT 1")
        found["chunked"] = type(cursor.cursor).__name__
    return found


# --- Options ------------------------------------------------------------------------------------


@fact
def assume_role() -> Any:
    return one("role", "SELECT current_user = 'probed', session_user <> 'probed'")


@fact
def isolation_level() -> Any:
    from django.db import connections, transaction

    look = "SELECT current_setting('transaction_isolation')"
    with transaction.atomic("serializable"):
        inside = one("serializable", look)
    return inside, str(connections["serializable"].isolation_level), error(lambda: one("bad_level"))


@fact
def server_side_binding_and_prepared_statements() -> Any:
    from django.db import connections

    found = {}
    for alias in ("default", "binding", "prepared"):
        with connections[alias].cursor() as cursor:
            cursor.execute(
                "SELECT %s::text, query FROM pg_stat_activity WHERE pid = pg_backend_pid()",
                ["bound"],
            )
            sent = "bound" not in cursor.fetchone()[1]
            cursor.execute(
                "SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE %s",
                ["%pg_stat_activity%"],
            )
            prepared = cursor.fetchone()[0]
            found[alias] = sent, prepared, type(cursor.cursor).__name__
    return found


@fact
def service() -> Any:
    return one("service", "SELECT current_setting('application_name')"), error(
        lambda: one("no_service")
    )


@fact
def time_zone() -> Any:
    return one("tokyo", "SHOW TimeZone"), one("default", "SHOW TimeZone")


@fact
def errors() -> Any:
    def use_closed() -> Any:
        from django.db import connections

        cursor = connections["default"].cursor()
        cursor.close()
        return cursor.execute("SELECT 1")

    return {
        "unknown database": error(lambda: one("unknown")),
        "syntax": error(lambda: one("default", "SELEC 1")),
        "missing": error(lambda: one("default", "SELECT * FROM no_such_table")),
        "type": error(lambda: one("default", "SELECT 'x'::int")),
        "division": error(lambda: one("default", "SELECT 1/0")),
        "closed cursor": error(use_closed),
        "not found": error(lambda: Type.objects.get(pk=-1)),  # noqa: F821
    }


# --- Transactions and what observes them --------------------------------------------------------


@fact
def transactions() -> Any:
    from django.db import connection, transaction

    seen: list[Any] = []

    def note() -> None:
        seen.append(
            [
                connection.in_atomic_block,
                connection.autocommit,
                len(connection.savepoint_ids),
                connection.needs_rollback,
            ]
        )

    note()
    with transaction.atomic():
        note()
        transaction.on_commit(lambda: seen.append("hook 1"))
        with transaction.atomic():
            note()
            transaction.on_commit(lambda: seen.append("hook 2"))
        seen.append(error(undone_block))
        note()
        seen.append(error(lambda: transaction.atomic(durable=True).__enter__()))
        sid = transaction.savepoint()
        transaction.savepoint_rollback(sid)
    note()
    transaction.set_autocommit(False)
    note()
    one("default", "SELECT 1")
    transaction.rollback()
    transaction.set_autocommit(True)
    seen.append([one("manual", "SELECT 1"), transaction.get_autocommit("manual")])
    transaction.rollback("manual")
    return seen


def undone_block() -> None:
    from django.db import transaction

    with transaction.atomic():
        transaction.on_commit(lambda: print("never"))
        one("default", "SELECT 1/0")


def nameless(found: Any) -> Any:
    """Remove the thread from the names of savepoints, which contain it."""
    return json.loads(json.dumps(found).replace(str(threading.get_ident()), "IDENT"))


@fact
def what_is_logged() -> Any:
    from django.db import connection, reset_queries, transaction

    wrapped: list[Any] = []

    def wrapper(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        wrapped.append([sql, params, many, sorted(context)])
        return execute(sql, params, many, context)

    reset_queries()
    with connection.execute_wrapper(wrapper), transaction.atomic():
        list(Type.objects.filter(oid=16).values_list("typname"))  # noqa: F821
        with transaction.atomic():
            Type.objects.filter(oid=17).exists()  # noqa: F821
    return nameless([[entry["sql"] for entry in connection.queries], wrapped])


@fact
def what_goes_over_the_wire() -> Any:
    """Return each message of the protocol, from libpq's trace."""
    from django.db import connection, transaction
    from psycopg.pq import Trace

    connection.ensure_connection()
    with tempfile.TemporaryFile() as log:
        connection.connection.pgconn.trace(log.fileno())
        connection.connection.pgconn.set_trace_flags(Trace.SUPPRESS_TIMESTAMPS | Trace.REGRESS_MODE)
        list(Type.objects.filter(oid__lt=20).order_by("oid"))  # noqa: F821
        with transaction.atomic():
            Type.objects.filter(oid=16).count()  # noqa: F821
            with transaction.atomic():
                Type.objects.get(oid=16)  # noqa: F821
        one("default", "SELECT %s::text", ["x"])
        connection.connection.pgconn.untrace()
        log.seek(0)
        return nameless(log.read().decode().splitlines())


# --- Where sync code runs -----------------------------------------------------------------------


@fact
def workers_of_sync_to_async() -> Any:
    from asgiref.sync import sync_to_async
    from django.db import connections

    async def main() -> Any:
        run = sync_to_async(lambda: (one("default"), threading.current_thread().name))
        pids = {(await run()) for _ in range(4)}
        await sync_to_async(connections.close_all)()
        return len(pids)

    return asyncio.run(main())


@fact
def commands() -> Any:
    from django.core.management import call_command

    def said(*args: Any, **kwargs: Any) -> str:
        out = io.StringIO()
        call_command(*args, stdout=out, stderr=out, **kwargs)
        return out.getvalue()

    return {
        "inspectdb": said("inspectdb", "probed"),
        "check": said("check", databases=["default"]).partition(" (")[0],
        "sqlflush": said("sqlflush"),
        "migrate": error(lambda: said("migrate", plan=True)),
    }


if __name__ == "__main__":
    configure(sys.argv[1])
    define_models()
    print(json.dumps({name: fn() for name, fn in FACTS.items()}))
