"""Tests C2: in sync code, everything is as with `django.db.backends.postgresql`.

The same script runs on either engine, in a process of its own (`probes/sync.py`), and prints what
it sees. Each test here is one scenario of it: both engines must print the same, and the right
thing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgbackend.fast.registry import is_on

ROOT = Path(__file__).parents[2]
COST = ROOT / "benchmarks" / "cost.py"
PROBE = Path(__file__).parent / "probes" / "sync.py"
ENGINES = ("django.db.backends.postgresql", "pgbackend")

Facts = dict[str, Any]


@pytest.fixture(scope="module")
def environment(
    conninfo: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """Make a role to assume and a service to connect to, for both engines."""
    given = psycopg.conninfo.conninfo_to_dict(conninfo)
    services = tmp_path_factory.mktemp("services") / "pg_service.conf"
    lines = [f"{name}={value}" for name, value in given.items()]
    services.write_text("\n".join(["[probed]", *lines, "application_name=by service"]))
    with psycopg.connect(conninfo, autocommit=True) as admin:
        admin.execute("DROP ROLE IF EXISTS probed")
        admin.execute("CREATE ROLE probed")
        admin.execute("CREATE TABLE probed (id int PRIMARY KEY, name text UNIQUE)")
        yield {
            **os.environ,
            "DATABASE_URL": conninfo,
            "PGSERVICEFILE": str(services),
            "PYTHONPATH": str(ROOT),
        }
        admin.execute("DROP TABLE probed")
        admin.execute("DROP ROLE probed")


def ask(environment: dict[str, str], *command: object) -> Any:
    """Run a Python program, and return its output, which is JSON."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def facts(environment: dict[str, str]) -> tuple[Facts, Facts]:
    """Return the script's output on Django's engine and on ours, run at the same time."""
    with ThreadPoolExecutor() as threads:
        stock, ours = threads.map(lambda engine: ask(environment, PROBE, engine), ENGINES)
    return stock, ours


@pytest.fixture
def told(facts: tuple[Facts, Facts]) -> Any:
    """Return a function that gives a scenario's output, once both engines agree on it."""

    def both(name: str) -> Any:
        stock, ours = (each[name] for each in facts)
        assert ours == stock
        return ours

    return both


def test_a_thread_has_one_connection_of_its_own(told: Any) -> None:
    assert told("a_thread_has_one_connection_of_its_own") == [3, [True, True], [True, True]]


def test_conn_max_age_is_honoured(told: Any) -> None:
    found = told("conn_max_age")
    assert found == {"default": False, "aged": True, "kept": True, "too old": True}


def test_conn_health_checks_replace_a_dead_connection(told: Any) -> None:
    checked, unchecked, afterwards = told("conn_health_checks")
    assert checked and afterwards
    assert unchecked == ["django.db.utils", "OperationalError"], "without the check"


def test_close_old_connections_and_close_all_close_them(told: Any) -> None:
    kept, in_block, closed, all_closed, gone = told("close_old_connections_and_close_all")
    assert kept, "as long as it is young"
    assert in_block[1] in ("InterfaceError", "OperationalError"), "a block that was left open"
    assert closed and all(all_closed) and gone


def test_options_pool_is_djangos_synchronous_pool(told: Any) -> None:
    busy, again, facts, session_gone, with_age = told("the_pool_of_options")
    assert busy[1] == "OperationalError" and "couldn't get a connection" in busy[2]
    assert again and session_gone
    assert facts == [1, 0, 0.05, 1, "ConnectionPool"]
    assert with_age[1] == "ImproperlyConfigured"


def test_iterator_uses_a_server_side_cursor(told: Any) -> None:
    found = told("server_side_cursors")
    assert found["default"] == found["binding"] == [[1, 1], [0, 0]]
    assert found["in a block"] == [[1, 0], [0, 0]], "not WITH HOLD"
    assert found["client_side"] == [[0, 0], [0, 0]], "DISABLE_SERVER_SIDE_CURSORS"


def test_assume_role_sets_the_role(told: Any) -> None:
    assert told("assume_role") == [True, True]


def test_isolation_level_is_that_of_transactions(told: Any) -> None:
    level, _, bad = told("isolation_level")
    assert level == "serializable"
    assert bad[1] == "ImproperlyConfigured"


def test_server_side_binding_and_prepare_threshold_are_honoured(told: Any) -> None:
    found = told("server_side_binding_and_prepared_statements")
    bound = {alias: values[0] for alias, values in found.items()}
    assert bound == {"default": False, "binding": True, "prepared": True}
    assert found["default"][1] == 0 and found["prepared"][1] > 0


def test_a_service_is_connected_to(told: Any) -> None:
    name, unknown = told("service")
    assert name == "by service"
    assert 'definition of service "nowhere" not found' in unknown[2]


def test_time_zone_is_set(told: Any) -> None:
    assert told("time_zone") == ["Asia/Tokyo", "UTC"]


def test_errors_are_djangos_with_psycopgs_as_their_cause(told: Any) -> None:
    found = told("errors")
    assert found["missing"][1:] == [
        "ProgrammingError",
        'relation "no_such_table" does not exist',
        "UndefinedTable",
        "42P01",
    ]
    assert all(name != "no error" for name, *_ in found.values())


def test_transactions_savepoints_and_hooks_are_djangos(told: Any) -> None:
    seen = told("transactions")
    assert [entry for entry in seen if isinstance(entry, str)] == ["hook 1", "hook 2"]


def test_queries_and_execute_wrappers_see_the_same(told: Any) -> None:
    queries, wrapped = told("what_is_logged")
    assert queries[0] == "BEGIN" and queries[-1] == "COMMIT"
    assert len(wrapped) == 4, "two statements, a savepoint and its release"


def test_the_same_messages_go_over_the_wire_but_begin_goes_with_the_first_statement(
    facts: tuple[Facts, Facts],
) -> None:
    stock, ours = (each["what_goes_over_the_wire"] for each in facts)
    if not is_on("begin"):
        assert ours == stock
        return
    begun = stock.index('F\t10\tQuery\t "BEGIN"')
    _, complete, ready, first = stock[begun : begun + 4]
    assert ready.endswith("ReadyForQuery\t T")
    length, text = first.removeprefix("F\t").split("\tQuery\t ")
    with_begin = f'F\t{int(length) + len("BEGIN; ")}\tQuery\t "BEGIN; {text[1:]}'
    assert ours == [*stock[:begun], with_begin, complete, *stock[begun + 4 :]]
    assert sum(message.startswith("F") for message in ours) == 7, "a round trip each"


def test_workers_of_sync_to_async_have_one_connection_a_thread(told: Any) -> None:
    assert told("workers_of_sync_to_async") == 1


def test_management_commands_say_the_same(told: Any) -> None:
    said = told("commands")
    assert "class Probed(models.Model)" in said["inspectdb"]


@pytest.mark.slow
@pytest.mark.shortcut("select")
def test_sync_code_is_not_slower(environment: dict[str, str]) -> None:
    """Compare the time of one process's processor, with both engines in turns.

    The time of the server does not count. The bound leaves room for a machine that does other
    things: 1.02 is the usual maximum. tests/fast/test_cost.py counts what a busy machine cannot
    blur.
    """
    found = ask(environment, COST, "--json", "--stacks", "sync", "--rounds", "41", "--count", "30")
    ratios = {name: round(costs["sync"]["ratio"], 2) for name, costs in found.items()}
    assert max(ratios.values()) < 1.5, ratios
