"""Starts the projects, each on pgbackend and on Django's own engine, and reads their output."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.processes import Program, run_all

HERE = Path(__file__).parent
NAMES = sorted(path.stem for path in HERE.glob("with_*.py"))
ENGINES = {"pgbackend": "pgbackend", "stock": "django.db.backends.postgresql"}


@dataclass
class Said:
    """Holds the observations of a project on one engine."""

    told: dict[str, str]
    cells: dict[str, dict[str, Any]]

    def wrong(self, view: str = "view") -> dict[str, dict[str, Any]]:
        """Return the cells in which something was wrong, of all views or of one kind."""
        return {
            name: cell for name, cell in self.cells.items() if f" {view}" in name and cell["wrong"]
        }

    def count(self, view: str = "view") -> int:
        return sum(cell["wrong"] for cell in self.wrong(view).values())


def play(name: str, *, stock_views: str = "sync") -> dict[str, Said]:
    """Play the matrix of one project on both engines, side by side; on stock with `stock_views`."""
    views = {"pgbackend": "sync async", "stock": stock_views}
    finished = run_all(
        Program(
            ["-m", "tests.packages.run", name],
            environment={
                "PACKAGES_ENGINE": engine,
                "PACKAGES_DATABASE": f"packages_{name}_{key}",
                "PACKAGES_VIEWS": views[key],
            },
        )
        for key, engine in ENGINES.items()
    )
    said = {}
    for key, each in zip(ENGINES, finished, strict=True):
        assert each.returncode == 0, f"{key}: {each.errors}"
        told = json.loads(each.output)
        said[key] = Said(cells=told.pop("cells"), told=told)
    return said


# --- Helpers and workers --------------------------------------------------------------------------


def faults_of(said: dict[str, Any]) -> dict[str, str]:
    """Return what went wrong, by package, context and case."""
    return {
        f"{each['package']}, {context}, {case}": fault
        for each in said.values()
        for context, cases in each["results"].items()
        for case, fault in cases.items()
        if fault
    }


def rows_missing(said: dict[str, Any], page: str) -> list[str]:
    """Return the packages without a row in a table of `page` that has their numbers of cases."""
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| ")]
    return [
        each["package"]
        for each in said.values()
        if not any(each["package"] in row[1] and _numbers_of(each) == row[2:5] for row in rows)
    ]


def _numbers_of(each: dict[str, Any]) -> list[str]:
    return [f" {len(cases)} of {len(cases)} " for cases in each["results"].values()]
