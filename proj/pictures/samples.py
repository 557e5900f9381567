"""Takes samples of a rush: the desk's own figures, and PostgreSQL's count of its connections."""

import asyncio
import json

import psycopg

from proj.pictures.desk import NAME
from proj.pictures.guests import Guests, client

BACKENDS = """
    SELECT count(*)
    FROM pg_stat_activity
    WHERE application_name = %s AND backend_type = 'client backend'
"""


async def take(desk, *, pool, service_seconds, seconds, rate):
    """Send a rush, and return its samples with what was asked for, ready for JSON."""
    async with client(desk) as http:
        guests = Guests(desk)
        await guests.read_menu()
        watch = Watch(desk)
        async with asyncio.TaskGroup() as group:
            outside = group.create_task(watch.count_backends())
            feed = group.create_task(watch.read_feed(http))
            await watch.began.wait()
            await guests.rush(seconds, rate)
            await asyncio.sleep(1)
            outside.cancel()
            feed.cancel()
    return {
        "pool": pool,
        "service_seconds": service_seconds,
        "orders": guests.sent,
        "promised": guests.promised,
        "failed": guests.failed,
        "columns": ["seconds", "in_flight", "leased", "waiting", "backends"],
        "samples": watch.samples,
    }


class Watch:
    """Reads the feed of the status page, and asks PostgreSQL, from a connection of its own."""

    def __init__(self, desk):
        self._desk = desk
        self._backends = 0
        self.began = asyncio.Event()
        self.samples = []

    async def read_feed(self, http):
        """Note each message of the feed; the desk sends one each tenth of a second."""
        loop, begin = asyncio.get_running_loop(), None
        async with http.stream("GET", "/status/feed/") as stream:
            async for line in stream.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                now = json.loads(line.removeprefix("data: "))
                begin = begin or loop.time()
                seconds, pool = round(loop.time() - begin, 2), now["pool"]
                self.samples.append(
                    [seconds, now["in_flight"], pool["leased"], pool["waiting"], self._backends]
                )
                self.began.set()

    async def count_backends(self):
        async with await psycopg.AsyncConnection.connect(
            self._desk.database, autocommit=True, application_name=f"{NAME}-watch"
        ) as outside:
            while True:
                row = await (await outside.execute(BACKENDS, [NAME])).fetchone()
                self._backends = row[0]
                await asyncio.sleep(0.05)


def to_text(taken):
    """Return the samples as JSON, one to a line, so that a change of them can be read."""
    head = json.dumps({**taken, "samples": []}, indent=1)
    rows = ",\n  ".join(json.dumps(sample) for sample in taken["samples"])
    return head.replace('"samples": []', f'"samples": [\n  {rows}\n ]') + "\n"
