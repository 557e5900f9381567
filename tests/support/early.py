"""Shows what a tool sees that patches a class before the backend loads: ``early.py CLASS NAME``.

The output is how often some blocks called the method NAME, in a sync context and green.
"""

import asyncio
import contextlib
import functools
import json
import os
import pkgutil
import sys

import django
from django.conf import settings

OWNER, NAME = pkgutil.resolve_name(sys.argv[1]), sys.argv[2]
seen = []
original = getattr(OWNER, NAME)


@functools.wraps(original)
def patch(self, *args, **kwargs):
    seen.append(NAME)
    return original(self, *args, **kwargs)


setattr(OWNER, NAME, patch)

from pgbackend import embedded  # noqa: E402

settings.configure(
    DATABASES={
        "default": {
            **embedded.database_settings(os.environ["DATABASE_URL"]),
            "ENGINE": "pgbackend",
            "CONN_MAX_AGE": None,
        }
    },
)
django.setup()

from django.db import connection, models, transaction  # noqa: E402

from pgbackend import aio  # noqa: E402


class Namespace(models.Model):
    """Maps a table that each database has."""

    oid = models.IntegerField(primary_key=True)
    nspname = models.CharField(max_length=63)

    class Meta:
        app_label = "early"
        managed = False
        db_table = "pg_namespace"

    def __str__(self):
        return self.nspname


def work():
    with transaction.atomic():
        assert Namespace.objects.get(nspname="public").pk
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
        with contextlib.suppress(ZeroDivisionError), transaction.atomic():
            raise ZeroDivisionError
        with transaction.atomic():
            pass
    with contextlib.suppress(ZeroDivisionError), transaction.atomic():
        assert Namespace.objects.count()
        raise ZeroDivisionError
    return len(seen)


def seen_by(run):
    seen.clear()
    return run()


work()  # connects
print(json.dumps([seen_by(work), seen_by(lambda: asyncio.run(aio.run(work)))]))
