"""Tests that each outcome of two packages' own tests is stock's, in sync code and green."""

from __future__ import annotations

import pytest

from tests.support.processes import Program, run_all


@pytest.mark.slow
@pytest.mark.suite
def test_the_own_tests_of_django_tenants_have_stocks_outcomes_sync_and_green(
    conninfo: str,
) -> None:
    (done,) = run_all([Program(["-m", "tests.packages.own_suite"])], timeout=900)
    assert done.returncode == 0, f"{done.output}\n{done.errors}"


@pytest.mark.slow
@pytest.mark.suite
def test_the_own_tests_of_the_rest_framework_have_stocks_outcomes_through_the_whole_stack(
    conninfo: str,
) -> None:
    (done,) = run_all(
        [Program(["-m", "tests.packages.suites", "djangorestframework", "--no-write"])], timeout=900
    )
    assert done.returncode == 0, f"{done.output}\n{done.errors}"
