"""Uses django-simple-history, which keeps the request in a Local of asgiref's, on a class."""

from tests.packages.project import execute, setup

project = setup(
    __name__,
    "django-simple-history",
    state="asgiref's `Local`",
    apps=["simple_history"],
    middleware=["simple_history.middleware.HistoryRequestMiddleware"],
)

from django.db import models  # noqa: E402
from simple_history.models import HistoricalRecords  # noqa: E402


class Note(models.Model):
    owner = models.CharField(max_length=100)
    history = HistoricalRecords()


def work(request, who, number):
    note = Note.objects.create(owner=who)
    note.save()
    return name_of(note.history.select_related("history_user").first())


async def awork(request, who, number):
    note = await Note.objects.acreate(owner=who)
    await note.asave()
    return name_of(await note.history.select_related("history_user").afirst())


def name_of(record):
    return record.history_user.username if record.history_user else "nobody"


def wrong_rows():
    found = execute(
        "SELECT owner, username FROM with_simple_history_historicalnote "
        "LEFT JOIN auth_user ON auth_user.id = history_user_id "
        "WHERE username IS DISTINCT FROM owner"
    )
    execute("TRUNCATE with_simple_history_historicalnote, with_simple_history_note")
    return [f"a record of {owner} by {user}" for owner, user in found]
