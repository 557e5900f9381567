"""Tests C1 with others' helpers, as released: they work sync, green and async, as on stock."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.packages.play import ENGINES, faults_of, rows_missing
from tests.support.processes import ROOT, Program, run_all

CONTEXTS = {"pgbackend": {"sync", "green", "async"}, "stock": {"sync", "async"}}


def run_cases(*engines: str) -> list[dict[str, Any]]:
    """Run the cases of all helpers on each engine; return what `tests.packages.helpers` prints."""
    finished = run_all(
        Program(
            ["-m", "tests.packages.helpers"],
            environment={
                "PACKAGES_ENGINE": ENGINES[engine],
                "PACKAGES_DATABASE": f"packages_helpers_{engine}",
            },
        )
        for engine in engines
    )
    return [json.loads(each.check()) for each in finished]


@pytest.mark.parametrize(
    "engine", ["pgbackend", pytest.param("stock", marks=pytest.mark.slow)], ids=str
)
def test_helpers_do_the_same_sync_green_and_async(engine: str, conninfo: str) -> None:
    (said,) = run_cases(engine)
    assert {*said["retries"]["results"]} == CONTEXTS[engine]
    assert faults_of(said) == {}
    if engine == "pgbackend":
        assert rows_missing(said, (ROOT / "docs" / "packages.md").read_text()) == []
