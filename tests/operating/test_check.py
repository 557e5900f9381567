"""Tests `manage.py pgbackend check`: each wrong configuration is told with its cause and cure."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import psycopg
import pytest
from django.core.management import call_command
from django.core.management.base import CommandError
from django.db import connections
from django.db.backends.base import base

from pgbackend import embedded
from pgbackend.features import DatabaseFeatures
from pgbackend.management.commands.pgbackend import Command
from pgbackend.operating import advice, checking, connecting, failures, findings, server
from tests.backend.test_options import password_server  # noqa: F401 - pytest's
from tests.conftest import Runner
from tests.operating.projects import Project
from tests.support.fixtures import settings_of_default
from tests.support.pgbouncer import pgbouncer, program
from tests.support.ports import free_port
from tests.support.processes import run_all

SECRET = "canary-wr0ng"


@contextmanager
def configured(options: dict[str, Any] | None = None, **changes: Any) -> Iterator[None]:
    """Change the settings of 'default', and add `options` to its options."""
    given = connections.settings["default"]
    with settings_of_default(**changes, OPTIONS={**given["OPTIONS"], **(options or {})}):
        connections["default"].close()
        yield
    connections["default"].close()


def check(*arguments: str) -> tuple[int, str]:
    """Return the exit status of the command, and what it prints."""
    out = StringIO()
    try:
        call_command(Command(), "check", *arguments, stdout=out)
    except SystemExit as exc:
        return int(str(exc.code)), out.getvalue()
    return 0, out.getvalue()


def words(text: str) -> str:
    """Return `text` on one line, without the arrows before the cures."""
    return " ".join(text.replace("->", "").split())


@pytest.mark.django_db(transaction=True)
def test_a_right_configuration_is_well() -> None:
    status, text = check("--database", "default")
    assert status == 0, text
    for expected in (
        "ok Sync code connects.",
        "ok Django's pool for sync code connects.",
        "ok The pool for async code connects.",
        "ok The connection goes to PostgreSQL itself, without a pooler.",
        "max_connections = ",
        "psycopg's implementation: ",
        "All is well.",
    ):
        assert expected in words(text)


# --- Wrong configurations -------------------------------------------------------------------------

NOWHERE = {"HOST": "127.0.0.1", "PORT": str(free_port())}
#: Changes of the settings, what the text says of the cause, and the cure.
WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "unknown database": (
        {"NAME": "no_such_database"},
        "the server has no database 'no_such_database'",
        "createdb 'no_such_database'",
    ),
    "unknown user": ({"USER": "no_such_user"}, "has no user 'no_such_user'", "CREATE ROLE"),
    "nothing listens": (NOWHERE, "nothing listens at 127.0.0.1, port", "Start PostgreSQL there"),
    "no such socket": (
        {"HOST": "/no/such/directory"},
        "there is no PostgreSQL on this machine",
        "Set DATABASES['default']['HOST'] to the server's host name",
    ),
    "unknown host": (
        {"HOST": "no-such-host.invalid"},
        "the name of the host no-such-host.invalid, port",
        "let the name be resolved",
    ),
    "misspelt option of the pool": (
        {"options": {"pool": {"max_sise": 3}}},
        "['pool'] has no option 'max_sise'",
        "Did you mean 'max_size'?",
    ),
    "misspelt option of libpq": (
        {"options": {"conect_timeout": 3}},
        "'conect_timeout'",
        "Did you mean 'connect_timeout'?",
    ),
    "wrong value of libpq's": (
        {"options": {"sslmode": "sometimes"}},
        "libpq does not accept the value of an option",
        "Correct OPTIONS of DATABASES['default']",
    ),
    "a setting that the server lacks": (
        {"options": {"options": "-c no_such_setting=1"}},
        "OPTIONS['options'] sets something that this server does not know",
        "Correct OPTIONS['options']",
    ),
    "unknown service": (
        {"options": {"service": "no_such_service"}},
        "libpq finds no service",
        "PGSERVICEFILE",
    ),
    "a pool above max_connections": (
        {"options": {"pool": {"min_size": 0, "max_size": 5000}}},
        "10000 connections may be opened; the server allows",
        "set OPTIONS['pool']['max_size'] of DATABASES['default'] to at most",
    ),
    "a function that fails": (
        {"PASSWORD": lambda: 1 / 0},
        "'default' cannot connect",
        "the log of the server",
    ),
}


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_configuration_is_told_at_once_with_its_cause_and_cure(name: str) -> None:
    changes, cause, cure = WRONG[name]
    with configured(**{"PASSWORD": SECRET, **changes}):
        started = time.monotonic()
        status, text = check("--database", "default")
        seconds = time.monotonic() - started
    assert status == 1
    assert cause.lower() in words(text).lower() and cure.lower() in words(text).lower(), text
    assert words(text).endswith("There are errors: see above.")
    assert SECRET not in text
    assert seconds < 10, "it does not wait for a pool's 30 s"


@pytest.mark.slow
def test_a_wrong_password_is_told_and_not_shown(password_server: str) -> None:  # noqa: F811
    given = embedded.database_settings(password_server)
    with configured(**{**given, "PASSWORD": SECRET}):
        status, text = check()
    assert status == 1 and SECRET not in text
    assert "the server refuses the password of the user 'careful'" in words(text)
    assert "Set DATABASES['default']['PASSWORD']" in words(text)
    with configured(**{**given, "PASSWORD": ""}):
        _, text = check()
    assert "asks the user 'careful' for a password, and the settings give none" in words(text)


@pytest.mark.slow
@pytest.mark.django_db(transaction=True)
def test_a_server_that_does_not_answer_is_given_up_in_some_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import socket

    with socket.socket() as silent:  # accepts, and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = str(silent.getsockname()[1])
        with configured({"connect_timeout": 2}, HOST="127.0.0.1", PORT=port):
            status, text = check("--database", "default")
    assert status == 1 and f"127.0.0.1, port {port} does not answer" in words(text)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["transaction", "session"])
def test_a_pooler_between_is_noticed(
    request: pytest.FixtureRequest, conninfo: str, mode: str
) -> None:
    if program() is None and not request.config.option.require_servers:
        pytest.skip("no PgBouncer here: 'make pgbouncer' installs it")
    declared = {"pooler": "transaction", "pool": None}
    with pgbouncer(conninfo, pool_mode=mode) as at:
        place = {"HOST": at["host"], "PORT": at["port"], "USER": at["user"], "PASSWORD": ""}
        plain = {"sslmode": "disable", "gssencmode": "disable", "pool": {}}
        with configured(plain, **place):
            undeclared = check()
        with configured({**plain, **declared}, **place):
            right = check()
    if mode == "transaction":
        assert undeclared[0] == 1
        assert "OPTIONS['pooler'] does not say so" in words(undeclared[1])
        assert "Set DATABASES['default']['OPTIONS']['pooler'] to 'transaction'" in words(
            undeclared[1]
        )
        assert "A transaction pooler stands before the server, as declared." in words(right[1])
    else:
        assert "It gave each of two connections a session of its own" in words(undeclared[1])
    assert right[0] == 0, right[1]


def fails(connection: Any) -> None:
    raise ValueError("the check fails")


@pytest.mark.slow
def test_a_pool_whose_own_function_fails_is_told_for_each_kind_of_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connecting, "LIMIT", 1)
    with configured({"pool": {"min_size": 0, "max_size": 2, "check": fails}}):
        status, text = check("--database", "default")
    assert status == 1
    assert "ok Sync code connects." in words(text), text
    # Django 5.2 gives psycopg_pool a `check` of its own beside this one; later it does not.
    assert "'default' cannot connect by Django's pool for sync code: " in words(text), text
    assert "Look at the functions in OPTIONS['pool']" in words(text)
    assert "'default' cannot connect by the pool for async code: the pool opens no" in words(text)


def test_a_server_that_this_django_does_not_support_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(DatabaseFeatures, "minimum_database_version", (99,))
        patch.setattr(base, "RAN_DB_VERSION_CHECK", set())  # Django looks once in a process
        status, text = check("--database", "default")
    assert status == 1
    assert "This Django does not support the server of 'default': PostgreSQL 99" in words(text)
    assert "Upgrade the server" in words(text)


def test_the_command_is_refused_on_an_event_loop(run_once: Runner) -> None:
    async def main() -> None:
        with pytest.raises(CommandError, match="in sync code"):
            check()

    run_once(main())


def test_a_pooler_that_is_declared_and_not_there_is_told() -> None:
    with configured({"pooler": "transaction", "pool": {}}):
        status, text = check("--database", "default")
    assert status == 0
    assert "OPTIONS['pooler'] is set, and the connection goes to PostgreSQL itself" in words(text)


def test_a_read_only_session_is_told() -> None:
    with configured({"options": "-c default_transaction_read_only=on"}):
        status, text = check("--database", "default")
    assert status == 0
    assert "warning Transactions are read-only" in words(text)


# --- Advice ---------------------------------------------------------------------------------------

USUAL: dict[str, Any] = {
    "version": "16.4",
    "number": 160004,
    "is_standby": False,
    "is_read_only": False,
    "role_limit": -1,
    "is_superuser": False,
    "database_limit": -1,
    "in_use": 3,
    "settings": {"server_encoding": "UTF8"},
    "numbers": {
        "max_connections": 100,
        "superuser_reserved_connections": 3,
        "statement_timeout": 30,
        "idle_in_transaction_session_timeout": 60,
    },
    "place": "127.0.0.1:5432",
}


def advised(options: dict[str, Any] | None = None, **changes: Any) -> list[findings.Finding]:
    """Return what is said, beside what is right, of a server with these facts."""
    facts = server.Server(**{**USUAL, **changes})
    said = advice.of_server("default", {"OPTIONS": options or {}}, facts)
    return [each for each in said if each.level != findings.OK]


def test_a_usual_server_needs_no_advice() -> None:
    assert advised() == []


@pytest.mark.parametrize(
    ("level", "text", "changes"),
    [
        ("error", "too old", {"number": 130011, "version": "13.11"}),
        ("warning", "newer", {"number": 990000, "version": "99"}),
        ("warning", "standby", {"is_standby": True, "is_read_only": True}),
        ("warning", "read-only", {"is_read_only": True}),
        ("warning", "LATIN1", {"settings": {"server_encoding": "LATIN1"}}),
        ("warning", "backslash", {"settings": {"standard_conforming_strings": "off"}}),
        ("note", "serializable", {"settings": {"default_transaction_isolation": "serializable"}}),
        ("note", "superuser", {"is_superuser": True}),
        ("note", "statement_timeout", {"numbers": {"idle_in_transaction_session_timeout": 60}}),
        ("note", "leaves idle", {"numbers": {"statement_timeout": 30}}),
        (
            "warning",
            "idle_session_timeout",
            {"numbers": {**USUAL["numbers"], "idle_session_timeout": 30}},
        ),
        ("note", "is no standby", {"options": {"replica_of": "primary"}}),
    ],
)
def test_each_advice_has_its_reason_and_cure(
    level: str, text: str, changes: dict[str, Any]
) -> None:
    (finding,) = advised(**changes)
    assert finding.level == level and text in finding.text and finding.cure


def test_a_standby_that_is_declared_as_a_replica_is_right() -> None:
    assert advised({"replica_of": "primary"}, is_standby=True, is_read_only=True) == []


def test_messages_of_a_server_in_another_language_are_shown_with_a_cure() -> None:
    exc = psycopg.OperationalError("FATAL:  Datenbank »x« existiert nicht")
    found = failures.explained("default", {"HOST": "db", "OPTIONS": {}}, exc)
    assert "Datenbank »x« existiert nicht" in found.text
    assert "log of the server at db, port 5432" in found.cure


def test_a_password_in_a_message_is_hidden_unless_that_would_tell_it() -> None:
    given = {"HOST": "db", "USER": "me", "PASSWORD": SECRET, "OPTIONS": {}}
    exc = psycopg.OperationalError(f"unknown words about {SECRET} and me")
    assert "about (hidden) and me" in failures.explained("default", given, exc).text
    assert "and me" in failures.explained("default", {**given, "PASSWORD": "me"}, exc).text


def test_the_password_of_a_url_in_the_place_of_a_name_is_hidden() -> None:
    url = f"postgresql://me:{SECRET}@db/shop"
    given = {"HOST": url, "NAME": url, "USER": url, "PASSWORD": "", "OPTIONS": {}}
    for message in (
        'database "..." does not exist',
        'role "..." does not exist',
        "failed to resolve host",
        "unknown words",
    ):
        finding = failures.explained("default", given, psycopg.OperationalError(message))
        assert "postgresql://me:(hidden)@db/shop" in str(finding)
        assert SECRET not in str(finding)


# --- Secrets, and the forms of the output ---------------------------------------------------------


def test_options_in_force_show_no_secret() -> None:
    shown = checking.options_in_force(
        {
            "ENGINE": "pgbackend",
            "PASSWORD": SECRET,
            "HOST": "db",
            "OPTIONS": {
                "sslpassword": SECRET,
                "conninfo": f"host=x password='{SECRET}' port=1",
                "listen": {"password": SECRET, "url": f"postgresql://me:{SECRET}@host/db"},
                "application_name": print,
                "pool": {"max_size": 3},
            },
        }
    )
    assert SECRET not in json.dumps(shown)
    assert shown["HOST"] == "db" and shown["OPTIONS"]["application_name"] == "builtins.print"
    assert shown["pool"]["max_size"] == 3 and shown["pool"]["timeout"] == 10.0


def test_json_has_the_facts_the_findings_and_whether_all_is_well() -> None:
    status, text = check("--database", "default", "--format", "json")
    said = json.loads(text)
    assert status == 0 and said["ok"] is True
    (alias,) = said["aliases"]
    assert alias["name"] == "default" and alias["server"]["number"] >= 140000
    assert {each["level"] for each in alias["findings"]} <= {"ok", "note", "warning"}
    assert "Django" in said["versions"]


def test_an_alias_that_is_not_ours_is_refused() -> None:
    with pytest.raises(CommandError, match="'nowhere' is no alias of pgbackend's: choose one of"):
        check("--database", "nowhere")


@pytest.mark.slow
def test_the_command_of_a_project_ends_with_the_status_and_without_a_traceback(
    tmp_path: Path,
) -> None:
    homes = [tmp_path / name for name in ("right", "wrong", "other")]
    for home in homes:
        home.mkdir()
    sqlite = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}
    nowhere = {"default": {"ENGINE": "pgbackend", "NAME": "x", "PASSWORD": SECRET, **NOWHERE}}
    right, wrong, other = run_all(
        project.command("pgbackend", "check")
        for project in (
            Project(homes[0]),
            Project(homes[1], DATABASES=nowhere),
            Project(homes[2], DATABASES=sqlite),
        )
    )
    assert words(right.check()).endswith("All is well.")
    assert wrong.returncode == 1 and "nothing listens" in wrong.output
    assert "Traceback" not in wrong.errors and SECRET not in wrong.output + wrong.errors
    assert other.returncode == 1
    assert "No alias of DATABASES has pgbackend as its ENGINE" in other.errors
