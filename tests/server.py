"""The tests' server: `DATABASE_URL`'s, or one that `pgbackend.embedded` starts for the run.

Imported by the settings, which need its address, and by conftest, which gives it up.
"""

from __future__ import annotations

import os

from pgbackend import embedded

#: Nothing here is worth keeping after a crash of the machine.
_SETTINGS = {
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
    "max_connections": "200",
}

#: The one that the user has named, if any.
given = os.environ.get("DATABASE_URL")
# The kernel takes a server's place away with its last user, so this name must live on.
server = embedded.server(settings=_SETTINGS)
os.environ["DATABASE_URL"] = server.url
