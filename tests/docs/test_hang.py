"""Tests that the outputs on docs/hang.md are what its hangs show, but for numbers."""

from __future__ import annotations

import re

import pytest

from tests.docs.snippets import ROOT
from tests.support.processes import Program, run_all

PAGE = ROOT / "docs" / "hang.md"


def _shape(line: str) -> str:
    return re.sub(r"\d+", "0", line.strip())


@pytest.mark.slow
def test_each_output_on_the_page_is_shown_by_the_hang_that_makes_it() -> None:
    program = Program(("-m", "tests.docs.hangs"), ROOT, {"PYTHONPATH": str(ROOT)})
    (finished,) = run_all([program])
    shown = {_shape(line) for line in finished.check().splitlines()}
    blocks = re.findall(r"^```text\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    lines = [_shape(line) for block in blocks for line in block.splitlines() if line != "..."]
    assert len(lines) > 20
    assert [line for line in lines if line not in shown] == []


def test_the_query_on_the_page_is_the_one_that_is_run() -> None:
    from tests.docs import hangs

    (query,) = re.findall(r"^```sql\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert query.strip() == hangs._WHO_BLOCKS.strip()
