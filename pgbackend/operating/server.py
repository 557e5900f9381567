"""Asks a server for what matters to an operator: its version, its limits, its time-outs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: The major versions of PostgreSQL that pgbackend is tested with.
FIRST, LAST = 14, 18

#: The settings of the server, and of the session, that are looked at.
SETTINGS = (
    "max_connections",
    "superuser_reserved_connections",
    "reserved_connections",
    "idle_in_transaction_session_timeout",
    "idle_session_timeout",
    "statement_timeout",
    "lock_timeout",
    "transaction_timeout",
    "default_transaction_isolation",
    "default_transaction_read_only",
    "standard_conforming_strings",
    "tcp_keepalives_idle",
    "tcp_keepalives_interval",
    "tcp_keepalives_count",
    "client_connection_check_interval",
    "server_encoding",
    "client_encoding",
    "TimeZone",
)

_FACTS = """
SELECT current_setting('server_version'),
    current_setting('server_version_num')::int,
    pg_is_in_recovery(),
    current_setting('transaction_read_only') = 'on',
    (SELECT rolconnlimit FROM pg_roles WHERE rolname = session_user),
    (SELECT rolsuper FROM pg_roles WHERE rolname = session_user),
    (SELECT datconnlimit FROM pg_database WHERE datname = current_database()),
    (SELECT sum(numbackends)::int FROM pg_stat_database)
"""


@dataclass(frozen=True)
class Server:
    """The facts of one server, as one role sees them in one database."""

    version: str
    number: int
    is_standby: bool
    is_read_only: bool
    role_limit: int
    is_superuser: bool
    database_limit: int
    in_use: int
    settings: Mapping[str, str]
    """The values of `SETTINGS`, with their units."""
    numbers: Mapping[str, float]
    """The same in seconds, or as counts, for those that are numbers."""
    place: str
    """The address and port that were reached: the same for aliases of one server, or pooler."""

    @property
    def major(self) -> int:
        return self.number // 10_000

    def whole(self, name: str) -> int:
        """Return the number of connections that the setting `name` allows or reserves."""
        return int(self.numbers.get(name, 0))

    @property
    def allowed(self) -> int:
        """The number of connections that the role may have, if nobody else has any."""
        limits = [self.role_limit, self.database_limit, self.unreserved]
        if self.is_superuser:  # whom only the server as a whole limits
            return self.unreserved
        return min(limit for limit in limits if limit >= 0)

    @property
    def unreserved(self) -> int:
        """The server's connections without those that are kept for superusers and others."""
        kept = ("superuser_reserved_connections", "reserved_connections")
        most = self.whole("max_connections")
        return most if self.is_superuser else most - sum(map(self.whole, kept))


def ask(wrapper: Any) -> Server:
    """Return the facts of the server of `wrapper`, which is connected."""
    with wrapper.cursor() as cursor:
        cursor.execute(_FACTS)
        version, number, standby, read_only, role, is_super, database, in_use = cursor.fetchone()
        cursor.execute(
            "SELECT name, current_setting(name), setting, unit FROM pg_settings "
            "WHERE name = ANY(%s) ORDER BY name",
            [list(SETTINGS)],
        )
        rows = cursor.fetchall()
    info = wrapper.connection.info
    return Server(
        version=version,
        number=number,
        is_standby=standby,
        is_read_only=read_only,
        role_limit=-1 if role is None else role,
        is_superuser=bool(is_super),
        database_limit=-1 if database is None else database,
        in_use=in_use or 0,
        settings={name: value for name, value, _, _ in rows},
        numbers={
            name: int(raw) * (0.001 if unit == "ms" else 1)
            for name, _, raw, unit in rows
            if raw.isdecimal()
        },
        place=f"{info.hostaddr or info.host}:{info.port}",
    )
