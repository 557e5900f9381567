"""Tests the benchmark of projects of sync views: it serves each way, compares, and tells."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.sync_stack import __main__ as command
from benchmarks.sync_stack import report
from benchmarks.sync_stack.measure import Window, measure
from benchmarks.sync_stack.projects import Project, made
from benchmarks.sync_stack.ways import STOCK, WAYS

PAGE = f"# Benchmarks\n\n{report.HEADING}\n\nText.\n\n{report.BEGIN}\nold\n{report.END}\n"


@pytest.fixture(scope="module")
def shop(conninfo: str) -> Iterator[Project]:
    with made("shop", conninfo) as project:
        yield project


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_a_way_is_measured(shop: Project, way: Any) -> None:
    sample = measure(shop, way, "api_list", Window(clients=2, seconds=0.3, warm=0.2))
    assert sample.rate > 0
    assert sample.cpu > 0
    assert sample.p99 > 0
    assert sample.memory > 10
    assert sample.load < 1


@pytest.mark.slow
def test_a_way_that_answers_otherwise_than_stock_ends_the_run(
    shop: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = [way for way in WAYS if way.name == STOCK or way.whole]
    monkeypatch.setattr(command, "WAYS", ways)
    command._check(shop, "admin_list")
    told = {**shop.told, "token": "wrong"}
    wrong = Project(shop.settings, shop.url, shop.paths, told)
    answers = command.answers
    monkeypatch.setattr(
        command,
        "answers",
        lambda project, way, work: answers(wrong if way.whole else project, way, work),
    )
    with pytest.raises(SystemExit, match="the whole stack green, uvicorn answers api_list"):
        command._check(shop, "api_list")


def _found() -> dict[str, Any]:
    sample = {"cpu": 1000, "p99": 5.0, "threads": 3, "connections": 2, "memory": 50.0, "load": 0.1}
    by_way = {way.name: [{**sample, "rate": 10.0 * n}] for n, way in enumerate(WAYS, 1)}
    return {
        "command": "python -m benchmarks.sync_stack",
        "begun": "then",
        "rounds": 1,
        "versions": {"Python": "3"},
        "machine": "2 processors",
        "works": {work: {"64": by_way} for work in ("wagtail", "api_list", "admin_list")},
    }


def test_the_tables_take_their_place_on_the_page(tmp_path: Path) -> None:
    page, readme = tmp_path / "benchmarks.md", tmp_path / "README.md"
    page.write_text(PAGE)
    readme.write_text(PAGE)
    report.write(_found(), page, readme)
    assert "| 10 (2) | 30, 3.00× (2) | 60, 6.00× (2) |" in readme.read_text()
    text = page.read_text()
    assert "old" not in text and "old" not in readme.read_text()
    assert "| 64 | the whole stack green, uvicorn | 60 (6.00) | 1.00 (1.00) | 5 |" in text
    assert report.section(page).startswith(report.HEADING)


def test_a_page_without_a_place_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text("# Benchmarks\n")
    with pytest.raises(ValueError, match="no place for the tables"):
        report.write(_found(), page)


def test_the_page_shows_the_results_that_are_kept() -> None:
    found = json.loads(report.RESULTS.read_text())
    assert "\n".join(report.tables(found)) in report.PAGE.read_text()
    assert "\n".join(report.figures(found)) in report.README.read_text()
