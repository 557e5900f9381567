"""Defines async views, with the QuerySets that one would write in sync views."""

import asyncio

from django.contrib.auth import login
from django.contrib.auth.models import User
from django.db import IntegrityError, connection, transaction
from django.http import HttpResponse, JsonResponse, StreamingHttpResponse
from django.shortcuts import get_object_or_404, render
from django.template.response import TemplateResponse
from django.views import View

from .forms import BookForm
from .models import Author, Book, Tag


async def books(request):
    return render(request, "library/books.html", {"books": Book.objects.order_by("title")})


async def books_rendered_later(request):
    return TemplateResponse(request, "library/books.html", {"books": Book.objects.order_by("pk")})


async def book(request, pk):
    book = get_object_or_404(Book.objects.defer("text"), pk=pk)
    return JsonResponse(
        {
            "title": book.title,
            "author": book.author.name,
            "tags": [tag.name for tag in book.tags.order_by("name")],
            "text": len(book.text),
            "siblings": book.author.books.exclude(pk=pk).count(),
        }
    )


async def new_book(request):
    form = BookForm(request.POST or None)
    if form.is_valid():
        return JsonResponse({"pk": form.save().pk})
    return HttpResponse(form.as_p(), status=400 if request.POST else 200)


async def sign_in(request):
    login(request, User.objects.get(username=request.POST["name"]))
    return HttpResponse("ok")


async def who(request):
    return HttpResponse(request.user.get_username() or "nobody")


async def give_back(request):
    """Write, fail, and record the failure; the first writes must be gone."""
    try:
        with transaction.atomic():
            Author.objects.create(name="lost")
            with transaction.atomic():
                Tag.objects.create(name="lost")
            Tag.objects.create(name="lost")
    except IntegrityError:
        Author.objects.create(name="kept")
    return JsonResponse({"authors": list(Author.objects.values_list("name", flat=True))})


async def walk(request):
    """Read many rows, a few at a time, and write meanwhile."""
    rows = peak = 0
    for book in Book.objects.only("title").iterator(chunk_size=500):
        rows += 1
        if rows % 10_000 == 0:
            Tag.objects.get_or_create(name=f"at {rows}")
        peak = max(peak, len(book.title))
    return JsonResponse({"rows": rows})


async def stream(request):
    async def lines():
        async for book in Book.objects.order_by("pk").aiterator(chunk_size=2):
            yield f"{book.title} by {book.author.name}\n"

    return StreamingHttpResponse(lines())


async def pause(request):
    """Send two statements with a wait between them, in which no connection is held."""
    first = list(Author.objects.values_list("name", flat=True))
    await asyncio.sleep(float(request.GET.get("seconds", 0.01)))
    assert connection.connection is None
    return JsonResponse({"same": first == list(Author.objects.values_list("name", flat=True))})


class AuthorView(View):
    async def get(self, request, pk):
        return HttpResponse(get_object_or_404(Author, pk=pk).name)


def sync_view(request):
    return HttpResponse(str(Author.objects.count()))
