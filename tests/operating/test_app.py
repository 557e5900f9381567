"""Tests the optional app: it changes nothing but what it adds, and installs the hooks early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.operating.projects import Project, own_database
from tests.support.processes import run_all

SQLITE = {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}


def a_project(path: Path, name: str, **settings: Any) -> Project:
    home = path / name
    home.mkdir()
    return Project(home, **settings)


@pytest.mark.slow
def test_projects_with_and_without_the_app_start_and_need_no_migration(tmp_path: Path) -> None:
    auth = ["django.contrib.contenttypes", "django.contrib.auth"]
    projects = [
        a_project(tmp_path, "first", INSTALLED_APPS=["pgbackend", *auth]),
        a_project(tmp_path, "last", INSTALLED_APPS=[*auth, "pgbackend"]),
        a_project(tmp_path, "named", INSTALLED_APPS=["pgbackend.apps.PgbackendConfig"]),
        a_project(tmp_path, "without", INSTALLED_APPS=auth),
        a_project(tmp_path, "sqlite", DATABASES={"default": SQLITE}),
        a_project(tmp_path, "none", DATABASES={}),
    ]
    # The command runs the system checks first.
    done = run_all(each.command("makemigrations", "--check", "--dry-run") for each in projects)
    for each in done:
        assert each.check() == "No changes detected\n"


@pytest.mark.slow
def test_an_engine_of_others_that_cannot_be_loaded_is_left_to_django(tmp_path: Path) -> None:
    broken = {"ENGINE": "no_such_engine", "NAME": "x"}
    project = a_project(tmp_path, "p", DATABASES={"default": SQLITE, "other": broken})
    code = "from django.db import connection; connection.cursor(); print('works')"
    assert project.script(code) == "works\n"


@pytest.mark.slow
def test_a_project_on_another_engine_gets_neither_hooks_nor_a_socket(tmp_path: Path) -> None:
    project = a_project(tmp_path, "p", DATABASES={"default": SQLITE})
    said = project.script(
        "import sys\n"
        "from django.core.signals import request_started\n"
        "print('pgbackend.base' in sys.modules, 'pgbackend.operating.control' in sys.modules)\n"
    )
    assert said == "False False\n"


_VIEWS = """
import threading
from django.db import connections
from django.http import JsonResponse
from django.urls import path

started = []
start = threading.Thread.start
def noted(thread):
    if thread.name != "pgbackend.control":
        started.append(thread.name)
    start(thread)
threading.Thread.start = noted

async def view(request):
    with connections["other"].cursor() as cursor:
        cursor.execute("SELECT 1")
        return JsonResponse({"row": cursor.fetchone()[0], "threads": started})

urlpatterns = [path("", view)]
"""

_ONE_REQUEST = """
import asyncio
from django.core.asgi import get_asgi_application
application = get_asgi_application()

async def main():
    sent, messages = [], [{"type": "http.request", "body": b""}]
    async def receive():
        if not messages:
            await asyncio.Event().wait()  # the client stays
        return messages.pop()
    async def send(message):
        sent.append(message)
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b"",
             "http_version": "1.1", "asgi": {"version": "3.0"}}
    await application(scope, receive, send)
    print(sent[0]["status"], sent[1]["body"].decode())

asyncio.run(main())
"""


@pytest.mark.slow
def test_hooks_are_there_before_the_first_request_although_nothing_touches_the_alias(
    tmp_path: Path,
) -> None:
    # The default alias has another engine, and no model looks at the other one while Django starts.
    project = a_project(tmp_path, "p", DATABASES={"default": SQLITE, "other": own_database()})
    project.write("views", _VIEWS)
    assert project.script(_ONE_REQUEST).startswith('200 {"row": 1')


@pytest.mark.slow
def test_an_async_view_runs_on_the_loop_with_the_app(tmp_path: Path) -> None:
    project = a_project(tmp_path, "p")
    project.write("views", _VIEWS.replace('"other"', '"default"'))
    assert project.script(_ONE_REQUEST) == '200 {"row": 1, "threads": []}\n'
