"""Tests docs/database-url.md: its libraries read its URLs as the page says, and connect."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import dj_database_url
import environ
import pytest
from psycopg.conninfo import conninfo_to_dict

from pgbackend import embedded
from pgbackend.base import DatabaseWrapper
from pgbackend.options import problems
from tests.docs.snippets import ROOT
from tests.docs.tables import table_after

PAGE = ROOT / "docs/database-url.md"
ROWS = table_after(PAGE, "<!-- urls")
_, _, OF_DJ, OF_ENVIRON, OURS = ROWS[0]
LIBRARIES: dict[str, Callable[[str], Mapping[str, Any]]] = {
    OF_DJ: lambda url: dj_database_url.parse(url, engine="pgbackend"),
    OF_ENVIRON: lambda url: environ.Env.db_url_config(url, engine="pgbackend"),
    OURS: lambda url: {"ENGINE": "pgbackend", **embedded.database_settings(url)},
}
DEFAULTS: dict[str, Any] = {
    "ATOMIC_REQUESTS": False,
    "AUTOCOMMIT": True,
    "CONN_HEALTH_CHECKS": False,
    "CONN_MAX_AGE": 0,
    "OPTIONS": {},
    "TIME_ZONE": None,
}
#: Settings that a connection gets beside what the URL says.
ADDED = {"client_encoding", "cursor_factory", "context", "prepare_threshold", "pool"}


def _given(settings_dict: Mapping[str, Any]) -> dict[str, str]:
    """Return what libpq is given for an entry of `DATABASES`."""
    assert settings_dict["ENGINE"] == "pgbackend"
    wrapper = DatabaseWrapper({**DEFAULTS, **settings_dict}, "default")
    params = wrapper.get_connection_params()
    return {name: str(value) for name, value in params.items() if name not in ADDED}


def _reads_as_libpq(read: Callable[[str], Mapping[str, Any]], url: str) -> bool:
    try:
        settings_dict = read(url)
    except ValueError:
        return False
    assert not [*problems("default", {**DEFAULTS, **settings_dict})]
    return _given(settings_dict) == conninfo_to_dict(url)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["for"])
def test_a_library_reads_a_url_as_the_page_says(row: dict[str, str], library: str) -> None:
    url = f"postgresql://{next(iter(row.values())).strip('`')}"
    assert ("yes" if _reads_as_libpq(LIBRARIES[library], url) else "no") == row[library]


@pytest.mark.parametrize("library", [OF_DJ, OF_ENVIRON])
def test_the_page_names_releases_no_newer_than_the_installed(library: str) -> None:
    name, written = library.split()
    assert _parts(written) <= _parts(version(name))


def _parts(release: str) -> list[int]:
    return [int(part) for part in release.split(".")]


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_connects_by_the_url_of_the_tests(library: str, transactional_db: None) -> None:
    settings_dict = LIBRARIES[library](os.environ["DATABASE_URL"])
    wrapper = DatabaseWrapper({**DEFAULTS, **settings_dict}, "by_url")
    try:
        with wrapper.cursor() as cursor:
            cursor.execute("SELECT 1")
            assert cursor.fetchone() == (1,)
    finally:
        wrapper.close()


@pytest.mark.parametrize(
    ("library", "expected"), [(OF_DJ, None), (OF_ENVIRON, "pgbackend.E001"), (OURS, None)]
)
def test_a_pool_in_the_query(library: str, expected: str | None) -> None:
    settings_dict = {**DEFAULTS, **LIBRARIES[library]("postgresql://web@db/shop?pool=true")}
    assert [each.id for each in problems("default", settings_dict)] == [expected][: bool(expected)]


@pytest.mark.parametrize("library", LIBRARIES)
def test_ssl_is_no_option(library: str) -> None:
    settings_dict = {**DEFAULTS, **LIBRARIES[library]("postgresql://web@db/shop?ssl=true")}
    assert [each.id for each in problems("default", settings_dict)] == ["pgbackend.E010"]
