"""Tests that a run without ``--slow`` leaves out slow tests, but no clause and no sweep."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from tests.support.slow import drawn

ROOT = Path(__file__).parents[1]
CONTRACT = sorted((ROOT / "tests/contract").glob("test_*.py"))


def collected(*arguments: str) -> tuple[list[str], int]:
    """Return the tests that a run would run, and the number of those that it says it left out."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = re.search(
        r"^(\d+) slow tests were left out: --slow runs them too", done.stdout, re.MULTILINE
    )
    return re.findall(r"^tests/.*::.*$", done.stdout, re.MULTILINE), int(said[1]) if said else 0


def test_each_file_of_the_contract_has_tests_that_are_quick() -> None:
    quick, left_out = collected("tests/contract")
    assert {name.partition("::")[0] for name in quick} == {
        str(path.relative_to(ROOT)) for path in CONTRACT
    }
    assert left_out > 0


@pytest.mark.slow
def test_slow_tests_run_if_they_are_asked_for() -> None:
    name = "tests/contract/test_c16_left_behind.py"
    quick, left_out = collected(name)
    every, none_left_out = collected(name, "--slow")
    assert {*quick} < {*every}
    assert (len(quick) + left_out, none_left_out) == (len(every), 0)
    slow, _ = collected(name, "-m", "slow")
    assert {*slow} == {*every} - {*quick}
    assert collected(slow[0]) == ([slow[0]], 0)


@pytest.mark.parametrize("cases", [0, 1, 7, 8, 30])
def test_of_a_sweep_one_case_in_so_many_is_drawn_from_each_region(cases: int) -> None:
    here = [*drawn(range(cases), Random("seed"), one_in=7)]
    assert [case // 7 for case in here] == [*range(-(-cases // 7))]
    assert here == [*drawn(range(cases), Random("seed"), one_in=7)]


@pytest.mark.slow
def test_a_slow_run_may_take_the_drawn_cases_of_the_sweeps_only() -> None:
    name = "tests/contract/test_c16_left_behind.py"
    quick, _ = collected(name)
    drawn_only, _ = collected(name, "--slow", "--sweeps", "drawn")
    every, _ = collected(name, "--slow")
    assert {*quick} <= {*drawn_only} < {*every}
