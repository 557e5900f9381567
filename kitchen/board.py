"""Feeds the board with news: PostgreSQL's NOTIFY in, server-sent events out.

Each save of an order (in a page, the API, the admin or a shell) announces the order on a channel
inside the same transaction; PostgreSQL delivers at commit. Each server process listens with one
connection of its own while at least one browser watches, and passes the news on to all of them.

An event says which order changed; pages then fetch what they show. So an event that is lost, or
merged with others into ``refresh``, costs nothing but a fetch.
"""

import asyncio
import json
import logging
from contextlib import suppress

import psycopg
from django.db import connection, connections

from kitchen.perloop import PerLoop
from kitchen.sse import Hub

logger = logging.getLogger(__name__)

CHANNEL = "kitchen_board"
BACK_OFF = (0.2, 0.5, 1, 2, 5)  # seconds between attempts to listen again; the last repeats


def announce(data):
    """Tell every board, when the surrounding transaction commits."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_notify(%s, %s)", [CHANNEL, json.dumps(data)])


def announce_saved(sender, instance, created, **kwargs):
    """Announce an order that was saved; a receiver of ``post_save``."""
    announce(
        {
            "id": instance.pk,
            "guest": instance.guest,
            "status": instance.status,
            "label": instance.get_status_display(),
            "promised": instance.promised_minutes,
            "created": created,
        }
    )


class Listener(Hub):
    """Listens with one connection, for any number of open boards."""

    _listening = False

    def watch(self, order_id=None):
        """Return a new watcher, of one order or of all."""
        watcher = super().watch(wants=lambda data: order_id in (None, data.get("id", order_id)))
        if self._listening:
            watcher.put("refresh", {})
        return watcher

    async def _feed(self):
        """Listen, and listen again after each loss of the connection."""
        attempt = 0
        while True:
            try:
                async with await _connect() as conn:
                    await conn.execute(f"LISTEN {CHANNEL}")
                    attempt = 0
                    await self._hear(conn)
            except psycopg.Error as error:
                logger.warning("the board lost its connection, and tries again: %s", error)
            self.tell("lost", {})
            await asyncio.sleep(BACK_OFF[min(attempt, len(BACK_OFF) - 1)])
            attempt += 1

    async def _hear(self, conn):
        """Pass on what arrives, for as long as the connection lasts."""
        self._listening = True
        try:
            # Covers orders that changed between a page and its stream, or while the connection was
            # lost.
            self.tell("refresh", {})
            async for notify in conn.notifies():
                with suppress(ValueError):  # anyone may NOTIFY; other payloads are ignored
                    self._pass_on(json.loads(notify.payload))
        finally:
            self._listening = False

    def _pass_on(self, data):
        if isinstance(data, dict):
            self.tell("order" if "id" in data else "refresh", data)


async def _connect():
    """Open a connection outside the pool: it stays in LISTEN, and waits for most of its life."""
    params = connections["default"].get_connection_params()
    for django_only in ("cursor_factory", "context", "prepare_threshold"):
        params.pop(django_only, None)
    # A peer that vanished without closing the connection is noticed within a minute.
    alive = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
    return await psycopg.AsyncConnection.connect(**{**alive, **params}, autocommit=True)


listener = PerLoop(Listener)
