"""Prepares the database of a run, and counts its sessions."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from pgbackend import embedded

#: A commit waits for no disk: stacks are compared, not disks. `max_connections` is PostgreSQL's
#: own default.
SETTINGS = {
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
    "autovacuum": "off",
    "max_connections": "100",
}
_numbers = itertools.count(1)
_SCHEMA = Path(__file__).parent / "schema.sql"


class Database:
    """Holds the database that the stacks use, and a session that watches it."""

    def __init__(self, url: str, name: str) -> None:
        self.url = url
        """The server's; the stacks use another database there."""
        self.params = {**embedded.database_settings(url), "NAME": name}
        self._session = self.connect()

    def connect(self) -> psycopg.Connection[Any]:
        names = {"NAME": "dbname", "USER": "user", "PASSWORD": "password", "HOST": "host"}
        given = {new: self.params[old] for old, new in {**names, "PORT": "port"}.items()}
        options = {**self.params.get("OPTIONS", {}), "application_name": "bench"}
        return psycopg.connect(
            **{key: value for key, value in given.items() if value}, **options, autocommit=True
        )

    def rows(self, query: str, *parameters: Any) -> list[Any]:
        return self._session.execute(query.encode(), parameters).fetchall()

    def connections(self, application_name: str) -> int:
        """Return how many sessions the named stack has now."""
        query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"
        return int(self.rows(query, application_name)[0][0])

    def tidy(self) -> None:
        """Remove the rows and changes that "insert" and "update" have left."""
        self._session.execute("TRUNCATE bench_entry")
        self._session.execute("VACUUM bench_counter")

    def version(self) -> str:
        return str(self.rows("SHOW server_version")[0][0])

    def close(self) -> None:
        self._session.close()


@contextmanager
def prepared(url: str | None = None) -> Iterator[Database]:
    """Make the database on a server of its own, or on that of `url` or ``DATABASE_URL``."""
    if url is not None:
        with _made_on(url) as database:
            yield database
        return
    with embedded.server(settings=SETTINGS) as server, _made_on(server.url) as database:
        yield database


@contextmanager
def _made_on(url: str) -> Iterator[Database]:
    name = f"pgbackend_benchmark_{os.getpid()}_{next(_numbers)}"
    quoted = sql.Identifier(name)
    with psycopg.connect(url, autocommit=True) as session:
        create = sql.SQL("CREATE DATABASE {} TEMPLATE template0 ENCODING 'UTF8'")
        session.execute(create.format(quoted))
        session.execute(sql.SQL("ALTER DATABASE {} SET timezone = 'UTC'").format(quoted))
        database = Database(url, name)
        try:
            with database.connect() as maker:
                maker.execute(_SCHEMA.read_bytes())
            yield database
        finally:
            database.close()
            session.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(quoted))
