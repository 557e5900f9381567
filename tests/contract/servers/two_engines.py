"""Serves one request that uses both engines; run as a program, it prints what was seen."""

import asyncio
import json
import threading

import django

django.setup()

# ruff: noqa: E402 - models can be imported from here on

import httpx
from asgiref.sync import sync_to_async
from django.core.exceptions import SynchronousOnlyOperation
from django.core.handlers.asgi import ASGIHandler
from django.core.signals import request_finished, request_started
from django.db import connections
from django.db.backends.utils import CursorWrapper
from django.dispatch import Signal
from django.http import HttpResponse
from django.urls import path

import pgbackend
from tests.library.models import Tag

spoken = Signal()
names = {spoken: "spoken", request_started: "started", request_finished: "finished"}
seen = {"receivers": [], "statements of a-methods": {}}
wrappers = []
execute = CursorWrapper.execute


def place():
    return "loop" if threading.current_thread() is threading.main_thread() else "thread"


def recorded(self, *args, **kwargs):
    places = seen["statements of a-methods"].setdefault(self.db.alias, [])
    if place() not in places:
        places.append(place())
    return execute(self, *args, **kwargs)


def receiver(signal, **kwargs):
    """Query the other alias: a receiver of any signal may use every alias."""
    if signal is request_finished:
        seen["closed in its thread"] = wrappers[0].connection is None
    seen["receivers"].append([names[signal], Tag.objects.using("other").count(), place()])


def count_there():
    wrappers.append(connections["other"])
    return Tag.objects.using("other").count()


async def view(request):
    CursorWrapper.execute = recorded
    await Tag.objects.acreate(name="here")
    await Tag.objects.using("other").acreate(name="there")
    for alias in ("default", "other"):
        assert len([tag async for tag in Tag.objects.using(alias).aiterator()]) == 1
    CursorWrapper.execute = execute
    seen["here"] = [tag.name for tag in Tag.objects.all()]
    seen["there"] = [tag.name async for tag in Tag.objects.using("other")]
    try:
        Tag.objects.using("other").count()
    except SynchronousOnlyOperation:
        seen["refused"] = True
    seen["in a thread"] = await sync_to_async(count_there)()
    await spoken.asend(sender=None)
    return HttpResponse()


urlpatterns = [path("", view)]


async def main():
    for signal in names:
        signal.connect(receiver)
    transport = httpx.ASGITransport(app=ASGIHandler())
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        (await client.get("/")).raise_for_status()
    seen["leased"] = sum(record.leased for record in pgbackend.statistics())


if __name__ == "__main__":
    with connections["other"].schema_editor() as editor:
        editor.create_model(Tag)
    connections.close_all()
    asyncio.run(main())
    print(json.dumps(seen))
