"""Uses django-pglock and django-pgware: advisory locks, of a transaction and of a session.

A lock of the session is held by a connection. Sync code keeps its connection; green code must keep
it by `pinned()` (see docs/packages.md), or the lock ends with the cursor that took it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager

import pglock
from django.db import OperationalError, connection, transaction
from django_pg_utils.locks import advisory_lock, async_advisory_lock

from tests.packages.helpers.contexts import LIMIT, Meeting, at_once, is_free, pinned
from tests.packages.helpers.models import Part
from tests.packages.project import STOCK, green

PACKAGE = "django-pglock"
OTHER_PACKAGE = "django-pgware"
LOCK = 4711


def a_lock_of_the_session_is_held_until_its_end() -> None:
    for lock in (pglock.advisory, advisory_lock):
        with pinned(), lock(LOCK):
            Part.objects.count()
            assert not is_free(LOCK)
            with transaction.atomic():
                Part.objects.count()
            assert not is_free(LOCK)
        assert is_free(LOCK)


def a_lock_of_a_transaction_needs_nothing() -> None:
    with pglock.advisory(LOCK, xact=True):
        Part.objects.count()
        assert not is_free(LOCK)
    assert is_free(LOCK)


def one_of_two_gets_the_lock() -> None:
    taken, done = Meeting(), Meeting()

    def hold() -> bool:
        with pinned(), pglock.advisory(LOCK) as acquired:
            taken.wait()
            done.wait()
            return acquired

    def ask() -> tuple[bool, bool]:
        taken.wait()
        with pinned():
            with pglock.advisory(LOCK, timeout=0) as at_once_:
                pass
            with advisory_lock(LOCK, wait=False) as other:
                pass
        done.wait()
        return at_once_, other

    assert at_once(hold, ask) == [True, (False, False)]


def a_wait_for_a_lock_has_a_limit() -> None:
    taken, done = Meeting(), Meeting()

    def hold() -> None:
        with pglock.advisory(LOCK, xact=True):
            taken.wait()
            done.wait()

    def ask() -> bool:
        taken.wait()
        with pinned(), pglock.advisory(LOCK, timeout=0.02) as acquired:
            pass
        with connection.cursor() as cursor:
            cursor.execute("SHOW lock_timeout")
            assert cursor.fetchone()[0] == "0"
        done.wait()
        return acquired

    assert at_once(hold, ask)[1] is False


def a_table_is_locked() -> None:
    taken, done = Meeting(), Meeting()

    def hold() -> None:
        with transaction.atomic():
            pglock.model(Part)
            taken.wait()
            done.wait()

    def ask() -> str:
        taken.wait()
        try:
            with pglock.timeout(milliseconds=20):
                Part.objects.count()
        except OperationalError as exc:
            return exc.__cause__.sqlstate
        finally:
            done.wait()
        return "read"

    assert at_once(hold, ask)[1] == "55P03"


CASES = [
    a_lock_of_the_session_is_held_until_its_end,
    a_lock_of_a_transaction_needs_nothing,
    one_of_two_gets_the_lock,
    a_wait_for_a_lock_has_a_limit,
    a_table_is_locked,
]


async def the_async_lock_is_held() -> None:
    async with async_advisory_lock(LOCK) as acquired:
        await Part.objects.acount()
        assert acquired
        assert not is_free(LOCK)
    assert is_free(LOCK)


async def a_lock_is_held_in_green_code() -> None:
    await green(a_lock_of_the_session_is_held_until_its_end)


async def a_lock_that_is_lost_is_told() -> None:
    """Without `pinned()`, the lock ends with the statement: pgbackend says so."""
    for lock in (pglock.advisory, advisory_lock):
        told: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record, told=told: told.append(record.getMessage())
        logger = logging.getLogger("pgbackend.driver")
        logger.addHandler(handler)
        try:
            await green(_take_without_pin, lock)
            async with asyncio.timeout(LIMIT):
                while not told:
                    await asyncio.sleep(0)
        finally:
            logger.removeHandler(handler)
        assert "pgbackend.pinned()" in told[0]


def _take_without_pin(lock: Callable[[int], AbstractContextManager[bool]]) -> None:
    with lock(LOCK):
        Part.objects.count()


ASYNC_CASES = [the_async_lock_is_held, a_lock_is_held_in_green_code]
if not STOCK:
    ASYNC_CASES.append(a_lock_that_is_lost_is_told)
