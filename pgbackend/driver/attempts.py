"""Attempts to connect: why the last one failed, and when the next one may be made.

psycopg_pool tells nobody why it could not connect. So our pool records here when each attempt
begins and how it ends. Shortly after a failure no other attempt is made, so that a server that is
down, or full, is asked at most twice a second. What becomes of the requests meanwhile is told in
outages.py.
"""

from __future__ import annotations

import copy
from collections import deque
from dataclasses import dataclass
from time import monotonic
from types import CodeType

import psycopg

from .errors import OptionFailed

#: Seconds after a failed attempt in which a pool makes no other one.
FAILURE_WINDOW = 0.5

#: The largest number of attempts at the same time, and of attempts per second while all fail.
MAX_ATTEMPTS = 2


class Attempts:
    """Records when one pool's attempts to connect began, and why the last one failed."""

    def __init__(self) -> None:
        #: Why the last attempt failed; None if it succeeded, or if another may be made at once.
        self.failure: Exception | None = None
        self._failed_at = 0.0
        #: When the server first closed a connection during its set-up, since the last success.
        self._session_lost: float | None = None
        #: When the last `MAX_ATTEMPTS` attempts began; the oldest comes first.
        self._began: deque[float] = deque([-1.0] * MAX_ATTEMPTS, MAX_ATTEMPTS)

    def begin(self) -> float:
        """Record that an attempt begins now, and return the time."""
        began = monotonic()
        self._began.append(began)
        return began

    def note_failure(self, exc: Exception, began: float) -> None:
        """Record why the attempt that began at `began` failed, for `recent_failure()` to return.

        One kind of failure is not recorded at first: the server accepted a connection, and closed
        it during its set-up. The next attempt may well survive that, so it is not delayed. This
        holds for the first such failure since the last success, and for such failures of attempts
        that had begun before it.
        """
        now = monotonic()
        self.failure, self._failed_at = exc, now
        if _is_end_of_session(exc):
            if self._session_lost is None:
                self._session_lost = now
            if began < self._session_lost:  # the first such failure, or already under way then
                self.failure = None

    def note_success(self) -> None:
        """Record that an attempt succeeded: forget why earlier ones failed."""
        self.failure = self._session_lost = None

    def may_try_again(self) -> bool:
        """Return True if the last failure was of the kind that does not delay the next attempt."""
        return self.failure is None and self._session_lost is not None

    def recent_failure(self) -> Exception | None:
        """Return the last attempt's error if it is too soon for another attempt; else None."""
        return self.failure if self.too_soon() > 0 else None

    def too_soon(self) -> float:
        """Return how many seconds before the next attempt are left; 0 or less if none are."""
        if self.failure is None:
            return 0.0
        return max(self._failed_at + FAILURE_WINDOW, self._began[0] + 1.0) - monotonic()


def repeat(exc: Exception, as_is: tuple[type[Exception], ...] = ()) -> Exception:
    """Return a copy of `exc`, to raise in one more caller.

    It is a `psycopg.Error`, unless the class of `exc` is one of `as_is`.
    """
    if not isinstance(exc, (psycopg.Error, *as_is)):
        error: Exception = psycopg.OperationalError(f"could not connect: {exc}")
    else:
        error = copy.copy(exc)
    # A function's own error, which the user may look for, stays the next in the chain.
    error.__cause__ = exc.__cause__ if isinstance(exc, OptionFailed) else exc
    return error


def forget_connecting(exc: Exception, preparing: CodeType) -> None:
    """Remove psycopg's frames from the traceback of `exc`: they hold the password, and a socket.

    `preparing` is the code object of the function that sets up a new connection. The frame of that
    function stays, and the frames that it called: the user's own code may be among them.
    """
    traceback = exc.__traceback__
    while traceback is not None and traceback.tb_frame.f_code is not preparing:
        traceback = traceback.tb_next
    if traceback is None and not isinstance(exc, OptionFailed):  # whose cause has no secrets
        exc.__cause__ = exc.__context__ = None
    exc.__traceback__ = traceback


def _is_end_of_session(exc: Exception) -> bool:
    """Return whether `exc` says that the server closed a new connection during its set-up.

    `forget_connecting()` must have been called for `exc`.
    """
    if exc.__traceback__ is None:  # no frame of the set-up is left: no connection was made
        return False
    error = exc if isinstance(exc, psycopg.Error) else exc.__cause__
    if not isinstance(error, psycopg.OperationalError):
        return False
    if isinstance(error, psycopg.errors.ConnectionTimeout):
        return False
    # An error without an SQLSTATE is libpq's: the link broke before the server gave a reason.
    return error.sqlstate is None or error.diag.severity_nonlocalized in ("FATAL", "PANIC")


@dataclass(slots=True, eq=False)
class Making:
    """Records who calls `renew()` while the task `task_id` makes a connection."""

    task_id: int
    renewed_by_itself: bool = False
    renewed_by_others: bool = False

    def note(self, task_id: int) -> None:
        """Record that `renew()` was called by the task whose `id()` is `task_id`."""
        if task_id == self.task_id:
            self.renewed_by_itself = True
        else:
            self.renewed_by_others = True
