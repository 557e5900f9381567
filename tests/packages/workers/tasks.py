"""Provides the tasks: for each queue a sync one, an async one, and one that fails in a block."""

from __future__ import annotations

import os
import signal

from asgiref.sync import async_to_sync
from celery import shared_task
from django.db import connection, transaction
from procrastinate.contrib.django import app

from tests.packages.workers.models import Done

try:
    from django.tasks import task
except ImportError:  # Django before 6
    from django_tasks import task


def session() -> int:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        return cursor.fetchone()[0]


def save(name: str) -> int:
    """Write a row in a block, and return the number of rows of its name."""
    with transaction.atomic():
        Done.objects.create(name=name, pid=os.getpid(), session=session())
        return Done.objects.filter(name=name).count()


async def asave(name: str) -> int:
    await Done.objects.acreate(name=name, pid=os.getpid(), session=0)
    return await Done.objects.filter(name=name).acount()


def fail(name: str) -> None:
    with transaction.atomic():
        save(name)
        raise ValueError(name)


def save_by_async(name: str) -> int:
    return async_to_sync(asave)(name)


@task()
def django_save(name: str) -> int:
    return save(name)


@task()
async def django_asave(name: str) -> int:
    return await asave(name)


@task()
def django_fail(name: str) -> None:
    fail(name)


@task()
def django_stop() -> None:
    """Stop the worker in the midst of a task: db_worker exits from inside of any other code."""
    os.kill(os.getpid(), signal.SIGTERM)


procrastinate_save = app.task(name="save")(save)
procrastinate_asave = app.task(name="asave")(asave)
procrastinate_fail = app.task(name="fail")(fail)
celery_save = shared_task(name="save")(save)
celery_save_by_async = shared_task(name="save_by_async")(save_by_async)
celery_fail = shared_task(name="fail")(fail)
