"""Tests C7: a COMMIT whose answer is lost has an unknown outcome, and the server knows it."""

from __future__ import annotations

import asyncio
import math
import pickle
import select
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from random import Random
from threading import Timer
from typing import Any

import psycopg
import pytest
from asgiref.sync import sync_to_async
from django.core.exceptions import ImproperlyConfigured
from django.db import DatabaseError, OperationalError, connection, connections, transaction
from django.http import HttpRequest, HttpResponse
from django.test import AsyncClient, override_settings
from django.test.utils import CaptureQueriesContext
from django.urls import path

import pgbackend
from pgbackend import OutcomeUnknown, Verdict, aio
from pgbackend.driver import errors as driver_errors
from tests.conftest import Runner, wait_for
from tests.library.models import Tag
from tests.support.cutting import ANSWERED, ASKED, CuttingLink
from tests.support.fixtures import by_link, settings_of_default
from tests.support.messages import messages
from tests.support.replication import Member, Replication, replication

#: The commits of one case; there are 2 kinds of code with ten cases each: 500 commits in all.
COMMITS = 25
CASES = range(10)


@pytest.fixture
def link(conninfo: str) -> Iterator[CuttingLink]:
    opened = CuttingLink(conninfo)
    try:
        forget_connections()
        with by_link(opened, commit_id=True):
            yield opened
            forget_connections()
    finally:
        opened.close()


def forget_connections() -> None:
    """Close the connection of this thread, and the pools: their settings have changed."""
    connection.close()
    connection.close_pool()


def options_of_default() -> dict[str, Any]:
    options: dict[str, Any] = connections.settings["default"]["OPTIONS"]
    return options


def direct(conninfo: str) -> psycopg.Connection[Any]:
    """Open a connection to Django's database that does not go through a link."""
    name = connections["default"].settings_dict["NAME"]
    return psycopg.connect(conninfo, dbname=name, autocommit=True)


def lost(name: str) -> OutcomeUnknown:
    """Write a row in a block whose COMMIT is cut, and return the error."""
    with pytest.raises(OutcomeUnknown) as caught, transaction.atomic():
        Tag.objects.create(name=name)
    return caught.value


def in_sync_code(names: list[str], run: Runner) -> dict[str, Verdict]:
    return {name: lost(name).verdict() for name in names}


def in_green_code(names: list[str], run: Runner) -> dict[str, Verdict]:
    async def one(name: str) -> Verdict:
        return await (await aio.run(lost, name)).averdict()

    async def main() -> dict[str, Verdict]:
        found: dict[str, Verdict] = {}
        for at in range(0, len(names), 5):
            some = names[at : at + 5]
            found |= zip(some, await asyncio.gather(*map(one, some)), strict=True)
        return found

    return run(main())


@pytest.mark.sweep(one_in=10)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("verdicts", [in_sync_code, in_green_code])
def test_each_verdict_on_a_commit_that_was_cut_at_a_random_byte_is_right(
    run: Runner,
    link: CuttingLink,
    conninfo: str,
    verdicts: Callable[[list[str], Runner], dict[str, Verdict]],
    case: int,
) -> None:
    random = Random(case)
    link.cut_at(random.randrange(ASKED + ANSWERED) for _ in range(COMMITS))
    found = verdicts([f"{case} {number}" for number in range(COMMITS)], run)
    written = names_of(conninfo)
    assert not link.plan, "each COMMIT was cut"
    assert found == {
        name: Verdict.COMMITTED if name in written else Verdict.ABORTED for name in found
    }
    count = Counter(found.values())
    assert min(count[Verdict.COMMITTED], count[Verdict.ABORTED]) >= 4, count


# --- Every way to commit --------------------------------------------------------------------------


def in_a_block(name: str) -> None:
    with transaction.atomic():
        Tag.objects.create(name=name)


@transaction.atomic
def in_a_decorated_function(name: str) -> None:
    Tag.objects.create(name=name)


def in_nested_blocks(name: str) -> None:
    with transaction.atomic(), transaction.atomic():
        Tag.objects.create(name=name)


def without_autocommit(name: str) -> None:
    transaction.set_autocommit(False)
    Tag.objects.create(name=name)
    try:
        transaction.commit()
    finally:
        connection.close()


def in_a_block_that_is_logged(name: str) -> None:
    with CaptureQueriesContext(connection):
        in_a_block(name)


SYNC = [
    in_a_block,
    in_a_decorated_function,
    in_nested_blocks,
    without_autocommit,
    in_a_block_that_is_logged,
]


async def async_with(name: str) -> None:
    async with pgbackend.atomic():
        await Tag.objects.acreate(name=name)


@pgbackend.atomic
async def in_a_decorated_coroutine(name: str) -> None:
    await Tag.objects.acreate(name=name)


async def in_a_thread(name: str) -> None:
    def write() -> None:
        try:
            in_a_block(name)
        finally:
            connection.close()

    await sync_to_async(write)()


async def in_a_request(name: str) -> None:
    with override_settings(ROOT_URLCONF=__name__, MIDDLEWARE=[]):
        await AsyncClient().get(f"/{name}")


async def write_in_view(request: HttpRequest, name: str) -> HttpResponse:
    await Tag.objects.acreate(name=name)
    return HttpResponse()


urlpatterns = [path("<name>", write_in_view)]
ASYNC = [async_with, in_a_decorated_coroutine, in_a_thread, in_a_request]


def names_of(conninfo: str) -> set[str]:
    """Return the names of the rows that are committed."""
    with direct(conninfo) as admin:
        return {name for (name,) in admin.execute("SELECT name FROM library_tag")}


#: The places at which the link cuts a COMMIT, and the verdicts that follow.
CUTS = {"before it": (0, Verdict.ABORTED), "after it": (ASKED, Verdict.COMMITTED)}


@pytest.mark.parametrize(("passing", "expected"), CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("write", SYNC)
@pytest.mark.parametrize("pool", [True, False], ids=["pool", "no_pool"])
def test_sync_code_gets_the_error_that_has_the_verdict(
    link: CuttingLink,
    write: Callable[[str], None],
    pool: bool,
    passing: int,
    expected: Verdict,
) -> None:
    with settings_of_default(OPTIONS={**options_of_default(), "pool": pool}):
        link.cut_at([passing])
        with pytest.raises(OutcomeUnknown) as caught:
            write("x")
        assert caught.value.verdict() is expected
        assert caught.value.using == "default"
        assert isinstance(caught.value.__cause__, driver_errors.OutcomeUnknown)
        forget_connections()


@pytest.mark.parametrize(("passing", "expected"), CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("write", [*SYNC, *ASYNC])
def test_async_code_gets_the_error_that_has_the_verdict(
    run: Runner,
    link: CuttingLink,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[str], Any],
    passing: int,
    expected: Verdict,
) -> None:
    monkeypatch.setitem(connections.settings["default"], "ATOMIC_REQUESTS", write is in_a_request)

    async def main() -> None:
        link.cut_at([passing])
        with pytest.raises(OutcomeUnknown) as caught:
            await (write("x") if write in ASYNC else aio.run(write, "x"))
        assert await caught.value.averdict() is expected
        assert await aio.run(caught.value.verdict) is expected
        assert await Tag.objects.filter(name="x").acount() == (expected is Verdict.COMMITTED)

    run(main())


@pytest.mark.parametrize("pipeline", [False, True], ids=["plain", "pipeline"])
def test_psycopgs_own_transaction_raises_the_drivers_error(
    link: CuttingLink, conninfo: str, pipeline: bool
) -> None:
    connection.ensure_connection()
    psycopgs = connection.connection
    link.cut_at([ASKED])
    with (
        pytest.raises(driver_errors.OutcomeUnknown) as caught,
        psycopgs.pipeline() if pipeline else nullcontext(),
        psycopgs.transaction(),
    ):
        psycopgs.execute("INSERT INTO library_tag (name) VALUES ('x')")
    assert (caught.value.commit_id is None) is pipeline
    assert caught.value.database == "default"


# --- What is known --------------------------------------------------------------------------------


@contextmanager
def trigger(conninfo: str, does: str) -> Iterator[None]:
    """Have `does`, PL/pgSQL, executed at the COMMIT of each transaction that has written a tag."""
    with direct(conninfo) as admin:
        admin.execute(
            "CREATE FUNCTION at_commit() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$BEGIN {does}; RETURN NULL; END$$; "
            "CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT ON library_tag "
            "DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION at_commit()"
        )
        try:
            yield
        finally:
            admin.execute("DROP FUNCTION at_commit() CASCADE")


#: Code to which a block that writes is passed, and how to run it.
RUN: dict[str, Callable[[Runner, Callable[[], None]], None]] = {
    "sync": lambda run, block: block(),
    "green": lambda run, block: run(aio.run(block)),
}


@pytest.mark.parametrize("way", RUN)
def test_a_commit_that_the_server_refuses_is_known_to_have_failed(
    run: Runner, link: CuttingLink, conninfo: str, way: str
) -> None:
    def block() -> None:
        with pytest.raises(DatabaseError) as caught:
            in_a_block("x")
        assert type(caught.value) is not OutcomeUnknown
        assert "no" in str(caught.value)

    with trigger(conninfo, "RAISE 'no' USING ERRCODE = '40001'"):
        RUN[way](run, block)


@pytest.mark.parametrize("way", RUN)
def test_a_connection_that_breaks_before_commit_is_sent_has_committed_nothing(
    run: Runner, link: CuttingLink, way: str
) -> None:
    def block() -> None:
        with pytest.raises(OperationalError) as caught, transaction.atomic():
            Tag.objects.create(name="x")
            link.cut()
            link.restore()
        assert type(caught.value) is OperationalError

    RUN[way](run, block)


@pytest.mark.parametrize("way", RUN)
def test_a_session_that_was_ended_while_it_was_idle_has_committed_nothing(
    run: Runner, link: CuttingLink, conninfo: str, way: str
) -> None:
    def block() -> None:
        with pytest.raises(DatabaseError) as caught, transaction.atomic():
            Tag.objects.create(name="x")
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_backend_pid()")
                (pid,) = cursor.fetchone()
                cursor.execute("SET LOCAL idle_in_transaction_session_timeout = 1")
            with direct(conninfo) as admin:
                ended = "SELECT FROM pg_stat_activity WHERE pid = %s"
                wait_for(lambda: not admin.execute(ended, [pid]).fetchall(), "the session's end")
            # The link would lose the server's message if COMMIT came before it has passed it on.
            socket = connection.connection.pgconn.socket
            wait_for(lambda: select.select([socket], [], [], 0)[0], "the server's message")
        assert not isinstance(caught.value, OutcomeUnknown)
        assert "idle-in-transaction" in str(caught.value)

    with settings_of_default(OPTIONS={**options_of_default(), "commit_id": False}):
        RUN[way](run, block)


# --- Asking ---------------------------------------------------------------------------------------


def test_a_commit_that_the_server_works_on_is_waited_for(link: CuttingLink, conninfo: str) -> None:
    with trigger(conninfo, "PERFORM pg_advisory_xact_lock(26)"), direct(conninfo) as admin:
        admin.execute("SELECT pg_advisory_lock(26)")
        link.cut_at([ASKED])
        with pytest.raises(OutcomeUnknown) as caught:
            in_a_block("x")
        assert caught.value.verdict(timeout=0.1) is Verdict.UNKNOWN
        release = Timer(0.1, lambda: admin.execute("SELECT pg_advisory_unlock(26)"))
        release.start()
        assert caught.value.verdict() is Verdict.COMMITTED
        release.join()


def test_a_block_that_has_written_nothing_needs_no_verdict(link: CuttingLink) -> None:
    link.cut_at([ASKED])
    with pytest.raises(OutcomeUnknown) as caught, transaction.atomic():
        Tag.objects.count()
    link.cut()
    assert caught.value.verdict() is Verdict.NOTHING_WRITTEN
    link.restore()


def test_without_the_option_a_verdict_is_refused_with_the_cure(link: CuttingLink) -> None:
    with settings_of_default(OPTIONS={**options_of_default(), "commit_id": False}):
        link.cut_at([ASKED])
        with pytest.raises(OutcomeUnknown) as caught:
            in_a_block("x")
        with pytest.raises(ImproperlyConfigured, match=r"\['commit_id'\] to True"):
            caught.value.verdict()
        forget_connections()


def test_a_server_that_cannot_be_reached_gives_no_verdict(link: CuttingLink) -> None:
    link.cut_at([ASKED])
    with pytest.raises(OutcomeUnknown) as caught:
        in_a_block("x")
    link.down = True
    with pytest.raises(OperationalError):
        caught.value.verdict(timeout=0.1)
    link.restore()
    assert caught.value.verdict() is Verdict.COMMITTED


def test_a_verdict_may_be_waited_for_without_a_limit(link: CuttingLink) -> None:
    link.cut_at([ASKED])
    with pytest.raises(OutcomeUnknown) as caught:
        in_a_block("x")
    assert caught.value.verdict(timeout=math.inf) is Verdict.COMMITTED


@pytest.mark.parametrize("timeout", [math.nan, -1, None, True, "10"])
def test_a_limit_that_is_no_number_of_seconds_is_refused(timeout: Any) -> None:
    with pytest.raises(ValueError, match="number of seconds"):
        OutcomeUnknown("x").verdict(timeout=timeout)


def test_a_verdict_is_neither_true_nor_false() -> None:
    with pytest.raises(TypeError, match="compare"):
        bool(Verdict.ABORTED)


def test_an_error_can_be_pickled_and_asked_for_elsewhere(link: CuttingLink) -> None:
    link.cut_at([ASKED])
    with pytest.raises(OutcomeUnknown) as caught:
        in_a_block("x")
    assert pickle.loads(pickle.dumps(caught.value)).verdict() is Verdict.COMMITTED
    assert pickle.loads(pickle.dumps(caught.value.__cause__)).commit_id == caught.value.commit_id


def test_the_id_costs_one_message_in_a_transaction_and_none_elsewhere(link: CuttingLink) -> None:
    def sent(commit_id: bool) -> list[str]:
        forget_connections()
        with (
            settings_of_default(OPTIONS={**options_of_default(), "commit_id": commit_id}),
            messages() as found,
        ):
            in_a_block(f"{commit_id}")
            Tag.objects.create(name=f"{commit_id} again")
            forget_connections()
        return [each for each in found if "Terminate" not in each]

    without, asking = sent(False), sent(True)
    assert len(asking) == len(without) + 1
    assert [each for each in asking if "xact_id" in each]


# --- Servers that crash, and a standby that takes over --------------------------------------------


@pytest.fixture
def pair() -> Iterator[Replication]:
    with replication() as servers:
        servers.primary.execute(
            "CREATE TABLE library_tag (id bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, "
            "name varchar(50) UNIQUE)"
        )
        yield servers


@pytest.fixture
def way(pair: Replication) -> Iterator[CuttingLink]:
    """Lead 'default' to the primary, by a link that can be led to the standby."""
    opened = CuttingLink(pair.primary.conninfo)
    forget_connections()
    changes = {"HOST": "127.0.0.1", "USER": "postgres", "NAME": "postgres", "PASSWORD": ""}
    options = {"sslmode": "disable", "gssencmode": "disable", "commit_id": True}
    try:
        with settings_of_default(**changes, PORT=str(opened.port), OPTIONS=options):
            yield opened
            forget_connections()
    finally:
        opened.close()


def cut(way: CuttingLink, name: str, passing: int) -> OutcomeUnknown:
    """Write a row in a block whose COMMIT is cut, in a new session; return the error."""
    connection.close()
    way.cut_at([passing])
    return lost(name)


def has(member: Member, name: str) -> bool:
    return bool(member.execute("SELECT count(*) FROM library_tag WHERE name = %s", name))


def use_up_ids(member: Member, error: OutcomeUnknown) -> None:
    """Commit transactions until the server has given the id of the lost transaction to one."""
    assert error.commit_id is not None
    assert error.commit_id.xid is not None
    name = 0
    while member.execute("SELECT pg_current_xact_id()::text::bigint") <= error.commit_id.xid:
        member.execute("INSERT INTO library_tag (name) VALUES (%s)", f"later {(name := name + 1)}")
    status = "SELECT pg_xact_status(%s::xid8)"
    assert member.execute(status, str(error.commit_id.xid)) == "committed", "another transaction"


def stop_at_once(member: Member) -> None:
    """Stop a server as a crash does."""
    member.run("pg_ctl", "-D", member.data, "-w", "-s", "-m", "immediate", "stop")


@pytest.mark.slow
def test_verdicts_are_right_after_a_failover_to_a_standby_that_has_the_commit(
    pair: Replication, way: CuttingLink
) -> None:
    old, new = pair.primary, pair.standby
    old.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
    old.execute("SELECT pg_reload_conf()")
    kept = cut(way, "kept", ASKED)
    aborted = cut(way, "aborted", 0)
    wait_for(lambda: has(new, "kept"), "the standby has the commit")
    stop_at_once(old)
    way.lead_to(new.conninfo)
    assert kept.verdict(timeout=0.2) is Verdict.UNKNOWN, "not on a standby"
    pair.promote()
    assert kept.verdict() is Verdict.COMMITTED
    assert aborted.verdict() is Verdict.ABORTED
    assert has(new, "kept")
    assert not has(new, "aborted")
    new.stop()  # from now on the server does not tell at which place it was promoted
    new.start()
    assert kept.verdict() is Verdict.UNKNOWN
    assert aborted.verdict() is Verdict.ABORTED


@pytest.mark.slow
def test_verdicts_are_right_after_a_failover_to_a_standby_that_lacks_the_commit(
    pair: Replication, way: CuttingLink
) -> None:
    old, new = pair.primary, pair.standby
    new.execute("ALTER SYSTEM SET primary_conninfo = ''")
    new.execute("SELECT pg_reload_conf()")
    wait_for(lambda: not old.streams(), "the standby follows no more")
    error = cut(way, "lost", ASKED)
    wait_for(lambda: has(old, "lost"), "the old primary has committed")
    assert error.verdict() is Verdict.COMMITTED, "as long as that is the primary"
    stop_at_once(old)
    way.lead_to(new.conninfo)
    pair.promote()
    assert not has(new, "lost")
    assert error.verdict() is Verdict.ABORTED
    use_up_ids(new, error)
    assert error.verdict() is Verdict.ABORTED, "its id is another transaction's"
    new.stop()
    new.start()
    assert error.verdict() is Verdict.UNKNOWN


@pytest.mark.slow
def test_verdicts_are_right_after_a_crash_and_a_restart(
    pair: Replication, way: CuttingLink
) -> None:
    server = pair.primary
    server.execute("ALTER SYSTEM SET wal_writer_delay = '10s'")
    server.execute("SELECT pg_reload_conf()")
    committed, rolled_back = cut(way, "committed", ASKED), cut(way, "rolled back", 0)
    wait_for(lambda: has(server, "committed"), "the server has committed")
    # Nothing of this transaction is written to the disk before the crash: it does not commit, and
    # the process that would write it sleeps.
    forgotten = cut(way, "forgotten", 0)
    stop_at_once(server)
    server.start()
    assert committed.verdict() is Verdict.COMMITTED
    assert rolled_back.verdict() is Verdict.ABORTED
    assert forgotten.verdict() is Verdict.ABORTED
    use_up_ids(server, forgotten)
    assert forgotten.verdict() is Verdict.ABORTED, "its id is another transaction's"
    before = [cut(way, "before", ASKED), cut(way, "not before", 0)]
    wait_for(lambda: has(server, "before"), "the server has committed")
    server.stop()
    server.start()
    assert [error.verdict() for error in before] == [Verdict.COMMITTED, Verdict.ABORTED]
    assert forgotten.verdict() is Verdict.UNKNOWN, "the server no longer shows its recovery"
