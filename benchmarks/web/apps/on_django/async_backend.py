"""Defines async views on django-async-backend, with its managers.

What the package lacks (related managers, `prefetch_related`) is written as its documentation says.
"""

from __future__ import annotations

import asyncio

from django.db.models import F
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import render
from django_async_backend.db.transaction import async_atomic

from benchmarks.web.apps.shape import LIST, PAGE, TEN, row_json

from .models import Book, Counter, Entry, Review, Row


async def one_view(request: HttpRequest, n: int) -> HttpResponse:
    return JsonResponse(row_json(await Row.async_objects.aget(pk=n)))


async def ten_view(request: HttpRequest, n: int) -> HttpResponse:
    rows = [await Row.async_objects.aget(pk=n + more) for more in TEN]
    return JsonResponse({"rows": [row_json(row) for row in rows]})


async def list_view(request: HttpRequest, n: int) -> HttpResponse:
    rows = Row.async_objects.filter(pk__gt=n).order_by("pk")[:LIST]
    return JsonResponse({"rows": [row_json(row) async for row in rows]})


async def update_view(request: HttpRequest, n: int) -> HttpResponse:
    updated = await Counter.async_objects.filter(pk=n).aupdate(number=F("number") + 1)
    return JsonResponse({"updated": updated})


async def insert_view(request: HttpRequest, n: int) -> HttpResponse:
    async with async_atomic():
        entry = await Entry.async_objects.acreate(name=f"entry {n}", number=n)
    return JsonResponse({"inserted": entry.pk is not None})


async def page_view(request: HttpRequest, n: int) -> HttpResponse:
    books = Book.async_objects.select_related("author").filter(pk__gt=n).order_by("pk")[:PAGE]
    found = {book.pk: book async for book in books}
    reviews: dict[int, list[Review]] = {pk: [] for pk in found}
    async for review in Review.async_objects.filter(book__in=list(found)).order_by("pk"):
        reviews[review.book_id].append(review)
    for pk, book in found.items():
        # As Django's own prefetch leaves it, for the template's `book.reviews.all`.
        prefetched = book.reviews.all()
        prefetched._result_cache = reviews[pk]  # noqa: SLF001
        prefetched._prefetch_done = True  # noqa: SLF001
        book._prefetched_objects_cache = {"reviews": prefetched}  # noqa: SLF001
    return render(request, "page.html", {"books": found.values()})


async def wait_view(request: HttpRequest, n: int, seconds: float) -> HttpResponse:
    first = await Row.async_objects.aget(pk=n)
    await asyncio.sleep(seconds)
    second = await Row.async_objects.aget(pk=n + 1)
    return JsonResponse({"rows": [row_json(first), row_json(second)]})
