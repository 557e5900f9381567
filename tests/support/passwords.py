"""Makes a role that must give a password, on a server of the tests' own."""

from __future__ import annotations

from typing import Any

import psycopg


def make_careful_role(admin: psycopg.Connection[Any]) -> None:
    """Make the role `careful` with the password `right`; the server must then reload its rules."""
    admin.execute("CREATE ROLE careful LOGIN PASSWORD 'right'")
    row = admin.execute(
        "SELECT path, pg_read_file(path) FROM current_setting('hba_file') AS path"
    ).fetchone()
    assert row is not None
    hba, rules = row
    rules = f"local all careful scram-sha-256\n{rules}".replace("'", "''")
    admin.execute(
        f"COPY (SELECT unnest(string_to_array('{rules}', E'\\n'))) TO '{hba}' (DELIMITER E'\\x01')"
    )
