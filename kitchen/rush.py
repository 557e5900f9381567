"""Runs a rush: hundreds of guests who order in the same moment.

A browser opens six connections to a host at most, so the server plays the guests itself: each is
one HTTP request to the ordering endpoint, through the socket, like anyone else's.
"""

import asyncio
import random
import time

import httpx
from django.urls import reverse

import pgbackend
from kitchen import service
from kitchen.perloop import PerLoop

MAX_SIZE = 500


class Rush:
    """Runs one rush at a time, and keeps the numbers of the present or latest one."""

    def __init__(self):
        self._task = None
        self._began = self._ended = None
        self.size = self.promised = self.unpromised = self.failed = 0

    @property
    def running(self):
        return self._task is not None and not self._task.done()

    def start(self, request, dishes, size):
        """Send ``size`` orders of ``dishes`` (ids) at once, in the background.

        Returns whether the orders are sent: not while another rush is running.
        """
        if self.running:
            return False
        self.size, self.promised, self.unpromised, self.failed = size, 0, 0, 0
        self._began, self._ended = time.monotonic(), None
        url = service.own_address(request) + reverse("kitchen:api-orders")
        # The guests do not take part in this request's transaction, should it have one.
        with pgbackend.detached():
            self._task = asyncio.create_task(self._run(url, request.get_host(), dishes))
        return True

    def progress(self):
        """Return the numbers for the status page; ``None`` before the first rush."""
        if self._began is None:
            return None
        return {
            "size": self.size,
            "promised": self.promised,
            "unpromised": self.unpromised,
            "failed": self.failed,
            "running": self.running,
            "seconds": round((self._ended or time.monotonic()) - self._began, 1),
        }

    async def aclose(self):
        if self.running:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self, url, host, dishes):
        try:
            async with asyncio.TaskGroup() as guests:
                for number in range(1, self.size + 1):
                    guests.create_task(self._order(url, host, _order(number, dishes)))
        finally:
            self._ended = time.monotonic()

    async def _order(self, url, host, order):
        try:
            async with service.client() as http:
                answer = await http.post(url, json=order, headers={"Host": host})
            promised = answer.raise_for_status().json()["promised_minutes"]
        except (httpx.HTTPError, ValueError, KeyError):
            self.failed += 1
        else:
            self.promised += promised is not None
            self.unpromised += promised is None


def _order(number, dishes):
    """Return the order of one guest of a rush: one to three dishes."""
    chosen = random.sample(dishes, min(1 + number % 3, len(dishes)))
    lines = [{"dish": dish, "quantity": 1 + number % 2} for dish in chosen]
    return {"table": f"Rush {number}", "lines": lines}


current = PerLoop(Rush)
