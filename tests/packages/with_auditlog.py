"""Uses django-auditlog, which keeps the actor in a context variable."""

from tests.packages.project import execute, setup

project = setup(
    __name__,
    "django-auditlog",
    state="`ContextVar`",
    apps=["auditlog"],
    middleware=["auditlog.middleware.AuditlogMiddleware"],
)

from auditlog.context import disable_auditlog  # noqa: E402
from auditlog.models import LogEntry  # noqa: E402
from auditlog.registry import auditlog  # noqa: E402
from django.contrib.contenttypes.models import ContentType  # noqa: E402
from django.db import models  # noqa: E402


class Note(models.Model):
    owner = models.CharField(max_length=100)


auditlog.register(Note)


def create_rows():
    ContentType.objects.get_for_model(Note)


def work(request, who, number):
    with disable_auditlog():
        unseen = Note.objects.create(owner=who)
    assert not LogEntry.objects.get_for_object(unseen).exists()
    note = Note.objects.create(owner=who)
    return said(LogEntry.objects.get_for_object(note).select_related("actor").get())


async def awork(request, who, number):
    with disable_auditlog():
        unseen = await Note.objects.acreate(owner=who)
    assert not await LogEntry.objects.get_for_object(unseen).aexists()
    note = await Note.objects.acreate(owner=who)
    return said(await LogEntry.objects.get_for_object(note).select_related("actor").aget())


def said(entry):
    return entry.actor.username if entry.actor else "nobody"


def wrong_rows():
    found = execute(
        "SELECT owner, username FROM auditlog_logentry AS entry "
        "JOIN with_auditlog_note AS note ON note.id::text = object_pk "
        "LEFT JOIN auth_user ON auth_user.id = actor_id WHERE username IS DISTINCT FROM owner"
    )
    execute("TRUNCATE auditlog_logentry, with_auditlog_note")
    return [f"an entry of {owner} by {user}" for owner, user in found]
