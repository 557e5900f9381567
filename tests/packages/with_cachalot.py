"""Uses django-cachalot, which keeps a transaction's reads and writes in a `threading.local`."""

from tests.packages.project import ENGINE, green, setup

project = setup(
    __name__,
    "django-cachalot",
    state="a class derived from `threading.local`, an attribute of the connection",
    apps=["cachalot"],
    line="`CACHALOT_ADDITIONAL_SUPPORTED_DATABASES`, to know the engine",
    CACHALOT_ADDITIONAL_SUPPORTED_DATABASES=[ENGINE],
)

import uuid  # noqa: E402

from django.db import models, transaction  # noqa: E402


class Note(models.Model):
    owner = models.CharField(max_length=100)
    kept = models.BooleanField()


class UndoError(Exception):
    pass


def undo(name):
    """Write an uncommitted row; return how many are seen in the transaction before and after."""
    try:
        with transaction.atomic():
            before = Note.objects.filter(owner=name).count()
            Note.objects.create(owner=name, kept=False)
            seen = Note.objects.filter(owner=name).count()
            assert Note.objects.filter(kept=False).exists()
            raise UndoError
    except UndoError:
        return before, seen


# Each counts rows that no other request knows, except for `kept=False`: of two requests that write
# one table at once, the package itself may keep a read from before the last commit.


def work(request, who, number):
    name = str(uuid.uuid4())
    in_block, beside = undo(name), Note.objects.filter(kept=False).count()
    undone = Note.objects.filter(owner=name).count()
    note = Note.objects.create(owner=name, kept=True)
    own = Note.objects.filter(owner=name).count()
    note.delete()
    return said(who, *in_block, beside, undone, own, Note.objects.filter(owner=name).count())


async def awork(request, who, number):
    name = str(uuid.uuid4())
    in_block, beside = await green(undo, name), await Note.objects.filter(kept=False).acount()
    undone = await Note.objects.filter(owner=name).acount()
    note = await Note.objects.acreate(owner=name, kept=True)
    own = await Note.objects.filter(owner=name).acount()
    await note.adelete()
    left = await Note.objects.filter(owner=name).acount()
    return said(who, *in_block, beside, undone, own, left)


def said(who, *seen):
    ought = (0, 1, 0, 0, 1, 0)
    return who if seen == ought else f"{seen}, ought to be {ought}"
