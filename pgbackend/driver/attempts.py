"""Attempts to connect: why the last one failed, and when the next one may be made.

psycopg_pool tells nobody why it could not connect. The pool notes here when its attempts begin and
how they end; while it has no connection at all, the error of one attempt answers for those that
would follow at once, so that a server that is down is asked twice a second at most.
"""

from __future__ import annotations

import copy
from collections import deque
from time import monotonic
from types import CodeType

import psycopg

#: Seconds for which a failed attempt to connect answers for the next ones, when the pool has no
#: connection at all: at most two attempts a second reach a server that is down.
FAILURE_WINDOW = 0.5

#: How many attempts to connect may be made at once, and in a second when none succeeds.
MAX_ATTEMPTS = 2


class Attempts:
    """The attempts of one pool to connect."""

    def __init__(self) -> None:
        #: Why the last attempt failed, unless another has succeeded since.
        self.failure: Exception | None = None
        self._failed_at = 0.0
        #: When the server has ended a session while it was prepared: the first since a success.
        self._session_lost: float | None = None
        #: When the last attempts began.
        self._began: deque[float] = deque([-1.0] * MAX_ATTEMPTS, MAX_ATTEMPTS)

    def begin(self) -> float:
        """Note that an attempt begins, and return when."""
        began = monotonic()
        self._began.append(began)
        return began

    def note_failure(self, exc: Exception, began: float) -> None:
        """Remember why an attempt that `began` then has failed, to tell those who ask next.

        A session that the server has ended while it was prepared says nothing about the next
        attempt. It is made at once, for those who wait; if that ends so, too, it is remembered.
        """
        now = monotonic()
        self.failure, self._failed_at = exc, now
        if _is_end_of_session(exc):
            if self._session_lost is None:
                self._session_lost = now
            if began < self._session_lost:  # this is the first loss, or was under way at that time
                self.failure = None

    def note_success(self) -> None:
        """Forget why earlier attempts have failed."""
        self.failure = self._session_lost = None

    def may_try_again(self) -> bool:
        """Tell whether a session was lost, so that the next attempt may be made at once."""
        return self.failure is None and self._session_lost is not None

    def recent_failure(self) -> Exception | None:
        """Return why the last attempt failed, if it is too soon for another one."""
        if self.failure is None:
            return None
        now = monotonic()
        if now - self._failed_at < FAILURE_WINDOW or now - self._began[0] < 1.0:
            return self.failure
        return None


def repeat(exc: Exception) -> Exception:
    """Return an error like `exc` for one more caller: each gets a traceback of its own."""
    if not isinstance(exc, psycopg.Error):
        error: Exception = psycopg.OperationalError(f"could not connect: {exc}")
    else:
        error = copy.copy(exc)
    error.__cause__ = exc
    return error


def forget_connecting(exc: Exception, preparing: CodeType) -> None:
    """Take the frames that connected out of the traceback: they hold the password, and a socket.

    The frames from `preparing` on, the code that prepares a session, stay: the user's code may be
    among them.
    """
    traceback = exc.__traceback__
    while traceback is not None and traceback.tb_frame.f_code is not preparing:
        traceback = traceback.tb_next
    if traceback is None:
        exc.__cause__ = exc.__context__ = None
    exc.__traceback__ = traceback


def _is_end_of_session(exc: Exception) -> bool:
    """Tell whether the server took the connection, and ended the session while it was prepared."""
    if exc.__traceback__ is None:  # `forget_connecting()` left no frame: no connection was made
        return False
    error = exc if isinstance(exc, psycopg.Error) else exc.__cause__
    if not isinstance(error, psycopg.OperationalError):
        return False
    if isinstance(error, psycopg.errors.ConnectionTimeout):
        return False
    # Without a code it is libpq's own error: the link was lost without a word.
    return error.sqlstate is None or error.diag.severity_nonlocalized in ("FATAL", "PANIC")
