"""Checks that a green run is green: counts connections by kind, and records what blocks.

In a green run the main thread must never block for the database, and an alias must be served by
its pool. A wrapper that is not `django.db.connections`' own (`connection.copy()`, the one that
creates databases) has a connection of its own by design; so has each thread that a test starts.
"""

from __future__ import annotations

import functools
import os
import threading
import traceback
import weakref
from collections import Counter
from typing import Any

from .recorder import Journal


class Guard:
    """Wraps the places where connections are made and waited for. There is one a process."""

    def __init__(self, journal: Journal, *, green: bool) -> None:
        self.journal = journal
        self.green = green
        self._pid = os.getpid()
        self.connections: Counter[str] = Counter()
        self._open: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()

    def install(self) -> None:
        """Wrap functions of the driver; call this before `pgbackend.base` is imported."""
        from pgbackend.driver import AsyncConnection, Connection

        self._count_pooled(AsyncConnection)
        self._check_waits(Connection)

    def install_wrapper(self) -> None:
        """Wrap the functions that need Django to be set up."""
        from pgbackend import state
        from pgbackend.base import DatabaseWrapper

        get_new_connection = DatabaseWrapper.get_new_connection

        @functools.wraps(get_new_connection)
        def counted(wrapper: Any, conn_params: Any) -> Any:
            connection = get_new_connection(wrapper, conn_params)
            if state.being_prepared(wrapper) is None:
                self._note_own(wrapper, connection)
            return connection

        DatabaseWrapper.get_new_connection = counted

    def left_open(self) -> list[str]:
        """Return the tests that left a connection open, apart from those of the pools."""
        return [test for connection, test in self._open.items() if not connection.closed]

    def _count_pooled(self, cls: Any) -> None:
        connect = cls.connect.__func__

        async def counted(cls: Any, *args: Any, **kwargs: Any) -> Any:
            self.connections["pooled"] += 1
            return await connect(cls, *args, **kwargs)

        cls.connect = classmethod(counted)

    def _note_own(self, wrapper: Any, connection: Any) -> None:
        kind = "of its own" if not wrapper._uses_pool else "of an alias"
        where = "" if _in_main_thread() else ", in a thread"
        self.connections[kind + where] += 1
        self._open[connection] = f"{self.journal.test} ({kind}{where})"
        if self.green and wrapper._uses_pool and _in_main_thread():
            connection.suite_of_alias = True

    def _check_waits(self, cls: Any) -> None:
        from pgbackend.driver import bridge

        wait = cls.wait

        @functools.wraps(wait)
        def checked(connection: Any, *args: Any, **kwargs: Any) -> Any:
            # A child that a test has forked has no loop, and blocks as sync code does.
            if self.green and _in_main_thread() and os.getpid() == self._pid:
                if bridge.current() is None:
                    self._fault("the event loop was blocked by a wait for the database")
                elif getattr(connection, "suite_of_alias", False):
                    self._fault("a statement went over a connection beside the pool")
            return wait(connection, *args, **kwargs)

        cls.wait = checked

    def _fault(self, what: str) -> None:
        self.journal.write("fault", text=what, stack="".join(traceback.format_stack()[-25:-2]))


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
