"""Runs those modules of Django's own suite, in own processes, that exercise a backend most."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import server

from .__main__ import CANNOT


@pytest.mark.slow
@pytest.mark.suite
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--backend"], id="backend"),
        pytest.param(["--gis"], id="gis_tests"),
        pytest.param(["--whole-stack"], id="whole_stack"),
    ],
)
def test_djangos_suite_has_stocks_outcomes_sync_green_and_as_a_whole_stack(
    request: pytest.FixtureRequest, tmp_path: Path, arguments: list[str]
) -> None:
    command = [sys.executable, "-m", "tests.suite", "--out", str(tmp_path), "--parallel", "2"]
    environment = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
    if server.given:  # otherwise pytest's server would be taken, which may be the wheel's
        environment["DATABASE_URL"] = server.given
    done = subprocess.run(
        [*command, *arguments],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == CANNOT and not request.config.option.require_servers:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
