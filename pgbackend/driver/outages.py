"""Outages: whether a failed attempt to connect may be waited out, and what the log says of it.

An outage begins with a failed attempt while the pool has no open connection, and ends with the next
connection. Most are short: a restart, a switchover. If a wait can cure the failure (the server
refuses, starts up, shuts down, is still a standby), the tasks that ask for a connection wait for
one while the outage is younger than its *grace*. After that, and after any other failure (the
password, the database, an option, a certificate), they are told at once why none can be made.

The log has one warning when an outage begins, one each minute with counts, and one at its end.
"""

from __future__ import annotations

import logging
import re
from time import monotonic

import psycopg

from .errors import OptionFailed
from .refusals import CURABLE

logger = logging.getLogger("pgbackend.driver")

#: Seconds between the warnings of a long outage.
LOG_INTERVAL = 60.0

#: Seconds after the last attempt in which an outage is forgotten. A pool that nobody has asked
#: since then does not know when its outage ended; the next failure begins another one.
FORGOTTEN = 60.0

#: Begins psycopg's error for an unknown host name. It may pass if the name was known before:
#: some clusters take a name back while no server stands behind it.
_NO_SUCH_NAME = "failed to resolve host"

# libpq gives no SQLSTATE for a failed attempt: see refusals.py for messages in other languages.
_CURABLE = re.compile(
    r"connection refused|no such file or directory\s+is the server running"
    r"|timed out|timeout expired|no route to host|network is unreachable|host is down"
    r"|connection reset|broken pipe|server closed the connection|connection lost"
    r"|connection has been closed|eof detected|unexpected eof|temporary failure in name resolution"
    r"|the database system is (starting up|shutting down|in recovery|not (yet )?accepting)"
    r"|terminating connection|session is (not )?read-only|server is (not )?in hot standby"
    r"|too many clients|too many connections|connection slots are reserved"
    r"|cannot connect to server|server login has been failing|no more connections allowed"
    r"|pooler is shut",
    re.IGNORECASE,
)
_INCURABLE = re.compile(
    r"authentication failed|pg_hba\.conf|certificate|no password supplied"
    r"|(database|role|user) \"[^\n]*\" does not exist|no such (database|user)",
    re.IGNORECASE,
)


def is_curable(exc: BaseException) -> bool:
    """Return whether a later attempt to connect may well succeed where this one failed with `exc`.

    Of several hosts, each with a failure of its own, one that may come back is enough, unless
    another one has refused the password, the database or the certificate.
    """
    text = str(exc)
    if isinstance(exc, psycopg.errors.ConnectionTimeout):
        return _INCURABLE.search(text) is None
    if isinstance(exc, psycopg.Error) and exc.sqlstate in CURABLE:
        return True
    if not isinstance(exc, psycopg.OperationalError | OSError) or isinstance(exc, OptionFailed):
        return False
    return _CURABLE.search(text) is not None and _INCURABLE.search(text) is None


def is_unclear(exc: BaseException) -> bool:
    """Return whether `exc`, with which an attempt to connect failed, tells nothing that is known.

    The message may be in another language than English: then the server is asked (refusals.py).
    """
    text = str(exc)
    return (
        isinstance(exc, psycopg.OperationalError)
        and not isinstance(exc, OptionFailed)
        and exc.sqlstate is None
        and not (_CURABLE.search(text) or _INCURABLE.search(text) or _NO_SUCH_NAME in text)
    )


class Outages:
    """Records whether one pool has an outage, and logs it."""

    def __init__(self, name: str, grace: float) -> None:
        self.name = name
        self.grace = grace
        #: When the outage began; None if there is none.
        self.since: float | None = None
        self._curable = True
        #: Failed attempts, and failed requests, since the log last said so, or since the outage
        #: began.
        self._attempts = self._refused = 0
        self._logged_at = 0.0
        self._failed_at = 0.0
        self._has_connected = False
        #: Whether the server was known to refuse all sessions after the last attempt.
        self._refused_all = False
        #: Whether the log has said that connections fail, and not yet that they succeed again.
        self._logged = False

    def attempt_failed(self, exc: Exception, *, serves: bool, refuses: bool = False) -> None:
        """Record that an attempt failed.

        `serves` says whether the pool has an open connection, and `refuses` whether the server is
        known to refuse all sessions for now.
        """
        now = monotonic()
        if now - self._failed_at >= FORGOTTEN:
            self._forget()
        self._failed_at = now
        self._curable = is_curable(exc) or self._is_known_to_pass(exc, refuses)
        self._refused_all = refuses
        self._attempts += 1
        if not serves and self.since is None:
            self.since = now
        if not self._logged:
            if serves and self._logged_at and now - self._logged_at < LOG_INTERVAL:
                return  # a full server refuses some, and lets others in: one warning a minute
            self._say(
                now,
                "the pool %r cannot open a connection: %s%s",
                self.name,
                one_line(exc),
                self._outlook(),
            )
            self._logged = True
        elif now - self._logged_at >= LOG_INTERVAL:
            counts = self._attempts, self._refused
            self._say(
                now,
                "the pool %r still cannot open a connection: %d attempts and %d requests have "
                "failed since the last warning: %s",
                self.name,
                *counts,
                one_line(exc),
            )
            self._attempts = self._refused = 0

    def _is_known_to_pass(self, exc: Exception, refuses: bool) -> bool:
        # It may have refused the attempt for the last time, and accepts sessions since.
        refused = refuses or (self._refused_all and is_unclear(exc))
        return refused or (self._has_connected and _NO_SUCH_NAME in str(exc))

    def refused(self, requests: int = 1) -> None:
        """Count requests that failed without a connection, if there is an outage."""
        if self._logged:
            self._refused += requests

    def connected(self) -> None:
        """End the outage: an attempt has succeeded."""
        if self._logged:
            now = monotonic()
            took = "" if self.since is None else f" after {now - self.since:.1f} s"
            self._say(
                now,
                "the pool %r opens connections again%s: %d attempts and %d requests have failed "
                "since the last warning",
                self.name,
                took,
                self._attempts,
                self._refused,
            )
        self._has_connected = True
        self._forget()

    def _forget(self) -> None:
        self._logged = False
        self.since = None
        self._attempts = self._refused = 0

    def may_be_waited_out(self) -> bool:
        """Return whether a task that needs a connection should wait, after a failed attempt.

        If the pool had an open connection at the last attempt, its outage is yet to begin.
        """
        return self._curable and self.age() < self.grace

    def age(self) -> float:
        """Return the seconds since the outage began; 0 if there is none."""
        return 0.0 if self.since is None else monotonic() - self.since

    def _outlook(self) -> str:
        if self.since is None:
            return " (others are open)"
        if self._curable and self.grace:
            return f" (requests wait for up to {self.grace:g} s, then they fail at once)"
        return " (requests fail at once)"

    def _say(self, now: float, text: str, *values: object) -> None:
        self._logged_at = now
        logger.warning(text, *values)


def one_line(exc: BaseException) -> str:
    """Return the message of `exc` without its line breaks."""
    return " ".join(str(exc).split())
