"""Gathers the numbers of the status page: requests in flight beside connections in use, live."""

import asyncio

from django.conf import settings
from django.db import DEFAULT_DB_ALIAS

import pgbackend
from kitchen import board, inflight, rush
from kitchen.perloop import PerLoop
from kitchen.sse import Hub

POOL_NUMBERS = ("max_size", "size", "leased", "idle", "waiting", "requests", "connections_made")


def pool_numbers():
    """Add up the statistics of this process's pools for the default database."""
    pools = [pool for pool in pgbackend.statistics() if pool.alias == DEFAULT_DB_ALIAS]
    return {name: sum(getattr(pool, name) for pool in pools) for name in POOL_NUMBERS}


def numbers():
    """Return the numbers of the page. No database is asked: that would change the numbers."""
    return {
        "in_flight": inflight.requests.now,
        "peak": inflight.requests.peak,
        "answered": inflight.requests.answered,
        "service_calls": inflight.service_calls.now,
        "watching": board.listener.get().watchers,
        "pool": pool_numbers(),
        "rush": rush.current.get().progress(),
    }


class Feed(Hub):
    async def _feed(self):
        while True:
            self.tell("numbers", numbers())
            await asyncio.sleep(settings.KITCHEN_STATUS_SECONDS)


feed = PerLoop(Feed)
