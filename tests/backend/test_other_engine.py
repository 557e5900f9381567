"""Tests that an alias with another ENGINE behaves as in Django, also beside pgbackend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PROJECT = """
import asyncio, sys, threading
import django
from asgiref.sync import sync_to_async
from django.conf import settings
from pgbackend.embedded import database_settings
import json
import os

database = {**database_settings(os.environ["DATABASE_URL"]), "ENGINE": "pgbackend"}
database["NAME"] = "other_engine"
settings.configure(
    DATABASES={
        "default": database,
        "other": {"ENGINE": "django.db.backends.sqlite3", "NAME": sys.argv[1]},
    },
    ROOT_URLCONF=__name__,
    ALLOWED_HOSTS=["*"],
    INSTALLED_APPS=["django.contrib.contenttypes"],
    USE_TZ=True,
)
django.setup()

from django.contrib.contenttypes.models import ContentType
from django.core.exceptions import SynchronousOnlyOperation
from django.core.management import call_command
from django.db import connection, connections, transaction
from django.http import JsonResponse
from django.test import AsyncClient
from django.urls import path

for alias in ("default", "other"):
    call_command("migrate", database=alias, verbosity=0)
    ContentType.objects.using(alias).all().delete()
ContentType.objects.using("other").create(app_label="app", model="sqlite")
connections.close_all()
where = []


class Probe(ContentType):
    class Meta:
        proxy = True
        app_label = "contenttypes"

    def save(self, *args, **kwargs):
        where.append((kwargs.get("using"), threading.current_thread() is threading.main_thread()))
        super().save(*args, **kwargs)


async def view(request):
    here = list(ContentType.objects.values_list("model", flat=True))
    there = [row.model async for row in ContentType.objects.using("other")]
    try:
        list(ContentType.objects.using("other"))
    except SynchronousOnlyOperation:
        refused = True
    await Probe(app_label="a", model="postgresql").asave(using="default")
    await Probe(app_label="a", model="sqlite").asave(using="other")
    count = await sync_to_async(ContentType.objects.using("other").count)()
    streamed = [row.model async for row in ContentType.objects.using("other").aiterator()]
    with transaction.atomic():
        ContentType.objects.create(app_label="b", model="in a block")
        transaction.set_rollback(True)
    return JsonResponse({
        "here": here, "there": there, "refused": refused, "where": where,
        "count": count, "streamed": len(streamed), "after": ContentType.objects.count(),
    })


urlpatterns = [path("", view)]


async def main():
    response = await AsyncClient().get("/")
    print(response.content.decode())
    await sync_to_async(connections.close_all)()  # those of asgiref's thread


asyncio.run(main())
connections.close_all()
"""


@pytest.fixture
def database(admin: Any) -> Iterator[None]:
    admin.execute("DROP DATABASE IF EXISTS other_engine")
    admin.execute("CREATE DATABASE other_engine")
    yield
    admin.execute("DROP DATABASE other_engine WITH (FORCE)")


def test_both_engines_work_in_one_request(tmp_path: Path, conninfo: str, database: None) -> None:
    script = tmp_path / "project.py"
    script.write_text(PROJECT)
    done = subprocess.run(
        [sys.executable, "-W", "error", script, tmp_path / "other.sqlite3"],
        env={**os.environ, "DATABASE_URL": conninfo, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    answer = json.loads(done.stdout)
    assert answer == {
        "here": [],
        "there": ["sqlite"],
        "refused": True,
        "where": [["default", True], ["other", False]],
        "count": 2,
        "streamed": 2,
        "after": 1,
    }
