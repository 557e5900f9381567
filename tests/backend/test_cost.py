"""What an operation costs, in instructions of Python: the same on a machine that is busy.

The numbers are those of today and a little room. Lower them when something has become shorter; who
must raise one says why in the commit.
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
    pytest.mark.skipif(sys.version_info < (3, 13), reason="counts are of Python 3.13"),
    *(pytest.mark.shortcut(name) for name in SHORTCUTS),
]

#: More instructions than Django's engine in a sync context, by operation and stack.
MORE = {
    # Django's cursor is used as it is, and what is kept of a model is looked at for each statement.
    "SELECT 1": {"sync": 77},
    "get(pk)": {"sync": -2800, "green": -2289, "a-method": -1796},
    "100 rows": {"sync": -16210, "green": -15680, "a-method": -13053},
    "save()": {"sync": -154, "green": 561, "a-method": 998},
    "get(pk) in atomic()": {"sync": -571, "green": -449},
    "update(F)": {"sync": -967, "green": -195},
    "create() in atomic()": {"sync": 1556, "green": 1632},
}


@pytest.fixture(scope="module")
def found(conninfo: str) -> Any:
    stacks = ["--stacks", "sync", "green", "a-method"]
    done = subprocess.run(
        [sys.executable, COST, "--instructions", "--json", "--rounds", "3", *stacks],
        env={**os.environ, "DATABASE_URL": conninfo},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("operation", MORE)
def test_an_operation_takes_no_more_instructions_than_it_did(found: Any, operation: str) -> None:
    counts = {stack: cost["median"] for stack, cost in found[operation].items()}
    more = {stack: round(counts[stack] - counts["stock sync"]) for stack in MORE[operation]}
    assert all(more[stack] <= most for stack, most in MORE[operation].items()), more
