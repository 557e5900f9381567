"""Uses django-pgbulk: updates, upserts and COPY of many rows, by its sync and async functions."""

from __future__ import annotations

import pgbulk
from django.db import transaction

from tests.packages.helpers.models import Part
from tests.packages.project import STOCK

PACKAGE = "django-pgbulk"


class UndoError(Exception):
    pass


def parts(number: int, stock: int = 0) -> list[Part]:
    return [Part(name=f"part {n}", stock=stock) for n in range(number)]


def rows() -> set[tuple[str, int]]:
    return {*Part.objects.values_list("name", "stock")}


def copied(number: int, stock: int = 0) -> set[tuple[str, int]]:
    return {(f"part {n}", stock) for n in range(number)}


def rows_are_upserted() -> None:
    Part.objects.all().delete()
    pgbulk.upsert(Part, parts(3), ["name"], ["stock"])
    found = pgbulk.upsert(Part, parts(5, stock=7), ["name"], ["stock"], returning=True)
    assert len(found.created) == 2 and len(found.updated) == 3
    assert rows() == copied(5, stock=7)


def rows_are_updated() -> None:
    Part.objects.all().delete()
    Part.objects.bulk_create(parts(5))
    changed = [*Part.objects.order_by("pk")]
    for part in changed:
        part.stock = 9
    pgbulk.update(Part, changed, ["stock"])
    assert rows() == copied(5, stock=9)


def rows_are_copied() -> None:
    Part.objects.all().delete()
    for binary in (False, True):
        pgbulk.copy(Part, parts(500), copy_fields=["name", "stock"], binary=binary)
        assert rows() == copied(500)
        Part.objects.all().delete()


def a_block_undoes_all_of_it() -> None:
    Part.objects.all().delete()
    try:
        with transaction.atomic():
            pgbulk.copy(Part, parts(5), copy_fields=["name", "stock"])
            pgbulk.upsert(Part, parts(6, stock=2), ["name"], ["stock"])
            assert rows() == copied(6, stock=2)
            raise UndoError
    except UndoError:
        assert not Part.objects.exists()


CASES = [rows_are_upserted, rows_are_updated, rows_are_copied, a_block_undoes_all_of_it]


async def arows() -> set[tuple[str, int]]:
    return {row async for row in Part.objects.values_list("name", "stock")}


async def the_async_functions_write() -> None:
    await Part.objects.all().adelete()
    await pgbulk.acopy(Part, parts(5), copy_fields=["name", "stock"])
    found = await pgbulk.aupsert(Part, parts(6, stock=3), ["name"], ["stock"], returning=True)
    assert len(found.created) == 1 and len(found.updated) == 5
    changed = [part async for part in Part.objects.all()]
    for part in changed:
        part.stock = 4
    await pgbulk.aupdate(Part, changed, ["stock"])
    assert await arows() == copied(6, stock=4)


async def the_async_functions_take_part_in_a_block() -> None:
    await Part.objects.all().adelete()
    try:
        async with transaction.atomic():
            await pgbulk.acopy(Part, parts(5), copy_fields=["name", "stock"])
            await pgbulk.aupsert(Part, parts(6, stock=2), ["name"], ["stock"])
            assert await arows() == copied(6, stock=2)
            raise UndoError
    except UndoError:
        assert await arows() == set()


ASYNC_CASES = [the_async_functions_write]
if not STOCK:  # which has no transactions in async code
    ASYNC_CASES.append(the_async_functions_take_part_in_a_block)
