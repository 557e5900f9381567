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
