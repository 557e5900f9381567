"""Makes Celery's application; the parent of its workers uses the database before it forks."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from celery import Celery
from celery.signals import worker_init

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.packages.workers.settings")

app = Celery("packages")
app.config_from_object("django.conf:settings", namespace="CELERY")


@worker_init.connect
def use_the_database(**kwargs: Any) -> None:
    """Open a connection of sync code, and a pool of an event loop, in the process that forks."""
    from tests.packages.workers.models import Done

    Done.objects.count()
    asyncio.run(_count())


async def _count() -> None:
    from tests.packages.workers.models import Done

    await Done.objects.acount()
