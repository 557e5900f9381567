"""Uses django-reversion, which keeps the open revision in a context variable."""

from tests.packages.project import execute, green, setup

project = setup(
    __name__,
    "django-reversion",
    state="`ContextVar` (a list that is changed in place)",
    apps=["reversion"],
)

import reversion  # noqa: E402
from django.contrib.contenttypes.models import ContentType  # noqa: E402
from django.db import models  # noqa: E402
from reversion.models import Version  # noqa: E402


@reversion.register()
class Note(models.Model):
    owner = models.CharField(max_length=100)


def create_rows():
    ContentType.objects.get_for_model(Note)


def revise(request, who):
    with reversion.create_revision():
        note = Note.objects.create(owner=who)
        with reversion.create_revision():
            Note.objects.create(owner=who)
        reversion.set_user(request.user)
    assert not reversion.is_active()
    return note


def work(request, who, number):
    note = revise(request, who)
    version = Version.objects.get_for_object(note).select_related("revision__user").get()
    return said(version.revision, version.revision.version_set.count())


async def awork(request, who, number):
    note = await green(revise, request, who)
    versions = Version.objects.get_for_object(note).select_related("revision__user")
    version = await versions.aget()
    return said(version.revision, await version.revision.version_set.acount())


def said(revision, count):
    return revision.user.username if count == 2 else f"{count} versions by {revision.user}"


def wrong_rows():
    found = execute(
        "SELECT owner, username FROM with_reversion_note AS note "
        "LEFT JOIN reversion_version ON object_id = note.id::text "
        "LEFT JOIN reversion_revision AS revision ON revision.id = revision_id "
        "LEFT JOIN auth_user ON auth_user.id = user_id WHERE username IS DISTINCT FROM owner"
    )
    execute("TRUNCATE reversion_version, reversion_revision, with_reversion_note")
    return [f"a note of {owner} in a revision of {user}" for owner, user in found]
