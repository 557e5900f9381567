"""A connection that tells if the outcome of a COMMIT is not known, and identifies the transaction.

If the link breaks during COMMIT, the server may have committed or not: `OutcomeUnknown` is raised,
unless it is known that nothing was committed. If `asks_commit_id`, the connection asks for the id
of the transaction before it sends COMMIT; later the server tells by the id what became of it
(commit_ids.py).
"""

from __future__ import annotations

from psycopg import errors as e
from psycopg.abc import PQGen
from psycopg.pq import ConnStatus, TransactionStatus

from .bridge import current
from .cancellation import deliver_cancellation, hold_cancellation
from .commit_ids import ASK_ID, CommitId
from .errors import OutcomeUnknown
from .opening import OpeningConnection
from .turns import Turns

_BAD = ConnStatus.BAD
_INTRANS = TransactionStatus.INTRANS
_INERROR = TransactionStatus.INERROR
_UNKNOWN = TransactionStatus.UNKNOWN

#: With this SQLSTATE a server ends a session that has been idle in a transaction for too long. It
#: looks at that before it executes a statement, so it has not committed.
_ENDED_WHILE_IDLE = "25P03"
#: The class of the SQLSTATEs of broken connections: poolers tell by these that a server is lost.
_CONNECTION_LOST = "08"


class CommittingConnection(OpeningConnection):
    """A psycopg connection whose `commit()` raises `OutcomeUnknown` if its outcome is not known."""

    #: Whether the transaction's id is asked for, in a message of its own, before each COMMIT.
    asks_commit_id = False
    #: The id of the transaction whose COMMIT was sent last; None if it was not asked for.
    commit_id: CommitId | None = None
    #: The turns of the tasks and threads that share the transaction; None if nobody shares it.
    turns: Turns | None = None
    #: The state of the connection when COMMIT was sent, until it is answered; None at other times.
    _status_at_commit: int | None = None

    def commit(self) -> None:
        """Commit; a cancellation that arrives meanwhile is raised afterwards.

        Raises `OutcomeUnknown` if the link breaks after COMMIT was sent.
        """
        try:
            with hold_cancellation():
                super().commit()
        except e.Error as exc:
            self.check_outcome(exc)
            raise
        finally:
            self._status_at_commit = None
        deliver_cancellation()

    def _commit_gen(self) -> PQGen[None]:
        if self.turns is not None:
            self.turns.end_is_sent()
        if self.asks_commit_id:
            return self._asked_commit_gen(super()._commit_gen())
        self._status_at_commit = self.pgconn.transaction_status
        return super()._commit_gen()

    def _asked_commit_gen(self, commit_gen: PQGen[None]) -> PQGen[None]:
        yield from self.before_commit_gen()
        yield from commit_gen

    # Reads on replicas know by this name that no write is sent: see replicas/writes.py.
    _asked_commit_gen.__name__ = "_commit_gen"

    def before_commit_gen(self) -> PQGen[None]:
        """Ask for the transaction's id if `asks_commit_id`; COMMIT may be sent afterwards."""
        self.commit_id = None
        if (
            self.asks_commit_id
            and not self._pipeline
            and self.pgconn.transaction_status == _INTRANS
        ):
            result = yield from self._exec_command(ASK_ID)
            assert result is not None
            self.commit_id = CommitId.read(result)
        self._status_at_commit = self.pgconn.transaction_status

    def may_commit(self) -> bool:
        """Return whether COMMIT was sent, and the server may execute it.

        A failed transaction is rolled back by it; on a broken connection nothing was sent.
        """
        return self._status_at_commit not in {None, _INERROR, _UNKNOWN}

    def end_to_commit(self) -> None:
        """Note that COMMIT was answered, or has failed."""
        self._status_at_commit = None

    def check_outcome(self, exc: e.Error) -> None:
        """Raise `OutcomeUnknown` if `exc`, an error during COMMIT, leaves its outcome unknown.

        It is known if COMMIT was not sent, and if the server has answered with an error and goes on
        to serve the session. A server that ends the session may have committed before.
        """
        if not self.may_commit() or isinstance(exc, OutcomeUnknown):
            return
        state = exc.sqlstate or ""
        is_lost = self.pgconn.status == _BAD or state.startswith(_CONNECTION_LOST)
        if not is_lost or state == _ENDED_WHILE_IDLE:
            return
        if (portal := current()) is not None and portal.pending is not None:
            # A cancellation that is raised later would hide this error.
            exc.__context__, portal.pending = portal.pending, None
        reason = str(exc).partition("\n")[0]
        raise self.outcome_unknown(f"the connection was lost ({reason})") from exc

    def outcome_unknown(self, what: str) -> OutcomeUnknown:
        """Return the error for a COMMIT whose outcome is not known; `what` has happened."""
        error = OutcomeUnknown(
            f"{what} while its transaction was committed: it may or may not have been committed; "
            "check before you repeat it"
        )
        error.database = self.session_settings.database
        error.commit_id = self.commit_id
        error.is_asked = self.asks_commit_id
        return error
