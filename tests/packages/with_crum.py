"""Uses django-crum: `save()` notes the request's user, which is in a `threading.local`."""

from tests.packages.project import LAST, another, rows_of_others, setup

project = setup(
    __name__,
    "django-crum",
    state="`threading.local`",
    middleware=["crum.CurrentRequestUserMiddleware"],
)

import crum  # noqa: E402
from django.contrib.auth.models import User  # noqa: E402
from django.db import models  # noqa: E402


class Note(models.Model):
    owner = models.CharField(max_length=100)
    author = models.CharField(max_length=100)

    def save(self, *args, **kwargs):
        user = crum.get_current_user()
        self.author = user.username if user else "nobody"
        super().save(*args, **kwargs)


def work(request, who, number):
    if number != LAST:
        return Note.objects.create(owner=who).author
    with crum.impersonate(User(username=another(who))):
        Note.objects.create(owner=another(who))
    return Note.objects.create(owner=who).author


async def awork(request, who, number):
    if number != LAST:
        return (await Note.objects.acreate(owner=who)).author
    # Not in tasks of one request at once: the work sets `request.user`, which they share.
    with crum.impersonate(User(username=another(who))):
        await Note.objects.acreate(owner=another(who))
    return (await Note.objects.acreate(owner=who)).author


def wrong_rows():
    return rows_of_others(Note)
