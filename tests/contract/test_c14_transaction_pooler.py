"""Tests C14: with OPTIONS["pooler"] = "transaction" nothing is left in, or needed of, a session.

Every message between the backend and a real PgBouncer is recorded (support/recorder.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import re
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from django.core.exceptions import ImproperlyConfigured
from django.db import NotSupportedError, connection, connections, transaction
from django.db.models import F
from django.db.utils import DatabaseError, DataError, IntegrityError, OperationalError

import pgbackend
from pgbackend import aio
from pgbackend.fast.registry import is_on
from tests.conftest import Runner, wait_for
from tests.library.models import Author, Book, Tag
from tests.support.fixtures import settings_of_default
from tests.support.pgbouncer import newer_program, pgbouncer, program, version
from tests.support.recorder import Recorder, acts_of
from tests.support.sweep import CANCELLING, Mode, Outcome, sweep

Call = Callable[..., Any]

_KINDS = [
    pytest.param(("newer", "transaction"), id="newer-transaction"),
    pytest.param(("older", "transaction"), id="older-transaction", marks=pytest.mark.slow),
    pytest.param(("newer", "session"), id="newer-session", marks=pytest.mark.slow),
    pytest.param(("older", "session"), id="older-session", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=_KINDS)
def bouncer(request: pytest.FixtureRequest, conninfo: str) -> Iterator[tuple[str, bool]]:
    """Start PgBouncer; yield how to connect, and whether it tracks prepared statements."""
    which, mode = request.param
    run = newer_program() if which == "newer" else program()
    if run is None and not request.config.option.require_servers:
        target = "pgbouncer-newer" if which == "newer" else "pgbouncer"
        pytest.skip(f"no such PgBouncer here: 'make {target}' gets it")
    with pgbouncer(conninfo, run, pool_mode=mode, default_pool_size=12) as parameters:
        tracks = mode == "session" or version(run) >= (1, 21)
        yield psycopg.conninfo.make_conninfo(**parameters), tracks


@pytest.fixture
def recorder(bouncer: tuple[str, bool]) -> Iterator[Recorder]:
    """Record the messages to PgBouncer."""
    link = Recorder(bouncer[0])
    yield link
    link.close()


@pytest.fixture
def change(recorder: Recorder) -> Iterator[Call]:
    """Change OPTIONS of 'default', which goes through the pooler, for connections from here on."""
    given = connections.settings["default"]
    contexts: list[Any] = []

    def change(**options: Any) -> None:
        undo()
        changed = {
            "HOST": "127.0.0.1",
            "PORT": str(recorder.port),
            "USER": "anybody",
            "PASSWORD": "",
            "OPTIONS": {
                **given["OPTIONS"],
                "sslmode": "disable",
                "gssencmode": "disable",
                "pooler": "transaction",
                **options,
            },
        }
        contexts.append(settings_of_default(**changed))
        contexts[-1].__enter__()
        recorder.clear()

    def undo() -> None:
        connection.close()
        connections["default"].close_pool()
        while contexts:
            contexts.pop().__exit__(None, None, None)

    yield change
    undo()


@pytest.fixture
def through(change: Call, recorder: Recorder) -> Recorder:
    """Go through the pooler; the recorder must see no act that pins a session."""
    change()
    return recorder


@pytest.fixture(params=["green", "sync"])
def call(request: pytest.FixtureRequest, run_once: Runner) -> Call:
    """Return a function that calls another one, green on a new loop or in sync code."""
    if request.param == "sync":
        return lambda fn, *args: fn(*args)
    return lambda fn, *args: run_once(aio.run(fn, *args))


def value(sql: str, *params: Any) -> Any:
    with connection.cursor() as cursor:
        cursor.execute(sql, params or None)
        return cursor.fetchone()[0]


PATH = "SELECT current_setting('search_path')"
TOLD = "ALTER ROLE .* = 'America/Chicago'"
TENANT = "SELECT current_setting('app.tenant', true)"

# --- Connecting, and the ORM ----------------------------------------------------------------------


def test_nothing_is_sent_but_statements_of_the_code(through: Recorder, call: Call) -> None:
    assert call(lambda: Tag.objects.filter(pk=1).first()) is None
    assert [each for each in through.sql() if "library_tag" not in each] == []
    startup = [each.text for each in through.messages if each.kind == "Startup"]
    assert [text for text in startup if "timezone=utc" not in text.lower()] == []
    assert [text for text in startup if "options" in text] == []


@pytest.fixture
def in_chicago(through: Recorder) -> Iterator[None]:
    """Give the alias a time zone of its own."""
    cached = vars(connections["default"])

    def forget() -> None:
        connection.close()
        for name in ("timezone", "timezone_name"):
            cached.pop(name, None)

    forget()
    with settings_of_default(TIME_ZONE="America/Chicago"):
        yield
        forget()


@pytest.mark.usefixtures("in_chicago")
def test_the_time_zone_of_an_alias_is_a_parameter_of_its_connections(
    through: Recorder, call: Call
) -> None:
    assert call(value, "SHOW timezone") == "America/Chicago"
    assert through.acts() == set()


@pytest.mark.usefixtures("in_chicago")
def test_a_pooler_that_drops_the_time_zone_is_told(through: Recorder, call: Call) -> None:
    """With the server's own time zone, all timestamps would be wrong."""
    through.drops_time_zone = True
    options = connections.settings["default"]["OPTIONS"]
    with settings_of_default(OPTIONS={**options, "pool": False}):
        with pytest.raises(ImproperlyConfigured, match=TOLD):
            call(value, "SELECT 1")
        connection.close()


@pytest.mark.slow
@pytest.mark.usefixtures("in_chicago")
def test_the_synchronous_pool_tells_it_as_the_cause(through: Recorder) -> None:
    """psycopg_pool tells nothing earlier than its timeout."""
    through.drops_time_zone = True
    options = connections.settings["default"]["OPTIONS"]
    quick = {"min_size": 0, "max_size": 2, "timeout": 1}
    with settings_of_default(OPTIONS={**options, "pool": quick}):
        with pytest.raises(OperationalError) as raised:
            value("SELECT 1")
        cause: Any = raised.value
        while not isinstance(cause, ImproperlyConfigured):
            cause = cause.__cause__
        assert re.search(TOLD, str(cause))
        connections["default"].close_pool()


def test_without_the_option_acts_are_seen(
    change: Call, recorder: Recorder, run_once: Runner
) -> None:
    """Otherwise the other tests would prove nothing."""
    change(pooler=None)

    def work() -> None:
        with pgbackend.session(work_mem="2MB"):
            assert value("SELECT 1") == 1
        # Another session may get the FETCH, or the CLOSE, whose errors Django does not convert.
        with contextlib.suppress(DatabaseError, psycopg.Error):
            list(Tag.objects.iterator(chunk_size=2))

    run_once(aio.run(work))
    assert recorder.acts() == {
        "changes a setting of the session",
        "declares a cursor WITH HOLD",
        "discards the state of the session",
    }


@pytest.mark.parametrize(
    ("sql", "acts"),
    [
        ("SET LOCAL x TO 1;\nSELECT 'SET y'", set()),
        ("SELECT set_config('x', 'a, false', true)", set()),
        ("SELECT set_config('x', $1, false)", {"changes a setting of the session"}),
        ("BEGIN; /* x */ SET x TO 1", {"changes a setting of the session"}),
        ("DECLARE a NO SCROLL CURSOR FOR SELECT 1", set()),
        ("DECLARE a CURSOR WITH HOLD FOR SELECT 1", {"declares a cursor WITH HOLD"}),
        ("SELECT pg_advisory_xact_lock(1)", set()),
        ("SELECT pg_try_advisory_lock(1)", {"takes an advisory lock of the session"}),
        ("CREATE TEMP TABLE x ()", {"creates a temporary object"}),
        ("DEALLOCATE ALL", {"uses a prepared statement of SQL"}),
        ("SELECT setval('x', 1)", {"manipulates a sequence"}),
        (f"SELECT '{'x' * 17000}'", {"is longer than 16 KB"}),
    ],
)
def test_the_recorder_knows_what_pins_a_session(sql: str, acts: set[str]) -> None:
    assert acts_of(sql) == acts


def test_the_orm_pins_no_session(through: Recorder, call: Call) -> None:
    def work() -> None:
        author = Author.objects.create(name="a")
        with transaction.atomic():
            book = Book.objects.create(title="b", author=author)
            with transaction.atomic():
                book.tags.add(Tag.objects.get_or_create(name="t")[0])
            locked = Book.objects.select_for_update().get(pk=book.pk)
            locked.title += "!"
            locked.save()
        Book.objects.filter(pk=book.pk).update(title=F("title"))
        Tag.objects.bulk_create([Tag(name=f"t{n}") for n in range(50)])
        assert [b.title for b in Book.objects.prefetch_related("tags")] == ["b!"]
        with pytest.raises(IntegrityError), transaction.atomic():
            Author.objects.create(pk=author.pk, name="again")

    call(work)
    assert through.acts() == set()


def test_raw_sql_is_followed_by_no_reset(through: Recorder, run_once: Runner) -> None:
    async def main() -> None:
        assert await aio.run(value, "SELECT 1") == 1
        assert await aio.run(value, "SELECT 2") == 2

    run_once(main())
    assert through.sql() == ["SELECT 1", "SELECT 2"]


# --- Declared settings ----------------------------------------------------------------------------


def test_a_statement_of_a_session_block_is_one_round_trip(through: Recorder, call: Call) -> None:
    def work() -> None:
        with pgbackend.session(**{"app.tenant": 7}):
            assert value(TENANT) == "7"
            through.clear()
            assert value(TENANT) == "7"
            Tag.objects.create(name="x")
            assert through.count() == 2
            assert through.sql()[0] == f'SET LOCAL "app"."tenant" TO \'7\';\n{TENANT}'
        assert value(TENANT) in (None, "")

    call(work)
    assert through.acts() == set()


def test_settings_hold_in_a_transaction_and_end_with_the_block(
    through: Recorder, call: Call
) -> None:
    def work() -> None:
        through.clear()
        with transaction.atomic():
            with pgbackend.session(**{"app.tenant": 7}):
                assert value(TENANT) == "7"
                with pgbackend.session(search_path="nowhere"):
                    assert value(PATH) == "nowhere"
                assert value(TENANT) == "7"
            assert value(TENANT) in (None, "")
            assert value(PATH) != "nowhere"

    call(value, "SELECT 1")
    call(work)
    assert through.acts() == set()
    # Five statements, and COMMIT; BEGIN goes with the first statement, by a shortcut.
    assert through.count() == 6 + (not is_on("begin"))


def test_a_failure_in_a_session_block_leaves_no_transaction(
    through: Recorder, call: Call, admin: psycopg.Connection[Any]
) -> None:
    def work() -> None:
        with pgbackend.session(**{"app.tenant": 7}):
            with pytest.raises(DataError):
                value("SELECT 1/0")
            with pytest.raises(DatabaseError):
                value("no SQL")
            with pgbackend.session(role="nobody_of_this_name"), pytest.raises(DatabaseError) as no:
                value("SELECT 1")
            assert "pgbackend.session()" in no.value.__cause__.__notes__[0]
            assert value(TENANT) == "7"
        assert Tag.objects.count() == 0

    call(work)
    assert through.acts() == set()
    idle = "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in%'"
    wait_for(lambda: admin.execute(idle).fetchone() == (0,), "no transaction is left")


@pytest.mark.parametrize("options", [{"server_side_binding": True}, {}], ids=["server", "client"])
def test_all_calls_of_a_cursor_have_the_settings(
    change: Call, recorder: Recorder, call: Call, options: dict[str, Any]
) -> None:
    change(**options)
    tenant = "current_setting('app.tenant', true)"

    def work() -> None:
        with pgbackend.session(**{"app.tenant": 7}), connection.cursor() as cursor:
            assert value(f"SELECT {tenant} || %s::text", "x") == "7x"
            insert = f"INSERT INTO library_tag (name) VALUES ({tenant} || %s::text)"
            cursor.executemany(insert, [["a"], ["b"]])
            with cursor.copy("COPY library_tag (name) FROM STDIN") as copy:
                copy.write_row(["c"])
            with cursor.copy(f"COPY (SELECT {tenant}) TO STDOUT") as copy:
                assert b"".join(copy) == b"7\n"
            rows = cursor.cursor.stream(f"SELECT name, {tenant} FROM library_tag ORDER BY id")
            assert list(rows) == [("7a", "7"), ("7b", "7"), ("c", "7")]
            with pytest.raises(DataError):
                value("SELECT 1/%s", 0)
            assert value(TENANT) == "7"
        assert value(TENANT) in (None, "")

    call(work)
    assert recorder.acts() == set()


def test_a_statement_bound_on_the_server_is_three_round_trips(
    change: Call, recorder: Recorder, call: Call
) -> None:
    change(server_side_binding=True)

    def work() -> None:
        with pgbackend.session(**{"app.tenant": 7}):
            assert value(TENANT) == "7"
            recorder.clear()
            assert list(Tag.objects.filter(name="x")) == []
            assert recorder.count() == 3  # BEGIN with the settings, the statement, COMMIT

    call(work)


def test_what_no_transaction_may_contain_is_refused_in_a_session_block(
    through: Recorder, call: Call
) -> None:
    def vacuum() -> None:
        with connection.cursor() as cursor:
            cursor.execute("VACUUM library_tag")

    def work() -> None:
        vacuum()
        with pgbackend.session(**{"app.tenant": 7}), pytest.raises(DatabaseError) as refused:
            vacuum()
        assert (
            "run VACUUM and its like outside of session()" in refused.value.__cause__.__notes__[0]
        )
        vacuum()

    call(work)


def test_a_text_that_commits_in_its_midst_is_refused_in_a_session_block(
    through: Recorder, call: Call
) -> None:
    def work() -> None:
        with pgbackend.session(**{"app.tenant": 7}):
            with (
                pytest.raises(NotSupportedError, match="one by one"),
                connection.cursor() as cursor,
            ):
                cursor.execute("INSERT INTO library_tag (name) VALUES ('x'); COMMIT; SELECT 1")
        assert Tag.objects.count() == 0

    call(work)


def test_a_setting_that_a_transaction_reads_as_it_begins_is_refused(through: Recorder) -> None:
    with pytest.raises(ValueError, match="pooler"):
        pgbackend.session(default_transaction_read_only=True)


def test_settings_of_neighbours_never_mix(through: Recorder, run_once: Runner) -> None:
    async def one(number: int) -> None:
        async with pgbackend.session(**{"app.tenant": number}):
            for _ in range(10):
                assert await aio.run(value, TENANT) == str(number)

    async def without() -> None:
        for _ in range(30):
            assert await aio.run(value, TENANT) in (None, "")

    async def main() -> None:
        await asyncio.gather(without(), *(one(number) for number in range(6)))

    run_once(main())
    assert through.acts() == set()


@pytest.mark.slow
@pytest.mark.parametrize("bouncer", [("newer", "transaction")], indirect=True, ids=["newer"])
@pytest.mark.parametrize("mode", CANCELLING, ids=lambda mode: mode.__name__)
def test_a_cancellation_at_any_wait_leaves_no_setting_and_no_transaction(
    change: Call,
    run: Runner,
    admin: psycopg.Connection[Any],
    mode: Mode,
) -> None:
    change(server_side_binding=True)  # the way with the most waits

    def operation() -> None:
        with pgbackend.session(**{"app.tenant": 7}):
            assert list(Tag.objects.filter(name="x")) == []
            with connection.cursor() as cursor:
                cursor.executemany("INSERT INTO library_tag (name) VALUES (%s)", [["a"], ["b"]])
            for tag in Tag.objects.iterator(chunk_size=1):
                tag.delete()
            with transaction.atomic():
                assert value(TENANT) == "7"

    async def check(outcome: Outcome) -> None:
        for _ in range(3):
            assert await aio.run(value, TENANT) in (None, "")
        await Tag.objects.all().adelete()
        (record,) = pgbackend.statistics("default")
        assert record.leased == 0

    async def main() -> None:
        assert await sweep(lambda: aio.run(operation), mode, check) >= 6

    run(main())
    idle = "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in%'"
    wait_for(lambda: admin.execute(idle).fetchone() == (0,), "no transaction is left")


# --- A role, and the level of isolation -----------------------------------------------------------


@pytest.fixture
def reader(conninfo: str) -> Iterator[str]:
    """Make a role that may read the tags, and write none."""
    name = connections.settings["default"]["NAME"]
    with psycopg.connect(conninfo, dbname=name, autocommit=True) as admin:
        admin.execute("CREATE ROLE pooler_reader; GRANT SELECT ON library_tag TO pooler_reader")
        yield "pooler_reader"
        admin.execute("DROP OWNED BY pooler_reader; DROP ROLE pooler_reader")


@pytest.mark.parametrize(
    "pool", [{}, {"pool": {"min_size": 0, "max_size": 2}}], ids=["own", "pool"]
)
def test_assume_role_is_set_in_each_transaction(
    change: Call, recorder: Recorder, call: Call, reader: str, pool: dict[str, Any]
) -> None:
    change(assume_role=reader, **pool)

    def work() -> None:
        assert value("SELECT current_user") == reader
        assert Tag.objects.count() == 0
        with pytest.raises(DatabaseError, match="permission denied"):
            Tag.objects.create(name="x")
        with transaction.atomic():
            assert value("SELECT current_user") == reader
            with pgbackend.session(role="none"):
                assert value("SELECT current_user") != reader
            assert value("SELECT current_user") == reader

    call(work)
    assert recorder.acts() == set()


def test_isolation_level_goes_with_begin(change: Call, recorder: Recorder, call: Call) -> None:
    from psycopg import IsolationLevel

    change(isolation_level=IsolationLevel.SERIALIZABLE)

    def work() -> None:
        with transaction.atomic():
            assert value("SHOW transaction_isolation") == "serializable"

    call(work)
    assert recorder.acts() == set()


# --- Streams --------------------------------------------------------------------------------------


def _tags(count: int) -> None:
    Tag.objects.bulk_create([Tag(name=f"{number:03}") for number in range(count)])


def test_a_stream_has_a_transaction_of_its_own(through: Recorder, call: Call) -> None:
    def work() -> None:
        _tags(10)
        through.clear()
        seen = []
        for tag in Tag.objects.order_by("name").iterator(chunk_size=3):
            seen.append(tag.name)
            if len(seen) == 2:
                with pytest.raises(IntegrityError):
                    Tag.objects.create(pk=tag.pk, name="again")
                with transaction.atomic():
                    Tag.objects.create(name="written in the body")
                assert Tag.objects.count() == 11
        assert seen == [f"{number:03}" for number in range(10)]
        assert sum("DECLARE" in sql for sql in through.sql()) == 1
        assert through.sql()[-1] == "COMMIT"
        assert not any("CLOSE" in sql for sql in through.sql())

    call(work)
    assert through.acts() == set()


def test_a_stream_in_a_block_is_part_of_it(through: Recorder, call: Call) -> None:
    def work() -> None:
        with transaction.atomic():
            _tags(7)
            assert len(list(Tag.objects.iterator(chunk_size=2))) == 7
            assert len({value("SELECT pg_backend_pid()") for _ in Tag.objects.iterator(3)}) == 1
            transaction.set_rollback(True)
        assert Tag.objects.count() == 0

    call(work)
    assert through.acts() == set()


@pytest.mark.parametrize("end", ["break", "close", "error", "garbage"])
def test_a_stream_that_is_left_gives_its_connection_back(
    through: Recorder, call: Call, admin: psycopg.Connection[Any], end: str
) -> None:
    def work() -> None:
        _tags(10)
        rows = iter(Tag.objects.iterator(chunk_size=2))
        next(rows)
        if end == "close":
            rows.close()
        elif end == "error":
            with pytest.raises(ZeroDivisionError):
                for _ in rows:
                    raise ZeroDivisionError
        del rows
        gc.collect()
        assert Tag.objects.count() == 10

    call(work)
    idle = "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in%'"
    wait_for(lambda: admin.execute(idle).fetchone() == (0,), "no transaction is left")
    assert through.acts() == set()


def test_aiterator_has_a_transaction_of_its_own(through: Recorder, run: Runner) -> None:
    async def main() -> None:
        await aio.run(_tags, 10)
        seen = 0
        async for tag in Tag.objects.aiterator(chunk_size=3):
            seen += 1
            tag.name += "!"
            await tag.asave()
        assert seen == 10
        assert await Tag.objects.filter(name__endswith="!").acount() == 10
        async for _ in Tag.objects.aiterator(chunk_size=3):
            break
        # Another task makes each step, and ends before the next one.
        steps = Tag.objects.aiterator(chunk_size=3)
        for _ in range(10):
            await asyncio.create_task(anext(steps))
        await steps.aclose()

    run(main())
    assert through.acts() == set()


def test_a_task_that_is_cancelled_gives_its_stream_back(through: Recorder, run: Runner) -> None:
    async def stream(began: asyncio.Event) -> None:
        async for _ in Tag.objects.aiterator(chunk_size=2):
            began.set()
            await asyncio.Event().wait()

    async def main() -> None:
        await aio.run(_tags, 10)
        for _ in range(6):  # more than the pool has connections
            task = asyncio.create_task(stream(began := asyncio.Event()))
            await began.wait()
            task.cancel()
            await asyncio.wait([task])
        assert await Tag.objects.acount() == 10

    run(main())
    assert through.acts() == set()


def test_a_stream_has_the_declared_settings(through: Recorder, call: Call) -> None:
    def work() -> None:
        _tags(5)
        with pgbackend.session(**{"app.tenant": 7}):
            tags = Tag.objects.extra(select={"t": "current_setting('app.tenant', true)"})
            assert {tag.t for tag in tags.iterator(chunk_size=2)} == {"7"}

    call(work)
    assert through.acts() == set()


def test_disable_server_side_cursors_is_honoured(through: Recorder, call: Call) -> None:
    with settings_of_default(
        **{**connections.settings["default"], "DISABLE_SERVER_SIDE_CURSORS": True}
    ):
        call(lambda: [_tags(5), list(Tag.objects.iterator(chunk_size=2))])
        connection.close()
    assert not any("DECLARE" in sql for sql in through.sql())


# --- What needs a session -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sql", "cure"),
    [
        ("SET statement_timeout = 1000", r"pgbackend.session\(\)"),
        ("/* x */ SET search_path TO a", r"pgbackend.session\(\)"),
        ("SELECT set_config('work_mem', '1MB', false)", r"pgbackend.session\(\)"),
        ("RESET ALL", r"pgbackend.session\(\)"),
        ("DISCARD ALL", "the pooler alone"),
        ("LISTEN x", "PostgreSQL itself"),
        ("PREPARE x AS SELECT 1", "prepare_threshold"),
        ("CREATE TEMPORARY TABLE x (a int)", "ON COMMIT DROP"),
        ("SELECT pg_try_advisory_lock(1)", "pg_advisory_xact_lock"),
        ("LOAD 'auto_explain'", "session_preload_libraries"),
    ],
)
def test_an_act_on_the_session_is_refused_with_its_cure(
    through: Recorder, call: Call, sql: str, cure: str
) -> None:
    def work() -> None:
        with connection.cursor() as cursor, pytest.raises(NotSupportedError, match=cure):
            cursor.execute(sql)
        assert Tag.objects.count() == 0

    call(work)
    assert sql not in through.sql()


def test_acts_that_end_with_their_transaction_are_let_through(
    through: Recorder, call: Call
) -> None:
    def work() -> None:
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            cursor.execute("SET LOCAL statement_timeout = 5000")
            cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")
            cursor.execute("SELECT pg_advisory_xact_lock(1)")
            cursor.execute("CREATE TEMPORARY TABLE x (a int) ON COMMIT DROP")

    call(work)


def test_pinned_is_refused_outside_of_a_transaction(through: Recorder, call: Call) -> None:
    def work() -> None:
        with pytest.raises(NotSupportedError, match=r"atomic\(\)"), pgbackend.pinned():
            pass
        with transaction.atomic(), pgbackend.pinned():
            assert Tag.objects.count() == 0

    call(work)


# --- Prepared statements --------------------------------------------------------------------------


def test_prepared_statements_are_never_deallocated(
    change: Call, recorder: Recorder, call: Call, bouncer: tuple[str, bool]
) -> None:
    if not bouncer[1]:
        pytest.skip("PgBouncer tracks prepared statements from 1.21 on")
    change(server_side_binding=True, prepare_threshold=0)

    def work() -> None:
        for _ in range(3):
            assert list(Tag.objects.filter(name="x")) == []
        with transaction.atomic():
            assert list(Tag.objects.filter(name="x")) == []
            transaction.set_rollback(True)  # psycopg would send DEALLOCATE ALL after this
        assert list(Tag.objects.filter(name="x")) == []

    call(work)
    assert recorder.acts() == set()


# --- Options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"pooler": "session"}, "'pooler'] is 'session'. Set it to 'transaction'"),
        ({"pooler": True}, "is True. Set it to 'transaction'"),
        ({"pooler": "transaction", "session_reset": "always"}, "contradict each other"),
        ({"pooler": "transaction", "pool": {"reset": print}}, "contradict each other"),
    ],
)
def test_wrong_options_are_told(options: dict[str, Any], text: str) -> None:
    with settings_of_default(OPTIONS=options):
        problems = connections["default"].option_problems()
        assert text in str(problems[0].error())
        with pytest.raises(ImproperlyConfigured) as told:
            connections["default"].check_settings()
        assert text in str(told.value)
