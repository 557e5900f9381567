"""Tests C1, C2 and C8 with queues and their real workers: tasks use the ORM, and are sent by it.

The workers run sync code in one thread (django-tasks-db), tasks of an event loop and threads
(procrastinate), and forked children whose parent has used the database before (Celery).
"""

from __future__ import annotations

import json

import pytest

from tests.packages.play import ENGINES
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
    faults = {
        f"{each['package']}, {context}, {case}": fault
        for each in said.values()
        for context, cases in each["results"].items()
        for case, fault in cases.items()
        if fault
    }
    assert faults == {}
    for each in said.values():
        worker = each["worker"]
        assert worker["status"] == 0, worker["said"]
        if engine == "pgbackend":
            assert "ResourceWarning" not in worker["said"]
            assert "RuntimeWarning" not in worker["said"]
    page = (ROOT / "docs" / "packages.md").read_text()
    assert all(each["package"] in page for each in said.values())
