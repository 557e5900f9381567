"""Tests the driver's shortcuts: a bypassed function is called only while its shortcut is off.

`test_comparisons_driver` checks that the outcome is the same; and the other tests are run with
``PGBACKEND_SHORTCUTS=0``, too. The tests of clause C18 check that a patch takes effect as on
Django's engine.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields
from types import CodeType
from typing import Any

import psycopg
import pytest

from pgbackend.driver import bridge, connect
from pgbackend.driver.bridge import run as green
from pgbackend.driver.pool import Pool
from pgbackend.driver.shortcuts import NO_OTHERS, Switches, is_psycopgs, looking, switches
from pgbackend.fast.fingerprints import find
from pgbackend.fast.registry import SHORTCUTS
from tests.conftest import Runner
from tests.driver.conftest import Pools, fetch, pinned
from tests.driver.test_pool import until
from tests.support.counting import Counting, Proxy

Look = Callable[[], AbstractContextManager[Any]]


@pytest.fixture(autouse=True)
def fresh_tables() -> None:
    """Leave Django's database alone, which these tests do not use."""


@pytest.fixture(autouse=True)
def _all_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for each in fields(Switches):
        monkeypatch.setattr(switches, each.name, True)


def as_it_is(adapters: Any) -> None:
    """Prepare no cursor."""


def on_client(pools: Pools) -> Pool:
    return pools(connect={"cursor_factory": psycopg.ClientCursor})


# --- The work of each shortcut, in the block of `look()`
#   -------------------------------------------


async def lease(pools: Pools, look: Look) -> None:
    """Take a free connection, and hand it to a waiter."""
    pool = pools(max_size=1)
    await green(fetch, pool, "SELECT 1")
    with look():
        held = await green(pool.lease)
        waiting = asyncio.create_task(green(fetch, pool, "SELECT 2"))
        await until(lambda: pool.statistics().waiting)
        held.end()
        assert await waiting == [(2,)]


async def queue(pools: Pools, look: Look) -> None:
    pool = pools(max_size=1)
    held = await green(pool.lease)
    with look():
        waiting = asyncio.create_task(green(fetch, pool, "SELECT 2"))
        await until(lambda: pool.statistics().waiting)
        held.end()
        assert await waiting == [(2,)]


async def run_statement(pools: Pools, look: Look) -> None:
    def work() -> None:
        pool = on_client(pools)
        assert pool.execute("SELECT %s::int", (1,), as_it_is) == (1, [(1,)])
        with look():
            assert pool.execute("SELECT %s::int", (2,), as_it_is) == (1, [(2,)])

    await green(work)


async def begin(pools: Pools, look: Look) -> None:
    def work() -> None:
        with connect(pools.conninfo, cursor_factory=psycopg.ClientCursor) as connection:
            with look():
                assert connection.execute("SELECT %s", ["a"]).fetchone() == ("a",)
            assert connection.info.transaction_status.name == "INTRANS"

    await green(work)


async def cursors(pools: Pools, look: Look) -> None:
    def work() -> None:
        with connect(pools.conninfo, cursor_factory=psycopg.ClientCursor) as connection:
            with look():
                cursor = connection.cursor(row_factory=psycopg.rows.dict_row)
            assert cursor.execute("SELECT 1 AS n").fetchone() == {"n": 1}
            assert connection.cursor_factory is psycopg.ClientCursor
            with pytest.raises(psycopg.NotSupportedError, match="binary"):
                connection.cursor(binary=True).execute("SELECT 1")

    await green(work)


async def blocks(pools: Pools, look: Look) -> None:
    def work() -> None:
        with pinned(on_client(pools)) as held:
            connection = held.connection
            connection.autocommit = False
            connection.execute("SELECT 1")
            connection.commit()
            with look():
                connection.back_to_autocommit()
            assert connection.autocommit

    await green(work)


Work = Callable[[Pools, Look], Coroutine[Any, Any, None]]
WORK: dict[str, Work] = {
    "lease": lease,
    "queue": queue,
    "run": run_statement,
    "begin": begin,
    "cursors": cursors,
    "blocks": blocks,
}


def called(run: Runner, pools: Pools, work: Work) -> set[CodeType]:
    """Return the code of all functions that are called in the block of `look()`."""
    seen: set[CodeType] = set()

    @contextmanager
    def look() -> Iterator[None]:
        sys.setprofile(lambda frame, event, arg: seen.add(frame.f_code))
        try:
            yield
        finally:
            sys.setprofile(None)

    run(work(pools, look))
    assert seen
    return seen


@pytest.mark.parametrize("name", WORK)
def test_what_a_shortcut_bypasses_is_called_while_it_is_off(
    run_once: Runner, pools: Pools, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    bypassed = {
        each: find(each).__code__ for each in SHORTCUTS[name].bypasses if each.startswith("psycopg")
    }
    while_on = called(run_once, pools, WORK[name])
    assert not [each for each, code in bypassed.items() if code in while_on]
    monkeypatch.setattr(switches, name, False)
    while_off = called(run_once, pools, WORK[name])
    assert not [each for each, code in bypassed.items() if code not in while_off]


#: Functions of psycopg_pool are left out: only pgbackend calls those of `AsyncConnectionPool`.
PATCHED = [
    (name, each)
    for name in WORK
    for each in SHORTCUTS[name].bypasses
    if each.startswith("psycopg.")
]


@pytest.mark.parametrize(("name", "function"), PATCHED)
def test_a_patch_of_what_a_shortcut_bypasses_takes_effect_at_once(
    run_once: Runner, pools: Pools, name: str, function: str
) -> None:
    """The connections are open already, and the statements were executed before."""
    counting = Counting(function)
    run_once(WORK[name](pools, lambda: counting))
    assert counting.calls


def test_each_switch_is_of_a_shortcut() -> None:
    assert {each.name for each in fields(Switches)} == {*WORK, "portals"} <= SHORTCUTS.keys()


def test_a_portal_serves_one_function_while_they_are_not_kept(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        kept = await green(bridge.current)
        assert await green(bridge.current) is kept
        monkeypatch.setattr(switches, "portals", False)
        last = await green(bridge.current)
        assert last is kept and last.dead
        assert (await green(bridge.current)).dead

    run(main())


def test_begin_is_a_message_of_its_own_for_a_statement_that_is_run_in_fewer_steps(
    run_once: Runner, pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main(pools: Pools, look: Look) -> None:
        def work() -> None:
            pool = on_client(pools)
            pool.soiled_unless_vouched = True  # callers of `execute()` set this
            with pinned(pool) as held:
                held.connection._autocommit = False
                with look():
                    assert held.execute("SELECT %s", ("a",), as_it_is) == (1, [("a",)])
                assert held.connection.info.transaction_status.name == "INTRANS"
                assert not held.dirty
                held.connection.rollback()

        await green(work)

    monkeypatch.setattr(switches, "begin", False)
    seen = called(run_once, pools, main)
    assert psycopg.Connection._exec_command.__code__ in seen
    assert psycopg.Cursor.execute.__code__ not in seen


# --- Users' own classes ---------------------------------------------------------------------------


class Sending(psycopg.ClientCursor[Any]):
    """Records each statement as it is sent."""

    sent: list[bytes]

    def _execute_send(self, query: Any, **kwargs: Any) -> None:
        self.sent.append(query.query)
        super()._execute_send(query, **kwargs)


@pytest.mark.parametrize("kind", ["own", "leased"])
def test_a_class_that_sends_by_itself_sends_what_begins_a_transaction(
    run: Runner, pools: Pools, kind: str
) -> None:
    sent: list[bytes] = []
    factory = type("Sending", (Sending,), {"sent": sent})

    def work() -> None:
        if kind == "own":
            with connect(pools.conninfo, cursor_factory=factory) as connection:
                connection.execute("SELECT %s", [1])
        else:
            with pinned(pools(connect={"cursor_factory": factory})) as held:
                held.connection.autocommit = False
                held.connection.execute("SELECT %s", [1])
                held.connection.rollback()

    run.green(work)
    assert sent == [b"SELECT 1"]


def test_a_patch_before_the_driver_is_loaded_is_no_function_of_psycopgs() -> None:
    assert not is_psycopgs(Proxy(psycopg.Cursor.execute, lambda: None))
    with Counting("psycopg.cursor:Cursor.execute"):
        assert not is_psycopgs(psycopg.Cursor.execute)
        _, may = looking("run", "cursor.execute cursor.close", cursor=psycopg.Cursor)
        assert may is NO_OTHERS
    seen, may = looking("run", "cursor.execute cursor.rowcount", cursor=psycopg.Cursor)
    assert seen() == may is not NO_OTHERS
