"""Tests that the pictures of the order desk are those of its data, and that pages show them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import psycopg
import pytest

from proj.pictures import plot, samples
from tests.kitchen.conftest import ROOT
from tests.kitchen.test_demo import empty_database
from tests.support.chromium import require_chromium

__all__ = ["empty_database"]  # a fixture

PICTURES = ROOT / "docs" / "_static" / "pictures"
MOST = 1_500_000  # bytes of all pictures together
MOST_OF_THE_FILM = 1_000_000


@pytest.fixture(autouse=True)
def _empty_tables_afterwards() -> None:
    """Leave the tests' database alone: nothing here writes to it."""


@pytest.fixture(scope="module")
def taken() -> dict[str, Any]:
    return json.loads((PICTURES / "rush.json").read_text())


def test_the_plot_is_drawn_from_the_samples(taken: dict[str, Any]) -> None:
    drawn = plot.picture(taken)
    assert (PICTURES / "rush.svg").read_text() == drawn
    ET.fromstring(drawn)
    assert samples.to_text(taken) == (PICTURES / "rush.json").read_text()


def test_the_samples_show_what_the_title_says(taken: dict[str, Any]) -> None:
    told = plot.figures(taken)
    assert told["leased"] <= told["pool"]
    assert told["backends"] <= told["pool"] + 1, "the pool's, and the board's that listens"
    assert told["in_flight"] >= 20 * told["leased"]
    assert taken["failed"] == 0
    assert told["promised"] == told["orders"]


def test_a_rush_of_other_figures_is_drawn_otherwise(taken: dict[str, Any]) -> None:
    other = {**taken, "samples": [*taken["samples"], [99.0, 1234, 3, 0, 8]]}
    assert plot.headline(other).startswith("1,234 requests in flight")
    assert plot.picture(other) != plot.picture(taken)


def test_the_page_tells_the_figures_of_the_samples(taken: dict[str, Any]) -> None:
    _, section = (ROOT / "docs" / "demo.md").read_text().split("## A rush, measured")
    section = " ".join(section.split("## ")[0].split())
    told = plot.figures(taken)
    for sentence in (
        f"{told['orders']:,} orders came to one server process, whose pool had {told['pool']} ",
        f"At most {told['in_flight']:,} requests were in flight, and {told['leased']} connections",
        f"PostgreSQL itself counted {told['backends']} connections of the desk",
        f"All {told['promised']:,} orders got their promise.",
        f"Each order waited {taken['service_seconds']} seconds",
        f"the {told['samples']} samples",
    ):
        assert sentence in section


def test_each_picture_is_shown_and_each_that_is_shown_is_there() -> None:
    pages = [path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]]
    shown = {name for page in pages for name in re.findall(r"_static/pictures/([\w.-]+)", page)}
    assert shown == {path.name for path in PICTURES.iterdir()}


def test_the_pictures_are_small() -> None:
    sizes = {path.name: path.stat().st_size for path in PICTURES.iterdir()}
    assert sum(sizes.values()) < MOST
    assert sizes["rush.webp"] < MOST_OF_THE_FILM


@pytest.mark.sweep(one_in=2)  # half a minute
def test_the_command_makes_all_kinds_of_pictures(
    tmp_path: Path, empty_database: str, request: pytest.FixtureRequest
) -> None:
    require_chromium(request.config)
    command = [sys.executable, "-m", "proj.pictures", "--quick", "--into", str(tmp_path)]
    env = {**os.environ, "DATABASE_URL": empty_database}
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    taken = json.loads((tmp_path / "rush.json").read_text())
    assert taken["promised"] == taken["orders"] > 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "rush.json",
        "rush.svg",
        "rush.webp",
        "rush-still.webp",
        "order-dark.webp",
    }
    with psycopg.connect(empty_database) as outside:
        assert outside.execute("SELECT count(*) FROM kitchen_order").fetchone()
