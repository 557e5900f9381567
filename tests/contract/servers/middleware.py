"""Defines middleware of each kind, which queries on the way in and on the way out."""

from inspect import iscoroutinefunction

from django.utils.decorators import (
    async_only_middleware,
    sync_and_async_middleware,
    sync_only_middleware,
)
from django.utils.deprecation import MiddlewareMixin

from tests.library.models import Entry


def note(request, text):
    request.notes = [*getattr(request, "notes", ()), text]
    Entry.objects.create(text=text)


@sync_only_middleware
def sync_only(get_response):
    def middleware(request):
        note(request, "sync in")
        response = get_response(request)
        note(request, "sync out")
        return response

    return middleware


@async_only_middleware
def async_only(get_response):
    async def middleware(request):
        note(request, "async in")
        response = await get_response(request)
        note(request, "async out")
        return response

    return middleware


@sync_and_async_middleware
def both(get_response):
    if iscoroutinefunction(get_response):

        async def middleware(request):
            note(request, "both in")
            return await get_response(request)

    else:

        def middleware(request):
            note(request, "both in")
            return get_response(request)

    return middleware


class Mixin(MiddlewareMixin):
    def process_request(self, request):
        note(request, "mixin in")

    def process_response(self, request, response):
        note(request, "mixin out")
        response["X-Notes"] = ",".join(request.notes)
        return response
