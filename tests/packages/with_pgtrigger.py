"""Uses django-pgtrigger: ignored triggers are in a `threading.local`, and in the session."""

from tests.packages.project import execute, setup

project = setup(
    __name__,
    "django-pgtrigger",
    state="`threading.local`, an `execute_wrapper` that sends `set_config()`",
    apps=["pgtrigger"],
)

import pgtrigger  # noqa: E402
from django.core.management import call_command  # noqa: E402
from django.db import DatabaseError, models  # noqa: E402


@pgtrigger.register(pgtrigger.Protect(name="protect", operation=pgtrigger.Delete))
class Note(models.Model):
    owner = models.CharField(max_length=100)


def create_tables():
    call_command("migrate", run_syncdb=True, verbosity=0)
    call_command("pgtrigger", "install", verbosity=0)


IGNORED = f"{__name__.rpartition('.')[2]}.Note:protect"


def work(request, who, number):
    note, other = Note.objects.create(owner=who), Note.objects.create(owner=who)
    with pgtrigger.ignore(IGNORED):
        other.delete()
    try:
        note.delete()
    except DatabaseError:
        return who
    return "not protected"


async def awork(request, who, number):
    note, other = await Note.objects.acreate(owner=who), await Note.objects.acreate(owner=who)
    with pgtrigger.ignore(IGNORED):
        await other.adelete()
    try:
        await note.adelete()
    except DatabaseError:
        return who
    return "not protected"


def wrong_rows():
    execute("TRUNCATE with_pgtrigger_note")
    return []
