"""Tests C12: a small project's own tests, written as their runners' documentation shows, pass.

The project is in `project/`. Nothing in its tests speaks of pgbackend: its async code sees the data
that a test made, and the data rolls back. `project/shop/ways.py` lists the ways by which such code
comes to the database: consumers and their communicators, threads, views, clients.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.support.processes import Finished, Program, run_all

PROJECT = Path(__file__).parent / "project"
PYTEST = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
MANAGE_TEST = ["-X", "dev", "-W", "error", "manage.py", "test", "django_tests"]

#: The name of each way to run tests, with its command, its directory, and its number of tests.
WAYS: dict[str, tuple[list[str], str, int]] = {
    "manage_test": (MANAGE_TEST, "", 26),
    "manage_test_parallel": ([*MANAGE_TEST, "--parallel", "2"], "", 26),
    "pytest_django": (PYTEST, "pytest_django_tests", 16),
    "pytest_asyncio_auto": (PYTEST, "asyncio_auto", 66),
    "pytest_asyncio_strict": (PYTEST, "asyncio_strict", 44),
    "anyio": (PYTEST, "anyio_tests", 116),
}


#: The way that the quick run takes; the others take three times as long.
QUICK = "pytest_django"


@pytest.fixture(scope="module")
def finished(conninfo: str, request: pytest.FixtureRequest) -> Iterator[dict[str, Finished]]:
    """Run the project's tests in each way that is asked for, all at once.

    Each way has a database of its own.
    """
    asked = {name for item in request.session.items if (name := _way_of(item))}
    programs = {
        name: Program(command, PROJECT / folder, {"SHOP_DATABASE": f"shop_{name}"})
        for name, (command, folder, _) in WAYS.items()
        if name in asked
    }
    yield dict(zip(programs, run_all(programs.values()), strict=True))


def _way_of(item: pytest.Item) -> str | None:
    """Return the way of a test of this module; None for a test of another module."""
    spec = getattr(item, "callspec", None)
    return spec.params.get("way") if spec and item.path == Path(__file__) else None


@pytest.mark.parametrize(
    "way", [pytest.param(name, marks=[] if name == QUICK else pytest.mark.slow) for name in WAYS]
)
def test_a_projects_own_tests_pass_unedited(finished: dict[str, Finished], way: str) -> None:
    ended, tests = finished[way], WAYS[way][2]
    said = ended.output + ended.errors
    assert ended.returncode == 0, said
    assert f"{tests} passed" in said or f"Ran {tests} tests" in said, said
    assert "Warning" not in said, said


@pytest.mark.usefixtures("finished")
def test_no_database_of_the_tests_is_left(admin: psycopg.Connection[Any]) -> None:
    left = admin.execute("SELECT datname FROM pg_database WHERE datname LIKE 'shop%'").fetchall()
    assert left == []
