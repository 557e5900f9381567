"""Raises `OutcomeUnknown` as an error of Django's, and asks the server what became of a COMMIT."""

from __future__ import annotations

import asyncio
import math
import time
from time import monotonic
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.db import Error, OperationalError, connections

from .driver import bridge
from .driver import errors as driver_errors
from .driver.commit_ids import ASK_FATE, ASK_SERVER, NEVER_GIVEN, CommitId, Fate, Verdict

#: Seconds between two questions: first, and at most.
_PAUSE, _LONGEST_PAUSE = 0.02, 0.5
#: Seconds that an attempt to connect takes at most: the next one may reach another server.
_LONGEST_ATTEMPT = 10.0
#: The SQLSTATE of `pg_xact_status()` for an id that the server has not given to a transaction yet.
_IN_THE_FUTURE = "22023"


class OutcomeUnknown(OperationalError):  # noqa: N818 - the name of the driver's
    """The connection broke during COMMIT: the transaction may or may not have been committed.

    The driver's error is the `__cause__`. `verdict()` asks the server.
    """

    #: The alias of the database; the id of the transaction, or None if it is not known.
    using: str | None = None
    commit_id: CommitId | None = None
    _is_asked = False

    def verdict(self, *, timeout: float = 10.0) -> Verdict:
        """Ask the database, through a new connection of the alias, if the transaction is committed.

        While the server still works on the COMMIT, cannot be reached, or is a standby, it is asked
        again, for `timeout` seconds at most. The result is `Verdict.UNKNOWN` if it cannot tell.
        Raises Django's `OperationalError` if no server could be reached. Raises
        `ImproperlyConfigured` if the alias is not set up to ask for the ids of transactions.
        """
        _check_timeout(timeout)
        asked = self._id_to_ask_for()
        if asked.xid is None:
            return Verdict.NOTHING_WRITTEN
        assert self.using is not None
        end, pause = monotonic() + timeout, _PAUSE
        while True:
            verdict, error = _ask_once(self.using, asked, min(end - monotonic(), _LONGEST_ATTEMPT))
            if verdict is not None:
                return verdict
            if monotonic() + pause >= end:
                break
            _sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        if error is not None:
            raise error
        return Verdict.UNKNOWN

    async def averdict(self, *, timeout: float = 10.0) -> Verdict:
        """Do what `verdict()` does, on the event loop."""
        return await bridge.run(self.verdict, timeout=timeout)

    def _id_to_ask_for(self) -> CommitId:
        if self.commit_id is not None and self.using is not None:
            return self.commit_id
        if self._is_asked or self.using is None:
            raise ImproperlyConfigured(
                "The id of this transaction is not known: it was committed in a pipeline of "
                "psycopg's, or on a connection that no alias has. Look for its rows instead."
            )
        raise ImproperlyConfigured(
            "The id of this transaction is not known: set DATABASES"
            f"[{self.using!r}]['OPTIONS']['commit_id'] to True, to have it asked for before each "
            "COMMIT. For this transaction, look for its rows."
        )


def raise_told(exc: OperationalError) -> None:
    """Raise `OutcomeUnknown` in the place of `exc` if its cause is the driver's error."""
    cause = exc.__cause__
    if not isinstance(cause, driver_errors.OutcomeUnknown) or isinstance(exc, OutcomeUnknown):
        return
    told = OutcomeUnknown(*exc.args)
    told.using, told.commit_id, told._is_asked = cause.database, cause.commit_id, cause.is_asked  # noqa: SLF001
    raise told.with_traceback(exc.__traceback__) from cause


def _check_timeout(timeout: object) -> None:
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout >= 0:
        raise ValueError(f"timeout is {timeout!r}: it must be a number of seconds, at least 0")


def _ask_once(
    using: str, asked: CommitId, seconds: float
) -> tuple[Verdict | None, OperationalError | None]:
    """Return the server's verdict, or None if it has none yet; and the error, if it was not asked.

    An attempt to connect takes at most `seconds`, or two.
    """
    wrapper: Any = connections[using].copy()
    wrapper.settings_dict["OPTIONS"].pop("pool", None)  # a connection of its own, not a kept one
    wrapper.settings_dict["OPTIONS"].setdefault("connect_timeout", max(2, math.ceil(seconds)))
    try:
        with wrapper.cursor() as cursor:
            return _fate(cursor, asked).verdict(asked), None
    except OperationalError as exc:
        return None, exc
    finally:
        wrapper.close()


def _fate(cursor: Any, asked: CommitId) -> Fate:
    try:
        cursor.execute(ASK_FATE, [str(asked.xid)])
        return Fate.of(*cursor.fetchone())
    except Error as exc:
        if getattr(exc.__cause__, "sqlstate", None) != _IN_THE_FUTURE:
            raise
    cursor.execute(ASK_SERVER)
    system, timeline, recovered, renewed = cursor.fetchone()
    return Fate.of(system, timeline, recovered, renewed, NEVER_GIVEN)


def _sleep(seconds: float) -> None:
    """Wait; in green code, let the loop serve other tasks meanwhile."""
    if bridge.current() is None:
        time.sleep(seconds)
    else:
        bridge.await_(asyncio.sleep(seconds))
