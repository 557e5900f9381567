"""Gathers what runs where: members with lag, HAProxy's view of them, PgBouncer's pools.

Each part is asked for itself, and all at once. What does not answer is shown as missing: a page
about a cluster must be there when the cluster is not. So no view of these pages needs a database.
"""

import asyncio
import csv
import io
from pathlib import Path

import psycopg
from psycopg.rows import dict_row

from proj.cluster import rest, steering
from proj.cluster.layout import USER, Layout
from proj.cluster.programs import ClusterError

TIMEOUT = 3


async def topology(home):
    """Return the state of all parts of the cluster in a directory."""
    layout = Layout.read(home)
    members, pids, proxy, pools = await asyncio.gather(
        asyncio.to_thread(rest.members, layout),
        _or_nothing(asyncio.to_thread(_pids, home), {}),
        _or_nothing(_haproxy(home), []),
        _or_nothing(_pgbouncer(layout), []),
    )
    known = {state["name"]: state for state in members}
    return {
        "members": [_member(member, known.get(member.name), pids) for member in layout.members],
        "haproxy": {"primary": layout.primary_port, "standbys": layout.standby_port, "sees": proxy},
        "pgbouncer": {"port": layout.pgbouncer_port, "pools": pools},
    }


def _member(member, state, pids):
    shown = {"name": member.name, "port": member.port, "runs": member.name in pids}
    if state is None:
        return {**shown, "role": "unknown", "state": "no answer", "timeline": None, "lag": None}
    return {**shown, **{name: state.get(name) for name in ("role", "state", "timeline", "lag")}}


async def _or_nothing(asking, nothing):
    try:
        async with asyncio.timeout(TIMEOUT):
            return await asking
    except (OSError, TimeoutError, psycopg.Error, ClusterError):
        return nothing


def _pids(home):
    return steering.order(home, "pids", seconds=TIMEOUT)


async def _haproxy(home):
    """Return the servers of each of HAProxy's ports, and its sessions to them."""
    reader, writer = await asyncio.open_unix_connection(Path(home, "haproxy", "socket"))
    try:
        writer.write(b"show stat\n")
        said = (await reader.read()).decode().removeprefix("# ")
    finally:
        writer.close()
    return [
        {
            "leads_to": row["pxname"],
            "server": row["svname"],
            "up": row["status"].startswith("UP"),
            "sessions": int(row["scur"]),
        }
        for row in csv.DictReader(io.StringIO(said))
        if row["svname"] not in ("FRONTEND", "BACKEND")
    ]


async def _pgbouncer(layout):
    """Return PgBouncer's pools: how many clients and servers each has, and who waits."""
    names = ("database", "cl_active", "cl_waiting", "sv_active", "sv_idle", "maxwait")
    arguments = layout.conninfo(layout.pgbouncer_port, dbname="pgbouncer")
    async with await psycopg.AsyncConnection.connect(
        **arguments, autocommit=True, row_factory=dict_row, connect_timeout=TIMEOUT
    ) as connection:
        cursor = psycopg.AsyncClientCursor(connection, row_factory=dict_row)
        await cursor.execute("SHOW POOLS")
        rows = await cursor.fetchall()
    return [{name: row[name] for name in names} for row in rows if row["user"] == USER]
