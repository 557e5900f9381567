"""Provides what the tests know of each queue: its worker, how tasks are sent, their results."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from tests.packages.workers import tasks

LIMIT = 20


@dataclass(frozen=True)
class Queue:
    package: str
    worker: list[str]
    """The arguments of the Python that runs the worker."""
    save: Any
    asave: Any
    fail: Any
    send: Callable[[Any, str], Any]
    """Send a task with its argument, in sync code; return what `result()` takes."""
    asend: Callable[[Any, str], Awaitable[Any]] | None
    """Send it from async code; None if the package has no function for that."""
    result: Callable[[Any], Any]
    """Return the result of a task that has ended, "failed" if it has failed, None before."""
    stop: Callable[[], Any] | None = None
    """Stop the worker by a task; None if `SIGTERM` may come at any time."""


def wait_for(found: Callable[[], Any]) -> Any:
    """Return the first result of `found()` that is not None."""
    deadline = time.monotonic() + LIMIT
    while (value := found()) is None:
        assert time.monotonic() < deadline, "the worker has not done the task"
        time.sleep(0.01)
    return value


async def await_for(found: Callable[[], Awaitable[Any]]) -> Any:
    """Return the first result of `await found()` that is not None."""
    async with asyncio.timeout(LIMIT):
        while (value := await found()) is None:
            await asyncio.sleep(0.01)
    return value


# --- Django's tasks -------------------------------------------------------------------------------


def _result_of_django(sent: Any) -> Any:
    sent.refresh()
    if not sent.is_finished:
        return None
    return sent.return_value if sent.status == "SUCCESSFUL" else "failed"


_DJANGO = Queue(
    "django-tasks-db",
    ["-m", "django", "db_worker", "--interval", "0.02", "--no-startup-delay", "-v", "0"],
    tasks.django_save,
    tasks.django_asave,
    tasks.django_fail,
    lambda task, name: task.enqueue(name),
    lambda task, name: task.aenqueue(name),
    _result_of_django,
    tasks.django_stop.enqueue,
)

# --- Procrastinate --------------------------------------------------------------------------------


def _result_of_procrastinate(job: int) -> Any:
    """Return 1 for a job that has succeeded: the package keeps no results."""
    from procrastinate.contrib.django.models import ProcrastinateJob

    status = ProcrastinateJob.objects.get(pk=job).status
    return {"succeeded": 1, "failed": "failed"}.get(status)


_PROCRASTINATE = Queue(
    "procrastinate",
    ["-m", "django", "procrastinate", "worker", "--concurrency", "2"],
    tasks.procrastinate_save,
    tasks.procrastinate_asave,
    tasks.procrastinate_fail,
    lambda task, name: task.defer(name=name),
    lambda task, name: task.defer_async(name=name),
    _result_of_procrastinate,
)

# --- Celery ---------------------------------------------------------------------------------------


def _result_of_celery(sent: Any) -> Any:
    if not sent.ready():
        return None
    return sent.result if sent.successful() else "failed"


_CELERY = Queue(
    "celery",
    [
        *("-m", "celery", "-A", "tests.packages.workers.celery_app", "worker"),
        *("--pool", "prefork", "--concurrency", "2", "--without-gossip", "--without-mingle"),
        *("--without-heartbeat", "--loglevel", "warning"),
    ],
    tasks.celery_save,
    tasks.celery_save_by_async,
    tasks.celery_fail,
    lambda task, name: task.delay(name),
    None,
    _result_of_celery,
)

QUEUES = {"django_tasks": _DJANGO, "procrastinate": _PROCRASTINATE, "celery": _CELERY}
