"""Tests the admin's page "Connections": its permission, its contents, and a pool that is full."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from django.contrib import admin
from django.contrib.auth.models import Permission, User
from django.core import signing
from django.core.management import call_command
from django.db import Error, connection, connections, models, transaction
from django.test import Client, override_settings
from django.urls import path

import pgbackend
from pgbackend import metrics, panel, passes
from pgbackend.admin import ConnectionsAdmin
from pgbackend.models import Connections
from proj import settings as proj_settings
from tests import urls
from tests.conftest import Runner
from tests.library.models import Tag
from tests.operating.holders import holders
from tests.support.fixtures import Site, by_link, settings_of_default
from tests.support.link import Link

PAGE = "/admin/pgbackend/connections/"
SECRET = "correct horse"
LIVE, DUMP = f"{PAGE}live/", f"{PAGE}dump/"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def chef() -> User:
    return User.objects.create_superuser("chef", password="quince")


def signed_in(user: User) -> str:
    """Return the session cookie of `user`."""
    client = Client()
    client.force_login(user)
    return client.cookies["sessionid"].value


Get = Callable[..., Awaitable[httpx.Response]]


@pytest.fixture(params=["default", "whole stack"])
def get(request: pytest.FixtureRequest) -> Get:
    """Return a function that asks one of the two ASGI applications, in this process."""
    from proj.asgi import application

    app = application if request.param == "default" else pgbackend.get_asgi_application()

    async def get(url: str, cookie: str, given: str = "") -> httpx.Response:
        headers = {"Cookie": f"sessionid={cookie}", passes.HEADER: given}
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get(url, headers=headers)

    return get


def pass_in(page: str) -> str:
    found = re.search(r'data-pass="([^"]+)"', page)
    assert found
    return found[1]


def cells(data: dict[str, Any], table: str) -> list[list[str]]:
    return [row["cells"] for row in data["tables"][table]]


# --- Who may see it -----------------------------------------------------------------------------


def test_the_index_names_the_page_under_a_heading_of_its_own(chef: User) -> None:
    client = Client()
    client.force_login(chef)
    index = client.get("/admin/").content.decode()
    assert "PostgreSQL connections" in index
    assert f'href="{PAGE}"' in index
    assert f'href="{PAGE}add/"' not in index
    assert client.get("/admin/pgbackend/").status_code == 200
    for url in ("add/", "1/change/", "1/delete/"):
        assert client.get(PAGE + url).status_code in {302, 404}


@pytest.mark.parametrize("url", [PAGE, LIVE, DUMP])
def test_only_staff_with_the_permission_see_it(chef: User, url: str) -> None:
    permission = Permission.objects.get(codename="view_connections")
    allowed = User.objects.create_user("allowed", is_staff=True)
    allowed.user_permissions.add(permission)
    staff = User.objects.create_user("staff", is_staff=True)
    guest = User.objects.create_user("guest")
    guest.user_permissions.add(permission)
    for user, expected in ((chef, 200), (allowed, 200), (staff, 403), (guest, 302), (None, 302)):
        client = Client()
        if user is not None:
            client.force_login(user)
        status = client.get(url).status_code
        assert status == (403 if url == LIVE and expected == 302 else expected), user
        if status == 200:
            assert client.post(url).status_code in {403, 405}
            assert "no-store" in client.get(url)["Cache-Control"]


def test_another_admin_site_may_have_the_page(chef: User) -> None:
    site = admin.AdminSite("back")
    site.register(Connections, ConnectionsAdmin)
    patterns = [path("back/", site.urls), *urls.urlpatterns]
    with override_settings(ROOT_URLCONF=type("urls", (), {"urlpatterns": patterns})):
        client = Client()
        client.force_login(chef)
        page = client.get("/back/pgbackend/connections/").content.decode()
        assert 'data-live="/back/pgbackend/connections/live/"' in page
        headers = {passes.HEADER: pass_in(page)}
        assert client.get("/back/pgbackend/connections/live/", headers=headers).status_code == 200
        other = Client()
        other.cookies["sessionid"] = "unknown"
        assert other.get(LIVE, headers=headers).status_code == 403


# --- The contents -------------------------------------------------------------------------------


def test_the_page_shows_pools_leases_and_the_queue(run: Runner, get: Get, chef: User) -> None:
    cookie = signed_in(chef)

    async def main() -> None:
        async with holders(4, queued=1):
            shown = panel.contents()
            (now,) = cells(shown, "now")
            assert now[:6] == ["default", "4", "0", "4", "4", "1"]
            assert now[6] == "all connections are in use"
            (first, *_) = leases = cells(shown, "leases")
            assert len(leases) == 4
            assert "idle in a transaction for" in first[3]
            assert Path(__file__).with_name("holders.py").name in first[4]
            assert cells(shown, "waiting")[0][0] == "default"
            json.dumps(shown)
        page = await get(PAGE, cookie)
        assert page.status_code == 200
        for table in panel.TABLES:
            assert f">{table.caption}</caption>" in page.text
        assert "PostgreSQL 1" in page.text  # the server was asked
        assert str(metrics.connections().max) in page.text

    run(main())


def test_the_request_that_waits_is_named_by_its_path_alone(
    run_once: Runner, get: Get, chef: User
) -> None:
    cookie = signed_in(chef)

    async def main() -> None:
        async with holders(4):
            asking = asyncio.create_task(get("/?password=secret", cookie))
            while not pgbackend.statistics()[0].waiting:
                await asyncio.sleep(0.001)
            ((_, task, *_),) = cells(panel.contents(), "waiting")
            assert "GET /)" in task
            assert "secret" not in pgbackend.dump()
        assert (await asking).status_code == 200

    run_once(main())


def test_an_outage_is_shown_without_a_password(run_once: Runner, link: Link) -> None:
    async def main() -> None:
        await Tag.objects.acount()
        link.cut()
        while not any(each.outage for each in panel.take(0)):
            with contextlib.suppress(Error, TimeoutError):
                await asyncio.wait_for(Tag.objects.acount(), 0.2)
        (row,) = panel.contents()["tables"]["now"]  # type: ignore[index]
        assert row["alert"]
        assert "no connection can be opened, for" in row["cells"][6]
        assert SECRET not in json.dumps(panel.contents())
        assert panel.is_short()

    with by_link(link), settings_of_default(PASSWORD=SECRET):
        run_once(main())


def test_sync_servers_show_the_connections_of_threads(chef: User, settings: Any) -> None:
    settings.MIDDLEWARE = proj_settings.MIDDLEWARE  # without async middleware
    client = Client()
    client.force_login(chef)
    page = client.get(PAGE).content.decode()
    assert "No pool is open" in page
    assert "connections in use; " in page  # of the server, asked by this thread's connection
    data = client.get(LIVE).json()
    assert data["facts"]["Open connections"].split()[0] != "0"
    assert cells(data, "now") == []


def test_the_shortcuts_that_are_off_are_shown_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    off = {"name": "rows", "on": False, "why_off": "switched off by a test"}
    monkeypatch.setattr(panel, "listed", lambda: [off, {"name": "select", "on": True}])
    shown = panel.contents()
    assert cells(shown, "shortcuts") == [["rows", "switched off by a test"]]
    assert shown["facts"]["Shortcuts"] == "1 of 2 are on"  # type: ignore[index]


def test_pools_of_several_loops_are_told_apart_by_their_threads(run_once: Runner) -> None:
    async def count_and_wait(go_on: asyncio.Event, opened: threading.Event) -> None:
        await Tag.objects.acount()
        opened.set()
        await go_on.wait()

    def other(loop: asyncio.AbstractEventLoop, go_on: asyncio.Event) -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(count_and_wait(go_on, opened))

    opened, loop, go_on = threading.Event(), asyncio.new_event_loop(), asyncio.Event()
    thread = threading.Thread(target=other, args=(loop, go_on), name="other")
    thread.start()

    async def main() -> None:
        await asyncio.to_thread(opened.wait)
        await Tag.objects.acount()
        names = [row[0] for row in cells(panel.contents(), "now")]
        assert sorted(names) == ["default in 'MainThread'", "default in 'other'"]

    try:
        run_once(main())
    finally:
        loop.call_soon_threadsafe(go_on.set)
        thread.join()


def test_an_alias_with_wrong_options_does_not_break_the_page(
    run_once: Runner, get: Get, chef: User
) -> None:
    cookie = signed_in(chef)
    default = connections.settings["default"]
    wrong = {**default, "TEST": {**default["TEST"]}, "OPTIONS": {"session_reset": "at times"}}
    connections.settings["wrong"] = wrong
    try:
        page = run_once(get(PAGE, cookie))
        assert page.status_code == 200
        assert "Server of wrong" in page.text
        assert [row[0] for row in cells(run_once(_contents()), "now")] == []
    finally:
        del connections.settings["wrong"]


async def _contents() -> dict[str, Any]:
    return panel.contents()


def test_long_lists_are_cut(run_once: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panel, "MOST", 2)

    async def main() -> None:
        async with holders(4, queued=3):
            shown = panel.contents()
            assert [row[1] for row in cells(shown, "leases")][2:] == ["and 2 more"]
            assert [row[1] for row in cells(shown, "waiting")][2:] == ["and 1 more"]

    run_once(main())


@pytest.mark.parametrize(
    ("value", "text"), [(0.04, "0.0 s"), (59.96, "60.0 s"), (61, "1 min 1 s"), (7260, "2 h 1 min")]
)
def test_times_are_short_texts(value: float, text: str) -> None:
    assert panel.seconds(value) == text


def test_the_page_opens_under_djangos_handler_while_the_pool_is_full(
    run_once: Runner, site: Site, chef: User
) -> None:
    """Open the page, whose view runs in a thread there, with a connection of sync code."""
    cookie = signed_in(chef)

    async def main() -> None:
        async with holders(4), site() as client:
            asking = client.get(PAGE, headers={"Cookie": f"sessionid={cookie}"})
            page = await asyncio.wait_for(asking, 4)
            assert page.status_code == 200
            assert "all connections are in use" in page.text

    run_once(main())


def test_the_page_has_nothing_that_a_strict_content_security_policy_forbids() -> None:
    template = (Path(panel.__file__).parent / "templates/pgbackend/connections.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:|https?://", template)
    assert re.findall(r"<script(?! src=)", template) == []


# --- Passes -------------------------------------------------------------------------------------


def test_the_live_view_asks_no_database_while_it_has_a_fresh_pass(
    run: Runner, get: Get, chef: User, leases: list[Any]
) -> None:
    cookie = signed_in(chef)

    async def main() -> None:
        given = pass_in((await get(PAGE, cookie)).text)
        leases.clear()
        queries = len(connection.queries_log)
        for _ in range(3):
            data = (await get(LIVE, cookie, given)).json()
            assert data["pass"] == given
        assert (await get(DUMP, cookie, given)).text.startswith("pgbackend in process")
        assert leases == []
        assert len(connection.queries_log) == queries

    run(main())


def test_the_live_view_answers_while_the_pool_is_full(
    run: Runner, get: Get, chef: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    cookie = signed_in(chef)

    async def main() -> None:
        given = pass_in((await get(PAGE, cookie)).text)
        monkeypatch.setattr(passes, "RENEW", -1)  # each pass is too old for quiet times
        renewed = (await get(LIVE, cookie, given)).json()["pass"]
        assert renewed
        async with holders(4, queued=2):
            data = (await asyncio.wait_for(get(LIVE, cookie, given), 4)).json()
            assert len(cells(data, "leases")) == 4
            assert data["pass"] == given  # none is given without the permission

    run(main())


def test_atomic_requests_open_no_transaction_for_what_a_pass_opens(
    chef: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a sync server a transaction begins at once, and would wait for a connection."""
    opened: list[str] = []
    client = Client()
    client.force_login(chef)
    given = {passes.HEADER: pass_in(client.get(PAGE).content.decode())}
    monkeypatch.setattr(transaction.Atomic, "__enter__", lambda self: opened.append(self.using))
    monkeypatch.setattr(transaction.Atomic, "__exit__", lambda *_: None)
    with settings_of_default(ATOMIC_REQUESTS=True):
        for url in (LIVE, DUMP):
            assert client.get(url, headers=given).status_code == 200
    assert opened == []


def test_a_pass_holds_for_its_session_and_its_time(
    run_once: Runner, get: Get, chef: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    cookie, other = signed_in(chef), signed_in(User.objects.create_user("guest"))

    async def main() -> None:
        given = pass_in((await get(PAGE, cookie)).text)
        assert cookie not in given
        assert (await get(LIVE, cookie, given)).status_code == 200
        assert (await get(LIVE, other, given)).status_code == 403
        assert (await get(LIVE, "", given)).status_code == 403
        for wrong in (given[:-1], f"{given}x", signing.TimestampSigner().sign("x"), ""):
            assert (await get(LIVE, other, wrong)).status_code == 403
        await User.objects.filter(pk=chef.pk).aupdate(is_active=False)
        assert (await get(LIVE, cookie, given)).status_code == 200  # for `RENEW` seconds
        monkeypatch.setattr(passes, "RENEW", -1)
        assert (await get(LIVE, cookie, given)).status_code == 403

    run_once(main())


# --- The app ------------------------------------------------------------------------------------


def test_the_model_has_no_table_and_no_changes_to_migrate(capsys: Any) -> None:
    call_command("makemigrations", "pgbackend", check=True)
    assert "No changes" in capsys.readouterr().out
    assert Connections._meta.db_table not in connection.introspection.table_names()
    call_command("sqlmigrate", "pgbackend", "0001")
    assert "CREATE TABLE" not in capsys.readouterr().out


def test_dumpdata_and_the_managers_find_no_rows(capsys: Any) -> None:
    for options in ({}, {"use_base_manager": True}):
        call_command("dumpdata", "pgbackend", **options)
        assert capsys.readouterr().out.strip() == "[]"
    assert Connections.objects.count() == 0
    assert list(Connections._base_manager.all()) == []
    assert isinstance(Connections._meta.default_manager, models.Manager)


_PROJECT = """
import sys
from django.conf import settings

settings.configure(
    SECRET_KEY="x",
    ROOT_URLCONF="project_urls",
    INSTALLED_APPS={apps},
    DATABASES={{"default": {{"ENGINE": "django.db.backends.sqlite3", "NAME": {name!r}}}}},
    TEMPLATES=[{{"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True,
        "OPTIONS": {{"context_processors": [
            "django.template.context_processors.request",
            "django.contrib.auth.context_processors.auth",
            "django.contrib.messages.context_processors.messages",
        ]}}}}],
    MIDDLEWARE=[
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
        "django.contrib.messages.middleware.MessageMiddleware",
    ],
    STATIC_URL="static/",
    ALLOWED_HOSTS=["*"],
)
import types
sys.modules["project_urls"] = urls = types.ModuleType("project_urls")
urls.urlpatterns = []
import django
django.setup()
from django.core.management import call_command
call_command("check")
call_command("migrate", verbosity=0)
"""
_ADMIN = [
    *("pgbackend", "django.contrib.admin", "django.contrib.auth", "django.contrib.contenttypes"),
    *("django.contrib.sessions", "django.contrib.messages"),
]


def _run(code: str, tmp_path: Path, apps: list[str]) -> str:
    source = _PROJECT.format(apps=apps, name=str(tmp_path / "db")) + code
    command = [sys.executable, "-W", "error", "-c", source]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_page_works_where_the_admin_is_on_another_engine(tmp_path: Path) -> None:
    code = """
from django.contrib import admin
from django.urls import path
urls.urlpatterns.append(path("admin/", admin.site.urls))
from django.contrib.auth.models import User
from django.test import Client
client = Client()
client.force_login(User.objects.create_superuser("chef"))
print("hooks", "pgbackend.hooks" in sys.modules)  # no database needs them
for url in ("", "live/", "dump/"):
    print(client.get("/admin/pgbackend/connections/" + url).status_code)
"""
    assert _run(code, tmp_path, _ADMIN).split()[-5:] == ["hooks", "False", *["200"] * 3]


@pytest.mark.slow
def test_the_app_needs_no_admin(tmp_path: Path) -> None:
    code = "print(django.apps.apps.get_app_config('pgbackend').verbose_name)"
    assert _run(code, tmp_path, ["pgbackend"]).splitlines()[-1] == "PostgreSQL connections"
