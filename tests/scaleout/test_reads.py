"""Tests that reads see the writes of their own request while standbys are late."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.scaleout.conftest import Site
from tests.scaleout.desks import environment
from tests.support.processes import ROOT

pytestmark = pytest.mark.scaleout


def test_reads_see_their_own_writes_while_a_standby_is_late(
    site: Site, is_long: bool, pytestconfig: pytest.Config
) -> None:
    late = site.wait_until_whole()["replica"]
    tries = "10000" if is_long else "400"
    with site.late(late):
        done = subprocess.run(
            [sys.executable, "-m", "tests.support.own_writes", "--tries", tries],
            cwd=ROOT,
            env=environment(site.home, "haproxy"),
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
