"""Tests C10: an error says what happened and what to do, has its cause, and hides passwords."""

from __future__ import annotations

import asyncio
import logging
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import django.db
import psycopg
import pytest
from django.core.exceptions import ImproperlyConfigured, SynchronousOnlyOperation
from django.db import IntegrityError, connection, connections, transaction
from django.db.transaction import TransactionManagementError
from django.test import RequestFactory
from django.views.debug import technical_500_response

import pgbackend
from pgbackend import aio, embedded
from pgbackend.driver import bridge, errors
from tests.backend.test_options import password_server  # noqa: F401 - pytest's
from tests.conftest import Runner
from tests.library.models import Tag
from tests.support.fixtures import pool_of_default, settings_of_default

CANARY = "c4n4ry"

# --- Driver errors become Django's ----------------------------------------------------------------

#: SQL, Django's exception, psycopg's, and the SQLSTATE.
KINDS: list[tuple[str, type[Exception], type[Exception], str]] = [
    ("SELEC 1", django.db.ProgrammingError, psycopg.errors.SyntaxError, "42601"),
    ("SELECT * FROM nowhere", django.db.ProgrammingError, psycopg.errors.UndefinedTable, "42P01"),
    ("SELECT 1/0", django.db.DataError, psycopg.errors.DivisionByZero, "22012"),
    ("SELECT 'x'::int", django.db.DataError, psycopg.errors.InvalidTextRepresentation, "22P02"),
    ("SELECT 99999999999::int", django.db.DataError, psycopg.DataError, "22003"),
    (
        "INSERT INTO library_tag (name) VALUES ('a'), ('a')",
        django.db.IntegrityError,
        psycopg.errors.UniqueViolation,
        "23505",
    ),
    (
        "INSERT INTO library_tag (name) VALUES (NULL)",
        django.db.IntegrityError,
        psycopg.errors.NotNullViolation,
        "23502",
    ),
    (
        "SET statement_timeout = 1; SELECT pg_sleep(5)",
        django.db.OperationalError,
        psycopg.errors.QueryCanceled,
        "57014",
    ),
    (
        "SELECT pg_terminate_backend(pg_backend_pid())",
        django.db.OperationalError,
        psycopg.errors.AdminShutdown,
        "57P01",
    ),
    (
        "DO $$ BEGIN RAISE EXCEPTION 'mine' USING ERRCODE = 'XX000'; END $$",
        django.db.InternalError,
        psycopg.errors.InternalError_,
        "XX000",
    ),
    (
        "DO $$ BEGIN RAISE EXCEPTION 'mine' USING ERRCODE = '0A000'; END $$",
        django.db.NotSupportedError,
        psycopg.errors.FeatureNotSupported,
        "0A000",
    ),
]


@pytest.mark.parametrize("context", ["sync", "green"])
@pytest.mark.parametrize(("sql", "ours", "cause", "sqlstate"), KINDS, ids=str)
def test_a_driver_error_becomes_djangos_with_the_original_as_its_cause(
    run: Runner,
    context: str,
    sql: str,
    ours: type[Exception],
    cause: type[Exception],
    sqlstate: str,
) -> None:
    def fail() -> Exception:
        with pytest.raises(django.db.Error) as caught, connection.cursor() as cursor:
            cursor.execute(sql)
        return caught.value

    error: Any = fail() if context == "sync" else run.green(fail)
    if context == "sync":
        connection.close()
    assert type(error) is ours
    assert isinstance(error.__cause__, cause)
    assert error.__cause__.sqlstate == sqlstate
    assert error.__cause__.diag.message_primary in str(error)
    assert error.__cause__.diag.sqlstate == sqlstate


def test_an_error_of_the_orm_names_its_constraint(run: Runner) -> None:
    def fail() -> Any:
        Tag.objects.create(name="twice")
        with pytest.raises(django.db.IntegrityError) as caught:
            Tag.objects.create(name="twice")
        return caught.value.__cause__

    for cause in (run.green(fail), Tag.objects.all().delete() and fail()):
        assert cause.diag.table_name == "library_tag"
        assert cause.diag.constraint_name.startswith("library_tag_name")
        assert "twice" in cause.diag.message_detail


# --- On the bare loop -----------------------------------------------------------------------------


def test_a_statement_that_is_refused_in_a_block_names_what_has_doomed_it(run: Runner) -> None:
    def green() -> None:
        Tag.objects.create(name="taken")
        with pytest.raises(KeyError), transaction.atomic():
            with pytest.raises(IntegrityError) as first:
                Tag.objects.create(name="taken")
            with pytest.raises(TransactionManagementError, match="until the end of") as second:
                Tag.objects.count()
            assert second.value.__cause__ is first.value
            raise KeyError

    run.green(green)


#: Each method of the wrapper that Django guards, with arguments for it.
GUARDED: dict[str, tuple[Any, ...]] = {
    "connect": (),
    "get_new_connection": ({},),
    "savepoint_rollback": ("s",),
    "savepoint_commit": ("s",),
    "clean_savepoints": (),
    "chunked_cursor": (),
    "cursor": (),
    "create_cursor": (),
    "commit": (),
    "rollback": (),
    "savepoint": (),
    "set_autocommit": (True,),
    "get_autocommit": (),
}


@pytest.mark.parametrize("name", GUARDED)
def test_on_the_bare_loop_a_method_that_would_block_names_the_cure(run: Runner, name: str) -> None:
    async def main() -> None:
        with pytest.raises(SynchronousOnlyOperation) as caught:
            getattr(connection, name)(*GUARDED[name])
        text = str(caught.value)
        assert f"({name}())" in text
        for cure in ("await qs.aget()", "async with transaction.atomic()", "pgbackend.aio.run(fn)"):
            assert cure in text

    run(main())


def test_every_method_that_django_guards_is_guarded_here() -> None:
    from django.db.backends.base.base import BaseDatabaseWrapper
    from django.db.backends.postgresql.base import DatabaseWrapper

    guarded = {
        name
        for cls in (BaseDatabaseWrapper, DatabaseWrapper)
        for name, method in vars(cls).items()
        if callable(method) and hasattr(method, "__wrapped__")
        if method.__code__.co_filename.endswith("asyncio.py")
    }
    assert guarded - {"ensure_connection", "close"} <= set(GUARDED)


@pytest.mark.parametrize(
    "call",
    [
        lambda: list(Tag.objects.all()),
        lambda: Tag.objects.create(name="x"),
        lambda: Tag.objects.get(pk=1),
        lambda: list(Tag.objects.iterator()),
        lambda: transaction.atomic().__enter__(),
        lambda: Tag.objects.raw("SELECT 1")[0],
    ],
)
def test_the_orm_on_the_bare_loop_names_the_cure(run: Runner, call: Callable[[], Any]) -> None:
    async def main() -> None:
        with pytest.raises(SynchronousOnlyOperation, match="await pgbackend.aio.run"):
            call()

    run(main())


def test_django_allow_async_unsafe_keeps_its_meaning(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bare loop blocks, on the thread's own connection; green code is green all the same."""
    monkeypatch.setenv("DJANGO_ALLOW_ASYNC_UNSAFE", "1")
    Tag.objects.create(name="seen")

    async def main() -> None:
        assert Tag.objects.get().name == "seen"
        own = connection.connection
        assert own is not None
        assert Tag.objects.count() == 1 and connection.connection is own
        assert not pgbackend.statistics()
        with transaction.atomic():
            Tag.objects.create(name="blocking")
        assert await aio.run(Tag.objects.count) == 2
        (stats,) = pgbackend.statistics()
        assert stats.connections_made == 1
        connection.close()

    run(main())


# --- Each error that pgbackend raises itself ------------------------------------------------------


def caught(fn: Callable[..., Any], *args: Any) -> BaseException:
    try:
        fn(*args)
    except Exception as exc:
        return exc
    raise AssertionError("no error")


def not_green() -> BaseException:
    return caught(bridge.await_, asyncio.sleep(0))


def portal_closed() -> BaseException:
    seen: list[BaseException] = []

    def work() -> None:
        try:
            bridge.await_(asyncio.sleep(10))
        finally:
            seen.append(caught(bridge.await_, asyncio.sleep(0)))

    async def main() -> None:
        coro = bridge.run(work)
        coro.send(None)
        coro.close()

    asyncio.run(main())
    return seen[0]


def lease_ended() -> BaseException:
    def work() -> BaseException:
        with connection.cursor() as cursor:
            kept = cursor.connection
        return caught(kept.execute, "SELECT 1")

    return asyncio.run(aio.run(work))


def _with_pool(work: Callable[[Any], Any], **options: Any) -> BaseException:
    def inner() -> Any:
        return work(connections["default"]._async_pool())  # type: ignore[attr-defined]

    with pool_of_default(max_size=1, **options):
        error: BaseException = asyncio.run(aio.run(inner))
    return error


def pool_timeout() -> BaseException:
    def work(pool: Any) -> BaseException:
        asked = asyncio.Event()

        def hold() -> None:
            lease = pool.lease()
            try:
                held.set()
                bridge.await_(asked.wait())
            finally:
                lease.end()

        held = asyncio.Event()
        holding = asyncio.create_task(bridge.run(hold), name="the holder")
        bridge.await_(held.wait())
        try:
            return caught(pool.lease)
        finally:
            asked.set()
            bridge.await_(holding)

    return _with_pool(work, timeout=0.5)


def pool_deadlock() -> BaseException:
    def work(pool: Any) -> BaseException:
        lease = pool.lease()
        try:
            return caught(pool.lease)
        finally:
            lease.end()

    return _with_pool(work)


def pool_queue_full() -> BaseException:
    def work(pool: Any) -> BaseException:
        lease = pool.lease()
        waiting = asyncio.ensure_future(bridge.run(pool.lease))
        try:
            bridge.await_(asyncio.sleep(0.01))
            return caught(pool.lease)
        finally:
            lease.end()
            bridge.await_(waiting).end()

    return _with_pool(work, max_waiting=1)


def pool_closed() -> BaseException:
    def work(pool: Any) -> BaseException:
        pool.close()
        return caught(pool.lease)

    return _with_pool(work)


def ended_block() -> BaseException:
    async def main() -> BaseException:
        ended = asyncio.Event()

        async def child() -> BaseException:
            await ended.wait()
            return caught(Tag.objects.count)

        async with transaction.atomic():
            task = asyncio.create_task(child(), name="the child")
        ended.set()
        return await task

    return asyncio.run(aio.portal(main()))


def waited_for_its_turn() -> BaseException:
    async def main() -> BaseException:
        async def child() -> BaseException:
            return caught(Tag.objects.count)

        async with transaction.atomic():
            task = asyncio.create_task(child(), name="the child")
            async with transaction.atomic():
                return await task

    with pool_of_default(timeout=0.5):
        return asyncio.run(aio.portal(main()))


def _improper(**changes: Any) -> Callable[[], BaseException]:
    def provoke() -> BaseException:
        given = connections.settings["default"]["OPTIONS"]
        with settings_of_default(OPTIONS={**given, **changes}):
            return asyncio.run(aio.run(caught, Tag.objects.count))

    return provoke


def option_failed() -> BaseException:
    def password() -> str:
        raise KeyError("VAULT_ADDR")

    with settings_of_default(PASSWORD=password):
        return asyncio.run(aio.run(caught, Tag.objects.count)).__cause__


#: A way to provoke each error, its class, and the parts of its text that name the cause and the
#: cure. (That the outcome of a COMMIT is unknown, and that nothing was committed, needs a link that
#: fails: see C7.)
RAISED: dict[str, tuple[Callable[[], BaseException], type[BaseException], str, str]] = {
    "NotGreen": (not_green, errors.NotGreen, "no greenlet", "await pgbackend.aio.run"),
    "PortalClosed": (portal_closed, errors.PortalClosed, "was dropped", "nothing can be waited"),
    "LeaseEnded": (lease_ended, errors.LeaseEnded, "went back to the pool", "pgbackend.pinned()"),
    "OptionFailed": (
        option_failed,
        errors.OptionFailed,
        r"the function DATABASES\['default'\]\['PASSWORD'\] failed.* KeyError: 'VAULT_ADDR'",
        "whose error is the cause of this one",
    ),
    "PoolTimeout": (
        pool_timeout,
        errors.PoolTimeout,
        r"'default' after 0\.\d+ s: 1 of 1 in use, .* held by 'the holder' for",
        r"'max_size' or 'timeout' in DATABASES\['default'\]\['OPTIONS'\]\['pool'\]",
    ),
    "PoolDeadlock": (
        pool_deadlock,
        errors.PoolDeadlock,
        "would wait for ever for a connection of 'default': all 1 are held",
        r"Raise 'max_size' in DATABASES\['default'\]\['OPTIONS'\]\['pool'\]",
    ),
    "PoolQueueFull": (pool_queue_full, errors.PoolQueueFull, "1", "'max_waiting' or 'max_size'"),
    "PoolClosed": (pool_closed, errors.PoolClosed, "pool 'default' is closed", "gets a new one"),
    "a block that has ended": (
        ended_block,
        django.db.transaction.TransactionManagementError,
        r"task '.*child' was started inside an atomic block .* that has ended",
        r"pgbackend\.detached\(\)",
    ),
    "a turn that does not come": (
        waited_for_its_turn,
        django.db.transaction.TransactionManagementError,
        r"task '.*child' waited 0.5 s for its turn",
        r"pgbackend\.detached\(\)",
    ),
    "an option that is none": (
        _improper(pool={"max_sise": 3}),
        ImproperlyConfigured,
        "no option 'max_sise'",
        "Did you mean 'max_size'",
    ),
    "a value that cannot be": (
        _improper(pool={"max_size": "3"}),
        ImproperlyConfigured,
        r"\['max_size'\] is '3'",
        "Set it to a whole number",
    ),
    "sizes that contradict": (
        _improper(pool={"min_size": 3, "max_size": 2}),
        ImproperlyConfigured,
        "min_size 3 and max_size 2",
        "Set max_size to at least min_size",
    ),
    "a pool that is none": (
        _improper(pool=3),
        ImproperlyConfigured,
        "is 3",
        "Set it to True, or to a dictionary",
    ),
    "a class of something else": (
        _improper(pool={"connection_class": int}),
        ImproperlyConfigured,
        "<class 'int'>",
        "a subclass of pgbackend.driver.Connection",
    ),
    "a reset that is none": (
        _improper(session_reset="sometimes"),
        ImproperlyConfigured,
        "is 'sometimes'",
        "Set it to one of 'always'",
    ),
    "an isolation level that is none": (
        _improper(isolation_level=99),
        ImproperlyConfigured,
        "level 99",
        "Use one of the psycopg.IsolationLevel values",
    ),
}


@pytest.mark.parametrize("name", RAISED)
def test_an_error_of_pgbackends_own_says_cause_and_cure(name: str) -> None:
    provoke, kind, cause, cure = RAISED[name]
    error = provoke()
    assert type(error) is kind
    assert re.search(cause, str(error)), str(error)
    assert re.search(cure, str(error)), str(error)


def test_every_class_of_error_is_provoked_somewhere() -> None:
    classes = {
        cls
        for cls in vars(errors).values()
        if isinstance(cls, type) and cls.__module__ == errors.__name__
    }
    provoked = {kind for _, kind, _, _ in RAISED.values()}
    assert classes - provoked == {errors.OutcomeUnknown, errors.NothingCommitted}  # in C7


# --- Passwords ------------------------------------------------------------------------------------


class Leaks:
    """Collects everything that an error, the log and the debug page show."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self.caplog = caplog
        self.shown: list[str] = []

    def show(self, exc: BaseException) -> None:
        """Render `exc` as a log does, as tools do with local variables, and as Django's page."""
        self.shown += [str(exc), repr(exc)]
        self.shown += traceback.TracebackException.from_exception(exc, capture_locals=True).format()
        request = RequestFactory().get("/")
        page = technical_500_response(request, type(exc), exc, exc.__traceback__)
        self.shown.append(page.content.decode())
        assert "Exception Type" in self.shown[-1] or "Traceback" in self.shown[-1]

    def check(self) -> None:
        text = "\n".join([*self.shown, self.caplog.text])
        found = [text[max(0, at.start() - 200) : at.end() + 50] for at in re.finditer(CANARY, text)]
        assert not found, found[0]


@pytest.fixture
def leaks(
    caplog: pytest.LogCaptureFixture, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Leaks]:
    """Set all loggers to DEBUG, asyncio to debug mode, and let Django show its debug page."""
    settings.DEBUG = True
    monkeypatch.setenv("PYTHONASYNCIODEBUG", "1")
    for name in ("psycopg", "psycopg.pool", "pgbackend", "asyncio", "django.db"):
        caplog.set_level(logging.DEBUG, logger=name)
    yield Leaks(caplog)


def _fails(context: str, changes: dict[str, Any]) -> BaseException:
    """Connect with `changes` of the settings: by the pool, or with a connection of its own."""
    with settings_of_default(**changes):
        if context == "by the pool":
            return asyncio.run(aio.run(caught, Tag.objects.count))
        options = {name: value for name, value in changes["OPTIONS"].items() if name != "pool"}
        connections.settings["default"]["OPTIONS"] = options
        other = connections["default"].copy()

        def attempt() -> BaseException:
            try:
                return caught(other.ensure_connection)
            finally:
                other.close()

        return asyncio.run(aio.run(attempt)) if context == "green" else attempt()


CONTEXTS = ["sync", "green", "by the pool"]
OPTIONS = {"sslmode": "disable", "connect_timeout": 2, "pool": {"max_size": 2, "timeout": 2}}

#: Settings with which no connection can be made.
BROKEN: dict[str, dict[str, Any]] = {
    "unreachable": {"HOST": "127.0.0.1", "PORT": "1"},
    "no such host": {"HOST": "no-such-host.invalid"},
    "no such socket": {"HOST": "/no/such/directory"},
    "unknown database": {"NAME": "no_such_database"},
    "unknown user": {"USER": "nobody_of_that_name"},
    "unknown option": {"OPTIONS": {**OPTIONS, "conect_timeout": 3}},
    "bad options": {"OPTIONS": {**OPTIONS, "options": "-c no_such_setting=1"}},
    "bad sslmode": {"OPTIONS": {**OPTIONS, "sslmode": "perhaps"}},
    "bad port": {"PORT": "many"},
    "unknown service": {"OPTIONS": {**OPTIONS, "service": "no_such_service"}},
    "name too long": {"NAME": "n" * 100},
    "no name": {"NAME": "", "OPTIONS": {}},
    "bad isolation level": {"OPTIONS": {**OPTIONS, "isolation_level": 99}},
    "bad reset": {"OPTIONS": {**OPTIONS, "session_reset": "x"}},
    "bad pool": {"OPTIONS": {**OPTIONS, "pool": {"max_sise": 2}}},
    "bad size": {"OPTIONS": {**OPTIONS, "pool": {"num_workers": 0}}},
    "bad role": {"OPTIONS": {**OPTIONS, "assume_role": "no_such_role"}},
    "password in two places": {"OPTIONS": {**OPTIONS, "password": CANARY, "sslpassword": CANARY}},
}


#: Settings that only the pool reads.
OF_THE_POOL = {"bad pool", "bad size", "bad reset"}


@pytest.mark.sweep(one_in=4)
@pytest.mark.parametrize(
    ("name", "context"),
    [
        (name, context)
        for name in BROKEN
        for context in CONTEXTS
        if name not in OF_THE_POOL or context == "by the pool"
    ],
)
def test_no_error_of_connecting_shows_the_password(leaks: Leaks, name: str, context: str) -> None:
    password = f"{CANARY}' \\ &=@:/%"
    changes = {"PASSWORD": password, "OPTIONS": OPTIONS, **BROKEN[name]}
    if "password" in changes["OPTIONS"]:
        changes["HOST"] = "/no/such/directory"
    leaks.show(_fails(context, changes))
    leaks.check()


def test_a_wrong_password_is_not_shown(
    leaks: Leaks,
    password_server: str,  # noqa: F811
) -> None:
    given = embedded.database_settings(password_server)
    changes = {**given, "PASSWORD": f"{CANARY}{CANARY}", "OPTIONS": OPTIONS}
    for context in CONTEXTS:
        error = _fails(context, changes)
        assert "password authentication failed" in str(error)
        leaks.show(error)
    leaks.check()


@pytest.mark.parametrize(
    "url",
    [
        f"postgres://me:{CANARY}@[::1/db",
        f"postgres://me:{CANARY}@host:port/db",
        f"postgres://me:{CANARY}%zz@host/db",
        f"http://me:{CANARY}@host/db",
        f"me:{CANARY}@host/db",
        f"postgres://me:{CANARY}@host/db?option",
        f"postgres://host/db?password={CANARY}&%",
        f"postgres://host/db?prepare_threshold=many&password={CANARY}",
    ],
)
def test_a_malformed_url_is_refused_without_being_shown(leaks: Leaks, url: str) -> None:
    with suppress(ValueError):
        embedded.database_settings(url)
        return  # the value may be a file name or a host
    with pytest.raises(ValueError) as refused:
        embedded.database_settings(url)
    leaks.shown += [str(refused.value), repr(refused.value)]
    assert refused.value.__cause__ is None and refused.value.__suppress_context__
    leaks.check()


def test_what_lives_while_connections_work_shows_no_password(leaks: Leaks) -> None:
    """The server asks for no password, but every object has been given one."""

    def work() -> None:
        pool: Any = connections["default"]._async_pool()  # type: ignore[attr-defined]
        with pgbackend.pinned(), connection.cursor() as cursor:
            cursor.execute("SELECT 1")
            raw = cursor.connection
            seen = [pool, raw.lease, raw, raw.physical, cursor, connection, pool.options]
            seen += [pool._psycopg, pool._psycopg.kwargs, connection.get_connection_params()]
            seen += [raw.info.dsn, *pgbackend.statistics(), bridge.current()]
            for thing in seen:
                leaks.shown += [repr(thing), str(thing)]
            leaks.show(caught(cursor.execute, "SELECT 1/0"))
            held = [pool.lease()]
            leaks.show(caught(pool.lease))
            held.pop().end()

    with settings_of_default(
        PASSWORD=CANARY, OPTIONS={**OPTIONS, "pool": {"max_size": 2, "timeout": 0.5}}
    ):
        asyncio.run(aio.run(work), debug=True)
    assert any("Pool" in shown for shown in leaks.shown)
    leaks.check()
