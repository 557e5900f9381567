"""Tests the views of liveness and readiness: in each kind of server, with each kind of failure."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import pytest
from django.core.exceptions import ImproperlyConfigured
from django.db import connection, connections, transaction
from django.db.backends.signals import connection_created
from django.test import AsyncClient, Client, override_settings
from django.urls import path

import pgbackend
from pgbackend import aio, health, thread_probes
from pgbackend.driver import loops
from pgbackend.replicas import writes
from tests import urls
from tests.conftest import Runner, wait_for
from tests.library.models import Tag
from tests.operating.holders import hold, holders, waiting
from tests.support.fixtures import Site, by_link, pool_of_default, settings_of_default
from tests.support.link import Link
from tests.support.ports import free_port

SECRET = "correct horse"
#: A limit of probes that find nothing, in seconds.
SHORT = 0.2


def view_of(view: Any) -> Any:
    """Return URLs in which ``/ready/`` is `view`, and the rest is as it is."""
    return type("urls", (), {"urlpatterns": [path("ready/", view), *urls.urlpatterns]})


@pytest.fixture(autouse=True)
def _nothing_found_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_last", {})


async def look(client: Any = None, url: str = "/health/ready/") -> tuple[int, dict[str, Any]]:
    answer = await (client or AsyncClient()).get(url)
    return answer.status_code, json.loads(answer.content)


def state(body: dict[str, Any], alias: str = "default") -> str:
    return body["databases"][alias]["state"]


# --- A process that serves --------------------------------------------------------------------


def test_a_process_that_serves_is_alive_and_ready(run_once: Runner, site: Site) -> None:
    async def main() -> None:
        async with site() as client:
            alive = await client.get("/health/live/")
            assert (alive.status_code, alive.json()) == (200, {"status": "alive"})
            assert pgbackend.statistics() == []  # no database was asked
            ready = await client.get("/health/ready/")
            assert ready.status_code == 200
            body = ready.json()
            assert body["databases"]["default"].pop("ms") >= 0
            assert body == {"status": "ready", "databases": {"default": {"state": "ok"}}}
            for answer in (alive, ready):
                assert answer.headers["cache-control"] == "no-store"
                assert not {"set-cookie", "location"} & answer.headers.keys()

    run_once(main())


@pytest.mark.parametrize("name", ["live", "ready"])
def test_both_answer_with_and_without_a_slash_to_get_and_head_only(
    run_once: Runner, name: str
) -> None:
    async def main() -> None:
        client = AsyncClient()
        for url in (f"/health/{name}", f"/health/{name}/"):
            assert (await client.get(url)).status_code == 200
            head = await client.head(url)
            assert (head.status_code, head.content) == (200, b"")
            refused = await client.post(url)
            assert (refused.status_code, refused["Allow"]) == (405, "GET, HEAD")

    run_once(main())


def test_the_probe_starts_no_thread_and_leaves_the_session_clean(
    run: Runner, threads: list[str]
) -> None:
    async def main() -> None:
        for _ in range(3):
            assert (await look())[0] == 200
        (record,) = pgbackend.statistics()
        assert (record.connections_made, record.leased, record.idle) == (1, 0, 1)

    run(main())
    assert threads == []


def test_the_whole_stack_asks_its_pool(run: Runner, threads: list[str]) -> None:
    async def main() -> None:
        transport = httpx.ASGITransport(app=pgbackend.get_asgi_application())
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            answer = await client.get("/health/ready/")
            assert (answer.status_code, state(answer.json())) == (200, "ok")
        assert pgbackend.statistics()[0].requests == 1

    run(main())
    assert threads == []


def test_sync_servers_ask_by_a_connection_of_a_thread(django_db_blocker: Any) -> None:
    connection.close()
    for url in ("/health/live/", "/health/ready/"):
        answer = Client().get(url)
        assert answer.status_code == 200
    assert state(answer.json()) == "ok"
    assert connection.connection is None  # the request's own thread has sent nothing
    assert pgbackend.statistics() == []


@contextmanager
def alias(name: str, **changes: Any) -> Iterator[None]:
    """Add an alias, with the settings of 'default' but for `changes`."""
    default = connections.settings["default"]
    connections.settings[name] = {**default, "TEST": {**default["TEST"]}, **changes}
    try:
        yield
    finally:
        writes.uninstall()  # which an alias that is a replica has installed
        connections[name].close()
        getattr(connections[name], "close_pool", lambda: None)()
        del connections[name], connections.settings[name]


def test_other_databases_are_asked_too_and_may_be_named(run_once: Runner, tmp_path: Path) -> None:
    sqlite = "django.db.backends.sqlite3"
    with alias("lite", ENGINE=sqlite, NAME=str(tmp_path / "lite.db"), OPTIONS={}):
        status, body = run_once(look())
        assert (status, state(body), state(body, "lite")) == (200, "ok", "ok")
        with override_settings(ROOT_URLCONF=view_of(health.readiness("lite"))):
            assert [*run_once(look(url="/ready/"))[1]["databases"]] == ["lite"]


def test_a_replica_is_left_out_unless_it_is_named(run_once: Runner) -> None:
    options = {**connections.settings["default"]["OPTIONS"], "replica_of": "default"}
    with alias("replica", OPTIONS=options):
        assert [*run_once(look())[1]["databases"]] == ["default"]
        named = health.readiness(["replica"])
        with override_settings(ROOT_URLCONF=view_of(named)):
            assert [*run_once(look(url="/ready/"))[1]["databases"]] == ["replica"]


def test_no_required_login_reaches_the_views(settings: Any) -> None:
    required = "django.contrib.auth.middleware.LoginRequiredMiddleware"
    settings.MIDDLEWARE = [*settings.MIDDLEWARE, required]
    assert Client().get("/health/ready/").status_code == 200


@pytest.mark.parametrize("client", ["sync", "async"])
def test_atomic_requests_of_no_alias_reach_the_views(
    run_once: Runner, tmp_path: Path, client: str
) -> None:
    """Django refuses async views where another engine has ATOMIC_REQUESTS."""
    opened: list[str] = []
    enter = transaction.Atomic.__enter__

    def recorded(self: transaction.Atomic) -> None:
        opened.append(str(self.using))
        enter(self)

    lite = {"ENGINE": "django.db.backends.sqlite3", "NAME": str(tmp_path / "lite.db")}
    with (
        alias("lite", **lite, OPTIONS={}, ATOMIC_REQUESTS=True),
        settings_of_default(ATOMIC_REQUESTS=True),
        pytest.MonkeyPatch.context() as patched,
    ):
        patched.setattr(transaction.Atomic, "__enter__", recorded)
        for url in ("/health/live/", "/health/ready/"):
            answer = Client().get(url) if client == "sync" else run_once(AsyncClient().get(url))
            assert answer.status_code == 200
    assert opened == []


# --- Pools that are full ----------------------------------------------------------------------


@pytest.mark.parametrize(("is_ready", "expected"), [(True, 200), (False, 503)])
def test_a_full_pool_whose_connections_come_free_is_busy(
    run_once: Runner, is_ready: bool, expected: int
) -> None:
    async def main() -> None:
        async with holders(4, queued=2) as ends:
            looking = asyncio.create_task(look(url="/ready/"))
            await waiting(3)
            ends[0].set()  # one of the two before it gets the connection
            status, body = await looking
            assert (status, state(body)) == (expected, "busy")
            assert body["status"] == ("ready" if is_ready else "not ready")

    view = health.readiness(timeout=SHORT, busy_is_ready=is_ready)
    with override_settings(ROOT_URLCONF=view_of(view)):
        run_once(main())


@pytest.mark.parametrize("timeout", [5.0, SHORT / 4])
def test_a_full_pool_that_lends_nothing_is_exhausted_whichever_limit_ends_first(
    run_once: Runner, timeout: float
) -> None:
    async def main() -> None:
        async with holders(4):
            (pool,) = loops.open_pools()
            pool._psycopg.timeout = timeout  # not before: the holders took what time they needed
            status, body = await look(url="/ready/")
            assert (status, state(body)) == (503, "exhausted")

    with override_settings(ROOT_URLCONF=view_of(health.readiness(timeout=SHORT))):
        run_once(main())


def test_the_log_says_when_the_process_is_not_ready_and_when_it_is_again(
    run_once: Runner, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with holders(4):
            for _ in range(2):
                assert (await look(url="/ready/"))[0] == 503
            assert pgbackend.statistics()[0].waiting == 0  # the probe has left the queue
        assert (await look(url="/ready/"))[0] == 200

    view = view_of(health.readiness(timeout=SHORT))
    with override_settings(ROOT_URLCONF=view), caplog.at_level(logging.INFO, "pgbackend.health"):
        run_once(main())
    said = [record.getMessage() for record in caplog.records if record.name == "pgbackend.health"]
    assert said == [
        "not ready, because of the database 'default': exhausted",
        "the database 'default' serves again: ok",
    ]


def test_a_connection_that_comes_free_in_time_is_taken(run_once: Runner) -> None:
    async def main() -> None:
        async with holders(4) as ends:
            looking = asyncio.create_task(look())
            await waiting(1)
            ends[0].set()
            status, body = await looking
            assert (status, state(body)) == (200, "ok")

    run_once(main())


def test_probes_at_the_same_time_share_one_statement(run: Runner) -> None:
    async def main() -> None:
        answers = await asyncio.gather(*(look() for _ in range(50)))
        assert {status for status, _ in answers} == {200}
        assert pgbackend.statistics()[0].requests == 1

    run(main())


def test_a_queue_that_is_full_is_told_at_once(run_once: Runner) -> None:
    async def main() -> None:
        async with holders(1, queued=1):
            status, body = await look()
            assert (status, state(body)) == (503, "exhausted")

    with pool_of_default(max_size=1, max_waiting=1):
        run_once(main())


def test_a_probe_of_a_client_that_hangs_up_goes_on_for_the_others(run: Runner) -> None:
    async def main() -> None:
        async with holders(4) as ends:
            first = asyncio.create_task(look())
            await waiting(1)
            second = asyncio.create_task(look())
            await asyncio.sleep(0)
            first.cancel()
            await asyncio.wait([first])
            ends[0].set()
            assert (await second)[0] == 200

    run(main())


def test_a_loop_that_ends_amid_a_probe_leaves_nothing(run: Runner) -> None:
    async def main() -> None:
        go_on, held = asyncio.Event(), asyncio.Event()
        holding = asyncio.create_task(hold(go_on, held))
        await held.wait()
        looking = asyncio.create_task(look())
        await waiting(1)
        assert not (holding.done() or looking.done())

    with pool_of_default(max_size=1):
        run(main())


def test_a_full_sync_pool_is_exhausted(run_once: Runner) -> None:
    """The sync pool is Django's own; each of its connections is held by a thread."""
    held, go_on = threading.Barrier(3), threading.Event()

    def hold_one() -> None:
        connection.ensure_connection()
        held.wait()
        go_on.wait()
        connection.close()

    with pool_of_default(min_size=0, max_size=2, timeout=3):
        connection.close()
        connections["default"].close_pool()
        threads = [threading.Thread(target=hold_one) for _ in range(2)]
        try:
            for thread in threads:
                thread.start()
            held.wait()
            with override_settings(ROOT_URLCONF=view_of(health.readiness(timeout=SHORT))):
                answer = Client().get("/ready/")
            assert (answer.status_code, state(answer.json())) == (503, "exhausted")
        finally:
            go_on.set()
            for thread in threads:
                thread.join()
            wait_for(lambda: Client().get("/health/ready/").status_code == 200, "ready again")
            connection.close()
            connections["default"].close_pool()


# --- Servers that fail ------------------------------------------------------------------------


@contextmanager
def no_server(**more: Any) -> Iterator[None]:
    """Lead 'default' to a port where nothing listens."""
    with settings_of_default(HOST="127.0.0.1", PORT=str(free_port()), PASSWORD=SECRET, **more):
        yield


@pytest.mark.parametrize("server", ["async", "sync"])
def test_a_server_that_is_not_there_is_told_soon_and_without_its_name(
    run_once: Runner, server: str, caplog: pytest.LogCaptureFixture
) -> None:
    connection.close()
    connections["default"].close_pool()
    # Django's sync pool would not tell that its attempts fail: then the state is "timeout".
    more = {"OPTIONS": {}} if server == "sync" else {}
    with no_server(NAME="pantry", USER="cook", **more):
        began = monotonic()
        answer = (
            Client().get("/health/ready/")
            if server == "sync"
            else run_once(asyncio.wait_for(AsyncClient().get("/health/ready/"), 10))
        )
        assert monotonic() - began < 1.0
    assert answer.status_code == 503
    assert state(json.loads(answer.content)) == "outage"
    for secret in (SECRET, "127.0.0.1", "pantry", "cook", "refused"):
        assert secret not in answer.content.decode()
    said = [record for record in caplog.records if record.name == "pgbackend.health"]
    assert [record.levelname for record in said] == ["WARNING"]
    assert SECRET not in caplog.text
    # Django would log an error for each 503, and mail it to the project's admins.
    assert not [record for record in caplog.records if record.name == "django.request"]


def test_the_error_is_told_while_debug_is_on(run_once: Runner, settings: Any) -> None:
    settings.DEBUG = True
    with no_server():
        _, body = run_once(look())
    error = body["databases"]["default"]["error"]
    assert "refused" in error
    assert SECRET not in error


def test_an_outage_is_told_at_once_and_its_end_is_found_by_the_probe_itself(
    run_once: Runner, link: Link
) -> None:
    async def main() -> None:
        assert (await look())[0] == 200
        link.cut()
        assert (await look())[1]["status"] == "not ready"
        # From the first failed attempt on, the outage is known.
        began = monotonic()
        answers = [await look() for _ in range(5)]
        assert {state(body) for _, body in answers} == {"outage"}
        assert monotonic() - began < 5
        link.restore()
        while (await look())[0] != 200:  # nobody else asks
            await asyncio.sleep(0.01)

    with by_link(link):
        run_once(main())


def health_threads() -> list[str]:
    return [each.name for each in threading.enumerate() if "pgbackend.health" in each.name]


def test_a_thread_that_a_silent_link_holds_up_is_replaced(
    link: Link, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The link falls silent after the set-up of a connection; new connections pass it."""
    freezing = [link]

    def freeze(**_: Any) -> None:
        if freezing:
            freezing.pop().freeze(new=False)

    connection.close()
    connections["default"].close_pool()
    url = view_of(health.readiness(timeout=SHORT))
    options = {"OPTIONS": {"sslmode": "disable", "gssencmode": "disable"}}
    place = {"HOST": "127.0.0.1", "PORT": str(link.port)}
    connection_created.connect(freeze)
    try:
        with settings_of_default(**place, **options), override_settings(ROOT_URLCONF=url):
            for _ in range(2):  # they share the thread
                answer = Client().get("/ready/")
                assert (answer.status_code, state(answer.json())) == (503, "timeout")
            (held,) = thread_probes._running.values()
            monkeypatch.setattr(thread_probes, "GIVEN_UP", 0.0)
            assert Client().get("/ready/").status_code == 200
            assert held.future.result(5).state == "error"  # its wait has ended
            wait_for(lambda: not health_threads(), "the threads have ended")
    finally:
        connection_created.disconnect(freeze)
    assert "exception calling callback" not in caplog.text


def test_a_silent_link_is_bounded(run: Runner, link: Link) -> None:
    view = health.readiness(timeout=SHORT)

    async def main() -> None:
        assert (await look(url="/ready/"))[0] == 200
        link.freeze()
        began = monotonic()
        status, body = await look(url="/ready/")
        assert (status, state(body)) == (503, "timeout")
        assert monotonic() - began < 2
        link.thaw()
        while (await look(url="/ready/"))[0] != 200:
            await asyncio.sleep(0.01)

    with by_link(link), override_settings(ROOT_URLCONF=view_of(view)):
        run(main())


def test_a_wrong_password_is_told_at_once(run_once: Runner, conninfo: str) -> None:
    async def main() -> None:
        began = monotonic()
        status, body = await look()
        assert (status, state(body)) == (503, "outage")
        assert monotonic() - began < 1.0

    with settings_of_default(USER="nobody_of_this_name", PASSWORD=SECRET):
        run_once(main())


def test_a_wrong_option_is_an_error(run_once: Runner) -> None:
    given = connections.settings["default"]["OPTIONS"]
    with settings_of_default(OPTIONS={**given, "session_reset": "at times"}):
        status, body = run_once(look())
    assert (status, state(body)) == (503, "error")


def test_a_pool_that_closes_is_closed(run_once: Runner) -> None:
    async def main() -> None:
        assert (await look())[0] == 200
        (pool,) = loops.open_pools()
        pool.close()
        status, body = await look()
        assert (status, state(body)) == (503, "closed")

    run_once(main())


# --- The end of a process ---------------------------------------------------------------------


@pytest.fixture
def _running_on() -> Iterator[None]:
    yield
    health._Shutdown.begun = False


@pytest.mark.usefixtures("_running_on")
def test_a_process_that_is_about_to_end_lives_and_is_not_ready(run_once: Runner) -> None:
    async def main() -> None:
        assert (await look())[0] == 200
        health.begin_shutdown()
        assert await look() == (503, {"status": "not ready", "reason": "shutting down"})
        assert (await look(url="/health/live/"))[0] == 200
        assert await aio.run(Tag.objects.count) == 0  # requests that came before are served

    run_once(main())


def test_a_file_takes_all_processes_out(run_once: Runner, tmp_path: Path) -> None:
    file = tmp_path / "stop"
    with override_settings(ROOT_URLCONF=view_of(health.readiness(stop_file=file))):
        assert run_once(look(url="/ready/"))[0] == 200
        file.touch()
        assert run_once(look(url="/ready/"))[0] == 503
        assert Client().get("/ready/").status_code == 503


def test_after_drain_the_process_is_ready_with_new_connections(run_once: Runner) -> None:
    async def main() -> None:
        assert (await look())[0] == 200
        pgbackend.drain()
        assert (await look())[0] == 200
        assert pgbackend.statistics()[0].connections_made == 2

    run_once(main())


# --- Options ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"using": ["elsewhere"]}, "names 'elsewhere', which DATABASES lacks: it has 'default'"),
        ({"timeout": 0}, "above 0"),
        ({"timeout": True}, "number of seconds"),
        ({"timeout": "2"}, "number of seconds"),
    ],
)
def test_wrong_options_are_refused_when_the_urls_are_read(
    options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ImproperlyConfigured, match=said):
        health.readiness(**options)
