"""Tests `python -m pgbackend.report`: it tells what it can, and nothing that is secret."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from django.db import connections
from psycopg import IsolationLevel

from pgbackend.operating import known_packages, public
from tests.support.ports import free_port

ROOT = Path(__file__).parents[2]
#: Each secret has it, so that one search finds them all.
CANARY = "canary"

SETTINGS = """
import os


def password():
    return "canary-from-a-function"


async def user():
    return "canary-from-a-coroutine"


def fails():
    raise RuntimeError("canary-in-an-error")


SECRET_KEY = "canary-key"
INSTALLED_APPS = ["django.contrib.contenttypes"]
REFUSING = {"ENGINE": "pgbackend", "HOST": "127.0.0.1", "PORT": "PORT_"}
DATABASES = {
    "default": {
        **REFUSING, "USER": "canary-user", "PASSWORD": "canary-password", "NAME": "canary-name",
        "OPTIONS": {
            "passfile": "/canary/passfile", "sslpassword": "canary-ssl", "sslmode": "prefer",
            "options": "-c app.secret=canary-option", "application_name": "canary-application",
            "sslkey": "/canary/key", "isolation_level": 4,
            "pool": {"max_size": 3},
        },
    },
    "functions": {
        **REFUSING, "USER": user, "PASSWORD": password, "NAME": "canary-name",
        "OPTIONS": {"application_name": password},
    },
    "failing": {**REFUSING, "USER": "canary-user", "PASSWORD": fails, "NAME": "canary-name"},
    "hosts": {
        **REFUSING, "HOST": "canary-1.invalid,canary-2.invalid", "PORT": "", "NAME": "canary-name",
    },
    "socket": {**REFUSING, "HOST": "/canary/socket", "NAME": "canary-name"},
    "string": {**REFUSING, "NAME": "canary-name", "OPTIONS": {
        "conninfo": "host=127.0.0.1 port=PORT_ user=canary-u password=canary-p dbname=canary-d"},
    },
    "service": {"ENGINE": "pgbackend", "OPTIONS": {"service": "canary-service"}},
    "wrong": {
        **REFUSING, "NAME": "canary-name",
        "OPTIONS": {
            "unknown": "canary-value", "pool": {"kwargs": {"password": "canary-kwargs"}},
            "pooler": "transaction", "session_reset": "sometimes",
        },
    },
    "stock": {**REFUSING, "ENGINE": "django.db.backends.postgresql", "PASSWORD": "canary-stock"},
}
"""
#: Variables of libpq that hold secrets, too.
VARIABLES = {"PGPASSFILE": "/canary/pgpass", "PGAPPNAME": "canary-app"}


def report(home: Path, settings: str | None, *arguments: str, **variables: str) -> str:
    """Return the report on settings of this text; it must end well, with no word of an error."""
    ours = {"DJANGO_SETTINGS_MODULE", "DATABASE_URL"}
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment = {**environment, "PYTHONPATH": str(ROOT), **variables}
    if settings is not None:
        (home / "reported.py").write_text(settings)
        environment["DJANGO_SETTINGS_MODULE"] = "reported"
    command = [sys.executable, "-m", "pgbackend.report", *arguments]
    done = subprocess.run(
        command, cwd=home, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def words(text: str) -> str:
    return " ".join(text.split())


def test_without_settings_it_tells_of_the_installation(tmp_path: Path) -> None:
    told = report(tmp_path, None)
    assert re.search(r"^  pgbackend: \d", told, re.MULTILINE)
    for name in ("Python", "Django", "psycopg", "psycopg-pool", "greenlet", "asgiref", "libpq"):
        assert re.search(rf"^  {name}: \S*\d", told, re.MULTILINE), name
    for part in ("psycopg's implementation: ", "platform: ", "event loop by default: asyncio."):
        assert part in told
    assert "DJANGO_SETTINGS_MODULE is not set" in told
    assert "All are on." in told or "is off: " in told
    assert "pytest-django " in told


def test_no_secret_is_told_wherever_it_stands(tmp_path: Path) -> None:
    settings = SETTINGS.replace("PORT_", str(free_port()))
    told = report(tmp_path, settings, **VARIABLES)
    assert CANARY not in told
    for alias in ("default", "functions", "failing", "hosts", "socket", "service", "wrong"):
        assert f"Database {alias!r}" in told
        assert f"{alias!r} cannot connect" in words(told) or alias == "wrong"
    assert "nothing listens at 127.0.0.1" in words(told)
    assert "'stock' has the engine django.db.backends.postgresql" in told
    assert "sslmode='prefer'" in told
    assert "max_size=3" in told
    assert "HOST: another host, another host" in told
    assert "HOST: a Unix socket" in told
    assert "USER: a coroutine function" in told
    assert "PGPASSFILE: set" in told


@pytest.mark.slow
def test_without_connecting_no_server_is_asked(tmp_path: Path) -> None:
    told = report(tmp_path, SETTINGS.replace("PORT_", "1"), "--no-connect", **VARIABLES)
    assert "cannot connect" not in words(told)
    assert "Database 'default'" in told
    assert CANARY not in told


@pytest.mark.slow
@pytest.mark.django_db(transaction=True)
def test_a_server_is_told_with_its_version(tmp_path: Path) -> None:
    settings_dict = connections.settings["default"]
    given = {key: settings_dict[key] for key in ("HOST", "PORT", "NAME", "USER", "PASSWORD")}
    settings = (
        f"SECRET_KEY = 'k'\nDATABASES = {{'default': {{'ENGINE': 'pgbackend', **{given!r}}}}}"
    )
    told = report(tmp_path, settings)
    assert "The server is PostgreSQL" in told
    assert "The pool for async code connects." in told
    assert "max_connections = " in told
    assert "NAME: (hidden)" in told
    assert str(given["NAME"]) not in told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "said", "hidden"),
    [
        (
            "raise ValueError('canary-in-settings')",
            "builtins.ValueError: (its text is hidden",
            True,
        ),
        ("raise SystemExit(3)", "builtins.SystemExit", False),
        ("SECRET_KEY = 'canary'", "No alias has pgbackend as its engine.", True),
        ("INSTALLED_APPS = ['no.such.app']", "No module named 'no'", False),
    ],
    ids=["fails", "exits", "has no alias", "has an app too many"],
)
def test_a_project_that_cannot_be_loaded_is_told_of(
    settings: str, said: str, hidden: bool, tmp_path: Path
) -> None:
    told = report(tmp_path, settings)
    assert said in told
    assert "Versions" in told
    assert not hidden or CANARY not in told


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["django", "psycopg_pool"])
def test_an_installation_without_a_package_is_told_of(missing: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules[{missing!r}] = None")
    settings = "SECRET_KEY = 'k'\nDATABASES = {'default': {'ENGINE': 'pgbackend', 'NAME': 'n'}}"
    told = report(tmp_path, settings, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert f"ModuleNotFoundError: import of {missing}" in told
    assert "greenlet: " in told


@pytest.mark.slow
@pytest.mark.parametrize("name", ["psycopg", "greenlet"])
def test_a_version_that_is_not_supported_is_told_with_its_cure(name: str, tmp_path: Path) -> None:
    info = tmp_path / f"{name.replace('-', '_')}-3.2.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 3.2.1\n")
    settings = "SECRET_KEY = 'k'\nDATABASES = {'default': {'ENGINE': 'pgbackend', 'NAME': 'n'}}"
    told = report(tmp_path, settings, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert f"{name}: 3.2.1" in told
    assert f"pgbackend does not support {name} 3.2.1: pip install '{name}" in told


def test_what_everybody_may_read_of_a_setting() -> None:
    async def coroutine() -> str:
        return ""

    for name, value, shown in _SHOWN:
        assert public.publicly(name, value) == shown, name
    assert public.publicly("PASSWORD", coroutine) == "a coroutine function"


_SHOWN: list[tuple[str, Any, Any]] = [
    ("PASSWORD", "secret", "(hidden)"),
    ("PASSWORD", 1234, "(hidden)"),
    ("PASSWORD", "", ""),
    ("PASSWORD", lambda: "", "a function"),
    ("auth_token", {"a": 1}, "(hidden)"),
    ("passfile", "/of/me/.pgpass", "(hidden)"),
    ("USER", "me", "(hidden)"),
    ("ENGINE", "pgbackend", "pgbackend"),
    ("HOST", "", "this machine"),
    ("HOST", "127.0.0.1", "this machine"),
    ("HOST", "/run/postgresql", "a Unix socket"),
    ("HOST", "a.example,b.example", "another host, another host"),
    ("PORT", 5432, 5432),
    ("sslmode", "require", "require"),
    ("isolation_level", IsolationLevel.SERIALIZABLE, IsolationLevel.SERIALIZABLE),
    ("max_hold", None, None),
    ("keepalives", True, True),
    ("anything", "text", "(hidden)"),
    ("anything", b"bytes", "an object of bytes"),
    ("anything", ["text", 1], ["(hidden)", 1]),
    ("pool", {"max_size": 1, "kwargs": {"u": "me"}}, {"max_size": 1, "kwargs": {"u": "(hidden)"}}),
    ("scram_client_key", "a+b=", "(hidden)"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        (
            'server at "db.internal" (10.0.0.5), port 5432',
            'server at "(hidden)" (hidden), port 5432',
        ),
        ('server at "127.0.0.1", port 1', 'server at "127.0.0.1", port 1'),
        ('on socket "/run/x/.s.PGSQL.5432"', 'on socket "(a directory)"'),
        ('server at "::1" (fe80::1), port 1', 'server at "::1" (hidden), port 1'),
        ('for user "someone"', 'for user "(hidden)"'),
        ('database "shop" does not exist', 'database "(hidden)" does not exist'),
        ("the user 'me', and meal", "the user '(hidden)', and meal"),
        ("a.b*c is hidden", "(hidden) is hidden"),
        (
            "is the cause of this one: KeyError: 'x'\n.)",
            "is the cause of this one: KeyError: (hidden)",
        ),
    ],
)
def test_names_in_messages_are_hidden(text: str, masked: str) -> None:
    settings = {"USER": "me", "OPTIONS": {"options": "a.b*c", "pool": {"check": len}}}
    assert public.mask([settings])(text) == masked


def test_parts_of_connection_strings_and_paths_are_hidden() -> None:
    options = {"conninfo": "postgresql://me:pass@db.internal/shop", "sslkey": Path("/of/me.key")}
    mask = public.mask([{"NAME": Path("/a/b"), "OPTIONS": options}])
    told = mask("me, pass, db.internal, shop, /of/me.key, /a/b, and some shopping")
    assert told == ", ".join(["(hidden)"] * 6) + ", and some shopping"


def test_without_names_nothing_is_hidden() -> None:
    assert (
        public.mask([{"USER": "", "HOST": "localhost"}])("all of localhost") == "all of localhost"
    )


def test_the_packages_are_those_of_the_page_and_of_the_tests() -> None:
    page = (ROOT / "docs/packages.md").read_text()
    tested = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["test"]
    names = {re.split(r"[\[><=;~! ]", each)[0] for each in tested if isinstance(each, str)}
    known = set(known_packages.PACKAGES)
    assert {name for name in names if name.startswith("django-")} <= known
    servers = {"uvicorn", "prometheus-client", "django-stubs"}
    assert known <= {*re.findall(r"[\w-]+", page), *names, *servers}
