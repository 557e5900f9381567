"""`pgbackend.embedded`, as docs/tests.md and docs/settings.md show it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, assert_type

from pgbackend import embedded
from pgbackend.embedded import EmbeddedError, Server, find_bindir

server = embedded.server(settings={"fsync": "off"})
DATABASES = {"default": {"ENGINE": "pgbackend", **server.params}}

assert_type(server, Server)
assert_type(server.url, str)
assert_type(server.version, str | None)
assert_type(embedded.database_settings("postgresql:///db"), dict[str, Any])


def try_one(base: Path) -> str:
    try:
        with embedded.server(base, keep=False) as running:
            return running.url
    except EmbeddedError:
        return str(find_bindir())
