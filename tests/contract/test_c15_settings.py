"""Tests C15: which settings may be declared, and that names and values are quoted or refused."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from typing import Any
from unittest.mock import patch
from uuid import UUID

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.db import DatabaseError, connection, connections, transaction
from django.utils.connection import ConnectionDoesNotExist

import pgbackend
from tests.library.models import Author
from tests.support.tenants import OUTSIDE, look, tenant

pytestmark = [pytest.mark.usefixtures("tenants")]

NASTY = [
    "x'; DROP TABLE library_author; --", 'a"b', "back\\slash", "$tag$", "DEFAULT", "NULL",
    "ünïcödé ☃", "line\nbreak", "%s %(x)s %%", "{}", " ", "\t", "x" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("value", NASTY, ids=range(len(NASTY)))
def test_any_text_is_a_value(do: Any, value: str) -> None:
    def body() -> Any:
        with pgbackend.session(**{"app.tenant": value}):
            return look()

    assert do(body) == value


@pytest.mark.parametrize("name", [text for text in NASTY if len(text.encode()) < 64 and text])
def test_any_name_of_a_schema_is_one_name(do: Any, name: str) -> None:
    def body() -> Any:
        with pgbackend.session(search_path=[name, "public"]), connection.cursor() as cursor:
            cursor.execute("SELECT current_schemas(false)")
            cursor.execute("SHOW search_path")
            return cursor.fetchone()[0]

    quoted = name.replace('"', '""')
    assert do(body) in (f'"{quoted}", public', f"{name}, public")


@pytest.mark.parametrize("string", ["on", "off"])
def test_values_are_quoted_as_the_server_reads_strings(do: Any, string: str) -> None:
    value = "back\\slash' \\' quoted"

    def body() -> Any:
        with connection.cursor() as cursor, transaction.atomic():
            cursor.execute(f"SET LOCAL standard_conforming_strings TO {string}")
            with pgbackend.session(**{"app.tenant": value}):
                return look()

    assert do(body) == value


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"search_path": "one, two"}, "with a comma in it: pass a list"),
        ({"search_path": ["one", ""]}, "an empty name"),
        ({"search_path": ["x" * 64]}, "more than 63 bytes"),
        ({"search_path": ["a\0b"]}, "NUL"),
        ({"role": "a\0b"}, "'role' contains a NUL"),
        ({"app.tenant": "\ud800"}, "cannot be encoded"),
        ({"app tenant": 1}, "no name of a setting"),
        ({"app.tenant; --": 1}, "no name of a setting"),
        ({'app."tenant"': 1}, "no name of a setting"),
        ({"": 1}, "no name of a setting"),
        ({"app.": 1}, "no name of a setting"),
        ({"TimeZone": "UTC"}, "use django.utils.timezone.override"),
        ({"client_encoding": "LATIN1"}, "cannot declare 'client_encoding'"),
        ({"transaction_read_only": True}, "use 'default_transaction_read_only'"),
        ({"app.x": 1, "APP.X": 2}, "given twice"),
    ],
)
def test_what_cannot_be_sent_is_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pgbackend.session(**settings)


@pytest.mark.parametrize("value", [object(), b"bytes", ["a"], {"a": 1}])
def test_a_value_of_another_type_is_refused_at_once(value: Any) -> None:
    with pytest.raises(TypeError, match="'app.tenant' is of type"):
        pgbackend.session(**{"app.tenant": value})


@pytest.mark.parametrize("settings", [{"role": 1}, {"search_path": 1}, {"search_path": [1]}])
def test_a_name_of_another_type_is_refused_at_once(settings: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="name"):
        pgbackend.session(**settings)


def test_an_error_and_a_repr_show_no_value() -> None:
    secret = "do not show"
    assert secret not in repr(pgbackend.session(**{"app.key": secret}))
    with pytest.raises(ValueError) as caught:
        pgbackend.session(**{"app.key": f"{secret}\0"})
    assert secret not in str(caught.value)
    with (
        pgbackend.session(**{"app.key": secret}),
        pytest.raises(DatabaseError) as failed,
        transaction.atomic(),
    ):
        Author.objects.extra(where=["nothing = 1"]).get()
    assert secret not in str(failed.value)


@pytest.mark.parametrize(
    "value, text",
    [
        (True, "on"), (False, "off"), (7, "7"), (2.5, "2.5"), (Decimal("1.10"), "1.10"),
        (timedelta(seconds=1.5), "1500ms"), (timedelta(microseconds=1), "1ms"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
    ],
)  # fmt: skip
def test_values_are_written_as_postgresql_reads_them(value: Any, text: str) -> None:
    with pgbackend.session(**{"app.tenant": value}):
        assert look() == text


def test_an_unknown_alias_and_another_engine_are_refused_at_once() -> None:
    with pytest.raises(ConnectionDoesNotExist):
        pgbackend.session("nowhere")
    with (
        patch.dict(connections.settings, other={"ENGINE": "django.db.backends.sqlite3"}),
        pytest.raises(ImproperlyConfigured, match="'django.db.backends.sqlite3'"),
    ):
        pgbackend.session("other", role="x")
    with pytest.raises(TypeError, match="with parentheses"):
        pgbackend.session(lambda: None)  # type: ignore[arg-type]


def test_a_setting_that_the_server_refuses_fails_the_statement_with_its_error(do: Any) -> None:
    def body() -> list[str]:
        seen: list[str] = []
        for settings in ({"statement_timeout": "soon"}, {"role": "nobody"}, {"nothing": "x"}):
            with (
                pytest.raises(DatabaseError, match="soon|nobody|nothing") as caught,
                transaction.atomic(),
                pgbackend.session(**settings),
            ):
                tenant()
            cause = caught.value.__cause__
            assert "pgbackend.session()" in "".join(getattr(cause, "__notes__", []))
            seen.append(tenant())
        return seen

    assert do(body) == [OUTSIDE] * 3
