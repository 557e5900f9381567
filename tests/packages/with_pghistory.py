"""Uses django-pghistory: the context is in a `threading.local`, and in each statement's session."""

from tests.packages.project import LAST, WHO, execute, setup

project = setup(
    __name__,
    "django-pghistory",
    state="`threading.local`, an `execute_wrapper` that sends `set_config()`",
    apps=["pgtrigger", "pghistory"],
    middleware=["pghistory.middleware.HistoryMiddleware"],
)

import pghistory  # noqa: E402
from django.core.management import call_command  # noqa: E402
from django.db import models  # noqa: E402


@pghistory.track()
class Note(models.Model):
    owner = models.CharField(max_length=100)


def create_tables():
    call_command("migrate", run_syncdb=True, verbosity=0)
    call_command("pgtrigger", "install", verbosity=0)


def said(event, who, number):
    """Return the user in the event's context; for the last work, check `by` of the block too."""
    context = event.pgh_context.metadata if event.pgh_context else {}
    user = WHO[context["user"] - 1] if context.get("user") else "nobody"
    if number == LAST and context.get("by") != who:
        return f"by {context.get('by')}"
    return user


def work(request, who, number):
    if number == LAST:
        with pghistory.context(by=who):
            note = Note.objects.create(owner=who)
    else:
        note = Note.objects.create(owner=who)
    events = Note.pgh_event_model.objects.select_related("pgh_context")
    return said(events.get(pgh_obj_id=note.pk), who, number)


async def awork(request, who, number):
    if number == LAST:
        async with pghistory.context(by=who):
            note = await Note.objects.acreate(owner=who)
    else:
        note = await Note.objects.acreate(owner=who)
    events = Note.pgh_event_model.objects.select_related("pgh_context")
    return said(await events.aget(pgh_obj_id=note.pk), who, number)


def wrong_rows():
    found = execute(
        "SELECT event.owner, username FROM with_pghistory_noteevent AS event "
        "LEFT JOIN pghistory_context AS context ON context.id = pgh_context_id "
        "LEFT JOIN auth_user ON auth_user.id = (context.metadata->>'user')::int "
        "WHERE username IS DISTINCT FROM event.owner"
    )
    execute("TRUNCATE with_pghistory_noteevent, with_pghistory_note, pghistory_context")
    return [f"an event of {owner} in the context of {user}" for owner, user in found]
