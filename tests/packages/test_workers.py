"""Tests C1, C2 and C8 with queues and their real workers: tasks use the ORM, and are sent by it.

The workers run sync code in one thread (django-tasks-db), tasks of an event loop and threads
(procrastinate), and forked children whose parent has used the database before (Celery).
"""

from __future__ import annotations

import json

import pytest

from tests.packages.play import ENGINES, faults_of, rows_missing
from tests.support.processes import ROOT, Program, run_all


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["pgbackend", "stock"])
def test_workers_do_what_is_sent_from_each_context(engine: str, conninfo: str) -> None:
    (finished,) = run_all(
        [
            Program(
                ["-m", "tests.packages.workers"],
                environment={
                    "PACKAGES_ENGINE": ENGINES[engine],
                    "PACKAGES_DATABASE": f"packages_workers_{engine}",
                },
            )
        ]
    )
    said = json.loads(finished.check())
    assert said.pop("sessions_end"), "sessions are left"
    assert faults_of(said) == {}
    for each in said.values():
        worker = each["worker"]
        assert worker["status"] == 0, worker["said"]
        if engine == "pgbackend":  # on stock, the parent leaves its connection open
            assert "ResourceWarning" not in worker["said"]
            assert "RuntimeWarning" not in worker["said"]
    if engine == "pgbackend":
        assert rows_missing(said, (ROOT / "docs" / "packages.md").read_text()) == []
