"""Uses django-pgtransaction: isolation levels, and transactions that are run again."""

from __future__ import annotations

import pgtransaction
import pytest
from asgiref.sync import sync_to_async
from django.db import connection, transaction

from pgbackend.aio import as_async
from tests.packages.helpers.contexts import Meeting, at_once
from tests.packages.helpers.models import Part
from tests.packages.project import STOCK, green

PACKAGE = "django-pgtransaction"


def make(*names: str) -> None:
    Part.objects.all().delete()
    for name in names:
        Part.objects.create(name=name)


def level() -> str:
    with connection.cursor() as cursor:
        cursor.execute("SHOW transaction_isolation")
        return cursor.fetchone()[0]


def fail_to_serialize() -> None:
    with connection.cursor() as cursor:
        cursor.execute("DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '40001'; END $$")


def a_serialization_failure_is_retried() -> None:
    """Two transactions read one row before either writes it: one of them must be run again."""
    make("bolt")
    meeting, attempts = Meeting(), []

    @pgtransaction.atomic(isolation_level=pgtransaction.SERIALIZABLE, retry=3)
    def take_one() -> None:
        attempts.append(level())
        part = Part.objects.get()
        if len(attempts) <= 2:
            meeting.wait()
        part.stock -= 1
        part.save()

    at_once(take_one, take_one)
    assert Part.objects.get().stock == -2
    assert attempts == ["serializable"] * 3
    assert level() == "read committed"


def a_deadlock_is_retried() -> None:
    """Two transactions lock two rows, each in its own order."""
    make("bolt", "nut")
    meeting, attempts = Meeting(), []

    @pgtransaction.atomic(retry=3)
    def lock(*names: str) -> None:
        attempts.append(names)
        with connection.cursor() as cursor:
            cursor.execute("SET LOCAL deadlock_timeout = '10ms'")
        first = Part.objects.select_for_update().get(name=names[0])
        if len(attempts) <= 2:
            meeting.wait()
        second = Part.objects.select_for_update().get(name=names[1])
        for part in (first, second):
            part.stock += 1
            part.save()

    at_once(lambda: lock("bolt", "nut"), lambda: lock("nut", "bolt"))
    assert [*Part.objects.values_list("stock", flat=True)] == [2, 2]
    assert len(attempts) == 3


def the_last_failure_is_raised() -> None:
    attempts = []

    @pgtransaction.atomic(retry=2)
    def fail() -> None:
        attempts.append(1)
        fail_to_serialize()

    with pytest.raises(transaction.Error) as told:
        fail()
    assert told.value.__cause__.sqlstate == "40001"
    assert len(attempts) == 3


def levels_do_not_mix() -> None:
    meeting = Meeting(3)

    def seen(wanted: str | None) -> list[str]:
        with pgtransaction.atomic(isolation_level=wanted):
            first = level()
            meeting.wait()
            return [first, level()]

    found = at_once(
        lambda: seen("SERIALIZABLE"), lambda: seen("REPEATABLE READ"), lambda: seen(None)
    )
    assert found == [["serializable"] * 2, ["repeatable read"] * 2, ["read committed"] * 2], found


CASES = [
    a_serialization_failure_is_retried,
    a_deadlock_is_retried,
    the_last_failure_is_raised,
    levels_do_not_mix,
]


async def a_block_of_async_with_has_its_level() -> None:
    async with pgtransaction.atomic(isolation_level="SERIALIZABLE", read_mode="READ ONLY"):
        assert await green(level) == "serializable"


async def a_retried_function_is_called_from_async_code() -> None:
    await green(a_serialization_failure_is_retried)
    attempts = []

    @pgtransaction.atomic(retry=1)
    def fail_once(part: str) -> str:
        attempts.append(part)
        if len(attempts) == 1:
            fail_to_serialize()
        return part

    called = sync_to_async(fail_once) if STOCK else as_async(fail_once)
    assert await called("bolt") == "bolt"
    assert attempts == ["bolt"] * 2


ASYNC_CASES = [a_retried_function_is_called_from_async_code]
if not STOCK:  # which has no `async with atomic()`
    ASYNC_CASES.append(a_block_of_async_with_has_its_level)
