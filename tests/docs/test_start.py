"""Tests the pages of the start word by word: they make projects that are served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.docs.following import Project
from tests.docs.snippets import ROOT


@pytest.mark.slow
def test_the_page_makes_a_project_that_serves(tmp_path: Path) -> None:
    project = Project(ROOT / "docs/start.md", tmp_path, "shop/settings.py")
    project.follow()
    order, payment = map(json.loads, project.answers)
    assert order == {"table": "7", "lines": ["Broth"], "paid_at": None}
    assert payment["paid_at"] is not None


@pytest.mark.slow
def test_the_page_on_wagtail_makes_a_site_that_serves(tmp_path: Path) -> None:
    project = Project(ROOT / "docs/start-wagtail.md", tmp_path, "mysite/settings/base.py")
    project.follow()
    assert b"Welcome to your new Wagtail site!" in project.answers[0]
