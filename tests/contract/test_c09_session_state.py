"""Tests C9: the changes of one lease to its session do not reach the next."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from django.db import connection, connections, transaction
from django.db.models import (
    Aggregate,
    Case,
    CharField,
    Count,
    Exists,
    F,
    Func,
    Lookup,
    Max,
    OuterRef,
    Prefetch,
    StdDev,
    Subquery,
    TextField,
    Value,
    When,
    Window,
)
from django.db.models.expressions import CombinedExpression, RawSQL
from django.db.models.functions import Cast, Coalesce, Lower, Now, Upper
from django.test.utils import CaptureQueriesContext, register_lookup

import pgbackend
from pgbackend import aio
from pgbackend.base import DatabaseWrapper
from tests.conftest import Runner
from tests.library.models import Author, Book, Tag
from tests.support.fixtures import pool_of_default, settings_of_default
from tests.support.messages import messages
from tests.support.sweep import CANCELLING, Mode, Outcome, sweep

LOOK = """
SELECT pg_backend_pid(), current_user, session_user,
    current_setting('search_path'), nullif(current_setting('app.tenant', true), ''),
    current_setting('statement_timeout'), current_setting('work_mem'),
    current_setting('default_transaction_isolation'), current_setting('TimeZone'),
    current_setting('client_encoding'), to_regclass('scratch'),
    nullif(current_setting('plpgsql.variable_conflict', true), 'error'),
    (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()),
    (SELECT count(*) FROM pg_listening_channels()),
    (SELECT count(*) FROM pg_prepared_statements),
    (SELECT count(*) FROM pg_cursors WHERE name <> '')
"""


def look() -> Any:
    """Return the settings that a tenant sees in its session."""
    with connection.cursor() as cursor:
        cursor.execute(LOOK)
        return cursor.fetchone()


#: Each act, and the part of `LOOK` that it changes as long as its lease lasts.
ACTS: dict[str, tuple[list[str], int | None]] = {
    "SET": (["SET work_mem TO '1234kB'"], 6),
    "SET LOCAL outside of a transaction": (["SET LOCAL work_mem TO '1234kB'"], None),
    "SET ROLE": (["SET ROLE tenant"], 1),
    "SET SESSION AUTHORIZATION": (["SET SESSION AUTHORIZATION tenant"], 2),
    "search_path": (["SET search_path TO pg_catalog"], 3),
    "set_config": (["SELECT set_config('app.tenant', 'one', false)"], 4),
    "statement_timeout": (["SET statement_timeout TO '5s'"], 5),
    "isolation level": (
        ["SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE"],
        7,
    ),
    "time zone": (["SET TIME ZONE 'Asia/Tokyo'"], 8),
    "client_encoding": (["SET client_encoding TO 'LATIN1'"], 9),
    "temporary table": (["CREATE TEMPORARY TABLE scratch (n int)"], 10),
    "LOAD": (["LOAD 'plpgsql'", "SET plpgsql.variable_conflict TO use_column"], 11),
    "advisory locks": (["SELECT pg_advisory_lock(42)", "SELECT pg_advisory_lock_shared(43)"], 12),
    "LISTEN": (["LISTEN news"], 13),
    "PREPARE": (["PREPARE plan AS SELECT 1"], 14),
    "an open cursor with hold": (["DECLARE kept CURSOR WITH HOLD FOR SELECT 1"], 15),
    "an open cursor without hold": (["BEGIN", "DECLARE kept CURSOR FOR SELECT 1"], 15),
    "DISCARD": (["DISCARD ALL"], None),
}


@pytest.fixture(autouse=True)
def tenant(admin: psycopg.Connection[Any]) -> Iterator[None]:
    """Make a role to become, and a pool of one session, which the next tenant surely gets."""
    admin.execute("DROP ROLE IF EXISTS tenant")
    admin.execute("CREATE ROLE tenant")
    with pool_of_default(max_size=1), settings_of_default(TIME_ZONE="Europe/Paris"):
        yield
    admin.execute("DROP ROLE tenant")


@pytest.mark.parametrize("act", ACTS)
def test_no_act_on_a_session_is_seen_by_the_next_tenant(run: Runner, act: str) -> None:
    statements, changes = ACTS[act]

    def spoil() -> Any:
        with pgbackend.pinned():
            with connection.cursor() as cursor:
                for sql in statements:
                    cursor.execute(sql)
                cursor.execute(LOOK)
                return cursor.fetchone()

    async def main() -> None:
        clean = await aio.run(look)
        spoilt = await asyncio.create_task(aio.run(spoil))
        if changes is not None:
            assert spoilt[changes] != clean[changes], "the act does something"
        assert await asyncio.create_task(aio.run(look)) == clean, "the same session, like new"
        assert clean[8] == "Europe/Paris", "prepared as Django prepares it"

    run(main())


def test_an_act_in_a_transaction_is_not_seen_either(run: Runner) -> None:
    def spoil() -> None:
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute("SELECT set_config('app.tenant', 'one', false)")
            cursor.execute("SET work_mem TO '1234kB'")
            cursor.execute("SET LOCAL statement_timeout TO '5s'")
            cursor.execute("CREATE TEMPORARY TABLE scratch (n int)")

    async def main() -> None:
        clean = await aio.run(look)
        await aio.run(spoil)
        assert await aio.run(look) == clean

    run(main())


@pytest.mark.parametrize("mode", CANCELLING)
@pytest.mark.parametrize("where", ["pinned", "atomic"])
def test_no_act_is_seen_after_a_cancellation_at_any_point(
    run: Runner, mode: Mode, where: str
) -> None:
    acts = ["set_config", "SET ROLE", "temporary table", "advisory locks", "LISTEN", "PREPARE"]
    statements = [sql for act in acts if act != "SET ROLE" for sql in ACTS[act][0]]
    block: Callable[[], Any] = pgbackend.pinned if where == "pinned" else transaction.atomic

    def spoil() -> None:
        with block(), connection.cursor() as cursor:
            for sql in [*statements, "SET ROLE tenant"]:
                cursor.execute(sql)

    async def main() -> None:
        clean = await aio.run(look)

        async def check(outcome: Outcome) -> None:
            now = await aio.run(look)
            assert now[1:] == clean[1:], outcome.at

        assert await sweep(lambda: aio.run(spoil), mode, check) > len(statements)

    run(main())


# --- Row-level security -------------------------------------------------------------------------


@pytest.fixture
def documents(transactional_db: None, tenant: None) -> Iterator[None]:
    with connection.cursor() as cursor:
        cursor.execute(
            "CREATE TABLE documents (id serial, owner text);"
            "INSERT INTO documents (owner) SELECT t FROM generate_series(1, 20), "
            "unnest(ARRAY['one', 'two']) AS t;"
            "ALTER TABLE documents ENABLE ROW LEVEL SECURITY;"
            "CREATE POLICY own ON documents "
            "USING (owner = current_setting('app.tenant', true));"
            "GRANT SELECT ON documents TO tenant"
        )
    yield
    with connection.cursor() as cursor:
        cursor.execute("DROP TABLE documents")


def test_row_level_security_by_set_config_shows_no_foreign_row(
    run: Runner, documents: None
) -> None:
    foreign: list[Any] = []

    def owners() -> set[str]:
        with connection.cursor() as cursor:
            cursor.execute("SELECT owner FROM documents")
            return {owner for (owner,) in cursor.fetchall()}

    def request(number: int) -> None:
        who = ("one", "two", None)[number % 3]
        if who is None:
            seen = owners()  # of nobody
        else:
            with pgbackend.pinned() if number % 2 else transaction.atomic():
                with connection.cursor() as cursor:
                    cursor.execute("SELECT set_config('app.tenant', %s, false)", [who])
                seen = owners()
        if seen != ({who} if who else set()):
            foreign.append((number, who, seen))

    async def main() -> None:
        await asyncio.gather(*(aio.run(request, number) for number in range(2000)))

    given = connections.settings["default"]["OPTIONS"]
    options = {**given, "assume_role": "tenant", "pool": {"max_size": 3, "timeout": 60}}
    with settings_of_default(OPTIONS=options):
        run(main(), timeout=60)
    assert not foreign


# --- The statements decide
#   -------------------------------------------------------------------------

SET = "SET app.tenant = 'one'"


#: What the next tenant sees after a tenant was set: by `session_reset`. Without a reset the value
#: shows that a tenant was set.
RESETS = pytest.mark.parametrize("reset, seen", [("dirty", None), ("never", "one")])


def tenant_seen_after(run: Runner, work: Callable[[], Any], reset: str) -> Any:
    """Return the tenant that a task sees, after the same session was used for `work`."""

    async def main() -> Any:
        await aio.run(look)
        await asyncio.create_task(aio.run(work))
        return (await asyncio.create_task(aio.run(look)))[4]

    given = connections.settings["default"]["OPTIONS"]
    with settings_of_default(OPTIONS={**given, "session_reset": reset}):
        return run(main())


def set_tenant(cursor: Any) -> None:
    cursor.execute(SET)


def set_before(execute: Any, sql: Any, params: Any, many: Any, context: Any) -> Any:
    set_tenant(context["cursor"].cursor)
    return execute(sql, params, many, context)


def set_afterwards(execute: Any, sql: Any, params: Any, many: Any, context: Any) -> Any:
    result = execute(sql, params, many, context)
    with context["connection"].connection.cursor() as beside:
        set_tenant(beside)
    return result


def set_within(execute: Any, sql: Any, params: Any, many: Any, context: Any) -> Any:
    """Send another statement together with that of the ORM, as one text."""
    return execute(f"{sql}; {SET}", params, many, context)


def set_by_another_cursor(execute: Any, sql: Any, params: Any, many: Any, context: Any) -> Any:
    with context["connection"].cursor() as cursor, _not_again():
        set_tenant(cursor)
    return execute(sql, params, many, context)


@contextmanager
def _not_again() -> Iterator[None]:
    wrappers, connection.execute_wrappers[:] = connection.execute_wrappers[:], []
    try:
        yield
    finally:
        connection.execute_wrappers[:] = wrappers


OBSERVERS = {
    "before it": set_before,
    "afterwards": set_afterwards,
    "in its text": set_within,
    "on another cursor": set_by_another_cursor,
}


def savepoint() -> None:
    with transaction.atomic(), transaction.atomic():
        pass


def insert_rows() -> None:
    Tag.objects.bulk_create([Tag(name="a"), Tag(name="b")])


def stream() -> None:
    list(Tag.objects.iterator(chunk_size=1))


def insert_or_ignore() -> None:
    Tag.objects.bulk_create([Tag(name="a"), Tag(name="b")], ignore_conflicts=True)


def explain() -> None:
    Tag.objects.all().explain()


#: One statement for each way in which Django or the backend gets a cursor.
STATEMENTS: dict[str, Callable[[], Any]] = {
    "aggregate": lambda: Tag.objects.aggregate(Count("pk")),
    "count": Tag.objects.count,
    "create": lambda: Tag.objects.create(name="a"),
    "delete": lambda: Tag.objects.filter(name="a").delete(),
    "explain": explain,
    "get_or_create": lambda: Tag.objects.get_or_create(name="a"),
    "ignored conflicts": insert_or_ignore,
    "rows": insert_rows,
    "savepoint": savepoint,
    "stream": stream,
    "update": lambda: Tag.objects.filter(name="a").update(name="b"),
}


@pytest.fixture
def tags(transactional_db: None) -> None:
    """Empty the tables after the test, whose statements write rows."""


OBSERVED = [
    (observer, statement)
    for observer in OBSERVERS
    for statement in STATEMENTS
    if observer not in ("before it", "in its text") or statement != "stream"  # it declares one
]


@pytest.mark.sweep(one_in=4)
@pytest.mark.usefixtures("tags")
@pytest.mark.parametrize("observer, statement", OBSERVED)
@RESETS
def test_what_an_execute_wrapper_sends_is_not_seen_by_the_next_tenant(
    run_once: Runner, observer: str, statement: str, reset: str, seen: Any
) -> None:
    def work() -> None:
        with connection.execute_wrapper(OBSERVERS[observer]):
            STATEMENTS[statement]()

    assert tenant_seen_after(run_once, work, reset) == seen


class _Setting(psycopg.ClientCursor[Any]):
    """Sends a statement before each statement that it is given."""

    def execute(self, query: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(query, str) and "library_tag" in query:
            super().execute(SET)
        return super().execute(query, *args, **kwargs)


@RESETS
def test_what_a_cursor_class_of_ones_own_sends_is_not_seen_by_the_next_tenant(
    run: Runner, reset: str, seen: Any
) -> None:
    given = connections.settings["default"]["OPTIONS"]
    for work in (Tag.objects.count, in_a_block(Tag.objects.count), observed(Tag.objects.count)):
        with settings_of_default(OPTIONS={**given, "cursor_factory": _Setting}):
            assert tenant_seen_after(run, work, reset) == seen


def in_a_block(work: Callable[[], Any]) -> Callable[[], None]:
    def within() -> None:
        with transaction.atomic():
            work()

    return within


def observed(work: Callable[[], Any]) -> Callable[[], None]:
    def within() -> None:
        with CaptureQueriesContext(connection):
            work()

    return within


@pytest.mark.sweep(one_in=4)
@pytest.mark.parametrize("name", ["_cursor", "create_cursor", "make_cursor", "_prepare_cursor"])
@pytest.mark.parametrize("statement", ["count", "create", "update", "savepoint", "stream"])
@pytest.mark.usefixtures("tags")
@RESETS
def test_what_a_derived_wrapper_sends_on_its_cursors_is_not_seen_by_the_next_tenant(
    run_once: Runner,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    statement: str,
    reset: str,
    seen: Any,
) -> None:
    original = getattr(DatabaseWrapper, name)

    def derived(self: Any, *args: Any, **kwargs: Any) -> Any:
        cursor = original(self, *args, **kwargs)
        if sets:
            with self.connection.cursor() as beside:
                set_tenant(beside)
        return cursor

    def work() -> None:
        sets.append(True)
        STATEMENTS[statement]()
        sets.clear()

    sets: list[bool] = []
    monkeypatch.setattr(DatabaseWrapper, name, derived)
    assert tenant_seen_after(run_once, work, reset) == seen


def by_psycopg(send: Callable[[Any], Any]) -> Callable[[], None]:
    """Call `send` with the connection of a block in which the ORM has sent a statement."""

    def work() -> None:
        with transaction.atomic():
            observed(Tag.objects.count)()  # on a cursor, together with BEGIN
            send(connection.connection)

    return work


def copy(connection: Any) -> None:
    config = "(SELECT set_config('app.tenant', 'one', false))"
    with connection.cursor() as cursor, cursor.copy(f"COPY {config} TO STDOUT") as rows:
        list(rows)


def declare(connection: Any) -> None:
    with connection.cursor("named") as cursor:
        cursor.execute("SELECT set_config('app.tenant', 'one', false)")
        cursor.fetchall()


def of_ones_own(connection: Any) -> None:
    with psycopg.ClientCursor(connection) as cursor:
        cursor.execute(SET)


def in_a_pipeline(connection: Any) -> None:
    with connection.pipeline():
        connection.execute(SET)


def stream_rows(connection: Any) -> None:
    with connection.cursor() as cursor:
        list(cursor.stream("SELECT set_config('app.tenant', 'one', false)"))


def execute_many(connection: Any) -> None:
    with connection.cursor() as cursor:
        cursor.executemany("SELECT set_config('app.tenant', %s, false)", [("two",), ("one",)])


def call(wrapped: Any) -> None:
    with connection.cursor() as cursor:
        cursor.callproc("set_config", ("app.tenant", "one", False))


SENT = {
    "execute()": lambda connection: connection.execute(SET),
    "a cursor": lambda connection: set_tenant(connection.cursor()),
    "callproc()": call,
    "copy()": copy,
    "a server-side cursor": declare,
    "executemany()": execute_many,
    "a cursor of one's own making": of_ones_own,
    "a pipeline": in_a_pipeline,
    "stream()": stream_rows,
}


@pytest.mark.parametrize("way", SENT)
@RESETS
def test_what_is_sent_by_psycopg_is_not_seen_by_the_next_tenant(
    run: Runner, way: str, reset: str, seen: Any
) -> None:
    assert tenant_seen_after(run, by_psycopg(SENT[way]), reset) == seen


# --- Users' expressions ---------------------------------------------------------------------------

CONFIG = "set_config('app.tenant', 'one', false)"


class Config(Func):
    """Calls SQL functions of a project's own."""

    function = "set_config"
    output_field = TextField()

    def __init__(self) -> None:
        super().__init__(Value("app.tenant"), Value("one"), Value(False))


class IsSet(Lookup):  # type: ignore[type-arg]
    """Compares in a project's own way."""

    lookup_name = "isset"

    def as_sql(self, compiler: Any, connection: Any) -> tuple[str, Any]:
        lhs, params = self.process_lhs(compiler, connection)
        return f"({lhs} = '' OR {CONFIG} = 'one')", params


class Written(TextField):  # type: ignore[type-arg]
    """Says how it is selected, as a field of a project's own."""

    def select_format(self, compiler: Any, sql: str, params: Any) -> tuple[str, Any]:
        return f"{CONFIG} || {sql}", params


set_config: Any = Func(
    Value("app.tenant"),
    Value("one"),
    Value(False),
    function="set_config",
    output_field=TextField(),
)
named: Any = Lower(Value("x"), template=f"{CONFIG} || %(expressions)s")
raw_config: Any = RawSQL(CONFIG, ())
tag = Tag.objects

EXPRESSIONS: dict[str, Callable[[], Any]] = {
    "RawSQL": lambda: list(tag.annotate(x=raw_config)),
    "a function by its name": lambda: list(tag.annotate(x=set_config)),
    "a function of Django's by another name": lambda: list(tag.annotate(x=named)),
    "an aggregate by its name": lambda: tag.aggregate(
        x=Aggregate(Config(), function="max", output_field=TextField())
    ),
    "a function of one's own": lambda: list(tag.annotate(x=Config())),
    "a lookup of one's own": lambda: list(tag.filter(name__isset=1)),
    "an operator of one's own": lambda: list(
        tag.annotate(x=CombinedExpression(F("name"), f"|| {CONFIG} ||", Value(""), TextField()))
    ),
    "extra(select)": lambda: list(tag.extra(select={"x": CONFIG})),
    "extra(where)": lambda: list(tag.extra(where=[f"{CONFIG} = 'one'"])),
    "extra(tables)": lambda: list(tag.extra(tables=[f'"library_author", {CONFIG} AS "b"'])),
    "extra(order_by)": lambda: list(tag.extra(select={"x": CONFIG}, order_by=["x"])),
    "a template of a subquery": lambda: list(
        tag.annotate(x=Subquery(tag.values("name")[:1], template=f"(%(subquery)s), {CONFIG}"))
        .values_list("x")
        .order_by()[:1]
    ),
    "an order": lambda: list(tag.order_by(raw_config)),
    "a condition": lambda: list(tag.filter(name__lt=raw_config)),
    "a group": lambda: list(tag.values(x=raw_config).annotate(n=Count("pk"))),
    "a subquery": lambda: list(tag.filter(pk__in=tag.filter(name__lt=raw_config).values("pk"))),
    "EXISTS": lambda: list(tag.filter(Exists(tag.filter(name__lt=raw_config)))),
    "a part of a union": lambda: list(
        tag.values_list("name").union(tag.annotate(x=raw_config).values_list("x"), all=True)
    ),
    "CASE": lambda: list(tag.annotate(x=Case(When(pk__gt=0, then=raw_config)))),
    "a window": lambda: list(
        tag.annotate(x=Window(Max("pk"), partition_by=[Coalesce(raw_config, Value(""))]))
    ),
    "count()": lambda: tag.filter(name__lt=raw_config).count(),
    "exists()": lambda: tag.filter(name__lt=raw_config).exists(),
    "aggregate()": lambda: tag.annotate(x=raw_config).aggregate(Max("x")),
    "iterator()": lambda: list(tag.annotate(x=raw_config).iterator(chunk_size=1)),
    "update()": lambda: tag.filter(name="x").update(name=raw_config),
    "update() of a condition": lambda: tag.filter(name__lt=raw_config).update(name="y"),
    "delete()": lambda: tag.filter(name__lt=raw_config)._raw_delete("default"),
    "create()": lambda: tag.create(name=raw_config),
    "save()": lambda: Tag(pk=tag.get(name="x").pk, name=raw_config).save(),
    "bulk_create()": lambda: tag.bulk_create([Tag(name=raw_config), Tag(name="y")]),
    "bulk_update()": lambda: tag.bulk_update(
        [Tag(pk=each.pk, name=raw_config) for each in tag.filter(name="x")], ["name"]
    ),
    "a prefetch": lambda: list(
        Author.objects.prefetch_related(Prefetch("books", Book.objects.annotate(x=raw_config)))
    ),
    "a pickled query": lambda: list(pickled(tag.annotate(x=raw_config))),
    "a field that says how it is selected": lambda: list(
        tag.annotate(x=Cast(F("name"), Written())).values_list("x")
    ),
}


def pickled(queryset: Any) -> Any:
    copied = Tag.objects.all()
    copied.query = pickle.loads(pickle.dumps(queryset.query))
    return copied


@pytest.fixture
def rows(transactional_db: None) -> Iterator[None]:
    Tag.objects.create(name="x")
    Book.objects.create(title="x", author=Author.objects.create(name="x"))
    with register_lookup(CharField, IsSet):
        yield


@pytest.mark.sweep(one_in=4)
@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("name", EXPRESSIONS)
@pytest.mark.parametrize(
    "held, reset, seen",
    [
        *((held, "dirty", None) for held in ("alone", "in a block", "observed")),
        ("alone", "never", "one"),
    ],
)
def test_what_an_expression_sets_is_not_seen_by_the_next_tenant(
    run_once: Runner, name: str, held: str, reset: str, seen: Any
) -> None:
    query = EXPRESSIONS[name]
    work = {"alone": query, "in a block": in_a_block(query), "observed": observed(query)}[held]
    assert tenant_seen_after(run_once, work, reset) == seen


def test_a_lock_that_an_expression_takes_is_not_kept(run: Runner, rows: None) -> None:
    async def main() -> None:
        clean = await aio.run(look)
        await Tag.objects.annotate(x=RawSQL("pg_advisory_lock(42)::text", ())).aget()
        assert await aio.run(look) == clean

    run(main())


def test_a_lock_that_a_cancelled_expression_has_taken_is_not_kept(
    run: Runner, rows: None, admin: psycopg.Connection[Any]
) -> None:
    slow = RawSQL("pg_advisory_lock(42)::text || pg_sleep(60)::text", ())

    def locks() -> Any:
        return admin.execute("SELECT 1 FROM pg_locks WHERE locktype = 'advisory'").fetchall()

    async def main() -> None:
        await aio.run(look)
        asked = asyncio.create_task(Tag.objects.annotate(x=slow).aget())
        while not locks():
            await asyncio.sleep(0.01)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        await aio.run(look)
        assert not locks(), "the end of its statement does not undo it"

    run(main())


# --- The three settings, and what they cost -----------------------------------------------------


def statements_of(run: Runner, reset: str, work: Callable[[], Any]) -> list[str]:
    """Return the messages of `work`, when its session is new and used three times."""

    async def main() -> None:
        for _ in range(3):
            await aio.run(work)

    given = connections.settings["default"]["OPTIONS"]
    with settings_of_default(OPTIONS={**given, "session_reset": reset}), messages() as sent:
        run(main())
    return [message for message in sent if "Terminate" not in message]


def orm() -> None:
    Tag.objects.count()


def orm_in_a_transaction() -> None:
    with transaction.atomic():
        Tag.objects.create(name="t")
        with transaction.atomic():
            Tag.objects.filter(name="t").delete()


def raw() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")


@pytest.mark.parametrize("reset", ["dirty", "never"])
def test_statements_of_the_orm_pay_no_round_trip(run: Runner, reset: str) -> None:
    sent = statements_of(run, reset, orm)
    assert len(sent) == 3 and all("COUNT(*)" in message for message in sent), sent
    sent = statements_of(run, reset, orm_in_a_transaction)
    assert not [message for message in sent if "DISCARD" in message or "SET " in message]
    assert len(sent) % 3 == 0 and sum("BEGIN" in message for message in sent) == 3


def test_dirty_resets_after_raw_sql_only(run: Runner) -> None:
    sent = statements_of(run, "dirty", raw)
    assert sum("DISCARD ALL" in message for message in sent) in (2, 3), "the last may be cut short"


def test_always_resets_after_each_lease(run: Runner) -> None:
    sent = statements_of(run, "always", orm)
    assert sum("DISCARD ALL" in message for message in sent) in (2, 3)
    assert sum("COUNT(*)" in message for message in sent) == 3


def test_never_resets_nothing(run: Runner) -> None:
    sent = statements_of(run, "never", raw)
    assert len(sent) == 3 and not [message for message in sent if "DISCARD" in message]


def test_never_lets_the_next_tenant_see_what_was_left(run: Runner) -> None:
    def spoil() -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT set_config('app.tenant', 'one', false)")

    async def main() -> None:
        await aio.run(spoil)
        assert (await aio.run(look))[4] == "one"

    given = connections.settings["default"]["OPTIONS"]
    with settings_of_default(OPTIONS={**given, "session_reset": "never"}):
        run(main())


# --- Django's own code pays nothing ---------------------------------------------------------------


def comment(execute: Any, sql: Any, params: Any, many: Any, context: Any) -> Any:
    """Add a comment to each statement, as tools do to name the request."""
    return execute(f"/* of: */ {sql} /*route='tags'*/", params, many, context)


def pass_on(execute: Any, sql: Any, params: Any, many: Any, context: Any) -> Any:
    return execute(sql, params, many, context)


def ask_the_orm(execute: Any, sql: Any, params: Any, many: Any, context: Any) -> Any:
    with _not_again():
        Author.objects.count()
    return execute(sql, params, many, context)


def observed_by(*wrappers: Any) -> Callable[[], None]:
    def work() -> None:
        for wrapper in wrappers:
            for statement in STATEMENTS.values():
                Tag.objects.all().delete()
                with connection.execute_wrapper(wrapper):
                    statement()

    return work


def djangos_own() -> None:
    tags = Tag.objects.annotate(
        a=Lower("name"),
        b=Coalesce(F("pk") + 1, Value(2)),
        c=Case(When(pk__gt=0, then=Value("x")), default=Value("y")),
        d=Exists(Book.objects.filter(tags=OuterRef("pk"))),
        e=Subquery(Book.objects.filter(tags=OuterRef("pk")).values("title")[:1]),
        f=Window(StdDev("pk")),
        g=Cast("pk", TextField()),
        h=Now(),
    ).filter(name__icontains="x", pk__in=[1, 2], c__contains="x")
    list(tags.order_by("a"))
    list(tags.values("name").annotate(n=Count("pk")))
    list(tags.values_list("name").union(Tag.objects.values_list("name")))
    list(Tag.objects.prefetch_related("books"))
    list(Book.objects.select_related("author").prefetch_related("tags"))
    Tag.objects.filter(pk__lt=0).update(name=Upper(F("name")))
    Tag.objects.bulk_update([Tag(pk=-1, name=Lower(Value("X")))], ["name"])
    Tag.objects.filter(name__lt=Lower(Value("X"))).aggregate(Max("pk"))
    connection.is_usable()


@pytest.mark.usefixtures("tags")
@pytest.mark.parametrize(
    "work",
    [djangos_own, *map(observed_by, (comment, pass_on, ask_the_orm))],
    ids=["Django's functions", "in comments", "passed on", "with another query"],
)
@pytest.mark.parametrize("bound", [False, True], ids=["by the client", "by the server"])
def test_what_is_djangos_own_pays_no_round_trip(run_once: Runner, work: Any, bound: bool) -> None:
    def both() -> None:
        work()
        in_a_block(work)()

    given = connections.settings["default"]["OPTIONS"]
    with settings_of_default(OPTIONS={**given, "server_side_binding": bound}):
        sent = statements_of(run_once, "dirty", both)
    assert sent and not [message for message in sent if "DISCARD" in message]


class _Passing(psycopg.ClientCursor[Any]):
    """Derives a user's own cursor class, which sends nothing else."""


@pytest.mark.parametrize("work", [orm, orm_in_a_transaction, stream])
@pytest.mark.usefixtures("tags")
def test_a_cursor_class_that_sends_nothing_else_pays_no_round_trip(
    run_once: Runner, work: Any
) -> None:
    given = connections.settings["default"]["OPTIONS"]
    with settings_of_default(OPTIONS={**given, "cursor_factory": _Passing}):
        sent = statements_of(run_once, "dirty", work)
    assert sent and not [message for message in sent if "DISCARD" in message]


@pytest.mark.usefixtures("tags")
def test_a_cursor_on_which_nothing_ran_pays_no_round_trip(run_once: Runner) -> None:
    def work() -> None:
        with connection.cursor():
            Tag.objects.count()

    assert not [each for each in statements_of(run_once, "dirty", work) if "DISCARD" in each]
