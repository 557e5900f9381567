"""Compares the engines: prints the results of some work, and the statements that it sends.

The output is a JSON object, for Django's own engine, for pgbackend in sync code, and green.
"""

import asyncio
import json
import os
import re

import django
from django.conf import settings

from pgbackend import embedded

given = embedded.database_settings(os.environ["DATABASE_URL"])
STOCK = "django.db.backends.postgresql"
settings.configure(
    DATABASES={
        "default": {**given, "ENGINE": "pgbackend"},
        "stock": {**given, "ENGINE": STOCK},
    },
    USE_TZ=True,
)
django.setup()

from django.db import connections, models, transaction  # noqa: E402
from django.db.models import F  # noqa: E402
from django.test.utils import CaptureQueriesContext  # noqa: E402

from pgbackend import aio  # noqa: E402


class Author(models.Model):
    name = models.CharField(max_length=50)

    class Meta:
        app_label = "compare"
        db_table = f"compare_author_{os.getpid()}"

    def __str__(self):
        return self.name


class Book(models.Model):
    title = models.CharField(max_length=50)
    author = models.ForeignKey(Author, models.CASCADE, null=True)
    pages = models.IntegerField(default=1)

    class Meta:
        app_label = "compare"
        db_table = f"compare_book_{os.getpid()}"

    def __str__(self):
        return self.title


def work(alias):
    authors, books = Author.objects.using(alias), Book.objects.using(alias)
    found = []
    with transaction.atomic(using=alias):
        author = authors.create(pk=1, name="a")
        for number in range(3):
            books.create(pk=number, title=f"b{number}", author=author if number else None)
        with transaction.atomic(using=alias):
            found.append(books.filter(pk=1).update(pages=F("pages") + 2))
    found.append(list(books.order_by("pk").values_list()))
    found += [str(vars(each)["title"]) for each in books.select_related("author").order_by("pk")]
    found.append([books.get(pk=1).pages, books.filter(title="b2")[:1][0].author.name])
    found.append(books.filter(pages__gte=2).count())
    found.append(books.aggregate(models.Sum("pages")))
    found.append(books.filter(pk=99).first() is None)
    found.append(books.all().delete()[0] + authors.all().delete()[0])
    return found


def watched(alias):
    work(alias)  # fill the caches first
    rows = work(alias)
    with CaptureQueriesContext(connections[alias]) as queries:
        assert work(alias) == rows
    # Names of savepoints contain the thread and a counter.
    statements = [re.sub(r'"s\d+_x\d+"', "savepoint", each["sql"]) for each in queries]
    return {"rows": rows, "statements": statements}


with connections["stock"].schema_editor() as editor:
    editor.create_model(Author)
    editor.create_model(Book)
try:
    seen = {
        "stock": watched("stock"),
        "sync": watched("default"),
        "green": asyncio.run(aio.run(watched, "default")),
    }
finally:
    with connections["stock"].schema_editor() as editor:
        editor.delete_model(Book)
        editor.delete_model(Author)
print(json.dumps(seen))
