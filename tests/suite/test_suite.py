"""Django's own suite as one test: minutes long, and in processes of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.suite
def test_djangos_suite_has_stocks_outcomes_sync_and_green(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.suite", "--out", str(tmp_path), "--parallel", "2"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
