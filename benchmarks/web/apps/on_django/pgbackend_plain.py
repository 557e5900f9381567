"""Defines async views with ordinary QuerySets, on pgbackend."""

from __future__ import annotations

import asyncio

from django.db import transaction
from django.db.models import F
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import render

from benchmarks.web.apps.shape import CHUNK, LIST, PAGE, TEN, gate, row_json

from .models import Book, Counter, Entry, Row


async def one_view(request: HttpRequest, n: int) -> HttpResponse:
    return JsonResponse(row_json(Row.objects.get(pk=n)))


async def ten_view(request: HttpRequest, n: int) -> HttpResponse:
    rows = [Row.objects.get(pk=n + more) for more in TEN]
    return JsonResponse({"rows": [row_json(row) for row in rows]})


async def list_view(request: HttpRequest, n: int) -> HttpResponse:
    rows = Row.objects.filter(pk__gt=n).order_by("pk")[:LIST]
    return JsonResponse({"rows": [row_json(row) for row in rows]})


async def update_view(request: HttpRequest, n: int) -> HttpResponse:
    updated = Counter.objects.filter(pk=n).update(number=F("number") + 1)
    return JsonResponse({"updated": updated})


async def insert_view(request: HttpRequest, n: int) -> HttpResponse:
    with transaction.atomic():
        entry = Entry.objects.create(name=f"entry {n}", number=n)
    return JsonResponse({"inserted": entry.pk is not None})


async def page_view(request: HttpRequest, n: int) -> HttpResponse:
    books = Book.objects.select_related("author").prefetch_related("reviews")
    return render(request, "page.html", {"books": books.filter(pk__gt=n).order_by("pk")[:PAGE]})


async def wait_view(request: HttpRequest, n: int, seconds: float) -> HttpResponse:
    first = Row.objects.get(pk=n)
    await asyncio.sleep(seconds)
    second = Row.objects.get(pk=n + 1)
    return JsonResponse({"rows": [row_json(first), row_json(second)]})


async def stream_view(request: HttpRequest, n: int) -> HttpResponse:
    rows = total = 0
    for row in Row.objects.order_by("pk").iterator(chunk_size=CHUNK):
        rows += 1
        total += row.number
    return JsonResponse({"rows": rows, "total": total})


async def park_view(request: HttpRequest, n: int) -> HttpResponse:
    first = Row.objects.get(pk=n)
    await gate.wait()
    second = Row.objects.get(pk=n + 1)
    return JsonResponse({"rows": [row_json(first), row_json(second)]})
