"""Tests turns: a statement that loses its turn again and again is sent in the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import Runner

from .conftest import Pools, pinned

#: More than Python's limit on recursion.
MANY = 1100


class LostTurns:
    """The turns of a transaction in which another thread is always faster, `MANY` times."""

    lost = 0

    def may_send(self) -> bool:
        """Return False until `MANY` turns are lost."""
        self.lost += 1
        return self.lost > MANY

    def end_is_sent(self) -> None:
        """Record nothing."""


def execute(cursor: Any) -> object:
    return cursor.execute("SELECT 1").fetchall()


def executemany(cursor: Any) -> object:
    cursor.executemany("SELECT %s", [(1,)], returning=True)
    return cursor.fetchall()


def copy(cursor: Any) -> object:
    with cursor.copy("COPY (SELECT 1) TO STDOUT") as copying:
        copying.set_types(["int4"])
        return [*copying.rows()]


def stream(cursor: Any) -> object:
    return [*cursor.stream("SELECT 1")]


@pytest.mark.parametrize("call", [execute, executemany, copy, stream])
def test_a_statement_may_lose_its_turn_any_number_of_times(
    run_once: Runner, pools: Pools, call: Callable[[Any], object]
) -> None:
    def main() -> None:
        with pinned(pools()) as lease, lease.connection.cursor() as cursor:
            cursor.takes_turns, cursor.renew = True, lambda cursor: cursor._holds or cursor.hold()
            lease.connection.turns = turns = LostTurns()
            assert call(cursor) == [(1,)]
            assert turns.lost > MANY
            lease.connection.turns = None

    run_once.green(main)
