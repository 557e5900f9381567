"""Uses django-easy-audit: the request is in a Local of asgiref's; events are written on commit."""

from tests.packages.project import execute, setup

project = setup(
    __name__,
    "django-easy-audit",
    state="asgiref's `Local`, read when a transaction commits",
    apps=["easyaudit"],
    middleware=["easyaudit.middleware.easyaudit.EasyAuditMiddleware"],
    DJANGO_EASY_AUDIT_WATCH_REQUEST_EVENTS=False,
    DJANGO_EASY_AUDIT_WATCH_AUTH_EVENTS=False,
)

from django.contrib.contenttypes.models import ContentType  # noqa: E402
from django.db import models, transaction  # noqa: E402
from easyaudit.models import CRUDEvent  # noqa: E402

from tests.packages.project import green  # noqa: E402


class Note(models.Model):
    owner = models.CharField(max_length=100)


def create_rows():
    ContentType.objects.get_for_model(Note)


def create(who):
    with transaction.atomic():
        return Note.objects.create(owner=who)


def events_of(note):
    content_type = ContentType.objects.get_for_model(Note)
    events = CRUDEvent.objects.filter(content_type=content_type, object_id=note.pk)
    return events.select_related("user")


def work(request, who, number):
    return said(events_of(create(who)).get())


async def awork(request, who, number):
    note = await green(create, who) if number else await Note.objects.acreate(owner=who)
    return said(await (await green(events_of, note)).aget())


def said(event):
    return event.user.username if event.user else "nobody"


def wrong_rows():
    found = execute(
        "SELECT owner, username FROM easyaudit_crudevent AS event "
        "JOIN django_content_type AS type ON type.id = content_type_id AND model = 'note' "
        "JOIN with_easy_audit_note AS note ON note.id::text = object_id "
        "LEFT JOIN auth_user ON auth_user.id = user_id WHERE username IS DISTINCT FROM owner"
    )
    execute("TRUNCATE easyaudit_crudevent, with_easy_audit_note")
    return [f"an event of {owner} by {user}" for owner, user in found]
