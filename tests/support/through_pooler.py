"""Leads the alias 'default' through PgBouncer: see pooler_run.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from django.db import connection, connections
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tests.support.pgbouncer import newer_program, pgbouncer, program
from tests.support.recorder import recorded


@contextmanager
def through_pooler(config: pytest.Config, conninfo: str) -> Iterator[None]:
    """Lead the alias 'default' through PgBouncer; at the end, fail for acts that pin a session."""
    run = newer_program() if config.option.pooler == "newer" else program()
    assert run is not None, "no such PgBouncer here: see tests/README.md"
    settings_dict = connections.settings["default"]
    before = dict(settings_dict)
    with (
        pgbouncer(conninfo, run, default_pool_size=90) as parameters,
        recorded(make_conninfo(**parameters)) as (port, acts),
    ):
        _connect_anew()
        options = {"sslmode": "disable", "gssencmode": "disable", "pooler": "transaction"}
        options["listen"] = _without_database(conninfo)
        settings_dict.update(
            HOST="127.0.0.1",
            PORT=str(port),
            USER="anybody",
            PASSWORD="",
            OPTIONS={**before["OPTIONS"], **options},
        )
        connection.ensure_connection()  # Django's synchronous pool is open, as without a pooler
        yield
        _connect_anew()
        settings_dict.update(before)
    assert not acts, f"acts that pin a session: {dict(acts)}"


def _without_database(conninfo: str) -> str:
    given = conninfo_to_dict(conninfo)
    given.pop("dbname", None)
    return make_conninfo(**given)


def _connect_anew() -> None:
    connection.close()
    connections["default"].close_pool()
