"""Uses django-lifecycle: a `threading.local` of a global object says whether hooks are bypassed."""

from tests.packages.project import execute, setup

project = setup(
    __name__,
    "django-lifecycle",
    state="`threading.local`, attribute of a global object",
)

from django.db import models  # noqa: E402
from django_lifecycle import BEFORE_SAVE, LifecycleModelMixin, bypass_hooks_for, hook  # noqa: E402


class Note(LifecycleModelMixin, models.Model):
    owner = models.CharField(max_length=100)
    author = models.CharField(max_length=100, default="no hook")

    @hook(BEFORE_SAVE)
    def set_author(self):
        self.author = self.owner


def work(request, who, number):
    with bypass_hooks_for([Note]):
        bypassed = Note.objects.create(owner=who)
    note = Note.objects.create(owner=who)
    return note.author if bypassed.author == "no hook" else "not bypassed"


async def awork(request, who, number):
    with bypass_hooks_for([Note]):
        bypassed = await Note.objects.acreate(owner=who)
        await Note.objects.acount()
        again = await Note.objects.acreate(owner=who)
    await Note.objects.acount()
    note = await Note.objects.acreate(owner=who)
    return note.author if bypassed.author == again.author == "no hook" else "not bypassed"


def wrong_rows():
    execute("TRUNCATE with_lifecycle_note")
    return []
