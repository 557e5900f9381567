"""Defines sync views, for WSGI."""

from __future__ import annotations

import time

from django.db import transaction
from django.db.models import F
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import render

from benchmarks.web.apps.shape import CHUNK, LIST, PAGE, TEN, row_json

from .models import Book, Counter, Entry, Row


def one_view(request: HttpRequest, n: int) -> HttpResponse:
    return JsonResponse(row_json(Row.objects.get(pk=n)))


def ten_view(request: HttpRequest, n: int) -> HttpResponse:
    rows = [Row.objects.get(pk=n + more) for more in TEN]
    return JsonResponse({"rows": [row_json(row) for row in rows]})


def list_view(request: HttpRequest, n: int) -> HttpResponse:
    rows = Row.objects.filter(pk__gt=n).order_by("pk")[:LIST]
    return JsonResponse({"rows": [row_json(row) for row in rows]})


def update_view(request: HttpRequest, n: int) -> HttpResponse:
    updated = Counter.objects.filter(pk=n).update(number=F("number") + 1)
    return JsonResponse({"updated": updated})


def insert_view(request: HttpRequest, n: int) -> HttpResponse:
    with transaction.atomic():
        entry = Entry.objects.create(name=f"entry {n}", number=n)
    return JsonResponse({"inserted": entry.pk is not None})


def page_view(request: HttpRequest, n: int) -> HttpResponse:
    books = Book.objects.select_related("author").prefetch_related("reviews")
    return render(request, "page.html", {"books": books.filter(pk__gt=n).order_by("pk")[:PAGE]})


def wait_view(request: HttpRequest, n: int, seconds: float) -> HttpResponse:
    first = Row.objects.get(pk=n)
    time.sleep(seconds)
    second = Row.objects.get(pk=n + 1)
    return JsonResponse({"rows": [row_json(first), row_json(second)]})


def stream_view(request: HttpRequest, n: int) -> HttpResponse:
    rows = total = 0
    for row in Row.objects.order_by("pk").iterator(chunk_size=CHUNK):
        rows += 1
        total += row.number
    return JsonResponse({"rows": rows, "total": total})
