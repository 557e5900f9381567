"""Leads the workers' connections through PgBouncer in transaction mode, and records them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from psycopg.conninfo import make_conninfo

from tests.support.pgbouncer import newer_program, pgbouncer, program
from tests.support.recorder import recorded

from .server import NotEnough


@contextmanager
def pooler(url: str, which: str) -> Iterator[int]:
    """Start PgBouncer before the server; yield the port, and at the end print what was recorded.

    `which` is "older" or "newer". Printed are the acts that would pin a session of RDS Proxy.
    """
    run = newer_program() if which == "newer" else program()
    if run is None:
        raise NotEnough("no such PgBouncer here: see tests/README.md")
    with (
        pgbouncer(url, run, default_pool_size=40) as parameters,
        recorded(make_conninfo(**parameters)) as (port, acts),
    ):
        yield port
    print("acts that would pin a session:", *(sorted(acts) or ["none"]), sep="\n  ")
