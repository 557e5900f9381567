"""Defines consumers of channels, with the QuerySets that one would write in sync consumers."""

import asyncio
import threading

from channels.generic.http import AsyncHttpConsumer
from channels.generic.websocket import (
    AsyncJsonWebsocketConsumer,
    AsyncWebsocketConsumer,
    WebsocketConsumer,
)
from django.db import transaction

from tests.library.models import Author, Book, Tag


def titles():
    return " ".join(Book.objects.order_by("title").values_list("title", flat=True))


class Text(AsyncWebsocketConsumer):
    async def connect(self):
        self.tag = Tag.objects.create(name="connected")
        await self.accept()

    async def receive(self, text_data=None, bytes_data=None):
        book = Book.objects.get(title=text_data)
        await self.send(f"{book.title} by {book.author.name}")

    async def disconnect(self, code):
        with transaction.atomic():
            self.tag.delete()


class Json(AsyncJsonWebsocketConsumer):
    async def receive_json(self, content):
        with transaction.atomic():
            author = Author.objects.create(name=content["author"])
            await asyncio.gather(*(self.add(author, title) for title in content["titles"]))
        await self.send_json({"made": [book.title for book in author.books.order_by("title")]})

    async def add(self, author, title):
        author.books.create(title=title)


class Http(AsyncHttpConsumer):
    async def handle(self, body):
        await self.send_response(200, titles().encode())


class Sync(WebsocketConsumer):
    """Handles messages in a thread, where it may block."""

    def receive(self, text_data=None, bytes_data=None):
        here = threading.current_thread() is threading.main_thread()
        self.send(f"{titles()} {'on the loop' if here else 'in a thread'}")
