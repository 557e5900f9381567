"""Guards: refuse calls that would block an event loop, in the place of Django's `@async_unsafe`.

Django's decorator refuses calls wherever a loop runs. Green code may call the same methods, since
its waits let the loop go on. So each method is replaced by its undecorated function behind a guard
that lets portals pass. `Guards` is the lowest part of the wrapper: the parts above it override its
methods, and call them by ``super()``.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from django.core.exceptions import SynchronousOnlyOperation
from django.db.backends.postgresql.base import DatabaseWrapper as PostgresDatabaseWrapper

from pgbackend import state
from pgbackend.driver import bridge
from pgbackend.driver.bridge import Portal
from pgbackend.patches import if_unpatched

CURE = (
    "the ORM was called on the event loop, outside of pgbackend's greenlets ({name}()). Django's "
    "ASGI handler serves requests in a greenlet; elsewhere, call the a-method ('await qs.aget()'), "
    "use 'async with transaction.atomic()', or wrap the function: 'await pgbackend.aio.run(fn)'."
)

# Code that runs for each statement repeats what `bridge.green()` does: a call would cost too much.
_get_running_loop = asyncio._get_running_loop
_running = bridge.running


def guarded(name: str) -> Callable[..., Any]:
    """Return Django's method `name` with our guard in the place of `async_unsafe`'s.

    If the method is patched on Django's class (by Sentry, before this module is loaded; by Django's
    test cases, afterwards), the guard calls the patch. A patch that has taken the guard for the
    original method calls the guard again: then the guard calls Django's method, and not the patch.
    """
    unsafe = if_unpatched(getattr(PostgresDatabaseWrapper, name))
    method = inspect.unwrap(getattr(PostgresDatabaseWrapper, name))

    @functools.wraps(method)
    def guard(self: Guards, *args: object, **kwargs: object) -> object:
        if _get_running_loop() is not None and type(_running()) is not Portal:
            self.check_context(name)
        if getattr(PostgresDatabaseWrapper, name) is unsafe or name in self._in_patches:
            return method(self, *args, **kwargs)
        found = getattr(super(Guards, self), name)
        self._in_patches.add(name)
        try:
            return found(*args, **kwargs)
        finally:
            self._in_patches.discard(name)

    return guard


class Guards(PostgresDatabaseWrapper):
    """Django's wrapper, whose methods green code may call."""

    #: The names of the methods of which a patch is running.
    _in_patches: set[str]

    if TYPE_CHECKING:
        # Private methods of Django's that the parts override, which Django's stubs leave out.
        def _cursor(self, name: str | None = None) -> Any: ...
        def _set_autocommit(self, autocommit: bool) -> None: ...
        def _commit(self) -> None: ...
        def _rollback(self) -> None: ...
        def _savepoint(self, sid: str) -> None: ...
        def _savepoint_rollback(self, sid: str) -> None: ...
        def _savepoint_commit(self, sid: str) -> None: ...
        def _close(self) -> None: ...

    def check_context(self, name: str) -> None:
        """Raise `SynchronousOnlyOperation` if the method `name` would block a loop here."""
        if _get_running_loop() is None:
            return
        if bridge.current() is None and state.in_async_context():
            raise SynchronousOnlyOperation(CURE.format(name=name))

    # Each of Django's `async_unsafe` methods.
    connect = guarded("connect")
    get_new_connection = guarded("get_new_connection")
    ensure_connection = guarded("ensure_connection")
    cursor = guarded("cursor")
    chunked_cursor = guarded("chunked_cursor")
    create_cursor = guarded("create_cursor")
    commit = guarded("commit")
    rollback = guarded("rollback")
    savepoint = guarded("savepoint")
    savepoint_rollback = guarded("savepoint_rollback")
    savepoint_commit = guarded("savepoint_commit")
    clean_savepoints = guarded("clean_savepoints")
    close = guarded("close")
