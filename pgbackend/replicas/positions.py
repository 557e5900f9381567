"""Positions in the write-ahead log: how far a primary has written, and a replica has replayed.

Note [Positions]
A commit is in the log of its primary before the server answers it. So the position that the primary
has inserted up to (`pg_current_wal_insert_lsn()`), asked after that answer, covers the commit, with
`synchronous_commit = off`, too; the positions that were written or flushed need not. A replica has
the commit if it has replayed up to there (`pg_last_wal_replay_lsn()`).

At the begin of a page of the log, the primary tells the place after the page's header, although
nothing was written there; a replica tells the place before it. An idle primary may stay there for
minutes, so the header is taken off.

After a failover, the new primary writes a new timeline from some position on. Positions of a server
that still replays an older timeline do not say whether it has what was written on the new one. A
server is on a timeline if it has replayed, or streams, that timeline: then what it has replayed
agrees with it, as PostgreSQL checks. The timeline that a server streams is shown to members of
`pg_read_all_stats` only; for others it is known from the server's next restartpoint on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

QUERY = """
SELECT pg_is_in_recovery(), (pg_control_system()).system_identifier,
  CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn()
    ELSE pg_current_wal_insert_lsn() END - '0/0'::pg_lsn,
  CASE WHEN pg_is_in_recovery() THEN greatest(
      (pg_control_checkpoint()).timeline_id,
      (pg_control_recovery()).min_recovery_end_timeline,
      (SELECT received_tli FROM pg_stat_wal_receiver))
    ELSE ('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))::bit(32)::integer END,
  current_setting('wal_block_size')::integer,
  pg_size_bytes(current_setting('wal_segment_size')),
  extract(epoch FROM clock_timestamp() - pg_last_xact_replay_timestamp())::float8
"""

#: Bytes of the header of a page of the log, and of the first page of a segment.
_HEADER, _FIRST_HEADER = 24, 40


@dataclass(frozen=True, slots=True)
class Position:
    """A place in the write-ahead log: the timeline, and the number of bytes before the place."""

    timeline: int
    lsn: int

    def covers(self, other: Position) -> bool:
        """Return whether a server that is here has all that was written up to `other`."""
        return self.timeline >= other.timeline and self.lsn >= other.lsn

    def __str__(self) -> str:
        return f"{self.timeline}:{self.lsn >> 32:X}/{self.lsn & 0xFFFFFFFF:X}"


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer of a server to `QUERY`."""

    is_replica: bool
    system: int
    """The identifier of the cluster, which a primary and its replicas have in common."""
    position: Position
    behind: float | None
    """The age of the last transaction that a replica has replayed, in seconds."""

    @classmethod
    def of_row(cls, row: tuple[Any, ...]) -> Self:
        """Return the answer that `row`, the result of `QUERY`, stands for."""
        is_replica, system, lsn, timeline, page, segment, behind = row
        lsn = int(lsn or 0)  # None: a replica that has replayed nothing
        if not is_replica:
            lsn = without_header(lsn, page, segment)
        return cls(is_replica, int(system), Position(timeline, lsn), behind)


def without_header(lsn: int, page: int, segment: int) -> int:
    """Return `lsn`, or the begin of its page if there is nothing but the page's header between."""
    if lsn % segment == _FIRST_HEADER:
        return lsn - _FIRST_HEADER
    if lsn % page == _HEADER:
        return lsn - _HEADER
    return lsn
