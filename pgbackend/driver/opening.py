"""Opening connections that no pool keeps: without blocking a loop, and with a time zone."""

from __future__ import annotations

from typing import Any, Self

import psycopg
from psycopg.abc import PQGenConn

from .bridge import await_, current
from .declaring import DeclaringConnection
from .through_pooler import TRANSACTION
from .time_zones import start_with, steps_of
from .unpooled import add_own_connection


class _Opening(psycopg.AsyncConnection[Any]):
    """A connection that green code opens, for the sake of its socket."""

    @classmethod
    def _connect_gen(cls, conninfo: str = "", **kwargs: Any) -> PQGenConn[Self]:
        return steps_of(super()._connect_gen(conninfo, **kwargs))


class OpeningConnection(DeclaringConnection):
    """A psycopg connection that green code can open without blocking the loop."""

    #: The alias, if a thread opened the connection for itself, and no pool has it.
    thread_of: str | None = None

    @classmethod
    def connect(  # type: ignore[override]  # psycopg's arguments are in `kwargs`
        cls,
        conninfo: str = "",
        *,
        pooler: str | None = None,
        time_zone: str | None = None,
        **kwargs: Any,
    ) -> Self:
        """Open a connection that no pool keeps; the other arguments and the errors are psycopg's.

        In green code, the loop serves other tasks meanwhile. `pooler` is `"transaction"` if a
        transaction pooler stands before the server (through_pooler.py). `time_zone` is the one that
        the session begins with; None leaves it to the server.
        """
        portal = current()
        connect = super().connect if portal is None else cls._connect_green
        with start_with(time_zone):
            self = connect(conninfo, **kwargs)
        self.session_settings.per_transaction = pooler == TRANSACTION
        add_own_connection(self)
        return self

    @classmethod
    def _connect_gen(cls, conninfo: str = "", **kwargs: Any) -> PQGenConn[Self]:
        return steps_of(super()._connect_gen(conninfo, **kwargs))

    @classmethod
    def _connect_green(cls, conninfo: str, **kwargs: Any) -> Self:
        """Open a psycopg `AsyncConnection`, and return a `Connection` on its socket.

        psycopg's `Connection` would block the loop while it looks host names up.
        """
        options = {name: kwargs.pop(name, None) for name in ("cursor_factory", "row_factory")}
        opened = await_(_Opening.connect(conninfo, **kwargs))
        self = cls(opened.pgconn)
        self._autocommit = opened._autocommit  # noqa: SLF001
        self._adapters = opened._adapters  # noqa: SLF001
        self.prepare_threshold = opened.prepare_threshold
        for name, value in options.items():
            if value:
                setattr(self, name, value)
        # psycopg must not report `opened` as left open: `self` has its socket.
        opened._pool = None  # noqa: SLF001
        return self
