"""Tests which statements are vouched for: those with the text, or with comments around it."""

from __future__ import annotations

from typing import Any

import pytest
from psycopg import sql

from pgbackend.driver.vouching import is_vouched, vouching

SELECT = "SELECT 1 -- of ours\n"


@pytest.mark.parametrize(
    "query",
    [
        SELECT,
        f"  {SELECT};\n",
        f"/* a */ -- b\n/* c\n */{SELECT}/*d='e'*/ ; -- f",
        f"/**/{SELECT}/***/",
    ],
)
def test_comments_around_a_statement_change_nothing(query: str) -> None:
    with vouching([SELECT]):
        assert is_vouched(query)


@pytest.mark.parametrize(
    "query",
    [
        "",
        "SELECT 2",
        SELECT.encode(),
        sql.SQL(SELECT),
        f"SET a = 'b'; {SELECT}",
        f"{SELECT}; SET a = 'b'",
        f"{SELECT}, set_config('a', 'b', false)",
        f"/* */ SET a = 'b'; /* */ {SELECT}",
        f"{SELECT}/* */ ; SET a = 'b'; /* */",
        f"{SELECT} -- \n; SET a = 'b'",
        f"/* /* */ */ {SELECT}",
        f"-- {SELECT}",
        f"EXPLAIN ANALYZE {SELECT}",
    ],
    ids=str,
)
def test_any_other_statement_is_not_vouched_for(query: Any) -> None:
    with vouching([SELECT]):
        assert not is_vouched(query)


def test_it_is_vouched_for_in_the_block_only() -> None:
    texts: list[str] = []
    with vouching(texts):
        assert not is_vouched(SELECT)
        texts.append(SELECT)
        with vouching(["SELECT 2"]):
            assert is_vouched("SELECT 2")
            assert not is_vouched(SELECT)
        assert is_vouched(SELECT)
    assert not is_vouched(SELECT)
