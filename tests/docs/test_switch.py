"""Tests docs/switch.md: its searches find what they should, and both engines share a database."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.contract.servers.running import environment
from tests.docs.snippets import ROOT
from tests.support.processes import Program, run_all

PAGE = (ROOT / "docs/switch.md").read_text()
SEARCHES = re.findall(r"^ {7}(grep (?:.*\\\n)*.*)$", PAGE, re.MULTILINE)
#: For each search, a line that it must find, and one that it must not.
LINES = [
    ('if engine == "django.db.backends.postgresql":', 'if connection.vendor == "postgresql":'),
    ("from psycopg2.extras import execute_values", "import psycopg"),
    ("by_thread[threading.get_ident()] = user", "state = threading.local()"),
    ("pgconn = connection.connection.pgconn", "connection.cursor()"),
    ("""cursor.execute("SET search_path TO one")""", 'cursor.execute("SELECT 1")'),
    ("answer = requests.get(url)", "answer = await client.get(url)"),
    ('os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"] = "1"', "async def view(request): ..."),
]


@pytest.mark.parametrize("number", range(len(LINES)))
def test_a_search_finds_what_it_is_for(tmp_path: Path, number: int) -> None:
    assert len(SEARCHES) == len(LINES)
    wanted, other = LINES[number]
    (tmp_path / "views.py").write_text(f"{wanted}\n{other}\n")
    done = subprocess.run(
        SEARCHES[number], shell=True, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == [f"./views.py:1:{wanted}"]
    assert done.stderr == ""


# --- Both engines on one database -----------------------------------------------------------------

_SETTINGS = """
import os
from pgbackend import embedded

SECRET_KEY = "tests"
INSTALLED_APPS = ["django.contrib.contenttypes", "django.contrib.auth", "django.contrib.sessions"]
database = {**embedded.database_settings(os.environ["DATABASE_URL"]), "NAME": os.environ["NAME"]}
DATABASES = {"default": {"ENGINE": os.environ["DATABASE_ENGINE"], **database}}
"""
OURS, STOCK = "pgbackend", "django.db.backends.postgresql"
#: What a database consists of: tables, constraints, indexes, functions, settings, extensions.
_CONTENT = """
SELECT 'column', table_name || '.' || column_name || ' ' || data_type
    || coalesce(column_default, '') || is_nullable || is_identity
    FROM information_schema.columns WHERE table_schema = 'public'
UNION ALL SELECT 'constraint', pg_get_constraintdef(c.oid) || conname FROM pg_constraint AS c
    WHERE connamespace = 'public'::regnamespace
UNION ALL SELECT 'index', indexdef FROM pg_indexes WHERE schemaname = 'public'
UNION ALL SELECT 'function', proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace
UNION ALL SELECT 'schema', nspname FROM pg_namespace WHERE nspname !~ '^pg_(toast|temp)'
UNION ALL SELECT 'extension', extname FROM pg_extension
UNION ALL SELECT 'setting', setconfig::text FROM pg_db_role_setting AS s
    JOIN pg_database AS d ON d.oid = s.setdatabase WHERE datname = current_database()
ORDER BY 1, 2
"""
_WRITE = """
import asyncio, django
django.setup()
from django.contrib.auth.models import User
user = asyncio.run(User.objects.acreate_user("{name}", password="secret"))
assert User.objects.filter(username__in=["first", "second", "third"]).count() == {count}
assert all(user.check_password("secret") for user in User.objects.all())
"""


class Project:
    """A small project on a database of its own."""

    def __init__(self, home: Path, name: str) -> None:
        self.home, self.name = home, name
        (home / "shop_settings.py").write_text(_SETTINGS)

    def manage(self, engine: str, *arguments: str) -> str:
        """Run ``manage.py`` with `arguments` on an engine; return its output."""
        return self._run(engine, "-m", "django", *arguments)

    def run(self, engine: str, script: str) -> None:
        self._run(engine, "-c", script)

    def _run(self, engine: str, *arguments: str) -> str:
        variables = environment(self.name, "shop_settings")
        variables |= {"NAME": self.name, "DATABASE_ENGINE": engine}
        variables["PYTHONPATH"] = f"{ROOT}:{self.home}"
        # Set by `env`, since `run_all()` takes the settings' name out.
        own = {key: variables[key] for key in ("NAME", "DATABASE_ENGINE", "DATABASE_URL")}
        script = "import os, runpy, sys; os.environ['DJANGO_SETTINGS_MODULE'] = 'shop_settings'; "
        if arguments[0] == "-c":
            script += arguments[1].strip()
            command: tuple[str, ...] = ("-c", script.replace("; \nimport", "\nimport"))
        else:
            command = ("-m", *arguments[1:], "--settings=shop_settings")
        (done,) = run_all(
            [Program(command, self.home, {**own, "PYTHONPATH": variables["PYTHONPATH"]})]
        )
        return done.check()


@pytest.fixture
def two(admin: psycopg.Connection[Any], tmp_path: Path) -> Any:
    """Make two databases, with a project each."""
    names = ("switch_ours", "switch_stock")
    for name in names:
        admin.execute(f"CREATE DATABASE {name}")
        (tmp_path / name).mkdir()
    yield [Project(tmp_path / name, name) for name in names]
    for name in names:
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


def _content(conninfo: str, name: str) -> list[Any]:
    with psycopg.connect(conninfo, dbname=name) as session:
        return session.execute(_CONTENT).fetchall()


@pytest.mark.slow
def test_engines_take_turns_on_a_database_and_leave_nothing(two: Any, conninfo: str) -> None:
    ours, stock = two
    ours.manage(OURS, "migrate", "--verbosity=0")
    stock.manage(STOCK, "migrate", "--verbosity=0")
    for engine in (STOCK, OURS):
        assert "No planned migration" in ours.manage(engine, "migrate", "--plan")
    for count, (name, engine) in enumerate(
        [("first", OURS), ("second", STOCK), ("third", OURS)], start=1
    ):
        ours.run(engine, _WRITE.format(name=name, count=count))
    assert _content(conninfo, "switch_ours") == _content(conninfo, "switch_stock")
