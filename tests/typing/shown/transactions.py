"""`pgbackend.atomic`: Django's `transaction.atomic`, with what it can do here."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, assert_type

from django.db import transaction

from pgbackend import aio, atomic


async def save(text: str) -> int:
    async with atomic():
        return len(text)


async def save_in_replica(text: str) -> int:
    async with atomic("replica", durable=True), atomic(using="other", savepoint=False):
        return len(text)


def save_in_sync_code(text: str) -> int:
    with atomic() as nothing, atomic(durable=False):
        assert_type(nothing, None)
        return len(text)


@atomic
async def decorated(text: str, *, times: int = 1) -> str:
    return text * times


@atomic(using="replica")
async def decorated_with_arguments(text: str) -> str:
    return text


@aio.atomic
def decorated_sync(text: str) -> bytes:
    return text.encode()


def as_a_call(function: Callable[[str], Coroutine[Any, Any, int]]) -> None:
    assert_type(atomic(function), Callable[[str], Coroutine[Any, Any, int]])


async def calls() -> None:
    assert_type(await decorated("a", times=2), str)
    assert_type(await decorated_with_arguments("a"), str)
    assert_type(decorated_sync("a"), bytes)


@asynccontextmanager
async def unit_of_work() -> AsyncIterator[None]:
    async with atomic():
        yield


def takes_djangos(block: transaction.Atomic) -> None:
    with block:
        pass


async def mail() -> None: ...


takes_djangos(atomic())
transaction.on_commit(mail)  # coroutine functions, too
