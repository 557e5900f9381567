"""Counts the requests that are being answered right now, to show them beside the connections.

The kitchen service, which plays another team's server, is counted apart: an order that waits for
it would count twice. The pages' own live streams are not counted, because they stay open while a
page is watched; static files never get here. A request ends with its response's head, which for
every other page of this site is when its body is ready too.
"""

from contextlib import contextmanager, nullcontext
from functools import cached_property

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.urls import reverse


class InFlight:
    """Counts requests: ``now`` in progress, ``peak`` at once, ``answered`` since the start."""

    def __init__(self):
        self.now = self.peak = self.answered = 0

    @contextmanager
    def one(self):
        self.now += 1
        self.peak = max(self.peak, self.now)
        try:
            yield
        finally:
            self.now -= 1
            self.answered += 1


requests = InFlight()
service_calls = InFlight()


class InFlightMiddleware:
    """Counts requests, sync or async, so that Django puts no adapter (and no thread) around it."""

    sync_capable = True
    async_capable = True

    def __init__(self, get_response):
        self.get_response = get_response
        if iscoroutinefunction(get_response):
            markcoroutinefunction(self)

    def __call__(self, request):
        if iscoroutinefunction(self):
            return self._acall(request)
        with self._counted(request):
            return self.get_response(request)

    async def _acall(self, request):
        with self._counted(request):
            return await self.get_response(request)

    def _counted(self, request):
        if request.path in self._streams:
            return nullcontext()
        return (service_calls if request.path == self._service else requests).one()

    @cached_property
    def _streams(self):
        return {reverse("kitchen:board-events"), reverse("kitchen:status-feed")}

    @cached_property
    def _service(self):
        return reverse("kitchen:estimate")
