"""Feeds the board with news: PostgreSQL's NOTIFY in, server-sent events out.

Each save of an order (in a page, the API, the admin or a shell) announces the order on a channel
inside the same transaction; PostgreSQL delivers at commit. Each server process listens, with one
connection beside the pool, while at least one browser watches, and passes the news on to all of
them. `pgbackend.listen()` connects again by itself, and tells the gap.

An event says which order changed; pages then fetch what they show. So an event that is lost, or
merged with others into ``refresh``, costs nothing but a fetch.
"""

import asyncio
import json
import logging
from contextlib import suppress

from django.db import DatabaseError

import pgbackend
from kitchen.perloop import PerLoop
from kitchen.sse import Hub

logger = logging.getLogger(__name__)

CHANNEL = "kitchen_board"
PAUSE = 1  # seconds until it tries again, where listening cannot be begun


def announce(data):
    """Tell every board, when the surrounding transaction commits."""
    pgbackend.notify(CHANNEL, json.dumps(data))


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
        """Listen, and try again while that cannot be begun."""
        while True:
            try:
                async with pgbackend.listen(CHANNEL) as items:
                    await self._hear(items)
            except DatabaseError as error:
                logger.warning("the board cannot listen, and tries again: %s", error)
            self.tell("lost", {})
            await asyncio.sleep(PAUSE)

    async def _hear(self, items):
        """Pass on what arrives, for as long as the connection lasts."""
        try:
            async for item in items:
                if isinstance(item, pgbackend.Gap):
                    self._listening = True
                    # Covers orders that changed between a page and its stream, or while the
                    # connection was lost.
                    self.tell("refresh", {})
                    continue
                with suppress(ValueError):  # anyone may NOTIFY; other payloads are ignored
                    self._pass_on(json.loads(item.payload))
        finally:
            self._listening = False

    def _pass_on(self, data):
        if isinstance(data, dict):
            self.tell("order" if "id" in data else "refresh", data)


listener = PerLoop(Listener)
