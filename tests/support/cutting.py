"""Relays TCP to the server, and cuts connections at a given byte of a COMMIT and its answer."""

from __future__ import annotations

from collections.abc import Iterable

from tests.support.link import Link, _Pair

COMMIT = b"Q\x00\x00\x00\x0bCOMMIT\x00"
#: The bytes of COMMIT; and of its answer: CommandComplete and ReadyForQuery.
ASKED, ANSWERED = len(COMMIT), 12 + 6


class CuttingLink(Link):
    """A link that cuts each connection at its COMMIT.

    `plan` has, for one COMMIT after the other, how many bytes of COMMIT and of its answer pass. For
    each of them, the link notes in `cuts` whether the whole of COMMIT reached the server.
    """

    def __init__(self, conninfo: str) -> None:
        self.plan: list[int] = []
        super().__init__(conninfo)

    def cut_at(self, plan: Iterable[int]) -> None:
        self.plan = list(plan)

    def _seen(self, pair: _Pair, data: bytes) -> bytes:
        if data != COMMIT or not self.plan:
            return data
        passing = self.plan.pop(0)
        if passing >= ASKED:
            pair.left = passing - ASKED
            if not pair.left:
                # Nothing of the answer passes; the client need not wait for it.
                pair.server.write(data)
                pair.server.close()
                pair.client.close()
                return b""
            return data
        pair.server.write(data[:passing])
        pair.server.close()
        pair.client.close()
        return b""
