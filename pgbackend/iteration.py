"""Replaces Django's ways to iterate over rows: `async for`, `aiterator()`, the cursor of `raw()`.

Chunks are fetched green. A cursor is closed, and its connection given back, as soon as its iterator
is closed, and not only when the garbage collector finds it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from itertools import islice
from typing import Any

from django.db import connections
from django.db.models.query import BaseIterable, QuerySet
from django.db.models.sql.query import RawQuery

from . import conf, state
from .driver import bridge
from .driver.cursors import let_go
from .sessions import Sessions

#: How many rows of a chunk are made into objects at a time: few enough that the objects are used
#: while they are still in the processor's cache.
_AT_A_TIME = 100


def make_async_generator(in_threads: Callable[..., AsyncIterator[Any]]) -> Callable[..., Any]:
    """Return a `BaseIterable._async_generator()` that fetches its chunks green.

    Closing the generator closes its cursor, too. `in_threads`, Django's method, does the work for
    other engines.
    """

    async def _async_generator(self: Any) -> AsyncIterator[Any]:
        if not conf.alias_is_ours(self.queryset.db):
            async for item in in_threads(self):
                yield item
            return
        # Green, because the `__iter__()` of `values()` executes the statement.
        rows = await bridge.run(iter, self)
        maker = self.queryset.__dict__.get("_maker")
        try:
            while ready := await bridge.run(_take, rows, min(self.chunk_size, _AT_A_TIME)):
                if maker is not None:
                    wrapper: Any = connections[self.queryset.db]  # pgbackend's
                    state.leave_to(maker, wrapper)
                for item in ready:
                    yield item
        finally:
            if hasattr(rows, "close"):
                await bridge.run(rows.close)

    return _async_generator


def _take(rows: Iterable[Any], size: int) -> list[Any]:
    return list(islice(rows, size))


#: Django's `__aiter__()`: an iterable class that overrides it is left to Django's `aiterator()`.
_AITER = BaseIterable.__aiter__


def make_aiterator(original: Callable[..., AsyncIterator[Any]]) -> Callable[..., Any]:
    """Return a `QuerySet.aiterator()` that returns the generator of the rows itself.

    Django's method returns one more generator around that one: each row goes through both, and
    closing the outer one leaves the inner one, with its cursor and its lease, to the garbage
    collector.

    Another task than the caller may make a step of the generator, lease the connection for it, and
    end before the generator does (`asyncio.wait_for()` on Python 3.11). The lease then passes to
    the task that called `aiterator()`.
    """
    # 2000; from Django 6.2 on None, which means 2000 if nothing is prefetched.
    default = inspect.signature(original).parameters["chunk_size"].default

    @functools.wraps(original)
    def aiterator(
        self: Any, chunk_size: int | None = default, *args: object, **kwargs: object
    ) -> AsyncIterator[Any]:
        ours = conf.alias_is_ours(self.db)
        if ours and bridge.current_task() is not None:
            self = _known_by(state.task_sessions(), self)
        size = 2000 if chunk_size is default is None else chunk_size
        if (
            args
            or kwargs
            or not isinstance(size, int)
            or size <= 0
            or self._prefetch_related_lookups
            or self._iterable_class.__aiter__ is not _AITER
            or not ours
        ):
            return original(self, chunk_size, *args, **kwargs)
        on_server = not connections.settings[self.db].get("DISABLE_SERVER_SIDE_CURSORS")
        return aiter(self._iterable_class(self, chunked_fetch=on_server, chunk_size=size))

    return aiterator


def _known_by(maker: Sessions, queryset: QuerySet[Any]) -> QuerySet[Any]:
    """Return a copy of `queryset` that refers to `maker`, the sessions of `aiterator()`'s caller.

    `_async_generator()` finds it there. The caller's own QuerySet is not changed: several tasks may
    iterate it at once, and it may be copied and pickled.
    """
    copy = object.__new__(type(queryset))
    copy.__dict__.update(queryset.__dict__, _maker=maker)
    return copy


def make_aiter(original: Callable[..., AsyncIterator[Any]]) -> Callable[..., Any]:
    """Return an `__aiter__()` of a QuerySet that fetches its rows without an async generator.

    Before Python 3.13, a coroutine that is closed inside an ``async for`` leaves the generator of
    that loop open: the generator's statement and lease would wait for the garbage collector.
    """

    @functools.wraps(original)
    def __aiter__(self: QuerySet[Any]) -> AsyncIterator[Any]:
        return _FetchedRows(self) if conf.alias_is_ours(self.db) else original(self)

    return __aiter__


class _FetchedRows:
    """An async iterator over the rows of a QuerySet: its first step fetches all of them, green."""

    __slots__ = ("_queryset", "_rows")

    def __init__(self, queryset: Any) -> None:
        self._queryset = queryset
        self._rows: AsyncIterator[Any] | None = None

    def __aiter__(self) -> _FetchedRows:
        return self

    def __anext__(self) -> Awaitable[Any]:
        next_row: Awaitable[Any] = self._first() if self._rows is None else self._rows.__anext__()
        return next_row

    async def _first(self) -> object:
        await bridge.run(self._queryset._fetch_all)  # noqa: SLF001 - stands in for Django's method
        self._rows = _each(self._queryset._result_cache)  # noqa: SLF001
        return await self._rows.__anext__()


async def _each(rows: list[Any]) -> AsyncIterator[Any]:
    for row in rows:
        yield row


def make_execute_query(execute: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return a `RawQuery._execute_query()` whose cursor, once executed, holds no lease any more.

    The rows are in memory then, so the connection can be given back. Django never closes the
    cursor, and keeps it as long as the QuerySet lives.
    """

    @functools.wraps(execute)
    def _execute_query(self: RawQuery) -> None:
        execute(self)
        if conf.alias_is_ours(self.using):
            let_go(getattr(self.cursor, "cursor", None))

    return _execute_query
