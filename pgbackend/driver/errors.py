"""Defines the exceptions of pgbackend for its users.

Each message says the cause and the cure. An exception that may depend on load, timing or network
is a `psycopg.Error`, so that Django wraps it like any other error of the driver. An exception that
only a mistake in the program can cause is a `RuntimeError`, and is not meant to be caught.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import psycopg
import psycopg.errors

if TYPE_CHECKING:
    from psycopg.errors import *  # noqa: F403 - see `__getattr__`

    from .commit_ids import CommitId


class NotGreen(RuntimeError):
    """Synchronous code tried to wait for an awaitable outside of the greenlets of the bridge.

    Call that code with ``await pgbackend.aio.run(fn)``, which runs it in a greenlet.
    """


class PortalClosed(RuntimeError):
    """Code tried to wait where nothing can be waited for.

    It is in a greenlet that is being closed, in a finalizer that the garbage collector runs, or in
    a task that goes on in another thread.
    """


class LeaseEnded(psycopg.InterfaceError):
    """A cursor or connection was used after its lease ended: others may use the connection now."""


class PoolTimeout(psycopg.OperationalError):
    """No connection became free within the pool's ``timeout``."""


class PoolDeadlock(psycopg.OperationalError):
    """No connection can become free: all are held by tasks that wait for each other."""


class PoolClosed(psycopg.OperationalError):
    """The pool was closed, or its event loop was."""


class PoolQueueFull(psycopg.OperationalError):
    """More than ``max_waiting`` tasks already wait for a connection."""


class OptionFailed(psycopg.OperationalError):
    """A function that is asked for an option of each connection, such as PASSWORD, has failed."""


class OutcomeUnknown(psycopg.OperationalError):
    """The link broke, or went silent, during COMMIT: the server may or may not have committed.

    Django code gets it as `pgbackend.OutcomeUnknown`, which asks the server.
    """

    #: The name of the connection's pool, which is the alias; None if it has no name.
    database: str | None = None
    #: Whether the transaction's id was to be asked for; the id, or None if it is not known.
    is_asked = False
    commit_id: CommitId | None = None


class NothingCommitted(psycopg.OperationalError):
    """The link went silent during ROLLBACK, or at a savepoint: nothing was committed."""


if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        # Code for psycopg takes this for `psycopg.errors`, as in `Database.errors.UniqueViolation`.
        return getattr(psycopg.errors, name)
