"""Tests the cost of operations, in instructions of Python: it is the same on a busy machine.

The limits are today's numbers and a little room. Lower them when something has become shorter; a
commit that raises one says why.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pgbackend.fast.registry import SHORTCUTS

COST = Path(__file__).parents[2] / "benchmarks" / "cost.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.version_info < (3, 13), reason="counts are of Python 3.13 and later"),
    *(pytest.mark.shortcut(name) for name in SHORTCUTS),
]

#: Instructions beyond those of Django's engine in a sync context: by Python (each has a compiler of
#: its own), operation and stack.
MORE = {
    # Django's cursor is used as it is, and a model's cached values are checked for each statement:
    # by identity, since the proxies of tracing tools equal the functions that they wrap.
    # Each statement looks if settings are declared (`pgbackend.session()`): 12 to 60 instructions.
    # Each wait for the server notes when it begins and ends, for dumps and the errors of pools: 7
    # instructions, three times in a transaction.
    # A COMMIT looks if the id of the transaction is to be asked for, and notes the state of the
    # connection, so that it is known whether a broken link was whole before: 6 instructions.
    # A lease notes what may have taken an advisory lock of its session: 7 instructions on the loop.
    # The counts vary by some instructions from one run to the next; so 10 are added to each.
    # A statement looks if it goes through a transaction pooler: 20 instructions in sync code, 2 on
    # the loop.
    (3, 13): {
        "SELECT 1": {"sync": 153},
        "get(pk)": {"sync": -2685, "green": -2213, "a-method": -1706},
        "100 rows": {"sync": -16107, "green": -15613, "a-method": -12972},
        "save()": {"sync": -64, "green": 614, "a-method": 1064},
        "get(pk) in atomic()": {"sync": -378, "green": -155},
        "update(F)": {"sync": -877, "green": -142},
        "create() in atomic()": {"sync": 1752, "green": 1920},
    },
    (3, 14): {
        "SELECT 1": {"sync": 176},
        "get(pk)": {"sync": -2868, "green": -2407, "a-method": -1878},
        "100 rows": {"sync": -16482, "green": -15996, "a-method": -13243},
        "save()": {"sync": -36, "green": 640, "a-method": 1111},
        "get(pk) in atomic()": {"sync": -279, "green": -183},
        "update(F)": {"sync": -1005, "green": -260},
        "create() in atomic()": {"sync": 2044, "green": 2063},
    },
    (3, 15): {
        "SELECT 1": {"sync": 176},
        "get(pk)": {"sync": -2856, "green": -2371, "a-method": -1836},
        "100 rows": {"sync": -16476, "green": -15966, "a-method": -13108},
        "save()": {"sync": -35, "green": 666, "a-method": 1142},
        "get(pk) in atomic()": {"sync": -267, "green": -133},
        "update(F)": {"sync": -995, "green": -231},
        "create() in atomic()": {"sync": 2056, "green": 2117},
    },
}
#: The bounds of the running Python; a later one has those of the last that was measured.
HERE = MORE[min(max(MORE), max(min(MORE), sys.version_info[:2]))]


@pytest.fixture(scope="module")
def found(conninfo: str) -> Any:
    stacks = ["--stacks", "sync", "green", "a-method", "green, observed"]
    done = subprocess.run(
        [sys.executable, COST, "--instructions", "--json", "--rounds", "3", *stacks],
        env={**os.environ, "DATABASE_URL": conninfo},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("operation", HERE)
def test_an_operation_takes_no_more_instructions_than_it_did(found: Any, operation: str) -> None:
    counts = {stack: cost["median"] for stack, cost in found[operation].items()}
    more = {stack: round(counts[stack] - counts["stock sync"]) for stack in HERE[operation]}
    assert all(more[stack] <= most for stack, most in HERE[operation].items()), more


@pytest.mark.parametrize("operation", HERE)
def test_an_exporter_of_metrics_adds_few_instructions(found: Any, operation: str) -> None:
    off, on = (found[operation][stack]["median"] for stack in ("green", "green, observed"))
    assert on <= 1.03 * off, f"{on / off:.2%}"
