"""Tests docs/switch.md: its searches find what they should, and both engines share a database."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
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


# --- Away from django-async-backend ---------------------------------------------------------------


def test_the_command_takes_names_out_of_the_example(tmp_path: Path) -> None:
    """Run the page's `sed` on its example; what the page says is left, is left."""
    page = (ROOT / "docs/from-django-async-backend.md").read_text()
    (command,) = re.findall(r"^ {4}(grep (?:.*\\\n)*.*)$", page, re.MULTILINE)
    before = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[1]
    (tmp_path / "views.py").write_text(before)
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    after = (tmp_path / "views.py").read_text()
    left = set(re.findall(r"\b(?:async_|Async)\w+", after))
    assert left == {"AsyncModelMixin", "async_connections"}
    assert "from django.db.transaction import atomic\n" in after
    assert "async with atomic():\n" in after
    assert 'await book.asave(update_fields=["stock"])\n' in after
    assert "await Author.objects.aget(pk=pk)\n" in after


# --- Both engines on one database -----------------------------------------------------------------

_SETTINGS = """
import os
from pgbackend import embedded

SECRET_KEY = "tests"
INSTALLED_APPS = ["django.contrib.contenttypes", "django.contrib.auth", "pgbackend"]
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
database = {**embedded.database_settings(os.environ["DATABASE_URL"]), "NAME": os.environ["NAME"]}
DATABASES = {"default": {"ENGINE": os.environ["DATABASE_ENGINE"], **database}}
"""
OURS, STOCK = "pgbackend", "django.db.backends.postgresql"
#: The parts of a database: tables, constraints, indexes, functions, settings, extensions.
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
_MIGRATE = """
import django
from django.core.management import call_command
django.setup()
call_command("migrate", verbosity=0)
"""
_WORK = """
import asyncio, io
import django
from django.core.management import call_command
django.setup()
call_command("migrate", plan=True, no_color=True, stdout=(plan := io.StringIO()))
assert "No planned migration" in plan.getvalue()
from django.contrib.auth.models import User
from django.db import connection
assert (connection.settings_dict["ENGINE"] == "pgbackend") is {ours}
asyncio.run(User.objects.acreate_user("{name}", password="secret"))
assert User.objects.count() == {count}
assert all(user.check_password("secret") for user in User.objects.all())
"""


def _on(engine: str, database: str, home: Path, script: str) -> Program:
    """Return a program that runs a script in a small project, on an engine and a database."""
    (home / "shop_settings.py").write_text(_SETTINGS)
    script = f"import os; os.environ['DJANGO_SETTINGS_MODULE'] = 'shop_settings'\n{script}"
    variables = environment(database)
    own = {"NAME": database, "DATABASE_ENGINE": engine, "PYTHONPATH": f"{ROOT}:{home}"}
    return Program(["-c", script], home, {"DATABASE_URL": variables["DATABASE_URL"], **own})


@pytest.fixture
def databases(admin: psycopg.Connection[Any]) -> Iterator[list[str]]:
    """Make two databases."""
    names = ["switch_ours", "switch_stock"]
    for name in names:
        admin.execute(f"CREATE DATABASE {name}")
    yield names
    for name in names:
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


def _content(conninfo: str, name: str) -> list[Any]:
    with psycopg.connect(conninfo, dbname=name) as session:
        return session.execute(_CONTENT).fetchall()


@pytest.mark.slow
def test_engines_take_turns_on_a_database_and_leave_nothing(
    databases: list[str], conninfo: str, tmp_path: Path
) -> None:
    ours, stock = databases
    migrations = [(OURS, ours), (STOCK, stock)]
    for done in run_all(_on(*each, tmp_path, _MIGRATE) for each in migrations):
        done.check()
    for count, engine in enumerate([STOCK, OURS, STOCK], start=1):
        script = _WORK.format(name=f"user{count}", count=count, ours=engine == OURS)
        (done,) = run_all([_on(engine, ours, tmp_path, script)])
        done.check()
    assert _content(conninfo, ours) == _content(conninfo, stock)
