"""Defines async views with a-methods on pgbackend."""

from __future__ import annotations

from django.db import transaction
from django.http import HttpRequest, HttpResponse, JsonResponse

from benchmarks.web.apps.shape import gate, row_json

from .a_methods import (
    list_view,
    one_view,
    page_view,
    stream_view,
    ten_view,
    update_view,
    wait_view,
)
from .models import Entry, Row

__all__ = [
    "insert_view",
    "list_view",
    "one_view",
    "page_view",
    "park_view",
    "stream_view",
    "ten_view",
    "update_view",
    "wait_view",
]


async def insert_view(request: HttpRequest, n: int) -> HttpResponse:
    async with transaction.atomic():
        entry = await Entry.objects.acreate(name=f"entry {n}", number=n)
    return JsonResponse({"inserted": entry.pk is not None})


async def park_view(request: HttpRequest, n: int) -> HttpResponse:
    first = await Row.objects.aget(pk=n)
    await gate.wait()
    second = await Row.objects.aget(pk=n + 1)
    return JsonResponse({"rows": [row_json(first), row_json(second)]})
