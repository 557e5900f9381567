"""Defines async views that answer from memory: they show what Django costs without a query.

The objects are those that the other stacks' ORM would have made, read once, at the first request.
"""

from __future__ import annotations

import asyncio
from functools import cache

from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import render

from benchmarks.web.apps.shape import LIST, PAGE, TEN, row_json

from .models import Book, Row


@cache
def rows() -> list[Row]:
    """Return all rows, each at the index of its key."""
    return [Row(), *Row.objects.order_by("pk")]


@cache
def books() -> list[Book]:
    found = Book.objects.select_related("author").prefetch_related("reviews")
    return list(found.order_by("pk"))


async def one_view(request: HttpRequest, n: int) -> HttpResponse:
    return JsonResponse(row_json(rows()[n]))


async def ten_view(request: HttpRequest, n: int) -> HttpResponse:
    return JsonResponse({"rows": [row_json(rows()[n + more]) for more in TEN]})


async def list_view(request: HttpRequest, n: int) -> HttpResponse:
    return JsonResponse({"rows": [row_json(row) for row in rows()[n + 1 : n + 1 + LIST]]})


async def page_view(request: HttpRequest, n: int) -> HttpResponse:
    return render(request, "page.html", {"books": books()[n : n + PAGE]})


async def wait_view(request: HttpRequest, n: int, seconds: float) -> HttpResponse:
    first = rows()[n]
    await asyncio.sleep(seconds)
    return JsonResponse({"rows": [row_json(first), row_json(rows()[n + 1])]})
