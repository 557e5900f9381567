"""Asks for the id of a transaction before its COMMIT, and afterwards for what became of it.

The link may break during COMMIT. Whether the server has committed is then known to the server
alone, which tells it by the transaction's id (`pg_xact_status()`).

Note [Ids that are given again]
A server that crashes loses the end of its log, and a standby that is promoted may lack the end of
the old primary's log. Either gives the ids that it has not seen there to other transactions: the
status of an id may be that of another transaction. So the place in the log at which COMMIT was sent
is asked for, too: the record of the commit comes after that place. A server that has recovered,
from a crash or as a standby, says until its next start how far it has replayed the log
(`pg_last_wal_replay_lsn()`). If that is not beyond the place, the transaction is lost, whatever its
id says. If it is, the server has seen the id, and has not given it again. This tells of one
recovery. Of several, one after the other, the server shows the last one only.

A server that was stopped in good order after a recovery shows none. But its statistics, which a
crash resets, are younger than the question then, as its process is.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from psycopg.pq.abc import PGresult

# Names are qualified: a user's search_path may have functions of the same names.
_LOG = "pg_catalog.pg_current_wal_insert_lsn()"
_PLACE = f"pg_catalog.pg_wal_lsn_diff({_LOG}, '0/0')"
_SYSTEM = "(pg_catalog.pg_control_system()).system_identifier"
_TIMELINE = f"pg_catalog.substr(pg_catalog.pg_walfile_name({_LOG}), 1, 8)"
_RECOVERED = "pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_last_wal_replay_lsn(), '0/0')"
_NOW = "EXTRACT(EPOCH FROM pg_catalog.clock_timestamp())"
_STATISTICS = "pg_catalog.pg_stat_get_bgwriter_stat_reset_time()"
_RENEWED = f"EXTRACT(EPOCH FROM LEAST({_STATISTICS}, pg_catalog.pg_postmaster_start_time()))"
_ID = "pg_catalog.pg_current_xact_id_if_assigned()"

#: Asks for the id of the open transaction; has no row if the transaction has written nothing.
ASK_ID = (
    f"SELECT {_ID}, {_PLACE}, {_SYSTEM}, {_TIMELINE}, {_NOW}, {_RECOVERED} WHERE {_ID} IS NOT NULL"
).encode()

_PRIMARY = "NOT pg_catalog.pg_is_in_recovery()"
#: Asks what server this is; the timeline is NULL on a standby.
ASK_SERVER = (
    f"SELECT {_SYSTEM}, CASE WHEN {_PRIMARY} THEN {_TIMELINE} END, {_RECOVERED}, {_RENEWED}"
)
#: Asks the same, and the status of the transaction with the id that is the parameter.
ASK_FATE = (
    f"{ASK_SERVER}, CASE WHEN {_PRIMARY} THEN pg_catalog.pg_xact_status(%s::pg_catalog.xid8) END"
)
#: The status of an id that the server has not given to any transaction yet.
NEVER_GIVEN = "never given"


class Verdict(enum.Enum):
    """Says if a transaction is committed whose COMMIT was not answered.

    A verdict is neither true nor false: compare it with `Verdict.COMMITTED`.
    """

    COMMITTED = "committed"
    #: It was rolled back, or is lost: it may be repeated.
    ABORTED = "aborted"
    #: It had written nothing when COMMIT was sent: it may be repeated.
    NOTHING_WRITTEN = "nothing written"
    #: The server cannot tell, or not yet.
    UNKNOWN = "unknown"

    def __bool__(self) -> NoReturn:
        raise TypeError("a verdict is neither true nor false: compare it with Verdict.COMMITTED")


@dataclass(frozen=True, slots=True)
class CommitId:
    """Identifies a transaction, as the server told it before COMMIT was sent."""

    #: The transaction's id, with the epoch; None if it had none, because it had written nothing.
    xid: int | None
    #: The place in the log that the record of the commit comes after.
    place: int = 0
    #: The identifier and the timeline of the server, its time, and how far it had replayed the log
    #: when it last recovered; None if it was started without a recovery.
    system: str = ""
    timeline: int = 0
    asked_at: float = 0.0
    recovered: int | None = None

    @classmethod
    def read(cls, result: PGresult) -> CommitId:
        """Return the id that the `result` of `ASK_ID` has."""
        if result.ntuples == 0:
            return cls(None)
        xid, place, system, timeline, now = (_text(result, column) for column in range(5))
        recovered = None if result.get_value(0, 5) is None else int(_text(result, 5))
        return cls(int(xid), int(place), system, int(timeline, 16), float(now), recovered)


class Fate(NamedTuple):
    """Says what a server knows of a transaction; the result of `ASK_FATE`."""

    system: str
    timeline: int | None
    recovered: int | None
    #: The earlier one of two times: when it was started, and when its statistics were reset.
    renewed_at: float
    status: str | None

    @classmethod
    def of(
        cls, system: object, timeline: str | None, recovered: Any, renewed: Any, status: str | None
    ) -> Fate:
        """Return the fate that a row of `ASK_FATE` tells."""
        number = None if timeline is None else int(timeline, 16)
        return cls(str(system), number, _maybe_int(recovered), float(renewed), status)

    def verdict(self, asked: CommitId) -> Verdict | None:
        """Return the verdict on the transaction `asked`; None if the server should be asked again.

        See Note [Ids that are given again].
        """
        if self.timeline is None:
            return None  # a standby, which may be promoted soon
        if self.system != asked.system or self.timeline < asked.timeline:
            return Verdict.UNKNOWN  # another server, or an old primary that was left behind
        if self._has_recovered_since(asked):
            if self.recovered is not None and self.recovered <= asked.place:
                return Verdict.ABORTED
            if self.recovered is None or self.timeline > asked.timeline + 1:
                return self._verdict_after_several()
        return _BY_STATUS.get(self.status, Verdict.UNKNOWN)

    def _has_recovered_since(self, asked: CommitId) -> bool:
        """Return whether the server has recovered, or was promoted, since the id was asked for.

        If it was at most stopped in good order, then nothing is lost.
        """
        if self.timeline != asked.timeline:
            return True
        if self.recovered is None:
            return self.renewed_at > asked.asked_at
        return self.recovered != asked.recovered

    def _verdict_after_several(self) -> Verdict:
        """Return the verdict if a recovery is not the server's last start, or not the only one.

        The id may have been given again. So a commit may be that of another transaction; but if the
        transaction with this id is not committed, whichever it is, the one that was asked for is
        not committed either.
        """
        if self.status in {None, "committed"}:
            return Verdict.UNKNOWN
        return Verdict.ABORTED


#: The verdicts if the status is that of the transaction; None if the server is to be asked again.
_BY_STATUS: dict[str | None, Verdict | None] = {
    "committed": Verdict.COMMITTED,
    "aborted": Verdict.ABORTED,
    "in progress": None,
}


def _text(result: PGresult, column: int) -> str:
    value = result.get_value(0, column)
    assert value is not None
    return value.decode()


def _maybe_int(text: Any) -> int | None:
    return None if text is None else int(text)
