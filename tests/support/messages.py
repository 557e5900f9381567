"""Records the messages that the backend's connections send to the server."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from django.db.backends.signals import connection_created
from psycopg.pq import Trace

#: A message of the trace, from the client (F) or the server (B); its SQL may have several lines.
_MESSAGE = re.compile(r"^[FB][\t ].*?(?=^[FB][\t ]|\Z)", re.DOTALL | re.MULTILINE)


@contextmanager
def messages(*, received: bool = False) -> Iterator[list[str]]:
    """Record the messages sent to the server on connections opened in the block, in order.

    Those that are received are recorded, too, if `received`; they begin with a B.
    """
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
        found = _MESSAGE.findall(log.read().decode())
        kinds = ("F", "B") if received else ("F",)
        sent += [message.rstrip("\n") for message in found if message.startswith(kinds)]
