"""Starts the server of a run, with the extensions and collations that Django's tests use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from pgbackend import embedded

#: The data need not survive a crash of the machine.
SETTINGS = {
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
    "max_connections": "200",
}
#: The extensions that a module creates. The wheel's PostgreSQL has the first of them, but neither
#: the second nor the collations of ICU, which many tests use; Debian's has all but PostGIS, which
#: is a package of its own.
EXTENSIONS = {
    "postgres_tests": ("btree_gist", "uuid-ossp"),
    "gis_tests": ("postgis", "postgis_raster"),
}
#: The directories in which Debian and Ubuntu install servers.
INSTALLED = Path("/usr/lib/postgresql")


class NotEnough(RuntimeError):
    """Says that the server lacks something that the tests need, and how to provide it."""


@contextmanager
def server(labels: list[str]) -> Iterator[str]:
    """Start a server, or use that of `DATABASE_URL`; yield its URL.

    An installed server is preferred to the wheel's, since it has more extensions.
    """
    if not {"DATABASE_URL", "PGBACKEND_PG_BINDIR"} & os.environ.keys():
        installed = [path.parent for path in INSTALLED.glob("*/bin/initdb")]
        if installed:
            newest = max(installed, key=lambda path: float(path.parent.name))
            os.environ["PGBACKEND_PG_BINDIR"] = str(newest)
    with embedded.server(settings=SETTINGS) as running:
        _check(running.url, labels)
        yield running.url


def _check(url: str, labels: list[str]) -> None:
    modules = {label.partition(".")[0] for label in labels}
    wanted = {name for module in modules for name in EXTENSIONS.get(module, ())}
    with psycopg.connect(url) as connection:
        rows = connection.execute("SELECT name FROM pg_available_extensions").fetchall()
        version = connection.info.parameter_status("server_version")
        (icu,) = connection.execute(
            "SELECT count(*) FROM pg_collation WHERE collprovider = 'i'"
        ).fetchone() or (0,)
    missing = wanted - {name for (name,) in rows}
    if not icu:
        missing.add("ICU's collations")
    if missing:
        raise NotEnough(
            f"PostgreSQL {version} at {url.rpartition('@')[2] or url} lacks "
            f"{', '.join(sorted(missing))}: install a server that has ('make postgresql' or 'make "
            "postgis', as root on Debian or Ubuntu), or name one with PGBACKEND_PG_BINDIR or "
            "DATABASE_URL"
        )
