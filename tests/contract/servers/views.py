"""Defines async and sync views, function- and class-based, with plain QuerySets."""

import asyncio
import threading

from django.db import connection, transaction
from django.http import HttpResponse, JsonResponse, StreamingHttpResponse
from django.views.generic import ListView

from tests.library.models import Author, Book, Tag


async def several(request):
    """Send several statements of each kind, with awaits in which other requests go on."""
    nonce = request.GET["nonce"]
    author = Author.objects.create(name=nonce)
    await asyncio.sleep(0.01)
    async with transaction.atomic():
        book = await Book.objects.acreate(title=nonce, author=author)
        await asyncio.sleep(0)
        book.tags.add(Tag.objects.get_or_create(name=nonce)[0])
    await asyncio.sleep(0.01)
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT pg_backend_pid(), name FROM library_author WHERE id = %s", [author.pk]
        )
        pid, name = cursor.fetchone()
    await asyncio.sleep(0)
    book = await Book.objects.aget(pk=book.pk)
    tags = [tag.name async for tag in book.tags.all()]
    return JsonResponse({"nonces": [name, book.title, book.author.name, *tags], "pid": pid})


def where(request):
    """Answer, from a sync view, in which thread it runs."""
    here = threading.current_thread() is threading.main_thread()
    return HttpResponse(f"{Author.objects.count()} {'on the loop' if here else 'in a thread'}")


class Shelf(ListView):
    """Lists books as a class of the project's own, with sync methods: they may block."""

    queryset = Book.objects.order_by("pk")
    context_object_name = "books"
    template_name = "names.html"


class AsyncShelf(Shelf):
    async def get(self, request):
        await asyncio.sleep(0)
        return super().get(request)


async def stream_async(request):
    async def lines():
        for book in Book.objects.order_by("pk").iterator(chunk_size=2):
            yield f"{book.title} by {book.author.name}\n"
            await asyncio.sleep(0)

    return StreamingHttpResponse(lines())


def lines():
    for book in Book.objects.order_by("pk").iterator(chunk_size=2):
        yield f"{book.title} by {book.author.name}\n"


async def stream_sync(request):
    return StreamingHttpResponse(lines())


def stream_from_sync_view(request):
    return StreamingHttpResponse(lines())


async def echo(request):
    return HttpResponse(f"{len(request.body)} {Author.objects.count()}")


def hold_from_sync_view(request):
    """Lock a row, and wait for longer than a test takes."""
    with transaction.atomic(), connection.cursor() as cursor:
        Tag.objects.select_for_update().get(name=request.GET["tag"])
        cursor.execute("SELECT pg_sleep(60)")
    return HttpResponse()


async def hold(request):
    return hold_from_sync_view(request)
