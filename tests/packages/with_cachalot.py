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

from contextlib import contextmanager  # noqa: E402
from queue import SimpleQueue  # noqa: E402

from django.db import models, transaction  # noqa: E402


class Note(models.Model):
    """The table that all requests use: its rows are never committed."""


# The tables of kept rows, of which each call of `work` has one to itself. The package writes down
# when a table was last changed by a read of the clock and a write to the cache: of two threads that
# change one table at once, the later can write the earlier time, and the other reads old rows then
# (on Django's own engine, too).
own_tables = SimpleQueue()
for each in range(3 * 20):
    fields = {"owner": models.CharField(max_length=100), "__module__": __name__}
    own_tables.put(type(f"Own{each}", (models.Model,), fields))


@contextmanager
def own_table():
    """Lend a table that no other request uses meanwhile."""
    table = own_tables.get_nowait()
    try:
        yield table
    finally:
        own_tables.put(table)


class UndoError(Exception):
    pass


def undo(own):
    """Write uncommitted rows; return how many are seen in the transaction before and after."""
    try:
        with transaction.atomic():
            before = own.objects.count()
            Note.objects.create()
            own.objects.create(owner="undone")
            seen = own.objects.count()
            assert Note.objects.exists()
            raise UndoError
    except UndoError:
        return before, seen


def work(request, who, number):
    with own_table() as own:
        in_block, beside = undo(own), Note.objects.count()
        undone = own.objects.count()
        row = own.objects.create(owner=who)
        kept = own.objects.count()
        row.delete()
        return said(who, *in_block, beside, undone, kept, own.objects.count())


async def awork(request, who, number):
    with own_table() as own:
        in_block, beside = await green(undo, own), await Note.objects.acount()
        undone = await own.objects.acount()
        row = await own.objects.acreate(owner=who)
        kept = await own.objects.acount()
        await row.adelete()
        return said(who, *in_block, beside, undone, kept, await own.objects.acount())


def said(who, *seen):
    ought = (0, 1, 0, 0, 1, 0)
    return who if seen == ought else f"{seen}, ought to be {ought}"
