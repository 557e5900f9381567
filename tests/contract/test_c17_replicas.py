"""Tests C17 with real servers: reads go to replicas, and see the writes of their own request."""

from __future__ import annotations

import asyncio
import contextvars
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.core import signing
from django.core.exceptions import ImproperlyConfigured
from django.db import DatabaseError, connection, connections, models, transaction
from django.db import router as djangos_router
from django.db.models import F, Func, Value
from django.db.models.functions import Upper
from django.http import HttpRequest, HttpResponse
from django.test import AsyncClient, Client, override_settings
from django.urls import path

import pgbackend
from pgbackend import aio, routers
from pgbackend.replicas import writes
from pgbackend.replicas.monitors import Monitor, Sample
from pgbackend.replicas.positions import Answer, Position, without_header
from tests.conftest import Runner, wait_for
from tests.library.models import Author, Book, Tag
from tests.support.link import Link
from tests.support.own_writes import STALE, in_tasks, in_threads
from tests.support.processes import Program, run_all
from tests.support.replicas import family, goes_to, make_tables, routed, wait_for_reads
from tests.support.replication import Replication, replication

TRIES = 200


@pytest.fixture(scope="module")
def servers(django_db_setup: None, django_db_blocker: Any) -> Iterator[Replication]:
    with replication(second=True) as pair:
        with django_db_blocker.unblock():
            make_tables(pair)
        yield pair


@pytest.fixture
def pair(servers: Replication) -> Iterator[Replication]:
    """Route reads to the two standbys, which replay as they should."""
    for table in ("library_book", "library_author", "library_tag", "library_entry"):
        servers.primary.execute(f"DELETE FROM {table}")
    with family(servers):
        yield servers
    for standby in (servers.standby, servers.second):
        assert standby is not None
        standby.resume()


@contextmanager
def lagging(pair: Replication, *, both: bool = True) -> Iterator[None]:
    """Have the standbys, or only the first, replay nothing inside the `with`."""
    paused = [each for each in (pair.standby, pair.second if both else None) if each is not None]
    for standby in paused:
        standby.pause()
    try:
        yield
    finally:
        for standby in paused:
            standby.resume()


@pytest.fixture
def alone(transactional_db: None) -> Iterator[None]:
    """Route reads to an alias that leads to the primary itself: a replica that is never behind."""
    with routed({"replica": {}}):
        yield


@contextmanager
def unanswered() -> Iterator[None]:
    """Let no monitor have an answer inside the `with`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Monitor, "_answered", lambda self, asked_at, answer: None)
        yield


def read_from(queryset: Any) -> str:
    """Return the alias that the only object of `queryset` was read from."""
    return str(queryset.get()._state.db)


@sync_to_async
def in_a_thread(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return function(*args, **kwargs)
    finally:
        connections.close_all()


def why_not(alias: str) -> str | None:
    """Return why `alias` is not read from; also read, so that its server is asked."""
    goes_to()
    (state,) = [each for each in routers.replica_states() if each.alias == alias]
    return state.why_not


def caught_up() -> None:
    """Wait until both replicas have what the running code has written."""
    wait_for(lambda: {goes_to(), goes_to()} == REPLICAS, "both replicas have caught up", 20)


REPLICAS = {"replica", "second"}


# --- Where a read goes ----------------------------------------------------------------------------


@pytest.mark.slow
def test_reads_go_to_the_replicas_in_turn(pair: Replication, run: Runner) -> None:
    async def on_the_loop() -> set[str]:
        return {(await Tag.objects.aget())._state.db or "" for _ in range(4)}

    Tag.objects.create(name="a")
    caught_up()
    assert {read_from(Tag.objects.all()) for _ in range(4)} == REPLICAS
    assert run(on_the_loop()) == REPLICAS
    assert run.green(lambda: {read_from(Tag.objects.all()) for _ in range(4)}) == REPLICAS


@pytest.mark.slow
def test_reads_in_a_transaction_of_the_primary_go_there_in_any_context(
    pair: Replication, run: Runner
) -> None:
    def here() -> str:
        return read_from(Tag.objects.all())

    async def on_the_loop() -> str | None:
        return (await Tag.objects.aget())._state.db

    async def main() -> list[str]:
        async with transaction.atomic():
            found = [(await Tag.objects.aget())._state.db or ""]
            found += await asyncio.gather(aio.run(here), sync_to_async(here)())
            await asyncio.create_task(pgbackend.detached(aio.run(found.append, "out")))
            found.append(await pgbackend.detached(aio.run(here)))
        return [*found, await aio.run(here)]

    Tag.objects.create(name="a")
    caught_up()
    with transaction.atomic():
        assert here() == "default"
        assert async_to_sync(on_the_loop)() == "default"
    assert here() in REPLICAS
    connection.set_autocommit(False)
    assert here() == "default"
    connection.rollback()
    connection.set_autocommit(True)
    *inside, out, detached, after = run(main())
    assert inside == ["default"] * 3
    assert out == "out" and {detached, after} <= REPLICAS


@pytest.mark.slow
def test_writes_and_reads_for_writing_go_to_the_primary(pair: Replication, run: Runner) -> None:
    def check() -> None:
        Tag.objects.create(name="a")
        caught_up()
        tag = Tag.objects.get(name="a")
        assert tag._state.db in REPLICAS
        tag.name = "b"
        tag.save()
        assert tag._state.db == "default"
        with transaction.atomic():
            assert read_from(Tag.objects.select_for_update().filter(name="b")) == "default"
        same, made = Tag.objects.get_or_create(name="b")
        assert not made and same._state.db == "default"
        same, made = Tag.objects.update_or_create(name="b", defaults={"name": "c"})
        assert not made and same._state.db == "default"
        same.refresh_from_db()
        assert same.name == "c"
        caught_up()
        Tag.objects.get(name="c").delete()
        assert not Tag.objects.exists()

    check()
    run.green(check)


@pytest.mark.slow
def test_related_objects_are_read_where_their_object_came_from(pair: Replication) -> None:
    author = Author.objects.create(name="a")
    Book.objects.create(title="b", author=author)
    caught_up()
    for alias in (*REPLICAS, "default"):
        book = Book.objects.using(alias).get()
        assert book.author._state.db == alias
        assert {goes_to(Author, instance=book) for _ in range(3)} == {alias}
        assert read_from(book.author.books.all()) == alias
    replica, second = (Book.objects.using(alias).get() for alias in REPLICAS)
    replica.author = second.author  # objects of one family may be related
    replica.save()
    assert replica._state.db == "default"


@pytest.mark.slow
def test_a_stale_related_object_is_not_read_from_a_replica(pair: Replication) -> None:
    with lagging(pair):
        author = Author.objects.create(name="a")
        book = Book.objects.create(title="b", author=author)
        with routers.use_token():  # other code, to which an object of the primary was passed
            assert read_from(author.books.all()) == "default"
            assert Book.objects.defer("text").using("default").get(pk=book.pk).text == ""


@pytest.mark.slow
def test_iterators_read_from_replicas(pair: Replication, run: Runner) -> None:
    async def main() -> set[str | None]:
        return {tag._state.db async for tag in Tag.objects.all().aiterator(chunk_size=2)}

    Tag.objects.bulk_create(Tag(name=str(number)) for number in range(5))
    caught_up()
    assert {tag._state.db for tag in Tag.objects.iterator(chunk_size=2)} <= REPLICAS
    assert run(main()) <= REPLICAS


@pytest.mark.slow
def test_on_primary_holds_for_its_block_its_tasks_and_threads_and_for_functions(
    pair: Replication, run: Runner
) -> None:
    @pgbackend.on_primary()
    def function() -> str:
        return goes_to()

    @pgbackend.on_primary("default")
    async def coroutine() -> str:
        return await aio.run(goes_to)

    @pgbackend.on_primary()
    def generator() -> Iterator[str]:
        yield goes_to()

    async def main() -> None:
        async with pgbackend.on_primary():
            found = await asyncio.gather(aio.run(goes_to), in_a_thread(goes_to))
            inherited = asyncio.create_task(aio.run(goes_to))
        assert {*found, await inherited, await coroutine()} == {"default"}
        assert await aio.run(goes_to) in REPLICAS

    caught_up()
    with pgbackend.on_primary(), pgbackend.on_primary("replica"):
        assert goes_to() == "default"
    assert goes_to() in REPLICAS
    assert function() == "default" and goes_to() in REPLICAS
    for alias in generator():
        assert alias == "default"
        assert goes_to() in REPLICAS
    run(main())


# --- A request's own writes -----------------------------------------------------------------------


def raw(name: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute("INSERT INTO library_tag (name) VALUES (%s)", [name])


def many(name: str) -> None:
    with connection.cursor() as cursor:
        cursor.executemany("INSERT INTO library_tag (name) VALUES (%s)", [[name], [f"{name}2"]])


def copied(name: str) -> None:
    with connection.cursor() as cursor, cursor.copy("COPY library_tag (name) FROM STDIN") as copy:
        copy.write_row([name])


def by_psycopg(name: str) -> None:
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.connection.execute("INSERT INTO library_tag (name) VALUES (%s)", [name])


def in_a_pipeline(name: str) -> None:
    with pgbackend.pinned(), connection.cursor() as cursor:
        with cursor.connection.pipeline():
            cursor.execute("INSERT INTO library_tag (name) VALUES (%s)", [name])


def in_a_transaction(name: str) -> None:
    with transaction.atomic():
        with transaction.atomic():
            Tag.objects.create(name=name)
        assert Tag.objects.filter(name=name).exists()


def without_autocommit(name: str) -> None:
    connection.set_autocommit(False)
    Tag.objects.create(name=name)
    connection.commit()
    connection.set_autocommit(True)


def by_a_function_in_a_select(name: str) -> None:
    class Made(Func):
        function = "make_tag"
        output_field = models.IntegerField()

    Author.objects.using("default").create(name="any")
    with writes.recording(writes.Record(writes.current())):  # only the SELECT counts
        [*Author.objects.using("default").annotate(made=Made(Value(name)))[:1]]


def by_an_alias(name: str) -> None:
    Tag(name=name).save(using="default")


def in_bulk(name: str) -> None:
    Tag.objects.bulk_create([Tag(name=name)])


def by_an_update(name: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute("INSERT INTO library_tag (name) VALUES (%s)", [f"before {name}"])
    Tag.objects.filter(name=f"before {name}").update(name=name)


WAYS = [
    *(raw, many, copied, by_psycopg, in_a_pipeline, in_a_transaction, without_autocommit),
    *(by_a_function_in_a_select, by_an_alias, in_bulk, by_an_update),
]


@pytest.mark.parametrize("write", WAYS, ids=lambda way: way.__name__)
def test_each_way_to_write_counts(alone: None, run: Runner, write: Callable[[str], None]) -> None:
    """Ask for no answer after the write: so a write that counts sends the read to the primary."""

    def check(name: str) -> None:
        wait_for_reads("replica")
        before = writes.current().count
        with routers.use_token(), unanswered():
            assert goes_to() == "replica"
            write(name)
            assert Tag.objects.get(name=name)._state.db == "default"
        assert writes.current().count > before, "the code around it has written, too"

    with connection.cursor() as cursor:
        cursor.execute(
            "CREATE OR REPLACE FUNCTION make_tag(text) RETURNS bigint LANGUAGE SQL AS "
            "'INSERT INTO library_tag (name) VALUES ($1) RETURNING id'"
        )
    check("sync")
    run.green(check, "green")


def test_a_write_that_was_interrupted_counts(alone: None, run: Runner) -> None:
    def write() -> None:
        with connection.cursor() as cursor:
            cursor.execute("INSERT INTO library_tag (name) SELECT pg_sleep(10)::text")

    async def main() -> None:
        before = writes.current().count
        writing = asyncio.create_task(aio.run(write))
        while not pgbackend.statistics() or not pgbackend.statistics()[0].leased:
            await asyncio.sleep(0.001)
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        assert writes.current().count > before

    run(main())


def test_plain_selects_on_the_primary_count_as_no_writes(alone: None, run: Runner) -> None:
    def check() -> None:
        record = writes.current()
        before = record.count
        assert Tag.objects.using("default").filter(name="a").get()
        assert Tag.objects.using("default").filter(name="a").values_list("name")
        assert Tag.objects.using("default").annotate(up=Upper("name")).count() == 1
        assert Tag.objects.using("default").filter(pk__gt=F("pk") - 1).exists()
        assert [*Tag.objects.using("default").iterator()]
        with transaction.atomic():
            with transaction.atomic():
                assert Tag.objects.get()
            assert [*Tag.objects.iterator()]
        assert record.count == before
        assert goes_to() == "replica"

    Tag.objects.create(name="a")
    wait_for_reads("replica")
    check()

    def green() -> None:
        wait_for_reads("replica")
        check()

    run.green(green)


def test_a_transaction_that_was_rolled_back_counts_as_no_write(alone: None) -> None:
    wait_for_reads("replica")
    before = writes.current().count
    with pytest.raises(ZeroDivisionError), transaction.atomic():
        Tag.objects.create(name="a")
        raise ZeroDivisionError
    assert writes.current().count == before


@pytest.mark.slow
def test_hooks_after_the_commit_see_it(pair: Replication, run: Runner) -> None:
    def check(name: str) -> None:
        found: list[str] = []
        with transaction.atomic():
            Tag.objects.create(name=name)
            transaction.on_commit(lambda: found.append(read_from(Tag.objects.filter(name=name))))
        assert found == ["default"]

    with lagging(pair):
        check("a")
        run.green(check, "b")


@pytest.mark.slow
def test_tasks_and_threads_of_a_unit_of_work_see_each_others_writes_and_others_do_not_count(
    pair: Replication, run: Runner
) -> None:
    async def unit(name: str) -> None:
        with routers.use_token():
            await asyncio.gather(
                Tag.objects.acreate(name=name),
                in_a_thread(Tag.objects.create, name=f"{name} by a thread"),
            )
            assert await Tag.objects.filter(name__startswith=name).acount() == 2
            assert await aio.run(goes_to) == "default"
            assert await in_a_thread(goes_to) == "default"

    async def main() -> None:
        await asyncio.gather(*(unit(name) for name in "abcdef"))
        with routers.use_token():
            assert await aio.run(goes_to) in REPLICAS

    caught_up()
    with lagging(pair):
        run(main())


@pytest.mark.slow
def test_code_outside_of_requests_sees_its_writes_across_threads_and_loops(
    pair: Replication, run: Runner
) -> None:
    def check(write: Callable[[], object], name: str) -> None:
        def written() -> None:
            write()
            assert Tag.objects.filter(name=name).exists()

        contextvars.Context().run(written)

    async def make(name: str) -> None:
        await Tag.objects.acreate(name=name)

    async def gathered() -> None:
        await asyncio.gather(Tag.objects.acreate(name="gathered"))
        assert await Tag.objects.filter(name="gathered").aexists()
        await asyncio.gather(in_a_thread(Tag.objects.create, name="in a thread"))
        assert await Tag.objects.filter(name="in a thread").aexists()

    caught_up()
    with lagging(pair):
        check(lambda: async_to_sync(make)("a"), "a")
        check(lambda: asyncio.run(aio.portal(make("b"))), "b")
        check(lambda: Tag.objects.create(name="c"), "c")
        contextvars.Context().run(run, gathered())


@pytest.mark.slow
def test_a_thread_that_has_written_nothing_reads_from_replicas(pair: Replication) -> None:
    found: list[str] = []

    def other() -> None:
        found.append(goes_to())
        connections.close_all()

    caught_up()
    with lagging(pair):
        Tag.objects.create(name="a")
        assert goes_to() == "default"
        thread = (
            threading.Thread(target=other, context=contextvars.Context())
            if (sys.version_info >= (3, 14))
            else threading.Thread(target=other)
        )
        thread.start()
        thread.join()
    assert set(found) <= REPLICAS


@pytest.mark.slow
def test_many_tries_in_tasks_and_threads_see_their_own_writes(
    pair: Replication, run: Runner
) -> None:
    """Let one standby replay, and the other one stop and go on, in the midst of the tries."""
    stopped = threading.Event()

    def disturb() -> None:
        while not stopped.wait(0.05):
            with lagging(pair, both=False):
                stopped.wait(0.05)

    disturbing = threading.Thread(target=disturb)
    disturbing.start()
    try:
        found = run(in_tasks(Tag, TRIES)) + in_threads(Tag, TRIES)
    finally:
        stopped.set()
        disturbing.join()
    assert found.total() == 2 * TRIES and found[STALE] == 0


@pytest.mark.slow
def test_tries_behind_replicas_that_lag_by_a_second_see_their_own_writes(
    pair: Replication, run: Runner
) -> None:
    standbys = [each for each in (pair.standby, pair.second) if each is not None]
    for standby in standbys:
        standby.execute("ALTER SYSTEM SET recovery_min_apply_delay = '1s'")
        standby.execute("SELECT pg_reload_conf()")
    try:
        found = run(in_tasks(Tag, TRIES), timeout=60) + in_threads(Tag, TRIES)
        assert found.total() == 2 * TRIES and found[STALE] == 0
    finally:
        for standby in standbys:
            standby.execute("ALTER SYSTEM RESET recovery_min_apply_delay")
            standby.execute("SELECT pg_reload_conf()")


# --- Clients, by a cookie or a token --------------------------------------------------------------


def view(request: HttpRequest) -> HttpResponse:
    try:
        if name := request.GET.get("make"):
            Tag.objects.create(name=name)
        found = Tag.objects.filter(name=request.GET.get("find", "")).first()
        return HttpResponse("nothing" if found is None else found._state.db)
    finally:
        connections.close_all()  # the thread of the request ends


async def async_view(request: HttpRequest) -> HttpResponse:
    if name := request.GET.get("make"):
        await asyncio.gather(Tag.objects.acreate(name=name))
    found = await Tag.objects.filter(name=request.GET.get("find", "")).afirst()
    return HttpResponse("nothing" if found is None else found._state.db)


urlpatterns = [path("sync", view), path("async", async_view)]
_SITE = override_settings(
    ROOT_URLCONF=__name__, MIDDLEWARE=["pgbackend.routers.ReadYourWritesMiddleware"]
)


@pytest.mark.slow
def test_a_client_sees_its_writes_by_a_cookie_and_other_clients_read_from_replicas(
    pair: Replication, run: Runner
) -> None:
    async def main() -> None:
        for url in ("/sync", "/async"):
            client, other = AsyncClient(), AsyncClient()
            response = await client.get(url, {"make": f"a{url}", "find": f"a{url}"})
            assert response.content == b"default"
            assert set(response.cookies) == {"pgbackend_writes"}
            response = await client.get(url, {"find": f"a{url}"})
            assert response.content == b"default" and not response.cookies
            assert (await other.get(url, {"find": f"a{url}"})).content == b"nothing"
            assert (await other.get(url, {"find": "old"})).content.decode() in REPLICAS

    Tag.objects.create(name="old")
    caught_up()
    with _SITE, lagging(pair):
        client, other = Client(), Client()
        assert client.get("/sync", {"make": "a", "find": "a"}).content == b"default"
        assert client.get("/sync", {"find": "a"}).content == b"default"
        assert other.get("/sync", {"find": "a"}).content == b"nothing"
        assert other.get("/sync", {"find": "old"}).content.decode() in REPLICAS
        run(main())
    with _SITE:
        cookie = client.cookies["pgbackend_writes"]
        assert cookie["httponly"] and cookie["max-age"] == 60
        wait_for(
            lambda: client.get("/sync", {"find": "a"}).content.decode() in REPLICAS,
            "the client's reads go to a replica",
        )


@pytest.mark.slow
def test_requests_without_the_middleware_see_their_own_writes(
    pair: Replication, run: Runner
) -> None:
    async def main() -> None:
        for url in ("/sync", "/async"):
            response = await AsyncClient().get(url, {"make": f"a{url}", "find": f"a{url}"})
            assert response.content == b"default"
            response = await AsyncClient().get(url, {"find": "old"})
            assert response.content.decode() in REPLICAS

    Tag.objects.create(name="old")
    caught_up()
    with override_settings(ROOT_URLCONF=__name__, MIDDLEWARE=[]), lagging(pair):
        run(main())


@pytest.mark.slow
def test_a_token_carries_writes_to_other_code(pair: Replication, run: Runner) -> None:
    def write(name: str) -> str:
        with routers.use_token():
            assert routers.token() is None
            Tag.objects.create(name=name)
            made = routers.token()
        assert made is not None
        return made

    def read(name: str, token: str | None) -> bool:
        with routers.use_token(token):
            return Tag.objects.filter(name=name).exists()

    caught_up()
    with lagging(pair):
        tokens = [write("a"), run.green(write, "b")]
        assert read("a", tokens[0]) and run.green(read, "b", tokens[1])
        assert not read("a", None) and not run.green(read, "b", None)
        with routers.use_token(tokens[0]):
            assert read("a", routers.token()), "a token is passed on"
        assert read("a", f"{tokens[0]}!"), "one that cannot be read stands for all writes"
        with routers.use_token(tokens[0], max_age=-1):
            assert not Tag.objects.filter(name="a").exists(), "it is too old"
    caught_up()
    with routers.use_token(tokens[0]):
        assert read_from(Tag.objects.filter(name="a")) in REPLICAS


def test_a_token_is_refused_inside_of_a_transaction(alone: None) -> None:
    Tag.objects.create(name="a")
    with transaction.atomic(), pytest.raises(transaction.TransactionManagementError, match="after"):
        routers.token()
    assert routers.token() is not None


# --- Servers that go, lag, or change --------------------------------------------------------------


@pytest.mark.slow
def test_both_replicas_lagging_leave_the_primary(pair: Replication) -> None:
    caught_up()
    with lagging(pair):
        Tag.objects.create(name="a")
        assert {read_from(Tag.objects.filter(name="a")) for _ in range(10)} == {"default"}
    caught_up()


@pytest.mark.slow
def test_a_replica_that_is_too_far_behind_is_left_out_and_comes_back(
    servers: Replication, caplog: pytest.LogCaptureFixture
) -> None:
    with family(servers, max_lag=0.5), caplog.at_level("INFO", "pgbackend.replicas"):
        caught_up()
        with lagging(servers, both=False):
            with routers.use_token():  # another request
                Tag.objects.create(name="far")
            with routers.use_token():
                wait_for(lambda: "behind" in str(why_not("replica")), "it is too far behind", 10)
                assert {goes_to() for _ in range(4)} == {"second"}
        caught_up()
    assert "'replica' is left out: it is" in caplog.text
    assert "'replica' is read from again" in caplog.text


@pytest.mark.slow
def test_a_replica_that_stops_fails_no_read_and_comes_back(pair: Replication, run: Runner) -> None:
    def reads(number: int) -> set[str]:
        return {read_from(Tag.objects.all()) for _ in range(number)}

    async def main() -> None:
        assert await aio.run(reads, 4) == REPLICAS
        await asyncio.to_thread(pair.standby.stop)
        assert await aio.run(reads, 10) == {"second"}

    async def loaded() -> None:
        """Stop the standby in the midst of reads, of which those in flight may fail."""
        stopping = asyncio.create_task(asyncio.to_thread(pair.standby.stop))
        failures = 0
        while not stopping.done():
            try:
                await aio.run(reads, 1)
            except DatabaseError:
                failures += 1
        assert failures <= 1
        assert await aio.run(reads, 10) == {"second"}

    Tag.objects.create(name="a")
    caught_up()
    assert reads(4) == REPLICAS
    pair.standby.stop()
    assert reads(10) == {"second"}
    pair.standby.start()
    caught_up()
    run(main())
    pair.standby.start()
    caught_up()
    run(loaded())
    pair.standby.start()
    caught_up()
    assert reads(4) == REPLICAS


@pytest.mark.slow
def test_a_replica_that_falls_silent_is_left_out_and_comes_back(
    transactional_db: None, conninfo: str, run: Runner
) -> None:
    link = Link(conninfo)
    given = connections.settings["default"]["OPTIONS"]
    plain = {**given, "sslmode": "disable", "gssencmode": "disable"}
    place = {"HOST": "127.0.0.1", "PORT": str(link.port), "OPTIONS": plain}
    try:
        with routed({"replica": place}):
            wait_for_reads("replica")
            link.freeze()
            wait_for(lambda: goes_to() == "default", "it is left out", 10)
            assert "answer" in str(why_not("replica"))
            run.green(Tag.objects.count)
            link.thaw()
            wait_for_reads("replica")
    finally:
        link.close()


@pytest.mark.slow
def test_reads_go_on_while_the_primary_is_down(pair: Replication) -> None:
    Tag.objects.create(name="a")
    caught_up()
    pair.primary.stop()
    try:
        for _ in range(10):
            assert read_from(Tag.objects.all()) in REPLICAS
    finally:
        pair.primary.start()
        pair.wait_for_standby()
        connection.close()


@pytest.mark.slow
def test_reads_go_to_replicas_in_a_process_that_begins_while_the_primary_is_down(
    servers: Replication,
) -> None:
    servers.primary.stop()
    try:
        with family(servers):
            with routers.use_token():
                assert goes_to() in REPLICAS
            with routers.use_token(signing.dumps({"default": []}, salt="pgbackend.routers.token")):
                assert goes_to() == "default", "it may have what the replicas lack"
    finally:
        servers.primary.start()
        servers.wait_for_standby()


@pytest.mark.slow
def test_a_promotion_sends_nobody_to_a_stale_replica_or_for_ever_to_the_primary(
    django_db_blocker: Any,
) -> None:
    with django_db_blocker.unblock(), replication() as pair:
        make_tables(pair)
        with family(pair):
            Tag.objects.create(name="a")
            wait_for_reads("replica")
            ahead = signing.dumps({"default": [1, 1 << 40]}, salt="pgbackend.routers.token")
            with routers.use_token(ahead):
                assert {goes_to() for _ in range(5)} == {"default"}
            Tag.objects.create(name="before")
            token = routers.token()
            pair.primary.stop()
            pair.primary.follow(pair.standby)
            pair.promote()
            pair.primary, pair.standby = pair.standby, pair.primary
            # 'default' has no server now, and the replica is none any more.
            wait_for(lambda: routers.replica_states()[0].why_not is not None, "it is left out", 10)
            pair.primary, pair.standby = pair.standby, pair.primary
        with family(pair):
            assert goes_to() == "default", "the replica is down"
            pair.standby.start()
            pair.wait_for_standby()
            wait_for_reads("replica")
            for old in (token, ahead):
                with routers.use_token(old):
                    wait_for_reads("replica")
                    assert Tag.objects.filter(name="before").exists()
            pair.standby.pause()
            Tag.objects.create(name="after")
            assert read_from(Tag.objects.filter(name="after")) == "default"
            pair.standby.resume()
            wait_for_reads("replica")
            assert read_from(Tag.objects.filter(name="after")) == "replica"


@pytest.mark.slow
def test_an_idle_primary_at_the_begin_of_a_page_of_its_log_does_not_count_as_ahead(
    pair: Replication,
) -> None:
    Tag.objects.create(name="a")
    pair.primary.execute("SELECT pg_switch_wal()")
    raw("b")
    pair.primary.execute("SELECT pg_switch_wal()")
    caught_up()
    assert without_header(3 << 24 | 40, 8192, 1 << 24) == 3 << 24
    assert without_header((3 << 24) + 8192 + 24, 8192, 1 << 24) == (3 << 24) + 8192
    assert without_header((3 << 24) + 8192 + 40, 8192, 1 << 24) == (3 << 24) + 8192 + 40


@pytest.mark.slow
def test_an_ordinary_role_can_ask_for_positions(pair: Replication) -> None:
    pair.primary.execute("DROP ROLE IF EXISTS plain")
    pair.primary.execute("CREATE ROLE plain LOGIN")
    pair.primary.execute("GRANT SELECT, INSERT ON ALL TABLES IN SCHEMA public TO plain")
    settings = connections.settings
    routers.stop_monitors()
    for alias in ("default", *REPLICAS):
        settings[alias]["USER"] = "plain"
    caught_up()


# --- The rules of positions and times, without servers --------------------------------------------


def answer(timeline: int, lsn: int, behind: float | None = None) -> Answer:
    return Answer(is_replica=True, system=1, position=Position(timeline, lsn), behind=behind)


def test_a_position_covers_those_before_it_on_its_timeline_and_on_older_ones() -> None:
    assert Position(1, 10).covers(Position(1, 10))
    assert not Position(1, 9).covers(Position(1, 10))
    assert Position(2, 10).covers(Position(1, 10))
    assert not Position(1, 99).covers(Position(2, 10)), "it may have left before the switch"


def test_the_lag_is_the_age_of_what_is_missing() -> None:
    primary = Monitor("any")
    assert primary.lag_of(answer(1, 5, 1.0)) == float("inf"), "nothing is known yet"
    primary.samples = [Sample(float(at), at + 0.5, Position(1, at)) for at in range(10, 20)]
    assert primary.lag_of(answer(1, 19, 3600.0)) == 0, "the primary was idle"
    assert primary.lag_of(answer(1, 12, 3600.0)) == 7.0
    assert primary.lag_of(answer(1, 12, 0.1)) == 0.1
    assert primary.lag_of(answer(1, 1, 3600.0)) == 3600.0
    assert primary.lag_of(answer(1, 1)) == float("inf")
    assert primary.lag_of(answer(2, 19, 5.0)) == 0


def test_a_write_needs_the_first_position_that_was_asked_for_afterwards() -> None:
    primary = Monitor("any")
    assert primary.first_after(0.0) is None
    for at, lsn in ((1.0, 10), (2.0, 10), (3.0, 20), (4.0, 30)):
        primary._remember(at, Position(1, lsn))
    assert [primary.first_after(at) for at in (0.5, 1.5, 2.5, 4.0)] == [
        *(Position(1, 10), Position(1, 10), Position(1, 20), Position(1, 30))
    ]
    assert primary.first_after(4.5) is None
    primary._remember(5.0, Position(2, 25))
    assert primary.first_after(0.5) == Position(2, 25), "positions before a failover are void"
    for number in range(1000):
        primary._remember(6.0 + number / 100, Position(2, 30 + number))
    assert len(primary.samples) < 250
    assert primary.first_after(15.99) == Position(2, 1029)


# --- Settings, tests and tools --------------------------------------------------------------------


def test_replicas_take_no_part_in_migrations(alone: None) -> None:
    assert djangos_router.allow_migrate("replica", "library") is False
    assert djangos_router.allow_migrate("default", "library") is True


@pytest.mark.slow
def test_a_test_runner_makes_replicas_mirrors_whose_reads_go_to_the_primary(
    pair: Replication,
) -> None:
    caught_up()
    for alias in REPLICAS:
        assert connections[alias].settings_dict["TEST"]["MIRROR"] == "default"
        connections[alias].creation.set_as_test_mirror(connections["default"].settings_dict)
    assert {goes_to() for _ in range(4)} == {"default"}


@pytest.mark.parametrize(
    "changes, cure",
    [
        ({"HOST": "one,two"}, "an alias of each replica"),
        ({"OPTIONS": {"replica_of": "nowhere"}}, "no alias"),
        ({"OPTIONS": {"replica_of": "replica"}}, "leave it out"),
        ({"OPTIONS": {"replica_of": "other"}}, "is itself a replica"),
    ],
    ids=str,
)
def test_a_router_refuses_a_wrong_replica(changes: dict[str, Any], cure: str) -> None:
    with routed({"other": {}, "replica": {}}):
        connections.settings["replica"] |= changes
        with pytest.raises(ImproperlyConfigured, match=cure):
            routers.ReplicaRouter()


@pytest.mark.parametrize("lag", [0, -1, "1", True, float("nan")])
def test_a_router_refuses_a_wrong_lag(lag: Any) -> None:
    with pytest.raises(ImproperlyConfigured, match="seconds above 0"):
        routers.ReplicaRouter(max_lag=lag)


def test_a_router_is_named_in_the_settings(alone: None) -> None:
    with override_settings(DATABASE_ROUTERS=["pgbackend.routers.ReplicaRouter"]):
        wait_for_reads("replica")


def test_a_router_without_replicas_changes_nothing() -> None:
    router = routers.ReplicaRouter()
    assert router.db_for_read(Tag) is router.db_for_write(Tag) is None
    assert router.allow_migrate("default", "library") is None
    assert router.allow_relation(Tag(), Tag()) is None


@pytest.mark.slow
def test_the_tests_of_a_project_pass_unedited_when_it_has_a_replica(conninfo: str) -> None:
    settings = "shop.settings_with_replica"
    manage = ["-X", "dev", "-W", "error", "manage.py", "test", "django_tests"]
    pytests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--ds", settings]
    ended = run_all(
        [
            Program([*manage, "--settings", settings, "--parallel", "2"], PROJECT, name("manage")),
            Program(pytests, PROJECT / "pytest_django_tests", name("pytest")),
        ]
    )
    for program, passed in zip(ended, ("Ran 26 tests", "16 passed"), strict=True):
        said = program.output + program.errors
        assert program.returncode == 0 and passed in said, said


PROJECT = Path(__file__).parent / "project"


def name(runner: str) -> dict[str, str]:
    """Return the environment of a run, whose database is its own."""
    return {"SHOP_DATABASE": f"shop_replica_{runner}"}


def test_models_of_other_primaries_are_left_to_other_routers(alone: None) -> None:
    class Own(routers.ReplicaRouter):
        def primary_for(self, model: Any, **hints: Any) -> str | None:
            return "elsewhere" if model is Author else super().primary_for(model, **hints)

    router = Own(max_lag=5)
    assert router.max_lag == 5
    assert router.db_for_read(Author) == router.db_for_write(Author) == "elsewhere"
    assert router.db_for_write(Tag) == "default"
    foreign = Author()
    foreign._state.db = "elsewhere"
    assert router.db_for_read(Tag, instance=foreign) is None
    assert router.allow_relation(foreign, Tag()) is None
    assert router.allow_relation(foreign, foreign) is None


def test_nothing_is_imported_or_replaced_without_a_router() -> None:
    program = (
        "import os, sys, django; os.environ['DJANGO_SETTINGS_MODULE'] = 'tests.settings';"
        "django.setup(); from django.db import connection, router; connection.cursor;"
        "from tests.library.models import Tag; router.db_for_read(Tag);"
        "from pgbackend.driver.connection import Connection;"
        "assert not hasattr(Connection.wait, '__wrapped__');"
        "loaded = [name.removeprefix('pgbackend.').partition('.')[0] for name in sys.modules];"
        "print({'replicas', 'routers'} & {*loaded})"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "set()"
