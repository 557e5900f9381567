"""Starts the tests' server, by `pgbackend.embedded`, or takes that of `DATABASE_URL`.

The settings import this module, because they need the address; conftest releases the server.
"""

from __future__ import annotations

import os

from pgbackend import embedded

#: The data need not survive a crash of the machine.
_SETTINGS = {
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
    "max_connections": "200",
}

#: The URL that the user has named, if any.
given = os.environ.get("DATABASE_URL")
# The server stops when its last user is gone, and this object is a user: the name must live on.
server = embedded.server(settings=_SETTINGS)
os.environ["DATABASE_URL"] = server.url
