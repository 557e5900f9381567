"""Describes a cluster: its directory, its members, its ports and its passwords.

The description is a file in the cluster's directory, for root or the user alone to read: whoever
steers, asks or serves the cluster reads it there.
"""

import json
import os
import secrets
import socket
from dataclasses import asdict, dataclass, field
from pathlib import Path

HOST = "127.0.0.1"
DATABASE = "kitchen"
USER = "kitchen"
#: PgBouncer's name of the database whose connections lead to standbys.
READ_ONLY = "kitchen_ro"
NAMES = ("a", "b", "c")

#: How far from the first port each kind of server begins, where a first port is given.
_OFFSETS = {"postgres": 1, "rest": 11, "raft": 21, "proxy": 31, "pgbouncer": 41}


@dataclass
class Member:
    """A PostgreSQL server with the Patroni that runs it."""

    name: str
    home: str
    port: int
    rest_port: int
    raft_port: int

    @property
    def data(self):
        return Path(self.home, "data")


@dataclass
class Layout:
    home: str
    members: list
    primary_port: int
    standby_port: int
    pgbouncer_port: int
    #: Patroni's settings that a test may change: of the cluster, and of PostgreSQL.
    dcs: dict = field(default_factory=dict)
    parameters: dict = field(default_factory=dict)
    passwords: dict = field(default_factory=dict)

    @classmethod
    def new(cls, home, first_port=None, **settings):
        """Choose ports and passwords for a cluster; without a first port, any free ports."""
        ports = _Ports(first_port)
        members = [
            Member(name, str(Path(home, name)), *map(ports.take, ("postgres", "rest", "raft")))
            for name in NAMES
        ]
        proxies = [ports.take("proxy"), ports.take("proxy"), ports.take("pgbouncer")]
        words = {
            name: secrets.token_hex(16) for name in ("postgres", "replicator", USER, "patroni")
        }
        return cls(str(home), members, *proxies, **settings, passwords=words)

    @classmethod
    def read(cls, home):
        """Return the description of the cluster in a directory."""
        content = json.loads(_file(home).read_text())
        content["members"] = [Member(**member) for member in content["members"]]
        return cls(**content)

    def write(self):
        """Write the description, in one step: others may be reading it."""
        part = _file(self.home).with_suffix(".part")
        part.unlink(missing_ok=True)
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(asdict(self), file)
        part.rename(_file(self.home))

    def member(self, name):
        """Return the member of this name."""
        for member in self.members:
            if member.name == name:
                return member
        raise KeyError(f"there is no member {name!r}: the members are {', '.join(NAMES)}")

    def move_proxy(self):
        """Choose other ports for HAProxy."""
        ports = _Ports(None)
        self.primary_port, self.standby_port = ports.take("proxy"), ports.take("proxy")

    def conninfo(self, port, user=USER, dbname=DATABASE):
        """Return the arguments of psycopg's ``connect()`` for a port of the cluster."""
        password = self.passwords[user]
        return {"host": HOST, "port": port, "user": user, "password": password, "dbname": dbname}


class _Ports:
    """Hands out ports: at distances from the first one, or any that are free."""

    def __init__(self, first):
        self._next = {kind: first + offset for kind, offset in _OFFSETS.items()} if first else None
        self._taken = set()

    def take(self, kind):
        """Return a port of 127.0.0.1 that this object has not given before."""
        if self._next:
            self._next[kind] += 1
            return self._next[kind] - 1
        while True:
            with socket.socket() as probe:
                probe.bind((HOST, 0))
                port = probe.getsockname()[1]
            if port not in self._taken:
                self._taken.add(port)
                return port


def _file(home):
    return Path(home, "layout.json")
