"""Records the messages that the backend's connections send to the server."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from django.db.backends.signals import connection_created
from psycopg.pq import Trace


@contextmanager
def messages() -> Iterator[list[str]]:
    """Record the messages sent to the server on connections opened in the block, in order."""
    sent: list[str] = []
    with tempfile.TemporaryFile() as log:

        def trace(sender: Any, connection: Any, **kwargs: Any) -> None:
            connection.connection.pgconn.trace(log.fileno())
            connection.connection.pgconn.set_trace_flags(
                Trace.SUPPRESS_TIMESTAMPS | Trace.REGRESS_MODE
            )

        connection_created.connect(trace)
        try:
            yield sent
        finally:
            connection_created.disconnect(trace)
        log.seek(0)
        lines = log.read().decode().splitlines()
        sent += [line for line in lines if line.startswith(("F\t", "F "))]
