"""Tests C15 with packages as they are released: their state follows the request.

In each cell of a project's matrix (see run.py) 20 requests of three users are answered at once, on
pgbackend and on Django's own engine, whose sync views are the reference.
"""

from __future__ import annotations

import pytest

from tests.packages.play import NAMES, play
from tests.support.processes import ROOT


@pytest.mark.slow
@pytest.mark.sweep(one_in=3)
@pytest.mark.parametrize("name", NAMES)
def test_what_a_package_keeps_follows_the_request(name: str, conninfo: str) -> None:
    said = play(name)
    assert len(said["pgbackend"].cells) == 12
    assert said["stock"].wrong("sync view") == {}, "the check is wrong itself"
    assert said["pgbackend"].wrong() == {}


@pytest.mark.parametrize("name", NAMES)
def test_the_page_has_a_row_for_each_package(name: str) -> None:
    assert f"(../tests/packages/{name}.py)" in (ROOT / "docs" / "packages.md").read_text()
