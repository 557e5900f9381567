"""Defines the async views with a-methods that are the same on stock and on pgbackend."""

from __future__ import annotations

import asyncio

from django.db.models import F
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import render

from benchmarks.web.apps.shape import CHUNK, LIST, PAGE, TEN, row_json

from .models import Book, Counter, Row


async def one_view(request: HttpRequest, n: int) -> HttpResponse:
    return JsonResponse(row_json(await Row.objects.aget(pk=n)))


async def ten_view(request: HttpRequest, n: int) -> HttpResponse:
    rows = [await Row.objects.aget(pk=n + more) for more in TEN]
    return JsonResponse({"rows": [row_json(row) for row in rows]})


async def list_view(request: HttpRequest, n: int) -> HttpResponse:
    rows = Row.objects.filter(pk__gt=n).order_by("pk")[:LIST]
    return JsonResponse({"rows": [row_json(row) async for row in rows]})


async def update_view(request: HttpRequest, n: int) -> HttpResponse:
    updated = await Counter.objects.filter(pk=n).aupdate(number=F("number") + 1)
    return JsonResponse({"updated": updated})


async def page_view(request: HttpRequest, n: int) -> HttpResponse:
    books = Book.objects.select_related("author").prefetch_related("reviews")
    found = [book async for book in books.filter(pk__gt=n).order_by("pk")[:PAGE]]
    return render(request, "page.html", {"books": found})


async def wait_view(request: HttpRequest, n: int, seconds: float) -> HttpResponse:
    first = await Row.objects.aget(pk=n)
    await asyncio.sleep(seconds)
    second = await Row.objects.aget(pk=n + 1)
    return JsonResponse({"rows": [row_json(first), row_json(second)]})


async def stream_view(request: HttpRequest, n: int) -> HttpResponse:
    rows = total = 0
    async for row in Row.objects.order_by("pk").aiterator(chunk_size=CHUNK):
        rows += 1
        total += row.number
    return JsonResponse({"rows": rows, "total": total})
