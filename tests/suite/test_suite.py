"""Django's own suite: the modules that exercise a backend most, in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .__main__ import BACKEND_MODULES, CANNOT

#: Asks for a server with PostgreSQL's contributed extensions, which the wheel's has not all.
EXTENSIONS = "postgres_tests"


@pytest.mark.suite
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param([name for name in BACKEND_MODULES if name != EXTENSIONS], id="backend"),
        pytest.param([EXTENSIONS], id=EXTENSIONS),
        pytest.param(["--gis"], id="gis_tests"),
    ],
)
def test_djangos_suite_has_stocks_outcomes_sync_and_green(
    request: pytest.FixtureRequest, tmp_path: Path, arguments: list[str]
) -> None:
    command = [sys.executable, "-m", "tests.suite", "--out", str(tmp_path), "--parallel", "2"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*command, *arguments], cwd=root, capture_output=True, text=True, check=False
    )
    if done.returncode == CANNOT and not request.config.option.require_servers:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
