"""Relays TCP to the server, and cuts connections at a given byte of a COMMIT and its answer."""

from __future__ import annotations

from collections.abc import Iterable

from tests.support.link import Link, _Pair

COMMIT = b"Q\x00\x00\x00\x0bCOMMIT\x00"
#: The bytes of COMMIT; and of its answer: CommandComplete and ReadyForQuery.
ASKED, ANSWERED = len(COMMIT), 12 + 6


class CuttingLink(Link):
    """A link that cuts each connection at its COMMIT.

    `plan` has, for one COMMIT after the other, how many bytes of COMMIT and of its answer pass.
    """

    def __init__(self, conninfo: str) -> None:
        self.plan: list[int] = []
        super().__init__(conninfo)

    def cut_at(self, plan: Iterable[int]) -> None:
        self.plan = list(plan)

    def _seen(self, pair: _Pair, data: bytes) -> bytes:
        if COMMIT[5:] not in data or not self.plan:
            return data
        passing = self.plan.pop(0)
        if passing > ASKED:
            pair.left = passing - ASKED
            return data
        # All of a longer message passes: that of a pipeline.
        pair.server.write(data[:passing] if data == COMMIT else data)
        pair.server.close()
        pair.client.close()
        return b""
