"""Tests that README.md is short, and that its figures are those of the benchmarks' page."""

from __future__ import annotations

import json
import re

from tests.docs.snippets import ROOT

README = (ROOT / "README.md").read_text()


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 100


def test_the_range_of_the_async_views_is_that_of_the_benchmarks() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    row = next(
        line for line in page.splitlines() if line.startswith("| **pgbackend, QuerySets** |")
    )
    ratios = [float(found) for found in re.findall(r"\(([\d.]+)×\)", row)]
    said = re.search(r"answers ([\d.]+) to ([\d.]+) times the requests", README)
    assert said is not None
    assert [float(each) for each in said.groups()] == [min(ratios), max(ratios)]


def test_the_picture_is_described_by_its_own_figures() -> None:
    rush = json.loads((ROOT / "docs/_static/pictures/rush.json").read_text())
    _, in_flight, leased, _, _ = zip(*rush["samples"], strict=True)
    said = re.search(r"!\[(\d+) requests in flight, (\d+) connections in use", README)
    assert said is not None
    assert [int(each) for each in said.groups()] == [max(in_flight), max(leased)]
