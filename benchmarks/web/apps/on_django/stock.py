"""Defines async views on Django's own backend."""

from __future__ import annotations

from asgiref.sync import sync_to_async
from django.db import transaction
from django.http import HttpRequest, HttpResponse, JsonResponse

from .a_methods import (
    list_view,
    one_view,
    page_view,
    stream_view,
    ten_view,
    update_view,
    wait_view,
)
from .models import Entry

__all__ = [
    "insert_view",
    "list_view",
    "one_view",
    "page_view",
    "stream_view",
    "ten_view",
    "update_view",
    "wait_view",
]


@sync_to_async
def _insert(n: int) -> bool:
    # Django has no transaction in async code: its documentation says to write it so.
    with transaction.atomic():
        return Entry.objects.create(name=f"entry {n}", number=n).pk is not None


async def insert_view(request: HttpRequest, n: int) -> HttpResponse:
    return JsonResponse({"inserted": await _insert(n)})
